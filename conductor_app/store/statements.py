"""Statements that Django's ORM has no words for, or takes long for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from django.core.exceptions import EmptyResultSet
from django.db import connections, transaction
from django.db.models import Expression, Model, QuerySet, Value
from django.db.models.sql import UpdateQuery

from conductor_app.store.opened import is_transaction, one_statement
from conductor_app.store.session_changes import NOT_LISTENING
from conductor_app.store.waits import at_work

M = TypeVar("M", bound=Model)


class Literal(Expression):
    """A constant written into the statement itself, so that the planner can match a partial index's condition."""

    def __init__(self, value: str) -> None:
        super().__init__()
        if not value.isidentifier():
            raise ValueError(f"not a plain word: {value!r}")
        self.value = value

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        del compiler, connection
        return f"'{self.value}'", []


def update_returning(queryset: QuerySet[M], returning: Iterable[str], **values: Any) -> list[M]:
    """Update the rows of ``queryset`` and return them as they are afterwards, in one statement where there is one.

    Without ``RETURNING`` (MySQL, MariaDB) the rows are locked and read first, so the guards in ``queryset`` still
    decide; call it inside a transaction there.
    """
    connection = connections[queryset.db]
    concrete = {field.attname: field for field in queryset.model._meta.concrete_fields}
    primary_key = next(field for field in concrete.values() if field.primary_key)
    fields = [primary_key, *(concrete[name] for name in dict.fromkeys(returning) if name != primary_key.attname)]
    if connection.vendor in ("postgresql", "sqlite"):
        query: UpdateQuery = queryset.query.chain(UpdateQuery)  # type: ignore[assignment]
        query.add_update_values(values)
        try:
            sql, params = query.get_compiler(queryset.db).as_sql()
        except EmptyResultSet:  # ``pk__in=[]``, for example
            return []
        quote = connection.ops.quote_name
        columns = ", ".join(quote(str(field.column)) for field in fields)
        return list(queryset.model._base_manager.using(queryset.db).raw(f"{sql} RETURNING {columns}", params))
    with transaction.atomic(using=queryset.db, savepoint=False):
        keys = list(queryset.select_for_update().values_list("pk", flat=True))
        if not keys:
            return []
        rows = queryset.model._base_manager.using(queryset.db).filter(pk__in=keys)
        rows.update(**values)
        return list(rows.only(*(field.attname for field in fields)))


def insert_selected(model: type[Model], rows: QuerySet[Any], values: Mapping[str, Any]) -> int:
    """Insert a row for each of ``rows``, in their order; what it is made of never leaves the database.

    Args:
        model: Of which table.
        rows: What is selected from.
        values: Expressions over ``rows``, or constants, by the names of the new row's attributes.

    Returns:
        How many there are.
    """
    connection = connections[rows.db]
    fields = {field.attname: field for field in model._meta.concrete_fields}
    expressions = {
        f"new_{name}": value
        if hasattr(value, "resolve_expression")
        else Value(value, output_field=_plain(fields[name]))
        for name, value in values.items()
    }
    try:
        selected, params = rows.annotate(**expressions).values_list(*expressions).query.get_compiler(rows.db).as_sql()
    except EmptyResultSet:
        return 0
    quote = connection.ops.quote_name
    columns = ", ".join(quote(str(fields[name].column)) for name in values)
    with connection.cursor() as cursor:
        cursor.execute(f"INSERT INTO {quote(model._meta.db_table)} ({columns}) {selected}", params)
        return max(int(cursor.rowcount), 0)


def _plain(field: Any) -> Any:
    """Return the field whose values a column holds: of a key the other table's."""
    return field.target_field if field.is_relation else field


def fetch(using: str, statement: str, parameters: Mapping[str, Any], *, savepoint: bool = True) -> list[Sequence[Any]]:
    """Run a single statement and return its rows; where no transaction is open, it is one itself.

    Args:
        savepoint: Whether a transaction that is open stays usable if the statement fails.

    There it goes to the driver past Django's cursors, which take longer than the driver does, unless somebody listens
    to them: an ``execute_wrapper``, or the log of queries.
    """
    connection: Any = connections[using]
    if connection.execute_wrappers not in NOT_LISTENING or connection.queries_logged or not is_transaction(using):
        with one_statement(using) if savepoint else nullcontext(), connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return list(cursor.fetchall())
    with at_work(connection), connection.wrap_database_errors:
        # As ``connection.cursor()`` does.
        connection.close_if_health_check_failed()
        connection.ensure_connection()
        cursor = _cursor_of(connection)
        cursor.execute(statement, parameters)
        return list(cursor.fetchall())


def _cursor_of(connection: Any) -> Any:
    """Return a cursor that is kept as long as its session; a new one for each statement costs a third of its time."""
    kept = vars(connection).get("_conductor_cursor")
    # A cursor renders instants in the time zone in which it was made.
    if kept is None or kept[0] is not connection.connection or kept[1] != connection.timezone:
        kept = (connection.connection, connection.timezone, connection.create_cursor())
        connection._conductor_cursor = kept
    return kept[2]

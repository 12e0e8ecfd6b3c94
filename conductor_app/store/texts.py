"""Makes the texts of a move's statements (``store.moves``) for one database."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from django.db import connections
from django.db.models import Expression, Field, Model, Q
from django.db.models.expressions import Value
from django.db.models.sql import Query

from conductor_app.store import clock
from conductor_app.store.slots import Each, Found, Given, Now, after, column

#: A column by the name of its attribute, or an expression by a name.
Column = str | tuple[str, Expression]

#: What a script's text has before the name of a parameter that differs between rows.
EACH = "%(each_"


class Statement(NamedTuple):
    """A statement with named parameters."""

    sql: str
    #: Parameters that the declaration gives.
    constants: dict[str, Any]
    #: Columns of rows that are given, by the name of the rows.
    rows: dict[str, list[str]]


class Text:
    """Makes the texts of one move, or of one write of a script, and notes what they have to be given.

    Args:
        using: The database.
        is_shifted: Whether something is to be added to the database's clock.
        is_script: Whether what earlier writes have found comes as a parameter.
        locks: The names of the writes whose columns have names of their own.
    """

    def __init__(self, using: str, *, is_shifted: bool, is_script: bool = False, locks: Collection[str] = ()) -> None:
        self._using = using
        self.connection: Any = connections[using]
        self._is_shifted = is_shifted
        self._is_script = is_script
        self._locks = locks
        self._joined = ""
        self._constants: dict[str, Any] = {}
        self._given: dict[str, Field[Any, Any]] = {}
        self._found: set[str] = set()
        self._each: dict[str, Field[Any, Any]] = {}
        self._rows: dict[str, list[str]] = {}

    # --- What a statement consists of

    def table(self, model: type[Model]) -> str:
        return self.quote(model._meta.db_table)

    def quote(self, name: str | None) -> str:
        return str(self.connection.ops.quote_name(name))

    def names(self, told: Sequence[Column]) -> list[str]:
        return [name if isinstance(name, str) else name[0] for name in told]

    def columns(self, model: type[Model], told: Sequence[Column], *, name: str = "") -> str:
        """Return columns and expressions; with the name of a lock, each by a name that no column has."""
        texts = []
        for entry in told:
            if isinstance(entry, str):
                text, known = self.quote(column(model, entry).column), entry
                texts.append(f"{text} AS {name}_{known}" if name else text)
            else:
                text, known = self._value(model, entry[1]), entry[0]
                texts.append(f"{text} AS {name}_{known}" if name else f"{text} AS {known}")
        return ", ".join(texts)

    def condition(self, model: type[Model], where: Q | Expression) -> str:
        """Return a condition; an empty text for none."""
        if isinstance(where, Q) and not where:
            return ""
        query = Query(model, alias_cols=False)
        built = query.build_where(where if isinstance(where, Q) else Q(where))
        return self._filled(*query.get_compiler(using=self._using).compile(built))

    def assigned(self, model: type[Model], values: Mapping[str, Any]) -> str:
        """Return the assignments of an UPDATE."""
        named = ((column(model, name), value) for name, value in values.items())
        return ", ".join(f"{self.quote(field.column)} = {self._value(model, value, field)}" for field, value in named)

    def row(self, model: type[Model], values: Mapping[str, Any]) -> tuple[str, str]:
        """Return the columns of a new row, and their values; what is not given has the model's default."""
        names, texts = [], []
        for field in model._meta.concrete_fields:
            value = values.get(field.attname)
            if value is None and field.has_default() and not field.null:
                value = field.get_default()
            if value is not None:
                names.append(self.quote(field.column))
                texts.append(self._value(model, value, field))
        return ", ".join(names), ", ".join(texts)

    def source(self, first: str, rows: str) -> str:
        """Return what the one statement's INSERT selects from: the row of the first write, and the rows to store."""
        sources = [first] if first else []
        if rows:
            self._rows[rows] = list(self._each)
            arrays = ", ".join(f"%(all_{name})s::{self._type(field)}[]" for name, field in self._each.items())
            sources.append(f"UNNEST({arrays}) AS each_row ({', '.join(f'each_{name}' for name in self._each)})")
        return f" FROM {', '.join(sources)}" if sources else ""

    def lock(self, *, skips_locked: bool = False) -> str:
        """Return what locks rows as weakly as the database can, as ``locks.locked``."""
        features = self.connection.features
        if not features.has_select_for_update:
            return ""
        locked = self.connection.ops.for_update_sql(
            no_key=features.has_select_for_no_key_update,
            skip_locked=skips_locked and features.has_select_for_update_skip_locked,
        )
        return f" {locked}"

    def whole_number(self, name: str) -> str:
        """Return a given number that belongs to no column."""
        self._given[name] = Field()
        return f"%({name})s::integer" if self.connection.vendor == "postgresql" else f"%({name})s"

    def unless_it_may_be_lost(self, model: type[Model], condition: Q | Expression) -> str:
        """Return what makes the commit of the one statement wait for no disk."""
        # A setting of the transaction, which is this statement.
        setting = (
            f"CASE WHEN {self.condition(model, condition)} THEN 'off' ELSE current_setting('synchronous_commit') END"
        )
        return f"set_config('synchronous_commit', {setting}, TRUE)"

    @contextmanager
    def joined(self, lock: str) -> Iterator[None]:
        """Name what a lock has found as the columns that it is, in the statement that selects from it."""
        self._joined = lock
        try:
            yield
        finally:
            self._joined = ""

    def finished(self, sql: str) -> Statement:
        return Statement(sql, self._constants, self._rows)

    # --- What a script is given, and what it tells

    def parameters(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """Return what makes a statement's parameters of what is given and was found."""
        connection, constants, found = self.connection, self._constants, sorted(self._found)
        fields = list(self._given.items())

        def parameters(given: Mapping[str, Any]) -> dict[str, Any]:
            bound = {name: field.get_db_prep_value(given[name], connection) for name, field in fields}
            return {**constants, **bound, **{name: given.get(name) for name in found}}

        return parameters

    def row_parameters(self, row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """Return the parameters of one of many rows."""
        return {
            f"{prefix}{name}": field.get_db_prep_value(row[name], self.connection) for name, field in self._each.items()
        }

    def converter(self, model: type[Model], told: Sequence[Column]) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """Return what makes values of Python of a row, as Django's own queries do."""
        converters = []
        for number, entry in enumerate(told):
            field: Any = column(model, entry) if isinstance(entry, str) else entry[1].output_field
            expression = Value(None, output_field=field.target_field if field.is_relation else field)
            functions = [
                *self.connection.ops.get_db_converters(expression),
                *expression.get_db_converters(self.connection),
            ]
            if functions:
                converters.append((number, functions, expression))

        def convert(row: Sequence[Any]) -> Sequence[Any]:
            values = list(row[: len(told)])
            for number, functions, expression in converters:
                for function in functions:
                    values[number] = function(values[number], expression, self.connection)
            return values

        return convert

    # --- Expressions

    def _value(self, model: type[Model], value: Any, field: Field[Any, Any] | None = None) -> str:
        if value is None:
            return "NULL"
        if not hasattr(value, "resolve_expression"):
            value = Value(getattr(value, "value", value), output_field=field)
        query = Query(model, alias_cols=False)
        resolved = value.resolve_expression(query, allow_joins=False, for_save=True)
        return self._filled(*query.get_compiler(using=self._using).compile(resolved))

    def _filled(self, sql: str, parameters: Sequence[Any]) -> str:
        """Return a text whose slots are named parameters, and whose constants are written out.

        PostgreSQL's planner has to see them, to match the condition of a partial index.
        """
        left = iter(parameters)
        return re.sub("%[s%]", lambda found: found[0] if found[0] == "%%" else self._filling(next(left)), sql)

    def _filling(self, value: Any) -> str:
        if isinstance(value, Given):
            self._given[value.name] = value.output_field
            cast = f"::{self._type(value.output_field)}" if self.connection.vendor == "postgresql" else ""
            return f"%({value.name})s{cast}"
        if isinstance(value, Each):
            self._each[value.name] = value.output_field
            return f"{EACH}{value.name})s" if self._is_script else f"each_{value.name}"
        if isinstance(value, Found):
            if self._is_script:
                self._found.add(value.name)
                return f"%({value.name})s"
            if value.part == self._joined:
                return value.name
            return f"(SELECT {value.name if value.part in self._locks else value.column} FROM {value.part})"
        if isinstance(value, Now):
            instant = after("shift") if self._is_shifted else clock.DatabaseNow()
            return self._value(Model, instant)
        if isinstance(value, bool):
            return "TRUE" if value else "FALSE"
        if isinstance(value, int):
            return str(value)
        if isinstance(value, str) and (not value or value.isidentifier()):
            return f"'{value}'"
        name = f"constant_{len(self._constants)}"
        self._constants[name] = value
        return f"%({name})s"

    def _type(self, field: Field[Any, Any]) -> str:
        """Return the type of a parameter. That of a text has no length: PostgreSQL would cut it."""
        if field.primary_key:
            return str(field.rel_db_type(self.connection))
        kind = str(field.db_type(self.connection) if field.is_relation else field.cast_db_type(self.connection))
        return "text" if kind.startswith("varchar") else kind

"""The one place where time is read. Only the database's clock decides deadlines and leases.

Instants are SQL expressions, evaluated by the server inside the statement that uses them, so no worker's clock matters.
Tests move time with ``shift``; an eager run is ahead of it in its own context (``eager``).
"""

from __future__ import annotations

import datetime as dt
from typing import Any, cast

from django.conf import settings
from django.db import connections
from django.db.models import DateTimeField, DurationField, Expression, ExpressionWrapper, F, Func, QuerySet
from django.db.models.expressions import Combinable, Value
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from conductor_app.store import eager
from conductor_app.store.process import process


class DatabaseNow(Func):
    """The database's clock at the start of the statement."""

    template = "CURRENT_TIMESTAMP"
    output_field = DateTimeField()

    def as_postgresql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # Not NOW(), which is the start of the transaction: a body's long transaction would date its steps too early.
        return self.as_sql(compiler, connection, template="STATEMENT_TIMESTAMP()", **extra)

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # Not CURRENT_TIMESTAMP, which is in the session's time zone, while Django stores UTC.
        template = "UTC_TIMESTAMP(6)" if settings.USE_TZ else "CURRENT_TIMESTAMP(6)"
        return self.as_sql(compiler, connection, template=template, **extra)

    def as_sqlite(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        modifier = "" if settings.USE_TZ else ", 'localtime'"
        template = f"STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f', 'NOW'{modifier})"
        return self.as_sql(compiler, connection, template=template, **extra)


class Instant(ExpressionWrapper):  # type: ignore[type-arg]  # Django's has none
    """An instant that is computed of others."""

    def __init__(self, expression: Combinable) -> None:
        super().__init__(expression, output_field=DateTimeField())

    def as_sqlite(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        # SQLite compares instants as texts. Django's function for sums writes six digits of a second's fraction, or
        # none, where ``DatabaseNow`` has three: the same instant would come before itself.
        del extra
        sql, params = self.as_sql(compiler, connection)
        return f"STRFTIME('%%Y-%%m-%%d %%H:%%M:%%f', {sql})", params


def now() -> Combinable:
    """Return the current instant as an SQL expression."""
    return after(0)


def after(seconds: float | dt.timedelta, *, skipping: bool = True) -> Combinable:
    """Return the instant ``seconds`` from now as an SQL expression; negative values lie in the past.

    Args:
        skipping: Whether what an eager run has skipped counts. It does not for what others judge, such as a lease.
    """
    delta = interval(seconds, skipping=skipping)
    if not delta:
        return DatabaseNow()
    return Instant(DatabaseNow() + Value(delta))


def interval(seconds: float | dt.timedelta, *, skipping: bool = True) -> dt.timedelta:
    """Return what to add to the database's own clock for the instant ``seconds`` from now; see ``after``."""
    delta = (seconds if isinstance(seconds, dt.timedelta) else dt.timedelta(seconds=seconds)) + process.clock_offset
    return delta + eager.skipped() if skipping else delta


#: An instant that lies behind all others: what is due, or to be published, then is out of everybody's way.
NEVER = dt.datetime(9000, 1, 1, tzinfo=dt.UTC)


class Never(Expression):
    """``NEVER`` as a column holds it."""

    def __init__(self) -> None:
        super().__init__(output_field=DateTimeField())

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        del compiler
        is_typed = connection.vendor == "postgresql"
        return ("'9000-01-01 00:00:00+00'::timestamptz" if is_typed else "'9000-01-01 00:00:00'"), []


def read(using: str) -> dt.datetime:
    """Return the database's clock, and what was added to it here; aware if ``USE_TZ`` is on."""
    connection = connections[using]
    expression = DatabaseNow()
    compile_for_vendor: Any = getattr(expression, f"as_{connection.vendor}", expression.as_sql)
    sql, params = compile_for_vendor(None, connection)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {sql}", params)
        value = cursor.fetchone()[0]
    if isinstance(value, str):  # SQLite has no type for instants
        value = parse_datetime(value)
    if settings.USE_TZ and timezone.is_naive(value):
        value = value.replace(tzinfo=dt.UTC)
    return cast(dt.datetime, value) + interval(0)


def elapsed_since(instant: dt.datetime) -> float:
    """Return how many seconds ago the database's clock was at ``instant``, by this machine's; never less than 0."""
    return max((aware(timezone.now()) + interval(0) - instant).total_seconds(), 0.0)


def seconds_to_first(rows: QuerySet[Any], column: str) -> float | None:
    """Return in how many seconds the first instant in a column comes; ``None`` if there is no row."""
    left = ExpressionWrapper(F(column) - now(), output_field=DurationField())
    found = rows.order_by(column).values_list(left, flat=True).first()
    return None if found is None else float(found.total_seconds())


def shift(delta: dt.timedelta) -> None:
    """Move the clock of this process by ``delta``. For tests only."""
    process.clock_offset += delta


def reset() -> None:
    """Undo every ``shift``."""
    process.clock_offset = dt.timedelta()


def aware(value: dt.datetime) -> dt.datetime:
    """Return ``value`` in the form that Django stores under this project's ``USE_TZ``."""
    if settings.USE_TZ:
        return timezone.make_aware(value) if timezone.is_naive(value) else value
    return timezone.make_naive(value) if timezone.is_aware(value) else value

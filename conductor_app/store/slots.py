"""What stands in the guards and values of a move (``store.moves``) beside Django's own expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from django.db.models import BooleanField, DateTimeField, DurationField, Expression, Field, Model
from django.db.models.expressions import Combinable

from conductor_app.store import clock

AnyField: TypeAlias = "Field[Any, Any]"


class Slot(Expression):
    """A place in a statement that is filled in when its text is made (``store.texts``), or when it is run."""

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        del compiler, connection
        return "%s", [self]


class Given(Slot):
    """A value that the caller of a move gives by its name."""

    def __init__(self, name: str, output_field: AnyField) -> None:
        super().__init__(output_field=output_field)
        self.name = name


class Each(Slot):
    """A value of each of the rows that an ``Insert`` of many stores, and that the caller of the move gives."""

    def __init__(self, name: str, output_field: AnyField) -> None:
        super().__init__(output_field=output_field)
        self.name = name


class Found(Slot):
    """What an earlier write of the move has found or returned, by the names of the write and of the column."""

    def __init__(self, part: str, name: str, output_field: AnyField | None = None) -> None:
        super().__init__(output_field=output_field or BooleanField())
        self.part = part
        self.column = name
        self.name = f"{part}_{name}"


class Now(Slot):
    """The instant of the statement, by the database's clock, as ``clock.now()``."""

    def __init__(self) -> None:
        super().__init__(output_field=DateTimeField())


class _Combined(Expression):
    """An expression of others."""

    def __init__(self, *sources: Any, output_field: AnyField) -> None:
        super().__init__(output_field=output_field)
        self._sources = list(sources)

    def get_source_expressions(self) -> list[Any]:
        return self._sources

    def set_source_expressions(self, exprs: Sequence[Any]) -> None:
        self._sources = list(exprs)


class PastIndexes(_Combined):
    """A column's text, in a form that keeps PostgreSQL from the indexes on it.

    Those of what is to be dispatched and of leases would do as well for a claim, and hold an entry of each execution
    for each time that it was queued or claimed since the last vacuum: a claim reads 20 to 32 pages by them, and 4 by
    the primary key.
    """

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        sql, params = compiler.compile(self._sources[0])
        return (f"({sql} || '')" if connection.vendor == "postgresql" else sql), params


class Earlier(_Combined):
    """The earlier one of two instants; the first one if the second is null."""

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        (first, params), (second, more) = (compiler.compile(source) for source in self._sources)
        if connection.vendor == "postgresql":
            return f"LEAST({first}, {second})", [*params, *more]
        function = "MIN" if connection.vendor == "sqlite" else "LEAST"
        return f"{function}({first}, COALESCE({second}, {first}))", [*params, *more, *params]


class _Times(_Combined):
    """A span, so many times."""

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        del connection
        parts = [compiler.compile(source) for source in self._sources]
        return f"({' * '.join(sql for sql, _ in parts)})", [param for _, params in parts for param in params]


NOW = Now()


def column(model: type[Model], name: str) -> AnyField:
    """Return a column of a table by the name of its attribute."""
    return next(found for found in model._meta.concrete_fields if found.attname == name)


def given(model: type[Model], name: str, by: str = "") -> Given:
    """Return a value of a column that the caller gives, by the column's name or another one."""
    return Given(by or name, column(model, name))


def each(model: type[Model], name: str) -> Each:
    """Return a value of a column of each of the rows that the caller gives."""
    return Each(name, column(model, name))


def after(span: str | Slot) -> Expression:
    """Return the instant that lies so long after the database's clock; null if the span is null.

    Args:
        span: The name by which the caller gives it, as ``clock.interval`` returns it; or what stands for it.
    """
    length: Expression = Given(span, DurationField()) if isinstance(span, str) else span
    return clock.Instant(clock.DatabaseNow() + length)


def later(span: str, times: Combinable) -> Expression:
    """Return the instant that lies so many times a given span after now."""
    length = _Times(Given(span, DurationField()), times, output_field=DurationField())
    return clock.Instant(NOW + length)

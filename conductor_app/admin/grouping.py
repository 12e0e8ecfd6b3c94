"""Counting by group within the first rows of a query, for which Django's ORM has no words."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.exceptions import EmptyResultSet
from django.db import connections
from django.db.models import QuerySet


def grouped(rows: QuerySet[Any, Any], by: Sequence[str], *aggregates: str) -> list[tuple[Any, ...]]:
    """Group the rows of a sliced query, in one statement.

    A condition that names the last row of the slice would leave the planner without an idea of how many that are.

    Args:
        rows: A query with ``values()`` and a slice.
        by: Names of its values that make a group.
        aggregates: Names of values, each with a function: ``MIN(failed_at)``. They are part of the statement.

    Returns:
        For each group its values, how many rows it has, and its aggregates, as the driver returns them.
    """
    connection = connections[rows.db]
    try:
        sql, params = rows.query.get_compiler(rows.db).as_sql()
    except EmptyResultSet:  # somebody may see nothing
        return []
    columns = ", ".join(connection.ops.quote_name(name) for name in by)
    chosen = ", ".join([columns, "COUNT(*)", *aggregates])
    with connection.cursor() as cursor:
        # Nothing but names from this package is put into the text.
        cursor.execute(f"SELECT {chosen} FROM ({sql}) grouped GROUP BY {columns}", params)  # noqa: S608
        return list(cursor.fetchall())


def as_stored(value: Any) -> Any:
    """Return an instant that the driver has returned without a zone, or as text, as Django returns it."""
    if isinstance(value, str):
        value = dt.datetime.fromisoformat(value)
    if value is None or value.tzinfo is not None or not settings.USE_TZ:
        return value
    return value.replace(tzinfo=dt.UTC)

"""Pages of a list that may have millions of rows: counted as far as anybody reads, and no further."""

from __future__ import annotations

from typing import Any

from django.core.paginator import Paginator
from django.db import connections
from django.db.models import QuerySet
from django.utils.functional import cached_property

#: Rows that are counted, and that can be paged through.
COUNTED = 10_000


class BoundedPaginator(Paginator):  # type: ignore[type-arg]
    """Counts to ``COUNTED`` and says when there is more, so that the last page is never far from the first."""

    @cached_property
    def _found(self) -> int:
        # In the list's order, or a planner may begin at the far end of the table.
        rows: Any = self.object_list
        return int(rows.values("pk")[: COUNTED + 1].count())

    @property
    def is_capped(self) -> bool:
        """Whether there are more rows than were counted."""
        return self._found > COUNTED

    @cached_property
    def count(self) -> int:
        """How many rows there are; ``COUNTED`` if there are more."""
        return min(self._found, COUNTED)


def estimated_count(rows: QuerySet[Any]) -> int | None:
    """Return how many rows PostgreSQL believes the table of ``rows`` to have; ``None`` if nobody knows."""
    connection = connections[rows.db]
    if connection.vendor != "postgresql":
        return None
    with connection.cursor() as cursor:
        table = connection.ops.quote_name(rows.model._meta.db_table)
        cursor.execute("SELECT reltuples FROM pg_class WHERE oid = to_regclass(%s)", [table])
        found = cursor.fetchone()
    return int(found[0]) if found and found[0] >= 0 else None

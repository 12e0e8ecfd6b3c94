"""The tags of trees."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from django.db.models import QuerySet

from conductor_app.models import Execution, Tag, database

#: So many trees are named by their roots.
FEW_TREES = 500


def tags_of_trees(
    root_ids: Iterable[uuid.UUID | None], seen: QuerySet[Execution] | None = None
) -> Mapping[uuid.UUID | None, dict[str, str]]:
    """Return the tags of some trees by their roots, in one query; a root that has none has an empty dict.

    Args:
        root_ids: The roots; ``None`` has no tags.
        seen: The executions that may be told of, a root among them or not; ``None`` are all.
    """
    found: dict[uuid.UUID | None, dict[str, str]] = defaultdict(dict)
    wanted = {root_id for root_id in root_ids if root_id is not None}
    if wanted:
        rows = Tag.objects.using(database()).filter(root__in=wanted)
        if seen is not None:
            rows = rows.filter(root__in=seen.values("pk"))
        for root_id, key, value in rows.values_list("root_id", "key", "value"):
            found[root_id][key] = value
    return found


def trees_with(
    key: str, value: str, *, since: uuid.UUID | None = None, seen: QuerySet[Execution] | None = None
) -> list[uuid.UUID] | QuerySet[Any]:
    """Return the roots of the trees that have a tag, for a condition ``root__in``; one short query.

    A few trees are named: from the frequencies of keys and of values a database cannot tell how rare the two are
    together, and may walk through the whole table of executions for one tree.

    Args:
        since: The smallest root that is wanted.
        seen: The executions that may be told of. The tags of a root that is none of them tell nothing.
    """
    tags = Tag.objects.using(database()).filter(key=key, value=value)
    if since is not None:
        tags = tags.filter(root__gte=since)
    if seen is not None:
        tags = tags.filter(root__in=seen.values("pk"))
    roots = tags.order_by().values_list("root", flat=True)
    few = list(roots[: FEW_TREES + 1])
    return roots if len(few) > FEW_TREES else few

"""The tags of a tree. The only writer of the table ``Tag``."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from django.db import transaction
from django.db.models import F

from conductor_app.models import Execution, Tag, database
from conductor_app.transitions import guards
from conductor_app.values.tags import check_number


def tags_of(root_id: uuid.UUID) -> dict[str, str]:
    """Return the tags of a tree, by their keys."""
    return dict(Tag.objects.using(database()).filter(root_id=root_id).values_list("key", "value"))


def insert(root_id: uuid.UUID, tags: Mapping[str, str]) -> None:
    """Store the tags of a root that is being created, in its transaction."""
    insert_all({root_id: tags})


def insert_all(tags_of_roots: Mapping[uuid.UUID, Mapping[str, str]]) -> None:
    """Store the tags of roots that are being created, in their transaction."""
    Tag.objects.using(database()).bulk_create(
        [
            Tag(root_id=root_id, key=key, value=value)
            for root_id, tags in tags_of_roots.items()
            for key, value in sorted(tags.items())
        ]
    )


def tag(root_id: uuid.UUID, changes: Mapping[str, str | None], *, waits_for_database: bool = False) -> None:
    """Set tags of a tree, in the current transaction if there is one; ``None`` removes one.

    Args:
        root_id: The tree's root.
        changes: Checked ones.
        waits_for_database: Whether it is a run's, which waits for the database as long as its lease lasts.

    Raises:
        Execution.DoesNotExist: There is no such root.
        TooManyTags: The tree would have too many. Nothing is stored.
    """

    def work() -> None:
        # A body says the same again in each run: that takes one read, and no lock.
        if _missing(tags_of(root_id), changes):
            _write(root_id, changes)

    (guards.persist if waits_for_database else guards.persist_briefly)(work)


def _missing(known: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str | None]:
    return {key: value for key, value in changes.items() if known.get(key) != value}


def _write(root_id: uuid.UUID, changes: Mapping[str, str | None]) -> None:
    using = database()
    rows = Tag.objects.using(using).filter(root_id=root_id)
    with transaction.atomic(using=using):
        # Two writers one after the other, or both would count without the other's tags. A write, although it changes
        # nothing: at REPEATABLE READ the second one has to fail and be run again.
        if not Execution.objects.using(using).filter(pk=root_id).update(fence=F("fence")):
            raise Execution.DoesNotExist(f"There is no execution {root_id}. It has been pruned.")
        # A locking read: whatever the isolation level, it sees what was committed before the root's row was locked.
        known = dict(rows.select_for_update().values_list("key", "value"))
        missing = _missing(known, changes)
        left = {key: value for key, value in {**known, **missing}.items() if value is not None}
        if len(left) > len(known):
            check_number(left, "these tags")
        if gone := [key for key, value in missing.items() if value is None]:
            rows.filter(key__in=gone).delete()
        for key, value in missing.items():
            if value is not None and key in known:
                rows.filter(key=key).update(value=value)
        insert(root_id, {key: value for key, value in missing.items() if value is not None and key not in known})

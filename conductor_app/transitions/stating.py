"""What a body tells of itself. The only writer of the table ``PublishedState``."""

from __future__ import annotations

import uuid
from typing import Any

from django.db import IntegrityError
from django.db.models import Q

from conductor_app.models import Execution, PublishedState, database
from conductor_app.store.moves import Insert, Lock, Move, Update
from conductor_app.store.slots import NOW, given
from conductor_app.transitions import guards, parts
from conductor_app.values.state import Told, read_told

_VALUES = {
    "done": given(PublishedState, "done"),
    "total": given(PublishedState, "total"),
    "note": given(PublishedState, "note"),
    "published": given(PublishedState, "published"),
    "updated_at": NOW,
}
_KEY = given(PublishedState, "execution_id", "id")


def _writing(*, is_new: bool, waits: bool) -> Move:
    """Return the write of a state by the run that holds its execution.

    The execution's row is locked: without that, a run whose lease is taken away just now could write after it.
    """
    held = Lock("held", Execution, parts.HELD, finds=["fence"], skips_locked=not waits)
    if is_new:
        return Move(held, Insert("state", PublishedState, {"execution_id": _KEY, **_VALUES}))
    return Move(held, Update("state", PublishedState, Q(execution_id=_KEY), _VALUES))


_STATE = {(is_new, waits): _writing(is_new=is_new, waits=waits) for is_new in (False, True) for waits in (False, True)}


def told_by(execution_id: uuid.UUID) -> Told | None:
    """Return what an execution has told; ``None`` if nothing is stored."""
    rows = PublishedState.objects.using(database()).filter(pk=execution_id)
    row = guards.persist_briefly(rows.values_list("done", "total", "note", "published").first)
    return None if row is None else read_told(*row)


def state(execution: Execution, told: Told, *, is_new: bool, waits: bool = False) -> bool:
    """Store what a run tells, if it holds its execution.

    Args:
        is_new: Whether no row was there when the run looked.
        waits: Whether to wait for somebody who has locked the execution's row. A body's work is not to wait for that.

    Returns:
        ``False`` if somebody has locked the row, so that nothing is stored.

    Raises:
        LeaseLost: Another run has taken over. Nothing is stored.
        DatabaseError: The database is away. Nobody waits for it: no lease depends on this.
    """
    values: dict[str, Any] = {"done": told.done, "total": told.total, "note": told.note, "published": told.text()}

    def write(*, is_new: bool) -> bool:
        move = _STATE[is_new, waits]
        return bool(
            guards.persist_briefly(
                lambda: move.make(database(), **values, **parts.held(execution)), skips_locked=not waits
            )
        )

    try:
        is_stored = write(is_new=is_new)
    except IntegrityError:
        # Ours, whose COMMIT got no answer; or that of a run before this one, which came after the look.
        is_stored = write(is_new=False)
    if not is_stored:
        guards.persist_briefly(lambda: guards.must_hold(execution))
    return is_stored

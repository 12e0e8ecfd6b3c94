"""Which execution a call is about: the id that it gives, and whether what is there may be the one."""

from __future__ import annotations

import uuid
from typing import Any

from conductor_app import transitions
from conductor_app.exceptions import IdempotencyConflict, InvalidArgument
from conductor_app.models import Execution
from conductor_app.values.payloads import loads
from conductor_app.values.texts import shown


def parse_id(task_id: Any) -> uuid.UUID | None:
    """Return a task id as the id of an execution.

    Raises:
        InvalidArgument: It is no UUID.
    """
    if task_id is None:
        return None
    try:
        return uuid.UUID(str(task_id))
    except ValueError:
        raise InvalidArgument(
            f"task_id must be a UUID, since it is the execution's id, got {shown(task_id)}. Use idempotency_key= for a "
            "key of your own."
        ) from None


def check_same(execution: Execution, new: transitions.NewExecution, place: int | None = None) -> None:
    """Refuse an execution that is there by the id or the idempotency key of a call with another payload.

    One that is there by the unique key may have any.

    Args:
        place: Which of many payloads it is.

    Raises:
        IdempotencyConflict: It has another payload.
    """
    is_by_unique_key = (
        new.unique is not None
        and execution.unique_key == new.unique.key
        and execution.pk != new.id
        and (new.idempotency_key is None or execution.idempotency_key != new.idempotency_key)
    )
    # Decoded, since the order of a mapping's keys is no difference.
    if is_by_unique_key or (execution.task == new.task and loads(execution.payload) == loads(new.payload)):
        return
    what = f"idempotency key {new.idempotency_key!r}" if new.idempotency_key is not None else f"id {new.id}"
    of = "" if place is None else f" of payloads[{place}]"
    raise IdempotencyConflict(
        f"The {what}{of} belongs to execution {execution.pk} of {execution.task} with another payload. Use another key."
    )

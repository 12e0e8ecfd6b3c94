"""Execution ids: UUIDv7 for a root, a derived UUIDv8 for a child."""

from __future__ import annotations

import datetime as dt
import hashlib
import uuid

from django.utils import timezone

from conductor_app.store import clock

try:
    from uuid import uuid7  # type: ignore[attr-defined, unused-ignore]  # Python 3.14 and newer
except ImportError:
    from uuid_utils.compat import uuid7


def new_root_id() -> uuid.UUID:
    """Return a new id for a root execution; ids sort by creation time (RFC 9562, section 5.7)."""
    return uuid.UUID(int=uuid7().int)


def created_at(root_id: uuid.UUID) -> dt.datetime:
    """Return the instant in a UUIDv7, by the clock of the machine that made it."""
    instant = dt.datetime.fromtimestamp((root_id.int >> 80) / 1000, tz=dt.UTC)
    return clock.aware(instant)


def first_at(instant: dt.datetime) -> uuid.UUID:
    """Return an id that sorts before those of all trees begun at ``instant`` or later, by a millisecond at most."""
    if timezone.is_naive(instant):
        instant = timezone.make_aware(instant)
    return _first_of(max(int(instant.timestamp() * 1000) - 1, 0))


def first_of_tree(execution_id: uuid.UUID) -> uuid.UUID:
    """Return an id that sorts before those of the whole tree of ``execution_id``, by a millisecond at most."""
    return _first_of(max((execution_id.int >> 80) - 1, 0))


def _first_of(milliseconds: int) -> uuid.UUID:
    # A version and a variant that MariaDB takes for a UUID.
    return uuid.UUID(int=milliseconds << 80 | 0x7000 << 64 | 0x81 << 56)


def range_of(prefix: str) -> tuple[uuid.UUID, uuid.UUID]:
    """Return the first and the last id that begin with so many hexadecimal digits, at most 32.

    Both have a version and a variant as ids have, without which MariaDB takes nothing for a UUID.
    """
    first, last = "0" * 12 + "7000" + "81" + "0" * 14, "f" * 12 + "8fff" + "bf" + "f" * 14
    return uuid.UUID(prefix + first[len(prefix) :]), uuid.UUID(prefix + last[len(prefix) :])


def derive_child_id(parent_id: uuid.UUID, step: str, generation: int = 0) -> uuid.UUID:
    """Return the id of the child that ``parent_id`` invokes as ``step``.

    The same arguments give the same id, so a child created twice (its first creation lost with a database that did not
    wait for the disk) is the same child and keeps its idempotency keys. It starts with its parent's 48 bits of
    timestamp, so a tree stays together in the primary key's index.

    Args:
        parent_id: The parent's id.
        step: Name of the step in the parent.
        generation: Counts up when one step needs a second child.
    """
    return _derive(parent_id, generation.to_bytes(4, "big") + step.encode())


def derive_namesake_id(task_id: uuid.UUID, call: str) -> uuid.UUID:
    """Return the id of an execution that was called with the id of another one.

    Args:
        task_id: The id that it was called with.
        call: Which call that was. The same one gives the same id.
    """
    return _derive(task_id, b"namesake " + call.encode())


def derive_tick_id(schedule: str, instant: dt.datetime) -> uuid.UUID:
    """Return the id of what a schedule starts for an instant, so that it is one execution whoever starts it.

    It begins with the instant, as one that was created then.

    Args:
        schedule: The schedule's name.
        instant: An aware one.
    """
    return _derive(_first_of(max(int(instant.timestamp() * 1000), 0)), b"tick " + schedule.encode())


def namesakes_range(task_id: uuid.UUID) -> tuple[uuid.UUID, uuid.UUID]:
    """Return the smallest and the largest id that ``derive_namesake_id`` makes of an id; others may lie between."""
    first = task_id.int >> 80 << 80 | 0x8000 << 64 | 0x81 << 56
    return uuid.UUID(int=first), uuid.UUID(int=first | 0x0FFF << 64 | 0xBF << 56 | (1 << 56) - 1)


def _derive(origin: uuid.UUID, name: bytes) -> uuid.UUID:
    digest = hashlib.sha256(origin.bytes + name).digest()
    raw = bytearray(origin.bytes[:6] + digest[:10])
    raw[6] = (raw[6] & 0x0F) | 0x80  # version 8: the layout is our own
    # RFC 9562 variant; and never 0x80 itself, which MariaDB 10.11 refuses in a UUID of this version (measured).
    raw[8] = (raw[8] & 0x3F) | 0x81
    return uuid.UUID(bytes=bytes(raw))


def as_child_id(task_id: object) -> uuid.UUID | None:
    """Return the execution's id that a Celery task id may be, if it may be a child's: a UUIDv8. Reads no database."""
    if not isinstance(task_id, str) or len(task_id) != 36 or task_id[14] != "8":
        return None
    try:
        return uuid.UUID(task_id)
    except ValueError:
        return None


def of_task_id(task_id: object) -> uuid.UUID:
    """Return the id of the execution that a message with this Celery task id becomes, whatever the publisher chose."""
    try:
        return uuid.UUID(str(task_id))
    except ValueError:
        return uuid.uuid5(uuid.NAMESPACE_OID, f"conductor_app:{task_id}")

"""Many executions of one task by one call: what it is given, checked whole before anything is stored."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conductor_app.body.names import check_key
from conductor_app.exceptions import InvalidArgument, InvalidArgumentType, ProgrammingError
from conductor_app.values import uniqueness
from conductor_app.values.texts import shown

#: Most executions of one call.
MOST = 10_000


def check_payloads(payloads: object, call: str) -> list[Any]:
    """Return the payloads of a call.

    Raises:
        InvalidArgumentType: They are no list of payloads.
        InvalidArgument: They are too many.
    """
    if isinstance(payloads, (str, bytes, Mapping)) or not isinstance(payloads, Iterable):
        raise InvalidArgumentType(
            f"{call} needs a list of payloads, one per execution, got {type(payloads).__name__}. For one execution use "
            ".delay()."
        )
    each = list(itertools.islice(payloads, MOST + 1))
    if len(each) > MOST:
        raise InvalidArgument(
            f"{call} got more than {MOST:,} payloads. Call it once for each {MOST:,} of them; in one "
            "transaction.atomic() all or none are started."
        )
    return each


def check_keys(keys: object, name: str, count: int, call: str) -> list[str | None]:
    """Return one key for each payload; ``None`` for one that has none.

    Args:
        keys: What the caller has given.
        name: ``idempotency_keys`` or ``unique_keys``.
        count: How many payloads there are.
        call: What was called.

    Raises:
        InvalidArgumentType, InvalidArgument: They are no list of keys, or not as many as payloads.
    """
    if keys is None:
        return [None] * count
    if isinstance(keys, (str, bytes, Mapping)) or not isinstance(keys, Sequence):
        raise InvalidArgumentType(
            f"{name} of {call} must be a list, with a key or None for each payload, got {type(keys).__name__}"
        )
    if len(keys) != count:
        raise InvalidArgument(f"{call} got {len(keys)} {name} for {count} payloads. Each payload needs a key, or None.")
    check = uniqueness.check_key if name == "unique_keys" else check_key
    return [None if key is None else check(key, f"{name}[{place}]") for place, key in enumerate(keys)]


def check_common_tags(tags: object, call: str) -> None:
    """Refuse tags that are not those of all payloads.

    Raises:
        InvalidArgumentType: They are a list.
    """
    if tags is not None and not isinstance(tags, Mapping):
        raise InvalidArgumentType(
            f"tags of {call} must be a mapping, of all the executions, got {type(tags).__name__} {shown(tags, 40)}. "
            "What each has of its own, a function says: @durable_task(tags=…)."
        )


def about(place: int, error: ProgrammingError) -> ProgrammingError:
    """Return the error of one payload, with the place of that in its text."""
    what = f"payloads[{place}]"
    return error if what in str(error) else type(error)(f"{what}: {error}")

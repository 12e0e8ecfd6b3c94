"""What a body tells of itself beside its steps: how far it has come, and values for whoever watches it."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType, PayloadTooLarge
from conductor_app.states import FINAL_STATUSES, ExecutionStatus
from conductor_app.values.payloads import dumps, loads, round_trip
from conductor_app.values.texts import shown

#: Most bytes of a state: of its note, and of its published values with their keys, as they are stored.
MOST_BYTES = 16 * 1_024
#: Larger counts are not the same everywhere: a ``float`` of a database, or a number of JavaScript, cannot hold them.
LARGEST = 2**53


@dataclass(frozen=True)
class Told:
    """What a body has told. Immutable, and so are its values as long as nobody writes into them."""

    #: ``None`` if it has told no progress.
    done: int | float | None = None
    total: int | float | None = None
    note: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)

    def with_progress(self, done: object, total: object, note: object) -> Told:
        """Return the same with another progress.

        Raises:
            InvalidArgumentType, InvalidArgument, NotSerializable, PayloadTooLarge: It cannot be stored.
        """
        if not isinstance(note, str):
            raise InvalidArgumentType(f"note must be str, got {type(note).__name__} {shown(note, 40)}")
        if note and note != self.note:
            dumps(note, "note", MOST_BYTES)
        return replace(
            self,
            done=_count(done, "done"),
            total=None if total is None else _count(total, "total"),
            note=str.__str__(note),
        )

    def with_value(self, key: str, value: object) -> Told:
        """Return the same with one more published value, in the place of an earlier one of this key.

        Raises:
            NotSerializable, PayloadTooLarge: It cannot be stored.
        """
        value = round_trip(value, f'value of ctx.publish("{key}")', MOST_BYTES)[1]
        return replace(self, published={**self.published, key: value})

    def over(self, before: Told) -> Told:
        """Return what is told if this was told after ``before``."""
        later = before if self.done is None else self
        return replace(later, published={**before.published, **self.published})

    def text(self) -> str:
        """Return the published values as they are stored; an empty text if there are none."""
        return dumps(dict(self.published), "published values") if self.published else ""

    def check_size(self, published: int | None = None) -> int:
        """Refuse what is too large in all; return how many bytes the published values have.

        Args:
            published: That, if it is known.

        Raises:
            PayloadTooLarge: It is.
        """
        published = len(self.text()) if published is None else published
        size = len(self.note.encode("utf-8", "replace")) + published
        if size > MOST_BYTES:
            raise PayloadTooLarge(
                f"All that an execution tells (ctx.progress, ctx.publish) may have {MOST_BYTES} bytes; this would make "
                f"{size}. Publish what a page shows, and keep the rest in a result or a model of your own."
            )
        return published

    def info(self) -> dict[str, Any]:
        """Return what ``AsyncResult.info`` says of it."""
        found: dict[str, Any] = {}
        if self.done is not None:
            found["progress"] = {"done": self.done, "total": self.total, "note": self.note}
        if self.published:
            found["published"] = plain(self.published)
        return found


def read_told(done: float | None, total: float | None, note: str, published: str) -> Told:
    """Return what is stored."""
    return Told(_as_told(done), _as_told(total), note, loads(published) or {})


def plain(value: Any) -> Any:
    """Return decoded JSON with nothing in it but JSON's own types: instants, ``Decimal`` and the like are texts."""
    return json.loads(json.dumps(value, cls=_Plain))


class _Plain(DjangoJSONEncoder):
    def default(self, value: Any) -> Any:
        try:
            return super().default(value)
        except TypeError:
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _count(value: object, name: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgumentType(f"{name} must be a number, got {type(value).__name__} {shown(value, 40)}")
    if not 0 <= value <= LARGEST:  # NaN is not, either
        raise InvalidArgument(f"{name} must be a finite number from 0 to 2**53, got {shown(value, 40)}")
    return value


def _as_told(value: float | None) -> int | float | None:
    return int(value) if value is not None and value.is_integer() else value


@dataclass(frozen=True)
class ChildrenProgress:
    """How far the children are for which an execution waits in a ``ctx.map`` or a ``ctx.gather``."""

    step: str
    #: How many have ended, in whatever way.
    done: int
    total: int


@dataclass(frozen=True)
class ExecutionState:
    """How an execution stands, for whoever watches it: what ``api.state`` returns."""

    execution_id: uuid.UUID
    status: ExecutionStatus
    #: What ``ctx.progress`` was last told; else that of the children that are waited for; else ``None``.
    done: int | float | None = None
    #: How many there are; ``None`` if that was not told.
    total: int | float | None = None
    #: What ``ctx.progress`` was last told beside it.
    note: str = ""
    #: What ``ctx.publish`` was last told, by key. Not masked.
    published: Mapping[str, Any] = field(default_factory=dict)
    #: The children that it waits for now in a ``ctx.map`` or a ``ctx.gather``.
    children: ChildrenProgress | None = None
    #: When the body's progress or a value was stored last; ``None`` if it has told nothing.
    updated_at: dt.datetime | None = None

    @property
    def is_final(self) -> bool:
        """Whether it has ended, so that nothing changes any more unless an operator retries it."""
        return self.status in FINAL_STATUSES

    @property
    def fraction(self) -> float | None:
        """How much is done, from 0.0 to 1.0; ``None`` if nobody told how much there is."""
        return fraction(self.done, self.total)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in JSON's own types, for a ``JsonResponse``."""
        return {
            "execution_id": str(self.execution_id),
            "status": self.status.value,
            "is_final": self.is_final,
            "done": self.done,
            "total": self.total,
            "fraction": self.fraction,
            "note": self.note,
            "published": plain(self.published),
            "children": None if self.children is None else asdict(self.children),
            "updated_at": None if self.updated_at is None else self.updated_at.isoformat(),
        }


def fraction(done: float | None, total: float | None) -> float | None:
    """Return how much is done, from 0.0 to 1.0; ``None`` if nobody told how much there is."""
    if done is None or total is None:
        return None
    return min(done / total, 1.0) if total else 1.0

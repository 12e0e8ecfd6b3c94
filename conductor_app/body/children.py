"""The children that calls of a body ask for: tasks, arguments and options, and the handle of one that was started."""

from __future__ import annotations

import difflib
import itertools
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from celery import Task, current_app
from celery.canvas import Signature
from celery.local import Proxy

from conductor_app.body.names import NAME_LENGTH
from conductor_app.body.plain import DjangoTask, Invocable, PlainTask, is_django_task, is_invocable
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import InvalidArgument, InvalidArgumentType, TooManyChildren, UnknownTask
from conductor_app.states import OnTimeout
from conductor_app.transitions import NewExecution
from conductor_app.values.arguments import check_duration
from conductor_app.values.options import check_call_options
from conductor_app.values.texts import shown
from conductor_app.values.uniqueness import OPTIONS

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Handle(Generic[R_co]):
    """Something that a body can wait for beside others; good for the run of the body that got it."""

    #: Name of its step.
    step: str
    #: The context of that run.
    _context: Any

    def result(self) -> R_co:
        """Wait for it, and return its result or raise its error, as ``ctx.gather`` does for one handle."""
        return cast(R_co, self._context._result_of(self))

    def peek(self) -> bool:
        """Tell, without waiting, whether it has ended, with a result or without; what was seen is remembered."""
        return bool(self._context._peek(self))


@dataclass(frozen=True)
class ChildHandle(Handle[R_co]):
    """A started child; good for the run that got it from ``ctx.start``."""

    #: Name of the step that started it.
    step: str
    #: Id of the child execution.
    execution_id: uuid.UUID | None
    #: The context of that run.
    _context: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class EventHandle(Handle[Any]):
    """An event that is awaited beside other things; good for the run that got it from ``ctx.event``."""

    #: Name of the step that takes it.
    step: str
    #: Name of the event.
    event: str
    #: The context of that run.
    _context: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class TimerHandle(Handle[None]):
    """An instant that is awaited beside other things; good for the run that got it from ``ctx.timer``."""

    #: Name of its step.
    step: str
    #: The context of that run.
    _context: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class ChildOptions:
    """What a call says about a child beside its payload, as it was given."""

    timeout: Any
    on_timeout: Any
    queue: Any
    priority: Any

    def checked(self) -> tuple[float | None, OnTimeout, dict[str, Any]]:
        """Return seconds, what a timeout does, and Celery's options."""
        if self.timeout is None and self.queue is None and self.priority is None and self.on_timeout == "cancel":
            return None, OnTimeout.CANCEL, {}
        seconds = None if self.timeout is None else check_duration(self.timeout, "timeout", allow_zero=False)
        if self.on_timeout not in list(OnTimeout):
            raise InvalidArgument(f'on_timeout must be "cancel" or "abandon", got {shown(self.on_timeout)}.')
        options: dict[str, Any] = {}
        if self.queue is not None:
            options["queue"] = _check_type(self.queue, str, "queue")
        if self.priority is not None:
            options["priority"] = _check_type(self.priority, int, "priority")
        return seconds, OnTimeout(self.on_timeout), options


def check_parallel(value: object) -> int:
    """Return ``max_parallel`` of a map."""
    count = _check_type(value, int, "max_parallel")
    if count < 1:
        raise InvalidArgument(f"max_parallel must be ≥ 1, got {count}; None is without limit")
    return count


def check_failures(value: object) -> int:
    """Return ``max_failures`` of a map."""
    count = _check_type(value, int, "max_failures")
    if count < 0:
        raise InvalidArgument(f"max_failures must be ≥ 0, got {count}; return_exceptions=True is without limit")
    return count


def check_need(value: object, number: int) -> int:
    """Return ``need`` of a gather of ``number`` handles."""
    count = _check_type(value, int, "need")
    if not 1 <= count <= number:
        raise InvalidArgument(f"need must be between 1 and the number of handles, {number}; got {count}")
    return count


#: Most members of a wait that not all of them decide.
MAX_MEMBERS = 1_000


def check_members(handles: Sequence[Any], names: Sequence[str], call: str) -> None:
    """Refuse members that are none, too many, or the same twice."""
    if not handles:
        raise InvalidArgument(f"{call} got no handles. What is it to wait for?")
    if len(handles) > MAX_MEMBERS:
        raise InvalidArgument(f"{call} got {len(handles)} handles; the limit is {MAX_MEMBERS}.")
    if len(names) < len(handles):
        twice = next(name for name in names if sum(handle.step == name for handle in handles) > 1)
        raise InvalidArgument(f'{call} got the handle of step "{twice}" twice. Pass each once.')


def check_payloads(payloads: object, call: str) -> list[Any]:
    """Return the payloads of a map, not more of them than there may be."""
    if isinstance(payloads, (str, bytes, Mapping)) or not isinstance(payloads, Iterable):
        raise InvalidArgumentType(
            f"{call} needs a list of payloads, one per child, got {type(payloads).__name__}. "
            "For one child use ctx.invoke."
        )
    limit = conductor_settings().MAX_CHILDREN
    each = list(itertools.islice(payloads, limit + 1))
    if len(each) > limit:
        raise TooManyChildren(
            f"{call} got more than {limit} payloads. Map over parts of the work, in children that map themselves, "
            'or raise CONDUCTOR["MAX_CHILDREN"].'
        )
    return each


def check_own_keys(children: Sequence[NewExecution], call: str) -> None:
    """Refuse two children of a map with one unique key: they would be open at the same time.

    Raises:
        InvalidArgument: There are two.
    """
    seen: dict[str, int] = {}
    for number, child in enumerate(children):
        if child.unique is None:
            continue
        first = seen.setdefault(child.unique.key, number)
        if first != number:
            raise InvalidArgument(
                f"payloads[{first}] and payloads[{number}] of {call} have one unique key, {shown(child.unique.key)}. "
                f"{child.task} has one open execution per key: pass each key once."
            )


def _check_type(value: Any, expected: type[R], name: str) -> R:
    if isinstance(value, bool) or not isinstance(value, expected):
        raise InvalidArgumentType(f"{name} must be {expected.__name__}, got {type(value).__name__}")
    return value


def looks_like_milliseconds(seconds: float) -> bool:
    """Tell whether a timeout is long, and not what somebody writes who means seconds: whole days, whole hours."""
    if seconds % _DAY == 0:
        return seconds > 0 and seconds % (1_000 * _DAY) == 0
    if seconds % 1_000 == 0:
        return seconds >= 10_000
    return seconds > _DAY and seconds % 1 == 0 and seconds % _HOUR != 0


_HOUR, _DAY = 3_600, 86_400


_NOT_A_CHILDS = {
    "idempotency_key": "The step's name is the key: its child is stored once, however often the body runs.",
    "deadline": "It bounds a whole tree, so it is an option of the root's call; a child has timeout=, of ctx.invoke.",
}


def resolve_child(
    child: object, payload: object, call: str, what: str = "payload"
) -> tuple[Invocable, list[Any], dict[str, Any], dict[str, Any]]:
    """Return the child's task, its arguments and its own Celery options.

    Args:
        child: A task, its name, or a signature of it.
        payload: As ``ctx.invoke`` takes it.
        call: How the call is named in an error.
        what: How the payload is.

    Raises:
        UnknownTask, InvalidArgumentType: There is no such task, or the payload cannot be its arguments.
    """
    django_task: Invocable | None = None
    options: dict[str, Any] = {}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if issubclass(type(child), Proxy):
        # Once: what a decorator returns in a module of tasks looks its task up whenever it is asked for anything.
        child = cast(Any, child)._get_current_object()
    if isinstance(child, Signature):
        if child.get("subtask_type"):
            raise InvalidArgumentType(
                f"{call} runs one task at a time, got a {child['subtask_type']}. Invoke its tasks one after another."
            )
        if payload is not None:
            raise InvalidArgumentType(f"{call} got a signature and a payload. Put the arguments into the signature.")
        check_call_options(child.options, f"The signature given to {call}", also=OPTIONS, hints=_NOT_A_CHILDS)
        if "task_id" in child.options and "reply_to" not in child.options:  # which Celery adds when it freezes one
            raise InvalidArgumentType(
                f"The signature given to {call} has a task_id. A child's id follows from its step."
            )
        name, args, kwargs, options = str(child.task), list(child.args), dict(child.kwargs), dict(child.options)
    else:
        if isinstance(child, str):
            name = child
        elif isinstance(child, Task):
            name = child.name
        elif is_django_task(child):
            django_task, name = DjangoTask(child), ""
        elif isinstance(child, Mapping):
            verb = call.partition("(")[0]
            raise UnknownTask(
                f"{call} got a payload where a task comes. Was the step's name forgotten? "
                f'It comes first: {verb}("name", task, payload)'
            )
        else:
            described = getattr(child, "__qualname__", None) or shown(child)
            raise UnknownTask(
                f"{call} needs a task, its name or a signature, got {type(child).__name__} {described}. "
                "Is @durable_task missing above its definition?"
            )
        args, kwargs = child_arguments(payload, call, what)
    if django_task is not None:
        return django_task, args, kwargs, options
    task = current_app.tasks.get(name)
    if task is None:
        raise UnknownTask(_unknown(name))
    return task if is_invocable(task) else PlainTask(task), args, kwargs, options


def filled(child: object, payload: object, call: str, what: str) -> tuple[object, object]:
    """Return a child and its payload; a signature gets the payload's arguments, as another signature."""
    if not isinstance(child, Signature) or child.get("subtask_type"):
        return child, payload
    if child.immutable and payload is not None:
        raise InvalidArgumentType(
            f"{call} got an immutable signature, which takes no payloads. Make it with .s() instead of .si()."
        )
    args, kwargs = child_arguments(payload, call, what)
    return child.clone(tuple(args), kwargs), None


def child_arguments(payload: object, call: str, what: str) -> tuple[list[Any], dict[str, Any]]:
    """Return a payload as the arguments of a child."""
    if isinstance(payload, Mapping):
        for key in payload:
            if not isinstance(key, str):
                raise InvalidArgumentType(
                    f"{what} of {call} has the key {key!r} of type {type(key).__name__}: its keys are the child's "
                    "argument names, so they must be strings."
                )
        return [], dict(payload)
    return [] if payload is None else [payload], {}


def _unknown(name: str) -> str:
    known = sorted(name for name in current_app.tasks if not name.startswith(_BUILT_IN))
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f'Did you mean "{nearest[0]}"? ' if nearest else ""
    others = _like(name, known)
    if not nearest and others:
        hint = f"The nearest ones are {', '.join(others)}. "
    return f'No task named "{shown(name)[1:-1]}". {hint}Is its module imported (tasks.py in an installed app)?'


_BUILT_IN = ("celery.", "conductor_app.")


def _like(name: str, known: Sequence[str]) -> list[str]:
    """Return the names of some tasks, those first whose last part is most like another name's."""
    last = name[-NAME_LENGTH:].rpartition(".")[2]

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()

    return sorted(known, key=likeness, reverse=True)[:_SHOWN_TASKS]


#: So many tasks are named to whoever has named none.
_SHOWN_TASKS = 3

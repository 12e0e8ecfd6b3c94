"""Which options a call of a durable task takes, and which its decorator: none is lost without a word.

Both Celery and kombu take any keyword and keep silent about one that they do not know, so that a misspelt
``idempotency_key`` would mean double work.
"""

from __future__ import annotations

import datetime as dt
import difflib
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Literal, TypedDict
from zoneinfo import ZoneInfo

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType
from conductor_app.values.limits import Limit
from conductor_app.values.retries import RetryPolicy
from conductor_app.values.schedules import OPTIONS as SCHEDULE_OPTIONS
from conductor_app.values.tags import TagSource, check_tags


class RoutingOptions(TypedDict, total=False):
    """Where the messages of an execution go; of a call, and of the decorator for all calls."""

    queue: Any
    exchange: Any
    exchange_type: str | None
    routing_key: str | None
    priority: int | None
    delivery_mode: Any


class CallOptions(RoutingOptions, total=False):
    """Options of ``apply_async`` beside ``OF_A_ROOT``; durations are seconds."""

    countdown: float | dt.timedelta | None
    eta: dt.datetime | str | None
    expires: float | dt.timedelta | dt.datetime | str | None
    time_limit: float | None
    soft_time_limit: float | None
    headers: Mapping[str, Any] | None
    tags: Mapping[str, str] | None
    ignore_result: bool | None
    add_to_parent: bool | None
    serializer: str | None
    compression: str | None
    retry: bool | None
    retry_policy: Mapping[str, Any] | None
    connection: Any
    publisher: Any
    router: Any
    result_cls: Any
    argsrepr: str | None
    kwargsrepr: str | None
    group_id: str | None
    group_index: int | None
    root_id: str | None
    parent_id: str | None
    reply_to: str | None
    chain: Any
    chord: Any
    stamped_headers: Any


class TaskOptions(RoutingOptions, total=False):
    """Options of ``@durable_task``; durations are seconds."""

    name: str | None
    # Retries; see ``retries.RetryPolicy``.
    max_retries: int | None
    autoretry_for: Collection[type[BaseException]]
    dont_autoretry_for: Collection[type[BaseException]]
    retry_backoff: bool | float
    retry_backoff_max: float
    retry_jitter: bool
    default_retry_delay: float
    #: What each run of the body is inside of; see ``scopes``.
    around: Callable[..., AbstractContextManager[object]] | None
    #: Of the tree that an execution is in.
    tags: TagSource | None
    #: How many executions may run, be open or start; see ``limits.Limit``.
    limits: Collection[Limit]
    #: Which argument, or function of the arguments, is the unique key; and what becomes of a call whose key is taken.
    unique: str | Callable[..., str | None] | None
    on_conflict: Literal["return", "refuse", "replace"] | None
    # When it is started by itself; see ``schedules``.
    cron: str | None
    tz: str | ZoneInfo | None
    overlap: Literal["skip", "queue", "allow", "replace"] | None
    catch_up: Literal["none", "last", "all"] | None
    schedule: str | None
    # How long trees of it are kept; see ``retention``.
    keep: float | dt.timedelta | None
    keep_failed: float | dt.timedelta | None
    #: After how much time trees of it are cancelled, from the creation of their roots.
    max_duration: float | dt.timedelta | None
    # Celery's own.
    bind: bool
    typing: bool
    time_limit: float | None
    soft_time_limit: float | None
    expires: float | dt.datetime | None
    rate_limit: str | float | None
    ignore_result: bool | None
    store_errors_even_if_ignored: bool | None
    store_eager_result: bool | None
    throws: Any
    trail: bool
    send_events: bool
    resultrepr_maxsize: int
    backend: Any
    compression: str | None
    mandatory: bool
    immediate: bool
    pydantic: bool
    pydantic_strict: bool
    pydantic_context: dict[str, Any] | None
    pydantic_dump_kwargs: dict[str, Any] | None
    # Without effect; the system check W019 tells of them.
    acks_late: bool
    acks_on_failure_or_timeout: bool
    reject_on_worker_lost: bool
    retry_on_worker_lost: bool
    track_started: bool
    serializer: str
    # Hooks.
    before_start: Callable[..., Any]
    on_success: Callable[..., Any]
    on_retry: Callable[..., Any]
    on_failure: Callable[..., Any]
    after_return: Callable[..., Any]
    on_bound: Callable[..., Any]
    shadow_name: Callable[..., Any]


#: What Celery, its canvas and django-celery-beat pass beside ``CallOptions``, and nobody writes.
_PASSED_ON = frozenset(
    (
        *("args", "kwargs", "task_id", "producer", "link", "link_error", "shadow"),
        *("task_type", "route_name", "retries", "replaced_task_nesting", "origin", "periodic_task_name"),
        *("now", "timezone", "create_sent_event"),
        # kombu's, about the message that is published
        *("mandatory", "immediate", "declare", "expiration", "confirm_timeout", "content_type", "content_encoding"),
        *("correlation_id", "message_id", "timestamp", "user_id", "app_id", "type", "cluster_id"),
    )
)
#: Of a call that stores a root: which execution it may be answered with, and when its tree is cancelled.
OF_A_ROOT = ("idempotency_key", "unique_key", "on_conflict", "debounce", "debounce_max", "deadline")
#: What a chord hands on to its body, together with its own options.
OF_A_CHORD = ("interval", "max_retries", "eager", "propagate")
_CALL_OPTIONS = frozenset(CallOptions.__annotations__)
_OF_A_CALL = (*_CALL_OPTIONS, "task_id", "link", "link_error", "shadow")
_OF_THE_DECORATOR = (*TaskOptions.__annotations__, "base")

#: What those may have meant who write these, beside what looks alike.
_HINTS_AT_A_CALL = {
    "timeout": "A run is limited by time_limit=, the time until it starts by expires=, its whole tree by deadline=.",
    "max_duration": "It is an option of @durable_task; one call has deadline=.",
    "delay": 'Did you mean "countdown"?',
    **dict.fromkeys((*RetryPolicy.__dataclass_fields__, *SCHEDULE_OPTIONS), "It is an option of @durable_task."),
}
_HINTS_AT_THE_DECORATOR = {
    "timeout": "A run is limited by time_limit=, a child by timeout= of ctx.invoke, a whole tree by max_duration=.",
    "deadline": 'Did you mean "max_duration"? A deadline is an option of apply_async.',
    "retries": 'Did you mean "max_retries"?',
    "retry": 'Did you mean "max_retries"?',
    "max_attempts": 'Did you mean "max_retries"? It does not count the first attempt.',
    "retry_delay": 'Did you mean "default_retry_delay"?',
    "crontab": 'Did you mean "cron"? It is a text such as "0 9 * * 1-5".',
    "timezone": 'Did you mean "tz"?',
    "countdown": "It is an option of apply_async.",
    "eta": "It is an option of apply_async.",
    "idempotency_key": "It is an option of apply_async.",
    "unique_key": 'Did you mean "unique"? It names the argument that is the key, or is a function of the arguments.',
    "debounce": "It is an option of apply_async.",
    "debounce_max": "It is an option of apply_async.",
    "concurrency": "A worker's --concurrency limits the tasks of its queues; give this task its own with queue=.",
}


def check_call_options(
    options: Mapping[str, Any],
    call: str,
    *,
    also: Collection[str] = OF_A_ROOT,
    hints: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse an option of a call that nobody would ever look at.

    Args:
        options: Those of ``apply_async``, or of a signature.
        call: How the call is named in the error.
        also: Further names that are known here.
        hints: What to say of those of ``OF_A_ROOT`` that are not known here.

    Raises:
        InvalidArgumentType: One is not known; the message names the nearest one.
    """
    unknown = [name for name in options if name not in _CALL_OPTIONS and name not in _PASSED_ON and name not in also]
    if not unknown:
        return
    known = (*_OF_A_CALL, *also)
    stamps: Collection[str] = options.get("stamped_headers") or ()
    # A stamping visitor may add what it does not stamp, and the parts of a canvas, which Celery freezes, have some of
    # its options. To refuse those would lose the work.
    is_lenient = bool(stamps) or "reply_to" in options
    for name in unknown:
        if name in stamps or ("reply_to" in options and name in OF_A_CHORD):
            continue
        advice = hints.get(name) or _HINTS_AT_A_CALL.get(name)
        advice = advice or _did_you_mean(name, known)
        if advice or not is_lenient:
            raise InvalidArgumentType(f'{call} has no option "{name}". {advice}'.rstrip())


def check_callbacks(options: Mapping[str, Any], app: Any, is_durable: Callable[[object], bool]) -> None:
    """Do what ``check_call_options`` does for the signatures in a call's options, before anything is stored.

    Args:
        options: Those of ``apply_async``.
        app: The Celery app that knows the tasks.
        is_durable: Tells whether a task is one; Celery's own tasks may be called with anything.

    Raises:
        InvalidArgumentType: An option of one is not known.
        InvalidArgumentType, InvalidArgument, TooManyTags: Its tags cannot be stored.
    """
    for name in ("link", "link_error", "chain", "chord"):
        _check_signatures(options.get(name), app, is_durable)


def _check_signatures(found: Any, app: Any, is_durable: Callable[[object], bool]) -> None:
    for each in found if isinstance(found, (list, tuple)) else (found,):
        if not isinstance(each, Mapping) or "task" not in each:
            continue
        given, arguments = each.get("options") or {}, each.get("kwargs") or {}
        if is_durable(app.tasks.get(each["task"])):
            check_call_options(given, f"The signature of {each['task']}")
            if given.get("tags") is not None:
                check_tags(given["tags"], f"tags of the signature of {each['task']}")
        for nested in (
            *(given.get(name) for name in ("link", "link_error", "chain", "chord")),
            # What groups, chains and chords consist of.
            *((arguments.get(name) for name in ("tasks", "header", "body")) if each.get("subtask_type") else ()),
        ):
            _check_signatures(nested, app, is_durable)


def check_task_options(options: Mapping[str, Any], base: type) -> None:
    """Refuse an option of ``@durable_task`` that has no effect, or would replace a method.

    Args:
        options: Those of the decorator.
        base: The task's base class; what it declares is known, too.

    Raises:
        TypeError: One is not known; the message names the nearest one.
        InvalidArgument: The soft time limit is longer than the time limit.
    """
    if "retry_kwargs" in options:
        raise TypeError("retry_kwargs is not taken: pass max_retries=… and default_retry_delay=… themselves.")
    for name, value in options.items():
        if name in _OF_THE_DECORATOR:
            continue
        declared = getattr(base, name, None)
        if hasattr(base, name) and not isinstance(declared, property) and (callable(value) or not callable(declared)):
            continue
        hint = _HINTS_AT_THE_DECORATOR.get(name) or _did_you_mean(name, _OF_THE_DECORATOR)
        raise TypeError(
            f'durable_task() has no option "{name}". '
            f"{hint or 'An attribute of your own is declared in a class that is passed as base=.'}"
        )
    check_limits(options)


def check_limits(options: Mapping[str, Any]) -> None:
    """Refuse a soft time limit that the hard one would forestall, as Celery does.

    Raises:
        InvalidArgument: It is longer.
    """
    hard, soft = options.get("time_limit"), options.get("soft_time_limit")
    if hard and soft and soft > hard:
        raise InvalidArgument(f"soft_time_limit must be less than or equal to time_limit, got {soft:g} and {hard:g}")


def _nearest(name: str, known: Collection[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.7)


def _did_you_mean(name: str, known: Collection[str]) -> str:
    nearest = _nearest(name, known)
    return f'Did you mean "{nearest[0]}"?' if nearest else ""

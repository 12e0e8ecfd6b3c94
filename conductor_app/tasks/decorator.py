"""``@durable_task``, and the check of its options and of its function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack, overload

from celery import current_app, shared_task
from celery.app.task import Task
from celery.local import Proxy
from celery.utils.functional import head_from_fun
from django.core.exceptions import ImproperlyConfigured

from conductor_app.body.context import ExecutionContext
from conductor_app.engine.limits import follow
from conductor_app.states import OnConflict
from conductor_app.tasks.task import DurableTask
from conductor_app.values.arguments import check_duration
from conductor_app.values.limits import check_limits
from conductor_app.values.options import RoutingOptions, TaskOptions, check_task_options
from conductor_app.values.retention import Retention
from conductor_app.values.retries import RetryPolicy
from conductor_app.values.schedules import OPTIONS as SCHEDULE_OPTIONS
from conductor_app.values.schedules import Plan, plan_of
from conductor_app.values.tags import check_tags
from conductor_app.values.texts import shown
from conductor_app.values.uniqueness import check_source

P = ParamSpec("P")
R = TypeVar("R")

_ROUTING_OPTIONS = tuple(RoutingOptions.__annotations__)
_RETRY_OPTIONS = frozenset(RetryPolicy.__dataclass_fields__)
#: Options about Celery's messages that a doorbell cannot have.
_MEANINGLESS_OPTIONS = (
    *("acks_late", "acks_on_failure_or_timeout", "reject_on_worker_lost", "retry_on_worker_lost"),
    *("track_started", "serializer"),
)
_CONTEXT_NAMES = ("ctx", "context", "_ctx", "_context", "_")
#: Where each decorated task was defined, by name: to notice two tasks of one name.
_defined_at: dict[str, tuple[str, str]] = {}
#: The same of each schedule.
_scheduled_at: dict[str, tuple[str, str]] = {}


@overload
def durable_task(fn: Callable[Concatenate[ExecutionContext, P], R], /) -> DurableTask[P, R]: ...


@overload
def durable_task(
    **options: Unpack[TaskOptions],
) -> Callable[[Callable[Concatenate[ExecutionContext, P], R]], DurableTask[P, R]]: ...


@overload
def durable_task(
    *, base: type[DurableTask[..., Any]], **options: Any
) -> Callable[[Callable[Concatenate[ExecutionContext, P], R]], DurableTask[P, R]]: ...


def durable_task(fn: Any = None, /, **options: Any) -> Any:
    """Register a function as a durable Celery task.

    It is a ``shared_task``: every option of Celery's tasks passes through, except those about acknowledging and
    retrying messages, which have no meaning here.

    Args:
        fn: The body; its first parameter is the ``ExecutionContext``, called ``ctx``.
        options: ``max_retries=3``, ``autoretry_for=(Exception,)``, ``dont_autoretry_for=()``, ``retry_backoff=True``,
            ``retry_backoff_max=600``, ``retry_jitter=True``, ``default_retry_delay=180`` as in Celery (delays in
            seconds), ``around=None``, ``tags=None``, ``limits=()``, any other option of ``@shared_task``, and
            attributes that the class given as ``base`` declares. ``around`` is a function that gets the context and the
            body's arguments and returns a context manager; each run of the body is inside of it, and inside of that of
            ``CONDUCTOR["AROUND_BODY"]``. ``tags`` are those of the tree that an execution is in: a mapping, or a
            function that gets the task's arguments and returns one. ``limits`` is a list of ``Limit``.
            function that gets the task's arguments and returns one. ``unique=None`` names the argument that is the
            unique key of an execution, or is a function that gets the task's arguments and returns the key (``None``:
            none); ``on_conflict="return"``, ``"refuse"`` or ``"replace"`` says what becomes of a call whose key an open
            execution has.

            ``cron="0 9 * * 1-5"`` (minute, hour, day of the month, month, day of the week) lets workers start it by
            themselves, by the clocks of ``tz`` (``settings.TIME_ZONE``), as the schedule ``schedule`` (the task's
            name). ``overlap="skip"``, ``"queue"``, ``"allow"`` or ``"replace"`` says what becomes of a tick while an
            earlier one's execution is open, ``catch_up="last"``, ``"none"`` or ``"all"`` what of ticks while no worker
            was there.

            ``keep`` and ``keep_failed``, seconds or a ``timedelta``, let workers delete trees of which it is the root
            so long after they have ended; ``CONDUCTOR["KEEP"]`` and ``CONDUCTOR["KEEP_FAILED"]`` by default, and
            ``float("inf")`` keeps them for good.

            ``max_duration``, seconds or a ``timedelta``, lets workers cancel a tree of which it is the root so long
            after its creation, with all that it waits for. A child has none: the deadline of its root bounds it.

    Raises:
        TypeError: The function cannot be a durable body, or ``around`` not be called; an option without effect;
            ``unique`` names no argument.
        ValueError: An option has an impossible value, such as a line of cron that names no instant, or
            ``soft_time_limit`` exceeds ``time_limit``.
        ImproperlyConfigured: Another durable task, or another schedule, has the same name.
    """
    if fn is None:
        return functools.partial(_register, options)
    if options or not callable(fn):
        raise TypeError("Use @durable_task or @durable_task(option=value).")
    return _register({}, fn)


def _register(options: Mapping[str, Any], fn: Callable[..., Any]) -> Any:
    _check_body(fn, options)
    _check_name(fn, options)
    base = options.get("base") or DurableTask
    if not (isinstance(base, type) and issubclass(base, DurableTask)):
        raise TypeError(
            f"base must derive from conductor_app.DurableTask, got {getattr(base, '__name__', shown(base))}."
        )
    check_task_options(options, base)
    celery_options = {name: value for name, value in options.items() if name not in _RETRY_OPTIONS}
    ignored = tuple(
        name
        for name in _MEANINGLESS_OPTIONS
        if celery_options.pop(name, getattr(DurableTask, name)) != getattr(DurableTask, name)
    )
    policy = RetryPolicy(**{name: value for name, value in options.items() if name in _RETRY_OPTIONS})
    celery_options["base"] = base
    around = celery_options.pop("around", None)
    if around is not None:
        if not callable(around):
            raise TypeError(f"around must be a function that returns a context manager, got {type(around).__name__}.")
        celery_options["around"] = staticmethod(around)
    celery_options["limits"] = limits = check_limits(celery_options.pop("limits", None) or (), fn)
    if limits:
        follow(options.get("name") or current_app.gen_task_name(fn.__name__, fn.__module__))
    celery_options["tag_source"] = _tag_source(celery_options.pop("tags", None))
    source, on_conflict = celery_options.pop("unique", None), celery_options.pop("on_conflict", None)
    check_source(source, on_conflict, inspect.unwrap(fn))
    celery_options["unique_source"] = staticmethod(source) if callable(source) else source
    celery_options["on_conflict"] = OnConflict(on_conflict or OnConflict.RETURN)
    celery_options["plan"] = _plan(fn, options)
    celery_options["retention"] = Retention.of(
        celery_options.pop("keep", None), celery_options.pop("keep_failed", None)
    )
    if (longest := celery_options.pop("max_duration", None)) is not None:
        celery_options["max_duration"] = check_duration(longest, "max_duration", allow_zero=False)
    for name in SCHEDULE_OPTIONS:
        celery_options.pop(name, None)
    celery_options["stores_ignored_errors"] = bool(celery_options.pop("store_errors_even_if_ignored", False))
    # Celery 6 will not know these as attributes of a task (it warns today), but they are options of the decorator.
    routing = {name: celery_options.pop(name) for name in _ROUTING_OPTIONS if name in celery_options}
    register: Any = shared_task  # its stubs know no custom options
    # Celery reads from the header how to call an error callback: bound, it is sent as a task, with the failed one's id.
    return register(
        fn,
        retry_policy=policy,
        routing=routing,
        ignored_options=ignored,
        has_validation=bool(options.get("pydantic")),
        __header__=staticmethod(head_from_fun(fn, bound=True)),  # as in Celery: Python 3.14 binds a partial, too
        **celery_options,
    )


def _tag_source(tags: Any) -> Any:
    if tags is None:
        return None
    return staticmethod(tags) if callable(tags) else check_tags(tags, "tags of @durable_task")


def _plan(fn: Callable[..., Any], options: Mapping[str, Any]) -> Plan | None:
    """Return when the task is started by itself."""
    plan = plan_of(options, _name_of(fn, options))
    if plan is None:
        return None
    try:
        inspect.signature(fn).bind(None)
    except TypeError as error:
        raise TypeError(
            f'{fn.__qualname__} has cron="{plan.timetable.line}", and nobody gives it arguments then: {error}. Give '
            "each parameter a default."
        ) from None
    here = (fn.__module__, fn.__qualname__)
    before = _scheduled_at.setdefault(plan.name, here)
    if before != here:
        raise ImproperlyConfigured(
            f'Two schedules are called "{plan.name}": those of {".".join(before)} and of {".".join(here)}. '
            'Give one of them schedule="…".'
        )
    return plan


def _check_body(fn: Any, options: Mapping[str, Any]) -> None:
    if isinstance(fn, (Proxy, Task)) or type(fn) is Proxy:
        raise TypeError(
            "@durable_task was put on top of a Celery task. Use @durable_task alone: it is a shared_task already and "
            "takes the same options."
        )
    name = getattr(fn, "__qualname__", repr(fn))
    if not inspect.isfunction(fn):
        raise TypeError(f"@durable_task needs a function, got {type(fn).__name__} {name}.")
    if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(
            f"{name} is async. A durable body is an ordinary function; use asgiref.sync.async_to_sync inside."
        )
    if inspect.isgeneratorfunction(fn):
        raise TypeError(f"{name} is a generator. A durable body is an ordinary function that returns its result.")
    if options.get("bind"):
        raise TypeError(f"{name} has bind=True. A durable body gets ctx as its first argument; ctx.task is the task.")
    parameters = list(inspect.signature(fn).parameters.values())
    first = parameters[0] if parameters else None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if first is None or first.kind not in positional or not _is_context(first):
        stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        given = [stars.get(parameter.kind, "") + parameter.name for parameter in parameters]
        wanted = ["ctx", *(parameter for parameter in given if parameter not in ("self", "ctx"))]
        definition = f"give it a name and write `def name({', '.join(wanted)}):`"
        if fn.__name__.isidentifier():
            definition = f"write `def {fn.__name__}({', '.join(wanted)}):`"
        raise TypeError(f"{name}({', '.join(given)}) has no context: {definition}.")


def _is_context(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    return (
        parameter.name in _CONTEXT_NAMES
        or annotation is ExecutionContext
        or (isinstance(annotation, str) and annotation.rpartition(".")[2] == "ExecutionContext")
    )


def _name_of(fn: Callable[..., Any], options: Mapping[str, Any]) -> str:
    name: str = options.get("name") or current_app.gen_task_name(fn.__name__, fn.__module__)
    return name


def _check_name(fn: Callable[..., Any], options: Mapping[str, Any]) -> None:
    name = _name_of(fn, options)
    if not 1 <= len(name) <= 255 or not name.isprintable():
        raise ImproperlyConfigured(f"A task's name must be 1–255 printable characters, got {shown(name)}.")
    here = (fn.__module__, fn.__qualname__)
    before = _defined_at.setdefault(name, here)
    if before != here:
        raise ImproperlyConfigured(
            f'Two durable tasks are called "{name}": {".".join(before)} and {".".join(here)}. '
            'Give one of them name="…".'
        )
    # Celery would go on with the task that it has, without a word.
    registered = getattr(current_app, "_tasks", {}).get(name)
    if registered is not None and not isinstance(registered, DurableTask):
        raise ImproperlyConfigured(
            f'The durable task {".".join(here)} is called "{name}", and so is a plain Celery task. Give one of them '
            'name="…".'
        )

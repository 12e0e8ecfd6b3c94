"""What callers pass: checked at the call, with errors that say what is wrong."""

from __future__ import annotations

import datetime as dt
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from celery.exceptions import QueueNotFound
from celery.utils.time import maybe_iso8601

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType
from conductor_app.store import clock, observing
from conductor_app.values.options import check_limits
from conductor_app.values.texts import shown

#: Longest timeout and longest sleep, in seconds (about 100 years).
MAX_SECONDS = 100 * 366 * 86_400

#: Options that go into each message of an execution as they are.
MESSAGE_OPTIONS = ("time_limit", "soft_time_limit", "exchange", "routing_key", "shadow")
#: Those that go into each message of a plain task beside them: what its callbacks are is Celery's business.
PLAIN_OPTIONS = (
    *("serializer", "compression", "delivery_mode"),
    *("link", "link_error", "chain", "chord", "group_id", "group_index"),
)


def check_duration(value: object, name: str, *, allow_zero: bool = True, allow_past: bool = False) -> float:
    """Return a duration in seconds.

    Raises:
        InvalidArgumentType: It is neither a number nor a ``timedelta``.
        InvalidArgument: It is NaN, infinite, negative (unless ``allow_past``), or longer than ``MAX_SECONDS``.
    """
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgumentType(f"{name} must be a number of seconds or a timedelta, got {type(value).__name__}")
    limit = "" if allow_past else "≥ 0 " if allow_zero else "> 0 "
    if value != value or value in (math.inf, -math.inf):
        raise InvalidArgument(f"{name} must be {limit or 'a finite number of '}seconds, got {value!r}")
    if not allow_past and (value < 0 or (value == 0 and not allow_zero)):
        raise InvalidArgument(f"{name} must be {limit}seconds, got {_number(value)}")
    if abs(value) > MAX_SECONDS:
        raise InvalidArgument(f"{name} must be at most {MAX_SECONDS} seconds (100 years), got {_number(value)}")
    return float(value)


def check_instant(value: object, name: str) -> dt.datetime:
    """Return an instant in the form that Django stores.

    Raises:
        InvalidArgumentType: It is no ``datetime``.
        InvalidArgument: It lies outside of what each database and each time zone can say.
    """
    if not isinstance(value, dt.datetime):
        raise InvalidArgumentType(f"{name} must be a datetime, got {type(value).__name__}")
    if not 1900 <= value.year <= 9000:
        raise InvalidArgument(f"{name} must lie between the years 1900 and 9000, got {value}")
    return clock.aware(value)


def _number(value: float) -> str:
    return repr(value) if isinstance(value, float) or value.bit_length() < 64 else "a much larger one"


def call_arguments(task: str, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call in the form in which they are stored.

    Raises:
        InvalidArgumentType: They are no list and no mapping of names.
    """
    if args is not None and not isinstance(args, (list, tuple)):
        raise InvalidArgumentType(f"args of {task} must be a list or a tuple, got {type(args).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InvalidArgumentType(f"kwargs of {task} must be a mapping, got {type(kwargs).__name__}")
    for name in kwargs or ():
        if not isinstance(name, str):
            raise InvalidArgumentType(f"kwargs of {task} has the key {name!r} of type {type(name).__name__}, not str")
    return list(args or ()), dict(kwargs or {})


#: What a route may say of a message beside its queue.
_ROUTED_OPTIONS = ("exchange", "routing_key", "priority", "delivery_mode", "serializer", "compression")


def routed(task: Any, options: Mapping[str, Any], args: list[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call as ``task_routes`` completes them, once for all messages of the execution.

    Its ``queue`` is a name: of the queue that such a message goes to, as far as this app knows it. ``exchange`` and
    ``routing_key`` are there if they decide instead.

    Raises:
        QueueNotFound: ``task_create_missing_queues`` is off, and there is no such queue.
        InvalidArgument, InvalidArgumentType: The name cannot be one.
    """
    amqp: Any = task.app.amqp
    known = {name: value for name, value in options.items() if value is not None}
    if "queue" in known:
        known["queue"] = _queue(amqp.queues, known["queue"])
    elif not amqp.router.routes and not (known.get("exchange") or known.get("routing_key")):
        return {**options, "queue": _default_queue(amqp.router)}
    if not amqp.router.routes:
        found: Mapping[str, Any] = known
    else:
        found = amqp.router.route(dict(known), task.name, args, dict(kwargs), task)
    completed = {name: _name(found[name]) for name in _ROUTED_OPTIONS if found.get(name) is not None}
    bound = _bound_queue(amqp.queues, completed.get("exchange"), completed.get("routing_key"))
    return {**options, **completed, "queue": bound or _queue_name(amqp.router, found)}


def _queue(queues: Any, queue: Any) -> Any:
    """Return a queue by its name. A new one is not added to those that this process knows: it might consume it."""
    name = _checked_queue(queue if isinstance(queue, str) else _name(queue))
    known = queues.aliases.get(name) or queues.get(name)
    if known is None and not queues.create_missing:
        raise QueueNotFound(f"Queue {name!r} missing from task_queues")
    return known or queues.new_missing(name)


def _bound_queue(queues: Any, exchange: Any, routing_key: Any) -> str | None:
    """Return the first known queue that gets what is sent to an exchange with a routing key."""
    if not exchange or not routing_key:
        return None
    return next((str(queue.name) for queue in queues.values() if _is_bound(queue, exchange, routing_key)), None)


def _is_bound(queue: Any, exchange: str, routing_key: str) -> bool:
    if queue.exchange is None or queue.exchange.name != exchange:
        return False
    if queue.exchange.type != "topic":
        return bool(queue.exchange.type == "fanout" or queue.routing_key == routing_key)
    words = (re.escape(word).replace(r"\*", "[^.]+") for word in queue.routing_key.split("."))
    pattern = r"\.".join(words).replace(r"\#\.", r"(?:.*\.)?").replace(r"\.\#", r"(?:\..*)?").replace(r"\#", ".*")
    return re.fullmatch(pattern, routing_key) is not None


@functools.lru_cache(maxsize=8)
def _default_queue(router: Any) -> str:
    """Return the queue of tasks without a route of their own; Celery looks for it in several settings."""
    return _queue_name(router, router.route({}, ""))


def _queue_name(router: Any, found: Mapping[str, Any]) -> str:
    return str(_name(found.get("queue")) or router.app.conf.task_default_queue)


def _name(named: Any) -> Any:
    """Return the name of a queue or an exchange, which may be given as such."""
    return getattr(named, "name", named)


def message_options(task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a call that go into each message of its execution, as they are stored.

    Raises:
        InvalidArgument: The soft time limit is longer than the hard one.
    """
    check_limits(options)
    kept = {name: options[name] for name in MESSAGE_OPTIONS if options.get(name) is not None}
    headers = observing.carried(task, options.get("headers"))
    if headers:
        kept["headers"] = headers
    if options.get("stamped_headers"):
        kept["stamps"] = {stamp: options.get(stamp) for stamp in options["stamped_headers"]}
    return kept


def _checked_queue(queue: Any) -> str:
    if not isinstance(queue, str):
        raise InvalidArgumentType(f"queue must be str, got {type(queue).__name__}")
    if not 1 <= len(queue) <= 255 or not queue.isprintable():
        raise InvalidArgument(f"queue must be 1–255 printable characters, got {shown(queue)}")
    return str.__str__(queue)


def due_time(options: Mapping[str, Any]) -> tuple[float, dt.datetime | None]:
    """Return Celery's ``countdown``, in seconds, or its ``eta``.

    Raises:
        InvalidArgument, InvalidArgumentType: It is no length of time, or no instant.
    """
    countdown, eta = options.get("countdown"), options.get("eta")
    if countdown is not None:
        return check_duration(countdown, "countdown", allow_past=True), None
    if eta is None:
        return 0.0, None
    return 0.0, check_instant(_from_iso8601(eta, "eta"), "eta")


def expiry(value: Any, name: str = "expires") -> float | dt.datetime | None:
    """Return Celery's ``expires``, or another option of the kind: seconds, an instant, or ``None``.

    Raises:
        InvalidArgument, InvalidArgumentType: It is neither.
    """
    if value is None:
        return None
    if isinstance(value, (str, dt.datetime)):
        return check_instant(_from_iso8601(value, name), name)
    return check_duration(value, name, allow_past=True)


def _from_iso8601(value: Any, name: str) -> Any:
    try:
        return maybe_iso8601(value) if isinstance(value, str) else value
    except ValueError:
        raise InvalidArgument(f"{name} must be a datetime or its ISO 8601 text, got {shown(value)}") from None


def check_priority(value: Any) -> int | None:
    """Return a message's priority.

    Raises:
        InvalidArgument, InvalidArgumentType: No broker knows such a one.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgumentType(f"priority must be int, got {type(value).__name__}")
    if not -32_768 <= value <= 32_767:
        raise InvalidArgument("priority must lie between -32768 and 32767; brokers know 0 to 9 or 0 to 255")
    return value

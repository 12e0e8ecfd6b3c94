"""``@durable_task``: a Celery task whose runs are executions in the database."""

from __future__ import annotations

import datetime as dt
import functools
import inspect
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar, cast, overload

from celery import current_app, shared_task
from celery.app.task import Context, Task
from celery.backends.base import DisabledBackend
from celery.canvas import Signature, maybe_signature
from celery.contrib.django.task import DjangoTask
from celery.local import Proxy
from celery.result import AsyncResult, EagerResult
from celery.utils.functional import maybe_list
from celery.utils.time import maybe_iso8601
from django.core.exceptions import ImproperlyConfigured

from conductor_app import clock, executor, inline, transitions
from conductor_app.conf import conductor_settings
from conductor_app.context import ExecutionContext, current_context
from conductor_app.dispatch import HEADER
from conductor_app.exceptions import (
    BlockingCallInTask,
    ChildError,
    IdempotencyConflict,
    InvalidArgument,
    InvalidArgumentType,
    NotSerializable,
    ProgrammingError,
)
from conductor_app.ids import new_root_id
from conductor_app.models import Execution
from conductor_app.retries import RetryPolicy
from conductor_app.serialization import dump_options, dumps

P = ParamSpec("P")
R = TypeVar("R")

_RETRY_OPTIONS = frozenset(RetryPolicy.__dataclass_fields__)
_CONTEXT_NAMES = ("ctx", "context", "_ctx", "_context", "_")
#: Options of ``apply_async`` that outlive a suspension, as they are stored.
_KEPT_OPTIONS = ("chain", "chord", "group_id", "group_index", "root_id", "time_limit", "soft_time_limit", "shadow")
_KEPT_ROUTING = ("exchange", "routing_key")
#: Where each decorated task was defined, by name: to notice two tasks of one name.
_defined_at: dict[str, tuple[str, str]] = {}


class DurableResult(AsyncResult[R]):
    """An ``AsyncResult`` that refuses to be waited for inside a durable body."""

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the result; see ``celery.result.AsyncResult.get``.

        Raises:
            BlockingCallInTask: The call stands in a durable body.
        """
        if current_context.get() is not None:
            raise BlockingCallInTask(
                f"Waiting for {self.id} inside a durable body would hold the worker. Use ctx.invoke instead of "
                ".delay(…).get()."
            )
        return super().get(*args, **kwargs)


class DurableTask(DjangoTask[P, R]):
    """The Celery task behind ``@durable_task``; its ``run`` is the decorated function."""

    abstract = True
    #: What the worker wraps around each delivery.
    Request = "conductor_app.worker:DurableRequest"

    # A message is a doorbell: acknowledged at once and never brought back by Celery. Leases and the sweeper do that.
    acks_late = False
    reject_on_worker_lost = False
    retry_on_worker_lost = False
    track_started = False
    serializer = "json"
    #: A child's failure was reported by the child; Celery logs it in one line, Sentry skips it.
    throws = (ChildError,)

    retry_policy: ClassVar[RetryPolicy] = RetryPolicy()

    # ------------------------------------------------------------------------------------------------------- calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one delivery; for Celery's tracer.

        Raises:
            TypeError: The task was called like a function.
        """
        request = self.request
        if request.called_directly:
            raise TypeError(
                f"{self.name} is durable and cannot be called like a function. Use {self.name}.delay(…), or "
                f"conductor_app.testing in a unit test."
            )
        return executor.run(self, self._adopt(request, args, kwargs))

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> AsyncResult[R]:
        """Store an execution in the current transaction, and publish its message when that is committed.

        Takes the options of ``celery.app.task.Task.apply_async``. ``countdown`` and ``eta`` become the due time,
        ``expires`` a deadline for starting; options about the producer and about publishing again have no effect,
        since the row is the outbox.

        Args:
            idempotency_key: A second call with the same key returns the existing execution.

        Raises:
            NotSerializable, PayloadTooLarge, InvalidArgument, InvalidArgumentType: Nothing is stored.
            IdempotencyConflict: The key belongs to an execution with other arguments.
        """
        del producer
        options = {
            **{key: value for key, value in cast(Any, self)._get_exec_options().items() if value is not None},
            **options,
            "link": link,
            "link_error": link_error,
            "shadow": shadow,
        }
        new = self.new_execution(
            list(args or ()),
            dict(kwargs or {}),
            options,
            what=f"payload of {self.name}",
            execution_id=_parse_id(task_id),
            idempotency_key=idempotency_key,
            is_root=True,
        )
        execution, created = transitions.create(new)
        if not created:
            _check_same(execution, new)
        result: AsyncResult[R] = self.AsyncResult(str(execution.pk))
        parent = self.app.current_worker_task if options.get("add_to_parent", True) else None
        if parent is not None and not isinstance(parent, DurableTask):
            parent.add_trail(result)
        if self.app.conf.task_always_eager and created:
            return cast("AsyncResult[R]", inline.run_eagerly(execution, self.app))
        return result

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> EagerResult[R]:  # type: ignore[override]
        """Store an execution and run its whole tree in this process, without waiting for due times.

        Options that concern the eager call only (``throw``, ``logfile`` …) have no effect.
        """
        kept = {key: value for key, value in options.items() if key in ("task_id", "link", "link_error")}
        task_id = kept.pop("task_id", None)
        new = self.new_execution(
            list(args or ()),
            dict(kwargs or {}),
            kept,
            what=f"payload of {self.name}",
            execution_id=_parse_id(task_id),
            is_root=True,
        )
        execution, _created = transitions.create(new)
        return cast("EagerResult[R]", inline.run_eagerly(execution, self.app))

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult[R]:  # noqa: N802
        """Return the result object of an execution's id."""
        return DurableResult(task_id, app=self.app, task_name=self.name, **kwargs)

    def retry(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse Celery's own retry, which would publish a second message.

        Raises:
            ProgrammingError: Always.
        """
        raise ProgrammingError(f"{self.name} is durable: use `raise ctx.retry(countdown=…)`.")

    def after_return(self, status: str, retval: Any, task_id: str, *args: Any, **kwargs: Any) -> None:
        """Note that Celery has been told of a final status."""
        super().after_return(status, retval, task_id, *args, **kwargs)
        announced = getattr(self.request, "conductor_announces", None)
        if announced is not None:
            transitions.announced(uuid.UUID(announced))

    # ------------------------------------------------------------------------------------------------ new executions

    def new_execution(
        self,
        args: list[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        what: str,
        execution_id: uuid.UUID | None = None,
        idempotency_key: str | None = None,
        is_root: bool = False,
    ) -> transitions.NewExecution:
        """Check everything about an execution that is about to be stored, and return it.

        Args:
            args: Positional arguments, without the context.
            kwargs: Keyword arguments.
            options: Options of ``apply_async``.
            what: How the payload is called in an error.
            execution_id: ``None`` makes a new one.
            idempotency_key: Unique per task.
            is_root: Whether its result is Celery's business too.

        Raises:
            NotSerializable, PayloadTooLarge, InvalidArgument, InvalidArgumentType: Nothing is stored.
        """
        self._check_signature(args, kwargs, what)
        payload = _dump_payload(args, kwargs)
        if idempotency_key is not None and (
            not isinstance(idempotency_key, str) or not 1 <= len(idempotency_key) <= 255
        ):
            raise InvalidArgument(f"idempotency_key must be a string of 1–255 characters, got {idempotency_key!r}")
        options = {name: value for name, value in options.items() if value is not None}
        countdown, eta = _due(options)
        return transitions.NewExecution(
            id=execution_id or new_root_id(),
            task=self.name,
            queue=self._queue_name(options, args, kwargs),
            payload=payload,
            max_attempts=self.retry_policy.max_attempts,
            priority=_priority(options.get("priority")),
            options=dump_options(self._kept_options(options, is_root=is_root)),
            countdown=countdown,
            eta=eta,
            expires=_expires(options.get("expires")),
            idempotency_key=idempotency_key,
        )

    def _check_signature(self, args: list[Any], kwargs: Mapping[str, Any], what: str) -> None:
        signature = body_signature(self.run)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArgumentType(f"{what} does not fit {self.name}{signature}: {error}") from None

    def _queue_name(self, options: Mapping[str, Any], args: list[Any], kwargs: Mapping[str, Any]) -> str:
        queue: Any = options.get("queue")
        if isinstance(queue, str) and queue:
            return queue
        if queue is not None and hasattr(queue, "name"):
            return str(queue.name)
        routing = {name: options[name] for name in ("exchange", "routing_key") if name in options}
        router: Any = self.app.amqp.router
        route = router.route(routing, self.name, args, dict(kwargs), self)
        found = route.get("queue")
        return str(getattr(found, "name", found) or self.app.conf.task_default_queue)

    def _kept_options(self, options: Mapping[str, Any], *, is_root: bool) -> dict[str, Any]:
        kept = {name: options[name] for name in (*_KEPT_OPTIONS, *_KEPT_ROUTING) if name in options}
        headers = dict(options.get("headers") or {})
        for stamp in options.get("stamped_headers") or ():
            headers[stamp] = options.get(stamp)
        if options.get("stamped_headers"):
            headers["stamped_headers"] = list(options["stamped_headers"])
        if headers:
            kept["headers"] = headers
        for name in ("link", "link_error"):
            if name in options:
                kept[name] = [_with_id(signature) for signature in maybe_list(options[name])]
        ignore_result = options.get("ignore_result", self.ignore_result)
        stores = is_root and not ignore_result and not isinstance(self.app.backend, DisabledBackend)
        if stores:
            kept["ignore_result"] = False
        if stores or any(kept.get(name) for name in ("link", "link_error", "chain", "chord")):
            kept["announce"] = True
        return kept

    # ---------------------------------------------------------------------------------- messages published by others

    def _adopt(self, request: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> uuid.UUID:
        """Return the id of the execution that a delivery is about.

        A message that somebody else published by task name (Beat, ``send_task``, another language) becomes an
        execution here; delivered again, it finds the one that it became.
        """
        try:
            execution_id = uuid.UUID(str(request.id))
        except ValueError:
            execution_id = uuid.uuid5(uuid.NAMESPACE_OID, f"conductor_app:{request.id}")
        # Celery puts unknown headers of a message straight onto the request.
        if (getattr(request, HEADER, None) or (request.headers or {}).get(HEADER)) is not None:
            return execution_id
        new = self.new_execution(
            list(args),
            kwargs,
            {
                "link": request.callbacks,
                "link_error": request.errbacks,
                "chain": request.chain,
                "chord": request.chord,
                "group_id": request.group,
                "group_index": request.group_index,
                "root_id": request.root_id,
                "ignore_result": request.ignore_result if "ignore_result" in vars(request) else None,
                "queue": (request.delivery_info or {}).get("routing_key"),
                "priority": (request.delivery_info or {}).get("priority"),
            },
            what=f"payload of {self.name}",
            execution_id=execution_id,
            is_root=True,
        )
        transitions.patiently(lambda: transitions.create(new))
        return execution_id


def body_signature(fn: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a durable body without its context."""
    return _body_signature(inspect.unwrap(fn))


@functools.lru_cache(maxsize=4_096)
def _body_signature(fn: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(fn)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


# ------------------------------------------------------------------------------------------------------- the decorator


@overload
def durable_task(fn: Callable[Concatenate[ExecutionContext, P], R], /) -> DurableTask[P, R]: ...


@overload
def durable_task(
    **options: Any,
) -> Callable[[Callable[Concatenate[ExecutionContext, P], R]], DurableTask[P, R]]: ...


def durable_task(fn: Any = None, /, **options: Any) -> Any:
    """Register a function as a durable Celery task.

    It is a ``shared_task``: every option of Celery's tasks passes through, except those about acknowledging and
    retrying messages, which have no meaning here.

    Args:
        fn: The body; its first parameter is the ``ExecutionContext``, called ``ctx``.
        options: ``max_retries=3``, ``autoretry_for=(Exception,)``, ``dont_autoretry_for=()``, ``retry_backoff=True``,
            ``retry_backoff_max=600``, ``retry_jitter=True``, ``default_retry_delay=180`` as in Celery (delays in
            seconds), and any other option of ``@shared_task``.

    Raises:
        TypeError: The function cannot be a durable body.
        ValueError: A retry option has an impossible value.
        ImproperlyConfigured: Another durable task has the same name.
    """
    if fn is None:
        return functools.partial(_register, options)
    if options or not callable(fn):
        raise TypeError("Use @durable_task or @durable_task(option=value).")
    return _register({}, fn)


def _register(options: Mapping[str, Any], fn: Callable[..., Any]) -> Any:
    _check_body(fn, options)
    _check_name(fn, options)
    celery_options = {name: value for name, value in options.items() if name not in _RETRY_OPTIONS}
    for forced in ("acks_late", "reject_on_worker_lost", "retry_on_worker_lost", "track_started", "serializer"):
        celery_options.pop(forced, None)
    policy = RetryPolicy(**{name: value for name, value in options.items() if name in _RETRY_OPTIONS})
    celery_options.setdefault("base", DurableTask)
    if not issubclass(celery_options["base"], DurableTask):
        raise TypeError(f"base must derive from conductor_app.DurableTask, got {celery_options['base'].__name__}.")
    register: Any = shared_task  # its stubs know no custom options
    return register(fn, retry_policy=policy, **celery_options)


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
        given = ", ".join(parameter.name for parameter in parameters)
        wanted = ", ".join(["ctx", *(parameter.name for parameter in parameters if parameter.name != "self")])
        raise TypeError(f"{name}({given}) has no context: write `def {fn.__name__}({wanted}):`.")


def _is_context(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    return (
        parameter.name in _CONTEXT_NAMES
        or annotation is ExecutionContext
        or (isinstance(annotation, str) and annotation.rpartition(".")[2] == "ExecutionContext")
    )


def _check_name(fn: Callable[..., Any], options: Mapping[str, Any]) -> None:
    name = options.get("name") or current_app.gen_task_name(fn.__name__, fn.__module__)
    here = (fn.__module__, fn.__qualname__)
    before = _defined_at.setdefault(name, here)
    if before != here:
        raise ImproperlyConfigured(
            f'Two durable tasks are called "{name}": {".".join(before)} and {".".join(here)}. '
            'Give one of them name="…".'
        )


# ------------------------------------------------------------------------------------------------------------ arguments


def _parse_id(task_id: Any) -> uuid.UUID | None:
    if task_id is None:
        return None
    try:
        return uuid.UUID(str(task_id))
    except ValueError:
        raise InvalidArgument(
            f"task_id must be a UUID, since it is the execution's id, got {task_id!r}. Use idempotency_key= for a key "
            "of your own."
        ) from None


def _dump_payload(args: list[Any], kwargs: Mapping[str, Any]) -> str:
    """Return ``[args, kwargs]`` as stored text; an error's path is the one that the caller wrote."""
    kwargs = dict(kwargs)
    try:
        return dumps([args, kwargs], "payload", conductor_settings().MAX_PAYLOAD_BYTES)
    except NotSerializable:
        dumps(kwargs, "payload")
        dumps(args[0] if len(args) == 1 else args, "payload")
        raise


def _check_same(execution: Execution, new: transitions.NewExecution) -> None:
    if execution.task == new.task and execution.payload == new.payload:
        return
    what = f"idempotency key {new.idempotency_key!r}" if new.idempotency_key is not None else f"id {new.id}"
    raise IdempotencyConflict(
        f"The {what} belongs to execution {execution.pk} of {execution.task} with another payload. Use another key."
    )


def _due(options: Mapping[str, Any]) -> tuple[float, dt.datetime | None]:
    countdown, eta = options.get("countdown"), options.get("eta")
    if countdown is not None:
        if isinstance(countdown, dt.timedelta):
            countdown = countdown.total_seconds()
        if isinstance(countdown, bool) or not isinstance(countdown, (int, float)):
            raise InvalidArgumentType(f"countdown must be a number of seconds, got {type(countdown).__name__}")
        if not math.isfinite(countdown):
            raise InvalidArgument(f"countdown must be finite, got {countdown!r}")
        return float(countdown), None
    if eta is None:
        return 0.0, None
    eta = maybe_iso8601(eta)
    if not isinstance(eta, dt.datetime):
        raise InvalidArgumentType(f"eta must be a datetime, got {type(eta).__name__}")
    return 0.0, clock.aware(eta)


def _expires(value: Any) -> float | dt.datetime | None:
    if isinstance(value, str):
        value = maybe_iso8601(value)
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
    if value is None:
        return None
    if isinstance(value, dt.datetime):
        return clock.aware(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidArgumentType(f"expires must be a number of seconds or a datetime, got {value!r}")
    return float(value)


def _priority(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -32_768 <= value <= 32_767:
        raise InvalidArgument(f"priority must be an int, got {value!r}")
    return value


def _with_id(signature: Any) -> Any:
    """Fix the id of a callback when it is stored, so that sending it twice is the same execution."""
    found = maybe_signature(signature, app=current_app)
    if not isinstance(found, Signature):
        return found
    if found.get("subtask_type"):
        return dict(found)
    clone = found.clone()
    clone.options.setdefault("task_id", str(new_root_id()))
    return dict(clone)

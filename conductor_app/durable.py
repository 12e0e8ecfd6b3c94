"""``@durable_task``: a Celery task whose runs are executions in the database."""

from __future__ import annotations

import difflib
import functools
import inspect
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

from celery import current_app, shared_task
from celery.app.task import Context, Task
from celery.backends.base import DisabledBackend
from celery.canvas import Signature, maybe_signature
from celery.contrib.django.task import DjangoTask
from celery.local import Proxy
from celery.result import AsyncResult, EagerResult
from celery.utils.functional import head_from_fun, maybe_list
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError

from conductor_app import dispatch, executor, inline, transitions
from conductor_app.arguments import call_arguments, check_priority, due_time, expiry, message_options, queue_name
from conductor_app.conf import conductor_settings
from conductor_app.context import ExecutionContext, check_key, current_context
from conductor_app.dispatch import HEADER
from conductor_app.exceptions import (
    AbandonRun,
    BlockingCallInTask,
    ChildError,
    IdempotencyConflict,
    InvalidArgument,
    InvalidArgumentType,
    ProgrammingError,
)
from conductor_app.ids import new_root_id, of_task_id
from conductor_app.models import Execution, database
from conductor_app.retries import RetryPolicy
from conductor_app.serialization import dump_call, dump_options, loads, shown

P = ParamSpec("P")
R = TypeVar("R")

_ROUTING_OPTIONS = ("queue", "exchange", "exchange_type", "routing_key", "delivery_mode", "priority")
_RETRY_OPTIONS = frozenset(RetryPolicy.__dataclass_fields__)
_CONTEXT_NAMES = ("ctx", "context", "_ctx", "_context", "_")
#: Options of ``apply_async`` that outlive a suspension, as they are stored.
_KEPT_OPTIONS = ("celery_id", "chain", "group_id", "group_index", "root_id", "parent_id")
#: Where each decorated task was defined, by name: to notice two tasks of one name.
_defined_at: dict[str, tuple[str, str]] = {}


if TYPE_CHECKING:
    _AsyncResult = AsyncResult[Any]

    class _Task(DjangoTask[P, R]):
        """Celery's task for Django, generic."""
else:  # Celery 5.6 cannot be subscripted at run time.
    _AsyncResult = AsyncResult

    class _Task(DjangoTask, Generic[P, R]):
        abstract = True


class DurableResult(_AsyncResult):
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


class DurableTask(_Task[P, R]):
    """The Celery task behind ``@durable_task``; its ``run`` is the decorated function."""

    abstract = True
    #: What the worker wraps around each delivery.
    Request = "conductor_app.worker:DurableRequest"
    #: What the worker does with each message.
    Strategy = "conductor_app.worker:strategy"

    # A message is a doorbell: acknowledged at once and never brought back by Celery. Leases and the sweeper do that.
    acks_late = False
    reject_on_worker_lost = False
    retry_on_worker_lost = False
    track_started = False
    serializer = "json"
    #: A child's failure was reported by the child; Celery logs it in one line, Sentry skips it.
    throws = (ChildError,)
    #: Celery's tracer stores nothing: it does not know a child from a root.
    store_errors_even_if_ignored = False

    #: What the option ``store_errors_even_if_ignored`` says.
    stores_ignored_errors: ClassVar[bool] = False
    retry_policy: ClassVar[RetryPolicy] = RetryPolicy()
    #: The decorator's ``queue``, ``exchange``, ``routing_key`` and ``priority``; they win over ``task_routes``.
    routing: ClassVar[Mapping[str, Any]] = {}
    #: Options that were given and mean nothing here; the system check W019 tells of them.
    ignored_options: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------------------------------------------------- calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one delivery; for Celery's tracer.

        Raises:
            TypeError: The task was called like a function.
        """
        request = self.request
        running = current_context.get()
        # In its own body the task's request is that of the run, so only the context tells a call of itself.
        if request.called_directly or (running is not None and str(running.execution_id) == str(request.id)):
            raise TypeError(
                f"{self.name} is durable and cannot be called like a function. Use {self.name}.delay(…), or "
                f"{self.name}.apply(…) in a unit test."
            )
        try:
            execution_id = self._adopt(request, args, kwargs)
        except AbandonRun as error:
            # A message that somebody else published is acknowledged, and not stored: Celery has to record the failure.
            raise OperationalError(str(error)) from error
        return executor.run(self, execution_id)

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
            **options,
            "link": link,
            "link_error": link_error,
            "shadow": shadow,
        }
        caller = self.app.current_worker_task
        if caller is not None:
            options.setdefault("root_id", caller.request.root_id or caller.request.id)
            options.setdefault("parent_id", caller.request.id)
        if self.app.conf.task_always_eager:
            options["ignore_result"] = not self.app.conf.task_store_eager_result
        new = self.new_execution(
            *call_arguments(self.name, args, kwargs),
            options,
            what=f"payload of {self.name}",
            execution_id=_parse_id(task_id),
            idempotency_key=idempotency_key,
            is_root=True,
        )
        if self.app.conf.task_always_eager:
            with dispatch.inline():
                execution, created = transitions.create(new)
        else:
            execution, created = transitions.create(new)
        if not created:
            _check_same(execution, new)
        result: AsyncResult[R] = self.AsyncResult(str(execution.pk))
        if caller is not None and options.get("add_to_parent", True) and not isinstance(caller, DurableTask):
            caller.add_trail(result)
        if self.app.conf.task_always_eager and created:
            return cast("AsyncResult[R]", inline.run_eagerly(execution, self.app))
        return result

    def apply(  # type: ignore[override]
        self, args: Any = None, kwargs: Any = None, *, throw: bool | None = None, **options: Any
    ) -> EagerResult[R]:
        """Store an execution and run its whole tree in this process, without waiting for due times.

        Args:
            args: Positional arguments, without the context.
            kwargs: Keyword arguments.
            throw: Whether to raise what fails it; ``CELERY_TASK_EAGER_PROPAGATES`` by default.
            options: ``task_id``, ``link`` and ``link_error`` have the meaning of ``apply_async``; others no effect.
        """
        kept = {key: value for key, value in options.items() if key in ("task_id", "link", "link_error")}
        kept["ignore_result"] = not self.app.conf.task_store_eager_result
        task_id = kept.pop("task_id", None)
        new = self.new_execution(
            *call_arguments(self.name, args, kwargs),
            kept,
            what=f"payload of {self.name}",
            execution_id=_parse_id(task_id),
            is_root=True,
        )
        with dispatch.inline():
            execution, _created = transitions.create(new)
        return cast("EagerResult[R]", inline.run_eagerly(execution, self.app, throw))

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult[R]:  # noqa: N802
        """Return the result object of an execution's id."""
        return DurableResult(task_id, app=self.app, task_name=self.name, **kwargs)

    def retry(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse Celery's own retry, which would publish a second message.

        Raises:
            ProgrammingError: Always.
        """
        raise ProgrammingError(f"{self.name} is durable: use `raise ctx.retry(countdown=…)`.")

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
        payload = self.stored_payload(args, kwargs)
        if idempotency_key is not None:
            check_key(idempotency_key, "idempotency_key")
        given = {name: value for name, value in options.items() if value is not None}
        # The decorator's own queue, priority, time limits: of a child as well as of a root.
        exec_options: Mapping[str, Any] = {**cast(Any, self)._get_exec_options(), **self.routing}
        own = {name: value for name, value in exec_options.items() if value is not None}
        options = {**own, **given}
        countdown, eta = due_time(options)
        return transitions.NewExecution(
            id=execution_id or new_root_id(),
            task=self.name,
            queue=queue_name(self, options, args, kwargs),
            payload=payload,
            max_attempts=self.retry_policy.max_attempts,
            priority=check_priority(options.get("priority")),
            options=dump_options(self._kept_options(options, is_root=is_root)),
            countdown=countdown,
            eta=eta,
            expires=expiry(options.get("expires")),
            idempotency_key=idempotency_key,
        )

    def stored_payload(self, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the arguments as they are stored.

        Raises:
            NotSerializable, PayloadTooLarge: They cannot be.
        """
        return dump_call(args, kwargs, conductor_settings().MAX_PAYLOAD_BYTES)

    def _check_signature(self, args: list[Any], kwargs: Mapping[str, Any], what: str) -> None:
        try:
            _signature(inspect.unwrap(self.run)).bind(None, *args, **kwargs)
        except TypeError as error:
            signature = body_signature(self.run)
            raise InvalidArgumentType(f"{what} does not fit {self.name}{signature}: {error}") from None

    def _kept_options(self, options: Mapping[str, Any], *, is_root: bool) -> dict[str, Any]:
        kept = {name: options[name] for name in _KEPT_OPTIONS if name in options} | message_options(self.name, options)
        for name in ("link", "link_error"):
            if name in options:
                kept[name] = _with_ids(options[name])
        if "chord" in options:
            kept["chord"] = _with_callback_ids(options["chord"])
        if is_root and not isinstance(self.app.backend, DisabledBackend):
            ignores = options.get("ignore_result", self.ignore_result)
            if not ignores:
                kept["ignore_result"] = False
            elif self.stores_ignored_errors or self.app.conf.task_store_errors_even_if_ignored:
                kept["store_error"] = True
        if any(kept.get(name) for name in ("store_error", "link", "link_error", "chain", "chord")) or (
            kept.get("ignore_result") is False
        ):
            kept["announce"] = True
        return kept

    # ---------------------------------------------------------------------------------- messages published by others

    def _adopt(self, request: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> uuid.UUID:
        """Return the id of the execution that a delivery is about.

        A message that somebody else published by task name (Beat, ``send_task``, another language) becomes an
        execution here; delivered again, it finds the one that it became. If its arguments do not fit, it becomes none,
        and Celery records the failure as it does for any task.
        """
        execution_id = of_task_id(request.id)
        # Celery puts unknown headers of a message straight onto the request.
        if (getattr(request, HEADER, None) or (request.headers or {}).get(HEADER)) is not None:
            return execution_id
        known = Execution.objects.using(database()).filter(pk=execution_id)
        if transitions.patiently(known.exists):
            # Whatever else the message says: if its arguments did not fit, Celery would record that this one failed.
            return execution_id
        delivery = request.delivery_info or {}
        time_limit, soft_time_limit = (*(request.timelimit or ()), None, None)[:2]
        new = self.new_execution(
            *call_arguments(self.name, args, kwargs),
            {
                **(request.stamps or {}),
                # Celery goes on to call it by the name that its publisher gave it.
                "celery_id": None if request.id == str(execution_id) else request.id,
                "link": request.callbacks,
                "link_error": request.errbacks,
                "chain": request.chain,
                "chord": request.chord,
                "group_id": request.group,
                "group_index": request.group_index,
                "root_id": request.root_id,
                "parent_id": request.parent_id,
                "ignore_result": vars(request).get("ignore_result"),
                "queue": _consumed_queue(self.app, delivery.get("exchange"), delivery.get("routing_key")),
                "priority": delivery.get("priority"),
                "expires": request.expires,
                "time_limit": time_limit,
                "soft_time_limit": soft_time_limit,
                "shadow": request.shadow,
                "headers": _own_headers(request),
                "stamped_headers": request.stamped_headers,
            },
            what=f"payload of {self.name}",
            execution_id=execution_id,
            is_root=True,
        )
        transitions.patiently(lambda: transitions.create(new))
        return execution_id


def body_signature(fn: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a durable body without its context."""
    signature = _signature(inspect.unwrap(fn))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@functools.lru_cache(maxsize=4_096)
def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(fn)


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
    _check_option_names(options)
    celery_options = {name: value for name, value in options.items() if name not in _RETRY_OPTIONS}
    ignored = tuple(
        name
        for name in ("acks_late", "reject_on_worker_lost", "retry_on_worker_lost", "track_started", "serializer")
        if celery_options.pop(name, getattr(DurableTask, name)) != getattr(DurableTask, name)
    )
    policy = RetryPolicy(**{name: value for name, value in options.items() if name in _RETRY_OPTIONS})
    celery_options.setdefault("base", DurableTask)
    if not issubclass(celery_options["base"], DurableTask):
        raise TypeError(f"base must derive from conductor_app.DurableTask, got {celery_options['base'].__name__}.")
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
        __header__=head_from_fun(fn, bound=True),
        **celery_options,
    )


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


def _check_name(fn: Callable[..., Any], options: Mapping[str, Any]) -> None:
    name = options.get("name") or current_app.gen_task_name(fn.__name__, fn.__module__)
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


def _check_option_names(options: Mapping[str, Any]) -> None:
    if "retry_kwargs" in options:
        raise TypeError("retry_kwargs is not taken: pass max_retries=… and default_retry_delay=… themselves.")
    for name in options:
        if name in _RETRY_OPTIONS or hasattr(DurableTask, name):
            continue
        # Celery keeps any option as an attribute, so that a misspelt one would be lost without a word.
        nearest = difflib.get_close_matches(name, _RETRY_OPTIONS, n=1, cutoff=0.8)
        if nearest:
            raise TypeError(f'durable_task() has no option "{name}". Did you mean "{nearest[0]}"?')


# ------------------------------------------------------------------------------------------------------------ arguments


def _parse_id(task_id: Any) -> uuid.UUID | None:
    if task_id is None:
        return None
    try:
        return uuid.UUID(str(task_id))
    except ValueError:
        raise InvalidArgument(
            f"task_id must be a UUID, since it is the execution's id, got {shown(task_id)}. Use idempotency_key= for a "
            "key of your own."
        ) from None


def _check_same(execution: Execution, new: transitions.NewExecution) -> None:
    # Decoded, since the order of a mapping's keys is no difference.
    if execution.task == new.task and loads(execution.payload) == loads(new.payload):
        return
    what = f"idempotency key {new.idempotency_key!r}" if new.idempotency_key is not None else f"id {new.id}"
    raise IdempotencyConflict(
        f"The {what} belongs to execution {execution.pk} of {execution.task} with another payload. Use another key."
    )


#: What Celery and brokers add to a message's headers. RabbitMQ drops a message that comes back with its x-death.
_FOREIGN_HEADERS = frozenset({"argsrepr", "compression", "kwargsrepr", "lang", "task"})
_FOREIGN_HEADER_PREFIXES = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count")


def _own_headers(request: Context) -> dict[str, Any] | None:
    """Return the headers that the publisher of a message has added."""
    known = {*vars(Context), *_FOREIGN_HEADERS}
    return {
        name: value
        for name, value in (request.headers or {}).items()
        if name not in known and not name.startswith(_FOREIGN_HEADER_PREFIXES)
    } or None


def _consumed_queue(app: Any, exchange: str | None, routing_key: str | None) -> str | None:
    """Return the queue that a message came from, as far as its routing tells; the task's own queue otherwise."""
    queues = app.amqp.queues
    if not exchange and routing_key in queues:
        return routing_key
    for queue in queues.values():
        if queue.exchange is not None and (queue.exchange.name, queue.routing_key) == (exchange, routing_key):
            return str(queue.name)
    return None


def _with_ids(signatures: Any) -> list[Any]:
    """Fix the ids of callbacks when they are stored, so that calling one twice is the same execution."""
    return [_with_id(maybe_signature(signature, app=current_app)) for signature in maybe_list(signatures) or ()]


def _with_id(signature: Any) -> Any:
    if not isinstance(signature, Signature):
        return signature
    fixed = signature.clone()
    if fixed.get("subtask_type"):
        fixed.freeze()
    else:
        fixed.options.setdefault("task_id", str(new_root_id()))
    return dict(fixed)


def _with_callback_ids(body: Any) -> Any:
    """Fix the ids of the callbacks of a chord's body; the body itself has one."""
    found: Any = maybe_signature(body, app=current_app)
    fixed = found.clone()
    for name in ("link", "link_error"):
        if fixed.options.get(name):
            fixed.options[name] = _with_ids(fixed.options[name])
    return dict(fixed)

"""``@durable_task``: a Celery task whose runs are executions in the database."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Generic, ParamSpec, TypeVar, Unpack, cast, overload

import celery.exceptions
from celery import current_app, shared_task
from celery.app.task import Context, Task
from celery.backends.base import DisabledBackend
from celery.canvas import Signature, maybe_signature
from celery.contrib.django.task import DjangoTask
from celery.local import Proxy
from celery.result import AsyncResult, EagerResult
from celery.utils.functional import head_from_fun, maybe_list
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, InterfaceError, OperationalError

from conductor_app import transitions
from conductor_app.body import headers
from conductor_app.body.context import ExecutionContext
from conductor_app.body.misuse import hint_at_repeated_call
from conductor_app.body.names import check_key
from conductor_app.body.run import current_context
from conductor_app.conf import conductor_settings
from conductor_app.engine import announcements, calls, executor
from conductor_app.engine.run import current_run
from conductor_app.engine.waiting import check_wait_for_result
from conductor_app.exceptions import (
    AbandonRun,
    BlockingCallInTask,
    ChildError,
    IdempotencyConflict,
    InvalidArgument,
    InvalidArgumentType,
    PayloadMismatch,
    ProgrammingError,
    WorkerLost,
)
from conductor_app.host import inline
from conductor_app.models import Execution, database
from conductor_app.store import eager
from conductor_app.store.ids import new_root_id, of_task_id
from conductor_app.store.sql import drop_dead_connections, is_outage, once_more
from conductor_app.transitions import dispatch
from conductor_app.transitions.dispatch import HEADER
from conductor_app.values.arguments import call_arguments, check_priority, due_time, expiry, message_options, routed
from conductor_app.values.options import (
    OF_A_CHORD,
    CallOptions,
    RoutingOptions,
    TaskOptions,
    check_call_options,
    check_callbacks,
    check_task_options,
)
from conductor_app.values.retries import RetryPolicy
from conductor_app.values.serialization import dump_call, dump_options, loads, shown
from conductor_app.values.validated import dump_models, load_models
from conductor_app.values.validated import misfit as misfit_of_models

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
#: How often to look whether a database is back, in seconds.
_AWAY_POLL_SECONDS = 0.2
#: Options of ``apply_async`` that outlive a suspension, as they are stored.
_KEPT_OPTIONS = ("caller", "celery_id", "chain", "group_id", "group_index", "root_id", "parent_id")
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
    """An ``AsyncResult`` that refuses to be waited for inside a durable body.

    It gets over a database connection that dies meanwhile, where results are in the database.
    """

    def _get_task_meta(self) -> Any:
        read: Any = super()._get_task_meta  # type: ignore[misc]  # its stubs do not know it
        return once_more(read)

    def get(self, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        """Wait for the result; see ``celery.result.AsyncResult.get``. ``None`` at once if the call ignores it.

        Args:
            timeout: Seconds to wait; ``None`` waits without limit, 0 only looks (Celery's own waits without limit).

        Raises:
            celery.exceptions.TimeoutError: It has not come by then.
            BlockingCallInTask: The call stands in a durable body.
            WaitInsideTransaction: The current transaction can never see the end: it has created the execution, or one
                before it in its chain, or reads a snapshot.
        """
        if current_context.get() is not None:
            raise BlockingCallInTask(
                f"Waiting for {self.id} inside a durable body would hold the worker. Use ctx.invoke instead of "
                ".delay(…).get()."
            )
        if self.ignored:
            return None
        check_wait_for_result(self, timeout)
        if timeout == 0 and not self.ready():
            raise celery.exceptions.TimeoutError(f"The result of {self.id} is not there yet. It goes on; wait again.")
        began, seen_at = time.monotonic(), None
        left = timeout
        while True:
            try:
                return super().get(left, *args, **kwargs)
            except (DatabaseError, InterfaceError) as error:
                now = time.monotonic()
                if cast(Any, self)._cache is not None or not is_outage(error):
                    raise  # the task's own error
                if drop_dead_connections():
                    seen_at = now
                elif seen_at is None or now - seen_at > conductor_settings().LEASE_SECONDS:
                    raise
                else:
                    time.sleep(_AWAY_POLL_SECONDS)
                if timeout is not None:
                    left = began + timeout - time.monotonic()
                    if left <= 0:
                        raise


class DurableTask(_Task[P, R]):
    """The Celery task behind ``@durable_task``; its ``run`` is the decorated function."""

    abstract = True
    #: What the worker wraps around each delivery.
    Request = "conductor_app.host.worker:DurableRequest"
    #: What the worker does with each message.
    Strategy = "conductor_app.host.worker:strategy"

    # A message is a doorbell: acknowledged at once and never brought back by Celery. Leases and the sweeper do that.
    acks_late = False
    reject_on_worker_lost = False
    retry_on_worker_lost = False
    track_started = False
    serializer = "json"
    #: A child's failure was reported by the child, and a death is no error of the code's; Celery logs them in one line,
    #: Sentry skips them.
    throws = (ChildError, WorkerLost)
    #: Celery's tracer stores nothing: it does not know a child from a root.
    store_errors_even_if_ignored = False

    #: What the option ``store_errors_even_if_ignored`` says.
    stores_ignored_errors: ClassVar[bool] = False
    retry_policy: ClassVar[RetryPolicy] = RetryPolicy()
    #: The decorator's ``queue``, ``exchange``, ``routing_key`` and ``priority``; they win over ``task_routes``.
    routing: ClassVar[Mapping[str, Any]] = {}
    #: A context manager for each run of the body, called with the context and the body's arguments; see ``scopes``.
    around: ClassVar[Callable[..., contextlib.AbstractContextManager[object]] | None] = None
    #: Options that were given and mean nothing here; the system check W019 tells of them.
    ignored_options: ClassVar[tuple[str, ...]] = ()
    #: Whether Celery makes pydantic models of its arguments: the option ``pydantic``.
    has_validation: ClassVar[bool] = False
    #: The message of somebody else's that is at work and becomes no execution: its task id, and why.
    refused: ClassVar[ContextVar[tuple[str, Exception] | None]] = ContextVar("conductor_app_refused", default=None)

    # ------------------------------------------------------------------------------------------------------- calling

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run one delivery; for Celery's tracer.

        Raises:
            InvalidArgumentType: The task was called like a function. Also a builtin ``TypeError``.
        """
        request = self.request
        running = current_context.get()
        # In its own body the task's request is that of the run, so only the context tells a call of itself.
        if request.called_directly or (running is not None and str(running.execution_id) == str(request.id)):
            name = self.name.rpartition(".")[2]
            instead = (
                f"Use {self.name}.delay(…); in a unit test conductor_app.testing.run({name}, payload), or "
                f"{self.name}.apply(…)."
                if running is None
                else f'In a durable body use ctx.invoke("name", {name}, payload).'
            )
            raise InvalidArgumentType(f"{self.name} is durable and cannot be called like a function. {instead}")
        started = current_run.get()
        if started is not None and started.task.name == self.name and started.execution.pk == of_task_id(request.id):
            return executor.run_body(started)
        refused = self.refused.get()
        if refused is not None and refused[0] == request.id:
            raise refused[1]
        return executor.run(self, self.identify(request, args, kwargs))

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
        **options: Unpack[CallOptions],
    ) -> AsyncResult[R]:
        """Store an execution in the current transaction, and publish its message when that is committed.

        Takes the options of ``celery.app.task.Task.apply_async`` and no others. ``countdown`` and ``eta`` become the
        due time, ``expires`` a deadline for starting; options about the producer and about publishing again have no
        effect, since the row is the outbox.

        Args:
            idempotency_key: A second call with the same key returns the existing execution.

        Raises:
            NotSerializable, PayloadTooLarge, InvalidArgument, InvalidArgumentType: Nothing is stored. An option that
                Celery does not know is an ``InvalidArgumentType``.
            QueueNotFound: ``task_create_missing_queues`` is off, and there is no such queue.
            IdempotencyConflict: The key belongs to an execution with other arguments.
        """
        del producer
        check_call_options(options, f"{self.name}.apply_async()")
        given: dict[str, Any] = {**options, "link": link, "link_error": link_error, "shadow": shadow}
        if any(given.get(name) for name in ("link", "link_error", "chain", "chord")):
            check_callbacks(given, self.app, lambda task: isinstance(task, DurableTask))
        current = self.app.current_worker_task
        caller = calls.caller_of(given, task_id, current)
        if idempotency_key is None and (task_id is None or caller is not None):
            hint_at_repeated_call(self.name)
        if current is not None:
            given.setdefault("root_id", current.request.root_id or current.request.id)
            given.setdefault("parent_id", current.request.id)
        given.update(calls.kept(caller, given))
        if self.app.conf.task_always_eager:
            given["ignore_result"] = not self.app.conf.task_store_eager_result
        new = self.new_execution(
            *call_arguments(self.name, args, kwargs),
            given,
            what=f"payload of {self.name}",
            execution_id=_parse_id(task_id),
            idempotency_key=idempotency_key,
            is_root=True,
        )
        new = headers.collect(new)
        with eager.outside(), dispatch.inline() if self.app.conf.task_always_eager else contextlib.nullcontext():
            execution, created = calls.create(new, caller)
        if not created:
            _check_same(execution, new)
        result: AsyncResult[R] = self.AsyncResult(announcements.celery_id(execution))
        cast(Any, result).execution_id = execution.pk
        cast(Any, result).ignored = self._is_ignored(execution, given)
        if current is not None and given.get("add_to_parent", True) and not isinstance(current, DurableTask):
            current.add_trail(result)
        if self.app.conf.task_always_eager and created:
            return cast("AsyncResult[R]", inline.run_eagerly(execution, self.app))
        return result

    def _is_ignored(self, execution: Execution, options: Mapping[str, Any]) -> bool:
        """Tell whether Celery will not know the result of an execution, since it was called so."""
        if isinstance(self.app.backend, DisabledBackend):
            return bool(options.get("ignore_result", self.ignore_result))
        return bool(execution.get_options().get("ignore_result", True))

    def apply(  # type: ignore[override]
        self, args: Any = None, kwargs: Any = None, *, throw: bool | None = None, **options: Any
    ) -> EagerResult[R]:
        """Store an execution and run its whole tree in this process, without waiting for its due times.

        Nothing of any other tree is run or decided, and what the bodies start with ``.delay()`` is left to the workers.

        Args:
            args: Positional arguments, without the context.
            kwargs: Keyword arguments.
            throw: Whether to raise what fails it; ``CELERY_TASK_EAGER_PROPAGATES`` by default.
            options: ``task_id``, ``link`` and ``link_error`` have the meaning of ``apply_async``; its others no effect.

        Raises:
            InvalidArgumentType: ``apply_async`` knows no such option, or it is ``idempotency_key``.
            BlockingCallInTask: The call stands in a durable body that a worker runs.
        """
        running = current_context.get()
        if running is not None and not (running.task is not None and running.task.request.is_eager):
            raise BlockingCallInTask(
                f"{self.name}.apply(…) inside a durable body would run its whole tree in the body's place and hold the "
                "worker. Use ctx.invoke."
            )
        check_call_options(
            options,
            f"{self.name}.apply()",
            also=("logfile", "loglevel", *OF_A_CHORD),
            hint="It always runs the task; use apply_async.",
        )
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
        with eager.outside(), dispatch.inline():
            # An id that is taken is no reason not to run it: Celery's own `apply` always does.
            execution, _created = calls.create(new, calls.nobody())
        return cast("EagerResult[R]", inline.run_eagerly(execution, self.app, throw))

    def apply_async_on_commit(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Do as ``apply_async`` when the current transaction is committed; its options are checked now.

        Raises:
            InvalidArgumentType: Celery does not know an option.
        """
        check_call_options(kwargs, f"{self.name}.apply_async_on_commit()")
        super().apply_async_on_commit(*args, **kwargs)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult[R]:  # noqa: N802
        """Return the result object of an execution's id."""
        return DurableResult(task_id, app=self.app, task_name=self.name, **kwargs)

    def retry(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse Celery's own retry, which would publish a second message.

        Raises:
            ProgrammingError: Always.
        """
        raise ProgrammingError(f"{self.name} is durable: use `raise ctx.retry(countdown=…)`.")

    def update_state(
        self, task_id: str | None = None, state: str | None = None, meta: Any = None, **kwargs: Any
    ) -> None:
        """Write a state to the result backend; see ``celery.app.task.Task.update_state``.

        That of the body's own execution stays while it waits, instead of ``CONDUCTOR["REPORTED_STATE"]``. What a body
        that runs again from the top says before it has come to where the last run ended is left out.
        """
        started, context = current_run.get(), current_context.get()
        if (
            started is not None
            and context is not None
            and context.execution_id == started.execution.pk
            and (task_id is None or of_task_id(task_id) == started.execution.pk)
        ):
            started.reports_state = True
            if context.is_replaying:
                return
        super().update_state(task_id, state, meta, **kwargs)

    def replace(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse Celery's replacement of a task: its id is the execution's, which goes on.

        Raises:
            ProgrammingError: Always.
        """
        raise ProgrammingError(
            f"{self.name} is durable and cannot be replaced. Use `return ctx.invoke(…)`, one call for each task of a "
            "chain, and ctx.map or ctx.start with ctx.gather for a group."
        )

    def add_to_chord(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse to add to the chord that the task is in.

        Raises:
            ProgrammingError: Always.
        """
        raise ProgrammingError(
            f"{self.name} is durable: add_to_chord would add once for each attempt. Use ctx.start and ctx.gather, or "
            "ctx.map, in a body that takes the place of the chord."
        )

    def map(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse ``map``, as ``starmap`` and ``chunks``: one Celery task would call the body like a function.

        Raises:
            ProgrammingError: Always.
        """
        raise self._no_loop("map")

    def starmap(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse it; see ``map``.

        Raises:
            ProgrammingError: Always.
        """
        raise self._no_loop("starmap")

    def chunks(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse it; see ``map``.

        Raises:
            ProgrammingError: Always.
        """
        raise self._no_loop("chunks")

    def _no_loop(self, name: str) -> ProgrammingError:
        return ProgrammingError(
            f"{self.name}.{name}() would call a durable task like a function, in one run of another task. Use ctx.map "
            "in a durable task, with max_parallel= if not all are to run at once, or celery.group elsewhere."
        )

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
            QueueNotFound: ``task_create_missing_queues`` is off, and there is no such queue.
        """
        self._check_signature(args, kwargs, what)
        payload = self.stored_payload(args, kwargs)
        if idempotency_key is not None:
            check_key(idempotency_key, "idempotency_key")
        given = {name: value for name, value in options.items() if value is not None}
        # The decorator's own queue, priority, time limits: of a child as well as of a root.
        exec_options: Mapping[str, Any] = {**cast(Any, self)._get_exec_options(), **self.routing}
        own = {name: value for name, value in exec_options.items() if value is not None}
        options = routed(self, {**own, **given}, args, kwargs)
        countdown, eta = due_time(options)
        return transitions.NewExecution(
            id=execution_id or new_root_id(),
            task=self.name,
            queue=options["queue"],
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
        args, kwargs = dump_models(inspect.unwrap(self.run), args, kwargs)
        return dump_call(args, kwargs, conductor_settings().MAX_PAYLOAD_BYTES)

    def body_arguments(self, args: list[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Mapping[str, Any]]:
        """Return stored arguments as the body takes them, with pydantic models where it is annotated so.

        Raises:
            PayloadMismatch: A model does not take what is stored.
        """
        if self.has_validation:
            return args, kwargs
        try:
            return load_models(inspect.unwrap(self.run), args, kwargs)
        except ValueError as error:
            raise PayloadMismatch(f"The stored payload does not fit {self.name}: {error}") from error

    def misfit(self, args: list[Any], kwargs: Mapping[str, Any]) -> str:
        """Return how arguments do not fit the body as this process knows it; an empty text if they do.

        With ``typing=False`` nobody looks before the body is called.
        """
        if not self.typing:
            return ""
        fn = inspect.unwrap(self.run)
        find = _misfit if len(kwargs) <= _MOST_NAMES else _misfit.__wrapped__
        misfit = find(fn, len(args), tuple(kwargs))
        if not misfit and not self.has_validation:
            misfit = misfit_of_models(fn, args, kwargs)
        return f"{self.name}{body_signature(self.run)}: {misfit}" if misfit else ""

    def _check_signature(self, args: list[Any], kwargs: Mapping[str, Any], what: str) -> None:
        if misfit := self.misfit(args, kwargs):
            raise InvalidArgumentType(f"{what} does not fit {misfit}")

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

    def identify(self, request: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> uuid.UUID:
        """Return the id of the execution that a delivery is about; for whoever claims it.

        Raises:
            Exception: The message becomes no execution.
        """
        try:
            return self._adopt(request, args, kwargs)
        except AbandonRun as error:
            # A message that somebody else published is acknowledged, and not stored: Celery has to record the failure.
            raise OperationalError(str(error)) from error

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
        executions = Execution.objects.using(database())
        known = transitions.patiently(executions.filter(pk=execution_id).first)
        if known is not None:
            execution_id = calls.adopted_id(known, self.name, request.parent_id)
            if execution_id == known.pk or transitions.patiently(executions.filter(pk=execution_id).exists):
                # Whatever else the message says: did its arguments not fit, Celery would record that this one failed.
                return execution_id
        delivery = request.delivery_info or {}
        time_limit, soft_time_limit = (*(request.timelimit or ()), None, None)[:2]
        try:
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
                    "headers": headers.added(request.headers) or None,
                    "stamped_headers": request.stamped_headers,
                },
                what=f"payload of {self.name}",
                execution_id=execution_id,
                is_root=True,
            )
        except ProgrammingError:
            if known is None:
                raise
            return known.pk
        transitions.patiently(lambda: transitions.create(new))
        return execution_id


def body_signature(fn: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a durable body without its context."""
    signature = _signature(inspect.unwrap(fn))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@functools.lru_cache(maxsize=4_096)
def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(fn)


#: Of a call with more keyword arguments it is not remembered whether they fit.
_MOST_NAMES = 32


@functools.lru_cache(maxsize=4_096)
def _misfit(fn: Callable[..., Any], positional: int, names: tuple[str, ...]) -> str:
    """Return how so many arguments, and arguments of these names, do not fit a body; each run asks."""
    try:
        _signature(fn).bind(None, *[None] * positional, **dict.fromkeys(names))
    except TypeError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------- the decorator


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
            seconds), ``around=None``, any other option of ``@shared_task``, and attributes that the class given as
            ``base`` declares. ``around`` is a function that gets the context and the body's arguments and returns a
            context manager; each run of the body is inside of it, and inside of that of ``CONDUCTOR["AROUND_BODY"]``.

    Raises:
        TypeError: The function cannot be a durable body, or ``around`` not be called; an option without effect.
        ValueError: A retry option has an impossible value, or ``soft_time_limit`` exceeds ``time_limit``.
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

"""``DurableTask``: a Celery task whose runs are executions in the database."""

from __future__ import annotations

import contextlib
import datetime as dt
import inspect
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar, Unpack, cast

from celery.app.task import Context
from celery.backends.base import DisabledBackend
from celery.result import EagerResult

from conductor_app import transitions
from conductor_app.body import headers
from conductor_app.body.misuse import hint_at_repeated_call
from conductor_app.body.names import check_key
from conductor_app.body.run import current_context
from conductor_app.conf import conductor_settings
from conductor_app.engine import announcements, calls, executor
from conductor_app.engine.run import current_run
from conductor_app.exceptions import (
    BlockingCallInTask,
    ChildError,
    InvalidArgumentType,
    PayloadMismatch,
    WorkerLost,
)
from conductor_app.host import inline
from conductor_app.models import Execution
from conductor_app.states import OnConflict
from conductor_app.store import eager
from conductor_app.store.event_loops import check_none_runs
from conductor_app.store.ids import new_root_id, of_task_id
from conductor_app.tasks import adoption
from conductor_app.tasks.calling import CallingTask
from conductor_app.tasks.identity import check_same, parse_id
from conductor_app.tasks.kept_options import kept_options
from conductor_app.tasks.result import DurableResult
from conductor_app.tasks.signatures import body_signature, misfit_of_call
from conductor_app.transitions import dispatch
from conductor_app.values.arguments import call_arguments, check_priority, due_time, expiry, routed
from conductor_app.values.limits import Limit, keys_of
from conductor_app.values.options import OF_A_CHORD, OF_A_ROOT, CallOptions, check_call_options, check_callbacks
from conductor_app.values.payloads import dump_call, dump_options, loads
from conductor_app.values.retention import Retention
from conductor_app.values.retries import RetryPolicy
from conductor_app.values.schedules import Plan
from conductor_app.values.tags import TagSource, tags_of_call
from conductor_app.values.uniqueness import OPTIONS as UNIQUE_OPTIONS
from conductor_app.values.uniqueness import UniqueSource, unique_of_call
from conductor_app.values.validated import dump_models, load_models
from conductor_app.values.validated import misfit as misfit_of_models

P = ParamSpec("P")
R = TypeVar("R")


class DurableTask(CallingTask[P, R]):
    """The Celery task behind ``@durable_task``; its ``run`` is the decorated function."""

    abstract = True
    #: What the worker wraps around each delivery.
    Request = "conductor_app.host.request:DurableRequest"
    #: What the worker does with each message.
    Strategy = "conductor_app.host.request:strategy"

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
    #: The decorator's ``limits``, in the order of their names.
    limits: ClassVar[tuple[Limit, ...]] = ()
    #: The decorator's ``tags``.
    tag_source: ClassVar[TagSource | None] = None
    #: The decorator's ``unique``: what the unique key of an execution is.
    unique_source: ClassVar[UniqueSource | None] = None
    on_conflict: ClassVar[OnConflict] = OnConflict.RETURN
    #: When it is started by itself, as the decorator says; ``None``: never.
    plan: ClassVar[Plan | None] = None
    #: The decorator's ``max_duration``: after so many seconds a tree of which it is the root is cancelled.
    max_duration: ClassVar[float | None] = None
    #: How long trees of it are kept, as the decorator says.
    retention: ClassVar[Retention] = Retention()
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
        unique_key: str | None = None,
        on_conflict: Literal["return", "refuse", "replace"] | None = None,
        debounce: float | dt.timedelta | None = None,
        debounce_max: float | dt.timedelta | None = None,
        deadline: float | dt.timedelta | dt.datetime | str | None = None,
        **options: Unpack[CallOptions],
    ) -> DurableResult[R]:
        """Store an execution in the current transaction, and publish its message when that is committed.

        Takes the options of ``celery.app.task.Task.apply_async`` and no others. ``countdown`` and ``eta`` become the
        due time, ``expires`` a deadline for starting; options about the producer and about publishing again have no
        effect, since the row is the outbox.

        Args:
            idempotency_key: A second call with the same key returns the existing execution, for ever.
            unique_key: Of one open execution of the task at most; instead of the decorator's ``unique``.
            on_conflict: If an open one has it: ``"return"`` returns that, ``"refuse"`` raises, ``"replace"`` cancels it
                and stores one that begins when it has ended. By default what the decorator says.
            debounce: Seconds, or a ``timedelta``. A call gives an execution that has not begun its own payload, and
                lets it begin so much later; if there is none, it is stored, to begin so much later, and not before one
                that has begun has ended.
            debounce_max: Seconds after the first of these calls at which it begins at the latest.
            deadline: Seconds, a ``timedelta`` or an instant, as ``expires``: when the whole tree is cancelled, if it
                has not ended. The earlier one of this and the decorator's ``max_duration`` counts.

        Returns:
            The result; ``is_new`` says whether this call has stored the execution.

        Raises:
            DuplicateExecution: An open execution has the unique key.
            NotSerializable, PayloadTooLarge, TooManyTags, InvalidArgument, InvalidArgumentType: Nothing is stored. An
                option that Celery does not know is an ``InvalidArgumentType``.
            QueueNotFound: ``task_create_missing_queues`` is off, and there is no such queue.
            IdempotencyConflict: The key belongs to an execution with other arguments.
            BlockingCallInEventLoop: An event loop runs here; use ``aapply_async`` or ``adelay``.
        """
        del producer
        check_none_runs(f"{self.name}.apply_async()", f"`await {self.name}.aapply_async(…)`, or `adelay`")
        check_call_options(options, f"{self.name}.apply_async()")
        given: dict[str, Any] = {**options, "link": link, "link_error": link_error, "shadow": shadow}
        given |= {
            "unique_key": unique_key,
            "on_conflict": on_conflict,
            "debounce": debounce,
            "debounce_max": debounce_max,
            "deadline": deadline,
        }
        if any(given.get(name) for name in ("link", "link_error", "chain", "chord")):
            check_callbacks(given, self.app, lambda task: isinstance(task, DurableTask))
        current = self.app.current_worker_task
        caller = calls.caller_of(given, task_id, current)
        if idempotency_key is None and (task_id is None or caller is not None):
            hint_at_repeated_call(self.name)
        self._add_callers(given)
        given.update(calls.kept(caller, given))
        new = self.new_execution(
            *call_arguments(self.name, args, kwargs),
            given,
            what=f"payload of {self.name}",
            execution_id=parse_id(task_id),
            idempotency_key=idempotency_key,
            is_root=True,
        )
        new = headers.collect(new)
        with self._creating():
            execution, created = calls.create(new, caller)
        if not created:
            check_same(execution, new)
        result = self._result_of(execution, given, is_new=created)
        if current is not None and given.get("add_to_parent", True) and not isinstance(current, DurableTask):
            current.add_trail(result)
        if self.app.conf.task_always_eager and created:
            ran: Any = inline.run_eagerly(execution, self.app)
            ran.is_new = True
            return cast("DurableResult[R]", ran)
        return result

    def _add_callers(self, options: dict[str, Any]) -> None:
        """Add to a call's options what follows from where it stands."""
        current = self.app.current_worker_task
        if current is not None:
            options.setdefault("root_id", current.request.root_id or current.request.id)
            options.setdefault("parent_id", current.request.id)
        if self.app.conf.task_always_eager:
            options["ignore_result"] = not self.app.conf.task_store_eager_result

    @contextlib.contextmanager
    def _creating(self) -> Iterator[None]:
        """Store executions as somebody outside of the tree that runs here; in eager mode, publish nothing."""
        with eager.outside(), dispatch.inline() if self.app.conf.task_always_eager else contextlib.nullcontext():
            yield

    def _result_of(self, execution: Execution, options: Mapping[str, Any], *, is_new: bool) -> DurableResult[R]:
        result = self.AsyncResult(announcements.celery_id(execution))
        result.execution_id = execution.pk
        result.is_new = is_new
        cast(Any, result).ignored = self._is_ignored(execution, options)
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
            options: ``task_id``, ``link``, ``link_error`` and ``tags`` have the meaning of ``apply_async``; its
                others no effect.

        Raises:
            InvalidArgumentType: ``apply_async`` knows no such option, or it is a key.
            DuplicateExecution: An open execution has the unique key that the decorator gives it, whatever that says of
                conflicts.
            BlockingCallInTask: The call stands in a durable body that a worker runs.
        """
        check_none_runs(f"{self.name}.apply()", f"`await sync_to_async({self.name}.apply)(…)`")
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
            hints=dict.fromkeys(OF_A_ROOT, "It always runs the task; use apply_async."),
        )
        kept = {key: value for key, value in options.items() if key in ("task_id", "link", "link_error", "tags")}
        kept["ignore_result"] = not self.app.conf.task_store_eager_result
        if self.unique_source is not None:
            # It runs here and now: another one's result is none, and there is no waiting for another one's end.
            kept["on_conflict"] = OnConflict.REFUSE
        task_id = kept.pop("task_id", None)
        new = self.new_execution(
            *call_arguments(self.name, args, kwargs),
            kept,
            what=f"payload of {self.name}",
            execution_id=parse_id(task_id),
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

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> DurableResult[R]:
        """Do as ``apply_async`` without options."""
        return self.apply_async(args, kwargs)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> DurableResult[R]:  # noqa: N802
        """Return the result object of an execution's id."""
        return DurableResult(task_id, app=self.app, task_name=self.name, **kwargs)

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

    # ------------------------------------------------------------------------------------------------ new executions

    def new_execution(
        self,
        args: list[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        what: str,
        path: str = "payload",
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
            path: How it is called in an error that names a part of it.
            execution_id: ``None`` makes a new one.
            idempotency_key: Unique per task.
            is_root: Whether its result is Celery's business too, and its tree may have a deadline.

        Raises:
            NotSerializable, PayloadTooLarge, InvalidArgument, InvalidArgumentType: Nothing is stored.
            QueueNotFound: ``task_create_missing_queues`` is off, and there is no such queue.
        """
        self._check_signature(args, kwargs, what)
        payload = self.stored_payload(args, kwargs, path)
        if idempotency_key is not None:
            check_key(idempotency_key, "idempotency_key")
        given = {name: value for name, value in options.items() if value is not None}
        unique = unique_of_call(
            given,
            args,
            kwargs,
            task=self.name,
            fn=inspect.unwrap(self.run),
            source=self.unique_source,
            on_conflict=self.on_conflict,
            is_child=not is_root,
            idempotency_key=idempotency_key,
        )
        given = {name: value for name, value in given.items() if name not in UNIQUE_OPTIONS}
        # The decorator's own queue, priority, time limits: of a child as well as of a root.
        exec_options: Mapping[str, Any] = {**cast(Any, self)._get_exec_options(), **self.routing}
        own = {name: value for name, value in exec_options.items() if value is not None}
        options = routed(self, {**own, **given}, args, kwargs)
        countdown, eta = due_time(options)
        if unique is not None and unique.debounce is not None:
            countdown = unique.debounce
        kept = kept_options(self, options, is_root=is_root)
        if unique is not None:
            kept["unique"] = unique.key  # for an operator's retry, which takes it again
        max_duration = self.max_duration if is_root else None
        if max_duration is not None:
            kept["max_duration"] = max_duration  # for an operator's retry, which begins it again
        return transitions.NewExecution(
            id=execution_id or new_root_id(),
            task=self.name,
            queue=options["queue"],
            payload=payload,
            max_attempts=self.retry_policy.max_attempts,
            priority=check_priority(options.get("priority")),
            options=dump_options(kept),
            countdown=countdown,
            eta=eta,
            expires=expiry(options.get("expires")),
            deadline=expiry(options.get("deadline"), "deadline"),
            max_duration=max_duration,
            idempotency_key=idempotency_key,
            unique=unique,
            tags=tags_of_call(self.tag_source, given.get("tags"), args, kwargs),
            # By what is stored, as it is when it is claimed.
            limits=self.limit_keys(*loads(payload)) if self.limits else (),
        )

    def limit_keys(self, args: list[Any], kwargs: Mapping[str, Any]) -> list[tuple[Limit, str]]:
        """Return the task's limits with the keys of a call.

        Args:
            args: Positional arguments as they are stored, without the context.
            kwargs: Keyword arguments.

        Raises:
            InvalidArgument, InvalidArgumentType: One cannot be a key.
        """
        return keys_of(self.limits, inspect.unwrap(self.run), args, kwargs)

    def stored_payload(self, args: list[Any], kwargs: Mapping[str, Any], what: str = "payload") -> str:
        """Return the arguments as they are stored.

        Args:
            args: Positional arguments, without the context.
            kwargs: Keyword arguments.
            what: How they are called in an error.

        Raises:
            NotSerializable, PayloadTooLarge: They cannot be.
        """
        args, kwargs = dump_models(inspect.unwrap(self.run), args, kwargs)
        return dump_call(args, kwargs, conductor_settings().MAX_PAYLOAD_BYTES, what)

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
        misfit = misfit_of_call(fn, args, kwargs)
        if not misfit and not self.has_validation:
            misfit = misfit_of_models(fn, args, kwargs)
        return f"{self.name}{body_signature(self.run)}: {misfit}" if misfit else ""

    def _check_signature(self, args: list[Any], kwargs: Mapping[str, Any], what: str) -> None:
        if misfit := self.misfit(args, kwargs):
            raise InvalidArgumentType(f"{what} does not fit {misfit}")

    # ---------------------------------------------------------------------------------- messages published by others

    def identify(self, request: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> uuid.UUID:
        """Return the id of the execution that a delivery is about; for whoever claims it.

        Raises:
            Exception: The message becomes no execution.
        """
        return adoption.identify(self, request, args, kwargs)

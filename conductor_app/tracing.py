"""OpenTelemetry traces; needs the extra ``otel``, and an SDK that the project sets up as for anything else.

A tree of executions is one trace, over all suspensions, retries and workers: each execution keeps the trace context of
the call that made it, among its headers, in the form that the project's propagator gives it (W3C ``traceparent`` by
default). Each run is a span below it, and what the run calls is made in that span's context.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from django.db import DatabaseError, InterfaceError

from conductor_app import signals, transitions
from conductor_app.engine import hand_off
from conductor_app.engine.run import RunEnded
from conductor_app.exceptions import Failure
from conductor_app.models import Execution
from conductor_app.store import observing, owners

try:
    from opentelemetry import context, propagate, trace
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TracerProvider
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'Tracing by conductor_app needs the package opentelemetry-api: pip install "conductor-app[otel]"',
        name=error.name,
    ) from error


class _Run:
    """A run whose span is open."""

    def __init__(self, execution: Execution, span: Span) -> None:
        self.execution_id = execution.pk
        self.span = span
        self.outcome = ""

    def end(self, outcome: str) -> None:
        self.outcome = outcome
        self.span.set_attribute("conductor.outcome", outcome)

    def fail(self, failure: Failure) -> None:
        self.span.add_event(
            "exception",
            {
                "exception.type": failure.type,
                "exception.message": failure.message,
                "exception.stacktrace": failure.traceback,
            },
        )
        self.span.set_status(Status(StatusCode.ERROR, failure.message))


#: The last run of each delivery, if it has ended a child. What the process goes on with then is what that end woke.
_woken: WeakKeyDictionary[hand_off.Delivery, tuple[uuid.UUID, SpanContext]] = WeakKeyDictionary()

_current: ContextVar[_Run | None] = ContextVar("conductor_app_traced_run", default=None)


class Tracing:
    """The spans of this process.

    Args:
        tracer_provider: Where they go; the project's global one by default, whenever that is set.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("conductor_app", tracer_provider=tracer_provider)
        self._receivers = (
            (signals.execution_suspended, self._on_suspended),
            (signals.execution_retrying, self._on_retrying),
            (signals.execution_finished, self._on_finished),
        )

    def connect(self) -> None:
        """Begin to trace."""
        observing.add_carrier(self._carry)
        observing.running.add(self._run)
        observing.stepping.add(self._step)
        observing.tagging.add(self._tag)
        observing.acting_for.add(self._act)
        for signal, receiver in self._receivers:
            signal.connect(receiver)

    def disconnect(self) -> None:
        """Trace no more."""
        observing.remove_carrier(self._carry)
        observing.running.remove(self._run)
        observing.stepping.remove(self._step)
        observing.tagging.remove(self._tag)
        observing.acting_for.remove(self._act)
        for signal, receiver in self._receivers:
            signal.disconnect(receiver)

    def _carry(self, task: str, headers: dict[str, Any]) -> None:
        """Keep the trace context of the caller with a new execution."""
        if any(headers.get(field) for field in propagate.get_global_textmap().fields):
            return  # the caller chose another
        if trace.get_current_span().get_span_context().is_valid:
            propagate.inject(headers)
            return
        # Nothing is being traced, and each run would begin a trace of its own.
        span = self._tracer.start_span(f"create {task}", kind=SpanKind.PRODUCER, attributes={"conductor.task": task})
        propagate.inject(headers, trace.set_span_in_context(span))
        span.end()

    @contextmanager
    def _run(self, execution: Execution) -> Iterator[None]:
        parent, links = _parent(execution)
        links += _woken_by(execution)
        with (
            _attached(parent),
            self._tracer.start_as_current_span(
                f"run {execution.task}",
                kind=SpanKind.CONSUMER,
                attributes={**_attributes(execution), **_tag_attributes(_tags_of_tree(execution))},
                links=links,
                record_exception=False,
                set_status_on_exception=False,
            ) as span,
        ):
            run = _Run(execution, span)
            token = _current.set(run)
            try:
                yield
            except RunEnded as ended:
                run.end(run.outcome or ended.what)
                raise
            except BaseException as error:
                if not run.outcome:
                    # Its end was not announced: the process ends, or the database never answered.
                    run.end("failed" if isinstance(error, Exception) else "abandoned")
                    span.record_exception(error)
                    span.set_status(Status(StatusCode.ERROR, str(error)))
                raise
            finally:
                _current.reset(token)

    @contextmanager
    def _step(self, execution: Execution, step: str) -> Iterator[None]:
        attributes = {**_ids(execution), "conductor.step": step}
        with self._tracer.start_as_current_span(f"step {step}", attributes=attributes):
            yield

    @contextmanager
    def _tag(self, execution: Execution, tags: Mapping[str, str]) -> Iterator[None]:
        yield
        if run := _run_of(execution):
            run.span.set_attributes(_tag_attributes(tags))

    @contextmanager
    def _act(self, execution: Execution) -> Iterator[None]:
        with _attached(_kept(execution, context.get_current())):
            yield

    def _on_suspended(self, execution: Execution, step: str, **_kwargs: Any) -> None:
        if run := _run_of(execution):
            run.span.add_event("suspended", {"conductor.step": step})
            run.end("suspended")

    def _on_retrying(self, execution: Execution, failure: Failure, delay: float, **_kwargs: Any) -> None:
        if run := _run_of(execution):
            run.fail(failure)
            run.span.add_event("retrying", {"conductor.delay_seconds": delay})
            run.end("retrying")

    def _on_finished(self, execution: Execution, status: str, failure: Failure | None = None, **_kwargs: Any) -> None:
        if run := _run_of(execution):
            if failure is not None:
                run.fail(failure)
            run.end(str(status))
            delivery = hand_off.delivery_of(execution.pk)
            if delivery is not None and execution.parent_id is not None:
                _woken[delivery] = (execution.parent_id, run.span.get_span_context())


def install(tracer_provider: TracerProvider | None = None) -> Tracing:
    """Trace in this process from now on; what ``CONDUCTOR["TRACING"] = True`` does in each."""
    tracing = Tracing(tracer_provider)
    tracing.connect()
    return tracing


def _run_of(execution: Execution) -> _Run | None:
    """Return the run of this context, if the news is about its own execution."""
    run = _current.get()
    return run if run is not None and run.execution_id == execution.pk else None


def _woken_by(execution: Execution) -> list[Link]:
    """Return the link of a run that resumes to the child's run that has just woken it in this process.

    Which run wakes an execution in another process is not stored.
    """
    delivery = hand_off.delivery_of(execution.pk)
    if delivery is None or (ended := _woken.pop(delivery, None)) is None:
        return []
    woken, by = ended
    return [Link(by, {"conductor.link": "woken by"})] if woken == execution.pk else []


@contextmanager
def _attached(current: context.Context) -> Iterator[None]:
    """Make a trace context current, its baggage included."""
    token = context.attach(current)
    try:
        yield
    finally:
        context.detach(token)


def _kept(execution: Execution, base: context.Context) -> context.Context:
    """Return ``base`` with the trace context that an execution keeps."""
    return propagate.extract(execution.get_options().get("headers") or {}, base)


def _parent(execution: Execution) -> tuple[context.Context, list[Link]]:
    """Return what the span of a run stands below, and what it is linked to.

    That is what the execution keeps. If Celery's own instrumentation has begun a span for the message, in the same
    trace, it is that one; and if it did so in another trace, the two are linked.
    """
    here = context.get_current()
    kept = _kept(execution, here)
    span = trace.get_current_span(here)
    origin = trace.get_current_span(_kept(execution, context.Context())).get_span_context()
    current = span.get_span_context()
    if not current.is_valid:
        return kept, []
    if not origin.is_valid:
        return here, []
    if current.trace_id != origin.trace_id:
        return kept, [Link(current)]
    is_of_message = getattr(span, "kind", None) is SpanKind.CONSUMER and _current.get() is None
    return (here if is_of_message else kept), []


def _ids(execution: Execution) -> dict[str, Any]:
    return {
        "conductor.execution_id": str(execution.pk),
        "conductor.root_id": str(execution.root_id),
        "conductor.task": execution.task,
    }


def _attributes(execution: Execution) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        **_ids(execution),
        "conductor.attempt": execution.attempt,
        #: How often it has been claimed; 1 is the first run.
        "conductor.run": execution.fence,
        "conductor.worker": owners.shown(execution.lease_owner),
        "messaging.system": "celery",
        "messaging.destination.name": execution.queue,
        "messaging.message.id": str(execution.pk),
    }
    if execution.run_started_at is not None and execution.due_at is not None:
        queued = (execution.run_started_at - execution.due_at).total_seconds()
        attributes["conductor.queue_seconds"] = max(queued, 0.0)
    if execution.parent_id is not None:
        attributes["conductor.parent_id"] = str(execution.parent_id)
        attributes["conductor.step"] = execution.step
    return attributes


def _tags_of_tree(execution: Execution) -> Mapping[str, str]:
    """Return the tags of an execution's tree; none while the database is away, for which no run is to wait."""
    try:
        return transitions.tags_of(execution.root_id)
    except (DatabaseError, InterfaceError):
        return {}


def _tag_attributes(tags: Mapping[str, str]) -> dict[str, str]:
    return {f"conductor.tag.{key}": value for key, value in tags.items()}

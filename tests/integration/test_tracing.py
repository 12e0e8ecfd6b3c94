"""OpenTelemetry: one trace for a tree of executions, one span for each run and each step that ran."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from celery import current_app, shared_task
from django.db import OperationalError
from opentelemetry import baggage, context, trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from conductor_app import ChildFailed, ExecutionContext, api, signals, tracing, transitions
from conductor_app.engine import announcements, sweeper
from conductor_app.host import inline
from conductor_app.models import Execution
from conductor_app.store import clock, observing
from conductor_app.store.process import process
from conductor_app.tracing import Tracing
from conductor_app.transitions import dispatch
from tests.integration import test_hand_off
from tests.support.bodies import advance, durable, go_on, reload, start
from tests.support.broker import purge
from tests.support.deliveries import deliver, doorbell, stranger, take
from tests.support.executions import OWNER, claimed, committing
from tests.support.process import NotingBroker

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    purge(set())  # what other tests have published
    with committing(django_db_blocker):
        yield
        clock.reset()


class Spans:
    """What was traced, by a tracer provider of its own."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._exporter = InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("tests")

    def all(self) -> list[ReadableSpan]:
        """Those that have ended, in the order of their beginnings."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def names(self) -> list[str]:
        return [span.name for span in self.all()]

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def spans() -> Iterator[Spans]:
    found = Spans(TracerProvider(shutdown_on_exit=False))
    tracing = Tracing(found.provider)
    tracing.connect()
    yield found
    tracing.disconnect()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """Return what a span tells of an execution, without what differs from run to run."""
    found = {
        name.removeprefix("conductor."): value
        for name, value in (span.attributes or {}).items()
        if name.startswith("conductor.")
    }
    return {name: value for name, value in found.items() if name not in ("worker", "queue_seconds")}


def trace_id(span: ReadableSpan) -> int:
    return span.context.trace_id


def is_below(span: ReadableSpan, parent: ReadableSpan) -> bool:
    return span.parent is not None and span.parent.span_id == parent.context.span_id


@shared_task
def plain_double(x: int) -> int:
    return 2 * x


@shared_task
def plain_failure() -> None:
    raise ValueError("card declined")


@durable
def grandchild(ctx: ExecutionContext) -> int:
    return 1


@durable
def child(ctx: ExecutionContext) -> int:
    return ctx.invoke("below", grandchild) + 1


@durable
def parent(ctx: ExecutionContext) -> int:
    ctx.step("first", int)
    ctx.sleep("nap", 60)
    return ctx.invoke("child", child) + 1


@durable(max_retries=0)
def fails(ctx: ExecutionContext) -> None:
    raise ValueError("card declined")


# ------------------------------------------------------------------------------------------------------------ one trace


def test_all_runs_of_a_tree_are_one_trace_below_the_callers_span(spans: Spans) -> None:
    with spans.tracer.start_as_current_span("request"):
        root = parent.delay()
    go_on()
    advance(61)
    assert reload(root).get_result() == 3
    request, runs = spans.one("request"), spans.named(f"run {parent.name}")
    assert {trace_id(span) for span in spans.all()} == {trace_id(request)}
    assert spans.names() == [
        "request",
        *(f"run {parent.name}", "step first", f"run {parent.name}"),
        *(f"run {child.name}", f"run {grandchild.name}", f"run {child.name}", f"run {parent.name}"),
    ]
    assert [is_below(run, request) for run in runs] == [True] * 3
    assert is_below(spans.one("step first"), runs[0])
    # A child hangs below the run that made it.
    assert [is_below(run, runs[1]) for run in spans.named(f"run {child.name}")] == [True, True]
    assert is_below(spans.one(f"run {grandchild.name}"), spans.named(f"run {child.name}")[0])


def test_without_a_span_of_the_callers_the_call_is_the_top_of_the_trace(spans: Spans) -> None:
    start(child)
    top = spans.one(f"create {child.name}")
    assert (top.kind, top.parent) == (SpanKind.PRODUCER, None)
    assert {trace_id(span) for span in spans.all()} == {trace_id(top)}
    assert len(spans.all()) == 4


def test_a_trace_context_that_the_caller_passes_as_a_header_counts(spans: Spans) -> None:
    with spans.tracer.start_as_current_span("elsewhere"):
        grandchild.apply_async(headers={"traceparent": TRACEPARENT})
    go_on()
    run = spans.one(f"run {grandchild.name}")
    assert f"{trace_id(run):032x}-{run.parent.span_id:016x}" in TRACEPARENT


def test_a_message_of_somebody_elses_keeps_its_trace(spans: Spans) -> None:
    stranger().send_task(grandchild.name, headers={"traceparent": TRACEPARENT})
    deliver(take())
    assert f"{trace_id(spans.one(f'run {grandchild.name}')):032x}" in TRACEPARENT


def test_baggage_goes_along(spans: Spans) -> None:
    seen = []

    @durable
    def looks(ctx: ExecutionContext) -> None:
        seen.append(baggage.get_baggage("customer"))

    @durable
    def passes(ctx: ExecutionContext) -> None:
        ctx.invoke("looks", looks)

    token = context.attach(baggage.set_baggage("customer", "7"))
    passes.delay()
    context.detach(token)
    go_on()
    assert seen == ["7"]


def test_a_run_that_resumes_by_hand_off_has_a_link_to_the_run_that_woke_it(spans: Spans) -> None:
    process.broker = NotingBroker()
    process.worker.gate = test_hand_off.OpenGate()

    @durable
    def has(ctx: ExecutionContext, value: int) -> int:
        return value

    @durable
    def invokes(ctx: ExecutionContext) -> list[int]:
        one = ctx.invoke("one", has, {"value": 1})
        try:
            ctx.invoke("fails", fails)
        except ChildFailed:
            return [one, *ctx.map("more", has, [{"value": 2}])]
        return []

    test_hand_off.traced(has, invokes, fails)
    root = invokes.delay()
    test_hand_off.deliver(root)
    first, second, third, *_ = spans.named(f"run {invokes.name}")
    assert linked_to(first) == []
    assert linked_to(second) == [spans.named(f"run {has.name}")[0].context.span_id]
    assert linked_to(third) == [spans.one(f"run {fails.name}").context.span_id]
    assert dict(second.links[0].attributes or {}) == {"conductor.link": "woken by"}
    assert all(linked_to(span) == [] for span in spans.named(f"run {has.name}"))


def test_a_run_that_a_message_resumes_has_no_link(spans: Spans) -> None:
    start(child)
    assert [linked_to(span) for span in spans.named(f"run {child.name}")] == [[], []]


def linked_to(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def test_a_sampler_that_drops_the_callers_trace_drops_the_whole_tree() -> None:
    found = Spans(TracerProvider(shutdown_on_exit=False))
    silent = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False).get_tracer("tests")
    tracing = Tracing(found.provider)
    tracing.connect()
    try:
        with silent.start_as_current_span("request"):
            child.delay()
        go_on()
        assert found.all() == []
    finally:
        tracing.disconnect()


# ---------------------------------------------------------------------------------------------------------------- spans


def test_a_span_tells_which_run_it_is(spans: Spans) -> None:
    root = start(child)
    below = Execution.objects.get(parent=root)
    first, last = spans.named(f"run {child.name}")
    of_root = {"execution_id": str(root.pk), "root_id": str(root.pk), "task": child.name, "attempt": 1}
    assert attributes(first) == {**of_root, "run": 1, "outcome": "suspended"}
    assert attributes(last) == {**of_root, "run": 2, "outcome": "succeeded"}
    assert first.kind is SpanKind.CONSUMER
    assert attributes(spans.one(f"run {grandchild.name}")) == {
        "execution_id": str(below.pk),
        "root_id": str(root.pk),
        "parent_id": str(root.pk),
        "task": grandchild.name,
        "attempt": 1,
        "run": 1,
        "step": "below",
        "outcome": "succeeded",
    }


def test_a_span_tells_the_worker_and_the_time_in_the_queue(spans: Spans) -> None:
    result = grandchild.apply_async()
    clock.shift(dt.timedelta(seconds=40))
    go_on()
    assert reload(result).status == "succeeded"
    found = dict(spans.one(f"run {grandchild.name}").attributes or {})
    assert str(found["conductor.worker"]).startswith("inline/")
    assert 40 <= float(str(found["conductor.queue_seconds"])) < 100


def test_a_suspension_is_an_event_and_no_error(spans: Spans) -> None:
    start(child)
    first = spans.named(f"run {child.name}")[0]
    assert [(event.name, dict(event.attributes or {})) for event in first.events] == [
        ("suspended", {"conductor.step": "below"})
    ]
    assert first.status.status_code is StatusCode.UNSET


def test_a_step_is_a_span_when_it_runs_and_not_when_it_is_remembered(spans: Spans) -> None:
    @durable
    def steps(ctx: ExecutionContext) -> None:
        ctx.step("one", int)
        ctx.atomic_step("two", int)
        ctx.sleep("nap", 5)
        ctx.step("three", int)

    start(steps)
    advance(6)
    assert [name for name in spans.names() if name.startswith("step ")] == ["step one", "step two", "step three"]
    assert attributes(spans.one("step two"))["step"] == "two"


def test_a_failure_is_recorded_with_its_traceback(spans: Spans) -> None:
    start(fails)
    run = spans.one(f"run {fails.name}")
    assert (run.status.status_code, run.status.description) == (StatusCode.ERROR, "card declined")
    (event,) = run.events
    assert event.attributes is not None
    assert (event.name, event.attributes["exception.type"]) == ("exception", "builtins.ValueError")
    assert 'raise ValueError("card declined")' in str(event.attributes["exception.stacktrace"])
    assert attributes(run)["outcome"] == "failed"


def test_a_failed_attempt_is_an_error_and_the_next_one_is_not(spans: Spans) -> None:
    @durable(max_retries=1, retry_jitter=False, retry_backoff=2)
    def flaky(ctx: ExecutionContext) -> None:
        if ctx.attempt == 1:
            ctx.step("breaks", lambda: 1 // 0)

    start(flaky)
    advance(5)
    first, second = spans.named(f"run {flaky.name}")
    assert [event.name for event in first.events] == ["exception", "retrying"]
    assert (attributes(first)["outcome"], first.status.status_code) == ("retrying", StatusCode.ERROR)
    assert (attributes(second)["outcome"], attributes(second)["attempt"]) == ("succeeded", 2)
    assert second.status.status_code is StatusCode.UNSET
    assert spans.one("step breaks").status.status_code is StatusCode.ERROR


def test_a_cancelled_run_is_no_error(spans: Spans) -> None:
    @durable
    def gives_way(ctx: ExecutionContext) -> None:
        api.cancel(ctx.execution_id)
        ctx.step("late", int)

    root = start(gives_way)
    assert root.status == "cancelled"
    run = spans.one(f"run {gives_way.name}")
    assert (attributes(run)["outcome"], run.status.status_code) == ("cancelled", StatusCode.UNSET)


def test_plain_children_are_spans_too(spans: Spans) -> None:
    @durable(max_retries=0)
    def calls_plain(ctx: ExecutionContext) -> Any:
        ctx.invoke("double", plain_double, {"x": 2})
        return ctx.invoke("failure", plain_failure)

    start(calls_plain)
    double, failed = spans.one(f"run {plain_double.name}"), spans.one(f"run {plain_failure.name}")
    assert (attributes(double)["outcome"], double.status.status_code) == ("succeeded", StatusCode.UNSET)
    assert (attributes(failed)["outcome"], failed.status.status_code) == ("failed", StatusCode.ERROR)
    assert [event.name for event in failed.events] == ["exception"]
    assert len({trace_id(span) for span in spans.all()}) == 1


def test_news_of_others_is_not_written_to_the_span_of_a_run(spans: Spans) -> None:
    @durable
    def bystander(ctx: ExecutionContext) -> None:
        assert transitions.lose(lost.pk, owner=OWNER)

    lost = reload(grandchild.delay())
    transitions.claim(lost.pk, OWNER)
    execution = reload(bystander.delay())
    inline.run_once(execution, current_app._get_current_object())
    run = spans.one(f"run {bystander.name}")
    assert (attributes(run)["outcome"], run.status.status_code, run.events) == ("succeeded", StatusCode.UNSET, ())


# ------------------------------------------------------------------------------------------------- Celery's own tracing


@pytest.fixture
def instrumented(spans: Spans) -> Iterator[None]:
    instrumentor = CeleryInstrumentor()
    instrumentor.instrument(tracer_provider=spans.provider)
    yield
    instrumentor.uninstrument()


def test_beside_celerys_instrumentation_our_run_stands_below_its_span(spans: Spans, instrumented: None) -> None:
    with spans.tracer.start_as_current_span("request"):
        root = grandchild.delay()
    # Published outside of the request, as a sweeper does it.
    if dispatch.is_embedded():
        deliver(doorbell(reload(root)))
    else:
        deliver(take())
    celerys, ours = spans.one(f"run/{grandchild.name}"), spans.one(f"run {grandchild.name}")
    assert is_below(ours, celerys)
    assert {trace_id(span) for span in spans.all()} == {trace_id(spans.one("request"))}
    assert attributes(ours)["outcome"] == "succeeded"


def test_a_message_that_the_sweeper_publishes_stays_in_the_trace(spans: Spans) -> None:
    current = []

    class Broker(NotingBroker):
        def send(self, execution: Execution, *, waits: bool) -> None:
            current.append(trace.get_current_span().get_span_context().trace_id)

    process.broker = Broker()
    with spans.tracer.start_as_current_span("request"):
        grandchild.apply_async(countdown=1)
    clock.shift(dt.timedelta(seconds=2))
    assert sweeper.publish_due() == 1
    assert current == [trace_id(spans.one("request"))]


def test_what_the_sweeper_sends_at_the_end_of_an_execution_stays_in_the_trace(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = []
    monkeypatch.setattr(
        announcements, "deliver", lambda execution: current.append(trace.get_current_span().get_span_context().trace_id)
    )
    with spans.tracer.start_as_current_span("request"):
        execution = reload(grandchild.apply_async(link=child.si()))
    transitions.succeed(claimed(execution), "1")
    clock.shift(dt.timedelta(seconds=100))
    assert sweeper.sweep(publish=False)["announced"] == 1
    assert current == [trace_id(spans.one("request"))]


def test_a_lost_run_is_not_written_to_another_ones_span(spans: Spans) -> None:
    root = grandchild.delay()
    transitions.claim(reload(root).pk, OWNER)
    with spans.tracer.start_as_current_span("sweeper"):
        assert transitions.lose(reload(root).pk, owner=OWNER)
    assert not spans.one("sweeper").events


# ----------------------------------------------------------------------------------------------------------------- tags


@durable
def tagging(ctx: ExecutionContext) -> int:
    ctx.tag("order", "7")
    ctx.step("first", int)
    return ctx.invoke("below", grandchild)


def test_the_spans_of_runs_have_the_tags_of_their_tree(spans: Spans) -> None:
    tagging.apply_async(tags={"tenant": "acme"})
    go_on()
    tags = {"tag.tenant": "acme", "tag.order": "7"}
    for run in (*spans.named(f"run {tagging.name}"), spans.one(f"run {grandchild.name}")):
        assert attributes(run).items() >= tags.items()
    assert not attributes(spans.one("step first")).keys() & tags.keys()


def test_tags_that_cannot_be_read_keep_no_run_from_going_on(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_root_id: Any) -> Any:
        raise OperationalError("away")

    monkeypatch.setattr(transitions, "tags_of", fail)
    assert start(child).get_result() == 2
    assert len(spans.named(f"run {child.name}")) == 2


def test_a_tag_that_is_refused_is_not_in_the_span(spans: Spans) -> None:
    tagging.apply_async(tags={f"k{number}": "v" for number in range(10)})
    go_on()
    assert "tag.order" not in attributes(spans.named(f"run {tagging.name}")[0])


# ---------------------------------------------------------------------------------------------------------------- hooks


def test_a_hook_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_args: Any) -> Any:
        raise RuntimeError("no")

    observing.running.add(refuse)
    observing.stepping.add(refuse)
    observing.add_carrier(refuse)
    try:
        assert start(child).get_result() == 2
    finally:
        observing.running.remove(refuse)
        observing.stepping.remove(refuse)
        observing.remove_carrier(refuse)
    assert "A hook around the engine's work failed." in caplog.text
    assert {record.levelno for record in caplog.records if record.name == "conductor_app.store.observing"} == {
        logging.ERROR
    }


def test_without_tracing_nothing_is_hooked_in() -> None:
    assert observing.running(None) is observing.running(None)
    assert not observing.running._hooks
    assert not observing.stepping._hooks
    assert not observing.tagging._hooks
    assert not observing.acting_for._hooks
    assert not observing._carriers
    assert not signals.execution_started.has_listeners()
    assert "headers" not in reload(grandchild.delay()).get_options()


def test_tracing_that_is_taken_out_is_gone(spans: Spans) -> None:
    extra = tracing.install(spans.provider)
    extra.disconnect()
    start(grandchild)
    assert len(spans.named(f"run {grandchild.name}")) == 1

"""Headers that receivers of Celery's ``before_task_publish`` add belong to an execution, not to one of its messages."""

from __future__ import annotations

import datetime as dt
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from celery import current_app, shared_task, signals
from celery.app.trace import build_tracer
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.dispatch import Signal
from django.db import transaction
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.instrumentation.celery import utils as celery_tracing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from conductor_app import ExecutionContext, api
from conductor_app.body import headers
from conductor_app.host import inline, plain_runs
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.transitions import dispatch
from tests.support.bodies import advance, child, durable, go_on, reload, run, start
from tests.support.broker import purge
from tests.support.deliveries import deliver, doorbell, take
from tests.support.executions import committing

current_id: ContextVar[str | None] = ContextVar("correlation_id", default=None)


@pytest.fixture(autouse=True)
def db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    purge(set())  # what other tests have published
    with committing(django_db_blocker):
        yield
        clock.reset()


@contextmanager
def connected(sent: Signal, receiver: Any, sender: Any = None) -> Iterator[None]:
    sent.connect(receiver, sender=sender, weak=False)
    try:
        yield
    finally:
        sent.disconnect(receiver, sender=sender)


class Published(list[dict[str, Any]]):
    """The arguments of each ``before_task_publish``."""


@shared_task(name="tests.headers.plain", bind=True, autoretry_for=(ValueError,), max_retries=1, default_retry_delay=1)
def plain(self: Any, failures: int = 0) -> Any:
    """Return the header, after so many failures."""
    if self.request.retries < failures:
        raise ValueError("again")
    return self.request.headers["tenant"]


@pytest.fixture
def tenant() -> Iterator[Published]:
    """A header whose value says where and when it was added."""
    told = Published()

    def add(**arguments: Any) -> None:
        told.append(arguments)
        arguments["headers"]["tenant"] = f"{current_id.get()}"

    token = current_id.set("web")
    with connected(signals.before_task_publish, add):
        yield told
    current_id.reset(token)


@durable
def leaf(ctx: ExecutionContext) -> Any:
    return ctx.task.request.headers["tenant"]


@durable(max_retries=1, retry_backoff=False, default_retry_delay=5)
def fails_once(ctx: ExecutionContext) -> Any:
    if ctx.attempt == 1:
        raise ValueError("again")
    return ctx.task.request.tenant


@durable
def tree(ctx: ExecutionContext) -> Any:
    """Return the header as each kind of run sees it."""
    seen = [ctx.task.request.tenant]
    seen.append(ctx.invoke("leaf", leaf))
    seen += ctx.map("each", leaf, [None, None], max_parallel=1)
    handle = ctx.start("started", leaf)
    seen += ctx.gather(handle)
    seen.append(ctx.invoke("retried", fails_once))
    seen.append(ctx.invoke("plain", plain, {"failures": 1}))
    seen.append(ctx.invoke("by-name", plain.name))
    ctx.sleep("nap", 5)
    return [*seen, ctx.task.request.tenant]


@contextmanager
def elsewhere(name: str) -> Iterator[None]:
    """Be at a place where another header is added."""
    token = current_id.set(name)
    try:
        yield
    finally:
        current_id.reset(token)


def until_done(execution: Any) -> Any:
    """Skip over due times until a tree is done, in a context of no request."""
    with elsewhere("nowhere"):
        for _ in range(20):
            if reload(execution).is_final:
                return reload(execution).get_result()
            go_on()
            advance(6)
    raise AssertionError(f"It is {reload(execution).status}")


# ------------------------------------------------------------------------------------------------------------- all runs


def test_what_a_receiver_adds_is_seen_by_all_runs(tenant: Published) -> None:
    def inherit(**arguments: Any) -> None:
        """Make it current in a run, as those libraries do."""
        current_id.set(arguments["task"].request.headers["tenant"])

    with connected(signals.task_prerun, inherit), dispatch.inline():
        assert until_done(tree.apply_async(countdown=3)) == ["web"] * 9
    # Once for each execution; a plain task's retry is Celery's own to publish.
    ids = [arguments["headers"]["id"] for arguments in tenant if arguments["headers"]["retries"] == 0]
    assert sorted(ids) == sorted(str(execution.pk) for execution in Execution.objects.all())


def test_children_inherit_what_nobody_else_sets() -> None:
    """Also what the caller gave, where nobody listens."""

    @durable
    def parent(ctx: ExecutionContext) -> Any:
        ctx.invoke("own", leaf.s().set(headers={"tenant": "own", "more": 1}))
        return [ctx.invoke("leaf", leaf), ctx.invoke("plain", plain), ctx.map("each", plain, [None])]

    result = parent.apply_async(headers={"tenant": "a", "other": "b"})
    go_on()
    assert reload(result).get_result() == ["a", "a", ["a"]]
    own = child(reload(result), "own")
    assert own.get_options()["headers"] == {"tenant": "own", "other": "b", "more": 1}


def test_what_the_hook_sets_wins_over_what_a_child_inherits(tenant: Published) -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        current_id.set("body")
        return [ctx.task.request.tenant, ctx.invoke("leaf", leaf), ctx.invoke("plain", plain)]

    assert start(parent).get_result() == ["web", "body", "body"]


def test_a_receiver_may_take_away_what_a_child_would_inherit() -> None:
    def take_away(headers: Any, **_kwargs: Any) -> None:
        headers.pop("tenant", None)

    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("child", bare)

    @durable
    def bare(ctx: ExecutionContext) -> Any:
        return ctx.task.request.headers

    with connected(signals.before_task_publish, take_away, sender=bare.name):
        result = parent.apply_async(headers={"tenant": "a", "other": "b"})
        go_on()
    found = reload(result).get_result()
    assert (found.get("tenant"), found["other"]) == (None, "b")


def test_what_speaks_of_one_message_is_not_inherited() -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("leaf", leaf)

    given = {"tenant": "a", "shadow": "other", "id": "x", dispatch.HEADER: "forged", "x-death": "y", "argsrepr": "z"}
    result = parent.apply_async(headers=given)
    go_on()
    assert child(reload(result), "leaf").get_options()["headers"] == {"tenant": "a"}


def test_what_the_caller_gives_wins_and_is_shown_to_the_receivers(tenant: Published) -> None:
    result = leaf.apply_async(headers={"tenant": "mine", "other": 1})
    assert tenant[0]["headers"]["other"] == 1
    go_on()
    assert reload(result).get_result() == "mine"


def test_a_later_message_changes_nothing(tenant: Published) -> None:
    """Its receivers are called in another place: a sweeper's."""

    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return [ctx.task.request.tenant, ctx.invoke("plain", plain)]

    with dispatch.inline():
        root = parent.delay()
    with elsewhere("sweeper"):
        message = doorbell(reload(root))
    assert message.headers["tenant"] == "sweeper"
    with dispatch.inline():
        deliver(message)
    beneath = child(reload(root), "plain")
    with elsewhere("sweeper"):
        message = doorbell(beneath)
    assert message.headers["tenant"] == "sweeper"
    tracer = plain_runs.guard(plain, build_tracer(plain.name, plain, app=current_app))
    tracer(str(beneath.pk), [], {}, dict(message.headers))
    assert reload(beneath).status == "succeeded"
    go_on()
    assert reload(root).get_result() == ["web", "web"]


def test_an_operators_retry_and_a_rerun_have_them_too(tenant: Published) -> None:
    @durable(max_retries=0)
    def body(ctx: ExecutionContext, seen: Any = None) -> Any:
        if ctx.attempt == 1 and not flag:
            flag.append(1)
            raise ValueError(ctx.task.request.tenant)
        return ctx.task.request.tenant

    flag: list[int] = []
    failed = start(body)
    assert failed.status == "failed"
    current_id.set("operator")
    api.retry(failed)
    go_on()
    assert reload(failed).get_result() == "web"
    new = api.rerun(failed)
    go_on()
    assert reload(new).get_result() == "web"


def test_eager_calls_ask_for_each_execution_too(tenant: Published, settings: Any) -> None:
    app: Any = current_app
    app.conf.task_always_eager = True
    try:
        assert tree.delay().get(disable_sync_subtasks=False) == ["web"] * 9
    finally:
        app.conf.task_always_eager = False


def test_apply_itself_publishes_nothing_as_with_celery(tenant: Published) -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return [ctx.task.request.headers.get("tenant"), ctx.invoke("leaf", leaf)]

    assert run(parent).get_result() == [None, "web"]
    assert [arguments["sender"] for arguments in tenant] == [leaf.name]


def test_a_rolled_back_call_leaves_nothing(tenant: Published) -> None:
    with pytest.raises(ValueError, match="back"), transaction.atomic():
        leaf.delay()
        raise ValueError("back")
    assert len(tenant) == 1
    assert not Execution.objects.exists()


def test_a_message_of_somebody_elses_is_not_asked_about_again(tenant: Published) -> None:
    current_app.send_task(leaf.name, headers={"other": 1})
    message = take()
    assert len(tenant) == 1
    current_id.set("worker")
    with dispatch.inline():
        deliver(message)
    assert len(tenant) == 1
    assert Execution.objects.get().get_options()["headers"] == {"tenant": "web", "other": 1}


# ---------------------------------------------------------------------------------------------- what receivers are told


def test_receivers_are_told_what_a_publish_tells_them(tenant: Published) -> None:
    @durable(queue="payments", priority=3)
    def body(ctx: ExecutionContext, *args: Any, **kwargs: Any) -> None:
        pass

    result = body.apply_async((1,), {"total": dt.date(2026, 1, 2)}, headers={"given": "yes"})
    assert dispatch.publish(reload(result))
    created, published = tenant[0], tenant[-1]
    assert created["body"][:2] == ([1], {"total": dt.date(2026, 1, 2)})
    assert published["body"][:2] == ((), {})
    for arguments in (created, published):
        del arguments["body"]
        arguments["declare"] = [queue.name for queue in arguments["declare"]]
        arguments["properties"].pop("timeout", None)
    assert created["headers"] == published["headers"]
    assert created == published
    assert (created["sender"], created["routing_key"], created["declare"]) == (body.name, "payments", ["payments"])
    assert created["properties"]["priority"] == 3


def test_a_plain_childs_receivers_are_told_what_a_publish_tells_them(tenant: Published) -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("plain", plain.s(failures=0).set(link=leaf.si(), queue="payments", time_limit=9))

    root = reload(parent.delay())
    inline.run_once(root, current_app._get_current_object())
    assert dispatch.publish(child(root, "plain"))
    created, published = (arguments for arguments in tenant[-2:])
    for arguments in (created, published):
        arguments["body"] = (list(arguments["body"][0]), *arguments["body"][1:])
        arguments["declare"] = [queue.name for queue in arguments["declare"]]
    assert created == published


def test_what_a_receiver_does_to_the_body_changes_nothing(tenant: Published) -> None:
    @durable
    def body(ctx: ExecutionContext, **kwargs: Any) -> Any:
        return kwargs

    def change(body: Any, properties: Any, headers: Any, **_kwargs: Any) -> None:
        body[1]["total"] = 0
        properties["priority"] = 9
        headers["id"] = headers["root_id"] = "forged"
        headers["conductor"] = "forged"

    with connected(signals.before_task_publish, change, sender=body.name):
        result = body.delay(total=7)
    go_on()
    assert reload(result).get_result() == {"total": 7}
    assert reload(result).get_options()["headers"] == {"tenant": "web"}


def test_what_a_receiver_makes_current_does_not_outlast_it(tenant: Published) -> None:
    # Without the publish that may follow, in which it is Celery's to call them.
    with dispatch.inline(), connected(signals.before_task_publish, lambda **_kwargs: current_id.set("leaked")):
        leaf.delay()
    assert current_id.get() == "web"


def test_only_receivers_of_the_task_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_ask_receivers", lambda *_args: pytest.fail("nobody listens"))
    with connected(signals.before_task_publish, lambda **_kwargs: None, sender="another.task"):
        assert "headers" not in reload(leaf.delay()).get_options()


# ------------------------------------------------------------------------------------------------------ bad receivers


def test_a_receiver_that_fails_is_logged_and_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(headers: Any, **_kwargs: Any) -> None:
        headers["tenant"] = "half"
        raise RuntimeError("no")

    with connected(signals.before_task_publish, fail):
        result = leaf.delay()
        go_on()
    assert reload(result).get_result() == "half"
    assert any("RuntimeError('no')" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, "x" * 1_048_577, {"__type__": "unknown", "__value__": 1}, {(1, 2): 3}],
    ids=["an object", "a set", "too large", "no value of kombu's", "a tuple as key"],
)
def test_what_cannot_be_stored_is_left_out_with_one_warning(caplog: pytest.LogCaptureFixture, value: Any) -> None:
    def add(headers: Any, **_kwargs: Any) -> None:
        headers.update(bad=value, tenant="a")

    with connected(signals.before_task_publish, add):
        result = leaf.delay()
        with caplog.at_level(logging.WARNING, logger="conductor_app"):
            go_on()
    warnings = [record for record in caplog.records if record.name == "conductor_app.body.headers"]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert "Header 'bad' of " + leaf.name in warnings[0].getMessage()
    assert reload(result).get_result() == "a"


def test_a_soft_time_limit_is_raised_after_the_receivers() -> None:
    """Celery would take it for an error of the receiver, and swallow it."""
    ended = []

    def linger(**_kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        ended.append(True)

    def on_limit(_number: int, _frame: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGUSR1, on_limit)
    try:
        with connected(signals.before_task_publish, linger), pytest.raises(SoftTimeLimitExceeded):
            leaf.delay()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended == [True]


def test_kombus_values_come_back_as_they_were() -> None:
    when = dt.datetime(2026, 1, 2, 3, 4, tzinfo=dt.UTC)
    seen = []

    @durable
    def body(ctx: ExecutionContext) -> None:
        seen.append((ctx.task.request.when, ctx.task.request.bound))

    def add(headers: Any, **_kwargs: Any) -> None:
        headers.update(when=when, bound={"user": 7})

    with connected(signals.before_task_publish, add):
        start(body)
    assert seen == [(when, {"user": 7})]


def test_a_message_that_cannot_be_made_breaks_nothing(
    tenant: Published, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(current_app.amqp, "as_task_v2", lambda *_args, **_kwargs: 1 / 0)
    result = leaf.apply_async(headers={"tenant": "mine"})
    monkeypatch.undo()
    go_on()
    assert reload(result).get_result() == "mine"
    assert f"cannot be asked for the headers of {leaf.name}" in caplog.text


# ------------------------------------------------------------------------------------------------------------- tracers


def test_celerys_own_tracing_ends_what_it_begins_and_makes_one_trace() -> None:
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = CeleryInstrumentor()
    instrumentor.instrument(tracer_provider=provider)

    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("child", beneath)

    @durable
    def beneath(ctx: ExecutionContext) -> None:
        pass

    try:
        with provider.get_tracer("tests").start_as_current_span("request") as request:
            root = parent.delay()
            assert trace.get_current_span() is request
        go_on()
    finally:
        instrumentor.uninstrument()
    assert reload(root).status == "succeeded"
    spans = exporter.get_finished_spans()
    assert len({span.context.trace_id for span in spans}) == 1
    known = {span.context.span_id for span in spans}
    assert all(span.parent is None or span.parent.span_id in known for span in spans)
    assert not _open_spans(parent)
    assert not _open_spans(beneath)


def _open_spans(task: Any) -> Any:
    return getattr(current_app.tasks[task.name], celery_tracing.CTX_KEY, None)


def test_nobody_else_is_told_that_something_was_published(tenant: Published) -> None:
    """A tracer has both receivers in one module."""
    calls: list[str] = []

    def before(headers: Any, **_kwargs: Any) -> None:
        calls.append(f"before {headers['id']}")

    def after(headers: Any, **_kwargs: Any) -> None:
        calls.append(f"after {headers['id']}")
        raise RuntimeError("no")

    def count(**_kwargs: Any) -> None:
        calls.append("counted")

    before.__module__ = after.__module__ = "tracer"
    count.__module__ = "counter"
    with (
        connected(signals.before_task_publish, before, sender=leaf.name),
        connected(signals.after_task_publish, after),
        connected(signals.after_task_publish, count),
        transaction.atomic(),
    ):
        result = leaf.delay()
        assert calls == [f"before {result.id}", f"after {result.id}"]

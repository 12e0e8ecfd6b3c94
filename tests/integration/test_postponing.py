"""What a worker of another version cannot run is put off, and no attempt is used up."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from celery import current_app
from celery.app.trace import build_tracer
from celery.worker.consumer import Consumer

from conductor_app import DurableTask, ExecutionContext, transitions
from conductor_app.exceptions import CancelExecution, Failure, LeaseLost, PayloadMismatch
from conductor_app.host import durable_runs, news, unknown_tasks
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.telling.headlines import headline
from conductor_app.telling.situation import Situation
from conductor_app.testing import drain
from conductor_app.transitions import dispatch, postponing
from tests.support.bodies import class_name, durable, failure, redeploy, reload, run, start
from tests.support.executions import FAILURE, TASK, claimed, fresh, queued, running, snapshot

pytestmark = pytest.mark.django_db

MISFIT = Failure(type="conductor_app.exceptions.PayloadMismatch", message="Its payload does not fit.")


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


def pass_time(seconds: float) -> None:
    clock.shift(dt.timedelta(seconds=seconds))


# Runs whose payload does not fit


def test_a_run_that_is_put_off_is_due_a_little_later_each_time_and_uses_no_attempt() -> None:
    execution = running()
    delays = []
    for _ in range(14):
        delay = transitions.put_off(execution, MISFIT)
        assert delay is not None
        row = fresh(execution)
        assert (row.status, row.attempt, row.lease_owner, row.put_off_because) == ("queued", 1, "", MISFIT.message)
        assert transitions.claim(row.pk, "w/1") is None
        pass_time(delay + 0.01)
        delays.append(delay)
        execution = claimed(row)
    assert delays[:4] == [1, 1.5, 2.25, 3.375]
    assert delays[-3:] == [postponing.MAX_PAUSE_SECONDS] * 3


def test_what_nobody_could_run_for_an_hour_is_put_off_no_more() -> None:
    execution = running()
    assert transitions.put_off(execution, MISFIT) == 1
    pass_time(postponing.MAX_SECONDS - 1)
    execution = claimed(execution)
    assert transitions.put_off(execution, MISFIT) == 1.5
    pass_time(2)
    execution = claimed(execution)
    before = snapshot()
    assert transitions.put_off(execution, MISFIT) is None
    assert snapshot() == before


def test_a_run_in_between_begins_the_hour_anew() -> None:
    execution = running()
    assert transitions.put_off(execution, MISFIT) == 1
    pass_time(postponing.MAX_SECONDS)
    execution = claimed(execution)
    transitions.release(execution)
    assert fresh(execution).put_off_because == ""
    execution = claimed(execution)
    assert transitions.put_off(execution, MISFIT) == 1


def test_a_stale_run_and_one_that_is_to_be_cancelled_put_nothing_off() -> None:
    execution = running()
    transitions.request_cancel(execution.pk, "enough")
    with pytest.raises(CancelExecution):
        transitions.put_off(execution, MISFIT)
    other = running()
    Execution.objects.filter(pk=other.pk).update(fence=7)
    with pytest.raises(LeaseLost):
        transitions.put_off(other, MISFIT)


def deliver(task: Any, execution: Execution, **request: Any) -> None:
    """Run one delivery as a worker does."""
    tracer = build_tracer(task.name, task, app=current_app._get_current_object())  # type: ignore[attr-defined]
    headers = {dispatch.HEADER: dispatch.DOORBELL, **request}
    tracer(str(execution.pk), [], {}, {"id": str(execution.pk), "hostname": "w1@host", "delivery_info": {}, **headers})


@pytest.mark.parametrize("hook", ["__call__", "before_start"])
def test_a_base_class_that_needs_an_argument_uses_no_attempt_of_a_payload_that_has_none(hook: str) -> None:
    def needs_shop(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("shop")

    base: Any = type("NeedsShop", (DurableTask,), {"abstract": True, hook: needs_shop})

    @durable(max_retries=3, base=base)
    def body(ctx: ExecutionContext, order: int) -> str:
        return "old"

    execution = reload(body.delay(7))
    redeploy(body, lambda ctx, order, shop: "new")
    app: Any = current_app._get_current_object()  # type: ignore[attr-defined]
    guarded = durable_runs.guard(body, build_tracer(body.name, body, app=app))
    request = {"id": str(execution.pk), "hostname": "w1@host", "delivery_info": {}, dispatch.HEADER: dispatch.DOORBELL}
    guarded(str(execution.pk), [], {}, request)
    row = reload(execution)
    assert (row.status, row.attempt) == ("queued", 1)
    assert "missing a required argument: 'shop' on worker w1@host" in row.put_off_because


def test_a_body_whose_signature_is_another_one_is_not_called(caplog: pytest.LogCaptureFixture) -> None:
    called: list[Any] = []

    @durable(max_retries=3)
    def body(ctx: ExecutionContext, order: int, currency: str) -> str:
        called.append((order, currency))
        return "new"

    execution = reload(body.delay(7, currency="EUR"))
    redeploy(body, lambda ctx, order: called.append(order))
    with caplog.at_level(logging.WARNING):
        deliver(body, execution)
    row = reload(execution)
    assert (called, row.status, row.attempt, row.fence) == ([], "queued", 1, 1)
    text = (
        f"Its payload does not fit {body.name}(order): got an unexpected keyword argument 'currency' on worker w1@host."
        " Is the worker as new as the code that stored it?"
    )
    assert row.put_off_because == text
    assert f"Execution {row.pk} of {body.name} is put off by 1s. {text}" in caplog.text
    told = str(headline(Situation(row, clock.read("default"))))
    assert told.startswith(f"↻ Put off, no attempt is used up: {text} Next try in ")
    pass_time(3)
    told = str(headline(Situation(row, clock.read("default"))))
    assert told.startswith("○ Queued for ")
    assert told.endswith(f"It was put off before: {text}")
    redeploy(body, lambda ctx, order, currency: f"{order} {currency}")
    deliver(body, row)
    assert (reload(row).get_result(), reload(row).error) == ("7 EUR", None)


def test_a_body_that_is_too_old_for_an_hour_fails_the_execution_for_good() -> None:
    @durable(max_retries=3)
    def body(ctx: ExecutionContext, order: int, currency: str) -> None:
        del ctx, order, currency

    execution = reload(body.delay(7, currency="EUR"))
    redeploy(body, lambda ctx, order: None)
    deliver(body, execution)
    pass_time(postponing.MAX_SECONDS)
    deliver(body, execution)
    row = reload(execution)
    assert (row.status, row.attempt) == ("failed", 1)
    assert failure(row).error_class == class_name(PayloadMismatch)
    assert failure(row).message == (
        f"The stored payload does not fit {body.name}(order): got an unexpected keyword argument 'currency'. It was "
        "stored by code of another version. Deploy code that takes it, and retry the execution."
    )


@pytest.mark.parametrize("how", ["drain", "apply", "resumed"])
def test_where_there_is_no_other_worker_it_fails_at_once(how: str) -> None:
    @durable(max_retries=3)
    def body(ctx: ExecutionContext, order: int, currency: str) -> None:
        ctx.sleep("nap", 60)

    if how == "apply":
        new = body.new_execution
        body.new_execution = lambda *args, **options: _redeployed(body, new(*args, **options))
        execution = run(body, order=7, currency="EUR")
    elif how == "drain":
        result = body.delay(7, currency="EUR")
        redeploy(body, lambda ctx, order: None)
        assert drain() == 1
        execution = reload(result)
    else:
        execution = start(body, order=7, currency="EUR")
        redeploy(body, lambda ctx, order: None)
        pass_time(61)
        drain()
        execution = reload(execution)
    assert (execution.status, execution.attempt) == ("failed", 1)
    assert failure(execution).error_class == class_name(PayloadMismatch)


def _redeployed(body: Any, new: Any) -> Any:
    redeploy(body, lambda ctx, order: None)
    return new


# Tasks that a worker does not know


def test_a_task_that_a_worker_does_not_know_is_put_off_in_the_queue() -> None:
    execution = queued()
    assert transitions.put_off_unknown(execution.pk, TASK, FAILURE) == 1
    row = fresh(execution)
    assert (row.status, row.attempt, row.fence, row.put_off_because) == ("queued", 1, 0, FAILURE.message)
    assert row.due_at is not None
    assert row.dispatch_at == row.due_at
    assert transitions.put_off_unknown(execution.pk, TASK, FAILURE) is None  # it is not due: a copy of the message
    pass_time(1.01)
    assert transitions.put_off_unknown(execution.pk, TASK, FAILURE) == 1.5
    pass_time(24 * 3_600)
    assert transitions.put_off_unknown(execution.pk, TASK, FAILURE) == 2.25  # for as long as nobody knows it
    pass_time(3)
    run = claimed(row)
    assert fresh(run).put_off_because == ""
    transitions.succeed(run, "1")
    assert fresh(run).error is None


def test_a_message_about_an_unknown_task_changes_nothing_else() -> None:
    held, cancelled, later = running(), queued(), queued(countdown=60)
    transitions.request_cancel(cancelled.pk, "enough")
    forged = queued()
    before = snapshot()
    for execution, task in ((held, TASK), (cancelled, TASK), (later, TASK), (forged, "another.task")):
        assert transitions.put_off_unknown(execution.pk, task, FAILURE) is None
    assert snapshot() == before


class Message:
    """What a broker's client hands to the consumer."""

    def __init__(self, **headers: Any) -> None:
        self.headers = headers
        self.properties: dict[str, Any] = {}
        self.delivery_info: dict[str, Any] = {}
        self.payload = self.body = [[], {}, {}]
        self.content_type = self.content_encoding = ""
        self.rejected = 0

    def reject_log_error(self, *_args: Any) -> None:
        self.rejected += 1


class Stub:
    """As much of a consumer as hears of an unknown task."""

    connection_errors = ()
    event_dispatcher = None

    def __init__(self) -> None:
        self.stored: list[Any] = []
        self.app = self.backend = self

    def mark_as_failure(self, task_id: Any, *_args: Any, **_kwargs: Any) -> None:
        self.stored.append(task_id)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Consumer, "on_unknown_task", Consumer.on_unknown_task)
    process.news = news.News()
    unknown_tasks.watch_unknown_tasks()


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("kind", [dispatch.DOORBELL, dispatch.DOORBELL_WITH_CALLBACKS, dispatch.PLAIN])
def test_celery_stores_no_failure_of_a_task_of_ours_that_a_worker_does_not_know(kind: str) -> None:
    execution, stub = queued(task="not.there"), Stub()
    message = Message(id=str(execution.pk), task="not.there", **{dispatch.HEADER: kind})
    Consumer.on_unknown_task(stub, None, message, KeyError("not.there"))  # type: ignore[arg-type]
    assert (stub.stored, message.rejected) == ([], 1)
    unknown = news.news().take("unknown")
    assert [report.execution_id for report in unknown] == ([] if kind == dispatch.PLAIN else [execution.pk])
    for report in unknown:
        unknown_tasks.put_off_unknown(report, "w1@host")
        assert fresh(execution).put_off_because == (
            'Worker w1@host took its message and knows no task "not.there". Is its module imported there, and the '
            "worker as new as the code that stored it?"
        )


@pytest.mark.usefixtures("watched")
def test_a_message_of_others_about_an_unknown_task_is_celerys() -> None:
    stub, message = Stub(), Message(id="1", task="not.there")
    Consumer.on_unknown_task(stub, None, message, KeyError("not.there"))  # type: ignore[arg-type]
    assert (stub.stored, message.rejected, news.news().take("unknown")) == (["1"], 1, [])

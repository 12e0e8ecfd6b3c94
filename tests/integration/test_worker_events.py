"""What Celery's events, and Sentry, say of a run that has ended without an outcome, by a message or by hand-off."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from celery.app import trace
from celery.app.trace import build_tracer
from celery.events.state import State

from conductor_app import ExecutionContext, api
from conductor_app.engine.run import RunEnded
from conductor_app.host import durable_runs
from conductor_app.host.request import DurableRequest
from conductor_app.transitions import dispatch
from project.celery import app
from tests.support.bodies import durable, reload
from tests.support.broker import purge
from tests.support.deliveries import doorbell


class Dispatcher:
    """Takes the events of a worker, and makes of them what Flower does."""

    enabled = True

    def __init__(self) -> None:
        self.state = State()
        self.told: list[str] = []

    def send(self, kind: str, **fields: Any) -> None:
        self.told.append(kind)
        about = {"hostname": "h", "timestamp": time.time(), "local_received": time.time(), "clock": 1, "pid": 1}
        self.state.event({"type": kind, **about, **fields})


@durable(max_retries=1, retry_backoff=False, default_retry_delay=60)
def fails(ctx: ExecutionContext) -> None:
    raise ValueError("no luck")


@durable
def naps(ctx: ExecutionContext) -> None:
    ctx.sleep("nap", 60)


@durable
def is_cancelled(ctx: ExecutionContext) -> None:
    api.cancel(ctx.execution_id)
    ctx.checkpoint()


@pytest.fixture(autouse=True)
def db(transactional_db: None) -> None:
    purge(set())


def run_ended(execution: Any) -> RunEnded:
    """Run what a message delivers, and return how the run ended."""
    task = app.tasks[execution.task]
    tracer = durable_runs.guard(task, build_tracer(task.name, task, app=app))
    request = {"id": str(execution.pk), "task": task.name, "hostname": "h", dispatch.HEADER: dispatch.DOORBELL}
    ended: RunEnded = tracer(str(execution.pk), [], {}, request).info.retval
    return ended


@pytest.mark.parametrize(
    ("task", "kind", "state"),
    [
        (naps, "task-suspended", "SUSPENDED"),
        (fails, "task-retried", "RETRY"),
        (is_cancelled, "task-revoked", "REVOKED"),
    ],
    ids=["suspended", "retrying", "cancelled"],
)
def test_the_end_of_a_run_is_an_event(task: Any, kind: str, state: str) -> None:
    events, execution = Dispatcher(), reload(task.delay())
    request: Any = DurableRequest(
        doorbell(execution), app=app, task=app.tasks[execution.task], hostname="h", eventer=events, on_ack=print
    )
    ended = run_ended(execution)
    request.on_failure(SimpleNamespace(exception=ended))
    assert events.told == [kind]
    assert events.state.tasks[str(execution.pk)].state == state
    # As a run that was handed off is told of.
    assert durable_runs._end_event(SimpleNamespace(info=SimpleNamespace(retval=ended))) == ended.event()


@pytest.mark.parametrize("what", ["released", "postponed", "dropped", "abandoned"])
def test_a_run_that_changed_nothing_is_none(what: str) -> None:
    assert RunEnded(what).event() is None


def test_the_event_of_a_retry_says_why() -> None:
    told = run_ended(reload(fails.delay())).event()
    assert told is not None
    assert told[1]["exception"] == "attempt 1 failed (no luck), the next one is due in 60s"


class Span:
    """A transaction of Sentry's, of the kind that its integration has given the status "aborted"."""

    status = "aborted"

    def set_status(self, value: str) -> None:
        self.status = value


@pytest.mark.parametrize(("task", "status"), [(naps, "ok"), (fails, "aborted")], ids=["suspended", "retrying"])
def test_a_suspension_is_no_aborted_transaction_of_sentrys(task: Any, status: str, monkeypatch: Any) -> None:
    span = Span()
    monkeypatch.setitem(sys.modules, "sentry_sdk", SimpleNamespace(get_current_span=lambda: span))
    monkeypatch.setitem(vars(trace), "ExceptionInfo", durable_runs._exception_info)  # as in a worker
    run_ended(reload(task.delay()))
    assert span.status == status


@pytest.mark.parametrize("sentry", [SimpleNamespace(), SimpleNamespace(get_current_span=lambda: None)])
def test_what_sentry_lacks_harms_no_run(sentry: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "sentry_sdk", sentry)
    monkeypatch.setitem(vars(trace), "ExceptionInfo", durable_runs._exception_info)
    assert run_ended(reload(naps.delay())).what == "suspended"

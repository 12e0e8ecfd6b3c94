"""Celery's signals of ends that no run has brought about."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import signals
from django.db import connection
from django.test.utils import CaptureQueriesContext

from conductor_app import ExecutionContext, api
from conductor_app.engine import sweeper
from conductor_app.host import ends
from conductor_app.models import Execution
from conductor_app.store import clock
from tests.app import plain, scenarios
from tests.support.bodies import advance, child, durable, go_on, reload, start
from tests.support.executions import claimed, invoke, running

pytestmark = pytest.mark.django_db(transaction=True)

Told = list[tuple[str, uuid.UUID, dict[str, Any]]]


@pytest.fixture
def told() -> Iterator[Told]:
    """What receivers of Celery's signals have heard, in the process that makes the change."""
    heard: Told = []

    def on_failure(sender: Any, task_id: str, **details: Any) -> None:
        heard.append(("task_failure", uuid.UUID(task_id), {"task": sender.name, **details}))

    def on_revoked(sender: Any, request: Any, **details: Any) -> None:
        heard.append(("task_revoked", uuid.UUID(request.id), {"task": sender.name, "request": request, **details}))

    def on_success(sender: Any, **details: Any) -> None:
        heard.append(("task_success", uuid.UUID(sender.request.id), {"task": sender.name, **details}))

    receivers = (
        (signals.task_failure, on_failure),
        (signals.task_revoked, on_revoked),
        (signals.task_success, on_success),
    )
    for signal, receiver in receivers:
        signal.connect(receiver, weak=False)
    yield heard
    for signal, receiver in receivers:
        signal.disconnect(receiver)


@pytest.fixture(autouse=True)
def _reset_clock() -> Iterator[None]:
    yield
    clock.reset()


def of(told: Told, execution: Any) -> list[str]:
    return [name for name, execution_id, _details in told if str(execution_id) == str(execution.pk)]


@durable
def waits_an_hour(ctx: ExecutionContext) -> Any:
    return ctx.invoke("nap", scenarios.naps, {"seconds": 86_400}, timeout=3_600)


def test_a_timeout_is_told_of_the_child_that_is_cancelled_and_once_of_the_parent(told: Told) -> None:
    parent = start(waits_an_hour)
    nap = child(parent, "nap")
    advance(3_601)
    sweeper.sweep(publish=False)
    go_on()
    assert (reload(nap).status, reload(parent).status) == ("cancelled", "failed")
    assert (of(told, nap), of(told, parent)) == (["task_revoked"], ["task_failure"])


def test_a_cancel_is_told_of_the_whole_tree(told: Told) -> None:
    parent = start(waits_an_hour)
    nap = child(parent, "nap")
    assert api.cancel(parent.pk, reason="not today")
    sweeper.sweep(publish=False)
    assert {row.status for row in Execution.objects.all()} == {"cancelled"}
    assert (of(told, nap), of(told, parent)) == (["task_revoked"], ["task_revoked"])
    (details,) = [details for _name, pk, details in told if pk == nap.pk]
    assert details["task"] == scenarios.naps.name
    assert (details["terminated"], details["signum"], details["expired"]) == (False, None, False)
    assert (details["request"].root_id, details["request"].parent_id) == (str(parent.pk), str(parent.pk))
    assert details["request"].kwargs == {"seconds": 86_400}


def test_what_expires_is_told_as_expired(told: Told) -> None:
    execution = reload(scenarios.echo.apply_async((1,), countdown=60, expires=30))
    clock.shift(dt.timedelta(seconds=31))
    sweeper.sweep(publish=False)
    assert reload(execution).status == "cancelled"
    assert [(name, details["expired"]) for name, _pk, details in told] == [("task_revoked", True)]


@pytest.mark.parametrize(
    ("task", "options"),
    [(scenarios.has_one_attempt, "{}"), (plain.slow, '{"plain":{"acks_late":false}}')],
    ids=["durable", "plain"],
)
def test_a_worker_that_dies_for_the_last_time_is_a_failure(told: Told, task: Any, options: str) -> None:
    doomed = claimed(
        invoke(running(), task=task.name, payload='[[],{"seconds":1}]', max_attempts=1, options=options), "gone@host/1"
    )
    clock.shift(dt.timedelta(hours=1))
    sweeper.sweep(publish=False)
    assert reload(doomed.pk).status == "failed"
    ((name, details),) = [(name, details) for name, pk, details in told if pk == doomed.pk]
    assert name == "task_failure"
    assert details["kwargs"] == {"seconds": 1}
    assert str(details["exception"]) == reload(doomed.pk).error_message
    assert str(details["exception"]) in str(details["einfo"])


def test_each_sibling_that_a_failure_cancels_is_told_of(told: Told) -> None:
    @durable
    def gathers(ctx: ExecutionContext) -> Any:
        handles = [
            ctx.start("fails", scenarios.boom),
            ctx.start("naps", scenarios.naps, {"seconds": 86_400}),
        ]
        return ctx.gather(*handles)

    parent = start(gathers)
    sweeper.sweep(publish=False)
    ended = {row.step: (row.status, of(told, row)) for row in Execution.objects.filter(parent=parent)}
    assert ended == {"fails": ("failed", ["task_failure"]), "naps": ("cancelled", ["task_revoked"])}


def test_a_run_that_ends_its_execution_is_told_of_once_by_celery(told: Told) -> None:
    good, bad = start(scenarios.echo, value=1), start(scenarios.boom)
    assert (of(told, good), of(told, bad)) == (["task_success"], ["task_failure"])


def test_a_body_that_its_cancellation_ends_is_told_of_once(told: Told) -> None:
    @durable
    def cancels_itself(ctx: ExecutionContext) -> None:
        api.cancel(ctx.execution_id)
        ctx.checkpoint()

    execution = start(cancels_itself)
    assert execution.status == "cancelled"
    assert of(told, execution) == ["task_revoked"]


def test_what_celery_has_told_itself_is_not_told_again(told: Told) -> None:
    napping = start(scenarios.naps, seconds=86_400)
    ends.celery_told(str(napping.pk))
    assert api.cancel(napping.pk)
    assert of(told, napping) == []


def test_a_receiver_that_raises_changes_nothing(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    def raises(**_kwargs: Any) -> None:
        raise RuntimeError("the tracker is away")

    signals.task_revoked.connect(raises, weak=False)
    try:
        napping = start(scenarios.naps, seconds=86_400)
        assert api.cancel(napping.pk)
    finally:
        signals.task_revoked.disconnect(raises)
    assert reload(napping).status == "cancelled"
    assert of(told, napping) == ["task_revoked"]
    assert "the tracker is away" in caplog.text


def test_receivers_that_take_long_are_told_of(
    told: Told, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ends, "SLOW_SECONDS", 0)
    assert api.cancel(start(scenarios.naps, seconds=86_400).pk)
    assert "Receivers of Celery's task_revoked took 0.0 s" in caplog.text


@pytest.mark.parametrize("is_heard", [False, True], ids=["nobody", "somebody"])
def test_where_nobody_listens_nothing_is_read_for_it(request: pytest.FixtureRequest, is_heard: bool) -> None:
    if is_heard:
        request.getfixturevalue("told")
    napping = start(scenarios.naps, seconds=86_400)
    with CaptureQueriesContext(connection) as queries:
        ends.tell(reload(napping), "cancelled")
    assert len(queries) == 1 + is_heard  # with the one of ``reload``

"""Celery's ``revoke`` of a task id: a cancel, which an operator's retry takes back."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, group
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult, GroupResult

from conductor_app import ChildCancelled, api
from conductor_app.models import Execution, FailedExecution
from project.celery import app
from tests.app import canvas, scenarios, stops
from tests.app.ledger import count, note
from tests.support import results
from tests.support.polling import wait_until

PATIENCE = 60


def status(published: Any) -> str:
    return str(Execution.objects.get(pk=published.id).status)


@results.needs_broker
def test_revoking_cancels_what_is_queued_waiting_or_running(worker: Any) -> None:
    worker(concurrency=4)
    queued = scenarios.echo.apply_async((1,), countdown=3_600)
    napping = scenarios.naps.delay(86_400)
    parent = scenarios.waits_for_checkpoints.delay(seconds=90, timeout=80)
    polite = scenarios.slow.delay(seconds=90, checkpoints=True)
    deaf = scenarios.slow.delay(seconds=90)
    both = group(canvas.wait_for_ever.s(), canvas.wait_for_ever.s()).apply_async()
    wait_until(lambda: [status(one) for one in (napping, parent, *both.results)] == ["waiting"] * 4)
    child = Execution.objects.get(parent_id=parent.id)
    wait_until(lambda: all(count("body", one) for one in (polite.id, deaf.id, child.pk)))
    assert status(queued) == "queued"

    app.control.revoke([queued.id, napping.id, str(child.pk)])
    polite.revoke()
    both.revoke()
    app.control.revoke(deaf.id, terminate=True)
    app.control.revoke("no-such-task")
    for revoked in (queued, napping, polite, deaf, *both.results):
        with pytest.raises(TaskRevokedError):
            revoked.get(timeout=PATIENCE)
        wait_until(lambda: status(revoked) == "cancelled")  # noqa: B023 - called at once
    with pytest.raises(ChildCancelled, match="revoked through Celery"):
        parent.get(timeout=PATIENCE)
    assert Execution.objects.get(pk=napping.id).error_message == "Cancelled: revoked through Celery"
    results.settled()
    assert count("slow-end") == 0

    # Workers remember a revoked id for hours. That does not keep the execution from running now.
    api.retry(queued)
    api.retry(deaf)
    assert api.get_result(queued, timeout=PATIENCE) == 1
    wait_until(lambda: count("body", deaf.id) == 2)
    assert status(deaf) == "running"
    app.control.revoke(deaf.id, terminate=True, signal="KILL")
    wait_until(lambda: status(deaf) == "cancelled")


#: The ways of Celery's that name task ids.
BY_ID: dict[str, Any] = {
    "control.revoke": app.control.revoke,
    "control.revoke(terminate=True)": lambda ids: app.control.revoke(ids, terminate=True),
    "control.revoke(terminate=True, signal=SIGKILL)": lambda ids: app.control.revoke(
        ids, terminate=True, signal="SIGKILL"
    ),
    "control.terminate": app.control.terminate,
    # What `celery control terminate SIGTERM <id>` sends.
    "the command terminate": lambda ids: app.control.broadcast(
        "terminate", arguments={"signal": "SIGTERM", "task_id": ids}, reply=True
    ),
    "AsyncResult.revoke": lambda ids: [AsyncResult(one).revoke() for one in ids],
    "AsyncResult.revoke(terminate=True)": lambda ids: [AsyncResult(one).revoke(terminate=True) for one in ids],
    "GroupResult.revoke(terminate=True)": lambda ids: GroupResult("g", [AsyncResult(one) for one in ids]).revoke(
        terminate=True
    ),
}


@results.needs_broker
@pytest.mark.parametrize("way", BY_ID)
def test_every_way_to_revoke_or_terminate_is_a_cancel(worker: Any, way: str) -> None:
    worker(concurrency=5)
    queued = stops.returns_when_told.apply_async(countdown=3_600)
    napping = scenarios.naps.delay(86_400)
    running = stops.returns_when_told.delay()
    handing_off = scenarios.waits_for_slow.delay(seconds=90)
    with_plain = stops.waits_for_plain.delay()
    wait_until(lambda: [status(one) for one in (napping, handing_off, with_plain)] == ["waiting"] * 3, 40)
    handed_off, plain = (Execution.objects.get(parent_id=one.id) for one in (handing_off, with_plain))
    wait_until(lambda: all(count("body", one) for one in (running.id, handed_off.pk, plain.pk)), 40)
    ids = [queued.id, napping.id, running.id, str(handed_off.pk), str(plain.pk)]

    BY_ID[way](ids)
    rows = Execution.objects.filter(pk__in=ids)
    if "terminate" not in way:
        wait_until(lambda: rows.filter(cancel_requested_at__isnull=False).count() == 5, 40)
        note(None, "go")  # what is not killed ends by itself
    # What makes no `ctx` call and is not killed runs on.
    expected = 4 if "terminate" not in way else 5
    wait_until(
        lambda: rows.filter(status="cancelled").count() >= expected, 60, message=lambda: str(rows.values("status"))
    )
    if "terminate" in way:
        assert count("end") == count("slow-end") == 0
    assert not FailedExecution.objects.filter(pk__in=ids).exists()

    # Neither is it run again, nor does any worker's memory keep a retry from it.
    note(None, "go")
    settled = [str(row) for row in rows.filter(status="cancelled").values_list("pk", flat=True)]
    for one in (queued, running):
        if str(one.id) in settled:
            kept = Execution.objects.get(pk=one.id).result is not None
            assert count("body", one.id) == (one is running)
            api.retry(one)
            assert api.get_result(one, timeout=PATIENCE) == "done"
            assert count("body", one.id) == 1 + (one is running and not kept)
    wait_until(lambda: Execution.objects.get(pk=with_plain.id).is_final, 40)
    api.retry(with_plain)
    assert api.get_result(with_plain, timeout=PATIENCE) == "done"


@results.needs_broker
@pytest.mark.parametrize("terminate", [False, True])
@pytest.mark.parametrize("headers", [{"batch": "b-1"}, {"batch": ["b-0", "b-1"]}, ["batch=b-1"]], ids=str)
def test_what_bears_a_revoked_stamp_is_cancelled(worker: Any, headers: Any, terminate: bool) -> None:
    worker(concurrency=3)

    def start(task: Any, stamp: str, *args: Any, **options: Any) -> Any:
        signature = task.s(*args)
        signature.stamp(batch=stamp)
        return signature.apply_async(**options)

    queued = start(stops.returns_when_told, "b-1", countdown=3_600)
    napping = start(scenarios.naps, "b-1", 86_400)
    running = start(stops.returns_when_told, "b-1")
    other = start(stops.returns_when_told, "b-2")
    wait_until(lambda: status(napping) == "waiting" and count("body", running.id) and count("body", other.id), 40)
    app.control.broadcast(
        "revoke_by_stamped_headers", arguments={"headers": headers, "terminate": terminate}, reply=True
    )
    wait_until(lambda: [status(one) for one in (queued, napping)] == ["cancelled"] * 2, 40)
    if terminate:
        wait_until(lambda: status(running) == "cancelled", 40)
        assert count("end", running.id) == 0
    note(None, "go")
    wait_until(lambda: status(running) == "cancelled", 40)
    assert api.get_result(other, timeout=40) == "done"
    api.retry(queued)
    api.retry(running)
    assert [api.get_result(one, timeout=PATIENCE) for one in (queued, running)] == ["done"] * 2


@results.needs_broker
@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_terminating_where_nothing_can_be_killed_cancels_all_the_same(worker: Any, pool: str) -> None:
    started = worker(pool=pool, concurrency=1)
    walking = stops.walks.delay(steps=600)
    wait_until(lambda: count("step-1"), 40)
    if pool == "solo":
        # Its only thread runs the body, and hears of nothing meanwhile; another worker does, when it listens.
        worker(concurrency=1)
        wait_until(lambda: app.control.ping(timeout=1), 20)
    app.control.broadcast("terminate", arguments={"signal": "SIGTERM", "task_id": walking.id})
    wait_until(lambda: status(walking) == "cancelled", 40, message=started.log_tail)
    assert api.get_result(scenarios.echo.delay(1), timeout=40) == 1
    api.retry(walking)
    wait_until(lambda: count("body", walking.id) == 2, 40)


@results.needs_broker
def test_a_worker_that_hears_a_revoke_late_does_not_undo_the_retry(worker: Any) -> None:
    deaf = worker(pool="solo", concurrency=1)
    running = stops.returns_when_told.delay()
    wait_until(lambda: count("body", running.id), 40)
    worker(concurrency=1)
    napping = scenarios.naps.delay(86_400)
    wait_until(lambda: status(napping) == "waiting", 40)
    app.control.revoke(napping.id)
    wait_until(lambda: status(napping) == "cancelled", 40)
    api.retry(napping)
    wait_until(lambda: status(napping) == "waiting", 40)
    note(None, "go")
    wait_until(lambda: f"revoke of execution {napping.id} was heard too late" in deaf.log, 40)
    assert status(napping) == "waiting"


@results.needs_broker
def test_a_foreign_message_that_was_revoked_before_it_became_an_execution_never_does(worker: Any) -> None:
    started = worker(concurrency=1)
    running = stops.returns_when_told.delay()
    wait_until(lambda: count("body", running.id), 40)
    foreign = app.send_task(scenarios.echo.name, (1,))
    wait_until(lambda: app.control.inspect(timeout=2).reserved() and foreign.id in started.log, 40)
    app.control.revoke(foreign.id)
    wait_until(lambda: "flagged as revoked" in started.log, 40)
    note(None, "go")
    assert api.get_result(running, timeout=40) == "done"
    assert api.get_result(scenarios.echo.delay(2), timeout=40) == 2
    assert count("body", foreign.id) == 0


@results.needs_broker
def test_the_tail_of_a_chain_that_was_revoked_before_it_existed_is_cancelled(worker: Any) -> None:
    worker(concurrency=1)
    tail = chain(stops.returns_when_told.si(), canvas.collect.s(key="collected")).apply_async()
    stamped = canvas.collect.s(key="collected")
    stamped.stamp(batch="b-1")
    wait_until(lambda: count("body", tail.parent.id), 40)
    tail.revoke()
    app.control.broadcast("revoke_by_stamped_headers", arguments={"headers": {"batch": "b-1"}}, reply=True)
    by_stamp = stamped.delay(1)
    note(None, "go")
    for revoked in (tail, by_stamp):
        wait_until(lambda: Execution.objects.filter(pk=revoked.id, status="cancelled").exists(), 40)  # noqa: B023
        with pytest.raises(TaskRevokedError):
            revoked.get(timeout=PATIENCE)
    assert api.get_result(tail.parent, timeout=PATIENCE) == "done"
    api.retry(tail)
    assert api.get_result(tail, timeout=PATIENCE) == "done"
    assert count("collected") == 1

"""Celery's ``revoke`` of a task id: a cancel, which an operator's retry takes back."""

from __future__ import annotations

from typing import Any

import pytest
from celery import group
from celery.exceptions import TaskRevokedError

from conductor_app import ChildCancelled, api
from conductor_app.models import Execution
from project.celery import app
from tests.app import canvas, scenarios
from tests.app.ledger import count
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

"""What an operator does not want to wait for: wake, publish again, rerun."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from django.db import transaction

from conductor_app import api, transitions
from conductor_app.exceptions import ActionRefused, IdempotencyConflict, InvalidArgument, RetryRefused
from conductor_app.host import inline
from conductor_app.models import Execution, Step
from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.transitions import steps
from conductor_app.values.payloads import dump_options
from project.celery import app
from tests.app import scenarios
from tests.support import executions
from tests.support.executions import FAILURE, claimed, fresh, napping, queued, running
from tests.support.process import NotingBroker, note_published

pytestmark = pytest.mark.django_db


@pytest.fixture
def published() -> list[uuid.UUID]:
    """Ids of the executions whose messages were published; there is no broker."""
    return note_published()


# ---------------------------------------------------------------------------------------------------------------- wake


def test_a_sleeper_goes_on_at_once(published: list[uuid.UUID], django_capture_on_commit_callbacks: Any) -> None:
    asleep = napping(3_600)
    with django_capture_on_commit_callbacks(execute=True):
        api.wake(asleep)
    assert published == [asleep.pk]
    step = Step.objects.get(execution=asleep)
    assert (step.status, fresh(asleep).status) == (StepStatus.SUCCEEDED, ExecutionStatus.QUEUED)
    assert executions.claimed(asleep).attempt == 1


@pytest.mark.parametrize("arrange", ["scheduled", "retrying"])
def test_what_is_queued_for_later_is_due_now(
    arrange: str, published: list[uuid.UUID], django_capture_on_commit_callbacks: Any
) -> None:
    if arrange == "scheduled":
        later = queued(countdown=3_600)
    else:
        later = running()
        transitions.retry_later(later, FAILURE, 3_600)
    assert transitions.claim(later.pk, executions.OWNER) is None
    with django_capture_on_commit_callbacks(execute=True):
        api.wake(later)
    assert published == [later.pk]
    assert executions.claimed(later).attempt == (1 if arrange == "scheduled" else 2)


def test_a_body_that_is_woken_does_not_sleep_again() -> None:
    result = scenarios.naps.delay(seconds=3_600)
    inline.run_until_idle(app)
    assert fresh(api.find(result)).status == ExecutionStatus.WAITING
    api.wake(result)
    inline.run_until_idle(app)
    assert fresh(api.find(result)).status == ExecutionStatus.SUCCEEDED


def test_what_waits_for_no_instant_is_not_woken(published: list[uuid.UUID]) -> None:
    parent, child = executions.family()
    ended = running()
    transitions.fail(ended, FAILURE)
    due, _parent = queued(), executions.mapping(2, max_parallel=1)
    held = Execution.objects.get(due_at__isnull=True, status=ExecutionStatus.QUEUED)
    cancelled = queued(countdown=100)
    Execution.objects.filter(pk=cancelled.pk).update(cancel_requested_at=clock.now())
    # Claimed just before the database's clock was set back.
    early = running()
    Execution.objects.filter(pk=early.pk).update(due_at=clock.after(100))
    before = list(Execution.objects.order_by("pk").values())
    for execution, why in [
        (early, "is running"),
        (parent, "waits for a child or an event, and not for an instant"),
        (child, "is running"),
        (ended, "is failed"),
        (due, "is queued and due already"),
        (held, "is held back until max_parallel of its map lets it go"),
        (cancelled, "is to be cancelled"),
    ]:
        with pytest.raises(ActionRefused) as refusal:
            api.wake(execution)
        assert str(refusal.value) == (
            f"Execution {execution.pk} {why}. Only one that sleeps, or is queued for later, can be woken."
        )
        assert refusal.value.is_elsewhere
    assert list(Execution.objects.order_by("pk").values()) == before
    with pytest.raises(Execution.DoesNotExist):
        api.wake(uuid.uuid4())


def test_a_sleep_that_ends_just_before_is_not_ended_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = napping()
    settle = steps.settle

    def settle_late(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(steps, "settle", settle)
        settle(asleep.pk, "nap", StepStatus.SUCCEEDED)
        return settle(*args, **kwargs)

    monkeypatch.setattr(steps, "settle", settle_late)
    with pytest.raises(ActionRefused):
        api.wake(asleep)


# -------------------------------------------------------------------------------------------------------- publish again


def test_a_due_execution_is_published_again_and_pauses_begin_anew(published: list[uuid.UUID]) -> None:
    due = queued()
    Execution.objects.filter(pk=due.pk).update(dispatches=7, dispatch_at=clock.after(3_600))
    assert api.publish_again(due) is True
    assert published == [due.pk]
    row = fresh(due)
    assert row.dispatches == 0
    assert (row.dispatch_at - row.created_at).total_seconds() < 60
    assert row.status == ExecutionStatus.QUEUED


def test_a_broker_that_is_away_is_told_of() -> None:
    process.worker.is_embedded = False
    process.broker = NotingBroker(is_away=True)
    assert api.publish_again(queued()) is False


def test_without_a_broker_the_workers_find_it() -> None:
    process.worker.is_embedded = True
    due = queued()
    Execution.objects.filter(pk=due.pk).update(dispatches=7, dispatch_at=clock.after(3_600))
    assert api.publish_again(due) is True
    assert due.pk in {row.pk for row in transitions.take_for_dispatch(10)}


def test_only_what_is_due_is_published_again(published: list[uuid.UUID]) -> None:
    later, run, flagged = queued(countdown=100), running(), queued()
    Execution.objects.filter(pk=flagged.pk).update(cancel_requested_at=clock.now())
    for execution in (later, run, flagged):
        with pytest.raises(ActionRefused, match=r"A message is published again for one that is queued and due\.$"):
            api.publish_again(execution)
    assert not published
    with pytest.raises(Execution.DoesNotExist):
        api.publish_again(uuid.uuid4())


# --------------------------------------------------------------------------------------------------------------- rerun


def test_a_rerun_is_a_new_root_with_nothing_done(published: list[uuid.UUID]) -> None:
    options = {"headers": {"tenant": "a"}, "time_limit": 9, "ignore_result": False, "announce": True}
    once = {"link": [{"task": "x"}], "chain": [{"task": "y"}], "group_id": "g", "celery_id": "c"}
    old = running(
        payload='[[7],{"a":1}]',
        queue="slow",
        priority=3,
        max_attempts=9,
        idempotency_key="order-7",
        expires=3_600,
        options=dump_options({**options, **once}),
    )
    transitions.succeed(old, "1")
    new = api.rerun(old.pk)
    row = fresh(new)
    assert row.pk != old.pk
    assert (row.root_id, row.parent_id, row.status, row.attempt, row.fence) == (row.pk, None, "queued", 1, 0)
    for name in ("task", "payload", "queue", "priority", "max_attempts"):
        assert getattr(row, name) == getattr(old, name), name
    assert (row.idempotency_key, row.deadline_at, row.result) == (None, None, None)
    assert row.get_options() == options
    assert fresh(old).status == ExecutionStatus.SUCCEEDED
    assert api.rerun(old).pk != new.pk


def test_a_rerun_with_a_key_is_made_once(published: list[uuid.UUID]) -> None:
    old = running()
    transitions.succeed(old, "1")
    first = api.rerun(old, idempotency_key="ticket-12")
    assert api.rerun(old.pk, idempotency_key="ticket-12").pk == first.pk
    assert api.rerun(old, idempotency_key="ticket-13").pk != first.pk
    assert fresh(first).idempotency_key == "ticket-12"
    with pytest.raises(InvalidArgument, match="idempotency_key must have 1–255 characters"):
        api.rerun(old, idempotency_key="")
    assert Execution.objects.count() == 3


def test_a_rerun_with_a_key_of_something_else_is_refused(published: list[uuid.UUID]) -> None:
    first, second = running(idempotency_key="order-1"), running(idempotency_key="order-2")
    for old in (first, second):
        transitions.succeed(old, "1")
    rerun = api.rerun(first, idempotency_key="ticket-12")
    for key, owner in (("order-1", first), ("order-2", second), ("ticket-12", rerun)):
        with pytest.raises(IdempotencyConflict) as refused:
            api.rerun(second, idempotency_key=key)
        assert str(refused.value) == (
            f"The idempotency key {key!r} belongs to execution {owner.pk} of {owner.task}, which is no rerun of "
            f"{second.pk}. Use another key."
        )
    assert Execution.objects.count() == 3
    # One of a rerun is made anew, and is none of the first.
    transitions.succeed(claimed(rerun), "1")
    assert "rerun_of" not in api.rerun(rerun).get_options()


@pytest.mark.parametrize("how", ["succeed", "fail", "cancel"])
def test_whatever_has_ended_can_be_run_again(how: str, published: list[uuid.UUID]) -> None:
    old = running()
    if how == "succeed":
        transitions.succeed(old, "1")
    elif how == "fail":
        transitions.fail(old, FAILURE)
    else:
        api.cancel(old)
        transitions.cancel_running(old)
    assert api.rerun(old).status == ExecutionStatus.QUEUED


def test_a_rerun_runs(published: list[uuid.UUID]) -> None:
    old = scenarios.boom.delay()
    inline.run_until_idle(app)
    new = api.rerun(old)
    inline.run_until_idle(app)
    assert fresh(new).status == ExecutionStatus.FAILED
    assert fresh(new).error_message == api.find(old).error_message


def test_a_rerun_joins_the_transaction(published: list[uuid.UUID]) -> None:
    old = running()
    transitions.fail(old, FAILURE)
    with transaction.atomic():
        api.rerun(old)
        transaction.set_rollback(True)
    assert Execution.objects.get() == old


def test_neither_open_ones_nor_children_are_run_again(published: list[uuid.UUID]) -> None:
    parent, child = executions.family()
    with pytest.raises(ActionRefused, match=r"is waiting\. Only one that has ended is run again as new; cancel it"):
        api.rerun(parent)
    transitions.succeed(child, "1")
    with pytest.raises(ActionRefused, match=f"is a child: run again alone, .* Rerun the root {parent.pk} instead"):
        api.rerun(child)
    assert Execution.objects.count() == 2


def test_a_refused_retry_is_a_refused_action(published: list[uuid.UUID]) -> None:
    with pytest.raises(ActionRefused) as refusal:
        api.retry(queued())
    assert isinstance(refusal.value, RetryRefused)
    assert (refusal.value.reason, refusal.value.is_elsewhere) == ("not failed or cancelled", True)

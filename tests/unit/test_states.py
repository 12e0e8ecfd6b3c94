"""The words for where an execution stands, and the moves between them."""

from __future__ import annotations

from conductor_app.models import Execution, Step
from conductor_app.states import (
    ALLOWED_MOVES,
    CELERY_STATES,
    FINAL_STATUSES,
    OPEN_STATUSES,
    ExecutionStatus,
    OnTimeout,
    StepKind,
    StepStatus,
)


def test_every_status_is_open_or_final() -> None:
    assert set(ExecutionStatus) == OPEN_STATUSES | FINAL_STATUSES
    assert not OPEN_STATUSES & FINAL_STATUSES


def test_the_words_are_the_ones_that_are_stored_and_shown() -> None:
    assert [status.value for status in ExecutionStatus] == [
        "queued",
        "running",
        "waiting",
        "succeeded",
        "failed",
        "cancelled",
    ]
    assert [status.value for status in StepStatus] == ["pending", "succeeded", "failed", "timed_out", "cancelled"]
    assert {"step", "invoke", "start", "map", "gather", "sleep", "event"} <= {kind.value for kind in StepKind}
    assert [choice.value for choice in OnTimeout] == ["cancel", "abandon"]
    choices = {name: dict(model._meta.get_field(name).flatchoices) for model in (Execution,) for name in ("status",)}
    assert list(choices["status"]) == [status.value for status in ExecutionStatus]
    assert list(dict(Step._meta.get_field("status").flatchoices)) == [status.value for status in StepStatus]
    assert list(dict(Step._meta.get_field("kind").flatchoices)) == [kind.value for kind in StepKind]


def test_a_final_status_is_left_by_an_operators_retry_alone() -> None:
    assert set(ALLOWED_MOVES) == set(ExecutionStatus)
    for status in FINAL_STATUSES:
        assert ALLOWED_MOVES[status] <= {ExecutionStatus.QUEUED, ExecutionStatus.WAITING, ExecutionStatus.SUCCEEDED}
    assert ExecutionStatus.SUCCEEDED not in ALLOWED_MOVES[ExecutionStatus.FAILED]
    assert ALLOWED_MOVES[ExecutionStatus.SUCCEEDED] == frozenset()


def test_an_execution_runs_only_after_it_was_queued_or_has_waited_and_succeeds_only_by_what_a_run_returned() -> None:
    into = {
        status: {before for before, after in ALLOWED_MOVES.items() if status in after} for status in ExecutionStatus
    }
    assert into[ExecutionStatus.RUNNING] == {ExecutionStatus.QUEUED, ExecutionStatus.WAITING}
    # A cancelled one may hold the result of a run.
    assert into[ExecutionStatus.SUCCEEDED] == {ExecutionStatus.RUNNING, ExecutionStatus.CANCELLED}
    assert into[ExecutionStatus.FAILED] == {ExecutionStatus.RUNNING}
    assert into[ExecutionStatus.CANCELLED] == OPEN_STATUSES


def test_celery_shows_each_status_as_a_state_of_its_own() -> None:
    assert set(CELERY_STATES) == set(ExecutionStatus)
    assert len(set(CELERY_STATES.values())) == len(ExecutionStatus)

"""What PostgreSQL may forget when it crashes: who runs an execution. Nothing that anybody has acted on is lost with it.

Claims, and suspensions that the same process goes on with, do not wait for the disk. Each test crashes a server that
writes nothing by itself for ten seconds, and looks whether it has forgotten; now and then it has not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from django.db import connections, transaction

from conductor_app import api, transitions
from conductor_app.engine import announcements, outcomes
from conductor_app.exceptions import LeaseLost
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus
from conductor_app.transitions.leases import Lease, renew
from conductor_app.values.payloads import dump_options
from project.celery import app
from tests.app import scenarios
from tests.support import invariants
from tests.support.executions import FAILURE, claimed, fresh, invocation, queued, step_of
from tests.support.polling import wait_until
from tests.support.postgres import PrivatePostgres
from tests.support.worker import pools

T = TypeVar("T")

PATIENCE = 60
TRIES = 10
ANOTHER = "test@host/2"


def crash(postgres: PrivatePostgres) -> None:
    postgres.crash()
    postgres.start()
    connections["default"].close()


def forgotten(postgres: PrivatePostgres, act: Callable[[], T], is_forgotten: Callable[[T], bool]) -> T:
    """Do something that the database forgets, and return what it was."""
    for _ in range(TRIES):
        done = act()
        crash(postgres)
        if is_forgotten(done):
            return done
    pytest.fail(f"The database has remembered it {TRIES} times.")


def claim_that_is_forgotten(postgres: PrivatePostgres) -> Execution:
    return forgotten(postgres, lambda: claimed(queued()), lambda run: fresh(run).status == "queued")


def test_a_forgotten_claim_is_repeated_and_its_run_can_write_no_more(postgres: PrivatePostgres) -> None:
    stale = claim_that_is_forgotten(postgres)
    row = fresh(stale)
    assert (row.fence, row.attempt, row.lease_owner, row.started_at) == (0, 1, "", None)
    assert row.dispatch_at is not None, "nobody would publish its message again"
    live = claimed(stale, ANOTHER)
    assert live.fence == stale.fence, "this is why the fence alone does not tell them apart"
    for write in (
        lambda: transitions.record_step(stale, "charge", result="1"),
        lambda: transitions.suspend(stale, invocation(stale)),
        lambda: transitions.succeed(stale, '"stale"'),
        lambda: transitions.retry_later(stale, FAILURE, 0),
        lambda: transitions.check_held(stale),
        lambda: transitions.release(stale),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert fresh(live).status == "running"
    transitions.succeed(live, '"live"')
    with pytest.raises(LeaseLost):
        transitions.succeed(stale, '"stale"')
    assert fresh(live).result == '"live"'


def test_the_heartbeat_of_a_forgotten_run_renews_nothing(postgres: PrivatePostgres) -> None:
    stale = claim_that_is_forgotten(postgres)
    lease = Lease(stale)
    claimed(stale, ANOTHER)
    renew([lease])
    assert lease.lost


@pytest.mark.parametrize(
    "fields", [{"max_attempts": 1}, {"expires": 600}], ids=["its last attempt", "may not begin later"]
)
def test_a_claim_that_may_not_be_repeated_is_not_forgotten(postgres: PrivatePostgres, fields: dict[str, Any]) -> None:
    run = claimed(queued(**fields))
    crash(postgres)
    assert (fresh(run).status, fresh(run).fence) == ("running", 1)


def hand_off_of(parent: Execution) -> transitions.HandOff:
    return transitions.HandOff(parent.lease_owner, lambda _: True)


def told() -> Execution:
    """A running execution of whose end Celery is to be told."""
    return claimed(queued(max_attempts=1, options=dump_options({"announce": True, "ignore_result": False})))


def announce(run: Execution) -> None:
    announcements.tell(run, outcomes.Outcome(ExecutionStatus.SUCCEEDED, 1))


@pytest.mark.parametrize(
    "act",
    [
        lambda: claimed(queued()),
        lambda: (
            (parent := claimed(queued()))
            and transitions.suspend(parent, invocation(parent), hand_off=hand_off_of(parent))
        ),
        lambda: (
            (parent := claimed(queued()))
            and transitions.suspend(
                parent, invocation(parent), before_commit=lambda: None, hand_off=hand_off_of(parent)
            )
        ),
        lambda: (run := told()) and (transitions.succeed(run, "1"), announce(run)),
    ],
    ids=["claim", "suspend", "suspend and show it", "announce"],
)
def test_what_may_be_forgotten_takes_nothing_of_its_transaction_with_it(
    postgres: PrivatePostgres, act: Callable[[], object]
) -> None:
    run = claimed(queued(max_attempts=1))
    with transaction.atomic():
        transitions.succeed(run, "1")
        act()
    crash(postgres)
    assert fresh(run).status == "succeeded"


def test_an_announcement_that_is_forgotten_is_repeated(postgres: PrivatePostgres) -> None:
    def tell() -> Execution:
        run = told()
        transitions.succeed(run, "1")
        announce(run)
        assert app.AsyncResult(str(run.pk)).state == "SUCCESS"
        return run

    run = forgotten(postgres, tell, lambda run: fresh(run).announce_at is not None)
    assert (fresh(run).status, app.AsyncResult(str(run.pk)).state) == ("succeeded", "PENDING")
    announce(run)
    assert (fresh(run).announce_at, app.AsyncResult(str(run.pk)).state) == (None, "SUCCESS")


def test_outcomes_and_suspensions_that_others_go_on_with_are_not_forgotten(postgres: PrivatePostgres) -> None:
    run = claimed(queued())
    transitions.record_step(run, "charge", result="1")
    crash(postgres)
    assert step_of(run, "charge").result == "1"
    transitions.suspend(run, invocation(run))
    crash(postgres)
    assert (fresh(run).status, step_of(run).status) == ("waiting", "pending")
    done = claimed(Execution.objects.get(parent=run))
    transitions.succeed(done, "1")
    crash(postgres)
    assert (fresh(done).status, fresh(run).status) == ("succeeded", "queued")


@pytest.mark.parametrize("parent_attempts", [4, 1], ids=["", "the parent's last attempt"])
@pytest.mark.parametrize("child_attempts", [4, 1], ids=["", "the child's last attempt"])
@pytest.mark.parametrize("show", [None, lambda: None], ids=["", "shown"])
def test_a_handed_off_suspension_is_forgotten_only_where_it_costs_no_attempt(
    postgres: PrivatePostgres, parent_attempts: int, child_attempts: int, show: Callable[[], None] | None
) -> None:
    def suspend() -> Execution:
        parent = claimed(queued(max_attempts=parent_attempts))
        queued()  # a commit that waits: the claim is on the disk
        wait, offer = invocation(parent, max_attempts=child_attempts), hand_off_of(parent)
        assert transitions.suspend(parent, wait, before_commit=show, hand_off=offer)
        assert offer.claimed is not None
        return parent

    def is_forgotten(parent: Execution) -> bool:
        return fresh(parent).status == "running" and not parent.children.exists()

    if parent_attempts == child_attempts == 4:
        forgotten(postgres, suspend, is_forgotten)
    else:
        parent = suspend()
        crash(postgres)
        assert (fresh(parent).status, step_of(parent).status) == ("waiting", "pending")


# ------------------------------------------------------------------------------------------------------- with a worker


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """Where bodies leave a file each time they begin: a row would put on the disk what is to be forgotten."""
    directory = tmp_path / "marks"
    directory.mkdir()
    return directory


def begun(marks: Path, number: int = 1) -> None:
    wait_until(lambda: len(list(marks.iterdir())) >= number, message=f"The body has not begun {number} times")


def of(result: Any) -> Execution:
    return Execution.objects.get(pk=result.id)


def wipe(marks: Path) -> None:
    """Remove what the bodies of an earlier try have left, when all of them have ended."""
    end_of(marks).touch()
    wait_until(lambda: not Execution.objects.open().exists(), message="An earlier try has not ended")
    for mark in (*marks.iterdir(), end_of(marks)):
        mark.unlink()


def end_of(marks: Path) -> Path:
    """The file that ends a body which dawdles."""
    return marks.with_name("end")


@pools
@pytest.mark.parametrize(
    ("seconds", "heartbeat"), [(2, 10), (PATIENCE, 2)], ids=["at the child's end", "at its heartbeat"]
)
@pytest.mark.parametrize("parent", [scenarios.waits_for_dawdler, scenarios.waits_for_one_that_waits])
def test_a_parent_whose_suspension_is_forgotten_runs_again_at_no_cost(
    worker: Any, postgres: PrivatePostgres, marks: Path, pool: str, seconds: float, heartbeat: float, parent: Any
) -> None:
    # Longer than a test is patient: that its lease has run out is not how it comes back.
    settings = {"LEASE_SECONDS": 2 * PATIENCE, "HEARTBEAT_SECONDS": heartbeat}
    started = worker(pool=pool, concurrency=1, env={"DATABASE_URL": postgres.url}, conductor=settings)

    def run() -> Any:
        wipe(marks)
        # One whose suspension Celery is not told of: that would be another commit.
        call = {"seconds": seconds, "marks": str(marks)}
        result = parent.apply_async(kwargs=call, ignore_result=True)
        begun(marks)
        return result

    def is_forgotten(result: Any) -> bool:
        # One suspension is enough: whatever is stored in between may have taken the outer one to the disk.
        parents = Execution.objects.filter(root_id=result.id).exclude(task=scenarios.dawdles.name)
        return parents.filter(status="running").exists()

    result = forgotten(postgres, run, is_forgotten)
    if seconds == PATIENCE:
        # The child's body goes on, and its process has no time for a parent; but it hears that it has lost the child.
        wait_until(lambda: not is_forgotten(result), message="The heartbeat has not put the parent back")
        end_of(marks).touch()
    assert api.get_result(result, timeout=PATIENCE) == 2
    assert {(execution.status, execution.attempt) for execution in Execution.objects.all()} == {("succeeded", 1)}
    assert "the database has forgotten its suspension" in started.log
    invariants.check()


def test_two_runs_of_one_execution_in_one_process_never_hold_it_by_the_same_fence(
    worker: Any, postgres: PrivatePostgres, marks: Path
) -> None:
    worker(pool="threads", concurrency=2, env={"DATABASE_URL": postgres.url}, conductor={"LEASE_SECONDS": 60})

    def run() -> Any:
        wipe(marks)
        result = scenarios.dawdles.delay(seconds=8, marks=str(marks))
        begun(marks)
        return result

    result = forgotten(postgres, run, lambda result: of(result).status == "queued")
    begun(marks, 2)
    assert api.get_result(result, timeout=PATIENCE) == 2
    assert (of(result).fence, of(result).attempt) == (2, 1)

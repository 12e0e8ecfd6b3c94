"""A lease is renewed while its body runs, and the body's process learns when it is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext

from conductor_app import transitions
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.transitions import leases
from conductor_app.transitions.leases import Lease, LeaseKeeper, renew
from tests.support.executions import OWNER, claimed, committing, fresh, running
from tests.support.polling import wait_until
from tests.support.process import NotingBroker


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's. The heartbeat's thread sees only what is committed."""
    with committing(django_db_blocker):
        yield


@pytest.fixture(autouse=True)
def broker() -> None:
    """Nobody listens, so nothing is published."""
    process.broker = NotingBroker()


@pytest.fixture
def keeper(settings: Any) -> LeaseKeeper:
    """A keeper with a quick heartbeat."""
    settings.CONDUCTOR = {**settings.CONDUCTOR, "HEARTBEAT_SECONDS": 0.02}
    return LeaseKeeper()


def lapse(execution: Execution) -> None:
    Execution.objects.filter(pk=execution.pk).update(lease_expires_at=clock.after(-1))


def seconds_left(execution: Execution) -> float:
    expires_at = fresh(execution).lease_expires_at
    assert expires_at is not None
    return (expires_at - clock.read("default")).total_seconds()


def test_the_lease_is_renewed_as_long_as_it_is_held(keeper: LeaseKeeper) -> None:
    run = running()
    with keeper.hold(run) as lease:
        for _ in range(2):
            lapse(run)
            wait_until(lambda: seconds_left(run) > 0, message="The lease was not renewed")
        assert not lease.lost
        assert not lease.cancel_requested
    other = running()
    with keeper.hold(other):
        for _ in range(2):  # the first renewal may have begun before ``run`` was let go
            lapse(other)
            lapse(run)
            wait_until(lambda: seconds_left(other) > 0)
        assert seconds_left(run) < 0, "it is not held any more"


def test_a_short_run_writes_no_heartbeat(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "HEARTBEAT_SECONDS": 20, "LEASE_SECONDS": 60}
    renewed: list[Any] = []
    monkeypatch.setattr(leases, "renew", renewed.extend)
    keeper, run = LeaseKeeper(), running()
    for _ in range(3):
        with keeper.hold(run):
            assert renewed == []
    assert renewed == []


def test_a_lost_lease_is_noticed(keeper: LeaseKeeper) -> None:
    run = running()
    with keeper.hold(run) as lease:
        transitions.lose(run.pk, owner=OWNER)
        claimed(run, "test@host/2")
        wait_until(lambda: lease.lost, message="The loss was not noticed")
        assert fresh(run).lease_owner == "test@host/2"


def test_a_requested_cancel_is_noticed_and_so_is_its_withdrawal(keeper: LeaseKeeper) -> None:
    run = running()
    with keeper.hold(run) as lease:
        transitions.request_cancel(run.pk, "enough")
        wait_until(lambda: lease.cancel_requested, message="The cancel was not noticed")
        Execution.objects.filter(pk=run.pk).update(cancel_requested_at=None)
        wait_until(lambda: not lease.cancel_requested, message="The withdrawal was not noticed")
        assert not lease.lost


def test_the_heartbeat_outlives_a_failing_database(
    keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[int] = []

    def fail_three_times(held: list[Lease]) -> None:
        if len(failures) < 3:
            failures.append(len(held))
            raise OperationalError("the database is away")
        renew(held)

    monkeypatch.setattr(leases, "renew", fail_three_times)
    run = running()
    lapse(run)
    with keeper.hold(run) as lease:
        wait_until(lambda: seconds_left(run) > 0, message="The lease was not renewed after the outage")
        assert not lease.lost
    assert failures == [1, 1, 1]
    assert "Heartbeat of 1 executions failed: the database is away" in caplog.text


def test_many_leases_are_renewed_in_one_transaction() -> None:
    held = [Lease(running()) for _ in range(3)]
    with CaptureQueriesContext(connection) as captured:
        assert renew(held) == []
    assert [query["sql"].split()[0] for query in captured] == ["BEGIN", "SELECT", "UPDATE", "COMMIT"]
    assert [lease.lost for lease in held] == [False, False, False]


def test_one_that_is_lost_is_found_among_many() -> None:
    runs = [running() for _ in range(3)]
    lost = running()
    transitions.lose(lost.pk, owner=OWNER)
    held = [Lease(run) for run in (*runs, lost)]
    assert renew(held) == []
    assert [lease.lost for lease in held] == [False, False, False, True]
    assert fresh(lost).lease_expires_at is None


@pytest.mark.parametrize("owner", [OWNER, "test@host/2"], ids=["in the same process", "in another one"])
def test_an_old_fence_renews_nothing(owner: str) -> None:
    zombie = running()
    transitions.lose(zombie.pk, owner=OWNER)
    live = claimed(zombie, owner)
    lapse(live)
    lease = Lease(zombie)
    renew([lease])
    assert lease.lost
    assert seconds_left(live) < 0


def test_two_runs_of_one_execution_in_one_process_are_told_apart() -> None:
    """As in the threads pool: the old run's thread goes on while another thread has claimed the execution again."""
    zombie = running()
    transitions.lose(zombie.pk, owner=OWNER)
    live = claimed(zombie)
    held = [Lease(zombie), Lease(live)]
    renew(held)
    assert [lease.lost for lease in held] == [True, False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_starts_without_its_parents_leases() -> None:
    """It keeps none of them alive, and its own first lease starts a thread of its own."""
    run, kept = running(), process.keeper
    assert isinstance(kept, LeaseKeeper)
    with kept.hold(run):
        assert kept._thread is not None
        pid = os.fork()
        if pid == 0:
            clean = not kept._held and kept._thread is None and kept._changed.acquire(False)
            os._exit(0 if clean else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(kept._held) == 1

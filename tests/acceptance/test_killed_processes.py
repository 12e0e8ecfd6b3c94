"""Processes that die, freeze or shut down lose nothing, whatever they were doing."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import states

from conductor_app import api
from conductor_app.exceptions import ExecutionFailed, WorkerLost
from conductor_app.models import Execution, FailedExecution, Step
from tests.app import crashes, scenarios
from tests.app.ledger import count, note
from tests.support import invariants
from tests.support.polling import wait_until
from tests.support.watching import frozen, only, wait_for_body, wait_for_status
from tests.support.worker import pools

pytestmark = pytest.mark.usefixtures("recorded")

#: Far longer than a test: only the report of a process's death can bring its executions back.
LONG_LEASE = {"LEASE_SECONDS": 600}
#: What psycopg and PyMySQL say.
CONNECT_TIMED_OUT = r"timeout expired|timed out"


def test_a_killed_pool_process_costs_its_child_one_attempt_and_the_parent_none(worker: Any) -> None:
    started = worker(pool="prefork", conductor=LONG_LEASE)
    result = scenarios.waits_for_lingerer.delay(seconds=300)
    started.kill_pool_process(wait_for_body(scenarios.lingers).pid)
    seen = set()
    wait_until(lambda: seen.add(result.state) or only(scenarios.waits_for_lingerer).is_final, timeout=40)
    assert result.get(timeout=20) == {"attempt": 2}
    assert states.FAILURE not in seen
    assert count("body", result.id) == 2
    assert count("body", only(scenarios.lingers).pk) == 2
    assert (only(scenarios.lingers).attempt, only(scenarios.waits_for_lingerer).attempt) == (2, 1)
    invariants.check(started)


def test_a_process_that_dies_before_or_after_a_commit_loses_nothing(worker: Any) -> None:
    """Before a commit the run counts for nothing and costs an attempt; after it, only the message is to be replaced."""
    cases = [*((runs, [""]) for runs in _RUNS), ([""], ["before"]), ([""], ["after"])]
    started = worker(pool="prefork", concurrency=6, conductor={**LONG_LEASE, "REDISPATCH_SECONDS": 0.5})
    results = [scenarios.dies_at_commit.delay(runs=runs, child_runs=child_runs) for runs, child_runs in cases]
    for (runs, child_runs), result in zip(cases, results, strict=True):
        died_before = runs.count("before")
        expected = {"attempt": 1 + died_before, "child": 1 + child_runs.count("before")}
        assert api.get_result(result, timeout=60) == expected
        assert count("body", result.id) == 2 + died_before
    invariants.check(started, timeout=60)
    assert {result.state for result in results} == {states.SUCCESS}


#: Trees whose points are few enough to be visited one by one, and what they return.
PROGRAMS: dict[Any, Any] = {crashes.mapping: 6, crashes.gathering: 6, crashes.waiting: [3, "second", 6]}
#: Trees that are under way at the same time.
TREES_AT_ONCE = 12


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_process_may_die_at_any_point_of_a_program(worker: Any, tmp_path: Path, program: Any) -> None:
    """Before and after everything that is committed, one after another, as many as there are."""
    started = worker(
        pool="prefork",
        concurrency=6,
        conductor={**LONG_LEASE, "REDISPATCH_SECONDS": 0.5, "SWEEP_SECONDS": 0.5},
        env={crashes.DIRECTORY: str(tmp_path)},
    )

    def begin(point: int) -> Any:
        result = crashes.start(program, tmp_path, point)
        if program is crashes.waiting:
            api.send_event(result.id, "item", 3)
            api.send_event(result.id, "item", "second")
        return result

    undisturbed = begin(0)
    assert api.get_result(undisturbed, timeout=30) == PROGRAMS[program]
    wait_until(lambda: not invariants.unsettled(), 20)
    number = crashes.points(tmp_path, undisturbed.id)
    assert number > 15, "The points are not counted"
    deaths = 0
    for first in range(1, number + 1, TREES_AT_ONCE):
        trees = {point: begin(point) for point in range(first, min(first + TREES_AT_ONCE, number + 1))}
        for point, tree in trees.items():
            where = f"{point}: {crashes.died_at(tmp_path, tree.id)}"
            assert api.get_result(tree, timeout=60) == PROGRAMS[program], where
            attempts = Execution.objects.filter(root_id=tree.id).values_list("attempt", flat=True)
            assert sum(attempts) <= len(attempts) + 1, where
        # The last points are those of a process that tells Celery of the end.
        wait_until(lambda: not invariants.unsettled(), 30)
        for point, tree in trees.items():
            # A tree passes fewer points when two children end together, or the sweeper tells Celery of an end.
            assert crashes.died_at(tmp_path, tree.id) or crashes.points(tmp_path, tree.id) < point
            deaths += bool(crashes.died_at(tmp_path, tree.id))
    # How many points a tree passes varies with who is first; most of them have to be visited all the same.
    assert deaths > 0.5 * number
    # Celery shows the deaths of plain tasks with two tracebacks each.
    invariants.check(started, timeout=60, tracebacks=lambda log: 2 * log.count("raised error: WorkerLostError"))
    for leaf in Execution.objects.filter(task=crashes.leaf.name):
        assert count("inside", leaf.pk) == 1


#: How the runs of one execution end: the first suspends it or ends it, the last ends it.
_RUNS: list[list[str]] = [["before"], ["after"], ["", "before"], ["", "after"]]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGQUIT], ids=["power cut", "cold shutdown"])
def test_a_worker_that_ends_at_once_is_replaced_by_another_one(worker: Any, signum: int) -> None:
    # Killed by its own worker, a body is queued again at no cost, and lingers once more.
    is_release = signum == signal.SIGQUIT
    first = worker(pool="prefork", concurrency=1)
    napping = scenarios.naps.delay(seconds=1)
    wait_for_status(napping, "waiting")
    waiting = scenarios.waits_for_lingerer.delay(seconds=10 if is_release else 300)
    wait_for_body(scenarios.lingers)
    queued = scenarios.pass_through.delay(value="queued")
    os.killpg(first.pid, signum) if signum == signal.SIGKILL else first.signal(signum)
    wait_until(lambda: not first.is_alive, timeout=40, message="The worker did not end")
    second = worker(pool="prefork", concurrency=1)
    assert api.get_result(waiting, timeout=60) == {"attempt": 1 if is_release else 2}
    assert api.get_result(queued, timeout=20) == "queued"
    assert api.get_result(napping, timeout=20) == "rested"
    assert only(scenarios.waits_for_lingerer).attempt == 1
    assert count("late") == is_release
    invariants.check(second)


def test_idle_processes_that_are_killed_take_nothing_with_them(worker: Any) -> None:
    """One of them waits for the pool's next message, and holds what guards it from the others."""
    started = worker(pool="prefork", concurrency=3)
    # Celery ends a worker of which a process dies before its event loop has begun.
    assert api.get_result(scenarios.pass_through.delay(value=0), timeout=40) == 0
    for round_number in range(3):
        for pid in started.pool_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        results = [scenarios.pass_through.delay(value=number) for number in range(4)]
        assert [api.get_result(result, timeout=40) for result in results] == [0, 1, 2, 3], round_number
    invariants.check(started)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_wakes_up_after_its_lease_has_lapsed_writes_nothing(worker: Any, pool: str) -> None:
    zombie = worker(pool=pool)
    result = scenarios.waits_for_lingerer.delay(seconds=1)
    wait_for_body(scenarios.lingers)
    with frozen(zombie):
        second = worker(pool=pool)
        assert api.get_result(result, timeout=40) == {"attempt": 2}
        child = only(scenarios.lingers)
    wait_until(lambda: count("late", child.pk), message="The zombie's body did not go on")
    wait_until(lambda: "its lease is lost" in zombie.log, message="The zombie did not notice")
    child.refresh_from_db()
    assert (child.get_result(), child.fence) == (2, 2)
    second.kill()
    assert api.get_result(scenarios.pass_through.delay(value="alive"), timeout=30) == "alive"
    # It may have been frozen while it connected.
    invariants.check(zombie, second, excused=CONNECT_TIMED_OUT)


def test_a_worker_that_slept_through_its_leases_does_not_take_them_from_itself(worker: Any) -> None:
    """As on a laptop whose lid was closed: every lease has lapsed, although the bodies still run."""
    # Half a lease is what the processes have to renew it in, on a machine that may have other work.
    started = worker(pool="prefork", concurrency=2, conductor={"LEASE_SECONDS": 6})
    napping = scenarios.naps.delay(seconds=1)
    wait_for_status(napping, "waiting")
    results = [scenarios.has_one_attempt.delay(seconds=1) for _ in range(2)]
    wait_for_body(scenarios.has_one_attempt, number=2)
    with frozen(started):
        running = Execution.objects.filter(status="running")
        assert running.count() == 2
        wait_until(lambda: running.lapsed().count() == 2, message="The leases did not lapse")
        # The sweeper wakes up before the processes that run the bodies, and sweeps once.
        started.signal(signal.SIGCONT)
        wait_until(lambda: not Step.objects.filter(status="pending").exists(), message="The sweeper did not wake up")
    for result in results:
        assert api.get_result(result, timeout=30) == "done"
    assert api.get_result(napping, timeout=30) == "rested"
    # It may have been about to connect when it was frozen.
    invariants.check(started, excused=CONNECT_TIMED_OUT)


def test_a_body_that_always_kills_its_process_ends_as_a_failed_execution(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=2, conductor=LONG_LEASE)
    parent = scenarios.parent_of_killer.delay(times=99)
    root = scenarios.kills_its_process.delay(times=99)
    with pytest.raises(ExecutionFailed, match=r"^Child execution failed: Worker died: ") as caught:
        api.get_result(parent, timeout=60)
    child = Execution.objects.get(parent_id=parent.id)
    for died in (child, wait_for_status(root, "failed")):
        failure = FailedExecution.objects.get(pk=died.pk)
        assert failure.error_class == f"{WorkerLost.__module__}.{WorkerLost.__name__}"
        assert (failure.attempts, count("body", died.pk)) == (3, 3)
        assert failure.message.endswith("stopped while running attempt 3 of 3.")
    assert str(caught.value) == f"Child execution failed: {child.error_message}"
    assert FailedExecution.objects.get(pk=parent.id).root_cause_id == child.pk
    invariants.check(started)
    assert root.state == states.FAILURE
    assert api.get_result(scenarios.echo.delay(value="alive"), timeout=20) == "alive"


@pools
def test_a_body_that_ends_its_process_from_inside_costs_attempts_and_no_slots(worker: Any, pool: str) -> None:
    started = worker(pool=pool, concurrency=1, conductor=LONG_LEASE)
    recovering, dying = scenarios.exits.delay(times=1), scenarios.raises_a_base_exception.delay(times=99)
    assert api.get_result(recovering, timeout=60) == 2
    with pytest.raises(ExecutionFailed, match=r"^Worker died: "):
        api.get_result(dying, timeout=60)
    assert api.get_result(scenarios.pass_through.delay(value="alive"), timeout=20) == "alive"
    assert (count("body", recovering.id), count("body", dying.id)) == (2, 2)
    assert started.is_alive
    invariants.check(started)
    assert (recovering.state, dying.state) == (states.SUCCESS, states.FAILURE)


def test_time_limits_cost_an_attempt_and_celery_records_no_failure_meanwhile(worker: Any) -> None:
    started = worker(pool="prefork", concurrency=2, conductor=LONG_LEASE)
    hard, soft = scenarios.over_the_hard_limit.delay(), scenarios.over_the_soft_limit.delay()
    seen = set()
    wait_until(
        lambda: (
            seen.update((hard.state, soft.state)) or {row.status for row in Execution.objects.all()} == {"succeeded"}
        ),
        timeout=40,
    )
    assert states.FAILURE not in seen
    assert (hard.get(timeout=20), soft.get(timeout=20)) == (2, 2)
    assert (count("body", hard.id), count("body", soft.id)) == (2, 2)
    assert count("soft-limit", soft.id) == 1
    started.wait_for_log("Hard time limit (1")
    invariants.check(started)


@pools
def test_a_warm_shutdown_gives_bodies_back_that_ask_and_waits_for_those_that_do_not(worker: Any, pool: str) -> None:
    slots = 1 if pool == "solo" else 2
    first = worker(pool=pool, concurrency=slots)
    result = scenarios.parent_of_the_go.delay()
    wait_for_body(scenarios.waits_for_the_go)
    if slots == 2:
        scenarios.waits_for_slow.delay(seconds=1.5)
        wait_for_body(scenarios.slow)
    assert first.stop(timeout=40) == 0
    given_back = only(scenarios.waits_for_the_go)
    assert (given_back.status, given_back.attempt, given_back.lease_owner) == ("queued", 1, "")
    assert only(scenarios.parent_of_the_go).status == "waiting"
    if slots == 2:
        assert only(scenarios.slow).status == "succeeded"
        assert only(scenarios.waits_for_slow).status == "queued"
    note(None, "go")
    second = worker(pool=pool, concurrency=slots)
    assert api.get_result(result, timeout=30) == {"attempt": 1}
    invariants.check(first, second)
    assert count("body", result.id) == 2
    # The worker that shuts down may still get the message of what it has given back, and give it back again.
    assert count("body", given_back.pk) >= 2
    assert count("slow-end") == slots - 1


def test_a_pool_that_replaces_its_processes_all_the_time_loses_nothing(worker: Any) -> None:
    """The sweeper's thread lives in the process that forks: no lock and no connection of it may reach a child."""
    started = worker(
        pool="prefork", concurrency=2, conductor={"REDISPATCH_SECONDS": 20}, args=["--max-tasks-per-child=1"]
    )
    results = [scenarios.pass_through.delay(value=value) for value in range(4)]
    assert [api.get_result(result, timeout=60) for result in results] == list(range(4))
    assert set(Execution.objects.values_list("attempt", flat=True)) == {1}
    invariants.check(started)

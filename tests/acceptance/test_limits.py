"""Limits hold whatever dies, and nobody is forgotten."""

from __future__ import annotations

import datetime as dt
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connection, connections, transaction
from django.db.models import Max

from conductor_app import api
from conductor_app.models import Attempt, Execution, Place
from tests.app import limited
from tests.app.ledger import count, note
from tests.support.polling import wait_until
from tests.support.worker import Worker

Start = Callable[..., Worker]


def most_at_once() -> int:
    """Return how many runs went on at the same time, by what is recorded of them."""
    changes = []
    for started, finished in Attempt.objects.values_list("started_at", "finished_at"):
        changes += [(started, 1), (finished, -1)]
    # An end and a beginning at the same instant are one after the other.
    changes.sort(key=lambda change: (change[0], change[1]))
    return max(itertools.accumulate(step for _, step in changes))


def ended(executions: Any) -> int:
    return int(Execution.objects.filter(pk__in=[one.id for one in executions], status="succeeded").count())


def test_never_more_than_the_limit_run_whatever_is_killed_and_all_end(worker: Start) -> None:
    workers = [worker(concurrency=4) for _ in range(2)]
    executions = [limited.busy.delay() for _ in range(50)]
    kill_at = time.monotonic() + 1
    victims = itertools.cycle(workers)

    def done() -> bool:
        nonlocal kill_at
        if time.monotonic() >= kill_at:
            kill_at = time.monotonic() + 1
            victim = next(victims)
            if victim.pool_pids():
                victim.kill_pool_process()
        return ended(executions) == 50

    wait_until(done, 120, message=lambda: str(list(Place.objects.values("state", "execution__status"))))
    assert most_at_once() <= 3
    wait_until(lambda: not Place.objects.exists(), 40)


def test_who_waits_for_an_event_keeps_an_open_place_and_gives_one_of_a_run(worker: Start) -> None:
    worker(concurrency=2)
    keeps = [limited.keeps.delay("a") for _ in range(2)]
    other = limited.keeps.delay("b")
    gives = [limited.gives.delay("a") for _ in range(2)]
    waiting = Execution.objects.filter(status="waiting")
    wait_until(lambda: waiting.filter(pk__in=[other.id, *(one.id for one in gives)]).count() == 3, 40)
    wait_until(lambda: waiting.filter(pk__in=[one.id for one in keeps]).exists(), 40)
    wait_until(lambda: Place.objects.filter(state="parked").count() == 1, 40)
    first = waiting.get(pk__in=[one.id for one in keeps])
    second = next(one for one in keeps if one.id != str(first.pk))
    assert count("body", second.id) == 0
    api.send_event(first, "approved")
    wait_until(lambda: waiting.filter(pk=second.id).exists(), 40)
    api.send_event(second, "approved")
    assert api.get_result(second, timeout=40) == "a"


@pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has one writer at a time")
def test_a_slow_transaction_of_a_caller_does_not_keep_others_of_the_key_from_ending(worker: Start) -> None:
    worker(concurrency=2)
    running = limited.holds_until_told.delay("a")
    wait_until(lambda: count("body", running.id) == 1, 40)
    later = limited.holds_until_told.delay("a")
    with transaction.atomic():
        uncommitted = limited.holds_until_told.delay("a")
        Execution.objects.filter(pk=uncommitted.id).aggregate(Max("created_at"))
        note_elsewhere("go")
        wait_until(lambda: ended_elsewhere(running, later), 40)
    assert api.get_result(uncommitted, timeout=40) == "a"


def note_elsewhere(line: str) -> None:
    _in_thread(lambda: note(None, line))


def ended_elsewhere(*executions: Any) -> bool:
    return bool(_in_thread(lambda: ended(executions)) == len(executions))


def _in_thread(work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns on a connection that is not the test's."""

    def close() -> Any:
        try:
            return work()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(close).result()


def test_limits_in_opposite_orders_do_not_lock_each_other(worker: Start) -> None:
    for _ in range(2):
        worker(concurrency=2)
    executions = [task.delay() for _ in range(15) for task in (limited.needs_both, limited.needs_both_too)]
    wait_until(lambda: ended(executions) == 30, 60)
    assert most_at_once() == 1


def test_a_rate_is_kept_by_several_workers_and_delays_nobody_else(worker: Start) -> None:
    for _ in range(2):
        worker(concurrency=2)
    executions = [limited.rated.delay() for _ in range(60)]
    others = [limited.unlimited.delay() for _ in range(20)]
    wait_until(lambda: ended(others) == 20, 40)
    wait_until(lambda: ended(executions) == 60, 60)
    starts = sorted(
        Attempt.objects.filter(execution__in=[one.id for one in executions]).values_list("started_at", flat=True)
    )
    assert len(starts) == 60
    for first in starts:
        assert sum(first <= start <= first + dt.timedelta(seconds=1) for start in starts) <= 20 + 2

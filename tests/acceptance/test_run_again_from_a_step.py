"""A real worker runs a fork from the step on, once, after its source was pruned, and although it is killed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import pytest

from conductor_app import api
from conductor_app.engine import pruner
from conductor_app.models import Execution
from conductor_app.store import clock
from tests.app.forked import settled
from tests.app.ledger import count
from tests.support.polling import wait_until
from tests.support.worker import Worker

pytestmark = pytest.mark.usefixtures("recorded")


def test_a_fork_keeps_what_stands_before_and_does_the_rest_again(worker: Callable[..., Worker]) -> None:
    worker()
    source = api.find(settled.delay())
    assert api.get_result(source, timeout=60) == ["checked", [0, 2, 4], "Child execution failed: no stock", "paid 1"]
    fork = api.fork(source, "charge", {"amount": 2}, actor="ana", reason="wrong amount")
    assert api.get_result(fork, timeout=60) == ["checked", [0, 2, 4], "Child execution failed: no stock", "paid 2"]
    again = api.fork(fork, "charge")
    wait_until(lambda: api.find(again).is_final, timeout=60)
    last = api.fork(again, "charge", {"amount": 3})
    for row in (source, fork, again):
        Execution.objects.filter(pk=row.pk).update(finished_at=clock.after(-3_600))
    pruner.prune(dt.timedelta(minutes=30))
    assert not Execution.objects.filter(pk__in=[source.pk, fork.pk, again.pk]).exists()
    assert api.get_result(last, timeout=60)[-1] == "paid 3"
    assert (count("check"), count("charge")) == (1, 4)


def test_a_fork_whose_worker_is_killed_goes_on_with_what_it_keeps(worker: Callable[..., Worker]) -> None:
    first = worker()
    source = api.find(settled.delay())
    api.get_result(source, timeout=60)
    fork = api.fork(source, "charge", {"amount": 2, "is_slow": True})
    wait_until(lambda: count("slow", fork.pk) > 0, timeout=60)
    first.kill()
    worker()
    assert api.get_result(fork, timeout=90)[:2] == ["checked", [0, 2, 4]]
    assert count("check") == 1

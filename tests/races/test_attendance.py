"""A worker that writes its row waits for nobody, and two sweepers that remove old rows do not meet."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import transaction

from conductor_app.models import Worker
from conductor_app.store import clock, locks
from conductor_app.store.locks import RowsLocked
from conductor_app.transitions import attending
from tests.races.harness import Race
from tests.support.attendance import attends

pytestmark = pytest.mark.races


@pytest.fixture(autouse=True)
def _no_rows_stay(race: Race) -> Iterator[None]:
    del race
    yield
    Worker.objects.all().delete()


def lock(worker: Worker) -> None:
    with transaction.atomic():
        assert Worker.objects.select_for_update().filter(pk=worker.pk).first() is not None


def in_background(act: Any) -> Any:
    with locks.waiting_at_most(0.001, "default"):
        return act()


def test_a_worker_whose_row_is_locked_leaves_it_to_its_next_sweep(race: Race) -> None:
    row = attends()
    somebody = race.hold("somebody", lock, row)
    write = functools.partial(attending.attend, row, up=90)
    for act in (write, functools.partial(attending.leave, row.pk)):
        with pytest.raises(RowsLocked):
            race.start("worker", in_background, act).result()
    somebody.go_on().result()
    race.start("worker", in_background, write).result()
    assert Worker.objects.get().seen_at > row.seen_at


def test_of_two_sweepers_that_remove_old_rows_one_leaves_them_to_the_other(race: Race) -> None:
    attends()
    Worker.objects.update(seen_at=clock.after(-2 * attending.FORGOTTEN_SECONDS))
    first = race.hold("first", in_background, attending.forget_old)
    with pytest.raises(RowsLocked):
        race.start("second", in_background, attending.forget_old).result()
    assert first.go_on().result() == 1
    assert not Worker.objects.exists()

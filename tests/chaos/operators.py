"""Somebody who holds, pauses, calls with keys, and lets schedules tick while everything else goes on."""

from __future__ import annotations

import datetime as dt
import heapq
import itertools
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

from django.db import connection
from django.db.models import F

from conductor_app import DurableTask, api
from conductor_app.exceptions import ActionRefused, DuplicateExecution
from conductor_app.models import Execution, Schedule
from conductor_app.store import clock
from tests.chaos import tasks
from tests.chaos.workload import insist

SCHEDULED: dict[DurableTask[..., Any], str] = {
    tasks.ticking: tasks.ALLOWING,
    tasks.ticking_alone: tasks.SKIPPING,
}
PAUSED: tuple[DurableTask[..., Any], ...] = (tasks.work, tasks.banked, tasks.accounted, tasks.rated)
#: Keys, each with what its calls may say.
KEYS: dict[str, tuple[dict[str, Any], ...]] = {
    "returned": ({"on_conflict": "return"}, {"on_conflict": "refuse"}),
    "replaced": ({"on_conflict": "replace"}, {"on_conflict": "replace"}, {"on_conflict": "return"}),
    "debounced": ({"on_conflict": "replace", "debounce": 0.5, "debounce_max": 2},),
}
#: Keys of which each call counts, so that the last one's payload has to run.
LAST_WINS = ("debounced",)
#: Seconds between two acts of a kind, from and to, and how long one lasts.
SCHEDULE = {"hold": (1, 3), "pause": (5, 10), "pause_schedule": (5, 10), "tick": (0.8, 2), "call": (0.3, 0.8)}
LASTS = (0.5, 3)


class Operator(threading.Thread):
    """Does what is due until it is told to finish, and then undoes all that lasts."""

    def __init__(self, seed: int) -> None:
        super().__init__(name="chaos-operator", daemon=True)
        self._dice = random.Random(seed)
        self._stopped = threading.Event()
        self._numbers = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._heals: dict[int, Callable[[], None]] = {}
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        #: Executions that calls with a key have got, and the payload of each key's last call.
        self.accepted: set[uuid.UUID] = set()
        self.last_numbers: dict[str, int] = {}
        #: Instants that have come, by the schedule's name.
        self.instants: dict[str, set[dt.datetime]] = {name: set() for name in SCHEDULED.values()}
        self.failure: Exception | None = None

    def finish(self) -> None:
        """Do nothing more, and undo all that lasts."""
        self._stopped.set()
        self.join()
        if self.failure is not None:
            raise self.failure

    def run(self) -> None:
        try:
            for name in SCHEDULE:
                self._plan(name)
            while not self._stopped.is_set():
                while self._agenda and self._agenda[0][0] <= time.monotonic():
                    heapq.heappop(self._agenda)[2]()
                time.sleep(0.02)
            for heal in list(self._heals.values()):
                heal()
        except Exception as error:  # noqa: BLE001 - the main thread raises it
            self.failure = error
        finally:
            connection.close()

    def _plan(self, name: str) -> None:
        act: Callable[[], bool] = getattr(self, f"_{name}")

        def act_and_plan() -> None:
            self.counts[name] += act()
            self._plan(name)

        self._later(self._dice.uniform(*SCHEDULE[name]), act_and_plan)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time.monotonic() + seconds, next(self._numbers), act))

    def _last(self, heal: Callable[[], object]) -> None:
        number = next(self._numbers)

        def heal_once() -> None:
            if self._heals.pop(number, None) is not None:
                self._insist(heal)

        self._heals[number] = heal_once
        self._later(self._dice.uniform(*LASTS), heal_once)

    def _insist(self, call: Callable[[], Any]) -> Any:
        return insist(call, self.errors)

    # What it does

    def _hold(self) -> bool:
        keys = self._insist(lambda: list(Execution.objects.open().order_by("pk").values_list("pk", flat=True)))
        if not keys:
            return False
        key = self._dice.choice(keys)
        tree = self._dice.random() < 0.5
        try:
            self._insist(lambda: api.hold(key, "chaos", tree))
        except ActionRefused:
            return False
        self._last(lambda: api.release(key))
        return True

    def _pause(self) -> bool:
        task = self._dice.choice(PAUSED)
        self._insist(lambda: api.pause(task, "chaos"))
        self._last(lambda: api.unpause(task))
        return True

    def _pause_schedule(self) -> bool:
        name = tasks.SKIPPING
        if not self._insist(Schedule.objects.filter(name=name).exists):
            return False
        self._insist(lambda: api.pause_schedule(name))
        self._last(lambda: api.unpause_schedule(name))
        return True

    def _tick(self) -> bool:
        """Let an instant of a schedule come, unless one has just come that is not acted on."""
        name = self._dice.choice(list(SCHEDULED.values()))
        instant = self._insist(lambda: clock.read("default"))
        ready = Schedule.objects.filter(name=name, next_at__gt=instant, paused_at=None)
        # Noted before: the answer may be lost, and the question repeated to no effect.
        if not self._insist(ready.exists):
            return False
        self.instants[name].add(instant)
        self._insist(lambda: ready.update(next_at=instant, version=F("version") + 1))
        return True

    def _call(self) -> bool:
        key = self._dice.choice(list(KEYS))
        options = self._dice.choice(KEYS[key])
        number = next(self._numbers)
        try:
            call = lambda: tasks.keyed.apply_async(kwargs={"n": number}, unique_key=key, **options)  # noqa: E731
            self.accepted.add(uuid.UUID(self._insist(call).id))
        except DuplicateExecution:
            return True
        self.last_numbers[key] = number
        return True

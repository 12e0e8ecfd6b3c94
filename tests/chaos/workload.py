"""Roots of every kind, what has to come of each, and the client that starts, cancels and tells them."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from django.db import Error, connection

from conductor_app import api
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus
from tests.chaos import tasks

T = TypeVar("T")

#: Start no more while so many roots are open: two cores must keep up, or the bounds say nothing. Many of them
#: only wait, for an outage to end or for a message that was lost more than once.
OPEN_ROOTS = 80
#: Of the timeouts, in seconds.
TIMEOUT = 0.7


@dataclass(frozen=True)
class Root:
    """One root, and what has to come of it, computed without the code under test."""

    task: Any
    payload: dict[str, Any]
    status: ExecutionStatus = ExecutionStatus.SUCCEEDED
    result: Any = None
    #: What the error's text begins with.
    error: str = ""
    #: Events that are sent to it, one after another.
    events: tuple[int, ...] = ()
    is_cancelled: bool = False


def _worked(n: int, times: int = 1) -> int:
    return n * 2**times + 2**times - 1


def _sequence(dice: random.Random, n: int) -> Root:
    return Root(tasks.sequence, {"n": n}, result=_worked(n, 3))


def _lingering(dice: random.Random, n: int) -> Root:
    return Root(tasks.lingering, {"steps": 20}, result=20)


def _mapped(dice: random.Random, n: int) -> Root:
    numbers = list(range(n, n + 5))
    payload = {"numbers": numbers, "max_parallel": dice.choice([None, None, 1, 2, 3])}
    return Root(tasks.mapped, payload, result=[_worked(number) for number in numbers])


def _gathered(dice: random.Random, n: int) -> Root:
    numbers = list(range(n, n + 3))
    return Root(tasks.gathered, {"numbers": numbers}, result=[1, *(_worked(number) for number in numbers)])


def _foreign(dice: random.Random, n: int) -> Root:
    return Root(tasks.foreign, {"n": n}, result=[_worked(n), _worked(n), _worked(n + 1)])


def _tree(dice: random.Random, n: int) -> Root:
    depth = dice.choice([1, 2, 2, 3])
    return Root(tasks.tree, {"depth": depth}, result=2**depth)


def _persistent(dice: random.Random, n: int) -> Root:
    return Root(tasks.persistent, {"n": n}, result=n)


def _unforgiving(dice: random.Random, n: int) -> Root:
    error = f"Child execution failed: {n} is refused"
    return Root(tasks.unforgiving, {"n": n}, ExecutionStatus.FAILED, error=error)


def _compensating(dice: random.Random, n: int) -> Root:
    result = [f"Child execution failed: {n} is refused", _worked(n)]
    return Root(tasks.compensating, {"n": n}, result=result)


def _hasty(dice: random.Random, n: int) -> Root:
    result = f"Child execution timed out after {TIMEOUT:g}s (step 'limbo')"
    return Root(tasks.hasty, {"busy": dice.random() < 0.5, "timeout": TIMEOUT}, result=result)


def _sleeper(dice: random.Random, n: int) -> Root:
    return Root(tasks.sleeper, {"seconds": dice.uniform(0.2, 3)}, result="rested")


def _waiter(dice: random.Random, n: int) -> Root:
    events = (n, n + 1, n + 2)
    return Root(tasks.waiter, {"count": len(events)}, result=list(events), events=events)


def _doomed(dice: random.Random, n: int) -> Root:
    return Root(tasks.doomed, {}, ExecutionStatus.CANCELLED, error="Cancelled: ", is_cancelled=True)


def _reckless(dice: random.Random, n: int) -> Root:
    return Root(tasks.reckless, {"n": n}, result=_worked(n))


def _overlong(dice: random.Random, n: int) -> Root:
    return Root(tasks.overlong, {"n": n}, result=_worked(n))


def _banked(dice: random.Random, n: int) -> Root:
    return Root(tasks.banked, {"n": n}, result=n)


def _crowd(dice: random.Random, n: int) -> Root:
    numbers = list(range(n, n + 4))
    return Root(tasks.crowd, {"numbers": numbers, "max_parallel": dice.choice([None, None, 2])}, result=numbers)


def _accounted(dice: random.Random, n: int) -> Root:
    return Root(tasks.accounted, {"account": dice.randrange(3), "n": n}, result=_worked(n))


def _rated(dice: random.Random, n: int) -> Root:
    return Root(tasks.rated, {"n": n}, result=n)


def _poison(dice: random.Random, n: int) -> Root:
    return Root(tasks.poison, {}, ExecutionStatus.FAILED, error="Worker died: ")


#: How many of 100 roots are of each kind.
KINDS: dict[Callable[[random.Random, int], Root], int] = {
    _sequence: 15,
    _lingering: 4,
    _mapped: 10,
    _gathered: 8,
    _foreign: 5,
    _tree: 8,
    _persistent: 9,
    _unforgiving: 5,
    _compensating: 5,
    _hasty: 5,
    _sleeper: 5,
    _waiter: 5,
    _doomed: 2,
    _reckless: 2,
    _overlong: 2,
    _banked: 3,
    _crowd: 2,
    _accounted: 2,
    _rated: 2,
    _poison: 1,
}


class Client(threading.Thread):
    """Starts roots at an even pace, as a web process would: by way of the proxies, and again after an error.

    Args:
        seed: Chooses the roots.
        count: How many to start.
        seconds: Over which time.
    """

    def __init__(self, seed: int, count: int, seconds: float) -> None:
        super().__init__(name="chaos-client", daemon=True)
        self._dice = random.Random(seed)
        self._count, self._seconds = count, seconds
        self._stopped = threading.Event()
        self._numbers = itertools.count()
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self.roots: dict[uuid.UUID, Root] = {}
        self.open_roots = 0
        #: What the client's own calls met, and repeated.
        self.errors: Counter[str] = Counter()
        #: What ended the thread, and should not have.
        self.failure: Exception | None = None

    def finish(self) -> None:
        """Start no more roots, and wait until those that are to be cancelled or told have been."""
        self._stopped.set()
        self.join()
        if self.failure is not None:
            raise self.failure

    def count_open(self) -> int:
        """Count what is not final, or not announced to Celery."""
        unfinished = Execution.objects.open() | Execution.objects.filter(announce_at__isnull=False)
        self.open_roots = unfinished.filter(parent=None).count()
        return unfinished.count()

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 - the main thread raises it
            self.failure = error
        finally:
            connection.close()

    def _run(self) -> None:
        began, looked_at = time.monotonic(), 0.0
        while not (self._stopped.is_set() and not self._later):
            now = time.monotonic()
            if now - looked_at > 0.5:
                looked_at = now
                self.open_roots = self._insist(Execution.objects.filter(parent=None).open().count)
            is_next_due = len(self.roots) < self._count * min((now - began) / self._seconds, 1)
            if self._later and self._later[0][0] <= now:
                heapq.heappop(self._later)[2]()
            elif is_next_due and self.open_roots < OPEN_ROOTS and not self._stopped.is_set():
                self._start(len(self.roots))
                self.open_roots += 1
            else:
                time.sleep(0.02)

    def _start(self, number: int) -> None:
        (make,) = self._dice.choices(list(KINDS), list(KINDS.values()))
        root = make(self._dice, number)
        # The key makes a repetition safe whose first try was committed, and whose answer was lost.
        started = self._insist(
            lambda: root.task.apply_async(kwargs=root.payload, idempotency_key=f"root-{number}", queue=None)
        )
        key = uuid.UUID(started.id)
        self.roots[key] = root
        if root.is_cancelled:
            self._in_a_while(lambda: self._insist(lambda: api.cancel(key, reason="told to")))
        if root.events:
            self._in_a_while(lambda: self._send(key, list(root.events)))

    def _send(self, key: uuid.UUID, events: list[int]) -> None:
        event = events.pop(0)
        self._insist(lambda: api.send_event(key, "item", event, id=str(event)))
        if events:
            self._in_a_while(lambda: self._send(key, events))

    def _in_a_while(self, act: Callable[[], object]) -> None:
        heapq.heappush(self._later, (time.monotonic() + self._dice.uniform(0, 2), next(self._numbers), act))

    def _insist(self, call: Callable[[], T]) -> T:
        return insist(call, self.errors)


def insist(call: Callable[[], T], errors: Counter[str]) -> T:
    """Call again and again while the database is away."""
    while True:
        try:
            return call()
        except Error as error:
            errors[type(error).__name__] += 1
            connection.close()
            time.sleep(0.1)

"""Several connections work on the same families at once, on every database: all ends well, and nothing ends twice.

``tests/races`` puts single steps in order, on PostgreSQL. Here chance does, on each database and isolation level.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from django.db import OperationalError, connection, connections

from conductor_app import api, transitions
from conductor_app.engine import sweeper
from conductor_app.exceptions import CancelExecution, LeaseLost
from conductor_app.models import Execution
from conductor_app.states import ALLOWED_MOVES, FINAL_STATUSES, ExecutionStatus
from conductor_app.store.errors import is_conflict
from conductor_app.store.process import process
from conductor_app.transitions import Pending, steps, waking
from tests.support import history
from tests.support.executions import OWNER, committing, families
from tests.support.polling import wait_until
from tests.support.process import NotingBroker

#: What a user may set, or forget to set, in ``DATABASES["default"]["OPTIONS"]``.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sqlite": [{}, {"transaction_mode": "DEFERRED"}],
    "postgresql": [{}, {"isolation_level": 3}],
    "mysql": [{}, {"isolation_level": "repeatable read"}],
}
FAMILIES = 12


@pytest.fixture
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test."""
    with committing(django_db_blocker), history.recording():
        yield


class Crew:
    """Threads with a connection of their own, each with the same options."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._threads: list[threading.Thread] = []
        self.is_over = threading.Event()
        self.errors: list[BaseException] = []

    def hire(self, work: Callable[[], None]) -> threading.Thread:
        """Let a thread do ``work``."""
        thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _run(self, work: Callable[[], None]) -> None:
        mine = connections["default"]
        mine.settings_dict = copy.deepcopy(mine.settings_dict)
        mine.settings_dict["OPTIONS"].update(self._options)
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            self.errors.append(error)
        finally:
            connections.close_all()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_error: object) -> None:
        self.is_over.set()
        for thread in self._threads:
            thread.join(30)


def run_what_is_due(crew: Crew, owner: str) -> None:
    """As a worker: claim, remember a step, wait for the child or end."""
    while not crew.is_over.wait(0.001):
        for execution_id in list(Execution.objects.claimable().values_list("pk", flat=True)[:10]):
            run = None
            try:
                run = transitions.claim(execution_id, owner)
            except OperationalError as error:
                # As whoever calls it does: the claim is made again.
                if not is_conflict(error):
                    raise
            if run is None:
                continue
            with suppress(LeaseLost):
                run_once(run)


def run_once(run: Execution) -> None:
    try:
        memory = steps.recall(run.pk)
        if "child" in memory and memory["child"].is_pending:
            if transitions.suspend(run, Pending("child")):
                return
        elif "charge" not in memory:
            transitions.record_step(run, "charge", result="1")
        transitions.succeed(run, '"done"')
    except CancelExecution:
        transitions.cancel_running(run)


def end_children(pairs: list[tuple[Execution, Execution]], part: int) -> None:
    """As the runs of the children, their dying processes, and operators."""
    for number, (parent, child) in enumerate(pairs):
        if number % 2 != part:
            continue
        acts: list[Callable[[], object]] = [
            lambda child=child: transitions.succeed(child, "1"),
            lambda child=child: transitions.lose(child.pk, owner=OWNER),
            lambda parent=parent: api.cancel(parent.pk),
            lambda parent=parent: waking.wake(parent.pk),
        ]
        for act in (acts[number // 2 % 4], acts[0]):
            with suppress(LeaseLost):
                try:
                    act()
                except CancelExecution:
                    transitions.cancel_running(child, result="1")


@pytest.mark.parametrize("options", OPTIONS[connection.vendor], ids=lambda options: str(options or "our options"))
def test_everything_ends_once(transactional_db: None, settings: Any, options: dict[str, Any]) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "LEASE_SECONDS": 60}
    process.broker = NotingBroker()
    pairs = families(FAMILIES)
    with Crew(options) as crew:
        for number in range(2):
            crew.hire(lambda number=number: run_what_is_due(crew, f"test@host/{number + 2}"))
        crew.hire(lambda: sweep_until_over(crew))
        for thread in [crew.hire(lambda part=part: end_children(pairs, part)) for part in range(2)]:
            thread.join(120)
        wait_until(
            lambda: crew.errors or not Execution.objects.exclude(pk__in=template_ids(pairs)).open().exists(),
            timeout=120,
            interval=0.1,
            message=lambda: f"Still open: {list(Execution.objects.open().values('status', 'depth', 'lease_owner'))}",
        )
    for error in crew.errors:
        raise error
    for moves in history.moves().values():
        assert all(move.status in ALLOWED_MOVES[ExecutionStatus(move.old_status)] for move in moves[1:])
        assert sum(move.status in FINAL_STATUSES for move in moves) <= 1
        assert [move.fence for move in moves] == sorted(move.fence for move in moves)


def sweep_until_over(crew: Crew) -> None:
    while not crew.is_over.wait(0.01):
        sweeper.sweep(publish=False)


def template_ids(pairs: list[tuple[Execution, Execution]]) -> list[Any]:
    """The family that the others were copied from: nobody ends its child."""
    ours = {execution.pk for pair in pairs for execution in pair}
    return list(Execution.objects.exclude(pk__in=ours).values_list("pk", flat=True))

"""A small world in which the real transitions run, one statement at a time, in an order that a test chooses.

Actors are threads that share one connection, and of which one runs at a time. An actor stops before each statement
outside of a transaction, and before each BEGIN: all that others can see of it happens between two stops. So a process
that is killed anywhere is an actor that is ended at a stop; what it had written of an open transaction is gone anyway.

The clock stands still, but for ``clock.shift``; the broker is a list of messages.
"""

from __future__ import annotations

import itertools
import threading
import types
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from celery.signals import task_failure
from django.db import OperationalError, connection, connections

from conductor_app import DurableTask, ExecutionContext
from conductor_app.engine import schedules
from conductor_app.host import inline
from conductor_app.models import Execution
from conductor_app.store import clock, owners, transactions
from conductor_app.store.process import process
from conductor_app.tasks import kept_options, task
from conductor_app.transitions import dispatch, leases
from conductor_app.transitions.leases import Lease
from conductor_app.values.schedules import CatchUp, Overlap
from project.celery import app
from tests.app.programs import RETRIES, TICKING, follow
from tests.support.process import NotingBroker
from tests.support.schedules import schedules as scheduling

Plan = tuple[Overlap, CatchUp]

#: Seconds after which an actor that does not come to its next stop hangs.
PATIENCE_SECONDS = 20
#: 2026-06-01 00:00 UTC, in milliseconds: the timestamp of all root ids.
_EPOCH = 1_780_272_000_000


class Killed(BaseException):
    """Ends an actor, as SIGKILL ends a process."""


class Actor:
    """A process that works on executions: a run, a sweeper, somebody who calls ``conductor_app.api``."""

    def __init__(self, name: str, act: Callable[[], Any], execution_id: uuid.UUID | None = None) -> None:
        self.name = name
        #: What a run runs.
        self.execution_id = execution_id
        #: The leases that a run holds.
        self.held: list[Lease] = []
        #: Whether its next COMMIT succeeds, and the answer is lost.
        self.loses_answer = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self._is_killed = False
        self._act = act
        self._go_on = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._connection = connections["default"]
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.actor = self  # type: ignore[attr-defined]
        self._thread.start()

    def advance(self, stops: int) -> None:
        """Go on to the stop with that number, or to the end."""
        for _ in range(stops):
            if self.is_done:
                return
            self._go_on.release()
            assert self._stopped.acquire(timeout=PATIENCE_SECONDS), f"{self.name} hangs"

    def finish(self) -> Any:
        """Go on to the end; return the result, or raise the error."""
        while not self.is_done:
            self.advance(1)
        if self.error is not None:
            raise self.error
        return self.result

    def kill(self) -> None:
        """End it here, and let nothing of it be heard."""
        self._is_killed = True
        while not self.is_done:
            self.advance(1)

    # In the actor's thread

    def stop(self) -> None:
        """Let others go first."""
        if not self._is_killed:
            self._stopped.release()
            self._go_on.acquire()
        if self._is_killed:
            raise Killed

    def _run(self) -> None:
        self._go_on.acquire()
        try:
            if not self._is_killed:
                connections["default"] = self._connection
                self.result = self._act()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self.error = error
        finally:
            self.is_done = True
            self._stopped.release()


def current_actor() -> Actor | None:
    """The actor in whose thread this is called."""
    return getattr(threading.current_thread(), "actor", None)


class Keeper:
    """In the place of ``leases.LeaseKeeper``: renews when it is told to."""

    def watch(self) -> None:
        """Nothing hangs here."""

    @contextmanager
    def hold(self, execution: Execution, on_loss: Callable[[], None]) -> Iterator[Lease]:
        actor = current_actor()
        assert actor is not None
        lease = Lease(execution, on_loss)
        actor.held.append(lease)
        yield lease
        actor.held.remove(lease)

    def holds(self, execution_id: uuid.UUID, fence: int | None = None) -> bool:
        actor = current_actor()
        return actor is not None and any(
            lease.execution.pk == execution_id and fence in (None, lease.execution.fence) for lease in actor.held
        )

    def note_cancel(self, execution_id: uuid.UUID) -> None:
        """Nobody is told before the next renewal."""

    def forget(self) -> None:
        """Nobody forks."""


class Broker(NotingBroker):
    """In the place of ``host.publishing``: gives messages to the world."""

    def __init__(self, publish: Callable[[Execution], None]) -> None:
        super().__init__()
        self._publish = publish

    def send(self, execution: Execution, *, waits: bool) -> None:
        self._publish(execution)


class World:
    """Actors, messages and switches."""

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        #: Ids of executions, one for each copy of a message that the broker holds.
        self.messages: list[uuid.UUID] = []
        self.is_draining = False
        self.is_broker_away = False
        self._numbers = itertools.count(1)
        self._ids = itertools.count(1)

    # What a test does

    def spawn(self, name: str, act: Callable[[], Any], execution_id: uuid.UUID | None = None) -> Actor:
        """Add an actor, which has not begun."""
        actor = Actor(f"{name}-{next(self._numbers)}", act, execution_id)
        self.actors.append(actor)
        return actor

    def deliver(self, number: int) -> Actor:
        """Let a worker take a message; the run has not begun."""
        execution = Execution.objects.get(pk=self.messages.pop(number))
        return self.spawn("run", lambda: _run(execution), execution.pk)

    def reap(self) -> list[Actor]:
        """Forget the actors that are done, and return them."""
        done = [actor for actor in self.actors if actor.is_done]
        self.actors = [actor for actor in self.actors if not actor.is_done]
        return done

    def end(self) -> None:
        """Kill every actor."""
        for actor in self.actors:
            actor.kill()
        clock.reset()
        dispatch.reset_breaker()

    # What the product calls

    def publish(self, execution: Execution) -> None:
        actor = current_actor()
        if actor is not None and not connection.in_atomic_block:
            actor.stop()
        if self.is_broker_away:
            raise ConnectionRefusedError("the broker is away")
        self.messages.append(execution.pk)

    def new_root_id(self) -> uuid.UUID:
        return uuid.UUID(int=_EPOCH << 80 | 7 << 76 | 2 << 62 | next(self._ids))


def _run(execution: Execution) -> None:
    """Run once; a mistake of the product's or the stage's is no failure of the body, which Celery takes it for."""
    mistakes: list[BaseException] = []

    def look(exception: BaseException, **_: Any) -> None:
        if isinstance(exception, (TypeError, AttributeError, NameError, AssertionError)):
            mistakes.append(exception)

    # Who runs alone looks afterwards whether it is due as it was. Here, others may have let it be due meanwhile.
    with receiving(task_failure, look), suppress(RuntimeError):
        inline.run_once(execution, app)
    if mistakes:
        raise mistakes[0]


@contextmanager
def receiving(signal: Any, receiver: Callable[..., None]) -> Iterator[None]:
    """Connect a receiver meanwhile."""
    signal.connect(receiver, weak=False)
    try:
        yield
    finally:
        signal.disconnect(receiver)


class Stage:
    """Patches the product so that it plays in the current ``world``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = World()
        self._commit = connection._commit
        monkeypatch.setattr(clock.DatabaseNow, "as_sqlite", _frozen_now)
        process.worker.is_embedded, process.broker = False, Broker(self._publish)
        for module in (task, kept_options):
            monkeypatch.setattr(module, "new_root_id", self._new_root_id)
        process.keeper = Keeper()
        process.worker.is_draining = lambda: self.world.is_draining
        monkeypatch.setattr(owners, "lease_owner", lambda hostname: getattr(current_actor(), "name", "nobody"))
        # Nobody waits for anything: what is repeated is repeated at once.
        impatient = types.SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None)
        monkeypatch.setattr(transactions, "time", impatient)
        monkeypatch.setattr(connection, "_commit", self._commit_and_answer)
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA synchronous = OFF")
        # An actor that takes its connection for lost would close the others' too.
        monkeypatch.setattr(connection, "close", lambda: None)
        #: The task of each schedule, and which of them this process has.
        self.scheduled: dict[Plan, DurableTask[..., Any]] = {}
        self.plan: Plan | None = None
        monkeypatch.setattr(schedules, "planned", self._planned)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let actors stop at their statements."""
        connection.inc_thread_sharing()
        try:
            with scheduling() as scheduled, connection.execute_wrapper(_stop_and_execute):
                for overlap, catch_up in itertools.product(Overlap, CatchUp):
                    options = {"overlap": overlap, "catch_up": catch_up, "schedule": f"{overlap}-{catch_up}"}
                    self.scheduled[overlap, catch_up] = scheduled(_tick, "* * * * *", **options, **RETRIES)
                yield
        finally:
            connection.dec_thread_sharing()

    def _planned(self) -> dict[str, DurableTask[..., Any]]:
        return {} if self.plan is None else {f"{self.plan[0]}-{self.plan[1]}": self.scheduled[self.plan]}

    def _publish(self, execution: Execution) -> None:
        self.world.publish(execution)

    def _new_root_id(self) -> uuid.UUID:
        return self.world.new_root_id()

    def _commit_and_answer(self) -> None:
        self._commit()
        actor = current_actor()
        if actor is not None and actor.loses_answer:
            actor.loses_answer = False
            raise OperationalError("the connection was lost")


def _tick(ctx: ExecutionContext) -> list[Any]:
    return follow(ctx, TICKING)


def _stop_and_execute(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
    actor = current_actor()
    if actor is not None and not connection.in_atomic_block:
        actor.stop()
    # The texts of moves were made before the clock was stopped.
    return execute(sql.replace(_RUNNING_NOW, _STOPPED_NOW), params, many, context)


_RUNNING_NOW: str = clock.DatabaseNow().as_sqlite(None, connection)[0]
_STOPPED_NOW = "'2026-06-01 00:00:00.000'"


def _frozen_now(self: Any, compiler: Any, connection: Any, **extra: Any) -> Any:
    return self.as_sql(compiler, connection, template=_STOPPED_NOW, **extra)


def renew(actor: Actor) -> None:
    """Do what the heartbeat does for a run."""
    if actor.held:
        leases.renew(list(actor.held))

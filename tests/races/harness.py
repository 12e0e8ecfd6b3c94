"""Actors: transitions in threads, each with a connection of its own, stopped where a test wants to interleave them."""

from __future__ import annotations

import copy
import enum
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Self

import pytest
from django.db import connection, connections, transaction

from conductor_app.store import errors, moves
from conductor_app.store.moves import Move
from conductor_app.store.scripts import Write
from conductor_app.transitions import limiting_at_once
from tests.support.polling import wait_until

#: Seconds after which a stopped or blocked actor is a bug of the test. Longer than any lock wait or retry here.
PATIENCE_SECONDS = 20

#: The stop just before an actor's outermost COMMIT: everything is written, every lock is held.
BEFORE_COMMIT = "before commit"

#: How the moves of a run are written; the fixture ``race`` runs each test with both.
FORMS = ("one statement", "several statements")
#: For tests that look into a move, or weaken a part of it.
in_several_statements = pytest.mark.parametrize("race", FORMS[1:], indirect=True)

#: What the writes of moves do that elsewhere is a function's: an actor that is to stop there stops here, too.
ALIKE = {
    "before child": ["before transitions.guards.leave_running"],
    "after child": ["after transitions.guards.leave_running"],
    "before entry": ["before transitions.steps.settle", "before transitions.steps.count_down"],
    "after settled": ["after transitions.steps.settle", "after transitions.steps.count_down"],
    "before found": ["before transitions.waking.wake"],
    "after parent": ["after transitions.waking.wake"],
}


class IsolationLevel(enum.IntEnum):
    """As psycopg numbers them; its own would have to be installed where these tests are only skipped."""

    REPEATABLE_READ = 3
    SERIALIZABLE = 4


class Actor:
    """One thread with one connection to PostgreSQL.

    Args:
        isolation: Isolation level of its transactions.
    """

    def __init__(self, name: str, isolation: IsolationLevel | None = None) -> None:
        self.name = name
        self.isolation = isolation
        #: SQLSTATEs of the conflicts after which ``transactions.persist`` has run a transaction again.
        self.conflicts: list[str] = []
        self.stop_at = ""
        self._stopped = threading.Event()
        self._go_on = threading.Event()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._connection: Any = None
        self._result: Any = None
        self._error: BaseException | None = None

    def start(self, act: Callable[..., Any], *args: Any, stop: str = "") -> Self:
        """Run ``act`` in this actor's thread, which is to stop once at ``stop``."""
        self.stop_at = stop
        self._thread = threading.Thread(target=self._run, args=(act, args), name=self.name, daemon=True)
        self._thread.actor = self  # type: ignore[attr-defined]
        self._thread.start()
        return self

    def go_on(self) -> Self:
        """Leave the stop."""
        self._go_on.set()
        return self

    def is_stopped(self) -> bool:
        """Wait until this actor stands at its stop, or has ended; tell whether it stands."""
        wait_until(
            lambda: self._stopped.is_set() or self._done.is_set(),
            PATIENCE_SECONDS,
            interval=0.001,
            message=f"{self.name} did not get to its stop, {self.stop_at!r}",
        )
        return self._stopped.is_set()

    def wait_stopped(self) -> Self:
        """Return when this actor stands at its stop."""
        assert self.is_stopped(), f"{self.name} ended before its stop, {self.stop_at!r}: {self._error!r}"
        return self

    def wait_blocked(self, by: Actor) -> Self:
        """Return when PostgreSQL says that this actor waits for a lock that ``by`` holds."""
        assert self.is_blocked(by), f"{self.name} was not blocked by {by.name}: {self._error or self._result!r}"
        return self

    def is_blocked(self, by: Actor | None = None) -> bool:
        """Wait until this actor has ended, or waits for a lock of ``by`` (or of anybody); tell whether it waits."""
        wait_until(
            lambda: self._done.is_set() or (by.pid in _blockers(self.pid) if by else _blockers(self.pid)),
            PATIENCE_SECONDS,
            interval=0.002,
            message=f"{self.name} neither ends nor is blocked",
        )
        return not self._done.is_set()

    def result(self) -> Any:
        """Wait for the end, and return what ``act`` returned or raise what it raised."""
        assert self._thread is not None
        self._thread.join(PATIENCE_SECONDS)
        assert self._done.is_set(), f"{self.name} has not ended"
        if self._error is not None:
            raise self._error
        return self._result

    def outcome(self) -> Any:
        """Wait for the end, and return what ``act`` returned, or the class of what it raised."""
        try:
            return self.result()
        except BaseException as error:  # noqa: BLE001 - control flow too
            return type(error)

    @property
    def pid(self) -> int | None:
        """The server process of this actor's connection; none while it has no connection."""
        session = self._connection and self._connection.connection
        return session.info.backend_pid if session is not None and not session.closed else None

    def end(self) -> None:
        """Let the actor run to its end, whatever comes."""
        self._go_on.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)

    # In the actor's thread

    def _run(self, act: Callable[..., Any], args: Any) -> None:
        try:
            self._connect()
            self._result = act(*args)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._error = error
        finally:
            self._done.set()
            connections.close_all()

    def _connect(self) -> None:
        self._connection = connections["default"]
        self._connection.settings_dict = copy.deepcopy(self._connection.settings_dict)
        if self.isolation is not None:
            self._connection.settings_dict["OPTIONS"]["isolation_level"] = self.isolation
        commit = self._connection.commit

        def stop_and_commit() -> None:
            self.reach(BEFORE_COMMIT)
            commit()

        self._connection.commit = stop_and_commit

    def reach(self, point: str) -> None:
        """Stop here if it is this actor's stop; in the actor's thread."""
        if self.stop_at == point and not self._stopped.is_set():
            self._stopped.set()
            assert self._go_on.wait(PATIENCE_SECONDS), f"nobody let {self.name} go on"


def _current_actor() -> Actor | None:
    return getattr(threading.current_thread(), "actor", None)


def _blockers(pid: int | None) -> list[int]:
    if pid is None:
        return []
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_blocking_pids(pid) FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'", [pid]
        )
        row = cursor.fetchone()
    return row[0] if row else []


class Race:
    """The fixture ``race``: makes actors, and the points at which they can stop.

    Args:
        form: One of ``FORMS``. An actor that is to stop within a move makes it in several statements all the same.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
        self._monkeypatch = monkeypatch
        self._points: set[str] = set()
        self._actors: list[Actor] = []
        self._count_conflicts()
        self._choose(form)

    def start(
        self, name: str, act: Callable[..., Any], *args: Any, isolation: IsolationLevel | None = None, stop: str = ""
    ) -> Actor:
        """Let a new actor run ``act(*args)``.

        Args:
            isolation: Isolation level of its transactions; PostgreSQL's default is READ COMMITTED.
            stop: Where it is to stop once: ``BEFORE_COMMIT``, or ``before`` or ``after`` and the name of a function of
                ``conductor_app``, such as ``"after transitions.steps.settle"``, or of a write of a move, such as
                ``"after settled"``.
        """
        if "." in stop:
            self._make_point(stop.partition(" ")[2])
        actor = Actor(name, isolation)
        self._actors.append(actor)
        return actor.start(act, *args, stop=stop)

    def hold(self, name: str, act: Callable[..., Any], *args: Any, **options: Any) -> Actor:
        """As ``start``, and return when the actor stands at its stop, by default ``BEFORE_COMMIT``."""
        return self.start(name, act, *args, **{"stop": BEFORE_COMMIT, **options}).wait_stopped()

    @contextmanager
    def rounds(self, *players: Callable[[Any], Any]) -> Iterator[Callable[[Any], list[Any]]]:
        """A function that lets all players act on something at once, and returns their outcomes.

        Each player keeps its thread and its connection for all rounds.
        """
        gate = threading.Barrier(len(players) + 1)
        subject: list[Any] = [None]
        outcomes: list[Any] = [None] * len(players)

        def play(number: int) -> None:
            with suppress(threading.BrokenBarrierError):
                while True:
                    gate.wait()
                    try:
                        outcomes[number] = players[number](subject[0])
                    except BaseException as error:  # noqa: BLE001 - control flow too
                        outcomes[number] = type(error)
                    gate.wait()

        def play_round(on: Any) -> list[Any]:
            subject[0] = on
            gate.wait(PATIENCE_SECONDS)
            gate.wait(PATIENCE_SECONDS)
            return list(outcomes)

        actors = [self.start(f"player {number}", play, number) for number in range(len(players))]
        try:
            yield play_round
        finally:
            gate.abort()
            for actor in actors:
                actor.end()

    def conflicts(self) -> list[str]:
        """SQLSTATEs of the conflicts after which ``transactions.persist`` has run a transaction again."""
        return [code for actor in self._actors for code in actor.conflicts]

    def end(self) -> None:
        """Let every actor end."""
        for actor in self._actors:
            actor.end()

    def _make_point(self, name: str) -> None:
        """Let actors stop before and after the function ``<module of conductor_app>.<name>``."""
        if name in self._points:
            return
        self._points.add(name)
        module_name, _, function_name = name.rpartition(".")
        module = importlib.import_module(f"conductor_app.{module_name}")
        original = getattr(module, function_name)

        def stopping(*args: Any, **kwargs: Any) -> Any:
            actor = _current_actor()
            if actor is None:
                return original(*args, **kwargs)
            actor.reach(f"before {name}")
            result = original(*args, **kwargs)
            actor.reach(f"after {name}")
            return result

        self._monkeypatch.setattr(module, function_name, stopping)

    def _choose(self, form: str) -> None:
        make, write = Move.make, Write.make

        def stoppable(move: Move, using: str, **given: Any) -> Any:
            actor = _current_actor()
            is_inside = actor is not None and actor.stop_at not in ("", BEFORE_COMMIT)
            with moves.as_scripts() if is_inside or form == FORMS[1] else nullcontext():
                # Where the move is its own transaction there is no COMMIT to stop at, and no level to set. A claim is
                # its own in both forms.
                is_claim = move.parts[0].name == "claimed"
                if actor is None or is_claim or (actor.isolation is None and not actor.stop_at):
                    return make(move, using, **given)
                with transaction.atomic():
                    rows = make(move, using, **given)
                    if not rows:  # refused: there is nothing to commit
                        transaction.set_rollback(True)
                    return rows

        def stopping(step: Write, *args: Any) -> Any:
            actor = _current_actor()
            if actor is None:
                return write(step, *args)
            for point in (before := f"before {step.part.name}", *ALIKE.get(before, ())):
                actor.reach(point)
            rows = write(step, *args)
            for point in (after := f"after {step.part.name}", *ALIKE.get(after, ())):
                actor.reach(point)
            return rows

        self._monkeypatch.setattr(Move, "make", stoppable)
        self._choose_of_limits(form)
        self._monkeypatch.setattr(Write, "make", stopping)

    def _choose_of_limits(self, form: str) -> None:
        is_possible, make = limiting_at_once.is_possible, limiting_at_once._make

        def possible(using: str) -> bool:
            actor = _current_actor()
            is_inside = actor is not None and actor.stop_at not in ("", BEFORE_COMMIT)
            return form != FORMS[1] and not is_inside and is_possible(using)

        def stoppable(*args: Any) -> Any:
            actor = _current_actor()
            if actor is None or (actor.isolation is None and not actor.stop_at):
                return make(*args)
            with transaction.atomic():
                return make(*args)

        self._monkeypatch.setattr(limiting_at_once, "is_possible", possible)
        self._monkeypatch.setattr(limiting_at_once, "_make", stoppable)

    def _count_conflicts(self) -> None:
        original = errors.is_conflict

        def counting(error: BaseException) -> bool:
            found = original(error)
            actor = _current_actor()
            if found and actor is not None:
                actor.conflicts.append(getattr(error.__cause__, "sqlstate", ""))
            return found

        self._monkeypatch.setattr(errors, "is_conflict", counting)

"""What the chaos rounds rely on: their checker finds what it is there to find, and a proxy does what it says."""

from __future__ import annotations

import datetime as dt
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

# The drivers are there where the servers are: they come with `make test-services`.
pytest.importorskip("psycopg")
pytest.importorskip("redis")

from conductor_app import transitions
from conductor_app.models import Attempt, Execution, Step
from conductor_app.states import ExecutionStatus
from conductor_app.store import clock
from tests.app.models import Ledger
from tests.chaos import checker, soak, tasks
from tests.chaos.nemesis import Act
from tests.chaos.operators import SCHEDULED
from tests.chaos.workload import Root
from tests.support.executions import running
from tests.support.proxy import Proxy

# ------------------------------------------------------------------------------------------------------------ checker


def succeeded(result: str = "7") -> tuple[Execution, dict[uuid.UUID, Root]]:
    """A root that returned 7, and what was expected of it."""
    run = running()
    transitions.succeed(run, result)
    execution = Execution.objects.get(pk=run.pk)
    return execution, {execution.pk: Root(tasks.work, {"n": 3}, result=7)}


def of_roots(roots: dict[uuid.UUID, Root]) -> list[str]:
    return list(checker._of_roots(roots, {row.pk: row for row in Execution.objects.all()}))


@pytest.mark.django_db
def test_the_checker_compares_each_root_with_what_was_to_come_of_it() -> None:
    execution, roots = succeeded()
    assert of_roots(roots) == []
    assert of_roots({execution.pk: Root(tasks.work, {"n": 4}, result=9)}) == [f"{execution} returned 7, not 9"]
    assert of_roots({execution.pk: Root(tasks.poison, {}, ExecutionStatus.FAILED)}) == [
        f"{execution} succeeded, not failed: {{}}"
    ]
    lost = uuid.uuid4()
    assert of_roots({**roots, lost: Root(tasks.work, {})}) == [f"Root {lost} was accepted, and is lost"]
    assert of_roots({}) == [f"Root {execution.pk} was never started"]


@pytest.mark.django_db
def test_the_checker_counts_the_traces_of_steps() -> None:
    run = running()
    traces = [Ledger(execution_id=run.pk, key=key, value="1", pid=1) for key in (tasks.INSIDE, tasks.OUTSIDE)]
    Ledger.objects.bulk_create(traces)
    assert list(checker._of_ledgers({})) == [f"Step inside of {run.pk} was done 1 times and is not remembered"]
    for key in (tasks.INSIDE, tasks.OUTSIDE):
        transitions.record_step(run, key, result="null")
    assert list(checker._of_ledgers({})) == []
    Ledger.objects.create(execution_id=run.pk, key=tasks.INSIDE, value="1", pid=2)
    assert list(checker._of_ledgers({})) == [
        f"Step inside of {run.pk} was done 2 times and is remembered",
        f"Fence 1 of {run.pk} was held by the processes [1, 2]",
    ]
    Ledger.objects.all().delete()
    assert len(list(checker._of_ledgers({}))) == 2


@pytest.mark.django_db
def test_the_checker_sees_what_a_zombie_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    run = running()
    transitions.record_step(run, tasks.INSIDE, result="null")
    recorded_at = Step.objects.get().created_at.timestamp()
    monkeypatch.setattr(checker.history, "left_running", lambda **_: {(run.pk, 1): recorded_at + 0.1})
    assert list(checker._of_fences()) == []
    monkeypatch.setattr(checker.history, "left_running", lambda **_: {(run.pk, 1): recorded_at - 3})
    assert list(checker._of_fences()) == [f"Step inside of {run.pk} was recorded by run 1, 3.0s after its end"]


def attempt(of: Execution, run: int, begin: float, end: float, outcome: str = "succeeded") -> Attempt:
    """A run of a task, from and to so many seconds after the execution was stored."""
    instants = [of.created_at + dt.timedelta(seconds=seconds) for seconds in (begin, end)]
    return Attempt.objects.create(
        execution=of,
        attempt=run,
        run=run,
        worker="w@h",
        due_at=instants[0],
        started_at=instants[0],
        finished_at=instants[1],
        outcome=outcome,
    )


@pytest.mark.django_db
def test_the_checker_sees_more_at_once_than_a_limit_has() -> None:
    rows = [Execution.objects.get(pk=tasks.banked.delay(n=n).id) for n in range(4)]
    Execution.objects.update(created_at=rows[0].created_at)
    for row in rows:
        row.refresh_from_db()
        attempt(row, 1, 0, 2)
    assert list(checker._of_limits({})) == ["Limit chaos-bank was held by 4 at once"]
    Attempt.objects.filter(execution=rows[3]).delete()
    attempt(rows[3], 1, 2, 3)
    figures: dict[str, Any] = {}
    assert list(checker._of_limits(figures)) == []
    assert figures["most_at_once"] == {"chaos-bank": 3}
    # One whose worker is taken for dead keeps its place until its next run.
    Attempt.objects.filter(execution=rows[0]).update(outcome="lost")
    attempt(rows[0], 2, 5, 6)
    attempt(rows[1], 2, 2, 4)
    assert list(checker._of_limits({})) == []
    attempt(rows[2], 2, 3.5, 4)
    assert list(checker._of_limits({})) == []
    attempt(rows[3], 2, 3.6, 4)
    assert list(checker._of_limits({})) == ["Limit chaos-bank was held by 4 at once"]


@pytest.mark.django_db
def test_the_checker_sees_more_starts_than_a_rate_lets() -> None:
    row = Execution.objects.get(pk=tasks.rated.delay(n=1).id)
    for run, begin in enumerate((0, 0, 0, 1, 2), 1):
        attempt(row, run, begin, begin)
    assert list(checker._of_limits({})) == []
    attempt(row, 6, 2.5, 3)
    instant = row.created_at + dt.timedelta(seconds=2.5)
    assert list(checker._of_limits({})) == [f"Of limit chaos-starts, 6 had started at {instant}, and 5.5 were allowed"]


@pytest.mark.django_db
def test_the_checker_wants_keys_one_after_another_and_the_last_call_to_run() -> None:
    first = Execution.objects.get(pk=tasks.keyed.apply_async(kwargs={"n": 1}, unique_key="debounced").id)
    lost = uuid.uuid4()
    run = transitions.claim(first.pk, "w@h:1:1")
    assert run is not None
    transitions.succeed(run, "1")
    assert list(checker._of_keys([first.pk], {"debounced": 1})) == []
    assert list(checker._of_keys([lost], {"debounced": 2})) == [
        f"{lost} was accepted with a unique key, and is lost",
        f"{first} of the key debounced returned 1, and was last called with 2",
    ]
    second = Execution.objects.get(pk=tasks.keyed.apply_async(kwargs={"n": 2}, unique_key="debounced").id)
    transitions.request_cancel(second.pk, "a test")
    transitions.cancel_flagged(second.pk)
    first.refresh_from_db()
    assert first.finished_at is not None
    Execution.objects.update(started_at=first.finished_at - dt.timedelta(seconds=1))
    assert list(checker._of_keys([], {})) == [
        "Of the unique key debounced, 2 were open at once",
        f"{second} is the last of the unique key debounced, and cancelled",
    ]


@pytest.mark.django_db
def test_the_checker_wants_each_tick_once() -> None:
    instant = clock.read("default")
    none: dict[str, set[dt.datetime]] = {name: set() for name in SCHEDULED.values()}
    assert list(checker._of_schedules(none)) == []
    assert list(checker._of_schedules({**none, "chaos-allow": {instant}})) == [
        f"Schedule chaos-allow has never started {instant}"
    ]
    assert list(checker._of_schedules({**none, "chaos-skip": {instant}})) == [], "one that is open leaves it out"


def test_the_checker_knows_which_tracebacks_are_to_be_expected() -> None:
    def traceback(last_line: str) -> str:
        return f'Traceback (most recent call last):\n  File "x.py", line 1, in x\n    x()\n{last_line}\n[INFO] next\n'

    log = traceback("ValueError: 7 is refused") + traceback("redis.exceptions.ConnectionError: gone")
    assert list(checker._of_worker_log(log)) == []
    log += traceback("KeyError: 'step'") + "[ERROR] Execution 7 was waiting for nothing: a lost wake-up is healed.\n"
    assert list(checker._of_worker_log(log)) == [
        "[ERROR] Execution 7 was waiting for nothing: a lost wake-up is healed.",
        "traceback: KeyError: 'step'",
    ]


@pytest.mark.parametrize(("seconds", "is_fine"), [(3, True), (30, False)])
def test_the_checker_holds_recovery_against_its_bound(
    monkeypatch: pytest.MonkeyPatch, settings: Any, seconds: float, is_fine: bool
) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "LEASE_SECONDS": 3, "HEARTBEAT_SECONDS": 1, "SWEEP_SECONDS": 0.5}
    run = (uuid.uuid4(), 1)
    killed = Act("kill_worker", at=1_000.0, target="worker-1", victims=[run])
    monkeypatch.setattr(checker.history, "left_running", lambda: {run: 1_000.0 + seconds})
    found: dict[str, checker.Recovery] = {}
    assert [*checker._of_recovery([killed], [], found)] == (
        [] if is_fine else ["A run of worker-1 was given up 30.0s after kill_worker; 5.6s are allowed"]
    )
    assert found == {"kill_worker": checker.Recovery(bound=3.6, seconds=[seconds])}
    assert not [*checker._of_recovery([killed], [(1_001.0, 1_004.0)], found)], "the database was away"


@pytest.mark.parametrize(("slow", "is_fine"), [(1, True), (2, False)])
def test_a_soak_holds_the_99th_percentile_of_all_rounds_against_the_bound(slow: int, is_fine: bool) -> None:
    def report(seed: int, seconds: list[float]) -> dict[str, Any]:
        recovery = {"freeze": {"bound": 9.6, "seconds": []}, "kill_worker": {"bound": 3.6, "seconds": seconds}}
        figures = {"seed": seed, "roots": 100 + seed, "kills": 10, "seconds_to_quiet": seed, "acts": {"freeze": 1}}
        return {**figures, "violations": [], "recovery": recovery}

    summary = soak.add_up([report(1, [1.0] * 60), report(2, [2.0] * (40 - slow) + [4.0] * slow)])
    assert (summary["roots"], summary["fewest_roots_and_kills_of_a_round"]) == (203, [101, 10])
    assert summary["acts"] == {"freeze": 2}
    assert summary["recovery"]["kill_worker"]["max"] == 4
    assert list(summary["recovery"]) == ["kill_worker"]
    assert (not summary["violations"]) is is_fine


# -------------------------------------------------------------------------------------------------------------- proxy


@pytest.fixture
def received() -> list[bytes]:
    """What the server behind the proxy was sent."""
    return []


@pytest.fixture
def proxy(received: list[bytes]) -> Iterator[Proxy]:
    """A proxy before a server that answers each message with ``done``."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=answer, args=(client,), daemon=True).start()

    def answer(client: socket.socket) -> None:
        with client, suppress(OSError):
            while message := client.recv(100):
                received.append(message)
                client.sendall(b"done")

    threading.Thread(target=serve, daemon=True).start()
    with listener, Proxy(f"postgres://127.0.0.1:{listener.getsockname()[1]}/x") as proxy:
        yield proxy


def ask(proxy: Proxy, message: bytes) -> bytes:
    """Send a message on a new connection, and return the answer; empty if the connection was ended."""
    port = int(proxy.url.rpartition(":")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client, suppress(ConnectionResetError):
        client.sendall(message)
        return client.recv(100)
    return b""


def test_a_proxy_drops_the_answer_of_some_commits_and_the_other_half_of_them_whole(
    proxy: Proxy, received: list[bytes]
) -> None:
    assert ask(proxy, b"COMMIT") == b"done"
    proxy.cut_commits = 1.0
    assert ask(proxy, b"SELECT") == b"done"
    assert [ask(proxy, b"COMMIT") for _ in range(4)] == [b""] * 4
    assert received == [b"COMMIT", b"SELECT", b"COMMIT", b"COMMIT"]
    assert proxy.commits_cut == 4


def test_a_silent_proxy_answers_nothing_and_ends_who_asked_when_it_speaks_again(
    proxy: Proxy, received: list[bytes]
) -> None:
    proxy.silence()
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(ask(proxy, b"SELECT")))
    asking.start()
    time.sleep(0.2)  # for longer than an answer takes
    assert (answers, received) == ([], [])
    proxy.speak()
    asking.join(5)
    assert (answers, received) == ([b""], [])
    assert ask(proxy, b"SELECT") == b"done"


def test_a_closed_proxy_refuses_and_an_open_one_hands_through(proxy: Proxy) -> None:
    proxy.close()
    with pytest.raises(ConnectionRefusedError):
        ask(proxy, b"SELECT")
    proxy.open()
    assert ask(proxy, b"SELECT") == b"done"

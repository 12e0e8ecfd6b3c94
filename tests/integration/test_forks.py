"""A forked process neither uses nor ends its parent's connections, whoever has forked it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import billiard
import pytest
from celery import current_app
from django.db import ProgrammingError, connection, transaction
from django.db.backends.sqlite3.base import DatabaseWrapper as SQLite
from kombu import Connection, pools

from conductor_app import ExecutionContext, transitions
from conductor_app.exceptions import WrongThread
from conductor_app.host.sweeper_thread import SweeperThread
from conductor_app.models import Execution
from conductor_app.store import forks
from conductor_app.store.process import process
from tests.app import scenarios
from tests.support.bodies import durable, run
from tests.support.executions import committing, new, queued


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's. A forked process sees only what is committed."""
    with committing(django_db_blocker):
        yield


def by_os(act: Callable[[], None]) -> int:
    if not (pid := os.fork()):
        code = 0
        try:
            act()
        except BaseException:  # noqa: BLE001 - a forked process must not go on with the tests
            traceback.print_exc()
            code = 1
        gc.collect()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def by_multiprocessing(act: Callable[[], None]) -> int:
    return _by(multiprocessing.get_context("fork").Process, act)


def by_billiard(act: Callable[[], None]) -> int:
    """As Celery's pool does; kombu cleans up after itself then."""
    return _by(billiard.Process, act)


def _by(process_class: Any, act: Callable[[], None]) -> int:
    process = process_class(target=act)
    process.start()
    process.join()
    return int(process.exitcode)


forked = pytest.mark.parametrize("fork", [by_os, by_multiprocessing, by_billiard], ids=lambda fork: fork.__name__)


@forked
def test_a_fork_uses_a_database_connection_of_its_own(fork: Callable[[Callable[[], None]], int]) -> None:
    known = queued()
    inherited = connection.connection

    def act() -> None:
        assert connection.connection is None
        created, is_new = transitions.create(new())
        assert is_new
        assert Execution.objects.filter(pk__in=[known.pk, created.pk]).count() == 2
        connection.close()

    for _ in range(3):
        assert fork(act) == 0
        assert Execution.objects.filter(pk=known.pk).exists(), "its session has ended"
    assert connection.connection is inherited, "it had to connect again"
    assert Execution.objects.count() == 4


def test_a_fork_that_closes_what_it_inherited_ends_nobodys_session() -> None:
    """What many programs do first, and what the end of a process does to what it frees."""
    queued()
    inherited = connection.connection

    def act() -> None:
        connection.close()
        if connection.vendor != "sqlite":
            inherited.close()

    assert by_os(act) == 0
    assert Execution.objects.count() == 1
    assert connection.connection is inherited


def test_a_fork_inside_a_transaction_leaves_it_to_its_parent() -> None:
    with transaction.atomic():
        first = queued()

        def act() -> None:
            with pytest.raises(ProgrammingError, match="atomic block"):
                Execution.objects.count()
            connection.close()

        assert by_os(act) == 0
        second = queued()
    assert set(Execution.objects.values_list("pk", flat=True)) == {first.pk, second.pk}


def test_the_connections_of_other_threads_are_known_before_a_fork() -> None:
    """In the child they are freed before anything can be done about them, unless somebody holds them."""
    other = connection.copy("other-thread")
    other.ensure_connection()
    try:
        assert (other, other.connection) in forks._opened()

        def act() -> None:
            assert other.connection is None

        assert by_os(act) == 0
        with other.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert cursor.fetchone()[0] == 1
    finally:
        other.close()


#: Holds a lock of a database until its input ends.
HOLDER = """
import sqlite3, sys
sqlite3.connect(sys.argv[1], isolation_level=None).execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_fork_while_another_thread_waits_inside_sqlite_is_not_stuck(tmp_path: Path) -> None:
    """What that thread has locked inside the library stays locked in the child."""
    path = str(tmp_path / "other.sqlite3")
    is_about_to_wait = threading.Event()

    def wait() -> None:
        waiter = SQLite({**connection.settings_dict, "NAME": path, "OPTIONS": {"timeout": 60}}, "waiter")
        with waiter.cursor() as cursor:
            is_about_to_wait.set()
            cursor.execute("BEGIN IMMEDIATE")
            cursor.execute("ROLLBACK")
        waiter.close()

    # Another process, so that none of ours but the waiting thread knows of the file.
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        thread = threading.Thread(target=wait)
        thread.start()
        assert is_about_to_wait.wait(30)
        # It is inside nearly all the time.
        for _ in range(10):
            if not (pid := os.fork()):
                os._exit(0)
            assert ended(pid), "the child is stuck"
        holder.stdin.close()
    thread.join(60)
    assert not thread.is_alive()


def ended(pid: int, seconds: float = 20) -> bool:
    """Tell whether a child process ends in time; it is killed if it does not."""
    end = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.01)
    return True


@pytest.mark.skipif(
    connection.vendor != "sqlite", reason="a server may be silent; its sockets are taken from the child"
)
def test_a_fork_waits_for_a_sweep_on_sqlite() -> None:
    thread = SweeperThread(SimpleNamespace(app=current_app), SimpleNamespace())
    thread._connection = connection  # as its first tick would set it
    thread.is_alive = lambda: True  # type: ignore[method-assign]
    thread._busy.acquire()
    release = threading.Timer(1.5, thread._busy.release)
    release.start()
    inherited = connection.connection
    try:
        assert thread.before_fork(), "it has not waited"
        thread.after_fork_in_parent(True)
    finally:
        release.join()
    assert connection.connection is None or connection.connection is inherited


@pytest.fixture
def pool() -> Iterator[Any]:
    """A pool of kombu's, one of whose connections is in use and one idle."""
    broker = Connection("memory://forks")
    found = pools.connections[broker]
    idle = found.acquire()
    idle.connect()
    used = found.acquire()
    used.connect()
    idle.release()
    yield found
    used.release()
    del pools.connections[broker]


def test_a_fork_has_pools_without_connections(pool: Any) -> None:
    before = [*pool._dirty, *pool._resource.queue]

    def act() -> None:
        now = [*pool._dirty, *pool._resource.queue]
        assert not {id(resource) for resource in now} & {id(resource) for resource in before}
        with pool.acquire(block=True) as found:
            assert not any(found is resource for resource in before)
            found.connect()

    assert by_os(act) == 0
    assert [*pool._dirty, *pool._resource.queue] == before, "the parent goes on with its own"


def test_a_process_that_nobody_told_of_its_fork_finds_out(pool: Any) -> None:
    """uWSGI's forks call no hooks."""
    queued()
    before = [*pool._dirty, *pool._resource.queue]

    def act() -> None:
        # As if the hooks had not been called.
        connection.ensure_connection()
        pool._dirty.update(resource for resource in before if isinstance(resource, Connection))
        process.pid = os.getppid()
        forks.own()
        assert connection.connection is None
        assert not pool._dirty
        forks.own()

    assert by_os(act) == 0


def test_a_process_keeps_what_is_its_own() -> None:
    queued()
    mine = connection.connection
    forks.own()
    assert connection.connection is mine


# ------------------------------------------------------------------------------------------------------- of a body


def forking(fork: Callable[[], Any]) -> tuple[Execution, int]:
    """Run a body whose forked process does ``fork``; return its execution, and the process's exit code."""
    parent = os.getpid()

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> int:
        contexts.append(ctx)
        if not (pid := os.fork()):
            return fork()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    contexts.clear()
    try:
        execution = run(body)
    finally:
        if os.getpid() != parent:
            os._exit(99)  # it must not go on with the tests
    assert execution.status == "succeeded", execution.error_message
    return execution, execution.get_result()


contexts: list[ExecutionContext] = []


@pytest.mark.parametrize("call", ["step", "atomic_step", "invoke", "checkpoint"])
def test_a_process_that_a_body_has_forked_may_not_use_its_context(call: str, tmp_path: Path) -> None:
    def fork() -> None:
        ctx = contexts[0]
        with pytest.raises(WrongThread) as refusal:
            {
                "step": lambda: ctx.step("a", int),
                "atomic_step": lambda: ctx.atomic_step("a", int),
                "invoke": lambda: ctx.invoke("a", scenarios.echo),
                "checkpoint": ctx.checkpoint,
            }[call]()
        (tmp_path / "refusal").write_text(str(refusal.value))
        os._exit(7)

    execution, code = forking(fork)
    assert code == 7
    shown = "ctx.checkpoint()" if call == "checkpoint" else f'ctx.{call}("a")'
    assert (tmp_path / "refusal").read_text() == (
        f"{shown} was called in a process that was forked from the one that runs the body."
    )
    assert execution.steps.count() == 0


def raises() -> None:
    raise ValueError("in the fork")


@pytest.mark.parametrize(
    ("fork", "code"), [(lambda: 5, 1), (raises, 1), (lambda: sys.exit(0), 0), (lambda: sys.exit(4), 4)]
)
def test_a_process_that_a_body_has_forked_does_not_end_the_run(fork: Callable[[], Any], code: int) -> None:
    execution, ended_with = forking(fork)
    assert ended_with == code
    assert (execution.attempt, execution.fence) == (1, 1)


@pytest.mark.parametrize("call", ["step", "atomic_step"])
def test_a_process_that_a_steps_function_has_forked_records_nothing(call: str) -> None:
    parent = os.getpid()

    def fork() -> str:
        if not (pid := os.fork()):
            return "of the fork"
        return f"of the parent, {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}"

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> Any:
        return getattr(ctx, call)("a", fork)

    try:
        execution = run(body)
    finally:
        if os.getpid() != parent:
            os._exit(99)
    assert execution.status == "succeeded", execution.error_message
    assert execution.get_result() == "of the parent, 1"

"""Who holds a lease."""

from __future__ import annotations

import os

import pytest

from conductor_app.models import Execution
from conductor_app.store import owners
from conductor_app.store.process import process


@pytest.fixture(autouse=True)
def fresh_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just begun."""
    process.workers_token = None
    process.own_token = None
    monkeypatch.delenv("CONDUCTOR_WORKER_TOKEN", raising=False)


def test_two_workers_of_one_name_are_two_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for _ in range(2):
        owners.begin_worker()
        seen.add(owners.lease_owner("celery@app", 5))
    assert len(seen) == 2
    assert {owners.node_name(owner) for owner in seen} == {"celery@app"}


def test_the_processes_of_a_worker_share_its_token() -> None:
    owners.begin_worker()
    first, second = owners.lease_owner("celery@app", 5), owners.lease_owner("celery@app", 6)
    assert first != second
    assert owners.worker_of(first) == owners.worker_of(second)
    assert owners.is_of_this_worker(first, "celery@app")
    assert not owners.is_of_this_worker(first, "celery@other")
    owners.begin_worker()
    assert not owners.is_of_this_worker(first, "celery@app")


def test_a_pool_process_that_is_started_anew_takes_over_its_workers_token() -> None:
    owners.begin_worker()
    token = owners.token()
    process.workers_token = None
    assert owners.token() != token, "a process that a worker starts for something else"
    owners.join_worker()
    assert owners.token() == token


def in_child(tell: object) -> str:
    """What a forked process says."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.write(write, str(tell()).encode())  # type: ignore[operator]
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as said:
        return said.read()


def test_a_fork_of_a_process_that_is_no_workers_gets_a_token_of_its_own() -> None:
    mine = owners.token()
    assert owners.token() == mine
    theirs = {in_child(owners.token) for _ in range(2)}
    assert len({mine, *theirs}) == 3
    assert owners.token() == mine


def test_a_fork_of_a_worker_is_the_workers() -> None:
    owners.begin_worker()
    assert in_child(owners.token) == owners.token()


def test_a_long_node_name_is_cut_and_nothing_else() -> None:
    pid = 2**22
    owner = owners.lease_owner("n" * 300, pid)
    assert len(owner) == Execution._meta.get_field("lease_owner").max_length == owners.MAX_LENGTH
    assert owner.endswith(f"/{owners.token()}/{pid}")
    assert owners.is_of_this_worker(owner, "n" * 300)


@pytest.mark.parametrize(
    ("owner", "node", "pid", "shown"),
    [
        ("celery@web1/0badcafe/4711", "celery@web1", 4711, "celery@web1/4711"),
        ("celery@web1/4711", "celery@web1", 4711, "celery@web1/4711"),
        ("a/b@c/0badcafe/1", "a/b@c", 1, "a/b@c/1"),
        ("a/b@c/1", "a/b@c", 1, "a/b@c/1"),
        ("nobody", "nobody", None, "nobody"),
        ("", "", None, ""),
    ],
)
def test_both_forms_are_read(owner: str, node: str, pid: int | None, shown: str) -> None:
    """The older one, which workers of the version before wrote."""
    assert (owners.node_name(owner), owners.pid_of(owner), owners.shown(owner)) == (node, pid, shown)
    assert not owners.is_of_this_worker(owner, node)

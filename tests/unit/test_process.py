"""What a process remembers, and what a forked child of it forgets."""

from __future__ import annotations

import ast
import dataclasses
import datetime as dt
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import conductor_app
from conductor_app.store.process import Gate, Process, Worker, process
from tests.support.process import PoolGate, given_back

SOURCES = Path(conductor_app.__file__).parent


class Held:
    """In the place of the keeper, the soft time limit and the sweeper's thread."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def forget(self) -> None:
        self.calls.append("forget")

    def before_fork(self) -> bool:
        self.calls.append("before")
        return True

    def after_fork_in_parent(self, held: bool) -> None:
        self.calls.append(("after", held))


def in_child(tell: Callable[[], Any]) -> Any:
    """What a forked process says."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.write(write, json.dumps(tell()).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as said:
        return json.load(said)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_forgets_what_is_its_parents_and_keeps_what_its_worker_says() -> None:
    keeper: Any = Held()
    limit, sweeper = Held(), Held()
    process.keeper, process.soft_limit, process.worker.sweeper = keeper, limit, sweeper
    process.workers_token, process.own_token = None, (os.getpid(), "own")
    process.at_work = {threading.get_ident(): object()}
    process.worker.gate, process.worker.is_embedded = PoolGate(), False
    process.clock_offset, process.broker_rests_until = dt.timedelta(1), 7.0

    def remembered() -> Any:
        of = process.worker
        return [
            [process.own_token, len(process.at_work), of.sweeper is None, keeper.calls, limit.calls],
            [of.gate.is_own_process, of.is_embedded, process.clock_offset.days, process.broker_rests_until],
            process.pid == os.getpid(),
        ]

    assert in_child(remembered) == [[None, 0, True, ["forget"], ["forget"]], [True, False, 1, 7.0], True]
    assert remembered() == [[(os.getpid(), "own"), 1, False, [], []], [True, False, 1, 7.0], True]
    assert sweeper.calls == ["before", ("after", True)]


def test_a_process_without_a_worker_hands_off_nothing_and_does_not_end() -> None:
    fresh = Process()
    assert (fresh.worker.is_draining(), fresh.is_told_to_end(), fresh.worker.gate.is_open()) == (False, False, False)
    assert type(fresh.worker.gate) is Gate
    assert fresh.worker.gate is not Worker().gate


def test_what_a_test_sets_is_given_back() -> None:
    before, worker = vars(process).copy(), vars(process.worker).copy()
    with given_back():
        process.clock_offset = dt.timedelta(1)
        process.worker.runs_ahead = True
        process.worker = Worker(is_embedded=True)
        process.workers_token = "token"
    assert (vars(process), vars(process.worker)) == (before, worker)


def test_no_function_assigns_to_a_global() -> None:
    found = [
        f"{path.relative_to(SOURCES)}:{node.lineno}"
        for path in sorted(SOURCES.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Global)
    ]
    assert found == []


def test_each_fork_hook_is_registered_in_one_place() -> None:
    found = [path.stem for path in SOURCES.rglob("*.py") if "register_at_fork(" in path.read_text()]
    assert found == ["forks"]


@pytest.mark.parametrize("cls", [Process, Worker])
def test_each_member_says_what_it_is_for(cls: type) -> None:
    lines = (SOURCES / "store/process.py").read_text().splitlines()
    for member in dataclasses.fields(cls):  # type: ignore[arg-type]
        place = next(number for number, line in enumerate(lines) if line.startswith(f"    {member.name}: "))
        assert lines[place - 1].startswith("    #: "), member.name

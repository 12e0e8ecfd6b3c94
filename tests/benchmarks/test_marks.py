"""What processes note while they are measured."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import marks


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(marks.DIRECTORY, str(tmp_path))
    monkeypatch.setattr(marks, "_mine", None)
    yield tmp_path
    monkeypatch.setattr(marks, "_mine", None)


def test_nothing_is_noted_before_a_body_begins(directory: Path) -> None:
    assert marks.read(directory) == marks.Marks(first=0.0, last=0.0, roots=0, processes=0)


def test_the_first_begin_and_the_last_end_count(directory: Path) -> None:
    before = time.monotonic()
    marks.begin()
    between = time.monotonic()
    marks.begin()
    marks.end()
    marks.begin()
    late = time.monotonic()
    marks.end()

    seen = marks.read(directory)
    assert before <= seen.first <= between < late <= seen.last <= time.monotonic()
    assert (seen.roots, seen.processes) == (2, 1)
    assert seen.seconds == seen.last - seen.first


def test_processes_are_added_up_also_after_a_fork(directory: Path) -> None:
    marks.begin()
    marks.end()
    alone = marks.read(directory)
    child = multiprocessing.get_context("fork").Process(target=_a_root)
    child.start()
    child.join()

    both = marks.read(directory)
    assert (both.roots, both.processes) == (2, 2)
    assert both.first == alone.first
    assert both.last > alone.last


def test_a_file_that_is_just_being_made_is_not_read(directory: Path) -> None:
    (directory / "1").write_bytes(b"")
    assert marks.read(directory).processes == 0


def _a_root() -> None:
    marks.begin()
    marks.end()

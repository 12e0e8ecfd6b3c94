"""Run the mutants: ``python -m tests.mutants [word ...]``.

With words, only the mutants whose names have one of them. ``DATABASE_URL`` names a PostgreSQL server for the tests that
race two connections; without it their mutants are left out. Exits with 1 if a mutant survives, with 2 if a test fails
without one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
#: What a test run needs of the repository.
COPIED = ("conductor_app", "docs", "project", "tests", "manage.py", "pyproject.toml", "README.md")
#: Seconds for one test; a mutant that makes one hang is caught.
TEST_SECONDS = 60

# Python compares the seconds of a source's time with those in its compiled copy.
_instants = itertools.count(int(time.time()) + 10, 10)


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant, or of the sources as they are."""

    name: str
    #: The first test that failed; empty if none did.
    red: str
    seconds: float
    #: The end of the output, if the tests could not be run.
    error: str = ""


class Copy:
    """A copy of the repository, and a test database, for one job at a time."""

    def __init__(self, path: Path, number: int, postgres: str) -> None:
        self.path = path
        self._postgres = f"{postgres}_{number}" if postgres else ""
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, path / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, path / name)

    def run(self, mutant: Mutant) -> Verdict:
        """Run a mutant's tests, those on SQLite first."""
        source = self.path / "conductor_app" / mutant.file
        text = source.read_text()
        self._write(source, mutant.applied(text))
        try:
            return self.test(mutant.name, mutant.tests, on_postgres=mutant.on_postgres)
        finally:
            self._write(source, text)

    def test(self, name: str, tests: Sequence[str], *, on_postgres: bool = False) -> Verdict:
        """Run tests until one fails; those that need PostgreSQL there, or all."""
        started = time.monotonic()
        red = error = ""
        races = [test for test in tests if on_postgres or test.startswith("tests/races/")]
        embedded = [test for test in tests if test not in races]
        for selection, database in ((embedded, ""), (races, self._postgres)):
            if selection and not (red or error):
                red, error = self._pytest(selection, database)
        return Verdict(name, red, time.monotonic() - started, error)

    def _pytest(self, tests: Sequence[str], database: str) -> tuple[str, str]:
        env = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "CELERY_BROKER_URL")}
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}"]
        if database:
            env["DATABASE_URL"] = database
            options.append("--reuse-db")
        command = [sys.executable, "-m", "pytest", *options, *tests]
        done = subprocess.run(command, cwd=self.path, env=env, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return "", ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode == 1 and failed:
            return failed[1], ""
        # A test that hangs ends the whole run.
        if "Timeout" in done.stdout + done.stderr:
            return f"a test that took more than {TEST_SECONDS} s", ""
        return "", (done.stdout + done.stderr)[-2_000:]

    @staticmethod
    def _write(source: Path, text: str) -> None:
        source.write_text(text)
        instant = next(_instants)
        os.utime(source, (instant, instant))


def main() -> int:
    """Run what the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutants whose names have one of these words")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="copies that run at once")
    parser.add_argument("--list", action="store_true", help="name the mutants, and run nothing")
    given = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not given.words or any(word in mutant.name for word in given.words)]
    postgres = os.environ.get("DATABASE_URL", "")
    if not postgres.startswith("postgres"):
        postgres = ""
        left_out = [mutant.name for mutant in chosen if mutant.needs_postgres]
        chosen = [mutant for mutant in chosen if not mutant.needs_postgres]
        if left_out:
            print(f"Left out, since DATABASE_URL names no PostgreSQL: {', '.join(left_out)}.")
    for mutant in chosen:
        mutant.check(ROOT)
    if given.list:
        print("\n".join(mutant.name for mutant in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="conductor-mutants-") as directory:
        copies = [Copy(Path(directory) / str(number), number, postgres) for number in range(given.jobs)]
        return _report(copies, chosen)


def _report(copies: list[Copy], mutants: list[Mutant]) -> int:
    started = time.monotonic()
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    clean = list(_each(copies, [("as it is", tests[number :: len(copies)]) for number in range(len(copies))]))
    for verdict in clean:
        if verdict.red or verdict.error:
            print(f"Fails without a mutant: {verdict.red or verdict.error}")
            return 2
    print(f"{len(tests)} test files pass without a mutant ({time.monotonic() - started:.0f} s).", flush=True)
    survivors = broken = 0
    for verdict in _each(copies, mutants):
        survivors += not (verdict.red or verdict.error)
        broken += bool(verdict.error)
        says = f"caught by {verdict.red}" if verdict.red else f"ERROR\n{verdict.error}" if verdict.error else "SURVIVED"
        print(f"{verdict.seconds:5.1f} s  {verdict.name}: {says}", flush=True)
    print(
        f"{len(mutants)} mutants, {survivors} survived, {broken} could not be run ({time.monotonic() - started:.0f} s)."
    )
    return 1 if survivors or broken else 0


def _each(copies: list[Copy], jobs: Sequence[Mutant | tuple[str, Sequence[str]]]) -> Iterable[Verdict]:
    """Run each job in a copy that is free, and return the verdicts in the order of the jobs."""
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def run(job: Mutant | tuple[str, Sequence[str]]) -> Verdict:
        copy = free.get()
        try:
            return copy.run(job) if isinstance(job, Mutant) else copy.test(*job)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        yield from pool.map(run, jobs)


if __name__ == "__main__":
    raise SystemExit(main())

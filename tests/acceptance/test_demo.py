"""``python -m project.demo``, as a newcomer runs it: a real worker, and a process that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.worker,
    pytest.mark.skipif(
        bool(os.environ.get("DATABASE_URL") or os.environ.get("CELERY_BROKER_URL")),
        reason="has a database and a worker of its own, whatever the suite runs on",
    ),
]

ROOT = Path(__file__).resolve().parents[2]


def run(database: Path, *arguments: str) -> tuple[int, dict[str, object]]:
    command = [sys.executable, "-m", "project.demo", "--json", f"--database-url=sqlite:///{database}", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, timeout=110)
    return done.returncode, json.loads(done.stdout)


def test_the_demo_holds_what_it_promises_also_on_what_an_interrupted_run_has_left(tmp_path: Path) -> None:
    database = tmp_path / "demo.sqlite3"
    status, told = run(database, "--orders=5", "--deadline=1")
    assert (status, told["ok"], told["failure"]) == (1, False, "not done after 1 s")
    status, told = run(database, "--orders=24", "--deadline=90")
    assert (status, told["failure"]) == (0, "")
    assert all(check["holds"] for check in told["checks"])
    assert told["crash"]["recovered_after_seconds"] > told["crash"]["killed_after_seconds"]

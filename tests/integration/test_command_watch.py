"""``manage.py conductor``: how long executions ran, and ``--watch``, which follows them."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext

from conductor_app import transitions
from conductor_app.management.subcommands import ls, watch
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import process
from tests.support import executions
from tests.support.command import Terminal, Told, told
from tests.support.process import NotingBroker
from tests.support.worker import ROOT

pytestmark = pytest.mark.django_db
NOBODY = "01a204e4-550f-76ed-ae8b-b0cbcb0a4470"


@pytest.fixture(autouse=True)
def _steady_clock() -> Iterator[None]:
    process.broker = NotingBroker()
    yield
    clock.reset()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say what happens in the pauses of the next watch; after the last one comes Ctrl+C."""

    def between(*happen: Callable[[], object]) -> list[float]:
        left, slept = list(happen), []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if not left:
                raise KeyboardInterrupt
            left.pop(0)()

        monkeypatch.setattr(watch.time, "sleep", sleep)
        return slept

    return between


def nothing() -> None:
    """Nothing happens."""


# ----------------------------------------------------------------------------------------------------- how long it ran


def test_ls_tells_how_long_each_ran_and_how_old_it_is() -> None:
    done, run, queued = executions.running(), executions.running(), executions.queued()
    transitions.succeed(done, "1")
    now = clock.read("default")
    ago = {seconds: now - dt.timedelta(seconds=seconds) for seconds in (600, 500, 440, 180)}
    Execution.objects.update(created_at=ago[600])
    Execution.objects.filter(pk__in=[done.pk, run.pk]).update(started_at=ago[500])
    Execution.objects.filter(pk=done.pk).update(finished_at=ago[440])
    lines = told("ls").out.splitlines()
    assert lines[0].split()[-3:] == ["ran", "age", "error"]
    assert [" ".join(line.split()[5:]) for line in lines[1:]] == ["10 min", "8 min 10 min", "60 s 10 min"]
    rows = {row["id"]: row["ran_seconds"] for row in told("ls", "--json").json["executions"]}
    assert rows[str(queued.pk)] is None
    assert 500 <= rows[str(run.pk)] < 560
    assert rows[str(done.pk)] == 60


def test_a_narrow_terminal_loses_the_error_and_then_how_long_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    executions.running()
    heads = {}
    for columns in (80, 86, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        heads[columns] = Told("ls", stdout=Terminal()).out.splitlines()[0].split()
    assert heads[80] == ["id", "task", "status", "attempt", "step", "age"]
    assert heads[86] == ["id", "task", "status", "attempt", "step", "ran", "age"]
    assert heads[120][-1] == "error"


# --------------------------------------------------------------------------------------------------------------- watch


def test_ls_is_watched_in_blocks_where_there_is_no_terminal(pauses: Any) -> None:
    slept = pauses(nothing, executions.queued)
    answer = told("ls", "--watch", "7", "--status", "queued")
    assert (answer.code, answer.error, answer.notes) == (0, "", "")
    assert slept == [7, 7, 7]
    blocks = answer.out.split("Every 7 s until Ctrl+C: ")
    assert blocks[0] == ""
    assert len(blocks) == 3, "a block for each change"
    assert "No executions of status queued." in blocks[1]
    assert "○ queued" in blocks[2]
    assert "\x1b" not in answer.out


def test_a_watched_list_says_in_its_place_that_there_is_more(pauses: Any) -> None:
    for _ in range(3):
        executions.queued()
    pauses()
    answer = told("ls", "--watch", "--limit", "2")
    assert answer.out.splitlines()[-2:] == ["… and older ones: --limit 10 shows more.", ""]
    assert answer.notes == ""


def test_a_terminal_is_drawn_again_in_its_place(pauses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setenv("TERM", "xterm")
    for _ in range(30):
        executions.queued()
    slept = pauses(nothing)
    out = Told("ls", "--watch", "--no-color", "--limit", "100", stdout=Terminal()).out
    assert slept == [2, 2]
    frames = out.split("\x1b[H")[1:]
    assert out.count("\x1b[2J") == 1
    assert len(frames) == 2
    for frame in frames:
        assert frame.count("\n") == 9, "a line less than the window has, so that nothing moves up"
        assert "… 25 more lines: the window is not high enough." in frame
        assert frame.splitlines()[-1].startswith("\x1b[J… 25 more")
        assert all(line.startswith("\x1b[K") for line in frame.splitlines()[:-1])


def test_a_dumb_terminal_gets_blocks(pauses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    pauses(nothing)
    assert "\x1b" not in Told("ls", "--watch", "--no-color", stdout=Terminal()).out


@pytest.mark.parametrize(
    ("words", "seconds"),
    [(["--watch", "{}"], 2), (["{}", "--watch"], 2), (["{}", "--watch", "5"], 5), (["--watch=5", "{}"], 5)],
)
def test_show_is_watched_until_the_whole_tree_is_final(words: list[str], seconds: float, pauses: Any) -> None:
    parent, child = executions.family()

    def end_child() -> None:
        transitions.succeed(child, "1")

    def end_parent() -> None:
        transitions.succeed(executions.claimed(parent), "1")

    slept = pauses(end_child, end_parent, nothing)
    answer = told("show", *(word.format(child.pk) for word in words))
    assert answer.code == 0
    assert slept == [seconds] * 2
    blocks = answer.out.split("until Ctrl+C: ")[1:]
    assert len(blocks) == 3
    assert "▶ Running" in blocks[0]
    assert "✓" in blocks[1].splitlines()[1]
    assert "echo ✓ succeeded" in blocks[2]
    assert "waiting" not in blocks[2]


def test_what_was_cut_is_drawn_at_the_end(pauses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "8")
    monkeypatch.setenv("TERM", "xterm")
    run = executions.running()
    pauses(lambda: transitions.succeed(run, "1"))
    frames = Told("show", run.pk, "--watch", "--no-color", stdout=Terminal()).out.split("\x1b[2J")[1:]
    assert ["more lines" in frame for frame in frames] == [True, False]
    assert "Timeline" in frames[1]


def test_one_that_is_final_is_shown_once(pauses: Any) -> None:
    run = executions.running()
    transitions.succeed(run, "1")
    slept = pauses()
    assert told("show", run.pk, "--watch").code == 0
    assert slept == []


def test_one_that_is_pruned_meanwhile_ends_the_watch(pauses: Any) -> None:
    row = executions.queued()
    pauses(Execution.objects.filter(pk=row.pk).delete)
    answer = told("show", row.pk, "--watch")
    assert answer.code == 1
    assert answer.error.startswith(f"There is no execution {row.pk}.")


def test_an_outage_is_told_and_does_not_end_the_watch(pauses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    executions.queued()
    read = ls._read

    def down() -> None:
        def refused(options: Any) -> Any:
            raise OperationalError("connection refused\nIs it running?")

        monkeypatch.setattr(ls, "_read", refused)

    pauses(down, lambda: monkeypatch.setattr(ls, "_read", read))
    answer = told("ls", "--watch")
    assert answer.code == 0
    blocks = answer.out.split("until Ctrl+C: ")[1:]
    assert ["queued" in block for block in blocks] == [True, False, True]
    assert 'Database "default" does not answer: connection refused. Looking again.' in blocks[1]
    down()
    assert told("ls", "--watch").code == 1


@pytest.mark.parametrize("name", ["ls", "show"])
def test_a_watch_is_for_people(name: str) -> None:
    words = [] if name == "ls" else [executions.queued().pk]
    answer = told(name, *words, "--json", "--watch")
    assert (answer.code, answer.json) == (2, {"error": answer.error})
    assert answer.error == "--watch draws for people; --json gives one answer. Leave one of them out."
    assert told("ls", "-q", "--watch").code == 2


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "nan", "1e9"])
def test_a_pause_that_means_nothing_is_refused(seconds: str) -> None:
    for words in (["ls"], ["show", NOBODY]):
        answer = told(*words, f"--watch={seconds}")
        assert answer.code != 0
        assert "argument --watch: " in answer.error
        assert "must be a number of seconds greater than 0" in answer.error


def test_show_needs_an_id() -> None:
    for words in ([], ["--watch"], ["--json"]):
        answer = told("show", *words)
        assert answer.code == 2
        assert answer.error.startswith("Which execution? Give its id; ")
    assert told("show", "--watch", "5").error.startswith("'5' is not an execution's id.")


def test_each_look_takes_as_many_queries_as_one_call(pauses: Any) -> None:
    executions.family()
    told("ls")
    with CaptureQueriesContext(connection) as once:
        told("ls")
    pauses(nothing, nothing)
    with CaptureQueriesContext(connection) as thrice:
        told("ls", "--watch")
    assert len(thrice) == 3 * len(once)


# -------------------------------------------------------------------------------------------------------- as a process


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of processes with a database of their own."""
    path = tmp_path_factory.mktemp("watch") / "db.sqlite3"
    found = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "project.settings",
        "DATABASE_URL": f"sqlite:///{path}",
        "CELERY_BROKER_URL": "memory://",
        "PYTHONUNBUFFERED": "1",
    }
    manage = [sys.executable, "manage.py", "migrate", "-v0", "conductor_app"]
    subprocess.run(manage, cwd=ROOT, env=found, check=True, timeout=120)
    return found


def watching(environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path("manage.py")), "conductor", "ls", "--watch=0.1", *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background, and so all below it, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


def test_ctrl_c_ends_it_quietly(environment: dict[str, str]) -> None:
    process = watching(environment)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Every 0.1 s until Ctrl+C: ")
    process.send_signal(signal.SIGINT)
    _out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_a_reader_that_goes_away_ends_it_quietly(environment: dict[str, str]) -> None:
    # An age that is told changes in each block, so there is always one more to write.
    script = (
        "import django; django.setup(); from conductor_app import transitions; "
        "from conductor_app.store.ids import new_root_id; "
        "transitions.create(transitions.NewExecution("
        "id=new_root_id(), task='shop.tasks.pay', queue='celery', payload='[[],{}]', max_attempts=1))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, timeout=60)
    process = watching(environment)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()

"""``manage.py conductor workers``: who is at work, on which queues, how loaded."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from conductor_app import transitions
from conductor_app.management.subcommands import watch
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.telling import workers
from tests.support import executions
from tests.support.attendance import attends, lapses, runs, since
from tests.support.command import Terminal, Told, told
from tests.support.process import NotingBroker

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _steady_clock() -> Iterator[None]:
    process.broker = NotingBroker()
    yield
    clock.reset()


def document() -> dict[str, Any]:
    found: dict[str, Any] = told("workers", "--json").json
    return found


def worker(name: str = "celery@web1") -> dict[str, Any]:
    return next(found for found in document()["workers"] if found["name"] == name)


def queue(name: str = "celery") -> dict[str, Any]:
    return next(found for found in document()["queues"] if found["queue"] == name)


def test_without_workers_it_says_so_and_ends_well() -> None:
    answer = told("workers")
    assert answer.code == 0
    assert answer.out.splitlines() == [
        "No worker has been seen in the last minutes.",
        "",
        "No queue is served, and nothing is queued.",
    ]
    found = document()
    assert (found["workers"], found["queues"], found["more_workers"], found["more_queues"]) == ([], [], 0, 0)


def test_it_shows_what_each_worker_is_and_runs() -> None:
    first = runs(attends(queues=["celery", "mail"]), queue="celery")
    lines = told("workers").out.splitlines()
    assert lines[0].split() == (
        ["worker", "state", "pool", "busy", "lapsed", "queues", "versions", "release", "up", "seen", "runs"]
    )
    versions = "0.1.0, Celery 5.7.0, Django 5.2.19, Python 3.11.2"
    for text in ("celery@web1  alive", "prefork", "1/2", "celery,mail", versions, "2026.11.3", f"echo {first.pk}"):
        assert text in lines[1]
    assert lines[3] == "queue   served  queued  due  oldest due  running  a minute  workers"
    assert [line.split() for line in lines[4:]] == [
        ["celery", "yes", "0", "0", "1", "0", "celery@web1"],
        ["mail", "yes", "0", "0", "0", "0", "celery@web1"],
    ]


def test_its_document_has_the_same() -> None:
    row = attends(queues=["celery", "mail"])
    first = runs(row, queue="celery")
    found = worker()
    assert found.pop("started_at") < found.pop("seen_at")
    assert found == {
        "id": "celery@web1/0123abcd",
        "name": "celery@web1",
        "state": "alive",
        "host": "web1",
        "pid": 4711,
        "pool": "prefork",
        "slots": 2,
        "busy": 1,
        "running": 1,
        "lapsed": 0,
        "queues": ["celery", "mail"],
        "versions": {"conductor_app": "0.1.0", "celery": "5.7.0", "django": "5.2.19", "python": "3.11.2"},
        "release": "2026.11.3",
        "runs": [{"id": str(first.pk), "task": executions.TASK, "queue": "celery"}],
    }
    assert queue() == {
        "queue": "celery",
        "state": "served",
        "queued": 0,
        "due": 0,
        "stopped": 0,
        "oldest_due_at": None,
        "running": 1,
        "per_minute": 0.0,
        "workers": ["celery@web1"],
    }


def test_a_worker_is_alive_stopping_or_silent_and_is_forgotten() -> None:
    attends("a@h")
    attends("b@h", is_stopping=True)
    attends("c@h", ago=workers.SILENT_SECONDS + 5)
    attends("d@h", ago=workers.SHOWN_FOR.total_seconds() + 5)
    assert [(found["name"], found["state"]) for found in document()["workers"]] == [
        ("a@h", "alive"),
        ("b@h", "stopping"),
        ("c@h", "silent"),
    ]


def test_workers_that_sweep_rarely_are_not_silent_in_between(settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "LEASE_SECONDS": 100, "HEARTBEAT_SECONDS": 30, "SWEEP_SECONDS": 100}
    attends(ago=250)
    assert worker()["state"] == "alive"


def test_a_slot_of_a_prefork_pool_is_a_process_and_elsewhere_a_body() -> None:
    forks = attends("forks@h", pool="prefork", slots=4)
    for pid in (1, 1, 2):  # a process has claimed what it runs next
        runs(forks, pid)
    threads = attends("threads@h", pool="threads", slots=4)
    for _ in range(3):
        runs(threads, 9)
    assert [(worker(name)["busy"], worker(name)["running"]) for name in ("forks@h", "threads@h")] == [(2, 3), (3, 3)]


def test_a_lease_that_has_lapsed_is_nobodys_work() -> None:
    lapses(runs(attends()))
    found = worker()
    assert (found["busy"], found["running"], found["lapsed"], len(found["runs"])) == (0, 0, 1, 1)


def test_two_workers_of_one_name_are_two() -> None:
    attends(token="aaaaaaaa")
    runs(attends(token="bbbbbbbb"))
    assert [(found["id"], found["busy"]) for found in document()["workers"]] == [
        ("celery@web1/aaaaaaaa", 0),
        ("celery@web1/bbbbbbbb", 1),
    ]
    assert queue(executions.new().queue)["running"] == 1


def test_leases_tell_of_workers_that_have_no_row() -> None:
    """Those of an older release write none."""
    runs("old@h/0123abcd", queue="mail")
    lapses(runs("dead@h/0123abcd", queue="dead"))
    old, dead = worker("old@h"), worker("dead@h")
    assert (old["state"], old["slots"], old["busy"], old["queues"], old["seen_at"]) == (
        "alive",
        None,
        1,
        ["mail"],
        None,
    )
    assert (dead["state"], dead["lapsed"]) == ("silent", 1)
    assert (queue("mail")["state"], queue("dead")["state"]) == ("served", "unserved")


def test_a_queue_without_a_worker_is_told_from_one_whose_workers_are_all_busy() -> None:
    busy = attends("busy@h", queues=["busy", "shared"], slots=1)
    runs(busy, queue="busy")
    attends("free@h", queues=["shared"], slots=1)
    attends("ends@h", queues=["left"], is_stopping=True)
    for name in ("busy", "shared", "left", "nobody"):
        since(executions.queued(queue=name), 90)
    executions.queued(queue="nobody", countdown=60)
    found = {each["queue"]: each for each in document()["queues"]}
    assert {name: each["state"] for name, each in found.items()} == {
        "left": "unserved",
        "nobody": "unserved",
        "busy": "busy",
        "shared": "served",
    }
    assert list(found) == ["nobody", "left", "busy", "shared"]
    assert (found["nobody"]["queued"], found["nobody"]["due"], found["nobody"]["workers"]) == (2, 1, [])
    assert found["nobody"]["oldest_due_at"] is not None
    assert found["shared"]["workers"] == ["busy@h", "free@h"]
    shown = {line.split()[0]: line for line in told("workers").out.splitlines() if line}
    assert "by nobody" in shown["nobody"]
    assert "all busy" in shown["busy"]
    assert "90 s" in shown["busy"]


def test_workers_that_are_full_keep_nobody_waiting_who_is_not_there() -> None:
    runs(attends(slots=1), queue="celery")
    assert queue()["state"] == "served"


def test_only_some_of_what_a_worker_runs_is_named() -> None:
    row = attends(pool="gevent", slots=100)
    found = [runs(row, 1) for _ in range(workers.MOST_RUNS + 2)]
    assert [run["id"] for run in worker()["runs"]] == [str(each.pk) for each in found[: workers.MOST_RUNS]]
    assert "2 more" in told("workers").out


def test_there_is_an_end_to_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST", 2)
    for number in range(5):
        attends(f"w{number}@h", queues=[f"q{number}"])
    found = document()
    assert (len(found["workers"]), found["more_workers"], len(found["queues"]), found["more_queues"]) == (2, 3, 2, 3)
    assert "… and 3 workers more." in told("workers").out


def test_the_throughput_of_a_queue_is_what_ended_there_lately() -> None:
    row = attends(queues=["mail", "idle"])
    old = runs(row, queue="mail")
    transitions.succeed(old, "1")
    clock.shift(dt.timedelta(seconds=workers.THROUGHPUT_SECONDS + 1))
    attends(queues=["mail", "idle"])
    for _ in range(3):
        transitions.succeed(runs(row, queue="mail"), "1")
    transitions.fail(runs(row, queue="mail"), executions.FAILURE)
    assert (queue("mail")["per_minute"], queue("idle")["per_minute"]) == (0.8, 0)
    assert document()["throughput_seconds"] == 300
    shown = {line.split()[0]: line.split() for line in told("workers").out.splitlines() if line}
    assert "0.8" in shown["mail"]


def test_of_very_many_runs_the_throughput_is_that_of_the_time_in_which_the_latest_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "LATEST_RUNS", 3)
    row = attends()
    for _ in range(2):
        transitions.succeed(runs(row, queue="celery"), "1")
    clock.shift(dt.timedelta(seconds=100))
    for _ in range(2):
        transitions.succeed(runs(row, queue="celery"), "1")
    clock.shift(dt.timedelta(seconds=20))
    attends()
    found = workers.read()
    assert found.throughput_seconds == pytest.approx(120, abs=10)
    # The one at the beginning of that time is its mark.
    assert found.queues[0].per_minute == pytest.approx(2 / 120 * 60, abs=0.2)
    others = workers.read(executions.Execution.objects.none())
    assert others.throughput_seconds == pytest.approx(found.throughput_seconds, abs=10)


def test_it_takes_seven_queries_however_many_there_are() -> None:
    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            workers.read()
        return len(captured)

    runs(attends(), queue="q0")
    assert queries() == 7
    for number in range(200):
        runs(attends(f"w{number}@h", queues=[f"q{number}"]), queue=f"q{number}")
        executions.queued(queue=f"q{number}")
    assert queries() == 7


def test_names_cannot_draw_on_the_terminal() -> None:
    attends("evil\x1b[2J@h", queues=["q\u202e"])
    assert "\x1b" not in told("workers").out
    assert "\u202e" not in told("workers").out


def test_watch_draws_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    row = attends()

    def sleep(seconds: float) -> None:
        assert seconds == 2
        if executions.Execution.objects.exists():
            raise KeyboardInterrupt
        transitions.succeed(runs(row), "1")
        attends(slots=7)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    answer = told("workers", "--watch")
    assert (answer.code, answer.out.count("Every 2 s until Ctrl+C")) == (0, 2)
    assert "0/7" in answer.out
    assert told("workers", "--watch", "--json").code == 2


def test_a_narrow_terminal_has_no_room_for_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    runs(attends())
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Told("workers", stdout=Terminal()).out
    assert "versions" not in out
    assert "alive" in out


# -------------------------------------------------------------------------------------------------------------- doctor


def seen() -> dict[str, Any]:
    checks: list[dict[str, Any]] = told("doctor", "--json").json["checks"]
    return next(check for check in checks if check["name"] == "seen")


def test_doctor_tells_what_workers_are_made_of() -> None:
    assert seen()["message"] == "No worker has written that it is there in the last minute."
    attends("a@h")
    attends("b@h")
    alike = "release 2026.11.3, conductor_app 0.1.0, Celery 5.7.0, Django 5.2.19, Python 3.11.2"
    found = seen()
    assert (found["level"], found["hint"]) == ("OK", "")
    assert found["message"] == f"2 workers seen in the last minute: {alike}."


def test_doctor_tells_of_a_deployment_that_is_under_way() -> None:
    attends("a@h")
    attends("b@h")
    attends("c@h", release="2026.11.2", package="0.0.9")
    attends("d@h", is_stopping=True, release="2026.11.1")
    found = seen()
    assert found["level"] == "OK"
    assert "3 workers seen in the last minute, of 2 kinds: 2 of release 2026.11.3" in found["message"]
    assert "; 1 of release 2026.11.2, conductor_app 0.0.9" in found["message"]
    assert "deployment" in found["hint"]


def test_doctor_warns_of_two_workers_with_one_name_and_not_of_one_that_replaced_another() -> None:
    attends(token="aaaaaaaa", up=500, ago=40)
    attends(token="bbbbbbbb", up=20)
    assert seen()["level"] == "OK"
    attends(token="cccccccc", up=10)
    found = seen()
    assert (found["level"], found["needs_person"]) == ("WARN", False)
    assert found["message"].endswith("Two or more at once are called celery@web1.")


def test_doctor_knows_the_queues_of_workers_that_it_cannot_ask() -> None:
    for name in ("mail", "nobody"):
        since(executions.queued(queue=name), 600)
    attends(queues=["mail"])
    found = {check["name"]: check for check in told("doctor", "--json").json["checks"]}
    assert found["queue"]["level"] == "FAIL"
    assert found["queue"]["message"].endswith("No worker serves queue nobody.")
    attends("celery@web2", queues=["nobody"])
    found = {check["name"]: check for check in told("doctor", "--json").json["checks"]}
    assert found["queue"]["level"] == "WARN"

"""Who keeps others waiting, as ``conductor doctor`` tells it where the database does."""

from __future__ import annotations

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from django.core.management import call_command
from django.db import OperationalError, connection, connections

from conductor_app.management.subcommands import open_work
from conductor_app.models import Execution
from conductor_app.store import lock_holders
from tests.support.executions import running
from tests.support.locks import locked
from tests.support.polling import wait_until

pytestmark = pytest.mark.django_db(transaction=True)


def locks() -> dict[str, str]:
    """What ``doctor`` says of locks."""
    out = io.StringIO()
    with suppress(SystemExit):  # of other findings
        call_command("conductor", "doctor", "--json", stdout=out)
    (line,) = [line for line in json.loads(out.getvalue())["checks"] if line["name"] == "locks"]
    return dict(line)


def touch(execution: Execution) -> int:
    try:
        return Execution.objects.filter(pk=execution.pk).update(cancel_reason="")
    finally:
        connections.close_all()


def somebody_waits(seconds: float) -> None:
    # InnoDB shows what it has shown before to whoever asks again within 0.1 s.
    wait_until(lambda: lock_holders.holders(seconds, "default"), 40, interval=0.3, message="Nobody waits")


def nobody_waits() -> None:
    wait_until(lambda: locks()["level"] == "OK", 40, interval=0.3, message="Somebody waits")


def test_doctor_names_whose_locks_others_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_work, "LOCK_SECONDS", 1)
    execution = running()
    nobody_waits()
    with ThreadPoolExecutor() as pool:
        with locked(execution.pk):
            waiting = pool.submit(touch, execution)
            somebody_waits(1)
            line = locks()
            assert not waiting.done()
        assert waiting.result(40) == 1
    assert line["level"] == "WARN"
    assert re.match(
        r"1 session waiting, the first for .+, for locks of session \d+ of .+, its transaction is open for",
        line["message"],
    )
    (session,) = re.findall(r"session (\d+) of", line["message"])
    assert re.search(rf"(pg_terminate_backend\({session}\)|KILL {session})\.", line["hint"])
    nobody_waits()


def test_what_another_user_s_session_does_may_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = lock_holders.Holder(session=7, client="", state="", seconds=0, waiting=2, longest=30)
    monkeypatch.setattr(lock_holders, "holders", lambda *_args: [hidden, hidden])
    assert locks()["message"] == (
        "2 sessions waiting, the first for 30 s, for locks of session 7. 1 other session keeps others waiting, too."
    )


def test_a_session_may_wait_for_a_while() -> None:
    execution = running()
    with ThreadPoolExecutor() as pool:
        with locked(execution.pk):
            waiting = pool.submit(touch, execution)
            somebody_waits(0)
            assert lock_holders.holders(300, "default") == []
        assert waiting.result(40) == 1


def test_a_database_that_does_not_tell_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> None:
        raise OperationalError("you need the PROCESS privilege")

    monkeypatch.setattr(lock_holders, "holders", refuse)
    line = locks()
    assert (line["level"], line["message"]) == ("OK", "Not looked at: you need the PROCESS privilege")


@pytest.mark.skipif(connection.vendor != "sqlite", reason="the others know row locks")
def test_sqlite_has_no_locks_to_tell_of() -> None:
    assert lock_holders.holders(0, "default") == []
    assert locks()["level"] == "OK"

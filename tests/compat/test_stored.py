"""Executions that earlier versions stored go on with this one, from wherever they stood, and say what they said.

``tests/compat/make.py`` wrote each file with the version that its name says.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command

from conductor_app import api
from conductor_app.models import Execution, FailedExecution, Step
from conductor_app.testing import advance, drain
from conductor_app.values.payloads import dumps, loads
from tests.app import stored

pytestmark = pytest.mark.django_db

FILES = sorted(Path(__file__).parent.glob("version_*.json"))


@pytest.fixture(params=FILES, ids=[path.stem for path in FILES], autouse=True)
def _stored(request: pytest.FixtureRequest, db: None, conductor: Any) -> None:
    call_command("loaddata", str(request.param), verbosity=0)


@pytest.fixture
def _let_through() -> Iterator[None]:
    stored.may_pass.add("child")
    yield
    stored.may_pass.clear()


def _root(task: Any, **fields: Any) -> Execution:
    return Execution.objects.get(task=task.name, parent=None, **fields)


def _waiting_for_go() -> list[Execution]:
    waiting = Execution.objects.filter(status="waiting")
    return list(waiting.filter(task__in=[stored.waits.name, stored.remembers.name]))


def _go(*, rounds: int = 5) -> None:
    """Send the event to whoever waits for it; children of a map begin to wait one after another."""
    for _ in range(rounds):
        for execution in _waiting_for_go():
            api.send_event(execution, "go", "sent")
        drain()


def test_what_waits_for_an_event_goes_on_with_it() -> None:
    drain()
    _go()

    assert _root(stored.waits, payload__contains="alone").get_result() == ["alone", "sent"]


def test_what_waits_for_children_gets_their_results() -> None:
    drain()
    _go()

    assert _root(stored.invokes).get_result() == ["parent", ["invoked", "sent"]]
    assert _root(stored.maps).get_result() == [[f"mapped {number}", "sent"] for number in range(3)]
    assert _root(stored.gathers).get_result() == [["gathered", "sent"], 2]
    assert _root(stored.invokes_plain).get_result() == 2


def test_deadlines_that_have_passed_since_are_decided() -> None:
    drain()
    advance(dt.timedelta(days=365))

    assert _root(stored.sleeps).get_result() == "rested"
    assert _root(stored.waits_in_time).get_result() == "Event 'go-in-time' did not come within 60s (step 'wait')"
    assert _root(stored.invokes_in_time).get_result() == "Child execution timed out after 30s (step 'child')"


def test_values_and_failures_come_back_as_they_went_in() -> None:
    drain()
    _go()

    assert _root(stored.remembers).get_result() == {
        "same": True,
        "together": [None, 1],
        "caught": ["Declined", 402, [402, "no funds"], "Child execution failed: card declined", None],
    }
    assert _root(stored.echo, status="succeeded", payload__contains="12.30").get_result() == stored.VALUES


def test_what_was_stored_is_what_would_be_stored_today() -> None:
    """Else there is a new format, which older workers could not tell from the first: docs/reference/storage.md."""
    texts = {
        *Execution.objects.exclude(payload="").values_list("payload", flat=True),
        *Execution.objects.exclude(result=None).values_list("result", flat=True),
        *Step.objects.exclude(result=None).values_list("result", flat=True),
    }
    assert len(texts) > 10
    assert sorted(dumps(loads(text), "value") for text in texts) == sorted(texts)


def test_what_was_queued_runs() -> None:
    drain()
    advance(dt.timedelta(days=365))

    assert _root(stored.retries).get_result() == 2
    assert _root(stored.echo, payload__contains="later").get_result() == "later"


def test_the_run_of_a_worker_that_is_gone_is_taken_over() -> None:
    from conductor_app.engine import sweeper

    sweeper.sweep(publish=False)
    drain()

    taken = _root(stored.echo, payload__contains="died")
    assert (taken.status, taken.attempt, taken.get_result()) == ("succeeded", 2, "died")


@pytest.mark.usefixtures("_let_through")
def test_an_operator_can_retry_what_had_failed_or_was_cancelled() -> None:
    failed, cancelled = _root(stored.fails_below), _root(stored.waits, payload__contains="cancelled")
    assert FailedExecution.objects.get(pk=failed.pk).message == "Child execution failed: not yet"

    api.retry(failed)
    api.retry(cancelled)
    drain()
    _go()

    assert _root(stored.fails_below).get_result() == "passed"
    assert _root(stored.waits, payload__contains="cancelled").get_result() == ["cancelled", "sent"]
    assert not FailedExecution.objects.filter(pk=failed.pk).exists()


def test_idempotency_keys_and_callbacks_are_kept() -> None:
    linked = _root(stored.waits, idempotency_key="order-7")
    options = linked.get_options()
    assert options["headers"] == {"tenant": "north"}
    assert [callback["task"] for callback in options["link"]] == [stored.echo.name]

    again = stored.waits.s(name="linked").apply_async(idempotency_key="order-7")

    assert again.id == str(linked.pk)

"""Every sentence about an execution can be translated, as a whole. No database: rows are made up.

The language of these tests writes each message in capitals. All values in the rows are capitals, so whatever is left in
small letters was not looked up in a catalogue.
"""

from __future__ import annotations

import ast
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from gettext import NullTranslations
from pathlib import Path
from typing import Any

import pytest
from django.utils import translation
from django.utils.translation import trans_real
from django.utils.translation.trans_real import CONTEXT_SEPARATOR

from conductor_app import telling
from conductor_app.models import Attempt, Execution, FailedExecution, Operation, PausedTask, Schedule, Step
from conductor_app.models.execution import PARKED_UNTIL
from conductor_app.states import (
    ExecutionStatus,
    ItemState,
    OperationKind,
    OperationSource,
    RunOutcome,
    StepKind,
    StepStatus,
)
from conductor_app.telling.headlines import headline
from conductor_app.telling.history import history, shortened
from conductor_app.telling.labels import document, label
from conductor_app.telling.mailbox import unclaimed
from conductor_app.telling.operations import Deed, Progress
from conductor_app.telling.schedules import sentence as sentence_of_schedule
from conductor_app.telling.situation import Parked, Situation
from conductor_app.telling.story import Story
from conductor_app.telling.waits import awaited
from conductor_app.transitions import kinds, waits
from tests.support.instants import NOW, ago, ahead

ROOT, CHILD = uuid.UUID(int=1), uuid.UUID(int=2)

_PLACEHOLDER = re.compile(r"(%\(\w+\)[sd])")
#: What no language changes: units of time, commands, and the class that a hint is about.
_THE_SAME = re.compile(r"(?<=\d )(?:ms|s|min|h|d)\b|(?:manage\.py conductor|celery -A) .*|(?<=\()StepMismatch\b")


class Capitals(NullTranslations):
    """A catalogue that has every message, in capitals, and knows which ones were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def to_language(self) -> str:
        return "xx"

    def gettext(self, message: str) -> str:
        message = message.rpartition(CONTEXT_SEPARATOR)[2]
        self.asked.add(message)
        parts = _PLACEHOLDER.split(message)
        return "".join(part if _PLACEHOLDER.fullmatch(part) else part.upper() for part in parts)

    def ngettext(self, msgid1: str, msgid2: str, n: int) -> str:
        self.asked.add(msgid1)
        return self.gettext(msgid1 if n == 1 else msgid2)


@pytest.fixture
def capitals(monkeypatch: pytest.MonkeyPatch, settings: Any) -> Iterator[Capitals]:
    settings.CONDUCTOR = {}
    catalogue = Capitals()
    monkeypatch.setitem(trans_real._translations, "xx", catalogue)
    with translation.override("xx"):
        yield catalogue


def execution(status: str, **fields: Any) -> Execution:
    values: dict[str, Any] = {
        "id": ROOT,
        "root_id": ROOT,
        "task": "SHOP.FULFIL",
        "queue": "Q1",
        "status": status,
        "max_attempts": 4,
        "created_at": ago(60),
        "due_at": ago(1),
        "finished_at": ago(5) if status in ("succeeded", "failed", "cancelled") else None,
        "lease_owner": "W1/4711",
    }
    return Execution(**{**values, **fields})


def child(status: str, **fields: Any) -> Execution:
    return execution(status, **{"id": CHILD, "parent_id": ROOT, "task": "SHOP.CHARGE", "step": "CHARGE", **fields})


def step(status: str = "pending", kind: str = "invoke", **fields: Any) -> Step:
    values: dict[str, Any] = {"name": "CHARGE", "task": "SHOP.CHARGE", "child_id": CHILD, "created_at": ago(12)}
    values["finished_at"] = None if status == "pending" else ago(6)
    return Step(**{**values, "kind": kind, "status": status, **fields})


def failed(error_class: str = "NO_STOCK", message: str = "NO!", **fields: Any) -> Execution:
    return execution("failed", error=json.dumps({"type": error_class, "message": message}), **fields)


def failure(key: uuid.UUID, **fields: Any) -> FailedExecution:
    return FailedExecution(execution_id=key, task="SHOP.CHARGE", error_class="DECLINED", attempts=4, **fields)


def situation(
    row: Execution, *steps: Step, children: tuple[Execution, ...] = (), failures: tuple[FailedExecution, ...] = ()
) -> Situation:
    tree = {other.pk: other for other in (row, *children)}
    return Situation(row, NOW, steps, tree, {found.pk: found for found in failures}, app="SHOP")


def waiting(*steps: Step, **more: Any) -> Situation:
    return situation(execution("waiting"), *steps, **more)


def situations() -> Iterator[Situation]:
    # queued
    yield situation(execution("queued", cancel_requested_at=ago(1)))
    yield situation(execution("queued", due_at=None))
    yield situation(execution("queued", due_at=ahead(600)))
    yield situation(execution("queued"))
    yield situation(execution("queued", due_at=ago(600)))
    yield replace(situation(execution("queued", due_at=ago(600))), at_work=3)
    yield replace(waiting(step(), children=(child("queued", due_at=ago(600)),)), at_work=3)
    refused = json.dumps({"type": "X", "message": "TOO OLD", "attributes": {"put_off_at_fence": 0}})
    for due_at in (ahead(8), ago(1), ago(600)):
        yield situation(execution("queued", due_at=due_at, error=refused))
    yield waiting(step(), children=(child("queued", due_at=ago(1), error=refused),))
    refusal = {"type": "kombu.exceptions.ContentDisallowed", "message": "REFUSING"}
    yield situation(execution("queued", error=json.dumps(refusal)))
    for allowed in (4, None):
        error = json.dumps({"type": "SHOP.NO_STOCK", "message": "NONE LEFT"})
        yield situation(execution("queued", attempt=2, max_attempts=allowed, due_at=ahead(8), error=error))
    # behind the one before it of the same unique key
    for predecessor in (CHILD, None):
        yield situation(execution("queued", due_at=None, unique_key="C-7", predecessor=predecessor))
    # parked by a limit
    far = execution("queued", due_at=PARKED_UNTIL)
    yield situation(far)
    for number, key in ((5, "A-1"), (None, "")):
        parked = Parked("BANK", key, number, number or 0, ago(9), 3, (CHILD,))
        yield replace(situation(far), parked=parked)
    # held, or of a paused task
    for by in ("ANA", None):
        for status in ("queued", "running", "waiting"):
            yield situation(execution(status, held_at=ago(9), held_by=by, hold_reason="BANK"))
        yield situation(execution("queued", due_at=ahead(8), held_at=ago(9), held_by=by, hold_reason="BANK"))
        pause = PausedTask(name="SHOP.FULFIL", paused_at=ago(9), paused_by=by or "", reason="BANK")
        yield replace(situation(execution("queued")), paused=pause)
    # of a tree that has a deadline
    for instant in (ahead(600), ago(2)):
        yield situation(execution("queued", tree_deadline_at=instant))
    # running
    for options in ("{}", '{"plain": {"acks_late": false}}'):
        silent = execution("running", lease_expires_at=ahead(20), options=options)
        cancelled = execution("running", lease_expires_at=ahead(50), cancel_requested_at=ago(4), options=options)
        yield from (situation(silent), situation(cancelled))
    yield situation(execution("running", lease_expires_at=ahead(50), started_at=ago(59), max_attempts=None))
    # waiting
    yield situation(execution("waiting", cancel_requested_at=ago(1)))
    yield waiting()
    yield waiting(*(step(name=f"ITEM-{number}", deadline_at=ahead(number)) for number in range(7)))
    for deadline in (None, ago(1), ahead(18)):
        yield waiting(step(kind="sleep", deadline_at=deadline))
        yield waiting(step(kind="event", deadline_at=deadline, execution_id=ROOT))
        yield waiting(step(deadline_at=deadline))
        yield waiting(step(deadline_at=deadline, on_timeout="abandon"), children=(child("running"),))
        yield waiting(step(deadline_at=deadline), children=(child("queued", due_at=ago(400)),))
        for kind in ("map", "gather"):
            yield waiting(step(kind=kind, deadline_at=deadline))
            yield waiting(step(kind=kind, deadline_at=deadline, total=3, remaining=2, fails_fast=False))
    yield waiting(step(kind="map", max_parallel=2))
    for kind in ("first", "as_completed"):
        for most in (None, 2):
            yield waiting(step(kind=kind, total=3, remaining=3, max_failures=most, counted=""))
    yield waiting(step(kind="timer", deadline_at=ahead(18)), step(kind="message"))
    for kind, counted in (("map", None), ("gather", "")):
        yield waiting(step(kind=kind, total=3, remaining=2, max_failures=1, counted=counted))
    for name in ("REST", None):
        astray = {"woken_by": "CHARGE", "came_to": name, "fence": 2, "runs": 1}
        yield situation(execution("waiting", options=json.dumps({"astray": astray})))
    # ended
    yield situation(execution("succeeded"))
    yield situation(failed(), failures=(failure(ROOT),))
    yield situation(failed("StepMismatch"))
    yield situation(failed(), step("failed"), failures=(failure(ROOT, step="CHARGE"),))
    behind = failure(ROOT, step="CHARGE", root_cause_id=CHILD)
    yield situation(failed(), step("failed"), failures=(behind,))
    yield situation(failed(), step("failed"), failures=(behind, failure(CHILD)))
    yield situation(failed(), step("timed_out"), failures=(behind,), children=(child("waiting"),))
    for outcome in ("failed", "timed_out"):  # for those who may not see messages
        wordless = execution("failed", error=json.dumps({"type": "SHOP.DECLINED", "message": ""}))
        yield situation(wordless, failures=(failure(ROOT),))
        yield situation(wordless, step(outcome), failures=(failure(ROOT, step="CHARGE"),))
    done = [step("succeeded", "step", name=f"STEP-{number}") for number in range(7)]
    yield situation(execution("cancelled"), done[0])
    yield situation(execution("cancelled", result="1"))
    yield situation(execution("cancelled", cancel_reason="NO!"), *done)
    yield situation(execution("cancelled"), step("cancelled"), children=(child("cancelled"),))
    yield situation(execution("cancelled"), step("cancelled"), children=(child("running"),))


def stories() -> Iterator[Story]:
    def told(row: Execution, *steps: Step, **more: Any) -> Story:
        return Story(row, situation(row, *steps, **more), list(steps), len(steps), {}, [], 1, {})

    yield told(execution("queued", due_at=ahead(8)))
    yield told(child("queued"))
    yield told(execution("queued", tree_deadline_at=ahead(600)))
    yield told(execution("running", started_at=ago(59), lease_expires_at=ahead(50)), step("succeeded", "step"))
    yield told(execution("cancelled", cancel_requested_at=ago(6)))
    yield told(execution("cancelled", cancel_requested_at=ago(6), cancel_reason="WRONG ORDER"))
    for kind in (*StepKind, "other"):
        for status in StepStatus:
            yield told(execution("waiting"), step(status, kind, attempt=2, deadline_at=ahead(18)))
    yield told(execution("waiting"), step(), children=(child("running", started_at=ago(9)),))
    copied = step("succeeded", fence=0, attempt=0)
    for number in (1, 2):
        yield told(execution("queued"), *[copied] * number)
    yield replace(told(execution("queued"), copied), step_count=300)
    again = execution("running", started_at=ago(59), run_started_at=ago(2), due_at=ago(3), fence=9, lease_owner="C@W/1")
    ended = [
        Attempt(
            execution_id=ROOT,
            run=number,
            attempt=1,
            worker="C@W/1",
            due_at=ago(50),
            started_at=ago(48 - number),
            finished_at=ago(47 - number),
            outcome=outcome.value,
            error_class="SHOP.DECLINED",
            message="NO!",
        )
        for number, outcome in enumerate(RunOutcome, 1)
    ]
    yield replace(told(again), attempts=ended)
    other = uuid.UUID(int=3)
    for kind in OperationKind:
        for operation in (
            asked(kind, actor="ANA", reason="WHY"),
            *(asked(kind, source=way) for way in OperationSource),
        ):
            deeds = [Deed(ago(3), operation, ROOT, None), Deed(ago(2), operation, ROOT, other)]
            yield replace(told(execution("queued")), deeds=deeds)
            yield replace(told(child("queued")), deeds=deeds)
            yield replace(told(execution("queued")), deeds=[Deed(ago(1), operation, other, ROOT)])


def asked(kind: str, **fields: Any) -> Operation:
    return Operation(kind=kind, **{"source": "admin", **fields})


def progresses() -> Iterator[Progress]:
    each = Counter({state.value: 9 for state in ItemState})
    for kind in OperationKind:
        statuses = Counter({status.value: 1 for status in ExecutionStatus})
        yield Progress(asked(kind), each, statuses, Counter({"NO": 4, "NEVER": 5}))
        yield Progress(asked(kind), each, Counter(), Counter({"NO": 9}))


def schedules() -> Iterator[Schedule]:
    for values in (
        {},
        {"waiting": "[]"},
        {"next_at": None},
        {"next_at": ago(600)},
        {"paused_at": ago(60)},
        {"paused_at": ago(60), "paused_by": "ANA", "pause_reason": "INCIDENT"},
        {"absent_at": ago(60)},
    ):
        yield Schedule(**{"next_at": ahead(60), **values})


def sentences() -> Iterator[str]:
    for told in situations():
        line = headline(told)
        yield from (line.text, *line.hints)
        for item in awaited(told):
            yield from (item.what, *item.then)
    yield from (found.sentence for found in progresses())
    yield from (sentence_of_schedule(found, NOW) for found in schedules())
    yield unclaimed({"APROVED": 1})
    yield unclaimed({f"EVENT-{number}": number for number in range(1, 8)})
    for read in stories():
        yield from (moment.text for moment in (*history(read), *shortened(history(read), 2)))


def messages(path: Path) -> set[str]:
    """Every text that a module passes to gettext as it stands there."""
    calls = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))
    texts = (call.args for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("_", "ngettext"))
    return {text.value for args in texts for text in args if isinstance(text, ast.Constant)}


def test_every_sentence_is_translated_as_a_whole(capitals: Capitals) -> None:
    found = list(sentences())
    assert {told.execution.status for told in situations()} == set(ExecutionStatus)
    assert [text for text in found if re.search("[a-z]", _THE_SAME.sub("", text))] == []


def test_every_message_is_among_the_sentences_above(capitals: Capitals) -> None:
    list(sentences())
    modules = [*Path(telling.__path__[0]).glob("*.py"), *Path(waits.__path__[0]).glob("*.py"), Path(kinds.__file__)]
    found = {message for path in modules for message in messages(path)}
    assert len(found) > 100
    assert found - capitals.asked == set()


def test_what_programs_read_stays_as_it_is(capitals: Capitals) -> None:
    for row in (execution(status) for status in ExecutionStatus):
        assert label(row, NOW).word == document(row, NOW)["shown_as"] == row.status
    scheduled = execution("queued", due_at=ahead(8))
    assert document(scheduled, NOW)["shown_as"] == "scheduled"
    (hint,) = headline(situation(failed())).hints
    assert hint.endswith(f": manage.py conductor retry {ROOT}")


@pytest.mark.parametrize("text", ["50%", "%s", "%(step)s", "%%"])
def test_percent_signs_of_tasks_and_callers_are_text(text: str) -> None:
    row = failed(text, text, cancel_reason=text, cancel_requested_at=ago(1))
    told = situation(row, step("succeeded", name=text), step(name=text), failures=(failure(ROOT, step=text),))
    assert f'Failed at step "{text}": {text}' in headline(told).text
    assert f'keeping the result of "{text}": manage.py' in headline(told).hints[0]
    (item,) = awaited(waiting(step(kind="event", task=text)))
    assert item.what == f'The event "{text}".'
    shown = [moment.text for moment in history(Story(row, told, list(told.steps), 2, {}, [], 1, {}))]
    assert f'step "{text}" succeeded after 6.0 s' in shown
    assert f"cancel requested: {text}" in shown

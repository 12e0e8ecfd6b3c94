"""The page on mistakes quotes what people really see."""

from __future__ import annotations

import ast
import datetime as dt
import re
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from django.core.management import call_command
from django.db import transaction

from conductor_app import ExecutionContext, api, durable_task, transitions
from conductor_app.engine import claims
from conductor_app.exceptions import Failure
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.telling import story
from conductor_app.telling.headlines import headline
from conductor_app.telling.mailbox import mailbox_of, unclaimed
from conductor_app.transitions import AwaitEvent
from conductor_app.values.failures import load_failure
from tests.app import scenarios
from tests.docs.pages import ROOT, prose
from tests.support import executions
from tests.support.bodies import durable, failure, run
from tests.support.process import NotingBroker

PAGE = "docs/howto/troubleshooting.md"
#: So much of a text of the source has to be fixed, or it would match anything.
_LEAST_FIXED = 12
_ANYTHING = "\0"


def quotes() -> list[tuple[str, str]]:
    """Each text that the page quotes, with the heading above it."""
    found: list[tuple[str, str]] = []
    heading, lines = "", list[str]()
    for line in [*prose(PAGE).splitlines(), ""]:
        if line.startswith("> "):
            lines.append(line[2:])
        elif lines:
            found.append((heading, " ".join(lines)))
            lines = []
        if line.startswith("### "):
            heading = line[4:]
    return found


def quoted(heading: str) -> list[str]:
    return [text for above, text in quotes() if above == heading]


# ------------------------------------------------------------------------------------------------------------- provoked


@durable
def charge(ctx: ExecutionContext, order_id: int, total: int = 0) -> Any:
    """Do what each case asks for."""
    return CASES[ctx.step("which", lambda: order_id)](ctx)


@durable
def takes_an_order(ctx: ExecutionContext, order: Any) -> None:
    """Nothing is run of it."""


@durable
def two_arguments(ctx, order_id, total):  # type: ignore[no-untyped-def]  # as the page shows it
    """Nothing is run of it."""


def _raised(call: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its text is what is looked at
        call()
    return str(caught.value)


def _in_transaction(ctx: ExecutionContext) -> None:
    with transaction.atomic():
        ctx.invoke("charge", scenarios.echo, 1)


def _swallow(ctx: ExecutionContext) -> None:
    ctx.step("pay", lambda: ctx.invoke("charge", scenarios.echo, 1))


CASES: list[Callable[[ExecutionContext], Any]] = [
    _in_transaction,
    _swallow,
    lambda ctx: api.get_result(uuid.uuid4()),
    lambda ctx: scenarios.echo.delay(1).get(),
    lambda ctx: [ctx.step("charge", lambda: 1), ctx.step("charge", lambda: 2)],
    lambda ctx: ctx.invoke("charge", "tests.app.scenarios.ehco", 1),
    lambda ctx: ctx.invoke("charge", two_arguments, {"order_id": 1}),
]


def _of_body(case: int) -> str:
    return failure(run(charge, order_id=case)).message


def _waiting_for_a_transaction() -> str:
    with transaction.atomic():
        result = scenarios.echo.delay(1)
        return _raised(lambda: api.get_result(result))


def _told(execution: Execution) -> str:
    found = story.read(execution.pk, preview=10)
    assert found is not None
    return headline(found.situation).text


def _queued_for(minutes: int, *, running: int = 0) -> str:
    execution = executions.queued(queue="payments")
    clock.shift(dt.timedelta(minutes=minutes))
    for _ in range(running):
        executions.running(queue="payments")
    return _told(execution)


def _awaiting() -> Execution:
    execution = executions.running()
    assert transitions.suspend(execution, AwaitEvent("approval", "approved", None))
    return execution


def _misnamed() -> str:
    execution = _awaiting()
    for _ in range(2):
        api.send_event(execution, "aproved")
    return unclaimed(mailbox_of(execution.pk))


def _silent() -> str:
    execution = executions.running()
    clock.shift(dt.timedelta(seconds=2))
    return _told(execution)


def _dropped() -> str:
    execution = executions.queued()
    execution.delete()
    return _raised(lambda: claims.take(scenarios.echo, execution.pk, "celery@host"))


def _died() -> str:
    execution = executions.running(max_attempts=1)
    clock.shift(dt.timedelta(hours=1))
    call_command("conductor", "sweep")
    return load_failure(executions.fresh(execution).error).message


def _child_of_a_failed_root() -> str:
    parent, child = executions.family()
    transitions.fail(child, executions.FAILURE)
    transitions.fail(executions.claimed(parent), Failure("x.Y", "no", ""), step="child", child_id=child.pk)
    return _raised(lambda: api.retry(child))


#: What provokes a text that is quoted below a heading.
PROVOKED: dict[str, list[Callable[[], str]]] = {
    "It stays queued, and no worker took it": [lambda: _queued_for(6)],
    "It stays queued, and the workers are busy": [lambda: _queued_for(6, running=4)],
    "Two deployments share a queue": [_dropped],
    "There is no such execution": [lambda: _raised(lambda: api.cancel(uuid.uuid4()))],
    "Called like a function": [lambda: _raised(lambda: charge(7))],
    "The function has no `ctx`": [lambda: _raised(lambda: durable_task(charge_without_context))],
    "A payload that JSON cannot hold": [lambda: _raised(lambda: takes_an_order.delay(order=Execution()))],
    "A payload that does not fit": [lambda: _of_body(6)],
    "A child failed": [lambda: failure(run(scenarios.parent_of_boom, message="card declined")).message],
    "A payload that is too large": [lambda: _raised(lambda: charge.delay("x" * 1_048_600))],
    "An unknown task": [lambda: _of_body(5)],
    "Waiting in a body": [lambda: _of_body(2), lambda: _of_body(3)],
    "Waiting in the transaction that created it": [_waiting_for_a_transaction],
    "A step name twice": [lambda: _of_body(4)],
    "`ctx` inside a transaction": [lambda: _of_body(0)],
    "`ctx` inside a step": [lambda: _of_body(1)],
    "The worker died": [_died],
    "For an event that was sent": [_misnamed],
    "For an event that nobody sends": [lambda: _told(_awaiting())],
    "For a worker that is gone": [_silent],
    "A retry is refused": [_child_of_a_failed_root],
}


def charge_without_context(order_id: int) -> None: ...


def _shape(text: str) -> str:
    """A text without what varies in it: names, numbers, ids, instants and places."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)
    text = re.sub(r"\b[\w.]+\.py:\d+", "PLACE", text)
    text = re.sub(r"\w+@[\w.]+(/[\w]+)*", "WORKER", text)
    text = re.sub(r"\b(shop|tests)(\.\w+)+|charge_without_context(?=\(order_id\) has)", "TASK", text)
    text = re.sub(r"\bdef \w+", "def NAME", text)
    text = re.sub(r"\brun\(\w+,", "run(NAME,", text)
    text = re.sub(r"[\d:,.]*\d( (ms|s|min|h|d)\b)?", "N", text)
    return re.sub(r"model \w+", "model NAME", text)


@pytest.fixture
def _alone() -> Iterator[None]:
    process.broker = NotingBroker()
    yield
    clock.reset()


@pytest.mark.django_db
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("heading", PROVOKED)
def test_a_quoted_text_is_what_the_mistake_really_says(heading: str) -> None:
    said = quoted(heading)
    assert len(said) == len(PROVOKED[heading]), f"{PAGE} has no quote below {heading!r}"
    for quote, provoke in zip(said, PROVOKED[heading], strict=True):
        assert _shape(quote) in _shape(provoke())


# --------------------------------------------------------------------------------------------- looked up in the source


@cache
def texts() -> list[re.Pattern[str]]:
    """Every text in the code, as a pattern in which its placeholders match anything."""
    found = set()
    for path in sorted((ROOT / "conductor_app").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if text := _text(node):
                text = re.sub(r"%(\(\w+\))?[-+.\d]*[sdrgf]", _ANYTHING, text).replace("%%", "%")
                parts = [text.strip(), *re.split(r"(?<=[.!?]) ", text.strip())]
                found.update(part for part in parts if len(part.replace(_ANYTHING, "")) >= _LEAST_FIXED)
    return [re.compile(re.escape(text).replace(re.escape(_ANYTHING), ".+?")) for text in sorted(found)]


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) if isinstance(value, ast.Constant) else _ANYTHING for value in node.values)
    return ""


def uncovered(quote: str) -> str:
    """Return what of a text stands nowhere in the code."""
    left = list(quote)
    for pattern in texts():
        for match in pattern.finditer(quote):
            left[match.start() : match.end()] = " " * (match.end() - match.start())
    return " ".join("".join(left).split()).strip(" .")


@pytest.mark.parametrize(("heading", "quote"), [item for item in quotes() if item[0] not in PROVOKED])
def test_every_quoted_text_stands_in_the_code(heading: str, quote: str) -> None:
    missing = uncovered(quote)
    assert not missing, f'{PAGE}, "{heading}": the code does not say "{missing}" (any more)'


def test_there_are_thirty_of_them_and_a_changed_one_is_noticed() -> None:
    assert len({heading for heading, _ in quotes()}) >= 30
    assert uncovered("No worker sweeps. Start one, or run: python manage.py conductor sweep")
    assert uncovered("Child execution broke: card declined")

"""The reference pages name all that there is."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest
from django.dispatch import Signal

import conductor_app
from conductor_app import api, signals, testing
from conductor_app.body.context import ExecutionContext
from conductor_app.conf import ConductorSettings
from conductor_app.models import (
    Attempt,
    CopiedOutcome,
    Event,
    Execution,
    FailedExecution,
    Fork,
    Operation,
    OperationItem,
    Schedule,
    Step,
    Worker,
)
from conductor_app.states import CELERY_STATES, ExecutionStatus, StepKind, StepStatus
from conductor_app.values.retries import RetryPolicy
from tests.docs.pages import blocks, pages, prose, read

API = "docs/reference/api.md"
MODELS = "docs/reference/models.md"


def code(page: str) -> str:
    """All that a page sets in code type, outside of blocks."""
    return "\n".join(re.findall(r"`([^`\n]+)`", prose(page)))


def test_every_public_name_is_in_the_reference() -> None:
    shown = code(API)
    missing = [name for name in conductor_app.__all__ if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", shown)]
    assert not missing


def test_every_member_of_the_context_is_in_the_reference() -> None:
    members = [name for name in dir(ExecutionContext) if not name.startswith("_")]
    insides = {"suspension", "ending", "memory", "entered", "flush", "reached"}
    missing = [name for name in {*members, "logger"} - insides if f"ctx.{name}" not in code(API)]
    assert not missing


def test_every_argument_of_the_contexts_calls_is_in_the_reference() -> None:
    headings = [line for line in prose(API).splitlines() if line.startswith("### ")]
    shown = re.findall(r"`(ctx\.[^`]+)`", "\n".join(headings))
    calls = ("invoke", "map", "start", "gather", "step", "atomic_step", "sleep", "sleep_until", "wait_for", "retry")
    for name in calls:
        call = next(heading for heading in shown if heading.startswith(f"ctx.{name}("))
        for parameter in list(inspect.signature(getattr(ExecutionContext, name)).parameters)[1:]:
            assert re.search(rf"\b{parameter}\b", call), f"{call} does not show {parameter}"


def test_every_option_of_the_decorator_is_in_the_reference_with_its_default() -> None:
    text = prose(API)
    for option in fields(RetryPolicy):
        row = next((line for line in text.splitlines() if line.startswith(f"| `{option.name}`")), "")
        shown = "(Exception,)" if option.name == "autoretry_for" else repr(option.default)
        assert shown in row, f"{option.name} = {shown} is not in {row!r}"


def test_every_function_of_the_api_is_in_the_reference() -> None:
    functions = [name for name, value in vars(api).items() if inspect.isfunction(value) and not name.startswith("_")]
    functions = [name for name in functions if getattr(api, name).__module__ == api.__name__]
    missing = [name for name in functions if f"api.{name}(" not in code(API)]
    assert not missing


def test_every_name_of_the_test_kit_is_in_the_reference_with_its_arguments() -> None:
    shown = code(API)
    for name in testing.__all__:
        line = next((line for line in shown.splitlines() if re.match(rf"{name}(\(|$)", line)), None)
        assert line is not None, name
        if inspect.isfunction(value := getattr(testing, name)):
            for parameter in inspect.signature(value).parameters:
                assert re.search(rf"\b{parameter}\b", line), f"{line} does not show {parameter}"


def test_every_signal_is_in_the_reference() -> None:
    missing = [name for name, value in vars(signals).items() if isinstance(value, Signal) and name not in code(API)]
    assert not missing


MODELS_SHOWN = [
    Attempt,
    CopiedOutcome,
    Event,
    Execution,
    FailedExecution,
    Fork,
    Operation,
    OperationItem,
    Schedule,
    Step,
    Worker,
]


@pytest.mark.parametrize("model", MODELS_SHOWN)
def test_every_column_is_in_the_reference(model: type) -> None:
    shown = set(re.findall(r"^\| `(\w+)`", prose(MODELS), re.MULTILINE))
    assert not {field.name for field in model._meta.concrete_fields} - shown


def test_every_status_is_in_the_reference_with_celerys_state() -> None:
    rows = [line for line in prose(MODELS).splitlines() if line.startswith("| ")]
    for status in ExecutionStatus:
        assert any(f"`{status}`" in row and f"`{CELERY_STATES[status]}`" in row for row in rows), status
    for name in StepStatus:
        assert f"`{name}`" in read(MODELS), name
    for name in StepKind:
        assert f"`{name}`" in read(MODELS) or f"### `ctx.{name}(" in prose(API), name


@pytest.mark.parametrize("page", pages())
def test_each_key_of_the_settings_that_a_page_names_exists(page: str) -> None:
    known = {field.name for field in fields(ConductorSettings)}
    shown = set(re.findall(r'CONDUCTOR\["(\w+)"\]', read(page)))
    shown |= set(re.findall(r"`([A-Z]+_(?:SECONDS|BYTES|BATCH|DEPTH|STEPS|REPLAY))`", read(page)))
    assert not shown - known


def test_the_bounds_on_recovery_follow_from_the_default_settings() -> None:
    defaults = {field.name: field.default for field in fields(ConductorSettings)}
    rows = re.findall(
        r"^\|[^|]+\| ([^|]*_SECONDS[^|]*) \| \**([\d.]+) s", prose("docs/explanation/guarantees.md"), re.M
    )
    assert len(rows) >= 4
    for formula, shown in rows:
        expression = re.sub(r"`?([A-Z_]+_SECONDS)`?", lambda name: str(defaults[name[1]]), formula)
        expression = expression.replace("×", "*").replace("`", "")
        assert re.fullmatch(r"[\d.\s+*/()]+", expression), formula
        assert eval(expression) == pytest.approx(float(shown)), formula


def test_the_readme_shows_checks_that_the_demo_makes() -> None:
    output = next(block for block in blocks("README.md") if "What holds" in block.text)
    source = read("project/demo/checks.py") + read("project/demo/story.py")
    promises = re.findall(r"^✓ ([^:]+):", output.text, re.MULTILINE)
    assert promises
    for promise in promises:
        assert promise in source, f"the demo does not print {promise!r}"

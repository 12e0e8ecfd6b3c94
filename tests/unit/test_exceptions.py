"""The errors, and the page that explains them."""

from __future__ import annotations

import ast
import enum
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest

import conductor_app
from conductor_app import exceptions
from conductor_app.exceptions import (
    ChildError,
    ConductorError,
    ControlFlow,
    NotSerializable,
    ProgrammingError,
    RetryExecution,
)
from conductor_app.values.payloads import dumps
from project.shop.models import Order

PACKAGE = Path(conductor_app.__file__).parent
PAGE = PACKAGE.parent / "docs/reference/errors.md"
PUBLIC = [
    cls
    for name, cls in vars(exceptions).items()
    if inspect.isclass(cls) and issubclass(cls, BaseException) and not name.startswith("_")
]


class Colour(enum.Enum):
    RED = 1


def quotes() -> list[tuple[str, str]]:
    """Every quoted text of the page, with the heading above it."""
    found: list[tuple[str, str]] = []
    heading, quote = "", ""
    for line in [*PAGE.read_text().splitlines(), ""]:
        if line.startswith("> "):
            quote = f"{quote} {line[2:]}".strip()
            continue
        if quote:
            found.append((heading, quote))
            quote = ""
        if line.startswith("#"):
            heading = line.lstrip("# ").strip("`")
    return found


def templates() -> list[re.Pattern[str]]:
    """Every text that the package's code can word, as a pattern: what an f-string fills in may be anything."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in node.values]
                if sum(len(part) for part in parts if part != ".+") >= 12:
                    found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                found.add(re.escape(node.value))
    return [re.compile(pattern) for pattern in found]


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_every_public_error_is_explained_on_its_page(cls: type[BaseException]) -> None:
    assert re.search(rf"^### `{cls.__name__}`$", PAGE.read_text(), re.MULTILINE)


def test_the_page_explains_nothing_that_does_not_exist() -> None:
    explained = re.findall(r"^### `(\w+)`$", PAGE.read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(cls.__name__ for cls in PUBLIC)


def test_the_texts_on_the_page_are_those_of_the_code() -> None:
    patterns = templates()
    made_from_parts = {"NotSerializable", "ChildFailed"}
    checked = [(heading, quote) for heading, quote in quotes() if heading not in made_from_parts]
    assert len(checked) > 30
    for heading, quote in checked:
        assert any(pattern.fullmatch(quote) for pattern in patterns), f"{heading}: nothing in the code says {quote!r}"


def test_the_texts_about_values_are_those_of_the_code() -> None:
    deep: Any = 0
    for _ in range(102):
        deep = [deep]
    values: dict[str, Any] = {
        "items": [0, 0, 0, {1}],
        "order": Order(),
        "colour": Colour.RED,
        "price": math.nan,
        "note": "\x00",
        "tree": deep,
        "data": {"__type__": 1, "__value__": 2},
    }
    said = []
    for name, value in values.items():
        with pytest.raises(NotSerializable) as refusal:
            dumps({name: value}, "payload")
        said.append(re.sub(r"\[0\].*\[0\]", "", str(refusal.value)))
    with pytest.raises(NotSerializable) as refusal:
        dumps((x for x in "a"), 'result of ctx.step("read")')
    said.append(str(refusal.value))
    assert [quote for heading, quote in quotes() if heading == "NotSerializable"] == said


def test_errors_form_a_tree() -> None:
    for cls in PUBLIC:
        if issubclass(cls, ControlFlow):
            assert not issubclass(cls, Exception), f"{cls} would be caught by `except Exception`"
        elif cls is not RetryExecution:
            assert issubclass(cls, ConductorError)
    assert not issubclass(RetryExecution, ConductorError)


def test_only_errors_that_may_end_differently_are_retried() -> None:
    final = {cls.__name__ for cls in PUBLIC if issubclass(cls, ConductorError) and not cls.retryable}
    by_base = {cls.__name__ for cls in PUBLIC if issubclass(cls, (ProgrammingError, ChildError))}
    assert final == by_base | {
        "ActionRefused",
        "EventTimedOut",
        "ExecutionFailed",
        "ExecutionCancelled",
        "ExecutionFinished",
        "NewerFormat",
        "NoneSucceeded",
        "OutcomeLost",
        "RetryRefused",
        "RenameRefused",
    }


def test_the_tree_in_the_modules_docstring_is_complete() -> None:
    shown = set(re.findall(r"\w+", exceptions.__doc__ or ""))
    siblings = {cls.__name__ for cls in PUBLIC if issubclass(cls, ControlFlow)} | {"RetryExecution"}
    assert {cls.__name__ for cls in PUBLIC} - siblings <= shown


def test_each_error_has_a_docstring() -> None:
    assert [cls.__name__ for cls in PUBLIC if not cls.__doc__] == []


def test_the_errors_that_bodies_catch_are_public_names_of_the_package() -> None:
    for name in ("ConductorError", "ChildError", "ChildFailed", "ChildTimedOut", "ChildCancelled", "LeaseLost"):
        assert getattr(conductor_app, name) is getattr(exceptions, name)
    assert conductor_app.SuspendExecution is exceptions.SuspendExecution

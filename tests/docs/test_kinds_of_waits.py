"""Each kind of wait stands in one module, and the page that says how to add one names the files that takes."""

from __future__ import annotations

import ast
import re

import pytest

from conductor_app.states import StepKind
from conductor_app.transitions import kinds, waits
from tests.docs import house

PACKAGE = house.ROOT / "conductor_app"
PAGE = (house.ROOT / "docs/contributing/way.md").read_text()
SECTION = PAGE.partition("## How to add a kind of wait\n")[2]

#: Who names a kind, beside its module: what a call of the body opens, and what holds for that kind and could for no
#: other. A new kind has no line here, except for its own call.
NAMED = {
    "body/context.py": set(StepKind),  # each call has its own
    "engine/hand_off.py": {StepKind.INVOKE},  # a process goes on with a child
    # What waits for others has their names, and a gather is called by them.
    "operations.py": {StepKind.GATHER, StepKind.FIRST, StepKind.AS_COMPLETED},
    "states.py": {StepKind.INVOKE, StepKind.START},  # CHILD_KINDS
    "testing/bodies.py": {StepKind.STEP},
    # Those with an outcome that a test gives.
    "testing/outcomes.py": {
        StepKind.STEP,
        StepKind.INVOKE,
        StepKind.START,
        StepKind.MAP,
        StepKind.GATHER,
        StepKind.EVENT,
        StepKind.FIRST,
        StepKind.AS_COMPLETED,
        StepKind.TIMER,
        StepKind.MESSAGE,
    },
    "transitions/recording.py": {StepKind.STEP},
    "transitions/succeeding.py": {StepKind.INVOKE, StepKind.MAP},
    "transitions/waking.py": {StepKind.MAP, StepKind.START},  # a child that has a position, a member of a gather
}


def named_in(source: str) -> set[StepKind]:
    """The kinds that a module names."""
    attributes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    named = (node for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "StepKind")
    return {StepKind[node.attr] for node in named if node.attr.isupper()}


def test_no_other_module_asks_which_kind_of_wait_it_is() -> None:
    modules = {path.relative_to(PACKAGE): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    found = {path.as_posix(): named_in(text) for path, text in modules.items() if path.parent.name != "waits"}
    assert {path: named for path, named in found.items() if named} == NAMED


@pytest.mark.parametrize("kind", StepKind)
def test_each_kind_has_a_module(kind: StepKind) -> None:
    assert type(kinds.of(kind)).__module__ == f"{waits.__name__}.{kind.value}"


def test_the_page_names_at_most_six_files_that_exist() -> None:
    table = SECTION.partition("| file | what |\n|---|---|\n")[2].partition("\n\n")[0]
    files = [re.findall(r"`([\w./]+)`", line.split("|")[1]) for line in table.splitlines()]
    assert 1 <= len(files) <= 6
    assert all((house.ROOT / file).exists() for (file,) in files)


def test_the_page_names_all_that_a_kind_has_to_say() -> None:
    members = {name for name in vars(kinds.Kind) if not name.startswith("_")}
    of_children = {"suspends", "is_wait", "has_child", "has_children", "child_ended", "member_failed", "pass_on"}
    of_children.add("when_child_succeeds")
    shown = set(re.findall(r"`(\w+)`", SECTION))
    assert members - of_children - {"held_by"} <= shown

"""The page about the way of a call names functions that exist."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import pytest

from tests.docs import house

PAGE = house.ROOT / "docs/contributing/way.md"
TOP = {name for layer in house.layers() for name in layer}
NAMES = sorted(
    {name for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", PAGE.read_text()) if name.partition(".")[0] in TOP}
)


def found(name: str) -> Any:
    """What a dotted name below ``conductor_app`` stands for."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            thing: Any = import_module(".".join(["conductor_app", *words[:length]]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            thing = getattr(thing, word)
        return thing
    raise LookupError(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_names_exists(name: str) -> None:
    assert found(name) is not None


def test_it_names_the_whole_way() -> None:
    assert len(NAMES) > 40
    layers = {name.partition(".")[0] for name in NAMES}
    assert {"tasks", "host", "engine", "body", "transitions", "telling", "testing"} <= layers

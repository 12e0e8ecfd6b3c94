"""Each form of each hot move does the same to all rows, answers the same, and sends the same signals and messages.

What that is stands in ``rows.txt``, so it is the same on each database, and today as yesterday. After a change of
behaviour, ``CONDUCTOR_WRITE_ROWS=1 pytest tests/moves`` writes it anew; its difference is to be read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from conductor_app.store import moves
from conductor_app.store.process import process
from tests.moves.cases import CASES
from tests.moves.effects import Effect
from tests.races.harness import FORMS

pytestmark = pytest.mark.django_db

ROWS = Path(__file__).with_name("rows.txt")


def known() -> dict[str, list[str]]:
    """What each case is to do, as ``rows.txt`` has it."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in ROWS.read_text().splitlines():
        if line.startswith("    "):
            found[name].append(line[4:])
        elif line:
            name = line
            found[name] = []
    return found


def write(rows: dict[str, list[str]]) -> None:
    told = [[name, *(f"    {line}" for line in rows[name]), ""] for name in CASES if name in rows]
    ROWS.write_text("\n".join(line for lines in told for line in lines))


@pytest.fixture(params=FORMS if connection.vendor == "postgresql" else FORMS[1:])
def form(request: pytest.FixtureRequest, settings: Any) -> Iterator[None]:
    spans = {"LEASE_SECONDS": 60, "HEARTBEAT_SECONDS": 10, "SWEEP_SECONDS": 10, "REDISPATCH_SECONDS": 30}
    settings.CONDUCTOR = {**settings.CONDUCTOR, **spans}
    process.worker.is_embedded = False
    if request.param != FORMS[0]:
        with moves.as_scripts():
            yield
    else:
        yield


@pytest.mark.parametrize("case", CASES)
def test_a_move_does_what_it_did(case: str, form: None) -> None:
    world = CASES[case].make()
    effect = Effect(lambda: CASES[case].act(world))
    if os.environ.get("CONDUCTOR_WRITE_ROWS"):
        write({**(known() if ROWS.exists() else {}), case: effect.lines})
    assert effect.lines == known()[case]


def test_what_is_known_is_what_is_tried() -> None:
    assert list(known()) == list(CASES)

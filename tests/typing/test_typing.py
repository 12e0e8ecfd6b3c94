"""The annotations, as a type checker reads them in a user's code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from django.db import connection

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

_MESSAGE = re.compile(r"^(?P<path>[^:]+):(?P<line>\d+): error: .*\[(?P<code>[a-z-]+)\]$")
_EXPECTED = re.compile(r"# E: (?P<code>[a-z-]+)$")


@pytest.mark.timeout(300)
def test_mypy_accepts_what_is_right_and_rejects_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    if connection.vendor != "sqlite":
        pytest.skip("types are the same on every database")
    api = pytest.importorskip("mypy.api")
    monkeypatch.chdir(ROOT)
    output, problems, _status = api.run(
        [
            "--config-file=pyproject.toml",
            "--no-error-summary",
            "--hide-error-context",
            str(HERE / "accepted.py"),
            str(HERE / "rejected.py"),
        ]
    )
    assert problems == ""
    found = set()
    for line in output.splitlines():
        if message := _MESSAGE.match(line):
            found.add((Path(message["path"]).name, int(message["line"]), message["code"]))
    expected = set()
    for number, line in enumerate((HERE / "rejected.py").read_text().splitlines(), 1):
        if comment := _EXPECTED.search(line):
            expected.add(("rejected.py", number, comment["code"]))
    assert found == expected, output
    assert len(expected) > 20

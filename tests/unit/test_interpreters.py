"""``tests.support.interpreters``: which Python a corner of the matrix gets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import interpreters

HERE = "{}.{}".format(*sys.version_info[:2])
#: A version that no machine has.
NOWHERE = "3.999"


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """A machine with a shim of pyenv on PATH that fails, and nothing else."""
    shim = tmp_path / "shims" / f"python{NOWHERE}"
    shim.parent.mkdir()
    program(shim, "echo 'pyenv: the command exists in these Python versions: 3.999.1' >&2; exit 127")
    return {"PATH": f"{tmp_path / 'missing'}:{shim.parent}", "HOME": str(tmp_path)}


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_shim_that_fails_is_no_interpreter(machine: dict[str, str]) -> None:
    assert interpreters.find(NOWHERE, machine) is None


def test_pyenv_is_asked_for_versions_that_are_not_active(machine: dict[str, str], tmp_path: Path) -> None:
    real = program(tmp_path / ".pyenv" / "versions" / f"{NOWHERE}.1" / "bin" / "python", f"echo {NOWHERE}")
    assert interpreters.find(NOWHERE, machine) == real
    elsewhere = {**machine, "PYENV_ROOT": str(tmp_path / "elsewhere")}
    assert interpreters.find(NOWHERE, elsewhere) is None


def test_the_interpreter_has_to_be_of_the_version_that_its_name_says(machine: dict[str, str], tmp_path: Path) -> None:
    program(tmp_path / "shims" / f"python{NOWHERE}", "echo 3.998")
    assert interpreters.find(NOWHERE, machine) is None


def test_the_one_that_runs_this_will_do(machine: dict[str, str]) -> None:
    assert interpreters.find(HERE, machine) == Path(sys.executable)

"""``tests.matrix``: what pyproject.toml and the README declare has a corner, and is pinned."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

# The drivers are there where the servers are: they come with `make test-services`.
pytest.importorskip("psycopg")
pytest.importorskip("pymysql")
pytest.importorskip("redis")

from tests.matrix import CORNERS, LEFT_OUT, REQUIREMENTS, ROOT

#: ``requirements.txt`` and each corner that CI has to run.
FILES = [ROOT / "requirements.txt", *(REQUIREMENTS / f"{corner.pins}.txt" for corner in CORNERS if corner.is_required)]


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def readme(row: str) -> set[str]:
    """The versions in a row of the README's table, without what stands in brackets."""
    (line,) = re.findall(rf"^\| {row} \| ([^|(]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    return set(re.findall(r"\d+\.\d+", line))


def classifiers(prefix: str) -> set[str]:
    found = [re.fullmatch(rf"{prefix} :: (\d+\.\d+)", line) for line in project()["classifiers"]]
    return {match[1] for match in found if match}


def pinned(package: str) -> set[str]:
    """The minors of a package that some corner pins, by way of the files that it includes."""
    found: set[str] = set()
    for path in FILES:
        text = path.read_text()
        text += "".join((path.parent / name).read_text() for name in re.findall(r"^-r (.+)$", text, re.MULTILINE))
        found |= set(re.findall(rf"^{package}==(\d+\.\d+)", text, re.MULTILINE))
    return found


def test_each_python_has_a_corner() -> None:
    assert classifiers("Programming Language :: Python") == readme("Python")
    assert {corner.python for corner in CORNERS if corner.is_required} == readme("Python")


def test_each_django_has_a_corner() -> None:
    assert classifiers("Framework :: Django") == readme("Django") == pinned("Django")


def test_each_celery_has_a_corner() -> None:
    assert pinned("celery") == readme("Celery")
    (declared,) = [line for line in project()["dependencies"] if line.startswith("celery")]
    first, last = sorted(readme("Celery"))
    assert declared == f"celery>={first},<5.{int(last.partition('.')[2]) + 1}"


def test_what_is_left_out_is_there() -> None:
    assert all((ROOT / "tests" / name).is_dir() for name in LEFT_OUT)
    assert len({corner.name for corner in CORNERS}) == len(CORNERS)

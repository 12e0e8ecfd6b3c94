"""Run the test suite on the other versions of Python, Django and Celery that README.md promises.

    python -m tests.matrix [--quick] [--only python3.12-django-6.0-celery-5.7 ...] [-- pytest arguments]

And on the gevent pool. ``requirements.txt`` is the base, on which ``make test`` and ``make test-services`` run. Each
other corner has its pins in ``requirements/``, and a virtual environment of its own in ``var/matrix``, which is made
when it is missing or the pins have changed. Interpreters are looked for on PATH and in pyenv. A corner whose
interpreter or server is missing is skipped, or, with ``CI=true``, fails, but for a Python that CI need not have.

Left out is what no version changes: see ``LEFT_OUT``. ``--quick``, for CI, leaves out most tests that start workers,
too, which take most of the time, and the corners of which another one has everything.

Exit code: 0 if every corner that could run passed, 1 if one failed, 3 if none could run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.services import POSTGRES, RABBITMQ, Combination, unreachable
from tests.support import interpreters
from tests.support.outcomes import (
    EXIT_FAILED,
    EXIT_SKIPPED,
    FAILED,
    SKIPPED,
    Outcome,
    console,
    run_chosen,
    run_pytest,
    unavailable,
)

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
VAR = ROOT / "var" / "matrix"
#: About the pages and the scripts of this repository, the types, and the state machine, which is plain Python and SQL.
LEFT_OUT = ("benchmarks", "docs", "model", "mutants", "typing")
#: What Celery alone may change: what we rely on in it, and what it does with our messages.
OF_CELERY = ("-m", "contract or messaging")


@dataclass(frozen=True)
class Corner:
    """A Python, a file of pins, and where to run; without servers on SQLite and ``memory://``."""

    python: str
    #: The name of a file in ``requirements/``, without its suffix.
    pins: str
    servers: Combination | None = None
    #: The pytest arguments that choose the tests; none for all that versions may change.
    selection: tuple[str, ...] = ()
    #: Those for ``--quick``; ``None`` if that leaves it out.
    quick: tuple[str, ...] | None = None
    #: Whether CI has to have this Python.
    is_required: bool = True
    #: The worker's pools, for tests that have to hold on each; the usual ones if empty.
    pools: str = ""

    @property
    def environment_name(self) -> str:
        return f"python{self.python}-{self.pins}"

    @property
    def name(self) -> str:
        return f"{self.environment_name}-{self.servers.name}" if self.servers else self.environment_name

    @property
    def variables(self) -> dict[str, str]:
        servers = self.servers.environment if self.servers else {"DATABASE_URL": "", "CELERY_BROKER_URL": "memory://"}
        return servers | ({"CONDUCTOR_TEST_POOLS": self.pools} if self.pools else {})


ON_SERVERS = Combination("postgres-rabbitmq", POSTGRES, RABBITMQ)

CORNERS = [
    Corner("3.11", "django-5.2-celery-5.7", selection=OF_CELERY),
    Corner("3.12", "django-6.0-celery-5.7", quick=OF_CELERY),
    Corner("3.13", "django-6.1-celery-5.7", quick=("-m", "not worker")),
    Corner("3.13", "django-6.1-celery-5.7", ON_SERVERS, quick=("-m", "messaging")),
    Corner("3.14", "django-6.1-celery-5.7", is_required=False),
    Corner("3.11", "gevent", selection=("-m", "gevent"), quick=("-m", "gevent"), pools="gevent"),
    Corner("3.11", "gevent", ON_SERVERS, selection=("-m", "gevent"), pools="gevent"),
]


def environment(corner: Corner) -> Path:
    """Return the interpreter of a corner's virtual environment, which is made first if its pins have changed.

    Raises:
        LookupError: There is no such Python.
        RuntimeError: The pins could not be installed.
    """
    directory = VAR / corner.environment_name
    python, installed = directory / "bin" / "python", directory / "installed"
    # A file may include any other one.
    pins = "".join(path.read_text() for path in sorted([*ROOT.glob("requirements*.txt"), *REQUIREMENTS.glob("*.txt")]))
    if python.exists() and installed.exists() and installed.read_text() == pins:
        return python
    base = interpreters.find(corner.python)
    if base is None:
        raise LookupError(f"Python {corner.python} was not found on PATH, nor in pyenv")
    requirements = REQUIREMENTS / f"{corner.pins}.txt"
    console.print(f"Installing {requirements.relative_to(ROOT)} into {directory.relative_to(ROOT)} ...")
    for command in (
        [base, "-m", "venv", "--clear", directory],
        [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{requirements.name} could not be installed:\n{done.stdout}{done.stderr}")
    installed.write_text(pins)
    return python


# Runs


def run(corner: Corner, options: argparse.Namespace) -> Outcome:
    """Run a corner's tests, or tell why they cannot be run."""
    console.rule(corner.name)
    servers = corner.servers.servers if corner.servers else []
    reasons = [reason for server in servers if (reason := unreachable(server))]
    if reasons:
        return unavailable(corner.name, "; ".join(reasons))
    try:
        python = environment(corner)
    except LookupError as error:
        return unavailable(corner.name, str(error), is_required=corner.is_required)
    except RuntimeError as error:
        console.print(str(error), markup=False)
        return Outcome(corner.name, FAILED, str(error).splitlines()[0])
    left_out = [f"--ignore=tests/{name}" for name in LEFT_OUT]
    selection = corner.quick if options.quick and corner.quick else corner.selection
    arguments = [*left_out, *selection, *options.pytest_args]
    return run_pytest(corner.name, python, arguments, corner.variables, is_part=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out most tests that start workers")
    verdicts = run_chosen(
        parser, "Matrix", "corner", CORNERS, run, lambda corner, options: bool(corner.quick or not options.quick)
    )
    return EXIT_FAILED if FAILED in verdicts else EXIT_SKIPPED if verdicts == {SKIPPED} else 0


if __name__ == "__main__":
    sys.exit(main())

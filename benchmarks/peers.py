"""The systems, and the virtual environments that other people's packages get."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.systems.base import PARALLEL, SEQUENCE, STEPS, TRIVIAL

ROOT = Path(__file__).resolve().parents[1]
VAR = ROOT / "var" / "bench"
REQUIREMENTS = ROOT / "benchmarks" / "requirements"
EVERY_BODY = frozenset({SEQUENCE, STEPS, PARALLEL, TRIVIAL})


@dataclass(frozen=True)
class Peer:
    """One row of the tables: a program in ``benchmarks.systems``, with a broker."""

    name: str
    module: str
    #: ``rabbitmq``, ``redis``, or empty: no broker server.
    broker: str = ""
    bodies: frozenset[str] = EVERY_BODY
    #: Whose environment it runs in; empty is ours.
    environment: str = ""
    #: More of the processes' environment; ``{broker}`` is the broker's address.
    variables: dict[str, str] = field(default_factory=dict)

    def can(self, body: str, *, replay: bool = False) -> bool:
        """Whether it has this body, and, if asked for, anything that is replayed."""
        return body in self.bodies and not (replay and self.module == "plain_celery")

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        return environment(self.environment) if self.environment else Path(sys.executable)


OURS = [
    Peer("conductor-rabbitmq", "conductor", "rabbitmq"),
    Peer(
        "conductor-messages",
        "conductor",
        "rabbitmq",
        variables={"CONDUCTOR_BENCHMARK_SETTINGS": '{{"HAND_OFF": false}}'},
    ),
    Peer("conductor-redis", "conductor", "redis"),
    Peer("conductor-memory", "conductor"),
]
CELERY = [
    # A chord needs a result backend.
    Peer("celery-rabbitmq", "plain_celery", "rabbitmq", frozenset({SEQUENCE, TRIVIAL})),
    Peer(
        "celery-redis",
        "plain_celery",
        "redis",
        frozenset({SEQUENCE, PARALLEL, TRIVIAL}),
        variables={"CELERY_RESULT_BACKEND": "{broker}"},
    ),
]
OTHERS = [
    Peer("dbos", "dbos", environment="dbos"),
    Peer("absurd", "absurd", environment="absurd"),
    Peer("procrastinate", "procrastinate", bodies=frozenset({TRIVIAL}), environment="procrastinate"),
]
ALL = {peer.name: peer for peer in [*OURS, *CELERY, *OTHERS]}


def environment(name: str) -> Path:
    """Return the interpreter of ``var/bench/NAME``, and make it first if ``requirements/NAME.txt`` is newer."""
    directory, requirements = VAR / name, REQUIREMENTS / f"{name}.txt"
    python, installed = directory / "bin" / "python", directory / "installed"
    if not installed.exists() or installed.stat().st_mtime < requirements.stat().st_mtime:
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", requirements]
        try:
            subprocess.run(pip, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{requirements} could not be installed into {directory}:\n{error.stderr}") from error
        installed.touch()
    return python


def versions(peer: Peer) -> dict[str, str]:
    """What a system consists of: its packages and their versions, in its environment."""
    names = {
        "conductor": ["Django", "celery", "kombu", "psycopg"],
        "plain_celery": ["celery", "kombu"],
        "dbos": ["dbos", "psycopg", "SQLAlchemy"],
        "absurd": ["absurd-sdk", "absurdctl", "psycopg"],
        "procrastinate": ["procrastinate", "psycopg"],
    }[peer.module]
    program = "import importlib.metadata as m, sys; print(*(m.version(n) for n in sys.argv[1:]), sep='\\n')"
    found = subprocess.run([peer.python, "-c", program, *names], check=True, capture_output=True, text=True)
    return dict(zip(names, found.stdout.split(), strict=True))

"""A PostgreSQL server of a test's own, which it may stop and start."""

import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import dj_database_url
import pytest
from django.core.management import call_command
from django.db import connections

#: As whom the server runs if the tests run as root, whom PostgreSQL refuses.
_USERS = ("postgres", "nobody")


class PrivatePostgres:
    """One server on a free port, with a directory that is removed in the end.

    Args:
        fsync: Whether a commit is to outlive a power cut, at the price of speed. A crash of the server alone loses
            nothing without it.
        settings: More of the server's settings.
    """

    def __init__(self, *, fsync: bool = False, settings: dict[str, str] | None = None) -> None:
        self._settings = {"fsync": "on" if fsync else "off", **(settings or {})}
        self._binaries = _find_binaries()
        self._identity = _identity()
        self._directory = Path(tempfile.mkdtemp(prefix="conductor-test-postgres-"))
        if self._identity:
            shutil.chown(self._directory, self._identity["user"], self._identity["group"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        #: What ``DATABASE_URL`` has to be.
        self.url = f"postgres://postgres@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        options += "".join(f" -c {name}={value}" for name, value in self._settings.items())
        self._pg_ctl("start", "-w", "-o", options, "-l", str(self._directory / "server.log"))

    def crash(self) -> None:
        """End the server at once, in the middle of whatever it does."""
        self._pg_ctl("stop", "-m", "immediate")

    @property
    def log(self) -> str:
        """What the server has written so far, over all its starts."""
        return (self._directory / "server.log").read_text(errors="replace")

    def __enter__(self) -> Self:
        try:
            self._run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
            self.start()
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if (self._directory / "data" / "postmaster.pid").exists():
                self.crash()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _pg_ctl(self, *arguments: str) -> None:
        self._run("pg_ctl", *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._binaries / program, "-D", self._directory / "data", *arguments],
            cwd=self._directory,
            # Not a pipe: the server inherits it, and whoever reads it would wait for the server's end.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=60,
            **self._identity,
        )


def _find_binaries() -> Path:
    """Return the directory of ``initdb`` and ``pg_ctl``; skip the test if there is none, except in CI."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: _version(path.parent.name))
    on_path = shutil.which("pg_ctl")
    found = [Path(on_path).resolve().parent] if on_path else []
    for directory in [*found, *reversed(installed)]:
        if all(os.access(directory / program, os.X_OK) for program in ("initdb", "pg_ctl", "postgres")):
            return directory
    reason = "PostgreSQL's initdb and pg_ctl are not installed (/usr/lib/postgresql/*/bin, PATH)"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _identity() -> dict[str, Any]:
    """Return the user to switch to, as arguments of ``subprocess.run``; none if there is no need."""
    if os.geteuid() != 0:
        return {}
    for name in _USERS:
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL refuses to run as root, and there is no other user")


@contextmanager
def default_database(url: str) -> Iterator[None]:
    """Let this process use the database at ``url`` in the place of its own, with all tables, and all of them empty."""
    before, own = connections.databases["default"], connections["default"]
    connections.databases["default"] = {**before, "OPTIONS": {}, **dj_database_url.parse(url)}
    connections["default"] = connections.create_connection("default")
    try:
        call_command("migrate", verbosity=0)
        call_command("flush", verbosity=0, interactive=False)
        yield
    finally:
        connections["default"].close()
        connections.databases["default"], connections["default"] = before, own

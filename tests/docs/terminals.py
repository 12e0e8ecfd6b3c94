"""Follow a page as a reader would: files, commands, a worker and a Python shell in a directory of its own."""

from __future__ import annotations

import ctypes
import doctest
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tests.docs.pages import ROOT, Block, commands
from tests.docs.session import matches
from tests.support.polling import wait_until

_PR_SET_PDEATHSIG = 1

#: A Python shell that takes examples as JSON lines and answers with what they print.
_SHELL = """
import contextlib, io, json, sys, django
django.setup()
answers, namespace = sys.stdout, {"__name__": "__main__"}
for line in sys.stdin:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(json.loads(line), "<shell>", "single"), namespace)
    answers.write(json.dumps(printed.getvalue()) + "\\n")
    answers.flush()
"""


class Reader:
    """A reader with a directory, and terminals that are closed at the end.

    Args:
        directory: An empty directory.
        project: The name of the Django project.
    """

    def __init__(self, directory: Path, project: str = "mysite") -> None:
        self.directory = directory
        self.env = {
            **{name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "CELERY_BROKER_URL")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # In the place of `pip install`.
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "DJANGO_SETTINGS_MODULE": f"{project}.settings",
        }
        self.workers: list[subprocess.Popen[bytes]] = []
        self._shell: subprocess.Popen[str] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        for process in (*self.workers, *([self._shell] if self._shell else [])):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._shell is not None:
            for pipe in (self._shell.stdin, self._shell.stdout):
                with suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]

    def follow(self, block: Block) -> None:
        """Do what a block says, and compare what it shows."""
        if block.not_run:
            return
        if block.language == "python":
            self.save(block.path, block.text)
        elif block.language == "console":
            for command, output in commands(block):
                self.type(command, output, str(block))
        elif block.language == "pycon":
            self.enter(block)

    def save(self, path: str, text: str) -> None:
        """Append to a file, as "put these lines at the end" says; each name is written once."""
        with (self.directory / path).open("a", encoding="utf-8") as file:
            file.write(f"\n{text}")

    def type(self, command: str, output: str, where: str) -> None:
        """Type a command; a worker goes on in the background."""
        if command.startswith("celery "):
            self._start_worker(command, output, where)
            return
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=self.directory,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{where}: {command}\n{done.stdout}{done.stderr}"
        assert not output or matches(output, done.stdout), (
            f"{where}: {command}\nexpected:\n{output}\ngot:\n{done.stdout}"
        )
        if command.startswith("kill -9"):
            self.workers[-1].wait(timeout=20)

    def _start_worker(self, command: str, output: str, where: str) -> None:
        log = self.directory / f"worker-{len(self.workers) + 1}.log"
        with log.open("wb") as file:
            self.workers.append(self._start(command.split(), stdout=file, stderr=subprocess.STDOUT))
        wait_until(lambda: " ready." in log.read_text(), timeout=30, message=lambda: f"{where}: {log.read_text()}")
        for line in output.splitlines():
            self.expect(line, where)

    def expect(self, line: str, where: str) -> None:
        """Wait for a line in the last worker's log; ``...`` stands for anything."""
        if line.strip() in ("", "..."):
            return
        pattern = ".*".join(re.escape(part) for part in line.strip().split("..."))
        wait_until(
            lambda: re.search(pattern, self.log()), timeout=40, message=lambda: f"{where}: {line}\nnot in\n{self.log()}"
        )

    def log(self) -> str:
        """The last worker's output."""
        return (self.directory / f"worker-{len(self.workers)}.log").read_text()

    def enter(self, block: Block) -> None:
        """Enter the examples of a block into the Python shell."""
        for example in doctest.DocTestParser().get_examples(block.text, str(block)):
            got = self._ask(example.source)
            where = f"{block.page}:{block.line + example.lineno}"
            assert matches(example.want, got), f"{where}: {example.source}\nexpected:\n{example.want}\ngot:\n{got}"

    def _ask(self, source: str) -> str:
        if self._shell is None:
            self._shell = self._start(
                [sys.executable, "-c", _SHELL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        stdin, stdout = self._shell.stdin, self._shell.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(source) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, f"the shell ended at {source}"
        return str(json.loads(answer))

    def _start(self, command: list[str], **pipes: IO[Any] | int | bool) -> Any:
        return subprocess.Popen(
            command,
            cwd=self.directory,
            env=self.env,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
            **pipes,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

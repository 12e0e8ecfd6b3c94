"""The program around a system. The standard library alone: other systems' environments do not have ours."""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod

#: The bodies that every system offers as far as it can, each with a number: of children or steps.
SEQUENCE, STEPS, PARALLEL, TRIVIAL = "sequence", "steps", "parallel", "trivial"


class System(ABC):
    """One system, in one process: the one that prepares, a client, or a worker."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the tables in the database that ``DATABASE_URL`` names."""

    @abstractmethod
    def work(self) -> None:
        """Run one worker process until it is killed."""

    def open(self) -> None:
        """Connect, so that the first ``start`` costs no more than the next."""
        return

    @abstractmethod
    def start(self, body: str, size: int) -> None:
        """Start one root."""

    def serve(self) -> None:
        """Start roots as standard input says, and answer each line with when that began, in monotonic seconds."""
        # Whatever libraries print is not to be taken for an answer.
        answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self.open()
        for line in sys.stdin:
            order = json.loads(line)
            began = time.monotonic()
            for _ in range(order["roots"]):
                self.start(order["body"], order["size"])
            print(json.dumps({"began": began, "ended": time.monotonic()}), file=answers, flush=True)

    def main(self) -> None:
        """Be what the first argument says."""
        {"prepare": self.prepare, "client": self.serve, "worker": self.work}[sys.argv[1]]()


def database_url() -> str:
    """Where the database is, as libpq wants it."""
    return os.environ["DATABASE_URL"].replace("postgres://", "postgresql://", 1)

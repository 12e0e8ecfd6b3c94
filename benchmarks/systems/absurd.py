"""Absurd: durable tasks in stored procedures of PostgreSQL.

A parent spawns its child in a step, and waits for the event with which the child ends. (The SDK's ``await_task_result``
holds the worker and polls with growing pauses; this is the way that suspends.) Workers poll each ``POLL_SECONDS``
instead of the default 0.25.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from absurd_sdk import Absurd

from benchmarks import marks
from benchmarks.systems.base import PARALLEL, SEQUENCE, STEPS, TRIVIAL, System, database_url

POLL_SECONDS = 0.005
QUEUE = "default"
#: Tasks that a worker claims at once.
BATCH = 10

client: Absurd


def child(params: Any, ctx: Any) -> int:
    ctx.emit_event(f"done:{ctx.task_id}", params["n"])
    return params["n"]


def spawn(ctx: Any, n: int) -> str:
    return ctx.step(f"spawn-{n}", lambda: str(client.spawn("child", {"n": n})["task_id"]))


def sequence(params: Any, ctx: Any) -> int:
    marks.begin()
    total = sum(ctx.await_event(f"done:{spawn(ctx, n)}") for n in range(params["n"]))
    marks.end()
    return total


def parallel(params: Any, ctx: Any) -> int:
    marks.begin()
    started = [spawn(ctx, n) for n in range(params["n"])]
    total = sum(ctx.await_event(f"done:{task}") for task in started)
    marks.end()
    return total


def steps(params: Any, ctx: Any) -> int:
    marks.begin()
    total = sum(ctx.step(f"step-{n}", lambda n=n: n) for n in range(params["n"]))
    marks.end()
    return total


def trivial(params: Any, ctx: Any) -> int:
    marks.begin()
    marks.end()
    return params["n"]


class AbsurdSystem(System):
    """The synchronous SDK; a worker is one loop in one process."""

    def prepare(self) -> None:
        for command in (["init"], ["create-queue", QUEUE]):
            program = str(Path(sys.executable).with_name("absurdctl"))
            subprocess.run([program, command[0], "-d", database_url(), *command[1:]], check=True, stdout=sys.stderr)

    def open(self) -> None:
        global client  # noqa: PLW0603 - bodies spawn with it
        client = Absurd(database_url(), queue_name=QUEUE)
        bodies = {"child": child, SEQUENCE: sequence, PARALLEL: parallel, STEPS: steps, TRIVIAL: trivial}
        for name, body in bodies.items():
            client.register_task(name)(body)

    def start(self, body: str, size: int) -> None:
        client.spawn(body, {"n": size})

    def work(self) -> None:
        self.open()
        client.start_worker(batch_size=BATCH, poll_interval=POLL_SECONDS)


if __name__ == "__main__":
    AbsurdSystem().main()

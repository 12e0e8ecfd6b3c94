"""DBOS Transact: durable workflows as a library, in PostgreSQL.

A parent calls its children as functions, in its own process and thread, which it holds until they are done: the
cheapest that DBOS has. Parallel children go through the queue, to both processes. Queues are polled each
``POLL_SECONDS`` instead of the default 1.
"""

from __future__ import annotations

import threading

from dbos import DBOS, DBOSClient, DBOSConfig

from benchmarks import marks
from benchmarks.systems.base import PARALLEL, SEQUENCE, STEPS, TRIVIAL, System, database_url

POLL_SECONDS = 0.01
QUEUE, CHILDREN = "roots", "children"
VERSION = "benchmark"
#: Workflows in flight in one process, as far as the queue decides it.
CONCURRENCY = 8


@DBOS.workflow(name="child")
def child(n: int) -> int:
    return n


@DBOS.step(name="step")
def step(n: int) -> int:
    return n


@DBOS.workflow(name=SEQUENCE)
def sequence(count: int) -> int:
    marks.begin()
    total = sum(child(n) for n in range(count))
    marks.end()
    return total


@DBOS.workflow(name=PARALLEL)
def parallel(count: int) -> int:
    marks.begin()
    handles = [DBOS.enqueue_workflow(CHILDREN, child, n) for n in range(count)]
    total = sum(handle.get_result(polling_interval_sec=POLL_SECONDS) for handle in handles)
    marks.end()
    return total


@DBOS.workflow(name=STEPS)
def steps(count: int) -> int:
    marks.begin()
    total = sum(step(n) for n in range(count))
    marks.end()
    return total


@DBOS.workflow(name=TRIVIAL)
def trivial(n: int) -> int:
    marks.begin()
    marks.end()
    return n


class Dbos(System):
    """Worker processes that listen to two queues; a client that enqueues."""

    def _launch(self, executor: str) -> None:
        config: DBOSConfig = {
            "name": "benchmark",
            "system_database_url": database_url(),
            "application_version": VERSION,
            "executor_id": executor,
            "log_level": "WARNING",
            "enable_otlp": False,
        }
        DBOS(config=config)
        DBOS.launch()
        for name in (QUEUE, CHILDREN):
            DBOS.register_queue(
                name, worker_concurrency=CONCURRENCY, polling_interval_sec=POLL_SECONDS, on_conflict="always_update"
            )

    def prepare(self) -> None:
        self._launch("prepare")
        DBOS.destroy()

    def open(self) -> None:
        self._client = DBOSClient(system_database_url=database_url(), application_name="benchmark")

    def start(self, body: str, size: int) -> None:
        self._client.enqueue({"queue_name": QUEUE, "workflow_name": body, "app_version": VERSION}, size)

    def work(self) -> None:
        import os

        self._launch(f"worker-{os.getpid()}")
        threading.Event().wait()


if __name__ == "__main__":
    Dbos().main()

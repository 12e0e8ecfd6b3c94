"""Celery alone: a chain of three, a chord, a plain task. Nothing is durable, and no task gets another's result.

What it is here for: the price of durability, and the ceiling of anything that sends a message for each task.
"""

from __future__ import annotations

import os

from celery import Celery, chain, chord

from benchmarks import marks
from benchmarks.systems.base import PARALLEL, SEQUENCE, TRIVIAL, System
from benchmarks.systems.conductor import celery_worker

app = Celery("plain", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ.get("CELERY_RESULT_BACKEND"))
app.conf.update(
    task_default_queue=os.environ["CONDUCTOR_BENCHMARK_QUEUE"],
    broker_connection_retry_on_startup=True,
    task_ignore_result=app.conf.result_backend is None,
)


@app.task(name="trivial")
def trivial(n: int, root: bool) -> int:
    """Do nothing; the last one of a chain ends the root."""
    marks.begin()
    if root:
        marks.end()
    return n


@app.task(name="collect")
def collect(results: list[int]) -> int:
    """A chord's body."""
    total = sum(results)
    marks.end()
    return total


class PlainCelery(System):
    """The same workers, without ``conductor_app`` and without Django."""

    def prepare(self) -> None:
        """No table is needed."""

    def open(self) -> None:
        with app.connection_for_write() as connection:
            connection.connect()

    def start(self, body: str, size: int) -> None:
        if body == SEQUENCE:
            chain(trivial.si(n, n == size - 1) for n in range(size)).delay()
        elif body == PARALLEL:
            chord((trivial.s(n, False) for n in range(size)), collect.s()).delay()
        elif body == TRIVIAL:
            trivial.delay(size, True)
        else:
            raise ValueError(body)

    def work(self) -> None:
        celery_worker("benchmarks.systems.plain_celery")


if __name__ == "__main__":
    PlainCelery().main()

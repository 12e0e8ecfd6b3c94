"""Procrastinate: a queue in PostgreSQL. It has no parents, children or steps, so: trivial jobs alone."""

from __future__ import annotations

import procrastinate

from benchmarks import marks
from benchmarks.systems.base import TRIVIAL, System, database_url

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=database_url()))


@app.task(name="trivial")
async def trivial(n: int) -> int:
    """Do nothing. A coroutine: an ordinary function would cost a hop to a thread."""
    marks.begin()
    marks.end()
    return n


class Procrastinate(System):
    """Its workers as they are; LISTEN/NOTIFY wakes them."""

    def prepare(self) -> None:
        with app.open():
            app.schema_manager.apply_schema()

    def open(self) -> None:
        app.open()

    def start(self, body: str, size: int) -> None:
        if body != TRIVIAL:
            raise ValueError(body)
        trivial.defer(n=size)

    def work(self) -> None:
        app.run_worker(concurrency=CONCURRENCY, install_signal_handlers=False)


#: Jobs in flight in one process.
CONCURRENCY = 8

if __name__ == "__main__":
    Procrastinate().main()

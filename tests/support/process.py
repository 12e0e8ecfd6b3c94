"""What the process that runs the tests remembers: given back after each test, and what a test may put in there."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from conductor_app.models import Execution
from conductor_app.store.process import Gate, process


@contextmanager
def given_back() -> Iterator[None]:
    """Let the process remember afterwards what it remembers now; what is set in the block is the block's."""
    worker, of_worker, of_process = process.worker, vars(process.worker).copy(), vars(process).copy()
    try:
        yield
    finally:
        vars(process).update(of_process)
        vars(worker).update(of_worker)


class NotingBroker:
    """In the place of ``host.publishing``: notes whose messages it gets, while it is not away."""

    def __init__(self, ids: list[uuid.UUID] | None = None, *, is_away: bool = False) -> None:
        self.ids: list[uuid.UUID] = [] if ids is None else ids
        self.is_away = is_away

    def send(self, execution: Execution, *, waits: bool) -> None:
        del waits
        if self.is_away:
            raise ConnectionRefusedError("the broker is away")
        self.ids.append(execution.pk)

    def is_about_message(self, error: Exception) -> bool:
        return not isinstance(error, ConnectionError)

    def tried(self, error: Exception) -> str:
        del error
        return "of the test"


class PoolGate(Gate):
    """That of a process of a pool: bodies run in a process of their own."""

    is_own_process = True


def note_published() -> list[uuid.UUID]:
    """Publish to a broker server, which does not exist; return the ids of the executions whose messages it gets."""
    broker = NotingBroker()
    process.worker.is_embedded, process.broker = False, broker
    return broker.ids

"""What feeds a worker from the database in embedded mode."""

from __future__ import annotations

from typing import Any

from celery.worker import state as worker_state

from conductor_app.engine import sweeper
from conductor_app.host import attendance, news


class Feed:
    """What feeds the worker from the database, in embedded mode."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        #: A channel of the ``memory://`` broker, by which this looks at its queues.
        self._memory: Any = None
        #: The queues that this worker serves. Celery adds to its own list what bodies in this process are routed to.
        self._served: list[str] | None = None

    def fill(self) -> None:
        """Publish due executions into this process's own memory:// queue, as many as the pool has room for."""
        wanted = self._pool_size() * news.news().room
        stock = len(worker_state.reserved_requests) + self._unread()
        # A transaction for each run that ends would cost as much as the run.
        if 2 * stock <= wanted:
            stock += sweeper.publish_due(wanted - stock, self._queues())
        news.news().spare = stock - wanted // 2

    def _pool_size(self) -> int:
        return attendance.slots(self._worker)

    def _queues(self) -> list[str]:
        if self._served is None:
            self._served = list(self._worker.app.amqp.queues.consume_from)
        return self._served

    def _unread(self) -> int:
        if self._memory is None:
            self._memory = self._worker.app.connection_for_read().channel()
        return sum(self._memory._size(name) for name in self._queues())

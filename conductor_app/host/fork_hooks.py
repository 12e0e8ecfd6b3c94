"""What the main process does before and after each fork of a pool process."""

from __future__ import annotations

import logging
import os
import threading

from django.db import DatabaseError, connections

from conductor_app.host.sweeper_thread import SweeperThread

logger = logging.getLogger("conductor_app.worker")


class _ForkHooks:
    """Hooks of this process, installed once; they follow the thread that is current."""

    def __init__(self) -> None:
        self.thread: SweeperThread | None = None
        #: Of the thread that forks; several may at the same time.
        self._local = threading.local()
        os.register_at_fork(
            before=self._before, after_in_parent=self._after_in_parent, after_in_child=self._after_in_child
        )

    def _before(self) -> None:
        self._local.held = False
        if self.thread is not None:
            self._local.held = self.thread.before_fork()
            _close_own_connections()

    def _after_in_parent(self) -> None:
        if self.thread is not None:
            self.thread.after_fork_in_parent(self._local.held)

    def _after_in_child(self) -> None:
        self.thread = None


def _close_own_connections() -> None:
    """Close what this thread, usually Celery's main one, has open: a child process that inherits it would break it.

    A killed process's failure is stored by the main process. Then a new process is forked, and the first thing that
    Celery's fixup does there is to close the inherited connection. MariaDB's drivers say goodbye on the shared socket:
    the main process could store no second failure, and the plain child that it is about would never be reported.
    """
    for connection in connections.all(initialized_only=True):
        if connection.connection is not None and not connection.in_atomic_block:
            try:
                connection.close()
            except DatabaseError:
                logger.debug("Closing a connection before a fork failed.", exc_info=True)


hooks = _ForkHooks()

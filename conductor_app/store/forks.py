"""What a forked process must not share with its parent: the sockets to brokers and databases.

Two processes that write to one socket ruin the session for both, and so does a goodbye of one of them. kombu forgets
its connections after billiard's forks alone, and py-amqp's way to forget one shuts the shared socket down; drivers of
databases differ. So here, whoever has forked (Celery's pool, ``gunicorn --preload``, ``multiprocessing``, a body), the
child gets ``/dev/null`` in the place of each inherited socket before anything else runs: whatever a client library does
with it later, when it is closed, collected as garbage or at the process's end, reaches nobody. The connections are
forgotten, and the child opens its own when it needs one. The parent's are left as they are.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from django.db import DatabaseError, connections
from django.db.backends.signals import connection_created

from conductor_app.store.process import process
from conductor_app.store.sockets import descriptor_of

logger = logging.getLogger("conductor_app.worker")

#: Of the thread that forks, while it does: the connections and what their drivers made, and whether the sweeper's
#: thread is held up. Several threads may fork at the same time.
_forking = threading.local()


def own() -> None:
    """Forget what this process has inherited, if nobody has told it that it was forked.

    uWSGI forks without Python's knowledge, unless it is asked for ``py-call-osafterfork``.
    """
    if os.getpid() != process.pid:
        _forking.kept = getattr(_forking, "kept", None) or _opened()
        _forget_connections()


def _note(connection: Any = None, **_kwargs: Any) -> None:
    key = id(connection)
    known = process.connections
    known[key] = weakref.ref(connection, lambda _: known.pop(key, None))


def _opened() -> list[tuple[Any, Any]]:
    """Return Django's connections that are open, with what their drivers made."""
    known = {id(connection): connection for connection in connections.all(initialized_only=True)}
    known |= {key: connection for key, reference in list(process.connections.items()) if (connection := reference())}
    return [(connection, connection.connection) for connection in known.values() if connection.connection is not None]


def _before() -> None:
    sweeper, _forking.held = process.worker.sweeper, False
    try:
        if sweeper is not None:
            _forking.held = sweeper.before_fork()
            _close_own_connections()
    finally:
        _forking.kept = _opened()


def _after_in_parent() -> None:
    _forking.kept = None
    if process.worker.sweeper is not None:
        process.worker.sweeper.after_fork_in_parent(_forking.held)


def _after_in_child() -> None:
    try:
        _forget_connections()
    finally:
        process.forget_parents()


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


def _forget_connections() -> None:
    process.pid = os.getpid()
    inherited, _forking.kept = _forking.kept or (), None
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        try:
            _forget_databases(inherited, nowhere)
            for forget in process.forgetting:
                forget(nowhere)
        finally:
            os.close(nowhere)


# --------------------------------------------------------------------------------------------------------- databases


def _forget_databases(inherited: Iterable[tuple[Any, Any]], nowhere: int) -> None:
    for connection, driver in inherited:
        if connection.vendor == "sqlite":
            if connection.is_in_memory_db():
                continue  # shared with nobody: the child has a copy of it
            if connection.in_atomic_block:
                _keep_for_ever(driver)  # closed, it would roll back the parent's transaction
            elif connection._thread_ident != threading.get_ident():
                # That thread may have been inside SQLite when this one forked, with its locks, which nobody frees here.
                _keep_for_ever(driver)
            else:
                # SQLite's notes of its locks are inherited, and the locks are not. This ends the notes.
                with suppress(Exception):
                    driver.close()
        elif not replace(descriptor_of(driver), nowhere):
            _keep_for_ever(driver)
        _forget_pools(connection)
        connection.connection = None
        if connection.in_atomic_block:
            # As after Django's own ``close()`` in a transaction, which is the parent's to end.
            connection.closed_in_transaction = connection.needs_rollback = True


def _forget_pools(connection: Any) -> None:
    """Forget the pools of ``OPTIONS["pool"]``: their threads are the parent's, and their idle connections, too."""
    found = getattr(type(connection), "_connection_pools", None)
    if isinstance(found, dict):
        for pool in found.values():
            _keep_for_ever(pool)
        found.clear()


def _keep_for_ever(thing: Any) -> None:
    """Let nothing free an object, not even the end of the process: its driver would say goodbye."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def replace(descriptor: int | None, nowhere: int) -> bool:
    """Put ``nowhere`` in the place of a descriptor; tell whether that was possible."""
    if descriptor is None or descriptor < 0:
        return False
    try:
        os.dup2(nowhere, descriptor, inheritable=False)
    except OSError:
        return False
    return True


connection_created.connect(_note, dispatch_uid="conductor_app.store.forks")
os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)

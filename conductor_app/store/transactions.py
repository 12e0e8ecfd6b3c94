"""Transactions that are run again: after a conflict, while the database is away, on a connection that is not dead."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from django.db import DatabaseError, Error, InterfaceError, connections, transaction

from conductor_app.exceptions import AbandonRun
from conductor_app.store import errors
from conductor_app.store.locks import RowsLocked, limit_of, limited
from conductor_app.store.opened import opened_connections
from conductor_app.store.soft_limits import uninterrupted
from conductor_app.store.waits import at_work

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: So often a transaction is run again after conflicts, before it counts as an outage.
CONFLICT_TRIES = 8
#: Background work leaves what is in the way to its next round sooner.
_BACKGROUND_TRIES = 2

#: How long the sweeper, the admin and commands wait for a database that is away: long enough for a new connection.
_BRIEF_SECONDS = 1.0


def persist(using: str, work: Callable[[], T], *, patience: float, skips_locked: bool = False) -> T:
    """Run ``work``, a transaction of guarded statements, until the database has taken it.

    ``work`` must be safe to repeat: each statement is a compare-and-set, and a repetition after a lost ``COMMIT``
    recognises its own writes. All of its statements are ours, so one that was cancelled, or met a full disk, is
    repeated as after an outage.

    Args:
        using: Database alias.
        work: Opens and commits its own transaction.
        patience: Seconds to keep trying while the database is away.
        skips_locked: Whether it passes over locked rows anyway, so that ``waiting_at_most`` has nothing to limit.

    Raises:
        AbandonRun: The database was away for ``patience`` seconds.
        RowsLocked: A row was locked for as long as ``waiting_at_most`` says.
    """
    connection = connections[using]
    limit = None if skips_locked else limit_of(connection)
    conflicts = 0
    pause = 0.1
    give_up_at = time.monotonic() + patience
    while True:
        wait = at_work(connection)
        is_ours = _is_ours(using)
        try:
            with uninterrupted(), wait, not_left_half_open(connection):
                return work() if limit is None else limited(connection, work, limit)
        except (DatabaseError, InterfaceError) as error:
            if not is_ours:
                raise  # the caller's transaction is broken; only the caller can start it again
            if _raises_read_only.get() and errors.is_read_only(error):
                raise
            if limit is not None and (
                errors.is_lock_refused(error) or (conflicts >= _BACKGROUND_TRIES and errors.is_conflict(error))
            ):
                raise RowsLocked(errors.first_line(error)) from error
            if wait.is_cut:
                # It has waited on a connection that was dead, while another one worked.
                give_up_at = time.monotonic() + patience
            if errors.is_conflict(error) and conflicts < CONFLICT_TRIES:
                conflicts += 1
                pause_after_conflict(conflicts)
                continue
            is_away = errors.is_outage(error)
            if not is_away and not errors.is_conflict(error) and not errors.is_passing(error):
                raise
            if time.monotonic() + pause > give_up_at:
                silence = errors.NO_CONNECTION if errors.is_pool_empty(error) else "the database did not answer"
                raise AbandonRun(f"{silence} for {patience:g}s: {error}") from error
            what = errors.name_outage(error) if is_away else "the database does not take a transaction now"
            logger.warning("%s (%s); trying again in %.1fs.", _sentence(what), error, pause)
            with contextlib.suppress(Exception):
                connection.close()
            time.sleep(pause)
            pause = min(pause * 2, 5.0)


def persist_briefly(using: str, work: Callable[[], T], *, patience: float = 0, skips_locked: bool = False) -> T:
    """Run a transaction on which no lease depends, as ``persist`` does; an outage is the caller's to know.

    ``AbandonRun`` ends a run. The sweeper's thread, a command and a web process have none to end: they get the
    database's error.

    So every call from outside of a body gets over a connection that has died since it was used last: nobody looks after
    it in a process that serves no requests, such as Celery Beat, a bot or a shell.

    Args:
        using: Database alias.
        work: As for ``persist``.
        patience: Seconds to keep trying, if that is longer than for others.
        skips_locked: As for ``persist``.
    """
    try:
        return persist(using, work, patience=max(patience, _BRIEF_SECONDS), skips_locked=skips_locked)
    except AbandonRun as given_up:
        error = given_up.__cause__ or given_up
    raise error


def together(using: str, work: Callable[[], T]) -> T:
    """Run ``work`` once, in a transaction; ``waiting_at_most`` counts for it, too.

    Raises:
        RowsLocked: A row was locked for as long as that says.
    """
    connection = connections[using]
    limit = limit_of(connection)

    def atomic() -> T:
        with not_left_half_open(connection), transaction.atomic(using=using):
            return work()

    if limit is None:
        return atomic()
    try:
        return limited(connection, atomic, limit)
    except (DatabaseError, InterfaceError) as error:
        if errors.is_lock_refused(error) or errors.is_conflict(error):
            raise RowsLocked(errors.first_line(error)) from error
        raise


def once_more(work: Callable[[], T]) -> T:
    """Run what others do with Django's connections; once more on new ones, if a connection has turned out to be dead.

    What is in a transaction is left alone, as it is the caller's to start again.
    """
    try:
        return work()
    except Error:
        if not drop_dead_connections():
            raise
    return work()


def drop_dead_connections() -> bool:
    """Close this thread's connections on which nobody answers, so that new ones take their place; tell if any was."""
    dead = [
        connection
        for connection in opened_connections()
        if connection.connection is not None and _is_ours(connection.alias) and not connection.is_usable()
    ]
    for connection in dead:
        with contextlib.suppress(Exception):
            connection.close()
    return bool(dead)


def _is_ours(using: str) -> bool:
    """Tell whether no transaction of the caller's goes on, which a new connection would end."""
    connection = connections[using]
    # ``autocommit`` is what the settings say from the moment of the connection on.
    return not connection.in_atomic_block and (connection.connection is None or connection.autocommit)


@contextlib.contextmanager
def not_left_half_open(connection: Any) -> Iterator[None]:
    """Keep no session that has ended between a transaction of this block and Django's return to autocommit.

    With MySQL that is a statement of its own. When it fails, Django goes on to take the session for one in a
    transaction: what is written next is never committed, by whomever.
    """
    begins = connection.autocommit or connection.connection is None
    try:
        yield
    except (DatabaseError, InterfaceError):
        is_half_open = connection.connection is not None and not connection.autocommit
        if begins and is_half_open and connection.settings_dict["AUTOCOMMIT"] and not connection.in_atomic_block:
            with contextlib.suppress(Exception):
                connection.close()
        raise


def pause_after_conflict(number: int) -> None:
    """Wait for a random time that grows with the number of conflicts, so that two of a kind part."""
    time.sleep(random.uniform(0, 0.02 * 2**number))


def pause_after_outage(number: int) -> None:
    """Wait for a time that doubles with the number of sessions that were lost one after another."""
    time.sleep(min(0.1 * 2 ** (number - 1), 5.0))


#: Whether a read-only session is somebody's fault, and not a server's that takes no writes any more.
_raises_read_only: ContextVar[bool] = ContextVar("conductor_app_raises_read_only", default=False)


@contextlib.contextmanager
def raising_read_only(is_wanted: bool) -> Iterator[None]:
    """Let ``persist`` raise at once what a read-only session makes of a write: a body may have left it so."""
    token = _raises_read_only.set(is_wanted)
    try:
        yield
    finally:
        _raises_read_only.reset(token)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]

"""What this thread has open: its connections, and the transaction that a statement would stand in."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from django.db import connections, transaction


def opened_connections() -> list[Any]:
    """Return the connections that this thread has used; what ``connections.all(initialized_only=True)`` does.

    That looks up each alias twice, in storage that asks each time for the event loop of its thread.
    """
    aliases = connections.settings
    if len(aliases) == 1:
        return [connections[next(iter(aliases))]]
    return list(connections.all(initialized_only=True))


def is_transaction(using: str) -> bool:
    """Tell whether a single statement is a transaction itself now."""
    connection = connections[using]
    return not connection.in_atomic_block and connection.get_autocommit()


def note_created(using: str, key: Any) -> None:
    """Note that the current transaction, if there is one, has created a row."""
    connection: Any = connections[using]
    if not connection.in_atomic_block or not connection.atomic_blocks:
        return
    # The outermost block is the transaction. What a savepoint's rollback has undone is not found any more.
    kept = vars(connection).get("_conductor_created")
    if kept is None or kept[0] is not connection.atomic_blocks[0]:
        kept = connection._conductor_created = (connection.atomic_blocks[0], set())
    kept[1].add(key)


def was_created_here(using: str, key: Any) -> bool:
    """Tell whether the current transaction has created a row, so that nobody else can see it."""
    connection: Any = connections[using]
    kept = vars(connection).get("_conductor_created")
    is_open = bool(kept and connection.in_atomic_block and connection.atomic_blocks)
    return is_open and kept[0] is connection.atomic_blocks[0] and key in kept[1]


def is_in_test_alone(using: str) -> bool:
    """Tell whether no transaction is open but that of a ``TestCase``, which stands for a database that is empty."""
    blocks: list[Any] = connections[using].atomic_blocks
    return bool(blocks) and all(block._from_testcase for block in blocks)


def snapshot_level(using: str) -> str:
    """Return the isolation of the current transaction if it does not see what others commit meanwhile; else nothing."""
    if is_transaction(using):
        return ""
    connection: Any = connections[using]
    if connection.vendor == "sqlite":
        return "SQLite"
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SHOW transaction_isolation")
            level = str(cursor.fetchone()[0])
    else:
        level = str(connection.isolation_level or "repeatable read")  # MySQL's own default
    return level if level in ("repeatable read", "serializable") else ""


def one_statement(using: str) -> AbstractContextManager[object]:
    """Return what goes around a single statement that may fail.

    Nothing where the statement is a transaction itself; inside another one a savepoint, which keeps that usable.
    """
    return contextlib.nullcontext() if is_transaction(using) else transaction.atomic(using=using)

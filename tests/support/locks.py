"""Rows that another session has locked, as a view does that sends an event and then calls something slow."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection, connections, transaction

from conductor_app.models import Execution


@contextmanager
def locked(*executions: Any) -> Iterator[None]:
    """Keep executions locked, named by their ids or results, for as long as the block lasts."""
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has one lock for all, and none for a row")
    begun, over = threading.Event(), threading.Event()
    errors: list[BaseException] = []
    keys = [getattr(execution, "id", execution) for execution in executions]
    thread = threading.Thread(target=_lock, args=(keys, begun, over, errors), daemon=True)
    thread.start()
    try:
        assert begun.wait(30), f"The rows could not be locked: {errors}"
        yield
    finally:
        over.set()
        thread.join(30)
    assert not errors


def _lock(keys: Sequence[Any], begun: threading.Event, over: threading.Event, errors: list[BaseException]) -> None:
    try:
        with transaction.atomic():
            assert len(Execution.objects.select_for_update().filter(pk__in=keys)) == len(keys)
            begun.set()
            over.wait(120)
    except BaseException as error:  # noqa: BLE001 - raised in the test's thread
        errors.append(error)
    finally:
        connections.close_all()

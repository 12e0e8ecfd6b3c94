"""Waiting for results in an event loop: one task looks for all who wait in it, and holds a thread only while it looks.

Looking is done by ``sync_to_async``, so by the thread, and on the connection, on which Django's own async methods are.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from asgiref.sync import sync_to_async
from django.db import DatabaseError, InterfaceError, close_old_connections, connections

from conductor_app.conf import conductor_settings
from conductor_app.engine.waiting import PAUSES, check_wait, late, missing, result_of
from conductor_app.exceptions import WaitInsideTransaction
from conductor_app.models import Execution, database
from conductor_app.store.errors import is_outage
from conductor_app.store.process import process
from conductor_app.store.transactions import persist_briefly

#: Most ids of one query.
_MOST_IDS = 500
#: What somebody waits for, and for how long.
_Wait = tuple[uuid.UUID, float | None]


async def result(execution_id: uuid.UUID, timeout: float | None) -> Any:
    """Wait until an execution is final, and return its result or raise its error; see ``api.get_result``.

    Args:
        execution_id: The execution's id.
        timeout: Seconds; ``None`` waits without limit, 0 only looks.
    """
    loop = asyncio.get_running_loop()
    poller = process.pollers.get(loop)
    if poller is None:
        poller = process.pollers[loop] = _Poller()
    waiter = _Waiter(execution_id, timeout, loop.create_future())
    poller.add(waiter)
    try:
        found = await waiter.future
    finally:
        poller.remove(waiter)
    return result_of(found)


class _Waiter:
    """One call that waits."""

    def __init__(self, execution_id: uuid.UUID, timeout: float | None, future: asyncio.Future[Execution]) -> None:
        self.execution_id = execution_id
        self.timeout = timeout
        self.future = future
        self.looks = 0
        #: Since when the database has been away.
        self.away_since: float | None = None
        #: When it is to be looked for next, and last, by ``time.monotonic()``.
        self.due = time.monotonic()
        self.last = math.inf if timeout is None else self.due + timeout

    def note_look(self, now: float) -> None:
        """Choose the next instant. Those of all who have waited for long are the same, so that they share a query."""
        pause = PAUSES[min(self.looks, len(PAUSES) - 1)]
        self.looks += 1
        self.due = min(math.floor(now / pause + 1) * pause, self.last)

    def tell(self, found: Execution | BaseException) -> None:
        """End the wait, unless it has been cancelled."""
        if self.future.done():
            return
        if isinstance(found, BaseException):
            self.future.set_exception(found)
        else:
            self.future.set_result(found)


class _Poller:
    """All who wait in one event loop."""

    def __init__(self) -> None:
        self._waiters: set[_Waiter] = set()
        self._task: asyncio.Task[None] | None = None
        self._rouse = asyncio.Event()

    def add(self, waiter: _Waiter) -> None:
        self._waiters.add(waiter)
        self._rouse.set()
        if self._task is None:
            self._begin()

    def remove(self, waiter: _Waiter) -> None:
        self._waiters.discard(waiter)
        self._rouse.set()

    def _begin(self) -> None:
        # In a context of its own: that of the first who waits may be a request's, and end with its threads.
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._poll(), name="conductor_app results", context=contextvars.Context())

    async def _poll(self) -> None:
        try:
            while self._waiters:
                now = time.monotonic()
                await self._look([waiter for waiter in self._waiters if waiter.due <= now])
                await self._pause()
            # As Django does at the end of a request: nobody else looks after the connections of that thread.
            await sync_to_async(close_old_connections)()
        except Exception as error:  # noqa: BLE001 - whoever waits is to know it
            for waiter in self._waiters:
                waiter.tell(error)
        finally:
            self._task = None
            own = asyncio.current_task()
            if self._waiters and own is not None and not own.cancelling():
                self._begin()  # for who has come while connections were closed
            else:
                # It knows its loop, which would stay with it.
                process.pollers.pop(asyncio.get_running_loop(), None)

    async def _look(self, waiters: Sequence[_Waiter]) -> None:
        if not waiters:
            return
        first = {(waiter.execution_id, waiter.timeout) for waiter in waiters if not waiter.looks}
        ids = list({waiter.execution_id for waiter in waiters})
        try:
            rows, refused = await sync_to_async(_read)(ids, first)
        except (DatabaseError, InterfaceError) as error:
            self._note_outage(waiters, error)
            return
        now = time.monotonic()
        for waiter in waiters:
            row = rows.get(waiter.execution_id)
            waiter.away_since = None
            if row is None:
                waiter.tell(missing(waiter.execution_id))
            elif row.is_final:
                waiter.tell(row)
            elif (refusal := refused.get((waiter.execution_id, waiter.timeout))) is not None:
                waiter.tell(refusal)
            elif now >= waiter.last:
                waiter.tell(late(row, waiter.timeout or 0))
            else:
                waiter.note_look(now)

    def _note_outage(self, waiters: Sequence[_Waiter], error: Exception) -> None:
        """Wait on while the database is away, for as long as ``api.get_result`` does."""
        now = time.monotonic()
        patience = conductor_settings().LEASE_SECONDS
        for waiter in waiters:
            waiter.away_since = waiter.away_since or now
            if not is_outage(error) or now >= min(waiter.last, waiter.away_since + patience):
                waiter.tell(error)
            else:
                waiter.note_look(now)

    async def _pause(self) -> None:
        """Sleep until somebody is due, or comes."""
        self._rouse.clear()
        waiting = [waiter.due for waiter in self._waiters if not waiter.future.done()]
        if not waiting:
            # Who has been told takes leave as soon as the loop goes on.
            await asyncio.sleep(0)
            return
        left = min(waiting) - time.monotonic()
        if left > 0:
            try:
                await asyncio.wait_for(self._rouse.wait(), left)
            except TimeoutError:
                return
        # A moment for those who come together.
        await asyncio.sleep(PAUSES[0] / 2 if left > 0 else 0)


def _read(
    ids: Sequence[uuid.UUID], first: Collection[_Wait]
) -> tuple[dict[uuid.UUID, Execution], dict[_Wait, Exception]]:
    """Return executions by their ids, and which of those who look for the first time can never see an end, and why."""
    using = database()
    rows = Execution.objects.using(using).only("id", "task", "status", "result", "error")
    size = min(_MOST_IDS, connections[using].ops.bulk_batch_size(["pk"], ids))

    def read() -> dict[uuid.UUID, Execution]:
        parts = (ids[start : start + size] for start in range(0, len(ids), size))
        return {row.pk: row for part in parts for row in rows.filter(pk__in=part)}

    found = persist_briefly(using, read)
    refused: dict[_Wait, Exception] = {}
    for key, timeout in first:
        if key in found and not found[key].is_final:
            try:
                check_wait(found[key], timeout)
            except WaitInsideTransaction as error:
                refused[key, timeout] = error
    return found, refused

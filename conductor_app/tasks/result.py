"""The result of a durable task, and when waiting for it is in vain."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import celery.exceptions
from celery.result import AsyncResult
from django.db import DatabaseError, InterfaceError

from conductor_app.body.run import current_context
from conductor_app.conf import conductor_settings
from conductor_app.engine.waiting import check_wait_for_result
from conductor_app.exceptions import BlockingCallInTask
from conductor_app.store.errors import is_outage
from conductor_app.store.event_loops import check_none_runs
from conductor_app.store.transactions import drop_dead_connections, once_more

#: How often to look whether a database is back, in seconds.
_AWAY_POLL_SECONDS = 0.2

R = TypeVar("R")

if TYPE_CHECKING:

    class _AsyncResult(AsyncResult[R]):
        """Celery's result, generic."""
else:  # Celery 5.6 cannot be subscripted at run time.

    class _AsyncResult(AsyncResult, Generic[R]):
        pass


class DurableResult(_AsyncResult[R]):
    """An ``AsyncResult`` that refuses to be waited for inside a durable body.

    It gets over a database connection that dies meanwhile, where results are in the database.
    """

    #: The execution that a call has got; its id is not always the result's. ``None`` for a result of no call.
    execution_id: uuid.UUID | None = None
    #: Whether the call that returned this has stored the execution; ``False`` if that was there, by an idempotency key
    #: or a unique key. ``None`` for a result of no call.
    is_new: bool | None = None

    def _get_task_meta(self) -> Any:
        read: Any = super()._get_task_meta  # type: ignore[misc]  # its stubs do not know it
        return once_more(read)

    def get(self, timeout: float | None = None, *args: Any, **kwargs: Any) -> R:
        """Wait for the result; see ``celery.result.AsyncResult.get``. ``None`` at once if the call ignores it.

        Args:
            timeout: Seconds to wait; ``None`` waits without limit, 0 only looks (Celery's own waits without limit).

        Raises:
            celery.exceptions.TimeoutError: It has not come by then.
            BlockingCallInTask: The call stands in a durable body.
            BlockingCallInEventLoop: An event loop runs here; use ``api.aget_result``.
            WaitInsideTransaction: The current transaction can never see the end: it has created the execution, or one
                before it in its chain, or reads a snapshot.
        """
        check_none_runs("AsyncResult.get()", "`await api.aget_result(…)`")
        if current_context.get() is not None:
            raise BlockingCallInTask(
                f"Waiting for {self.id} inside a durable body would hold the worker. Use ctx.invoke instead of "
                ".delay(…).get()."
            )
        if self.ignored:
            return cast(R, None)
        check_wait_for_result(self, timeout)
        if timeout == 0 and not self.ready():
            raise celery.exceptions.TimeoutError(f"The result of {self.id} is not there yet. It goes on; wait again.")
        began, seen_at = time.monotonic(), None
        left = timeout
        while True:
            try:
                return super().get(left, *args, **kwargs)
            except (DatabaseError, InterfaceError) as error:
                now = time.monotonic()
                if cast(Any, self)._cache is not None or not is_outage(error):
                    raise  # the task's own error
                if drop_dead_connections():
                    seen_at = now
                elif seen_at is None or now - seen_at > conductor_settings().LEASE_SECONDS:
                    raise
                else:
                    time.sleep(_AWAY_POLL_SECONDS)
                if timeout is not None:
                    left = began + timeout - time.monotonic()
                    if left <= 0:
                        raise

"""Tell Celery of a final status: result backend, callbacks, chain, chord.

A run that ends does this itself, through Celery's tracer. This module does it for executions that end without a run
(cancelled while waiting, lost with their worker) and for runs that died between their commit and Celery's bookkeeping.
So callbacks are sent at least once; exactly once if they are durable tasks, since their ids are fixed when they are
stored.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import current_app
from celery.app.task import Context
from celery.canvas import maybe_signature

from conductor_app import transitions
from conductor_app.exceptions import ExecutionCancelled, ExecutionFailed
from conductor_app.models import Execution, FailedExecution, database
from conductor_app.states import ExecutionStatus

logger = logging.getLogger(__name__)


def deliver(execution: Execution) -> None:
    """Tell Celery how ``execution`` ended, and note that it was told.

    Raises:
        Exception: Whatever the broker or the result backend raises; the sweeper then tries again.
    """
    options = execution.get_options()
    request = Context(
        id=str(execution.pk),
        task=execution.task,
        args=(),
        kwargs={},
        callbacks=options.get("link"),
        errbacks=options.get("link_error"),
        chain=options.get("chain"),
        chord=options.get("chord"),
        group=options.get("group_id"),
        group_index=options.get("group_index"),
        root_id=options.get("root_id") or str(execution.root_id),
        parent_id=None,
        ignore_result=bool(options.get("ignore_result", True)),
        called_directly=False,
    )
    backend: Any = current_app.backend
    store = not request.ignore_result
    if execution.status == ExecutionStatus.SUCCEEDED:
        result = execution.get_result()
        _send_callbacks(request, result)
        backend.mark_as_done(request.id, result, request=request, store_result=store)
    elif execution.status == ExecutionStatus.FAILED:
        trace = FailedExecution.objects.using(database()).filter(pk=execution.pk).values_list("traceback", flat=True)
        error = ExecutionFailed(execution.error_message)
        backend.mark_as_failure(request.id, error, next(iter(trace), ""), request=request, store_result=store)
    elif execution.status == ExecutionStatus.CANCELLED:
        cancelled = ExecutionCancelled(execution.error_message)
        backend.mark_as_revoked(request.id, str(cancelled), request=request, store_result=store)
        if request.errbacks:
            backend._call_task_errbacks(request, cancelled, None)
    else:
        return  # reopened meanwhile
    transitions.announced(execution.pk)


def _send_callbacks(request: Context, result: Any) -> None:
    """Send what Celery's tracer sends after a success (``celery.app.trace``, ``_dispatch_callbacks_and_chain``)."""
    shared = {"parent_id": request.id, "root_id": request.root_id}
    for callback in request.callbacks or ():
        _signature(callback).apply_async((result,), **shared)
    if request.chain:
        chain: list[Any] = list(request.chain)
        _signature(chain.pop()).apply_async((result,), chain=chain, **shared)


def _signature(stored: Any) -> Any:
    return maybe_signature(stored, app=current_app)

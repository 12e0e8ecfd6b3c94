"""Messages that somebody else publishes by a task's name become executions."""

from __future__ import annotations

import uuid
from typing import Any

from celery.app.task import Context
from django.db import OperationalError

from conductor_app import transitions
from conductor_app.body import headers
from conductor_app.engine import calls
from conductor_app.engine.run import RunEnded
from conductor_app.exceptions import AbandonRun, ProgrammingError
from conductor_app.models import Execution, database
from conductor_app.store.ids import of_task_id
from conductor_app.transitions.dispatch import HEADER
from conductor_app.values.arguments import call_arguments


def identify(task: Any, request: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> uuid.UUID:
    """Return the id of the execution that a delivery is about; for whoever claims it.

    Raises:
        RunEnded: The message becomes no execution: an open one has its unique key, and stands for it.
        Exception: The message becomes no execution.
    """
    try:
        return _adopt(task, request, args, kwargs)
    except AbandonRun as error:
        # A message that somebody else published is acknowledged, and not stored: Celery has to record the failure.
        raise OperationalError(str(error)) from error


def _adopt(task: Any, request: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> uuid.UUID:
    """Return the id of the execution that a delivery is about.

    A message that somebody else published by task name (Beat, ``send_task``, another language) becomes an
    execution here; delivered again, it finds the one that it became. If its arguments do not fit, it becomes none,
    and Celery records the failure as it does for any task.
    """
    execution_id = of_task_id(request.id)
    # Celery puts unknown headers of a message straight onto the request.
    if (getattr(request, HEADER, None) or (request.headers or {}).get(HEADER)) is not None:
        return execution_id
    executions = Execution.objects.using(database())
    known = transitions.patiently(executions.filter(pk=execution_id).first)
    if known is not None:
        execution_id = calls.adopted_id(known, task.name, request.parent_id)
        if execution_id == known.pk or transitions.patiently(executions.filter(pk=execution_id).exists):
            # Whatever else the message says: did its arguments not fit, Celery would record that this one failed.
            return execution_id
    delivery = request.delivery_info or {}
    time_limit, soft_time_limit = (*(request.timelimit or ()), None, None)[:2]
    try:
        new = task.new_execution(
            *call_arguments(task.name, args, kwargs),
            {
                **(request.stamps or {}),
                # Celery goes on to call it by the name that its publisher gave it.
                "celery_id": None if request.id == str(execution_id) else request.id,
                "link": request.callbacks,
                "link_error": request.errbacks,
                "chain": request.chain,
                "chord": request.chord,
                "group_id": request.group,
                "group_index": request.group_index,
                "root_id": request.root_id,
                "parent_id": request.parent_id,
                "ignore_result": vars(request).get("ignore_result"),
                "queue": _consumed_queue(task.app, delivery.get("exchange"), delivery.get("routing_key")),
                "priority": delivery.get("priority"),
                "expires": request.expires,
                "time_limit": time_limit,
                "soft_time_limit": soft_time_limit,
                "shadow": request.shadow,
                "headers": headers.added(request.headers) or None,
                "stamped_headers": request.stamped_headers,
            },
            what=f"payload of {task.name}",
            execution_id=execution_id,
            is_root=True,
        )
    except ProgrammingError:
        if known is None:
            raise
        return known.pk
    created, _ = transitions.patiently(lambda: calls.create(new, None))
    if created.pk != execution_id:
        raise RunEnded("dropped", f"execution {created.pk} has its unique key, {created.unique_key!r}")
    return execution_id


def _consumed_queue(app: Any, exchange: str | None, routing_key: str | None) -> str | None:
    """Return the queue that a message came from, as far as its routing tells; the task's own queue otherwise."""
    queues = app.amqp.queues
    if not exchange and routing_key in queues:
        return routing_key
    for queue in queues.values():
        if queue.exchange is not None and (queue.exchange.name, queue.routing_key) == (exchange, routing_key):
            return str(queue.name)
    return None

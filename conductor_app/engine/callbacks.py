"""The signatures that an end calls: error callbacks, the body of a chord, and what is known of any of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from celery import current_app
from celery.canvas import group, maybe_signature
from celery.exceptions import ChordError, QueueNotFound
from celery.utils.functional import arity_greater
from django.db import transaction
from kombu.exceptions import EncodeError

from conductor_app.body.plain import is_invocable
from conductor_app.exceptions import ProgrammingError
from conductor_app.models import database

logger = logging.getLogger(__name__)

#: What no repetition mends: the callback does not take these arguments, or its queue is none of this project's.
PERMANENT_ERRORS = (ProgrammingError, TypeError, EncodeError, QueueNotFound)


class ChordBody:
    """Takes care that the body of a chord is sent once, when the last part of the header has returned.

    django-celery-results counts down and sends the body; here both happen inside the announcement's transaction. A body
    of durable tasks is stored in it. A plain task's message is sent before the commit, and a refusal undoes the count,
    so that it is tried again. A body that starts a chord with plain tasks goes after the commit: its parts would return
    before their counter can be seen.
    """

    def __init__(self, request: Any, *, together: bool) -> None:
        self._refused: Exception | None = None
        if together and request.chord:
            body = signature_of(request.chord)
            send = body.delay
            body.delay = lambda *args: self._send(body, send, args)
            request.chord = body

    def _send(self, body: Any, send: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if is_canvas(body) and not is_durable(body):
            transaction.on_commit(lambda: _send_late(body, send, args), using=database())
            return
        try:
            send(*args)
        except PERMANENT_ERRORS:
            raise  # the backend fails the chord
        except Exception as error:  # noqa: BLE001 - whatever the broker's client raises
            self._refused = error

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_exc: object) -> None:
        if self._refused is not None:
            raise self._refused


def _send_late(body: Any, send: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        send(*args)
    except Exception as error:
        logger.exception("The body of a chord was not sent.")
        current_app.backend.chord_error_from_stack(body, ChordError(f"Callback error: {error!r}"))


def call_errbacks(request: Any, error: Exception, traceback: str | None = None) -> None:
    """Call the error callbacks of a request, all in the way of Celery 5.7 (``Backend._call_task_errbacks``).

    5.6 takes an old-style callback that has arguments of its own (``log_error.s(order=7)``) for one of the newer form,
    and calls none of them after one that raises.
    """
    sent = []
    for stored in request.errbacks or ():
        errback = signature_of(stored)
        if not _takes_failure(errback):
            sent.append(errback)
            continue
        try:
            errback(request, error, traceback)
        except Exception:
            logger.exception("Error callback %s of %s raised an exception.", errback.task, request.id)
    if not sent:
        return
    together = group(sent, app=current_app)
    send = together.apply if is_eager() or request.delivery_info.get("is_eager") else together.apply_async
    try:
        send((request.id,), parent_id=request.id, root_id=request.root_id or request.id)
    except PERMANENT_ERRORS as refusal:
        logger.error("%s failed, and its error callbacks cannot be called: %s", request.id, refusal)


def _takes_failure(errback: Any) -> bool:
    """Tell whether an error callback is of the newer form, called on the spot with request, error and traceback."""
    task = current_app.tasks.get(errback.task)
    # A task that this process does not know goes to one that does; a bound one (``partial``) is always sent.
    header = getattr(task, "__header__", None)
    if header is None or isinstance(header, functools.partial):
        return False
    if not errback.immutable and (errback.args or errback.kwargs):
        with suppress(TypeError, ValueError):
            # Of the parameters, those that the signature leaves to the failure. Its own positional arguments come last
            # in the call; here they only count.
            return bool(arity_greater(functools.partial(header, *errback.args, **errback.kwargs), 1))
    return bool(arity_greater(header, 1))


def signature_of(stored: Any) -> Any:
    return maybe_signature(stored, app=current_app)


def is_eager() -> bool:
    return bool(current_app.conf.task_always_eager)


def is_canvas(signature: Any) -> bool:
    return bool(signature.get("subtask_type"))


def is_durable(signature: Any) -> bool:
    """Tell whether all tasks of a signature are durable, so that calling it only writes to the database."""
    if not is_canvas(signature):
        return is_invocable(current_app.tasks.get(signature.get("task")))
    return all(is_durable(signature_of(member)) for member in _members(signature))


def _members(signature: Any) -> Iterable[Any]:
    kwargs = signature.get("kwargs") or {}
    if signature.get("subtask_type") == "chord":
        header = kwargs.get("header") or ()
        yield from [header] if hasattr(header, "get") else header
        yield kwargs["body"]
    else:
        yield from kwargs.get("tasks") or ()

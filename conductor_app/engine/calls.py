"""Which call an id belongs to.

For us an id names one execution. In Celery's canvas it does not: a chain object of Celery 5.7 keeps the id of its last
task, and a signature that was frozen keeps its own, so that all later calls bring the same one. Taken literally, all of
them but the first would be taken for repetitions, and their work be lost. So an id that a canvas brings names an
execution together with who calls: the task after which it is called. A message or an announcement that is repeated has
the same caller.

The first call gets the id itself. Another one gets an id that follows from both; Celery goes on to know it by the id
that was given (``celery_id``), where its result backend shows the latest, as for any task.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

from django.db import DatabaseError, transaction

from conductor_app import transitions
from conductor_app.models import Execution, database
from conductor_app.store.ids import derive_namesake_id, namesakes_range, of_task_id
from conductor_app.store.process import process
from conductor_app.values.payloads import dump_options, loads


class Caller(NamedTuple):
    """On whose behalf an execution is called."""

    #: The task after which it is called, or another name that no other call has.
    name: str
    #: When that task was created: what it calls cannot be older.
    since: dt.datetime | None = None


_caller: ContextVar[Caller | None] = ContextVar("conductor_app_caller", default=None)


@contextmanager
def on_behalf_of(name: object, since: dt.datetime | None = None) -> Iterator[None]:
    """Call what follows after something that has ended; done again, these are the same calls."""
    token = _caller.set(Caller(str(name), since))
    try:
        yield
    finally:
        _caller.reset(token)


def caller_of(options: Mapping[str, Any], task_id: object, current: Any) -> Caller | None:
    """Return on whose behalf ``apply_async`` is called with an id; ``None`` if the id is to be taken literally.

    Args:
        options: Those of ``apply_async``.
        task_id: The id.
        current: The Celery task that runs here, if one does.
    """
    if task_id is None:
        return None
    if (caller := _caller.get()) is not None:
        return caller
    if options.get("parent_id"):
        return Caller(str(options["parent_id"]))
    # Only `freeze()` adds an address for replies. A task that is replaced freezes what replaces it with its own id.
    is_frozen = "reply_to" in options and not (current is not None and current.request.id == str(task_id))
    return nobody() if is_frozen else None


def nobody() -> Caller:
    """Return the caller of a call that is never repeated."""
    return Caller(uuid.uuid4().hex)


def kept(caller: Caller | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an execution's options say of who called it."""
    return {} if caller is None or caller.name == options.get("parent_id") else {"caller": caller.name}


def create(new: transitions.NewExecution, caller: Caller | None) -> tuple[Execution, bool]:
    """Store a root as ``transitions.create`` does, under an id of its own if another call has the given one.

    Args:
        new: Its options hold what is ``kept`` of the caller.
        caller: ``None`` takes the id literally.
    """
    execution, created = transitions.create(new)
    if not (created or caller is None or execution.pk != new.id or _is_of(execution, new.task, caller)):
        options = dump_options({**(loads(new.options) or {}), "celery_id": str(new.id)})
        new = replace(new, id=_id_of_its_own(execution, new.task, caller), options=options)
        execution, created = transitions.create(new)
    if created and execution.replaced is not None:
        _end_soon(execution.replaced)
    return execution, created


def _end_soon(replaced: uuid.UUID) -> None:
    """End an execution that is replaced, and waits or is queued, after the commit; a sweeper would do that, too."""

    def end() -> None:
        process.keeper.note_cancel(replaced)
        with suppress(DatabaseError):
            transitions.cancel_flagged(replaced)

    # After it: an end locks children before their parent, and this transaction holds the parent's lock.
    transaction.on_commit(end, using=database(), robust=True)


def adopted_id(known: Execution, task: str, parent_id: str | None) -> uuid.UUID:
    """Return which execution a message of others is about, if one with its id is known."""
    caller = Caller(str(parent_id))
    if parent_id is None or _is_of(known, task, caller):
        return known.pk
    return _id_of_its_own(known, task, caller)


def named(task_id: object) -> list[uuid.UUID]:
    """Return the execution's id that Celery's id is, and those of the open ones that it is another name of."""
    execution_id = of_task_id(task_id)
    between = Execution.objects.using(database()).filter(pk__range=namesakes_range(execution_id), parent__isnull=True)
    namesakes = between.open().only("id", "options")
    return [execution_id, *(row.pk for row in namesakes if row.get_options().get("celery_id") == str(execution_id))]


def _is_of(execution: Execution, task: str, caller: Caller) -> bool:
    options = execution.get_options()
    known = {options["caller"]} if "caller" in options else {options.get("parent_id"), str(execution.parent_id)}
    is_too_old = caller.since is not None and execution.created_at < caller.since
    return execution.task == task and caller.name in known and not is_too_old


def _id_of_its_own(known: Execution, task: str, caller: Caller) -> uuid.UUID:
    """Return the id for a call that was given the id of a known execution of another call."""
    # A chord that was frozen and is called again has the same name for its body's caller.
    is_again = _is_of(known, task, Caller(caller.name))
    return derive_namesake_id(known.pk, f"{task} {caller.name}{f' {caller.since}' if is_again else ''}")

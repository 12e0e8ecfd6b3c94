"""The moves of a run as one statement each, where the database has statements that write several rows: PostgreSQL.

What belongs together is one transaction. Elsewhere that is ``BEGIN``, three to five statements and ``COMMIT``, each a
trip to the server and back; here it is one trip, and one statement is a transaction. Each does what the general form in
the module that calls it does, with the same guards and the same order of locks: a part that writes names the part
before it, so PostgreSQL runs them in this order. No row is written twice, so an execution that is handed off is claimed
by the write that makes it runnable.

Only runs are so frequent that it matters. What an operator, the sweeper or a failure does has its general form alone.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db import connections

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution, Step, database
from conductor_app.states import ExecutionStatus, OnTimeout, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.store.opened import is_transaction
from conductor_app.store.statements import fetch
from conductor_app.transitions import dispatch, steps

#: What a run needs to know of the execution that it claims, in the order of the model's fields (as ``from_db`` takes
#: them); steps are read separately, and only if there can be any.
CLAIM_FIELDS = (
    "id",
    "task",
    "queue",
    "priority",
    "payload",
    "status",
    "attempt",
    "max_attempts",
    "parent_id",
    "root_id",
    "depth",
    "step",
    "position",
    "fence",
    "lease_owner",
    "due_at",
    "options",
    "created_at",
    "started_at",
)
_EXECUTIONS = Execution._meta.db_table
_STEPS = Step._meta.db_table
#: Of a parent that is known here, only what a claim changes; and its payload travels only to a run.
_CHANGED = ("id", "status", "fence", "due_at")
_PARENT_COLUMNS = [
    name
    if name in _CHANGED
    else f"CASE WHEN is_claimed AND NOT was_known THEN {name} END"
    if name == "payload"
    else f"CASE WHEN NOT (is_claimed AND was_known) THEN {name} END"
    for name in CLAIM_FIELDS
]
#: The database's clock at the start of the statement, as in ``clock``.
_NOW = "(STATEMENT_TIMESTAMP() + %(shift)s::interval)"
_LEASE_END = "(STATEMENT_TIMESTAMP() + %(lease)s::interval)"
#: When the sweeper is to publish it; null adds nothing, and is nothing. LEAST() passes over what is null.
_DISPATCH_AT = "LEAST(STATEMENT_TIMESTAMP() + %(dispatch_in)s::interval, %(dispatch_by)s::timestamptz)"

# The indexes of what is to be dispatched and of leases would do as well, and hold an entry of each execution for each
# time that it was queued or claimed since the last vacuum: a claim reads 20 to 32 pages by them, and 4 by the primary
# key. The concatenation keeps the planner from them.

#: What only a run that holds the execution may change; as ``ExecutionQuerySet.held_by``.
_HELD = "id = %(id)s::uuid AND fence = %(fence)s AND lease_owner = %(holder)s AND status || '' = 'running'"


def _waits_unless(condition: str) -> str:
    # A setting of the transaction, which is this statement. What it writes is on the disk with the next commit that
    # waits, or a moment later; a crash of the database before that undoes it, and never what was written before it.
    return f"""
        set_config(
            'synchronous_commit', CASE WHEN {condition} THEN 'off' ELSE current_setting('synchronous_commit') END, TRUE
        )
    """


#: Whether who runs an execution may be forgotten once it has been seen: then its body begins once more than its
#: attempts say. Not the last attempt, nor what may be too late to begin again.
_MAY_BEGIN_AGAIN = "deadline_at IS NULL AND (max_attempts IS NULL OR attempt < max_attempts)"

#: Where ``steps.MEMORY_FIELDS`` come from, by their names.
_MEMORY_COLUMNS = {
    name: f"child.{name.removeprefix('child__')}" if name.startswith("child__") else f"{_STEPS}.{name}"
    for name in steps.MEMORY_FIELDS
}
_MEMORY_TEXTS = [name for name in steps.MEMORY_FIELDS if name.endswith(("result", "error"))]
#: A claim brings no more steps, and none with more bytes of results and errors: PostgreSQL takes no field of 1 GB. The
#: run reads them then.
_BROUGHT_STEPS, _BROUGHT_BYTES = 1_000, 16_384
_CLAIM = f"""
    WITH claimed AS (
    UPDATE {_EXECUTIONS} SET
        status = 'running', fence = fence + 1, lease_owner = %(owner)s, lease_expires_at = {_LEASE_END},
        started_at = COALESCE(started_at, {_NOW}), dispatch_at = NULL, dispatches = 0
    WHERE id = %(id)s::uuid AND task = COALESCE(%(task)s, task) AND status || '' = 'queued' AND due_at <= {_NOW}
        AND cancel_requested_at IS NULL
        AND (deadline_at IS NULL OR deadline_at > {_NOW} OR started_at IS NOT NULL)
    RETURNING {", ".join(CLAIM_FIELDS)}, {_waits_unless(f"%(is_alone)s::boolean AND {_MAY_BEGIN_AGAIN}")}
    )
    SELECT claimed.*, CASE WHEN claimed.fence > 1 THEN (
        SELECT CASE WHEN COUNT(*) <= {_BROUGHT_STEPS} AND COALESCE(BOOL_AND(is_short), TRUE) THEN COALESCE(
            json_agg(json_build_array({", ".join(_MEMORY_COLUMNS)}) ORDER BY step_id) FILTER (WHERE is_short), '[]'
        )::text END
        FROM (
            SELECT
                {_STEPS}.id AS step_id, {", ".join(f"{source} AS {name}" for name, source in _MEMORY_COLUMNS.items())},
                {" + ".join(f"COALESCE(OCTET_LENGTH({_MEMORY_COLUMNS[name]}), 0)" for name in _MEMORY_TEXTS)}
                    <= {_BROUGHT_BYTES} AS is_short
            FROM {_STEPS} LEFT JOIN {_EXECUTIONS} AS child ON child.id = {_STEPS}.child_id
            WHERE {_STEPS}.execution_id = claimed.id
            ORDER BY {_STEPS}.id
            LIMIT {_BROUGHT_STEPS + 1}
        ) AS remembered
    ) END
    FROM claimed
"""  # noqa: S608 - names of our own tables and columns, here and below

_RECORD_STEP = f"""
    WITH held AS (
        SELECT id, cancel_requested_at FROM {_EXECUTIONS} WHERE {_HELD} FOR NO KEY UPDATE
    ), step AS (
        INSERT INTO {_STEPS} (
            execution_id, name, kind, status, task, payload_digest, result, error, fails_fast, on_timeout,
            attempt, fence, created_at, finished_at
        )
        SELECT
            id, %(name)s, 'step', %(status)s, '', '', %(result)s::text, %(error)s::text, TRUE, 'cancel',
            %(attempt)s::integer, %(fence)s::bigint, {_NOW}, {_NOW}
        FROM held
    )
    SELECT cancel_requested_at IS NOT NULL FROM held
"""  # noqa: S608

_WAIT = f"""
        UPDATE {_EXECUTIONS} SET
            status = 'waiting', lease_owner = '', lease_expires_at = NULL, dispatch_at = NULL, dispatches = 0
        WHERE {_HELD} AND cancel_requested_at IS NULL
        RETURNING id
"""  # noqa: S608
_SUSPEND = f"""
    WITH parent AS (
        {_WAIT}
    ), child AS (
        INSERT INTO {_EXECUTIONS} (
            id, task, queue, priority, payload, status, attempt, max_attempts, parent_id, root_id, depth, step,
            fence, lease_owner, lease_expires_at, due_at, dispatch_at, dispatches, cancel_reason, idempotency_key,
            options, created_at, started_at
        )
        SELECT
            %(child)s::uuid, %(task)s, %(queue)s, %(priority)s::smallint, %(payload)s, %(status)s, 1,
            %(max_attempts)s::integer, id, %(root_id)s::uuid, %(depth)s::integer, %(step)s,
            %(is_claimed)s::integer, %(owner)s, {_LEASE_END}, {_NOW}, {_DISPATCH_AT}, 0, '', %(idempotency_key)s,
            %(options)s, {_NOW}, CASE WHEN %(is_claimed)s::integer = 1 THEN {_NOW} END
        FROM parent
        RETURNING created_at
    ), step AS (
        INSERT INTO {_STEPS} (
            execution_id, name, kind, status, task, payload_digest, child_id, fails_fast, timeout_seconds, on_timeout,
            deadline_at, attempt, fence, created_at
        )
        SELECT
            id, %(step)s, 'invoke', 'pending', %(task)s, %(payload_digest)s, %(child)s::uuid, TRUE,
            %(timeout)s::float, %(on_timeout)s, STATEMENT_TIMESTAMP() + %(deadline)s::interval, %(attempt)s::integer,
            %(fence)s::bigint, {_NOW}
        FROM parent
    )
    SELECT created_at, {_waits_unless("%(may_be_lost)s::boolean")} FROM child
"""  # noqa: S608

#: What differs between the children of a map: their columns, and the types of these.
_EACH_CHILD = {
    "id": "uuid",
    "task": "text",
    "queue": "text",
    "priority": "smallint",
    "payload": "text",
    "max_attempts": "integer",
    "options": "text",
}
_SUSPEND_ON_MAP = f"""
    WITH parent AS (
        {_WAIT}
    ), child AS (
        INSERT INTO {_EXECUTIONS} (
            {", ".join(_EACH_CHILD)}, status, attempt, parent_id, root_id, depth, step, position, fence, lease_owner,
            due_at, dispatch_at, dispatches, cancel_reason, created_at
        )
        SELECT
            {", ".join(f"each_{name}" for name in _EACH_CHILD)}, 'queued', 1, id, %(root_id)s::uuid,
            %(depth)s::integer, %(step)s, number - 1, 0, '', CASE WHEN number <= %(in_flight)s::bigint THEN {_NOW} END,
            CASE WHEN number <= %(in_flight)s::bigint
                THEN LEAST({_NOW} + dispatch_in * INTERVAL '1 second', %(dispatch_by)s::timestamptz)
            END,
            0, '', {_NOW}
        FROM parent, UNNEST(
            {", ".join(f"%(all_{name})s::{kind}[]" for name, kind in _EACH_CHILD.items())}, %(dispatch_in)s::float[]
        ) WITH ORDINALITY AS each_child ({", ".join(f"each_{name}" for name in _EACH_CHILD)}, dispatch_in, number)
    ), step AS (
        INSERT INTO {_STEPS} (
            execution_id, name, kind, status, task, payload_digest, total, remaining, max_parallel, fails_fast,
            timeout_seconds, on_timeout, deadline_at, attempt, fence, created_at
        )
        SELECT
            id, %(step)s, 'map', 'pending', %(step_task)s, %(payload_digest)s, %(total)s::integer, %(total)s::integer,
            %(max_parallel)s::integer, %(fails_fast)s::boolean, %(timeout)s::float, %(on_timeout)s,
            STATEMENT_TIMESTAMP() + %(deadline)s::interval, %(attempt)s::integer, %(fence)s::bigint, {_NOW}
        FROM parent
    )
    SELECT {_NOW} FROM parent
"""  # noqa: S608

#: What the end of a child does to its parent's step, by the kind of that.
_SETTLED = {
    StepKind.INVOKE: f"status = 'succeeded', error = NULL, finished_at = {_NOW}",
    StepKind.MAP: f"""
            status = CASE WHEN remaining <= 1 THEN 'succeeded' ELSE 'pending' END,
            finished_at = CASE WHEN remaining <= 1 THEN {_NOW} END,
            remaining = remaining - 1
    """,
}
_SUCCEED = f"""
    UPDATE {_EXECUTIONS} SET
        status = 'succeeded', result = %(result)s, error = NULL, lease_owner = '', lease_expires_at = NULL,
        finished_at = {_NOW}, announce_at = STATEMENT_TIMESTAMP() + %(announce)s::interval
    WHERE {_HELD} AND cancel_requested_at IS NULL
"""  # noqa: S608


def _succeed_child(kind: StepKind) -> str:
    # A step that is settled already stays as it is, and its parent, too. A step of another kind: nothing is written.
    #
    # The statement sees the rows as they were when it began, and may wait for the child's, the step's and the parent's
    # while somebody changes the next. Only a locked row says how that stands *now*; so the step and the parent are
    # found by their keys alone, locked, and judged then. (A step that an operator's retry is just reopening would be
    # passed over by ``WHERE status = 'pending'``, and the parent never woken.)
    #
    # A parent that is just suspending either commits first, and is found waiting, or comes after this, and finds its
    # step settled. It is written whatever it does: at REPEATABLE READ, a suspension that has not seen the settled step
    # has to fail and be run again.
    #
    # PostgreSQL checks constraints with the old row's values first, and again with those of the row that it then finds.
    # So whatever a waiting row says of itself is written, too, for a parent that waits only since this one waited.
    return f"""
    WITH child AS (
        {_SUCCEED} AND EXISTS (
            SELECT FROM {_STEPS} WHERE execution_id = %(parent)s::uuid AND name = %(step)s AND kind = '{kind.value}'
        )
        RETURNING id
    ), entry AS (
        SELECT {_STEPS}.id AS entry_id, status = 'pending' AS is_open
        FROM {_STEPS}, child
        WHERE execution_id = %(parent)s::uuid AND name = %(step)s
        FOR NO KEY UPDATE OF {_STEPS}
    ), step AS (
        UPDATE {_STEPS} SET {_SETTLED[kind]}
        FROM entry
        WHERE {_STEPS}.id = entry_id AND is_open
        RETURNING execution_id, status
    ), found AS (
        SELECT
            id AS found_id,
            status = 'waiting' AS was_waiting,
            status = 'waiting' AND cancel_requested_at IS NULL AND %(is_claimed)s::boolean AS is_claimed,
            fence = %(known)s::bigint AS was_known
        FROM {_EXECUTIONS}
        WHERE id = (SELECT execution_id FROM step WHERE status <> 'pending')
        FOR NO KEY UPDATE
    ), parent AS (
        UPDATE {_EXECUTIONS} SET
            status = CASE WHEN is_claimed THEN 'running' WHEN was_waiting THEN 'queued' ELSE status END,
            fence = fence + is_claimed::integer,
            lease_owner = CASE WHEN is_claimed THEN %(owner)s WHEN was_waiting THEN '' ELSE lease_owner END,
            lease_expires_at = CASE
                WHEN is_claimed THEN {_LEASE_END} WHEN was_waiting THEN NULL ELSE lease_expires_at
            END,
            finished_at = CASE WHEN was_waiting THEN NULL ELSE finished_at END,
            due_at = CASE WHEN was_waiting THEN {_NOW} ELSE due_at END,
            dispatch_at = CASE WHEN is_claimed THEN NULL WHEN was_waiting THEN {_DISPATCH_AT} ELSE dispatch_at END
        FROM found
        WHERE id = found_id
        RETURNING {", ".join(_PARENT_COLUMNS)}, is_claimed, was_known
    )
    SELECT parent.* FROM child LEFT JOIN parent ON TRUE
"""  # noqa: S608


_SUCCEED_CHILD = {kind: _succeed_child(kind) for kind in _SETTLED}


_ANNOUNCED = f"""
    UPDATE {_EXECUTIONS} SET announce_at = NULL
    WHERE id = %(id)s::uuid AND announce_at IS NOT NULL AND status || '' = %(status)s AND fence = %(fence)s
        AND (%(ended_at)s::timestamptz IS NULL OR finished_at <= %(ended_at)s)
    RETURNING {_waits_unless("%(is_alone)s::boolean")}
"""  # noqa: S608

#: What a message says, and what tells a first publication from another one.
DISPATCH_FIELDS = (*dispatch.DOORBELL_FIELDS, "dispatches", "due_at", "dispatch_at")
#: Them as they were before, and the payload, which a durable task's message does not have; by the columns that hold
#: them, in the order of the model's fields.
_SAID = {
    **{name: name for name in DISPATCH_FIELDS},
    "payload": """CASE WHEN options LIKE '%%"plain"%%' THEN payload ELSE '' END""",
    "dispatch_at": "was_dispatch_at",
    "dispatches": "was_dispatches",
}
_DISPATCHED = {
    field.attname: _SAID[field.attname] for field in Execution._meta.concrete_fields if field.attname in _SAID
}
_TAKE_FOR_DISPATCH = f"""
    WITH due AS (
        SELECT id AS due_id, dispatch_at AS was_dispatch_at, dispatches AS was_dispatches
        FROM {_EXECUTIONS}
        WHERE status = 'queued' AND dispatch_at <= {_NOW}
            AND (%(queues)s::text[] IS NULL OR queue = ANY(%(queues)s::text[]))
        ORDER BY dispatch_at
        LIMIT %(limit)s::integer
        FOR NO KEY UPDATE SKIP LOCKED
    ), taken AS (
        UPDATE {_EXECUTIONS} SET
            dispatch_at = {_NOW} + %(pause)s::interval * 2 ^ LEAST(dispatches, 5), dispatches = dispatches + 1
        FROM due
        WHERE id = due_id
        RETURNING {", ".join(_DISPATCHED.values())}
    )
    SELECT * FROM taken ORDER BY was_dispatch_at
"""  # noqa: S608


@dataclass(frozen=True)
class Ended:
    """What the end of a run means for its parent."""

    #: The parent, if it is to be published.
    queued: Execution | None = None
    #: The parent, if this process has claimed it.
    claimed: Execution | None = None


def are_at_hand() -> bool:
    """Tell whether the database has such statements, and commits each of them."""
    connection = connections[database()]
    return connection.vendor == "postgresql" and bool(connection.settings_dict["AUTOCOMMIT"])


def claim(execution_id: uuid.UUID, owner: str, task: str | None) -> Execution | None:
    """queued → running, as ``claiming.claim``."""
    rows = _fetch(_CLAIM, id=execution_id, task=task, owner=owner, lease=_lease(), is_alone=is_transaction(database()))
    if not rows:
        return None
    *columns, _, remembered = rows[0]
    execution = _execution(columns)
    execution.claimed_steps = None if remembered is None else json.loads(remembered)
    return execution


def record_step(
    execution: Execution, name: str, status: StepStatus, *, result: str | None, error: str | None
) -> bool | None:
    """Insert the outcome of a function, as ``running.record_step``.

    Returns:
        Whether the execution is to be cancelled; ``None`` if another run has it, and nothing is stored.
    """
    rows = _fetch(
        _RECORD_STEP,
        id=execution.pk,
        fence=execution.fence,
        holder=execution.lease_owner,
        attempt=execution.attempt,
        name=name,
        status=status.value,
        result=result,
        error=error,
    )
    return rows[0][0] if rows else None


def suspend(
    execution: Execution,
    child: Execution,
    owner: str | None,
    *,
    is_alone: bool,
    payload_digest: str,
    timeout: float | None,
    on_timeout: OnTimeout,
) -> bool:
    """running → waiting, with a child and the step that it will settle, as ``suspending.suspend``.

    Args:
        child: As it is to be stored, due at once. It gets its status and instants.
        owner: Who claims the child; ``None`` queues it.
        is_alone: Whether the transaction holds nothing that must not be lost.

    Returns:
        ``False`` if another run has the execution, or it is to be cancelled; nothing is stored.
    """
    is_claimed = owner is not None
    first = None if is_claimed else dispatch.first_publication(child.root_id)
    child.status = ExecutionStatus.RUNNING if is_claimed else ExecutionStatus.QUEUED
    child.fence = int(is_claimed)
    child.lease_owner = owner or ""
    rows = _fetch(
        _SUSPEND,
        child=child.pk,
        **{name: getattr(child, name) for name in _GIVEN},
        status=child.status.value,
        is_claimed=child.fence,
        owner=child.lease_owner,
        lease=_lease() if is_claimed else None,
        dispatch_in=None if first is None else clock.interval(first.seconds),
        dispatch_by=None if first is None else first.by,
        # Claimed here, this process notices the loss with its next statement; else nobody would, until the lease ends.
        may_be_lost=is_alone and is_claimed and execution.has_attempts_left and child.has_attempts_left,
        **_step_opened(execution, payload_digest, timeout, on_timeout),
    )
    if not rows:
        return False
    child.created_at = child.due_at = rows[0][0]
    child.started_at = child.created_at if is_claimed else None
    return True


def suspend_on_map(
    execution: Execution,
    children: Sequence[Execution],
    *,
    task: str,
    payload_digest: str,
    in_flight: int,
    max_parallel: int | None,
    fails_fast: bool,
    timeout: float | None,
    on_timeout: OnTimeout,
) -> bool:
    """running → waiting, with the children of a map and the step that they will settle, as ``suspending.suspend``.

    Args:
        children: As they are to be stored, at least one; due at once. They get their instants.
        task: What the step says that they run.
        in_flight: So many of them are queued, the others held back.

    Returns:
        ``False`` if another run has the execution, or it is to be cancelled; nothing is stored.
    """
    first = [dispatch.first_publication(execution.root_id, ahead) for ahead in range(len(children))]
    rows = _fetch(
        _SUSPEND_ON_MAP,
        root_id=execution.root_id,
        depth=execution.depth + 1,
        step=children[0].step,
        step_task=task,
        total=len(children),
        in_flight=in_flight,
        max_parallel=max_parallel,
        fails_fast=fails_fast,
        **_step_opened(execution, payload_digest, timeout, on_timeout),
        dispatch_in=[one.seconds for one in first],
        dispatch_by=first[0].by,
        **{f"all_{name}": [getattr(child, name) for child in children] for name in _EACH_CHILD},
    )
    if not rows:
        return False
    now = rows[0][0]
    for number, child in enumerate(children):
        child.created_at = now
        child.due_at = now if number < in_flight else None
    return True


#: What a child's row says from the beginning.
_GIVEN = (
    "task",
    "queue",
    "priority",
    "payload",
    "max_attempts",
    "root_id",
    "depth",
    "step",
    "idempotency_key",
    "options",
)


def _step_opened(
    execution: Execution, payload_digest: str, timeout: float | None, on_timeout: OnTimeout
) -> dict[str, Any]:
    """Return what a run that begins to wait says of itself and of the step that it opens."""
    return {
        "id": execution.pk,
        "fence": execution.fence,
        "holder": execution.lease_owner,
        "attempt": execution.attempt,
        "payload_digest": payload_digest,
        "timeout": timeout,
        "deadline": None if timeout is None else clock.interval(timeout),
        "on_timeout": on_timeout.value,
    }


def succeed(
    execution: Execution,
    result: str,
    owner: str | None,
    *,
    parent: Execution | None = None,
    announce_in: float | None,
) -> Ended | None:
    """running → succeeded; settles the parent's step, and wakes or claims the parent, as ``running.succeed``.

    Args:
        owner: Who claims the parent if it waits for this; ``None`` queues it.
        parent: As its last run in this process had it, if there was one.
        announce_in: Seconds until the sweeper tells Celery; ``None`` if there is nothing to tell.

    Returns:
        ``None`` if another run has the execution, it is to be cancelled, or its parent's step is of a kind that asks
        for more than this (a start); nothing is stored.
    """
    values: dict[str, Any] = {
        "id": execution.pk,
        "fence": execution.fence,
        "holder": execution.lease_owner,
        "result": result,
        "announce": None if announce_in is None else clock.interval(announce_in),
    }
    if execution.parent_id is None:
        return Ended() if _fetch(f"{_SUCCEED} RETURNING 1", **values) else None
    first = dispatch.first_publication(execution.root_id)
    rows = _fetch(
        _SUCCEED_CHILD[StepKind.INVOKE if execution.position is None else StepKind.MAP],
        **values,
        parent=execution.parent_id,
        step=execution.step,
        known=-1 if parent is None else parent.fence,
        is_claimed=owner is not None,
        owner=owner or "",
        lease=_lease(),
        dispatch_in=clock.interval(first.seconds),
        dispatch_by=first.by,
    )
    if not rows:
        return None
    *columns, is_claimed, was_known = rows[0]
    if is_claimed is None:
        return Ended()
    if is_claimed and was_known and parent is not None:
        # No other run had it since, so whatever else a run reads is as it was.
        changed = {name: columns[CLAIM_FIELDS.index(name)] for name in _CHANGED}
        found = parent.copied(**changed, lease_owner=owner or "")
    else:
        found = _execution(columns)
    if is_claimed:
        return Ended(claimed=found)
    # Queued by this write or already before it: a second ring of the bell is harmless.
    return Ended(queued=found if found.status == ExecutionStatus.QUEUED else None)


def announced(execution: Execution, status: ExecutionStatus, ended_at: dt.datetime | None, *, is_alone: bool) -> bool:
    """Note that Celery was told, as ``announcing.announced``."""
    end = {"id": execution.pk, "status": status, "fence": execution.fence, "ended_at": ended_at}
    return bool(_fetch(_ANNOUNCED, **end, is_alone=is_alone))


def take_for_dispatch(limit: int, queues: Sequence[str] | None, pause: float) -> list[Execution]:
    """queued → queued: note the next publication of what is to be published, as ``recovering.take_for_dispatch``.

    Args:
        pause: Seconds to the next publication after the first one.
    """
    rows = _fetch(
        _TAKE_FOR_DISPATCH,
        limit=limit,
        queues=None if queues is None else list(queues),
        pause=dt.timedelta(seconds=pause),
    )
    return [Execution.from_db(database(), tuple(_DISPATCHED), row) for row in rows]


def _lease() -> dt.timedelta:
    return clock.interval(conductor_settings().LEASE_SECONDS, skipping=False)


def _execution(row: Sequence[Any]) -> Execution:
    return Execution.from_db(database(), CLAIM_FIELDS, row)


def _fetch(sql: str, **values: Any) -> list[Sequence[Any]]:
    return fetch(database(), sql, {**values, "shift": clock.interval(0)})

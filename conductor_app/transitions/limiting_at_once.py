"""The moves of limits as one statement each, on PostgreSQL; ``limiting`` has them as scripts, and says what they mean.

One statement sees the rows as they were when it began, and may wait for a key that somebody is changing. So it decides
by what it sees, and then locks the keys **as it has seen them**: whoever changes who has a place of a key, or waits for
one, writes the key's row, and so its ``xmin``. With another one nothing is written, and the caller makes the script,
which looks behind the lock. So it does for what is rare: an execution that had a place before and is to be parked,
several places that are free at once, starts of a rate that are to be handed out.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import uuid
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from django.db.models import Q

from conductor_app.models import Attempt, Execution, LimitKey, PausedTask, Place, database
from conductor_app.states import OPEN_STATUSES
from conductor_app.store import clock
from conductor_app.store.moves import is_one_statement
from conductor_app.store.opened import is_transaction
from conductor_app.store.slots import NOW, given
from conductor_app.store.statements import fetch
from conductor_app.store.texts import Statement, Text
from conductor_app.transitions import claiming, dispatch, parts, steps
from conductor_app.values.limits import Limit

EXECUTIONS, PLACES, KEYS, ATTEMPTS, PAUSED = (
    model._meta.db_table for model in (Execution, Place, LimitKey, Attempt, PausedTask)
)
_OPEN = ", ".join(f"'{status.value}'" for status in sorted(OPEN_STATUSES))
#: Of an execution that is handed a place, what its message needs.
_TOLD_FIELDS = tuple(name for name in claiming.CLAIM_FIELDS if name != "payload")
#: So exactly is it kept when a key was used last: the column is in an index, which a write of another value updates.
_USED_EXACTLY = "INTERVAL '15 minutes'"
_NEVER = f"'{clock.NEVER.isoformat()}'::timestamptz"


class Claimed(NamedTuple):
    """What came of a claim; neither: it is to be made as a script."""

    execution: Execution | None
    #: The name of the limit of which there is no place.
    lacking: str | None


class Left(NamedTuple):
    """What came of handing on; not done: it is to be made as a script."""

    is_done: bool
    #: Keys of which there is more to hand out.
    more: list[tuple[str, str]]
    #: Who has been given a place.
    granted: list[Execution]


def is_possible(using: str) -> bool:
    """Tell whether a move of limits may be one statement now."""
    return is_one_statement(using) and is_transaction(using)


def claim(row: Execution, owner: str, wanted: Sequence[tuple[Limit, str]]) -> Claimed:
    """Claim an execution with a place of each limit, or park it."""
    using = database()
    told = {
        "id": row.pk,
        "task": row.task,
        "fence": row.fence,
        "attempt": row.attempt,
        "has_begun": row.started_at is not None,
        "since": row.due_at or row.created_at,
        "names": [limit.name for limit, _ in wanted],
        "keys": [key for _, key in wanted],
        "kinds": [limit.kind.value for limit, _ in wanted],
        "numbers": [limit.number for limit, _ in wanted],
        "seconds": [limit.seconds for limit, _ in wanted],
        "slacks": [limit.slack.total_seconds() for limit, _ in wanted],
        **parts.lease(owner),
    }
    ((lacking, brought, *columns),) = _make(using, _claim, told)
    if columns[0] is None:
        return Claimed(None, lacking)
    execution = claiming.started([columns])
    assert execution is not None
    if brought is not None:
        execution.claimed_steps = json.loads(brought)
    return Claimed(execution, None)


def leave(
    execution_id: uuid.UUID, *, run_only: bool, names: Collection[tuple[str, str]], horizon: dt.timedelta
) -> Left:
    """Give up the places that an execution has no use for any more, and hand one of each key to the next one.

    Args:
        horizon: How far ahead starts of a rate are handed out.
    """
    using = database()
    keys = sorted(names)
    first = dispatch.first_publication(None)
    told = {
        "id": execution_id,
        "run_only": run_only,
        "names": [limit for limit, _ in keys],
        "keys": [key for _, key in keys],
        "horizon": horizon,
        **parts.published(first),
    }
    (*rows,) = _make(using, _leave, told)
    is_done, more = rows[0][:2]
    granted = [Execution.from_db(using, _TOLD_FIELDS, row[2:-1]) for row in rows if row[2] is not None]
    return Left(is_done, [(limit, key) for limit, key in more or ()], granted)


def _make(using: str, text: Any, told: dict[str, Any]) -> list[Sequence[Any]]:
    shift = clock.interval(0)
    statement: Statement = text(using, bool(shift), dispatch.is_embedded())
    return fetch(using, statement.sql, {**told, **statement.constants, **({"shift": shift} if shift else {})})


def _now(is_shifted: bool) -> str:
    return "(STATEMENT_TIMESTAMP() + %(shift)s::interval)" if is_shifted else "STATEMENT_TIMESTAMP()"


def _counts(place: str, kind: str) -> str:
    """As ``limiting.holding``; ``of`` is the execution that has the place."""
    may_begin = f"of.held_at IS NULL AND NOT EXISTS(SELECT FROM {PAUSED} WHERE name = of.task)"
    return f"""(CASE
        WHEN {kind} = 'open' THEN of.status IN ({_OPEN}) AND ({place}.state <> 'granted' OR ({may_begin}))
        ELSE of.status = 'running' OR (of.status = 'queued' AND (({place}.state = 'granted' AND {may_begin}) OR EXISTS(
            SELECT FROM {ATTEMPTS} ended
            WHERE ended.execution_id = of.id AND ended.run = of.fence AND ended.outcome = 'lost')))
        END)"""


def _holders(limit: str, key: str, kind: str, but: str = "") -> str:
    return f"""(
        SELECT COUNT(*) FROM {PLACES} taken JOIN {EXECUTIONS} AS of ON of.id = taken.execution_id
        WHERE taken."limit" = {limit} AND taken.key = {key} AND taken.state IN ('granted', 'held') {but}
        AND {_counts("taken", kind)})"""  # noqa: S608 - names of our own tables


def _finished(text: Text, sql: str) -> Statement:
    # psycopg parses a text of more than 4,096 characters anew each time.
    return text.finished(" ".join(sql.split()))


@functools.cache
def _claim(using: str, is_shifted: bool, _is_embedded: bool) -> Statement:
    text = Text(using, is_shifted=is_shifted)
    now = _now(is_shifted)
    mine = Q(fence=given(Execution, "fence")) & claiming.CLAIMABLE & Q(due_at__lte=NOW)
    parking = {"due_at": clock.Never(), "dispatch_at": clock.Never(), "dispatches": 0}
    others = "AND taken.execution_id <> %(id)s::uuid"
    number = "(SELECT COUNT(*) FROM locked) = (SELECT COUNT(*) FROM wanted)"
    is_let = "(SELECT BOOL_AND(is_free) FROM stood)"
    return _finished(
        text,
        f"""
        WITH wanted AS (
            SELECT * FROM UNNEST(%(names)s::text[], %(keys)s::text[], %(kinds)s::text[], %(numbers)s::integer[],
                %(seconds)s::float8[], %(slacks)s::float8[])
            WITH ORDINALITY AS wanted (name, key, kind, number, seconds, slack, place)
        ), stood AS (
            SELECT wanted.*, known.xmin::text AS version,
            wanted.kind = 'rate' AND NOT COALESCE(own.attempt = %(attempt)s AND own.state = 'held', FALSE) AS is_start,
            CASE
            WHEN wanted.kind = 'rate' THEN
                COALESCE(own.attempt = %(attempt)s AND own.state = 'held', FALSE)
                OR COALESCE(known.paid_until - MAKE_INTERVAL(secs => wanted.seconds * (wanted.number - 1)
                    + CASE WHEN own.attempt = %(attempt)s AND own.state = 'granted' THEN wanted.slack ELSE 0 END)
                    <= {now}, TRUE)
                AND (COALESCE(own.attempt = %(attempt)s AND own.state = 'granted', FALSE) OR NOT EXISTS(
                    SELECT FROM {PLACES} taken WHERE taken."limit" = wanted.name AND taken.key = wanted.key
                    AND taken.state IN ('parked', 'granted') {others}))
            ELSE (wanted.kind = 'open' AND %(has_begun)s::boolean AND COALESCE(own.state = 'held', FALSE))
                OR {_holders("wanted.name", "wanted.key", "wanted.kind", others)} < wanted.number
            END AS is_free
            FROM wanted LEFT JOIN {KEYS} AS known ON known."limit" = wanted.name AND known.key = wanted.key
            LEFT JOIN {PLACES} AS own ON own.execution_id = %(id)s::uuid AND own."limit" = wanted.name
        ), lacking AS (
            SELECT * FROM stood WHERE NOT is_free ORDER BY place LIMIT 1
        ), locked AS (
            INSERT INTO {KEYS} ("limit", key, kind, number, seconds, paid_until, used_at)
            SELECT name, key, kind, number, seconds,
                CASE WHEN is_start AND {is_let} THEN {now} + MAKE_INTERVAL(secs => seconds) END, {now}
            FROM stood ORDER BY place
            ON CONFLICT ("limit", key) DO UPDATE SET kind = EXCLUDED.kind, number = EXCLUDED.number,
                seconds = EXCLUDED.seconds,
                paid_until = CASE WHEN EXCLUDED.paid_until IS NULL THEN {KEYS}.paid_until
                    ELSE GREATEST({KEYS}.paid_until + MAKE_INTERVAL(secs => EXCLUDED.seconds), EXCLUDED.paid_until) END,
                used_at = CASE WHEN {KEYS}.used_at < EXCLUDED.used_at - {_USED_EXACTLY} THEN EXCLUDED.used_at
                    ELSE {KEYS}.used_at END
            WHERE {KEYS}.xmin::text = (
                SELECT version FROM stood WHERE stood.name = {KEYS}."limit" AND stood.key = {KEYS}.key)
            RETURNING 1
        ), claimed AS (
            UPDATE {EXECUTIONS} SET {text.assigned(Execution, parts.CLAIMED)}
            WHERE {text.condition(Execution, mine)} AND {number} AND {is_let}
            RETURNING {text.columns(Execution, claiming.CLAIM_FIELDS)}
        ), placed AS (
            INSERT INTO {PLACES} (execution_id, "limit", key, kind, state, attempt, since)
            SELECT claimed.id, name, key, kind, 'held', claimed.attempt, %(since)s::timestamptz FROM claimed, wanted
            ON CONFLICT (execution_id, "limit") DO UPDATE SET key = EXCLUDED.key, kind = EXCLUDED.kind,
                state = EXCLUDED.state, attempt = EXCLUDED.attempt, since = EXCLUDED.since
        ), parked AS (
            UPDATE {EXECUTIONS} SET {text.assigned(Execution, parking)}
            WHERE {text.condition(Execution, mine)} AND {number} AND (SELECT kind FROM lacking) <> 'rate'
                AND NOT EXISTS(SELECT FROM {PLACES} WHERE execution_id = %(id)s::uuid)
            RETURNING id
        ), waiting AS (
            INSERT INTO {PLACES} (execution_id, "limit", key, kind, state, attempt, since)
            SELECT parked.id, name, key, kind, 'parked', %(attempt)s, %(since)s::timestamptz FROM parked, lacking
            RETURNING "limit"
        )
        SELECT (SELECT "limit" FROM waiting), ({steps.brought("claimed")}), claimed.*
        FROM (SELECT 1) AS one LEFT JOIN claimed ON TRUE
    """,  # noqa: S608 - names of our own tables and columns
    )


@functools.cache
def _leave(using: str, is_shifted: bool, is_embedded: bool) -> Statement:
    text = Text(using, is_shifted=is_shifted)
    now = _now(is_shifted)
    told = ", ".join(f"{EXECUTIONS}.{text.quote(name)}" for name in text.names(_TOLD_FIELDS))
    waits = f"""
        FROM {PLACES} waiting JOIN {EXECUTIONS} AS next ON next.id = waiting.execution_id
        WHERE waiting."limit" = locked."limit" AND waiting.key = locked.key AND waiting.state = 'parked'
        AND next.status = 'queued' AND next.due_at = {_NEVER} AND next.held_at IS NULL
        AND next.cancel_requested_at IS NULL AND NOT EXISTS(SELECT FROM {PAUSED} WHERE name = next.task)"""
    holders = _holders('locked."limit"', "locked.key", "locked.kind")
    published = text.assigned(Execution, {"dispatch_at": parts.dispatch_at("dispatch_in"), "dispatches": 0})
    if is_embedded:
        # The feed serves those first that have waited for longest.
        published = "dispatch_at = picked.since, dispatches = 0"
    return _finished(
        text,
        f"""
        WITH wanted AS (
            SELECT * FROM UNNEST(%(names)s::text[], %(keys)s::text[]) WITH ORDINALITY AS wanted (name, key, place)
        ), seen AS (
            SELECT known.id, known.xmin::text AS version, wanted.place
            FROM wanted JOIN {KEYS} AS known ON known."limit" = wanted.name AND known.key = wanted.key
        ), locked AS (
            SELECT known.* FROM seen JOIN {KEYS} AS known ON known.id = seen.id AND known.xmin::text = seen.version
            ORDER BY seen.place FOR NO KEY UPDATE OF known
        ), written AS (
            UPDATE {KEYS} SET number = {KEYS}.number FROM locked
            WHERE {KEYS}.id = locked.id AND (SELECT COUNT(*) FROM locked) = (SELECT COUNT(*) FROM wanted)
            RETURNING {KEYS}.id
        ), gone AS (
            DELETE FROM {PLACES} own USING {EXECUTIONS} AS of
            WHERE own.execution_id = %(id)s::uuid AND of.id = own.execution_id
            AND (NOT %(run_only)s::boolean OR own.kind = 'run') AND EXISTS(SELECT FROM written)
            AND NOT (own.state = 'parked' AND of.status = 'queued')
            AND NOT {_counts("own", "CASE WHEN own.kind = 'run' THEN 'run' ELSE 'open' END")}
        ), stood AS (
            SELECT locked.*, CASE WHEN locked.kind = 'rate' THEN 0 ELSE locked.number - {holders} END AS free
            FROM locked JOIN written ON written.id = locked.id
        ), picked AS (
            SELECT one.* FROM stood AS locked CROSS JOIN LATERAL (
                SELECT waiting.id AS place_id, waiting.since, next.id {waits}
                ORDER BY waiting.since LIMIT 1 FOR NO KEY UPDATE OF next SKIP LOCKED
            ) AS one WHERE locked.free > 0
        ), granted AS (
            UPDATE {EXECUTIONS} SET due_at = picked.since, {published} FROM picked WHERE {EXECUTIONS}.id = picked.id
            RETURNING {told}, picked.place_id
        ), placed AS (
            UPDATE {PLACES} SET state = 'granted', attempt = granted.attempt FROM granted
            WHERE {PLACES}.id = granted.place_id
        )
        SELECT EXISTS(SELECT FROM written), (
            SELECT ARRAY_AGG(ARRAY[locked."limit"::text, locked.key::text]) FROM stood AS locked WHERE CASE
            WHEN locked.kind <> 'rate' THEN locked.free > 1 AND EXISTS(
                SELECT {waits} ORDER BY waiting.since OFFSET 1)
            ELSE GREATEST(locked.paid_until, {now}) + MAKE_INTERVAL(secs => locked.seconds * (
                    (SELECT COUNT(*) FROM {PLACES} taken WHERE taken."limit" = locked."limit"
                        AND taken.key = locked.key AND taken.state = 'granted') - locked.number + 1))
                <= {now} + %(horizon)s::interval / 2 AND EXISTS(SELECT {waits})
            END
        ), granted.* FROM (SELECT 1) AS one LEFT JOIN granted ON TRUE
    """,  # noqa: S608 - names of our own tables and columns
    )

"""What happened to every execution and to Celery's results, written down by the database itself."""

import datetime as dt
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from django.db import connection
from django_celery_results.models import TaskResult

from conductor_app.models import Execution

MOVES = "test_history_moves"
STATES = "test_history_states"


@dataclass(frozen=True)
class Move:
    """One write that changed an execution's status, fence or attempt; the old values of a new row are its own."""

    execution_id: uuid.UUID
    old_status: str
    status: str
    old_fence: int
    fence: int
    old_attempt: int
    attempt: int
    #: 1 if a lease is held before and after, and by the same process.
    keeps_owner: int


@contextmanager
def recording() -> Iterator[None]:
    """Let the database record all moves and states; needs a test that commits."""
    _drop()
    with connection.cursor() as cursor:
        for statement in _statements():
            cursor.execute(statement)
    try:
        yield
    finally:
        _drop()


def is_recording() -> bool:
    return MOVES in connection.introspection.table_names()


def forget() -> None:
    """Begin anew, if the database is recording."""
    if is_recording():
        with connection.cursor() as cursor:
            for table in (MOVES, STATES):
                cursor.execute(f"DELETE FROM {table}")


def moves() -> dict[uuid.UUID, list[Move]]:
    """All moves so far, by execution, in the order in which they were committed."""
    columns = ", ".join(Move.__dataclass_fields__)
    by_execution: dict[uuid.UUID, list[Move]] = {}
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {columns} FROM {MOVES} ORDER BY id")
        for execution_id, *values in cursor.fetchall():
            move = Move(uuid.UUID(str(execution_id)), *values)
            by_execution.setdefault(move.execution_id, []).append(move)
    return by_execution


def left_running(*, for_another_attempt: bool = False) -> dict[tuple[uuid.UUID, int], float]:
    """When each run, named by its execution and fence, has ended or was taken for dead.

    Args:
        for_another_attempt: Only those that another attempt follows.

    Returns:
        Seconds since 1970, at the beginning of the transaction.
    """
    condition = "AND status = 'queued' AND attempt > old_attempt" if for_another_attempt else "AND status <> 'running'"
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT execution_id, old_fence, recorded_at FROM {MOVES} WHERE old_status = 'running' {condition}"
        )
        return {
            (uuid.UUID(str(execution_id)), fence): recorded_at.replace(tzinfo=dt.UTC).timestamp()
            for execution_id, fence, recorded_at in cursor.fetchall()
        }


def celery_states() -> dict[str, list[str]]:
    """All states that were written to the result backend so far, by task id; repetitions are left out."""
    by_task: dict[str, list[str]] = {}
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT task_id, status FROM {STATES} ORDER BY id")
        for task_id, status in cursor.fetchall():
            states = by_task.setdefault(task_id, [])
            if states[-1:] != [status]:
                states.append(status)
    return by_task


def _drop() -> None:
    with connection.cursor() as cursor:
        for trigger, _event, table in _triggers():
            on_table = f" ON {table}" if connection.vendor == "postgresql" else ""
            cursor.execute(f"DROP TRIGGER IF EXISTS {trigger}{on_table}")
        for table in (MOVES, STATES):
            cursor.execute(f"DROP TABLE IF EXISTS {table}")


def _triggers() -> list[tuple[str, str, str]]:
    return [
        (f"{name}_{event.lower()}", event, model._meta.db_table)
        for name, model in ((MOVES, Execution), (STATES, TaskResult))
        for event in ("INSERT", "UPDATE")
    ]


def _statements() -> list[str]:
    key = {"postgresql": "bigserial", "mysql": "bigint AUTO_INCREMENT", "sqlite": "integer"}[connection.vendor]
    uuid_type = Execution._meta.pk.db_type(connection)
    statements = [
        f"CREATE TABLE {MOVES} (id {key} PRIMARY KEY, execution_id {uuid_type}, old_status varchar(16), "
        "status varchar(16), old_fence bigint, fence bigint, old_attempt bigint, attempt bigint, keeps_owner int, "
        "recorded_at timestamp DEFAULT CURRENT_TIMESTAMP)",
        f"CREATE TABLE {STATES} (id {key} PRIMARY KEY, task_id varchar(255), status varchar(50))",
    ]
    for trigger, event, table in _triggers():
        condition = ""
        if table == TaskResult._meta.db_table:
            record = f"INSERT INTO {STATES} (task_id, status) VALUES (NEW.task_id, NEW.status);"
        else:
            old = "NEW" if event == "INSERT" else "OLD"
            if event == "UPDATE":
                condition = "OLD.status <> NEW.status OR OLD.fence <> NEW.fence OR OLD.attempt <> NEW.attempt"
            record = (
                f"INSERT INTO {MOVES} ({', '.join(Move.__dataclass_fields__)}) VALUES (NEW.id, {old}.status, "
                f"NEW.status, {old}.fence, NEW.fence, {old}.attempt, NEW.attempt, "
                f"CASE WHEN {old}.lease_owner <> '' AND {old}.lease_owner = NEW.lease_owner THEN 1 ELSE 0 END);"
            )
        statements += _create_trigger(trigger, event, table, condition, record)
    return statements


def _create_trigger(trigger: str, event: str, table: str, condition: str, record: str) -> list[str]:
    when = f"WHEN ({condition}) " if condition else ""
    create = f"CREATE TRIGGER {trigger} AFTER {event} ON {table} FOR EACH ROW"
    if connection.vendor == "postgresql":
        return [
            f"CREATE OR REPLACE FUNCTION {trigger}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {record} RETURN NULL; END $$",
            f"{create} {when}EXECUTE FUNCTION {trigger}()",
        ]
    if connection.vendor == "mysql":
        return [f"{create} BEGIN {f'IF {condition} THEN {record} END IF;' if condition else record} END"]
    return [f"{create} {when}BEGIN {record} END"]

"""What Celery's result backend says of an execution is what its row says."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from celery import states
from celery.exceptions import NotRegistered, TaskRevokedError
from celery.result import AsyncResult
from django.db import OperationalError, connection, transaction

from conductor_app import DuplicateExecution, ExecutionContext, api
from conductor_app.engine import announcements, outcomes, sweeper
from conductor_app.host.news import Revocation
from conductor_app.host.revocations import Revoker
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.locks import RowsLocked
from project.celery import app
from tests.app import plain, scenarios
from tests.support.bodies import durable, go_on, reload
from tests.support.results import using

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def result_backend() -> Iterator[None]:
    with using("django-db"):
        yield
    clock.reset()


def ended(task: Any, **payload: Any) -> Any:
    """An execution that has ended and of which Celery was told."""
    result = task.delay(**payload)
    go_on()
    sweeper.sweep(publish=False)
    assert reload(result).announce_at is None
    return result


@pytest.mark.parametrize(
    ("task", "payload", "status", "state"),
    [(scenarios.echo, {"value": 7}, "succeeded", states.SUCCESS), (scenarios.boom, {}, "failed", states.FAILURE)],
)
def test_a_revoke_that_comes_too_late_changes_no_result(task: Any, payload: Any, status: str, state: str) -> None:
    result = ended(task, **payload)
    told = AsyncResult(result.id).result
    app.backend.mark_as_revoked(result.id, reason="revoked", store_result=True)  # as Celery 5.6 does
    Revoker().cancel(Revocation(result.id))
    assert (reload(result).status, AsyncResult(result.id).state) == (status, state)
    assert repr(AsyncResult(result.id).result) == repr(told)


def test_a_revoke_in_time_is_a_cancel_and_celery_is_told_of_that() -> None:
    result = scenarios.echo.delay(value=7)
    Revoker().cancel(Revocation(result.id))
    sweeper.sweep(publish=False)
    assert reload(result).status == "cancelled"
    assert isinstance(AsyncResult(result.id).result, TaskRevokedError)


def test_a_result_backend_that_fails_does_not_keep_others_from_being_cancelled(monkeypatch: Any) -> None:
    result = ended(scenarios.echo, value=7)

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise ConnectionRefusedError("the result backend is away")

    monkeypatch.setattr(app.backend, "mark_as_done", refuse)
    Revoker().cancel(Revocation(result.id))


def test_a_result_that_is_gone_is_a_failure_to_celery() -> None:
    result = scenarios.echo.delay(value=7)
    go_on()
    Execution.objects.filter(pk=result.id).update(result=None, announce_at=reload(result).created_at)
    sweeper.sweep(publish=False)
    assert AsyncResult(result.id).state == states.FAILURE
    assert "has succeeded, and its result is gone" in str(AsyncResult(result.id).result)


def test_a_failure_that_celery_has_stored_too_early_does_not_outlive_the_end() -> None:
    result = scenarios.echo.delay(value=7)
    app.backend.mark_as_failure(result.id, NotRegistered(scenarios.echo.name))
    go_on()
    sweeper.sweep(publish=False)
    assert (AsyncResult(result.id).state, AsyncResult(result.id).result) == (states.SUCCESS, 7)


@pytest.mark.parametrize(
    ("task", "payload", "state"), [(scenarios.echo, {"value": 7}, states.SUCCESS), (scenarios.boom, {}, states.FAILURE)]
)
def test_a_callback_whose_queue_is_missing_keeps_nobody_from_the_result(
    task: Any, payload: Any, state: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(app.amqp.queues, "create_missing", False)
    monkeypatch.setattr(app.amqp, "router", app.amqp.Router(create_missing=False))
    lost = plain.echo.s().set(queue="announcements-typo", task_id=str(uuid.uuid4()))
    result = task.apply_async(kwargs=payload, link=lost, link_error=lost.clone())
    go_on()
    sweeper.sweep(publish=False)
    assert reload(result).announce_at is None
    assert AsyncResult(result.id).state == state
    if state == states.SUCCESS:
        assert AsyncResult(lost.options["task_id"]).state == states.FAILURE


class Refusal(Exception):
    """A driver's error."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("sqlstate", "times"), [("40001", 2), ("23505", 1)], ids=["serialization", "unique"])
def test_a_state_that_the_database_refuses_costs_no_attempt(
    monkeypatch: pytest.MonkeyPatch, sqlstate: str, times: int
) -> None:
    """At SERIALIZABLE on the role, what breaks is the transaction in which the state is written."""
    shown = []
    store = app.backend.store_result

    def refuse_first(task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        if state == "SUSPENDED":
            shown.append(task_id)
            if len(shown) == 1:
                with transaction.mark_for_rollback_on_error(using="default"):
                    raise OperationalError("refused") from Refusal(sqlstate)
        return store(task_id, result, state, *args, **kwargs)

    monkeypatch.setattr(app.backend, "store_result", refuse_first)

    @durable(ignore_result=False, max_retries=0)
    def waits(ctx: ExecutionContext) -> str:
        return ctx.wait_for("approval", "approved")

    result = waits.delay()
    go_on()
    assert reload(result).status == "waiting"
    assert len(shown) == times
    api.send_event(result.id, "approved", "yes")
    go_on()
    assert (reload(result).attempt, reload(result).get_result()) == (1, "yes")


@pytest.mark.parametrize(
    ("error", "rests"),
    [
        (OperationalError("server closed the connection"), False),
        (DuplicateExecution("its key is taken"), False),
        (RowsLocked("somebody changes it"), False),
        (ConnectionRefusedError("it is away"), True),
    ],
    ids=["of the executions' database", "of a task that may not be called now", "of a locked row", "of another server"],
)
def test_only_what_another_server_takes_long_to_refuse_lets_announcements_rest(
    monkeypatch: pytest.MonkeyPatch, error: Exception, rests: bool
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(announcements, "SLOW_SECONDS", 0)
    monkeypatch.setattr(app.backend, "store_result", refuse)
    execution = reload(scenarios.echo.delay(value=7))
    with suppress(OperationalError):  # which whoever began the transaction gets
        announcements.show(execution, "SUSPENDED")
    assert announcements.is_resting() is rests


# What is told late


@pytest.fixture(params=["django-db", "cache+memory://"], ids=["in the same database", "elsewhere"])
def any_backend(request: Any) -> Iterator[None]:
    with using(request.param):
        yield


@durable(ignore_result=False, max_retries=0)
def ends_as_told(ctx: ExecutionContext, end: str) -> str:
    if end == "failed" and Execution.objects.get(pk=ctx.execution_id).fence == 1:
        raise ValueError(end)
    if end == "cancelled":
        ctx.wait_for("approval", "approved")
    if end == "cancelled with a result":
        api.cancel(ctx.execution_id)
    return "done"


@pytest.mark.usefixtures("any_backend")
@pytest.mark.parametrize("teller", ["run", "sweeper"])
@pytest.mark.parametrize("end", ["cancelled", "cancelled with a result", "failed"])
def test_whoever_tells_celery_late_does_not_tell_of_the_next_end(
    end: str, teller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run or a sweeper that is slow to tell Celery of an end, while an operator retries it, and it ends again."""
    tell = announcements.tell
    monkeypatch.setattr(announcements, "tell", lambda *_args: None)
    result = ends_as_told.apply_async(kwargs={"end": end}, link=scenarios.echo.s())
    go_on()
    if end == "cancelled":
        api.cancel(result)
    late = reload(result)
    outcome = outcomes.outcome_of(late)
    assert late.announce_at is not None
    if teller == "run":  # it knows of the end what it has brought about
        late.status, late.finished_at = "running", None
    api.retry(result)
    if end == "cancelled":
        tell(late, outcome)
        assert AsyncResult(result.id).state == states.PENDING
        api.send_event(result.id, "approved", None)
    go_on()
    tell(late, outcome)
    row = reload(result)
    assert (row.status, row.get_result()) == ("succeeded", "done")
    assert row.announce_at is not None, "of which nobody has told"
    tell(row, outcomes.outcome_of(row))
    assert reload(result).announce_at is None
    tell(late, outcome)
    assert (AsyncResult(result.id).state, AsyncResult(result.id).result) == (states.SUCCESS, "done")
    assert Execution.objects.filter(task=scenarios.echo.name).count() == 1


@pytest.mark.usefixtures("any_backend")
@pytest.mark.parametrize("fraction", [".000", ".001", ".500", ".999"])
def test_an_end_is_told_once_whatever_its_instant(fraction: str) -> None:
    """On SQLite an instant is a text, and the database writes other ones than Django does."""
    result = ends_as_told.delay(end="cancelled")
    api.cancel(result)
    with connection.cursor() as cursor:
        table = connection.ops.quote_name(Execution._meta.db_table)
        cursor.execute(f"UPDATE {table} SET finished_at = %s", [f"2026-06-01 00:00:00{fraction}"])
    announcements.deliver(reload(result))
    assert reload(result).announce_at is None


@pytest.mark.usefixtures("any_backend")
def test_of_two_cancels_in_a_row_the_second_is_told_of_too() -> None:
    result = ends_as_told.delay(end="cancelled")
    api.cancel(result, reason="first")
    late = reload(result)
    clock.shift(dt.timedelta(seconds=1))
    api.retry(result)
    api.cancel(result, reason="second")
    announcements.deliver(late)
    assert reload(result).announce_at is not None
    sweeper.sweep(publish=False)
    assert "second" in str(AsyncResult(result.id).result)


@durable
def notes_failure(ctx: ExecutionContext, task_id: str) -> str:
    return task_id


@pytest.mark.usefixtures("any_backend")
def test_an_error_callback_is_called_once_for_each_end(monkeypatch: pytest.MonkeyPatch) -> None:
    @durable(ignore_result=False, max_retries=0)
    def fails(ctx: ExecutionContext) -> None:
        raise ValueError("card declined")

    tell, told = announcements.tell, []

    def tell_twice(execution: Execution, *args: Any) -> None:
        tell(execution, *args)
        if execution.task != fails.name:
            return
        told.append(execution.pk)
        Execution.objects.filter(pk=execution.pk).update(announce_at=execution.created_at)
        tell(reload(execution), outcomes.outcome_of(reload(execution)))

    monkeypatch.setattr(announcements, "tell", tell_twice)
    result = fails.apply_async(link_error=notes_failure.s())
    called = Execution.objects.filter(task=notes_failure.name)
    for ends in (1, 2):
        go_on()
        assert (len(told), called.count()) == (ends, ends)
        if ends == 1:
            api.retry(result)
    assert {execution.get_result() for execution in called} == {str(result.id)}

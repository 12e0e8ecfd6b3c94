"""How a run ends when its body, or what stands around it, does what nobody expects."""

from __future__ import annotations

from typing import Any

import pytest
from celery.app.trace import build_tracer
from celery.signals import task_postrun
from django.db import DatabaseError, IntegrityError, OperationalError, connection, transaction

from conductor_app import ExecutionContext, transitions
from conductor_app.engine import claims
from conductor_app.engine.run import RunEnded
from conductor_app.exceptions import InvokeInsideTransaction, StepFailed, UncleanConnection
from conductor_app.host import durable_runs
from conductor_app.models import Execution
from conductor_app.store.process import process
from conductor_app.testing import run as run_alone
from conductor_app.transitions.dispatch import DOORBELL, HEADER
from project.celery import app
from tests.app import endings
from tests.app.ledger import count, note
from tests.support.bodies import class_name, durable, failure, reload, run
from tests.support.process import PoolGate

pytestmark = pytest.mark.django_db


def delivered(task: Any, result: Any, **request: Any) -> Any:
    """Deliver a message as a worker does, with the guard in place."""
    guarded = durable_runs.guard(app.tasks[task.name], build_tracer(task.name, task, app=app))
    fields = {"id": result.id, "task": task.name, "hostname": "here", "delivery_info": {}, HEADER: DOORBELL, **request}
    return guarded(result.id, [], {}, fields)


# What a body leaves behind


@pytest.mark.parametrize("kind", ["block", "blocks"])
def test_what_a_body_leaves_inside_of_a_test_is_undone_and_the_test_goes_on(kind: str) -> None:
    depth = len(connection.atomic_blocks)
    execution = run(endings.leaves, kind=kind)
    assert failure(execution).error_class == class_name(UncleanConnection)
    assert len(connection.atomic_blocks) == depth
    assert (count("lost"), count("body", execution.pk)) == (0, 2)


def test_the_kit_finds_what_a_body_leaves() -> None:
    @durable
    def forgets(ctx: ExecutionContext) -> None:
        transaction.atomic().__enter__()

    with pytest.raises(UncleanConnection, match=r'an open transaction\.atomic\(\) block on the connection "default"'):
        run_alone(forgets)


@pytest.mark.parametrize("call", ["step", "atomic_step"])
def test_a_step_whose_function_leaves_a_block_is_not_remembered(call: str) -> None:
    execution = run(endings.calls_inside, kind="block", call=call)
    assert failure(execution).error_class == class_name(InvokeInsideTransaction)
    assert f'The function of ctx.{call}("leaves") left an open transaction.atomic() block' in failure(execution).message
    assert not execution.steps.exists()
    assert count("lost") == 0


def test_what_ran_before_a_delivery_is_rolled_back_before_the_claim(caplog: pytest.LogCaptureFixture) -> None:
    result = endings.call_checks.apply_async(kwargs={"value": 1}, headers={"tenant": "a"})
    transaction.atomic().__enter__()
    note(None, "lost")
    delivered(endings.call_checks, result)
    assert reload(result).status == "succeeded"
    assert count("lost") == 0
    assert "has left an open transaction.atomic() block" in caplog.text


@pytest.mark.parametrize("task", [endings.call_in_block, endings.before_start_in_block], ids=["call", "before_start"])
def test_a_body_does_not_begin_inside_of_a_transaction_of_its_base_class(task: Any) -> None:
    depth = len(connection.atomic_blocks)
    result = task.delay()
    delivered(task, result)
    assert len(connection.atomic_blocks) == depth
    assert failure(reload(result)).error_class == class_name(InvokeInsideTransaction)
    assert (count("body", result.id), count("lost")) == (0, 0)


# What is raised


def test_a_base_exception_is_retried_where_an_exception_would_be() -> None:
    @durable(max_retries=2, retry_backoff=False, default_retry_delay=0)
    def panics(ctx: ExecutionContext) -> int:
        if ctx.attempt < 3:
            raise endings.Panic("out of range")
        return ctx.attempt

    assert run(panics).get_result() == 3

    @durable(max_retries=2, dont_autoretry_for=(endings.Panic,))
    def named(ctx: ExecutionContext) -> None:
        raise endings.Panic("out of range")

    assert run(named).attempt == 1

    @durable(max_retries=2, autoretry_for=(KeyError,))
    def others(ctx: ExecutionContext) -> None:
        raise endings.Panic("out of range")

    assert run(others).attempt == 1


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
def test_a_worker_that_shuts_down_gives_a_body_back_that_it_ends(ending: type[BaseException]) -> None:
    @durable(max_retries=0)
    def ends(ctx: ExecutionContext) -> None:
        process.worker.is_draining = lambda: True
        raise ending

    result = ends.delay()
    with pytest.raises(ending):
        delivered(ends, result)
    assert (reload(result).status, reload(result).attempt, reload(result).lease_owner) == ("queued", 1, "")


def test_what_becomes_of_a_killed_process_is_the_main_processs_to_say() -> None:
    """A revoke, or the hard time limit."""
    process.is_told_to_end = lambda: True

    @durable
    def ends(ctx: ExecutionContext) -> None:
        raise SystemExit

    result = ends.delay()
    with pytest.raises(SystemExit):
        delivered(ends, result)
    assert reload(result).status == "running"


def test_an_error_in_the_last_write_is_the_attempts_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> None:
        raise IntegrityError("a constraint of theirs")

    @durable(max_retries=0)
    def body(ctx: ExecutionContext) -> int:
        return 1

    with monkeypatch.context() as patched:
        patched.setattr(transitions, "succeed", refuse)
        execution = run(body)
    assert failure(execution).message == "a constraint of theirs"
    assert "refuse" in failure(execution).traceback


def test_what_follows_a_run_changes_nothing_about_it() -> None:
    def fail(**_kwargs: Any) -> None:
        raise GeneratorExit

    @durable
    def body(ctx: ExecutionContext) -> int:
        return 1

    result = body.delay()
    task_postrun.connect(fail)
    try:
        outcome = delivered(body, result)
    finally:
        task_postrun.disconnect(fail)
    assert (outcome.info, outcome.retval, reload(result).status) == (None, 1, "succeeded")


def test_an_error_that_cannot_be_carried_is_announced_all_the_same() -> None:
    for kind in ("args", "text", "pickle", "notes"):
        result = endings.raises.apply(kwargs={"kind": kind})
        with pytest.raises((StepFailed, *map(type, [endings.RAISED[kind]()]))):
            result.get()
        assert failure(reload(result)).error_class == class_name(type(endings.RAISED[kind]()))


# What stands around the body


def test_hooks_and_bases_see_the_rows_arguments_and_headers_and_not_a_messages() -> None:
    result = endings.call_checks.apply_async(kwargs={"value": 1}, headers={"tenant": "a"})
    delivered(endings.call_checks, result, headers={HEADER: DOORBELL, "tenant": "b"}, tenant="b")
    assert (reload(result).status, reload(result).attempt) == ("succeeded", 1)


def test_a_delivery_without_a_claim_comes_to_nobodys_ears_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    result = endings.before_start_raises.apply_async(countdown=600)
    caplog.set_level("INFO", "conductor_app.execution")
    outcome = delivered(endings.before_start_raises, result)
    assert isinstance(outcome.info.retval, RunEnded)
    assert "dropped: not queued, not due, held, of a paused task, or another run has it" in caplog.text
    assert count("before_start") == 0


def test_a_delivery_for_another_database_says_so(caplog: pytest.LogCaptureFixture) -> None:
    result = endings.before_start_raises.apply_async(countdown=600)
    Execution.objects.filter(pk=result.id).delete()
    caplog.set_level("INFO", "conductor_app.execution")
    delivered(endings.before_start_raises, result)
    assert "dropped: this database has no such execution: it was deleted, or what published" in caplog.text


@pytest.mark.parametrize("task", [endings.call_raises, endings.before_start_raises, endings.receiver_raises])
def test_what_raises_before_the_body_is_the_attempts_error(task: Any) -> None:
    execution = run(task)
    assert (execution.status, execution.attempt, count("body", execution.pk)) == ("failed", 2, 0)
    assert "tenant of" in failure(execution).traceback or "of the receiver" in failure(execution).traceback


def test_a_base_that_answers_in_the_place_of_the_body_is_believed() -> None:
    assert run(endings.call_returns).get_result() == {"cached": True}


def test_a_run_that_changes_nothing_does_not_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "claim", lambda *_args: None)

    @durable
    def body(ctx: ExecutionContext) -> None:
        pass

    with pytest.raises(RuntimeError, match=r"has left the execution queued and due as it was.*not queued, not due"):
        body.apply()


# Claims that fail


def test_a_process_whose_claims_fail_although_the_database_answers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_answers_others", lambda: True)
    process.failed_claims = 0
    process.worker.gate = PoolGate()
    error = DatabaseError("spoilt")
    some = Execution().pk
    for _ in range(claims.MAX_FAILED_CLAIMS - 1):
        assert claims.not_claimed(some, error).what == "abandoned"
    with pytest.raises(SystemExit):
        claims.not_claimed(some, error)


def test_an_outage_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    process.worker.gate = PoolGate()
    monkeypatch.setattr(claims, "_answers_others", lambda: False)
    for error in (OperationalError(2013, "Lost connection"), DatabaseError("spoilt")) * claims.MAX_FAILED_CLAIMS:
        assert str(claims.not_claimed(Execution().pk, error)) == "abandoned: the database is away"

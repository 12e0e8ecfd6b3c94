"""Waiting for a result where it can never come is refused at once."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, current_app, group
from celery.exceptions import TimeoutError as LateError
from django.db import connection, transaction
from django.test import TestCase

from conductor_app import api
from conductor_app.exceptions import WaitInsideTransaction
from conductor_app.models import Execution, database
from conductor_app.store import opened
from conductor_app.testing import ConductorTestCase
from tests.app.scenarios import add, echo
from tests.support.bodies import go_on
from tests.support.executions import committing

TIMEOUTS = pytest.mark.parametrize("timeout", [None, 30])
WAITS: Any = pytest.mark.parametrize(
    "wait", [api.get_result, lambda result, timeout: result.get(timeout=timeout)], ids=["get_result", "get"]
)


@pytest.fixture
def commits(django_db_setup: None, django_db_blocker: Any) -> Any:
    with committing(django_db_blocker):
        yield


@WAITS
@TIMEOUTS
def test_a_transaction_does_not_wait_for_what_it_has_created(wait: Any, timeout: Any, commits: None) -> None:
    with transaction.atomic():
        result = echo.delay(1)
        with transaction.atomic(), pytest.raises(WaitInsideTransaction, match="was created in this transaction"):
            wait(result, timeout=timeout)
    go_on()
    assert wait(result, timeout=timeout) == 1
    with transaction.atomic():
        assert wait(result, timeout=timeout) == 1


@pytest.mark.timeout(30)
def test_a_look_is_no_wait(commits: None) -> None:
    with transaction.atomic():
        result = echo.delay(1)
        with pytest.raises(TimeoutError):
            api.get_result(result, timeout=0)
        with pytest.raises(LateError, match="is not there yet"):
            result.get(timeout=0)
    with pytest.raises(LateError, match="is not there yet"):
        result.get(timeout=0)
    go_on()
    assert (result.get(timeout=0), api.get_result(result, timeout=0)) == (1, 1)


def test_a_rolled_back_transaction_or_savepoint_is_forgotten(commits: None) -> None:
    with transaction.atomic():
        with transaction.atomic():
            result = echo.delay(1)
            transaction.set_rollback(True)
        with pytest.raises(Execution.DoesNotExist):
            api.get_result(result, timeout=1)
    with transaction.atomic():
        again = echo.apply_async((1,))
        transaction.set_rollback(True)
    with transaction.atomic():
        other = echo.apply_async((1,), task_id=again.id)
        assert opened.was_created_here(database(), api.find(other).pk)
    with transaction.atomic():
        assert not opened.was_created_here(database(), api.find(other).pk)


@TIMEOUTS
def test_what_comes_after_it_in_a_chain_or_belongs_to_a_group_is_not_waited_for_either(
    timeout: Any, commits: None
) -> None:
    with transaction.atomic():
        for canvas in (chain(echo.s(1), add.s(2)), group(echo.s(1), echo.s(2))):
            with pytest.raises(WaitInsideTransaction):
                canvas.apply_async().get(timeout=timeout)


@WAITS
def test_a_transaction_waits_for_what_was_committed_before_if_it_can_see_it_end(wait: Any, commits: None) -> None:
    result = echo.delay(1)
    with transaction.atomic():
        if opened.snapshot_level(database()):
            with pytest.raises(WaitInsideTransaction, match="at its beginning"):
                wait(result, timeout=30)
        else:
            with pytest.raises((TimeoutError, LateError)):
                wait(result, timeout=0.1)


@pytest.mark.skipif(connection.vendor != "postgresql", reason="its isolation can be set for one transaction")
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@WAITS
def test_a_snapshot_never_sees_the_end(wait: Any, level: str, commits: None) -> None:
    result = echo.delay(1)
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        with pytest.raises(WaitInsideTransaction, match=level.lower()):
            wait(result, timeout=30)


class InATestCase(ConductorTestCase):
    def test_what_has_been_drained_is_there(self) -> None:
        result = add.delay(1, 2)
        with pytest.raises(WaitInsideTransaction):
            api.get_result(result)
        with pytest.raises(TimeoutError):
            api.get_result(result, timeout=0.05)
        with transaction.atomic(), pytest.raises(WaitInsideTransaction):
            api.get_result(result, timeout=0.05)
        self.conductor.drain()
        assert api.get_result(result) == result.get() == 3


class Eagerly(TestCase):
    def test_what_has_run_eagerly_is_there(self) -> None:
        current_app.conf.task_always_eager = True
        self.addCleanup(setattr, current_app.conf, "task_always_eager", False)
        result = add.delay(1, 2)
        assert api.get_result(result) == result.get() == 3

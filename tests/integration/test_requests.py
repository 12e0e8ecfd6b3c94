"""What a durable task's request, result object and messages say to Celery's own tools is so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import signals
from celery.app.task import Task
from celery.utils.dispatch import Signal

from conductor_app import DurableTask, ExecutionContext
from conductor_app.models import Execution
from conductor_app.transitions import dispatch
from project.celery import app
from tests.support.bodies import durable, reload, run
from tests.support.broker import purge
from tests.support.deliveries import doorbell
from tests.support.results import using

pytestmark = pytest.mark.django_db


@contextmanager
def connected(sent: Signal, receiver: Any) -> Iterator[None]:
    sent.connect(receiver, weak=False)
    try:
        yield
    finally:
        sent.disconnect(receiver)


# ---------------------------------------------------------------------------------------------- ignored results


@durable
def answer(ctx: ExecutionContext) -> int:
    return 42


@durable(ignore_result=True)
def untold(ctx: ExecutionContext) -> int:
    return 42


def test_nobody_waits_for_a_result_that_the_call_ignores() -> None:
    with using("django-db"):
        result = answer.apply_async(ignore_result=True)
        assert result.ignored
        assert result.get(timeout=0.01) is None


def test_nobody_waits_for_a_result_that_the_task_ignores_unless_the_call_wants_it() -> None:
    with using("django-db"):
        assert untold.delay().ignored
        assert not untold.apply_async(ignore_result=False).ignored
        assert not answer.delay().ignored


def test_whether_a_result_is_ignored_is_said_by_the_execution_that_a_key_finds() -> None:
    with using("django-db"):
        answer.apply_async(idempotency_key="ignored", ignore_result=True)
        assert answer.apply_async(idempotency_key="ignored").ignored


def test_without_a_result_backend_a_wait_is_refused_by_celery() -> None:
    with using("disabled://"):
        result = answer.delay()
        assert not result.ignored
        with pytest.raises(NotImplementedError, match="No result backend"):
            result.get(timeout=0.01)


def test_an_ignored_result_is_not_waited_for_in_the_transaction_of_its_call() -> None:
    with using("django-db"):
        assert answer.apply_async(ignore_result=True).get() is None


# ---------------------------------------------------------------------------------------------- requests


def test_a_bodys_request_counts_its_retries() -> None:
    seen = []

    @durable(max_retries=2, retry_backoff=False, default_retry_delay=1)
    def counts(ctx: ExecutionContext) -> int:
        seen.append((ctx.attempt, ctx.task.request.retries))
        ctx.sleep("pause", 60)
        seen.append((ctx.attempt, ctx.task.request.retries))
        if ctx.task.request.retries < 2:
            raise ValueError("again")
        return ctx.task.request.retries

    assert run(counts).get_result() == 2
    # The first attempt begins twice, since it waits; the others remember that.
    assert seen == [(1, 0), (1, 0), (1, 0), (2, 1), (2, 1), (3, 2), (3, 2)]


class Telling(DurableTask[..., Any]):
    abstract = True
    told: list[tuple[Any, ...]] = []

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.told.append(("before_start", list(args), dict(kwargs)))

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self.told.append(("on_success", list(args), dict(kwargs)))

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.told.append(("on_failure", list(args), dict(kwargs)))


def test_hooks_signals_and_the_request_have_the_arguments_of_the_row() -> None:
    Telling.told.clear()

    @durable(base=Telling, max_retries=0)
    def greets(ctx: ExecutionContext, *names: str, mood: str) -> None:
        request = ctx.task.request
        Telling.told.append(("request", list(request.args), dict(request.kwargs)))
        if mood == "bad":
            raise ValueError(mood)

    def before(args: Any, kwargs: Any, **_: Any) -> None:
        Telling.told.append(("task_prerun", list(args), dict(kwargs)))

    with connected(signals.task_prerun, before):
        greets.apply(("Ann",), {"mood": "good"})
        greets.apply(("Bob",), {"mood": "bad"})
    good, bad = (["Ann"], {"mood": "good"}), (["Bob"], {"mood": "bad"})
    hooks = ("task_prerun", "before_start", "request")
    assert Telling.told == [
        *((name, *good) for name in (*hooks, "on_success")),
        *((name, *bad) for name in (*hooks, "on_failure")),
    ]


# ---------------------------------------------------------------------------------------------- messages


@contextmanager
def inside_a_run_of(task: Task[Any, Any], task_id: str) -> Iterator[None]:
    """Be in the middle of another task's run, as its worker sees it."""
    from celery._state import _task_stack  # type: ignore[attr-defined]  # its stubs do not know it

    task.push_request(id=task_id, root_id=task_id, called_directly=False, delivery_info={"priority": 3})
    _task_stack.push(task)
    try:
        yield
    finally:
        _task_stack.pop()
        task.pop_request()


def test_the_message_of_a_root_names_no_parent_whoever_publishes_it() -> None:
    purge(set())
    root, other = reload(answer.delay()), str(untold.delay())
    tasks: list[Any] = []

    def note(**_: Any) -> None:
        from celery import current_task

        tasks.append(current_task.name)

    before = app.conf.task_inherit_parent_priority
    app.conf.task_inherit_parent_priority = True
    try:
        with inside_a_run_of(untold, other), connected(signals.before_task_publish, note):
            message = doorbell(root)
            assert app.current_worker_task.request.id == other
    finally:
        app.conf.task_inherit_parent_priority = before
    assert message.headers["parent_id"] is None
    assert message.headers["root_id"] == str(root.pk)
    assert not message.properties.get("priority")
    assert tasks == [untold.name]


def test_the_message_of_a_root_that_a_task_has_called_names_that_task() -> None:
    purge(set())
    other = str(untold.delay())
    with inside_a_run_of(untold, other):
        called = reload(answer.delay())
    with inside_a_run_of(untold, str(untold.delay())):
        assert doorbell(called).headers["parent_id"] == other
    assert dispatch.message_of(Execution.objects.get(pk=called.pk))["parent_id"] == other

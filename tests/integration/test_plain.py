"""Plain Celery tasks as children, without a worker: what is stored, what is published, how a run ends."""

from __future__ import annotations

from typing import Any

import pytest
from celery import current_app
from celery.app.trace import build_tracer
from django.utils import timezone
from kombu import Connection

from conductor_app import ExecutionContext, api, durable_task, transitions
from conductor_app.body.context import ExecutionContext as Context
from conductor_app.body.plain import PlainTask, django_tasks
from conductor_app.engine import sweeper
from conductor_app.exceptions import (
    Failure,
    InvalidArgumentType,
    NotSerializable,
    StepMismatch,
    UnknownTask,
    WorkerLost,
)
from conductor_app.host import plain_runs
from conductor_app.host.inline import run_once
from conductor_app.models import Execution, FailedExecution
from conductor_app.store import clock
from conductor_app.telling.headlines import headline
from conductor_app.telling.situation import Situation
from conductor_app.transitions import dispatch
from tests.app import plain
from tests.app.ledger import count
from tests.app.tasks import add
from tests.support.bodies import advance, go_on
from tests.support.executions import claimed, fresh, invoke, running

pytestmark = pytest.mark.django_db(transaction=True)

EARLY = '{"plain":{"acks_late":false},"ignore_result":true}'
LATE = '{"plain":{"acks_late":true},"ignore_result":true}'


@durable_task(max_retries=0)
def by_object(ctx: ExecutionContext) -> Any:
    return ctx.invoke("add", add, {"x": 1, "y": 2})


@durable_task(max_retries=0)
def by_signature(ctx: ExecutionContext) -> Any:
    return ctx.invoke("add", add.s(1, y=2).set(priority=3, time_limit=9))


@durable_task(max_retries=0)
def by_position(ctx: ExecutionContext) -> Any:
    return ctx.invoke("echo", plain.echo, 5, queue="elsewhere")


@durable_task(max_retries=0)
def passes_a_set(ctx: ExecutionContext) -> Any:
    return ctx.invoke("echo", plain.echo, {"value": [{1}]})


@durable_task(max_retries=0)
def changes_its_mind(ctx: ExecutionContext, to: str) -> Any:
    ctx.invoke("a", to, {"value": 1})
    return ctx.invoke("b", plain.echo, {"value": 2})


def child(result: Any, step: str) -> Execution:
    return Execution.objects.get(parent_id=result.id, step=step)


@pytest.fixture(autouse=True)
def _clock() -> Any:
    yield
    clock.reset()


def plain_child(options: str = EARLY, **fields: Any) -> Execution:
    """A queued plain child of a waiting parent."""
    return invoke(running(), task=plain.echo.name, payload='[[],{"value":1}]', options=options, **fields)


def deliver(execution: Execution, task: Any = plain.echo, **request: Any) -> Any:
    """Run a delivery as a worker's pool does, and return the tracer's answer."""
    tracer = plain_runs.guard(task, build_tracer(task.name, task, app=current_app._get_current_object(), eager=True))
    key = str(execution.pk)
    request = {
        "id": key,
        "hostname": "test@host",
        "is_eager": True,
        "delivery_info": {},
        "ignore_result": True,
        **request,
    }
    return tracer(key, ["forged"], {}, request)


# ------------------------------------------------------------------------------------------------------------- stored


@pytest.mark.parametrize("task", [by_object, by_signature])
def test_a_plain_task_is_invoked_by_object_and_by_signature(task: Any) -> None:
    result = task.apply()
    assert result.get() == 3
    row = child(result, "add")
    assert (row.task, row.status, row.depth, row.max_attempts) == (add.name, "succeeded", 1, 4)
    assert row.is_plain
    assert not row.runs_again
    assert row.pk.version == 8
    if task is by_signature:
        assert (row.priority, row.get_options()["time_limit"]) == (3, 9)


def test_the_queue_of_the_call_wins_and_a_bare_payload_is_the_only_argument() -> None:
    result = by_position.apply()
    assert result.get() == 5
    row = child(result, "echo")
    assert (row.queue, row.args, row.kwargs) == ("elsewhere", [5], {})


def test_always_eager_runs_plain_children_with_their_retries(settings: Any) -> None:
    current_app.conf.task_always_eager = True
    try:
        assert plain.invokes.delay(child=plain.flaky.name, payload={"failures": 2}).get() == {"child": 2}
    finally:
        current_app.conf.task_always_eager = False
    assert count("plain") == 3


def test_a_retry_is_due_when_celery_says_so() -> None:
    result = plain.invokes.delay(child=plain.waits_for_its_retry.name, payload={"countdown": 60})
    go_on()
    row = child(result, "child")
    assert (row.status, row.attempt, row.error_message) == ("queued", 2, "Retry in 60s")
    advance(30)
    assert fresh(row).status == "queued"
    advance(31)
    assert api.get_result(result, timeout=0) == {"child": 2}


@pytest.mark.parametrize(
    ("name", "payload", "error", "message"),
    [
        (add.name, {"x": 1}, InvalidArgumentType, "does not fit tests.app.tasks.add(x, y): "),
        (add.name, {"x": 1, "y": 2, "z": 3}, InvalidArgumentType, "unexpected keyword argument 'z'"),
        ("tests.app.tasks.ad", {}, UnknownTask, 'Did you mean "tests.app.tasks.add"?'),
    ],
)
def test_bad_input_is_refused_at_the_call(name: str, payload: Any, error: type[Exception], message: str) -> None:
    result = plain.invokes.apply(kwargs={"child": name, "payload": payload})
    failure = FailedExecution.objects.get(pk=result.id)
    assert failure.error_class == f"{error.__module__}.{error.__name__}"
    assert message in failure.message
    assert Execution.objects.count() == 1


def test_a_payload_that_is_no_json_is_refused_with_the_path_to_it() -> None:
    result = passes_a_set.apply()
    assert str(result.result) == 'payload["value"][0] is a set. Pass a sorted list.'
    assert isinstance(result.result, NotSerializable)


def test_a_task_without_typing_takes_what_it_gets() -> None:
    result = plain.invokes.apply(kwargs={"child": plain.untyped.name, "payload": {"a": 1, "b": 2}})
    assert result.get() == {"child": ["a", "b"]}


def test_a_step_recorded_for_a_durable_task_is_no_plain_one() -> None:
    result = changes_its_mind.delay(to="tests.app.scenarios.echo")
    run_once(Execution.objects.get(pk=result.id), current_app._get_current_object())
    Execution.objects.filter(pk=result.id).update(payload=f'[[],{{"to":"{plain.echo.name}"}}]')
    go_on()
    assert FailedExecution.objects.get(pk=result.id).error_class.endswith(StepMismatch.__name__)


def test_a_tasks_own_options_are_those_of_its_executions(settings: Any) -> None:
    new = PlainTask(plain.routed).new_execution([], {}, {}, what="payload")
    assert (new.queue, new.expires, new.max_attempts) == (
        settings.CELERY_TASK_ROUTES[plain.routed.name]["queue"],
        60,
        4,
    )
    late = PlainTask(plain.kills_its_process_late).new_execution([], {"times": 1}, {}, what="payload")
    assert '"acks_late":true' in late.options
    assert late.max_attempts == 3
    limited = PlainTask(plain.over_the_hard_limit).new_execution([], {}, {"shadow": "s"}, what="payload")
    assert '"time_limit":1' in limited.options
    assert '"shadow":"s"' in limited.options


# ---------------------------------------------------------------------------------------------------------- published


@pytest.mark.skipif(not dispatch.is_embedded(), reason="reads the queue of memory://")
def test_the_message_is_the_one_that_celery_would_publish() -> None:
    row = plain_child(queue="plain-message")
    assert transitions.retry_later(claimed(row), Failure("E", "e"), 0) is None
    (published,) = transitions.take_for_dispatch(10, ["plain-message"])
    assert dispatch.publish(published)
    with Connection("memory://") as connection, connection.SimpleQueue("plain-message") as queue:
        message = queue.get(timeout=1)
    args, kwargs, _embed = message.payload
    assert (args, kwargs) == ([], {"value": 1})
    headers = message.headers
    assert (headers["id"], headers["task"], headers["retries"]) == (str(row.pk), plain.echo.name, 1)
    assert (headers["ignore_result"], headers[dispatch.HEADER]) == (True, dispatch.PLAIN)


# -------------------------------------------------------------------------------------------------------------- runs


def test_a_delivery_runs_what_the_row_says_and_a_copy_of_it_is_dropped() -> None:
    row = plain_child()
    assert deliver(row, retries=0).info is None
    assert (fresh(row).status, fresh(row).get_result()) == ("succeeded", 1)
    dropped = deliver(row, retries=0)
    assert dropped.info.state == "IGNORED"
    assert count("plain", row.pk) == 1


@pytest.mark.parametrize("ignores", [True, False])
def test_the_row_says_whether_the_result_is_kept_whatever_the_message_says(ignores: bool) -> None:
    """A retry's message in Celery 5.6 has forgotten it."""
    seen: list[bool] = []

    def body(self: Any) -> None:
        seen.append(self.request.ignore_result)

    task = current_app.task(body, bind=True, name="tests.plain.keeps", shared=False)
    options = f'{{"plain":{{"acks_late":false}},"ignore_result":{str(ignores).lower()}}}'
    row = invoke(running(), task=task.name, payload="[[],{}]", options=options)
    try:
        assert deliver(row, task, retries=0, ignore_result=not ignores).info is None
    finally:
        current_app.tasks.pop(task.name)
    assert seen == [ignores]


def test_a_message_about_another_attempt_is_dropped_and_the_next_ones_may_come_early() -> None:
    row = plain_child()
    transitions.retry_later(claimed(row), Failure("E", "e"), 600)
    for retries in (0, 2):
        assert deliver(row, retries=retries).info.state == "IGNORED"
    assert deliver(row, retries=1).info is None
    assert fresh(row).status == "succeeded"


def test_a_cancelled_or_expired_or_held_back_child_does_not_start() -> None:
    cancelled, expired, held = plain_child(), plain_child(), plain_child()
    Execution.objects.filter(pk=cancelled.pk).update(cancel_requested_at=timezone.now())
    Execution.objects.filter(pk=expired.pk).update(deadline_at=clock.after(-1))
    Execution.objects.filter(pk=held.pk).update(due_at=None)
    for row in (cancelled, expired, held):
        assert deliver(row, retries=0).info.state == "IGNORED"
    assert count("plain") == 0
    sweeper.sweep(publish=False)
    assert [fresh(row).status for row in (cancelled, expired, held)] == ["cancelled", "cancelled", "queued"]


def test_a_delivery_that_is_nobodys_passes_through() -> None:
    tracer = plain_runs.guard(add, lambda *args: args)
    for task_id in ("a", "00000000-0000-4000-8000-000000000000", "00000000-0000-8000-8000-000000000000", None):
        assert tracer(task_id, [1], {}, {}) == (task_id, [1], {}, {})


# -------------------------------------------------------------------------------------------------------------- lost


def test_a_lost_run_is_failed_unless_the_task_acks_late() -> None:
    early, late = claimed(plain_child(EARLY), "w@h/1"), claimed(plain_child(LATE), "w@h/1")
    assert transitions.lose(early.pk, owner="w@h/1")
    assert transitions.lose(late.pk, owner="w@h/1")
    failure = FailedExecution.objects.get(pk=early.pk)
    assert failure.error_class.endswith(WorkerLost.__name__)
    assert failure.message == (
        "Worker died: w@h/1 stopped while running attempt 1 of 4. It is not run again: it is a plain Celery task "
        "without acks_late, and may have done its work."
    )
    assert (fresh(late).status, fresh(late).attempt) == ("queued", 2)
    assert fresh(Execution.objects.get(pk=early.parent_id)).status == "queued"


def test_a_verdict_of_celery_fails_the_child_for_good_and_a_flagged_one_is_cancelled() -> None:
    limited, flagged = claimed(plain_child(LATE), "w@h/1"), claimed(plain_child(LATE), "w@h/1")
    api.cancel(flagged.pk, reason="revoked")
    for row in (limited, flagged):
        assert transitions.lose(row.pk, owner="w@h/1", failure=Failure("Limit", "too long"))
    assert (fresh(limited).status, fresh(limited).error_message) == ("failed", "too long")
    assert (fresh(flagged).status, fresh(flagged).error_message) == ("cancelled", "Cancelled: revoked")


def test_an_operators_retry_begins_with_the_first_attempt_again() -> None:
    result = plain.invokes.apply(kwargs={"child": plain.fails.name, "payload": {"message": "no"}})
    Execution.objects.filter(parent_id=result.id).update(attempt=3)
    api.retry(result)
    go_on()
    row = child(result, "child")
    assert (row.status, row.attempt, count("plain", row.pk)) == ("failed", 1, 2)


# ------------------------------------------------------------------------------------------------------- deployments


@pytest.mark.parametrize("options", [EARLY, ""], ids=["plain, now durable", "durable, now plain"])
def test_a_queued_child_runs_as_what_its_task_is_now(options: str) -> None:
    task = plain.echo.name if not options else "tests.app.scenarios.echo"
    row = invoke(running(), task=task, payload='[[],{"value":1}]', options=options)
    run_once(row, current_app._get_current_object())
    assert (fresh(row).status, fresh(row).get_result()) == ("succeeded", 1)
    assert count("plain" if not options else "body", row.pk) == 1


# ------------------------------------------------------------------------------------------------------------- words


def test_the_headlines_of_a_running_plain_child_say_what_follows() -> None:
    row = claimed(plain_child(), "w@h/1")
    api.cancel(row.pk)
    now = clock.read("default")
    assert headline(Situation(fresh(row), now)).text.endswith(
        "a plain Celery task cannot be stopped while it runs, so it runs to its end, and its result is kept."
    )
    Execution.objects.filter(pk=row.pk).update(lease_expires_at=clock.after(0.5))
    text = headline(Situation(fresh(row), clock.read("default"))).text
    assert "A plain Celery task without acks_late is not run twice: it will be failed at" in text


# ------------------------------------------------------------------------------------------------------- django.tasks


@pytest.mark.skipif(django_tasks is None, reason="django.tasks came with Django 6.0")
def test_a_task_of_django_runs_as_a_child(settings: Any) -> None:
    backend = "django.tasks.backends.dummy.DummyBackend"
    settings.TASKS = {"default": {"BACKEND": backend, "QUEUES": ["default", "plain-queue"]}}
    from tests.app import django_tasks as ours

    with_context = ours.describe.using(queue_name="plain-queue")

    def body(ctx: Context) -> Any:
        return [ctx.invoke("double", ours.double, {"value": 4}), ctx.invoke("describe", with_context, {"word": "a"})]

    task = durable_task(max_retries=0, name="tests.plain.django")(body)
    result = task.apply()
    assert result.get() == [8, ["a", 1]]
    assert child(result, "double").task == "conductor_app.run_django_task"
    assert child(result, "describe").queue == "plain-queue"
    runner = current_app.tasks["conductor_app.run_django_task"]
    with pytest.raises(UnknownTask, match="is none"):
        runner.apply(args=["os.system", ["true"], {}], throw=True)

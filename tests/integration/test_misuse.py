"""Calls of ``ctx`` that no retry would make right: they fail at once, and say what was forgotten."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry

from conductor_app import DurableTask, EventTimedOut, ExecutionContext, api
from conductor_app.models import Execution, Step
from tests.app import scenarios
from tests.support.bodies import counts, durable, failure, go_on, reload, run, start

pytestmark = pytest.mark.django_db

ECHO = "tests.app.scenarios.echo"


def save(order_id: int, *, receipt: str) -> None: ...


def failed_at_once(call: Callable[[ExecutionContext], Any], **options: Any) -> str:
    """Run a body that calls, check that its first attempt was its last and stored nothing; return the message."""

    @durable(max_retries=5, **options)
    def body(ctx: ExecutionContext) -> Any:
        return call(ctx)

    execution = start(body)
    assert (execution.status, execution.attempt, execution.max_attempts) == ("failed", 1, 6)
    assert counts() == (1, 0, 1)
    return failure(execution).message.replace(body.name, "body")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda ctx: ctx.invoke(), "ctx.invoke() missing 2 required positional arguments: 'step' and 'child'."),
        (lambda ctx: ctx.invoke(scenarios.echo), "ctx.invoke() missing 1 required positional argument: 'child'."),
        (lambda ctx: ctx.invoke("a", scenarios.echo, {}, 30), "ctx.invoke() takes from 3 to 4 positional arguments"),
        (
            lambda ctx: ctx.invoke("a", scenarios.echo, timout=30),
            "ctx.invoke() got an unexpected keyword argument 'timout'.",
        ),
        (lambda ctx: ctx.map("a", scenarios.echo), "ctx.map() missing 1 required positional argument: 'payloads'."),
        (lambda ctx: ctx.start("a"), "ctx.start() missing 1 required positional argument: 'child'."),
        (lambda ctx: ctx.step("a"), "ctx.step() missing 1 required positional argument: 'fn'."),
        (lambda ctx: ctx.atomic_step("a"), "ctx.atomic_step() missing 1 required positional argument: 'fn'."),
        (lambda ctx: ctx.sleep(30), "ctx.sleep() missing 1 required positional argument: 'seconds'."),
        (lambda ctx: ctx.wait_for("approved"), "ctx.wait_for() missing 1 required positional argument: 'event'."),
        (lambda ctx: ctx.checkpoint(1), "ctx.checkpoint() takes 1 positional argument but 2 were given."),
    ],
)
def test_a_call_with_other_arguments_fails_at_once(call: Any, text: str) -> None:
    message = failed_at_once(call)
    assert message.startswith(text)
    name = text.partition("(")[0]
    assert f" It is {name}(" in message


def test_the_message_of_a_wrong_call_shows_the_right_one() -> None:
    assert failed_at_once(lambda ctx: ctx.sleep(30)) == (
        "ctx.sleep() missing 1 required positional argument: 'seconds'. It is ctx.sleep(step, seconds)."
    )


@pytest.mark.parametrize("name", ["step", "atomic_step"])
def test_a_step_s_function_that_is_called_wrongly_fails_at_once(name: str) -> None:
    assert failed_at_once(lambda ctx: getattr(ctx, name)("save", save, 5)) == (
        "save() missing 1 required keyword-only argument: 'receipt'"
    )


def test_a_type_error_from_within_is_retried_as_any_other() -> None:
    def inner() -> None:
        save(5)  # type: ignore[call-arg]

    @durable(max_retries=1, retry_backoff=False, default_retry_delay=0)
    def body(ctx: ExecutionContext) -> None:
        ctx.step("inner", inner)

    execution = run(body)
    assert (execution.status, execution.attempt, failure(execution).error_class) == ("failed", 2, "builtins.TypeError")


class Unprintable:
    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "error",
    [TypeError(), TypeError(Unprintable()), TypeError("a", "b"), AttributeError(), AttributeError(Unprintable())],
)
def test_other_errors_of_these_classes_are_left_as_they_are(error: Exception) -> None:
    @durable(max_retries=1, retry_backoff=False, default_retry_delay=0)
    def body(ctx: ExecutionContext) -> None:
        raise error

    execution = run(body)
    assert (execution.status, execution.attempt) == ("failed", 2)
    assert failure(execution).error_class == f"builtins.{type(error).__name__}"


def test_what_the_context_has_not_fails_at_once() -> None:
    assert failed_at_once(lambda ctx: ctx.invok("a", scenarios.echo)) == 'ctx has no "invok". Did you mean "invoke"?'
    Execution.objects.all().delete()
    message = failed_at_once(lambda ctx: ctx.x)
    assert message.startswith('ctx has no "x". It has as_completed, atomic_step, attempt, checkpoint, ')
    assert "flush" not in message


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda ctx: ctx.invoke(scenarios.echo, {"value": 1}),
            f'step name must be str, got the task {ECHO}. The step\'s name comes first: ctx.invoke("name", echo, …)',
        ),
        (
            lambda ctx: ctx.invoke(scenarios.echo.s(value=1), {"value": 1}),
            f'step name must be str, got the task {ECHO}. The step\'s name comes first: ctx.invoke("name", echo, …)',
        ),
        (
            lambda ctx: ctx.map(scenarios.echo, [], []),
            f'step name must be str, got the task {ECHO}. The step\'s name comes first: ctx.map("name", echo, …)',
        ),
        (
            lambda ctx: ctx.step(save, 5),
            'step name must be str, got function save. The step\'s name comes first: ctx.step("name", save, …)',
        ),
        (
            lambda ctx: ctx.step(lambda: 5, 5),
            "step name must be str, got function <lambda>.<locals>.<lambda>. "
            'The step\'s name comes first: ctx.step("name", …, …)',
        ),
        (
            lambda ctx: ctx.invoke(ECHO, {"value": 1}),
            f'ctx.invoke("{ECHO}") got a payload where a task comes. Was the step\'s name forgotten? '
            'It comes first: ctx.invoke("name", task, payload)',
        ),
    ],
)
def test_a_forgotten_step_name_is_told(call: Any, text: str) -> None:
    message = failed_at_once(call)
    assert message.replace(f"{__name__}.", "") == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tests.app.scenarios.ehco", 'Did you mean "tests.app.scenarios.echo"\\?'),
        ("echo", r"The nearest ones are .*\btests\.app\.scenarios\.echo\b"),
        ("shop.jobs.orders.three_childs", r"The nearest ones are .*\btests\.app\.scenarios\.three_children\b"),
    ],
)
def test_an_unknown_task_is_told_with_the_nearest_ones(name: str, text: str) -> None:
    message = failed_at_once(lambda ctx: ctx.invoke("a", name))
    assert re.match(f'No task named "{re.escape(name)}". {text}', message)
    assert message.endswith("Is its module imported (tasks.py in an installed app)?")
    assert "celery." not in message


# ---------------------------------------------------------------------------- what Celery's tasks may do, and these not


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda ctx: ctx.task.replace(scenarios.echo.s(1)),
            "body is durable and cannot be replaced. Use `return ctx.invoke(…)`, one call for each task of a chain, "
            "and ctx.map or ctx.start with ctx.gather for a group.",
        ),
        (
            lambda ctx: ctx.task.add_to_chord(scenarios.echo.s(1)),
            "body is durable: add_to_chord would add once for each attempt. Use ctx.start and ctx.gather, or ctx.map, "
            "in a body that takes the place of the chord.",
        ),
        (
            lambda ctx: ctx.task.retry(),
            "body is durable: use `raise ctx.retry(countdown=…)`.",
        ),
    ],
)
def test_what_celery_s_task_would_do_to_itself_is_refused(call: Any, text: str) -> None:
    assert failed_at_once(call) == text


def raising(error: Exception) -> Callable[[Any], Any]:
    def call(ctx: ExecutionContext) -> None:
        raise error

    return call


def raising_in_a_step(error: Exception) -> Callable[[Any], Any]:
    return lambda ctx: ctx.step("a", raising(error), ctx)


@pytest.mark.parametrize("place", [raising, raising_in_a_step])
@pytest.mark.parametrize(
    ("error", "instead"),
    [
        (Ignore(), "`return`, or raise an error"),
        (Reject("no", requeue=True), "`return`, or raise an error"),
        (Retry(), "`raise ctx.retry(countdown=…)`"),
    ],
)
def test_celery_s_own_ways_out_are_failures(error: Exception, instead: str, place: Any) -> None:
    states: list[str] = []

    class Watching(DurableTask[..., Any]):
        def after_return(self, status: str, *_args: Any, **_kwargs: Any) -> None:
            states.append(status)

    assert failed_at_once(place(error), base=Watching) == (
        f"body raised Celery's {type(error).__name__}, which would leave a durable execution without an outcome. "
        f"Use {instead}."
    )
    assert states == ["FAILURE"]
    assert Execution.objects.get().status == "failed"


def test_celery_s_ways_out_are_failures_before_the_body_too() -> None:
    class Ignoring(DurableTask[..., Any]):
        def before_start(self, *_args: Any, **_kwargs: Any) -> None:
            raise Ignore

    message = failed_at_once(lambda ctx: None, base=Ignoring)
    assert message.startswith("body raised Celery's Ignore, ")


# ---------------------------------------------------------------------------------------------------------------- looks


def test_a_wait_of_no_time_looks() -> None:
    runs: list[int] = []

    @durable
    def body(ctx: ExecutionContext) -> list[Any]:
        runs.append(1)
        seen: list[Any] = []
        for number in range(2):
            try:
                seen.append(ctx.wait_for(f"look-{number}", "approved", timeout=0))
            except EventTimedOut as error:
                seen.append(str(error))
        seen.append(ctx.wait_for("later", "go"))
        return seen

    result = body.delay()
    api.send_event(result, "approved", {"by": "Ann"})
    go_on()
    execution = reload(result)
    assert (execution.status, execution.steps.get(name="later").status) == ("waiting", "pending")
    looks = Step.objects.filter(name__startswith="look").order_by("id")
    assert [(step.status, step.timeout_seconds) for step in looks] == [("succeeded", 0), ("timed_out", 0)]
    # What comes later does not change what was seen.
    api.send_event(result, "approved", {"by": "Bob"})
    api.send_event(result, "go")
    go_on()
    assert reload(result).get_result() == [
        {"by": "Ann"},
        "Event 'approved' did not come within 0s (step 'look-1')",
        None,
    ]

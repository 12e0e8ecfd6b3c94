"""Options of calls, signatures and the decorator: each has an effect, or is refused where it is written."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from celery import Signature, chain, chord, group, shared_task
from celery.canvas import StampingVisitor

from conductor_app import DurableTask, ExecutionContext, testing
from conductor_app.exceptions import InvalidArgument, InvalidArgumentType, ProgrammingError
from conductor_app.models import Execution
from project.celery import app
from tests.app import scenarios
from tests.support.bodies import counts, durable, failure, go_on, run, start

pytestmark = pytest.mark.django_db

ECHO = "tests.app.scenarios.echo"
NO_KEY = "The step's name is the key: its child is stored once, however often the body runs."


@shared_task(name="tests.options.plain")
def plain(value: int = 0) -> int:
    return value


def ordinary(ctx: ExecutionContext, value: int = 0) -> int:
    return value


# ------------------------------------------------------------------------------------------------------------ of a call

MISSPELT = {
    "idempotencykey": 'Did you mean "idempotency_key"?',
    "expire": 'Did you mean "expires"?',
    "count_down": 'Did you mean "countdown"?',
    "timeout": "A run is limited by time_limit=, the time until it starts by expires=, its whole tree by deadline=.",
    "max_retries": "It is an option of @durable_task.",
    "whatever": "",
}


@pytest.mark.parametrize("name", MISSPELT)
@pytest.mark.parametrize("call", ["apply_async", "apply_async_on_commit", "apply"])
def test_an_unknown_option_of_a_call_is_refused(name: str, call: str, django_capture_on_commit_callbacks: Any) -> None:
    if call == "apply" and name == "max_retries":
        return  # it may come from an eager chord, and has no more effect than Celery's others there
    with django_capture_on_commit_callbacks() as callbacks, pytest.raises(InvalidArgumentType) as refusal:
        getattr(scenarios.echo, call)(kwargs={"value": 1}, **{name: "x"})
    advice = MISSPELT[name]
    if call == "apply" and name == "idempotencykey":
        advice = ""  # it takes none
    said = f'{ECHO}.{call}() has no option "{name}". {advice}'.rstrip()
    assert str(refusal.value) == said
    assert (counts(), callbacks) == ((0, 0, 0), [])


def test_apply_takes_no_idempotency_key() -> None:
    with pytest.raises(InvalidArgumentType) as refusal:
        scenarios.echo.apply(idempotency_key="order-7")
    assert str(refusal.value) == (
        f'{ECHO}.apply() has no option "idempotency_key". It always runs the task; use apply_async.'
    )
    assert counts() == (0, 0, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: scenarios.echo.s(value=1).set(idempotencykey="x").delay(),
        lambda: scenarios.echo.s(value=1).apply_async(idempotencykey="x"),
        lambda: group(scenarios.echo.s(value=1).set(idempotencykey="x")).delay(),
        lambda: Signature(ECHO, kwargs={"value": 1}, options={"idempotencykey": "x"}, app=app).delay(),
    ],
)
def test_a_signature_with_an_unknown_option_is_refused_when_it_is_called(call: Any) -> None:
    with pytest.raises(InvalidArgumentType, match='has no option "idempotencykey"'):
        call()
    assert counts() == (0, 0, 0)


@pytest.mark.parametrize("child", [scenarios.echo, plain])
def test_a_child_s_signature_with_an_id_is_refused(child: Any) -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        frozen = child.s(value=1)
        frozen.freeze()
        ctx.start("frozen", frozen)
        return ctx.invoke("a", child.s(value=1).set(task_id=str(uuid.uuid4())))

    execution = run(parent)
    assert (execution.status, execution.attempt) == ("failed", 1)
    assert failure(execution).message == (
        'The signature given to ctx.invoke("a") has a task_id. A child\'s id follows from its step.'
    )


def test_all_that_celery_knows_is_taken() -> None:
    options: dict[str, Any] = {
        "retry": True,
        "retry_policy": {"max_retries": 1},
        "delivery_mode": 1,
        "compression": "zlib",
        "serializer": "json",
        "correlation_id": "c",
        "argsrepr": "()",
        "periodic_task_name": "nightly",
        "add_to_parent": False,
        "reply_to": "q",
    }
    scenarios.echo.apply_async((1,), **options)
    assert counts() == (1, 0, 0)


class Stamps(StampingVisitor):
    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"tenant": "a", "unstamped": "b", "stamped_headers": ["tenant"]}


def test_stamps_are_no_unknown_options() -> None:
    signature: Any = scenarios.echo.s(1)
    signature.stamp(visitor=Stamps())
    signature.stamp(idempotencykey="stamped")
    signature.delay()
    (execution,) = Execution.objects.all()
    assert execution.get_options()["stamps"] == {"tenant": "a", "idempotencykey": "stamped"}
    with pytest.raises(InvalidArgumentType, match='Did you mean "expires"'):
        signature.apply_async(expire=5)


@pytest.mark.parametrize("name", ["idempotencykey", "timeout"])
@pytest.mark.parametrize(
    "make",
    [
        lambda bad: scenarios.echo.s(1).set(link=bad),
        lambda bad: scenarios.echo.s(1).set(link_error=[bad]),
        lambda bad: scenarios.echo.s(1).set(link=plain.s().set(link=bad)),
        lambda bad: chain(scenarios.echo.s(1), scenarios.echo.s(), bad),
        lambda bad: chain(scenarios.echo.s(1), group(scenarios.echo.s(), bad)),
        lambda bad: chain(scenarios.echo.s(1), chord([scenarios.echo.s()], bad)),
        lambda bad: chord([scenarios.echo.s(1)], bad),
    ],
)
def test_what_is_called_later_is_checked_when_the_first_is_called(make: Any, name: str) -> None:
    with pytest.raises(InvalidArgumentType, match=f'^The signature of {ECHO} has no option "{name}"'):
        make(scenarios.echo.s().set(**{name: "x"})).apply_async()
    assert counts() == (0, 0, 0)


@pytest.mark.parametrize("is_eager", [False, True])
def test_a_chord_s_own_options_do_not_lose_its_body(is_eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app.conf, "task_always_eager", is_eager)
    canvas = chord([scenarios.echo.s(1), scenarios.echo.s(2)], scenarios.echo.s())
    result = canvas.apply_async(interval=1, max_retries=2)
    go_on()
    assert result.get() == [1, 2]


@pytest.mark.parametrize("child", [scenarios.echo, plain])
@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            {"idempotency_key": "k"},
            "The step's name is the key: its child is stored once, however often the body runs.",
        ),
        ({"idempotencykey": "k"}, ""),
        ({"expire": 5}, 'Did you mean "expires"?'),
        ({"timeout": 5}, MISSPELT["timeout"]),
    ],
)
def test_a_child_s_signature_with_an_option_that_would_be_lost_is_refused(
    child: Any, options: dict[str, Any], advice: str
) -> None:
    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return ctx.invoke("a", child.s(value=1).set(**options))

    execution = run(parent)
    assert (execution.status, execution.attempt, counts()) == ("failed", 1, (1, 0, 1))
    (name,) = options
    said = f'The signature given to ctx.invoke("a") has no option "{name}". {advice}'.rstrip()
    assert failure(execution).message == said


# ----------------------------------------------------------------------------------------------------- of the decorator


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"timeout": 5},
            'durable_task() has no option "timeout". A run is limited by time_limit=, a child by timeout= of '
            "ctx.invoke, a whole tree by max_duration=.",
        ),
        ({"retries": 1}, 'durable_task() has no option "retries". Did you mean "max_retries"?'),
        ({"retry": 1}, 'durable_task() has no option "retry". Did you mean "max_retries"?'),
        (
            {"concurrency": 1},
            'durable_task() has no option "concurrency". A worker\'s --concurrency limits the tasks of its queues; '
            "give this task its own with queue=.",
        ),
        ({"soft_timelimit": 1}, 'durable_task() has no option "soft_timelimit". Did you mean "soft_time_limit"?'),
        ({"ratelimit": "5/m"}, 'durable_task() has no option "ratelimit". Did you mean "rate_limit"?'),
        ({"countdown": 5}, 'durable_task() has no option "countdown". It is an option of apply_async.'),
        ({"delay": 5}, 'durable_task() has no option "delay".'),
        ({"request": 5}, 'durable_task() has no option "request".'),
        (
            {"owner": "billing"},
            'durable_task() has no option "owner". An attribute of your own is declared in a class that is passed as '
            "base=.",
        ),
        ({"base": 5}, "base must derive from conductor_app.DurableTask, got 5."),
    ],
)
def test_an_option_of_the_decorator_without_effect_is_refused(options: dict[str, Any], text: str) -> None:
    before = set(app.tasks)
    with pytest.raises(TypeError) as refusal:
        durable(**options)(ordinary)
    assert str(refusal.value).startswith(text)
    assert set(app.tasks) == before


class Owned(DurableTask[..., Any]):
    owner = ""


def test_attributes_of_a_base_class_are_options() -> None:
    assert durable(base=Owned, owner="billing")(ordinary).owner == "billing"
    with pytest.raises(TypeError, match='has no option "ownr"'):
        durable(base=Owned, ownr="billing")(ordinary)


def test_hooks_are_options() -> None:
    ended: list[Any] = []
    task = durable(on_success=lambda self, value, *_rest: ended.append(value))(ordinary)
    assert run(task, value=3).status == "succeeded"
    assert ended == [3]


@pytest.mark.parametrize("where", ["decorator", "call", "both", "child"])
def test_a_soft_time_limit_above_the_hard_one_is_refused(where: str) -> None:
    text = r"^soft_time_limit must be less than or equal to time_limit, got 9 and 5$"
    if where == "decorator":
        with pytest.raises(InvalidArgument, match=text):
            durable(time_limit=5, soft_time_limit=9)(ordinary)
        return
    task = durable(time_limit=5)(ordinary) if where == "both" else scenarios.echo
    options = {"soft_time_limit": 9} if where == "both" else {"time_limit": 5, "soft_time_limit": 9}
    if where == "child":

        @durable
        def parent(ctx: ExecutionContext) -> Any:
            with pytest.raises(InvalidArgument, match=text):
                ctx.invoke("durable", task.s(1).set(**options))
            with pytest.raises(InvalidArgument, match=text):
                ctx.invoke("plain", plain.s(1).set(**options))

        assert (run(parent).status, counts()) == ("succeeded", (1, 0, 0))
        return
    with pytest.raises(InvalidArgument, match=text):
        task.apply_async((1,), **options)
    assert counts() == (0, 0, 0)


def test_without_typing_arguments_meet_the_body_alone() -> None:
    def body(ctx: ExecutionContext, value: int) -> int:
        return value

    task = durable(typing=False, max_retries=0)(body)
    execution = start(task, valeu=3)
    assert execution.status == "failed"
    assert failure(execution).error_class == "builtins.TypeError"
    assert "unexpected keyword argument 'valeu'" in failure(execution).message
    with pytest.raises(InvalidArgumentType, match="does not fit"):
        durable(body).delay(valeu=3)


# ----------------------------------------------------------------------------------------- what cannot be done with one


@pytest.mark.parametrize(("name", "arguments"), [("map", ([(1,)],)), ("starmap", ([(1,)],)), ("chunks", ([(1,)], 2))])
def test_celery_s_loops_over_a_task_are_refused_where_they_are_written(name: str, arguments: Any) -> None:
    with pytest.raises(ProgrammingError) as refusal:
        getattr(scenarios.echo, name)(*arguments)
    assert str(refusal.value) == (
        f"{ECHO}.{name}() would call a durable task like a function, in one run of another task. Use ctx.map in a "
        "durable task, with max_parallel= if not all are to run at once, or celery.group elsewhere."
    )


def test_what_to_use_instead_of_a_call_is_named() -> None:
    with pytest.raises(TypeError) as refusal:
        scenarios.echo(5)
    assert str(refusal.value) == (
        f"{ECHO} is durable and cannot be called like a function. Use {ECHO}.delay(…); in a unit test "
        f"conductor_app.testing.run(echo, payload), or {ECHO}.apply(…)."
    )
    assert testing.run(scenarios.echo, {"value": 5}) == 5

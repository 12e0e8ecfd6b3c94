"""``@durable_task``: what may be decorated, and what calling the task stores."""

from __future__ import annotations

import datetime as dt
import functools
import inspect
import types
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, shared_task, signature
from celery.app.routes import prepare
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction

from conductor_app import DurableTask, ExecutionContext, api, durable_task
from conductor_app.exceptions import ExecutionFailed, InvalidArgument
from conductor_app.models import Execution
from conductor_app.store import clock
from project.celery import app
from tests.app import scenarios
from tests.support.bodies import advance, counts, durable, go_on, reload, run


@pytest.fixture(autouse=True)
def unshifted_clock() -> Iterator[None]:
    yield
    clock.reset()


# ------------------------------------------------------------------------------------------------ what may be decorated


def ordinary(ctx: ExecutionContext, x: int) -> int:
    return x


def no_context(x: int) -> int:
    return x


def nothing() -> None: ...


def context_second(x: int, ctx: ExecutionContext) -> None: ...


def context_by_keyword(*, ctx: ExecutionContext) -> None: ...


def star(*args: Any) -> None: ...


class Service:
    def method(self, x: int) -> None: ...

    def __call__(self, ctx: ExecutionContext) -> None: ...


async def coroutine(ctx: ExecutionContext) -> None: ...


async def async_generator(ctx: ExecutionContext) -> Any:
    yield


def generator(ctx: ExecutionContext) -> Any:
    yield


NO_CONTEXT = "has no context: write"


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (no_context, "no_context(x) has no context: write `def no_context(ctx, x):`."),
        (nothing, "nothing() has no context: write `def nothing(ctx):`."),
        (context_second, "context_second(x, ctx) has no context: write `def context_second(ctx, x):`."),
        (context_by_keyword, "context_by_keyword(ctx) has no context: write `def context_by_keyword(ctx):`."),
        (star, "star(*args) has no context: write `def star(ctx, *args):`."),
        (Service.method, "Service.method(self, x) has no context: write `def method(ctx, x):`."),
        (lambda x: x, "<lambda>(x) has no context: give it a name and write `def name(ctx, x):`."),
        (
            coroutine,
            "coroutine is async. A durable body is an ordinary function; use asgiref.sync.async_to_sync inside.",
        ),
        (
            async_generator,
            "async_generator is async. A durable body is an ordinary function; use asgiref.sync.async_to_sync inside.",
        ),
        (generator, "generator is a generator. A durable body is an ordinary function that returns its result."),
        (Service, "@durable_task needs a function, got type Service."),
        (Service(), "@durable_task needs a function, got Service "),
        (functools.partial(ordinary, x=1), "@durable_task needs a function, got partial functools.partial("),
        (print, "@durable_task needs a function, got builtin_function_or_method print."),
        (staticmethod(ordinary), "@durable_task needs a function, got staticmethod ordinary."),
        (
            shared_task(name="tests.decorator.plain")(ordinary),
            "@durable_task was put on top of a Celery task. Use @durable_task alone: it is a shared_task already and "
            "takes the same options.",
        ),
        (
            app.task(name="tests.decorator.plain_of_app")(ordinary),
            "@durable_task was put on top of a Celery task. Use @durable_task alone: it is a shared_task already and "
            "takes the same options.",
        ),
        (
            scenarios.echo,
            "@durable_task was put on top of a Celery task. Use @durable_task alone: it is a shared_task already and "
            "takes the same options.",
        ),
    ],
)
@pytest.mark.parametrize("options", [{}, {"max_retries": 0}])
def test_what_cannot_be_a_body_is_refused_when_it_is_decorated(fn: Any, text: str, options: Any) -> None:
    with pytest.raises(TypeError) as refusal:
        durable_task(**options)(fn) if options else durable_task(fn)
    assert str(refusal.value).startswith(text)


def test_a_bound_task_is_refused_with_what_to_write() -> None:
    with pytest.raises(TypeError) as refusal:
        durable_task(bind=True)(ordinary)
    assert str(refusal.value) == (
        "ordinary has bind=True. A durable body gets ctx as its first argument; ctx.task is the task."
    )


@pytest.mark.parametrize("wrong", [5, "name", ["queue"], types.SimpleNamespace()])
def test_options_are_passed_by_name(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^Use @durable_task or @durable_task\(option=value\)\.$"):
        durable_task(wrong)
    with pytest.raises(TypeError, match=r"^Use @durable_task or @durable_task\(option=value\)\.$"):
        durable_task(ordinary, max_retries=1)


def test_the_context_may_have_another_name_if_it_is_annotated() -> None:
    def plain(context, x=1):  # type: ignore[no-untyped-def]
        return x

    def annotated(run_of_it: ExecutionContext, x: int = 2) -> int:
        return x

    def positional_only(ctx: ExecutionContext, /, **rest: int) -> int:
        return rest["ctx"]

    assert [task.run(None) for task in (durable(plain), durable(annotated))] == [1, 2]
    assert durable(positional_only).run(None, ctx=3) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_retries": -1}, "max_retries must be None or an int from 0 to 1000000, got -1."),
        ({"max_retries": "3"}, "max_retries must be None or an int from 0 to 1000000, got '3'."),
        ({"max_retries": 10**9}, "max_retries must be None or an int from 0 to 1000000, got 1000000000."),
        ({"max_retries": True}, "max_retries must be None or an int from 0 to 1000000, got True."),
        ({"max_retries": 1.5}, "max_retries must be None or an int from 0 to 1000000, got 1.5."),
        (
            {"retry_backoff": -1},
            "retry_backoff must be a bool or a number of seconds from 0 to 3162240000 (100 years), got -1.",
        ),
        (
            {"retry_backoff": "fast"},
            "retry_backoff must be a bool or a number of seconds from 0 to 3162240000 (100 years), got 'fast'.",
        ),
        (
            {"retry_backoff": float("nan")},
            "retry_backoff must be a bool or a number of seconds from 0 to 3162240000 (100 years), got nan.",
        ),
        (
            {"retry_backoff_max": True},
            "retry_backoff_max must be a number of seconds from 0 to 3162240000 (100 years), got True.",
        ),
        (
            {"retry_backoff_max": None},
            "retry_backoff_max must be a number of seconds from 0 to 3162240000 (100 years), got None.",
        ),
        (
            {"retry_backoff_max": 10**400},
            "retry_backoff_max must be a number of seconds from 0 to 3162240000 (100 years), got 1000",
        ),
        (
            {"default_retry_delay": 1e300},
            "default_retry_delay must be a number of seconds from 0 to 3162240000 (100 years), got 1e+300.",
        ),
        (
            {"default_retry_delay": float("inf")},
            "default_retry_delay must be a number of seconds from 0 to 3162240000 (100 years), got inf.",
        ),
        ({"retry_jitter": 0.5}, "retry_jitter must be True or False, got 0.5."),
        (
            {"autoretry_for": ValueError},
            "autoretry_for must be a tuple of exception classes, got <class 'ValueError'>.",
        ),
        (
            {"autoretry_for": ("ValueError",)},
            "autoretry_for must be a tuple of exception classes, got ('ValueError',).",
        ),
        (
            {"dont_autoretry_for": (int,)},
            "dont_autoretry_for must be a tuple of exception classes, got (<class 'int'>,).",
        ),
    ],
)
def test_impossible_retry_options_are_refused(options: Any, text: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        durable(**options)(ordinary)
    assert str(refusal.value).startswith(text)
    assert len(str(refusal.value)) < 300
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"retry_kwargs": {"max_retries": 7}},
            "retry_kwargs is not taken: pass max_retries=… and default_retry_delay=… themselves.",
        ),
        ({"max_retires": 5}, 'durable_task() has no option "max_retires". Did you mean "max_retries"?'),
        ({"retry_backof": 5}, 'durable_task() has no option "retry_backof". Did you mean "retry_backoff"?'),
        ({"auto_retry_for": ()}, 'durable_task() has no option "auto_retry_for". Did you mean "autoretry_for"?'),
        ({"base": app.Task}, "base must derive from conductor_app.DurableTask, got "),
    ],
)
def test_an_option_that_would_be_lost_is_refused(options: Any, text: str) -> None:
    with pytest.raises(TypeError) as refusal:
        durable(**options)(ordinary)
    assert str(refusal.value).startswith(text)


def test_two_tasks_of_one_name_are_refused() -> None:
    durable(name="tests.decorator.twice")(ordinary)
    durable(name="tests.decorator.twice")(ordinary)  # its module was imported again
    with pytest.raises(ImproperlyConfigured) as refusal:
        durable(name="tests.decorator.twice")(context_again)
    here = "tests.integration.test_decorator"
    assert str(refusal.value) == (
        f'Two durable tasks are called "tests.decorator.twice": {here}.ordinary and {here}.context_again. '
        'Give one of them name="…".'
    )
    plain = shared_task(name="tests.decorator.plain_first")(context_again)
    assert not isinstance(app.tasks[plain.name], DurableTask)
    with pytest.raises(ImproperlyConfigured) as refusal:
        durable(name="tests.decorator.plain_first")(ordinary)
    assert str(refusal.value) == (
        f'The durable task {here}.ordinary is called "tests.decorator.plain_first", and so is a plain Celery task. '
        'Give one of them name="…".'
    )


def context_again(ctx: ExecutionContext) -> None: ...


@pytest.mark.parametrize("name", ["x" * 256, "a\n", "a\x00b"])
def test_a_name_that_cannot_be_stored_is_refused(name: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"^A task's name must be 1–255 printable characters, got '"):
        durable(name=name)(ordinary)


def test_a_durable_task_is_a_shared_task_and_takes_its_options() -> None:
    task = durable(time_limit=60, soft_time_limit=50, rate_limit="5/m", ignore_result=True)(ordinary)
    registered = app.tasks[task.name]
    assert isinstance(registered, DurableTask)
    assert registered.run is not None
    assert (registered.time_limit, registered.soft_time_limit, registered.rate_limit) == (60, 50, "5/m")
    assert registered.ignore_result is True
    assert durable_task(named).name == f"{__name__}.named"


def named(ctx: ExecutionContext) -> None: ...


def test_options_about_acknowledging_have_no_effect() -> None:
    task = durable(
        acks_late=True,
        reject_on_worker_lost=True,
        track_started=True,
        serializer="pickle",
        acks_on_failure_or_timeout=False,
    )(ordinary)
    registered = app.tasks[task.name]
    assert sorted(registered.ignored_options) == [
        *("acks_late", "acks_on_failure_or_timeout", "reject_on_worker_lost"),
        *("serializer", "track_started"),
    ]
    assert (registered.acks_late, registered.reject_on_worker_lost, registered.track_started) == (False, False, False)
    assert registered.serializer == "json"


# --------------------------------------------------------------------------------------------------- what a call stores


pytestmark = pytest.mark.django_db


def test_a_call_stores_a_queued_execution() -> None:
    result = scenarios.echo.delay(value=7)
    (execution,) = Execution.objects.all()
    assert (str(execution.pk), execution.status, execution.task) == (result.id, "queued", "tests.app.scenarios.echo")
    assert (execution.args, execution.kwargs, execution.queue) == ([], {"value": 7}, app.conf.task_default_queue)
    assert (execution.attempt, execution.max_attempts, execution.fence, execution.depth) == (1, 4, 0, 0)
    assert (execution.parent_id, execution.root_id, execution.step) == (None, execution.pk, "")
    assert execution.pk.version == 7
    assert execution.created_at <= execution.due_at
    assert (execution.started_at, execution.finished_at, execution.lease_expires_at) == (None, None, None)
    assert counts() == (1, 0, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: scenarios.add.delay(1, 2),
        lambda: scenarios.add.delay(1, y=2),
        lambda: scenarios.add.apply_async((1, 2)),
        lambda: scenarios.add.apply_async([1], {"y": 2}),
        lambda: scenarios.add.apply_async(kwargs={"x": 1, "y": 2}),
        lambda: scenarios.add.s(1, 2).delay(),
        lambda: scenarios.add.s(1).delay(2),
        lambda: scenarios.add.s(y=2).apply_async((1,)),
        lambda: scenarios.add.si(1, 2).apply_async(),
        lambda: scenarios.add.signature((1,), {"y": 2}).delay(),
        lambda: signature("tests.app.scenarios.add", (1, 2), app=app).delay(),
        lambda: chain(scenarios.add.s(1, 2)).apply_async(),
        lambda: scenarios.add.apply_async_on_commit((1, 2)),
    ],
)
def test_every_way_to_call_a_celery_task_stores_one_execution(
    call: Any, django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        call()
    go_on()
    (root,) = Execution.objects.filter(parent=None)
    assert (root.task, root.get_result()) == ("tests.app.scenarios.add", 3)


def test_an_execution_is_part_of_the_transaction_that_makes_it() -> None:
    class Undo(Exception):
        pass

    def undone() -> None:
        with transaction.atomic():
            scenarios.echo.delay()
            scenarios.echo.apply_async(idempotency_key="order-7")
            scenarios.echo.delay_on_commit()
            assert Execution.objects.count() == 2
            raise Undo

    with pytest.raises(Undo):
        undone()
    assert counts() == (0, 0, 0)
    first = scenarios.echo.apply_async(idempotency_key="order-7")
    with transaction.atomic():
        # A conflict is found in a savepoint, so the transaction goes on.
        assert scenarios.echo.apply_async(idempotency_key="order-7").id == first.id
        scenarios.echo.delay()
    assert Execution.objects.count() == 2


def test_delay_on_commit_waits_for_the_commit(django_capture_on_commit_callbacks: Any) -> None:
    with django_capture_on_commit_callbacks(execute=False) as callbacks:
        scenarios.echo.delay_on_commit(5)
        assert Execution.objects.count() == 0
    for callback in callbacks:
        callback()
    assert Execution.objects.get().args == [5]


@pytest.mark.parametrize(
    "options", [{"countdown": 60}, {"countdown": dt.timedelta(minutes=1)}, {"eta": 60}, {"eta": "text"}]
)
def test_a_countdown_or_an_eta_is_when_it_is_due(options: Any) -> None:
    if "eta" in options:
        instant = clock.read("default") + dt.timedelta(seconds=60)
        options = {"eta": instant.isoformat() if options["eta"] == "text" else instant}
    result = scenarios.echo.apply_async(**options)
    assert go_on() == 0
    advance(50)
    assert reload(result).status == "queued"
    advance(11)
    assert reload(result).status == "succeeded"


@pytest.mark.parametrize(
    "options",
    [
        {"countdown": 0},
        {"countdown": -60},
        {"eta": dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=45)))},
        {"eta": dt.datetime(2020, 1, 1)},  # noqa: DTZ001
    ],
)
def test_an_execution_that_is_due_in_the_past_runs_at_once(options: Any) -> None:
    result = scenarios.echo.apply_async(**options)
    go_on()
    assert reload(result).status == "succeeded"


def test_queue_and_priority_come_from_the_call_the_task_or_the_routes(monkeypatch: Any) -> None:
    routed = durable(name="tests.decorator.routed")(context_again)
    own = durable(queue="payments", priority=3)(context_again)
    routes = prepare([{"tests.decorator.routed": {"queue": "by-route"}}])
    monkeypatch.setattr(app.amqp, "_rtable", routes)
    monkeypatch.setattr(app.amqp, "router", app.amqp.Router(create_missing=True))

    def stored(result: Any) -> tuple[str, int | None]:
        execution = reload(result)
        return execution.queue, execution.priority

    assert stored(own.delay()) == ("payments", 3)
    assert stored(own.apply_async(queue="other", priority=9)) == ("other", 9)
    assert stored(routed.delay()) == ("by-route", None)
    assert stored(routed.apply_async(queue="by-call")) == ("by-call", None)
    assert stored(scenarios.echo.delay()) == (app.conf.task_default_queue, None)


def test_a_childs_queue_and_priority_come_from_the_call_its_signature_or_its_task() -> None:
    child = durable(queue="payments", priority=3)(context_again)

    @durable
    def parent(ctx: ExecutionContext) -> None:
        ctx.invoke("own", child)
        ctx.invoke("call", child, queue="other", priority=0)
        ctx.invoke("signature", child.s().set(queue="third", priority=1))
        ctx.invoke("plain", scenarios.echo)

    root = run(parent)
    assert root.status == "succeeded", root.error_message
    assert {row.step: (row.queue, row.priority) for row in root.children.all()} == {
        "own": ("payments", 3),
        "call": ("other", 0),
        "signature": ("third", 1),
        "plain": (app.conf.task_default_queue, None),
    }


# ---------------------------------------------------------------------------------------------------------- its outcome


def test_get_result_returns_the_result_or_raises_what_became_of_it() -> None:
    succeeded = run(scenarios.echo, value={"a": (1,)})
    for name in (
        succeeded,
        succeeded.pk,
        str(succeeded.pk),
        succeeded.pk.hex,
        scenarios.echo.AsyncResult(str(succeeded.pk)),
    ):
        assert api.get_result(name) == {"a": [1]}
    with pytest.raises(ExecutionFailed, match=r"^Child execution failed: card declined$"):
        api.get_result(run(scenarios.parent_of_boom))


def test_get_result_gives_up_after_its_timeout_and_the_execution_goes_on() -> None:
    result = scenarios.echo.delay(5)
    for timeout, shown in ((0, "0s"), (0.05, "0.05s"), (dt.timedelta(milliseconds=20), "0.02s")):
        with pytest.raises(TimeoutError) as late:
            api.get_result(result, timeout=timeout)
        assert str(late.value) == f"Execution {result.id} is still queued after {shown}. It goes on; wait again."
    go_on()
    assert api.get_result(result, timeout=0) == 5
    assert uuid.UUID(result.id) == Execution.objects.get().pk


def test_celery_reads_from_the_header_that_an_error_callback_is_sent_as_a_task() -> None:
    """Python 3.13 warns of a ``partial`` that stands in a class as it is, and 3.14 binds it to the task."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header = durable(ordinary).__header__
    assert isinstance(header, functools.partial)
    assert isinstance(inspect.getattr_static(durable(ordinary).__class__, "__header__"), staticmethod)

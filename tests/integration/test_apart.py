"""What a body makes current ends with its run."""

from __future__ import annotations

import decimal
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from celery import shared_task, signals
from django.utils import timezone, translation

from conductor_app import ExecutionContext, testing
from conductor_app.store import clock
from tests.app import scenarios
from tests.support.bodies import child, durable, run

pytestmark = pytest.mark.django_db

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    token = tenant.set("nobody")
    language, decimals = translation.get_language(), decimal.getcontext().copy()
    yield
    tenant.reset(token)
    translation.activate(language)
    timezone.deactivate()  # not the one before: whoever changes TIME_ZONE next would have that one still
    decimal.setcontext(decimals)
    clock.reset()


def current() -> list[Any]:
    return [
        translation.get_language(),
        timezone.get_current_timezone_name(),
        tenant.get(),
        decimal.getcontext().prec,
    ]


def activate() -> None:
    translation.activate("de")
    timezone.activate("Asia/Tokyo")
    tenant.set("acme")
    decimal.getcontext().prec = 5


ACTIVE = ["de", "Asia/Tokyo", "acme", 5]


def test_each_run_begins_with_what_no_body_has_left() -> None:
    before = current()
    seen: list[list[Any]] = []

    @durable(max_retries=1, retry_backoff=False, default_retry_delay=0)
    def body(ctx: ExecutionContext) -> None:
        seen.append(current())
        activate()
        ctx.invoke("child", task, {"levels": 0})
        ctx.sleep("pause", 60)
        assert current() == ACTIVE
        if ctx.attempt == 1:
            raise ConnectionError

    @durable
    def task(ctx: ExecutionContext, levels: int) -> None:
        seen.append(current())
        activate()
        ctx.step("step", int)
        assert current() == ACTIVE

    assert run(body).status == "succeeded"
    assert seen == [before] * 5
    assert current() == before


def test_a_step_sees_and_sets_what_is_current_in_its_body() -> None:
    @durable
    def body(ctx: ExecutionContext) -> list[Any]:
        activate()
        found = ctx.step("look", current)

        def change() -> None:
            tenant.set("other")

        ctx.step("set", change)
        return [found, tenant.get()]

    assert run(body).get_result() == [ACTIVE, "other"]


def test_a_plain_child_leaves_nothing_either() -> None:
    @shared_task(name="tests.apart.plain")
    def plain() -> list[Any]:
        found = current()
        activate()
        return found

    before = current()

    @durable
    def body(ctx: ExecutionContext) -> list[Any]:
        return [ctx.invoke("one", plain), ctx.invoke("two", plain), current()]

    execution = run(body)
    assert execution.get_result() == [before, before, before]
    assert child(execution, "one").status == "succeeded"
    assert current() == before


def test_a_body_sees_what_signals_have_set_up_and_they_can_take_it_back() -> None:
    """As tracers do: they keep a token from the one signal to the other."""
    tokens: dict[str, Any] = {}

    def begin(task_id: str, **_kwargs: Any) -> None:
        tokens[task_id] = tenant.set("of the signal")

    def end(task_id: str, **_kwargs: Any) -> None:
        tenant.reset(tokens.pop(task_id))  # a ValueError in another context

    @durable
    def body(ctx: ExecutionContext) -> list[str]:
        seen = [tenant.get()]
        tenant.set("of the body")
        seen.append(ctx.invoke("child", scenarios.echo, {"value": tenant.get()}))
        return seen

    signals.task_prerun.connect(begin, weak=False)
    signals.task_postrun.connect(end, weak=False)
    try:
        assert run(body).get_result() == ["of the signal", "of the body"]
    finally:
        signals.task_prerun.disconnect(begin)
        signals.task_postrun.disconnect(end)
    assert tokens == {}
    assert tenant.get() == "nobody"


def test_the_test_kit_keeps_runs_apart_too() -> None:
    before = current()
    seen: list[list[Any]] = []

    @durable
    def body(ctx: ExecutionContext) -> None:
        seen.append(current())
        activate()
        ctx.sleep("pause", 60)

    testing.run(body)
    assert seen == [before, before]
    assert current() == before

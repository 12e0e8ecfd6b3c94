"""Limits beside the other features: hold, pause, unique keys, debounce, retry, cancel, schedules."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from conductor_app import Limit, api, transitions
from conductor_app.engine import claims, sweeper
from conductor_app.engine.run import RunEnded
from conductor_app.models import Execution, Place
from conductor_app.store import clock
from tests.support.bodies import durable, go_on, reload
from tests.support.executions import committing
from tests.support.schedules import schedules

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test, and takes a second for that."""
    with committing(django_db_blocker):
        yield
    clock.reset()


@pytest.fixture
def one() -> Limit:
    return Limit(f"limit-{uuid.uuid4()}", 1, holds="open")


def states(*executions: Any) -> list[str]:
    """Return how executions stand to their limit; nothing for those without a place."""
    found = dict(Place.objects.values_list("execution_id", "state"))
    return [found.get(reload(each).pk, "") for each in executions]


def waits(**options: Any) -> Any:
    @durable(**options)
    def body(ctx: Any, account: str = "a") -> str:
        ctx.wait_for("answer", "approved")
        return account

    return body


def test_a_held_execution_keeps_its_open_place_and_is_handed_none(one: Limit) -> None:
    body = waits(limits=[one])
    first, second, third = body.delay(), body.delay(), body.delay()
    go_on()
    assert states(first, second, third) == ["held", "parked", "parked"]
    api.hold(first.id, "bank incident")
    api.hold(second.id, "bank incident")
    assert sweeper.sweep(publish=False)["places"] == 0
    api.cancel(first)
    go_on()
    assert states(first, second, third) == ["", "parked", "held"]
    api.release(second.id)
    api.cancel(third)
    go_on()
    assert states(second, third) == ["held", ""]


def test_one_that_is_held_with_a_granted_place_begins_when_it_is_released(one: Limit) -> None:
    body = waits(limits=[one])
    first, second = body.delay(), body.delay()
    row = claims.take(body, reload(first).pk, "w@h")
    with pytest.raises(RunEnded, match="waits for a place"):
        claims.take(body, reload(second).pk, "w@h")
    api.cancel(first)
    transitions.cancel_running(row)
    assert states(second) == ["granted"]
    api.hold(second.id, "bank incident")
    go_on()
    assert states(second) == ["granted"]
    api.release(second.id)
    go_on()
    assert states(second) == ["held"]


def test_parked_executions_of_a_paused_task_wait_until_it_is_unpaused(one: Limit) -> None:
    body, other = waits(limits=[one]), waits(limits=[one])
    first, second, third = body.delay(), body.delay(), other.delay()
    go_on()
    api.pause(body.name, "bank incident")
    api.cancel(first)
    go_on()
    assert states(first, second, third) == ["", "parked", "held"], "the place is not kept for what may not begin"
    api.cancel(third)
    go_on()
    assert states(second) == ["parked"]
    api.unpause(body.name)
    go_on()
    assert states(second) == ["held"]


def test_a_parked_execution_is_replaced_and_so_is_a_holder(one: Limit) -> None:
    body = waits(limits=[one], unique="account", on_conflict="replace")
    holder, parked = body.delay(account="a"), body.delay(account="b")
    go_on()
    assert states(holder, parked) == ["held", "parked"]
    newer = body.delay(account="b")
    go_on()
    assert (reload(parked).status, states(parked, newer)) == ("cancelled", ["", "parked"])
    instead = body.delay(account="a")
    go_on()
    assert (reload(holder).status, states(holder)) == ("cancelled", [""])
    assert sorted(states(newer, instead)) == ["held", "parked"]


def test_a_call_that_is_put_off_finds_one_that_is_parked(one: Limit) -> None:
    body = waits(limits=[one])
    holder = body.delay(account="a")
    go_on()
    first = body.apply_async(kwargs={"account": "b"}, unique_key="k", debounce=5)
    clock.shift(dt.timedelta(seconds=6))
    go_on()
    assert states(holder, first) == ["held", "parked"]
    second = body.apply_async(kwargs={"account": "c"}, unique_key="k", debounce=5)
    assert second.id == first.id
    api.cancel(holder)
    go_on()
    clock.shift(dt.timedelta(seconds=6))
    go_on()
    assert states(first) == ["held"]
    api.send_event(first.id, "approved")
    go_on()
    assert reload(first).get_result() == "c", "the last payload counts"


def test_a_failed_holder_that_is_retried_waits_while_its_key_is_full(one: Limit) -> None:
    told: list[bool] = []

    @durable(limits=[one], max_retries=0)
    def body(ctx: Any, fails: bool) -> str:
        if fails and not told:
            told.append(True)
            raise ValueError("declined")
        ctx.wait_for("answer", "approved")
        return "done"

    first, second = body.delay(fails=True), body.delay(fails=False)
    go_on()
    assert (reload(first).status, states(first, second)) == ("failed", ["", "held"])
    api.retry(first.id)
    go_on()
    assert states(first, second) == ["parked", "held"]
    api.send_event(second.id, "approved")
    go_on()
    assert states(first, second) == ["held", ""]


def test_a_parked_execution_that_is_cancelled_and_retried_asks_again(one: Limit) -> None:
    body = waits(limits=[one])
    first, second = body.delay(), body.delay()
    go_on()
    api.cancel(second)
    go_on()
    assert (reload(second).status, states(second)) == ("cancelled", [""])
    api.retry(second.id)
    go_on()
    assert states(first, second) == ["held", "parked"]


def test_ticks_of_a_limited_task_wait_for_each_other(one: Limit) -> None:
    now = clock.read("default")
    clock.shift(now.replace(minute=30, second=0, microsecond=0) + dt.timedelta(hours=1) - now)
    with schedules() as decorate:
        task = decorate(limits=[one], overlap="allow")
        sweeper.sweep()
        for _ in range(2):
            clock.shift(dt.timedelta(hours=1))
            sweeper.sweep(publish=False)
        ticks = list(Execution.objects.filter(task=task.name).order_by("created_at"))
        assert len(ticks) == 2
        claims.take(task, ticks[0].pk, "w@h")
        with pytest.raises(RunEnded, match="waits for a place"):
            claims.take(task, ticks[1].pk, "w@h")
        assert states(*ticks) == ["held", "parked"]

"""A broker that is away delays executions and loses none."""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import transaction

from conductor_app import api
from conductor_app.engine import sweeper
from conductor_app.host import publishing
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import process
from conductor_app.transitions import dispatch
from project.celery import app
from tests.app import plain, scenarios
from tests.support import invariants
from tests.support.broker import broker_at
from tests.support.messages import needs_a_broker
from tests.support.polling import wait_until
from tests.support.proxy import Proxy
from tests.support.watching import only, wait_for_body, wait_for_status

pytestmark = [pytest.mark.usefixtures("recorded"), needs_a_broker]


@pytest.fixture
def broker() -> Any:
    """A way to the broker that can be cut."""
    with Proxy(app.conf.broker_url) as proxy:
        yield proxy


def test_executions_that_were_created_while_the_broker_was_away_are_kept_and_published_later(
    worker: Any, broker: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    started = worker()
    broker.close()
    begun = time.monotonic()
    with broker_at(broker.url), caplog.at_level(logging.WARNING):
        with transaction.atomic():
            results = [scenarios.pass_through.delay(value=value) for value in range(3)]
        results.append(scenarios.pass_through.delay(value=3))
        assert list(Execution.objects.values_list("status", flat=True)) == ["queued"] * 4
    assert time.monotonic() - begun < 5, "The caller waited for the broker"
    assert "is saved as queued and will be published when the broker is back" in caplog.text
    assert caplog.text.count("did not take the message") == 1  # After one failure the broker is left alone.
    assert [api.get_result(result, timeout=30) for result in results] == [0, 1, 2, 3]
    invariants.check(started)


def test_a_worker_whose_broker_goes_away_finishes_its_bodies_and_goes_on_when_it_is_back(
    worker: Any, broker: Proxy
) -> None:
    started = worker(concurrency=2, env={"CELERY_BROKER_URL": broker.url})
    napping = scenarios.naps.delay(seconds=1)
    wait_for_status(napping, "waiting")
    running = scenarios.waits_for_slow.delay(seconds=1)
    wait_for_body(scenarios.slow)
    broker.close()
    queued = scenarios.pass_through.delay(value="queued")
    wait_for_status(only(scenarios.slow), "succeeded")
    wait_until(lambda: only(scenarios.naps).status == "queued", message="The sweeper has stopped with the broker")
    broker.open()
    assert api.get_result(running, timeout=60) == {"slow": "done"}
    assert api.get_result(napping, timeout=30) == "rested"
    assert api.get_result(queued, timeout=30) == "queued"
    assert set(Execution.objects.values_list("attempt", flat=True)) == {1}
    assert started.is_alive


def test_plain_tasks_are_guarded_on_each_new_connection(worker: Any, broker: Proxy) -> None:
    """In a pool whose bodies run in the main process: Celery builds all tracers anew when it connects again."""
    started = worker(pool="threads", env={"CELERY_BROKER_URL": broker.url})
    for value in (1, 2):
        result = plain.invokes.delay(child=plain.echo.name, payload={"value": value})
        assert api.get_result(result, timeout=60) == {"child": value}
        broker.close()
        wait_until(lambda: "Connection to broker lost" in started.log, message="The worker has not missed the broker")
        broker.open()


@pytest.fixture
def moving_clock(transactional_db: None) -> Iterator[Callable[[float], None]]:
    """A function that moves the clock of this process by so many seconds."""
    yield lambda seconds: clock.shift(dt.timedelta(seconds=seconds))
    clock.reset()


def test_a_silent_broker_holds_nobody_up(
    moving_clock: Callable[[float], None], broker: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither refused nor closed: a frozen host, or a firewall that has forgotten the connection."""
    monkeypatch.setattr(publishing, "PUBLISH_SECONDS", 1.0)
    with broker_at(broker.url):
        scenarios.echo.delay(value=1)
        broker.silence()
        begun = time.monotonic()
        silent = scenarios.echo.delay(value=2)
        assert time.monotonic() - begun < 8, "The caller waited for the broker"
        assert dispatch.is_broker_resting()
        broker.speak()
        moving_clock(60)
        dispatch.reset_breaker()
        assert sweeper.publish_due() == 2
        # Each on a connection of its own: no confirmation is taken for another message's.
        assert Execution.objects.get(pk=silent.id).dispatches == 1


def messages_in_queue() -> int:
    """How many messages RabbitMQ holds; asked past the proxy."""
    with app.connection_for_read() as connection, connection.channel() as channel:
        return int(channel.queue_declare(app.conf.task_default_queue, passive=True).message_count)


@pytest.mark.skipif(app.connection_for_write().transport.driver_type != "amqp", reason="only RabbitMQ confirms")
def test_a_run_does_not_wait_for_a_confirmation_and_gets_over_a_connection_that_was_closed_meanwhile(
    worker: Any, broker: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process.worker.runs_ahead = True
    monkeypatch.setattr(publishing, "PUBLISH_SECONDS", 60.0)
    with broker_at(broker.url), caplog.at_level(logging.WARNING):
        first = scenarios.echo.delay(value=1)
        wait_until(lambda: messages_in_queue() == 1, message="The first message has not arrived")
        broker.silence()
        begun = time.monotonic()
        unheard = scenarios.echo.delay(value=2)
        assert time.monotonic() - begun < 5, "It waited for an answer"
        assert not dispatch.is_broker_resting()
        broker.close()
        broker.open()
        broker.speak()
        third = scenarios.echo.delay(value=3)
        assert not dispatch.is_broker_resting(), caplog.text
    assert "did not take the message" not in caplog.text
    # Before the sweeper could publish it again.
    Execution.objects.update(dispatch_at=clock.after(3_600))
    worker()
    assert [api.get_result(result, timeout=30) for result in (first, third)] == [1, 3]
    Execution.objects.filter(pk=unheard.id, status="queued").update(dispatch_at=clock.now())
    assert api.get_result(unheard, timeout=30) == 2


def test_a_long_outage_does_not_delay_the_first_publish_after_it(
    moving_clock: Callable[[float], None], broker: Proxy, settings: Any
) -> None:
    broker.close()
    with broker_at(broker.url):
        scenarios.echo.delay(value=1)
        for _ in range(8):
            moving_clock(60)
            dispatch.reset_breaker()
            assert sweeper.publish_due() == 0
        execution = only(scenarios.echo)
        assert execution.dispatch_at is not None
        wait = (execution.dispatch_at - clock.read("default")).total_seconds()
        assert wait <= settings.CONDUCTOR["REDISPATCH_SECONDS"] + dispatch.BREAKER_SECONDS
    moving_clock(10)
    assert sweeper.publish_due() == 1

"""How Celery and kombu make and route a message: relied on by ``arguments``, ``dispatch`` and ``durable_runs``."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import uuid
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from celery import VERSION, Celery, signals
from celery.exceptions import QueueNotFound
from kombu import Exchange, Queue
from kombu.utils.json import JSONEncoder, object_hook

#: 5.7 made two things of these right.
IS_5_6 = VERSION[:2] < (5, 7)


@pytest.fixture
def app() -> Celery:
    return Celery("contract", broker="memory://", set_as_current=False)


class Producer:
    """Notes what would be published."""

    connection = SimpleNamespace(_reraise_as_library_errors=nullcontext)

    def __init__(self) -> None:
        self.published: list[dict[str, Any]] = []

    def publish(self, _body: Any, **options: Any) -> None:
        self.published.append(options)


def where(app: Celery, **options: Any) -> tuple[str, str]:
    """Exchange and routing key of a message."""
    producer = Producer()
    app.amqp.send_task_message(producer, "t", app.amqp.as_task_v2("an-id", "t"), **options)
    exchange = producer.published[0]["exchange"]
    return getattr(exchange, "name", exchange), producer.published[0]["routing_key"]


def test_a_task_tells_the_options_of_its_messages(app: Celery) -> None:
    @app.task(shared=False, queue="q", priority=3, time_limit=9, soft_time_limit=8, expires=60, serializer="json")
    def task() -> None: ...

    options = task._get_exec_options()
    assert (
        options.items() >= {"queue": "q", "priority": 3, "time_limit": 9, "soft_time_limit": 8, "expires": 60}.items()
    )
    assert {"exchange", "routing_key", "delivery_mode", "compression"} <= set(options)


def test_a_message_has_headers_properties_and_a_body_of_three(app: Celery) -> None:
    message = app.amqp.as_task_v2(
        *("an-id", "a.task", (1,), {"b": 2}),
        root_id="r",
        parent_id="p",
        time_limit=9,
        soft_time_limit=8,
        shadow="s",
        retries=2,
        callbacks=["c"],
        errbacks=["e"],
        chain=["n"],
        chord="d",
        reply_to="me",
    )
    assert (message.body[0], message.body[1]) == ((1,), {"b": 2})
    assert message.body[2] == {"callbacks": ["c"], "errbacks": ["e"], "chain": ["n"], "chord": "d"}
    assert message.properties == {"correlation_id": "an-id", "reply_to": "me"}
    expected = {"id": "an-id", "task": "a.task", "root_id": "r", "parent_id": "p", "retries": 2, "shadow": "s"}
    assert message.headers.items() >= expected.items()
    assert list(message.headers["timelimit"]) == [9, 8]


def test_a_message_goes_to_its_exchange_if_it_has_a_routing_key_too(app: Celery) -> None:
    topic = Queue("orders", Exchange("orders", type="topic"), routing_key="orders.#")
    app.conf.task_queues = [Queue("plain"), topic]
    app.conf.task_default_queue = "plain"
    assert where(app, queue="plain") == ("", "plain")
    assert where(app, exchange="orders", routing_key="orders.new") == ("orders", "orders.new")
    assert where(app, exchange="orders", routing_key="orders.new", queue="plain") == ("orders", "orders.new")
    assert where(app, queue="orders", routing_key="orders.new") == ("orders", "orders.new")
    assert where(app, queue="orders") == ("orders", "orders.#")
    assert where(app, exchange="orders", queue="plain") == ("", "plain")


def test_a_route_completes_what_the_call_says_and_a_router_may_be_given(app: Celery) -> None:
    app.conf.task_routes = {"t": {"exchange": "orders", "routing_key": "new", "priority": 5}}
    assert app.amqp.router.routes
    assert app.amqp.router.route({}, "t") == {"exchange": "orders", "routing_key": "new", "priority": 5}
    assert app.amqp.router.route({"priority": 1}, "t")["priority"] == 1
    assert app.amqp.router.route({}, "other")["queue"].name == app.conf.task_default_queue

    class Given:
        @staticmethod
        def route(options: dict[str, Any], *_task: object) -> dict[str, Any]:
            return app.amqp.router.expand_destination({**options, "queue": "given"})

    sent: list[Any] = []
    app.amqp.send_task_message = lambda _producer, name, _message, **options: sent.append(options["queue"].name)
    app.send_task("t", router=Given, producer=Producer())  # type: ignore[arg-type]
    assert sent == ["given"]


def test_queues_are_known_by_name_and_alias_and_made_unless_that_is_off(app: Celery) -> None:
    queues = app.amqp.Queues([Queue("real", alias="alias")], create_missing=False)
    assert (queues.get("real").name, queues.aliases["alias"].name, queues.get("new")) == ("real", "real", None)
    assert not queues.create_missing
    made = queues.new_missing("new")
    assert (made.name, "new" in queues) == ("new", False)
    open_ones = app.amqp.Queues([Queue("real")], create_missing=True)
    assert open_ones["new"].name == "new"
    # So with 5.6 what a process publishes to is what it would consume.
    assert ("new" in open_ones.consume_from) == IS_5_6

    app.conf.task_create_missing_queues = False
    app.conf.task_queues = [Queue(app.conf.task_default_queue)]

    @app.task(shared=False)
    def task() -> None: ...

    with pytest.raises(QueueNotFound, match="Queue 'typo' missing from task_queues"):
        task.apply_async(queue="typo")


def test_publishing_asks_the_list_of_receivers_that_was_there_first(app: Celery) -> None:
    """Whether there is anybody to tell. With 5.6 a list that replaces an empty one (after a death) is not seen."""
    heard: list[str] = []

    def listen(**_arguments: Any) -> None:
        heard.append("heard")

    signal: Any = signals.before_task_publish
    kept = signal.receivers
    try:
        signal.receivers = []
        where(app, queue="q")
        signal.receivers = []
        signal.connect(listen)
        where(app, queue="q")
        assert bool(heard) == (not IS_5_6)
        heard.clear()
        where(Celery("new", broker="memory://", set_as_current=False), queue="q")
        assert heard == ["heard"]
    finally:
        signal.receivers = kept
        signal.sender_receivers_cache.clear()


def test_kombu_writes_typed_values_in_an_envelope_and_says_which_types_it_does_not_know() -> None:
    value = [dt.date(2026, 11, 28), decimal.Decimal("1.0"), uuid.UUID(int=1), b"x"]
    text = JSONEncoder(allow_nan=False, separators=(",", ":")).encode(value)
    assert json.loads(text, object_hook=object_hook) == value
    assert [set(part) for part in json.loads(text)] == [{"__type__", "__value__"}] * 4
    with pytest.raises(ValueError, match="Unsupported type") as unknown:
        object_hook({"__type__": "no such type", "__value__": 1})
    assert unknown.value.args[0] == "Unsupported type"
    with pytest.raises(ValueError, match="Invalid isoformat"):
        object_hook({"__type__": "date", "__value__": "yesterday"})


def test_the_wait_for_a_lost_process_is_a_setting(app: Celery) -> None:
    assert app.conf.worker_lost_wait == 10.0
    app.conf.worker_lost_wait = 1.0
    assert app.conf.worker_lost_wait == 1.0

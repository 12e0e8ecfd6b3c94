"""What Celery tells the receivers of ``before_task_publish``, and when: relied on by ``headers``."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, signals
from celery.app.amqp import task_message
from celery.app.task import Context

ARGUMENTS = {"sender", "signal", "body", "exchange", "routing_key", "declare", "headers", "properties", "retry_policy"}


@pytest.fixture
def app() -> Celery:
    return Celery("contract", broker="memory://", set_as_current=False)


class Stopped(Exception):
    """Nothing was published."""


class Producer:
    def __init__(self) -> None:
        self.published: list[tuple[Any, dict[str, Any]]] = []

    def publish(self, body: Any, **options: Any) -> None:
        self.published.append((body, options))
        raise Stopped


@pytest.fixture
def told() -> Any:
    seen: list[tuple[str, dict[str, Any]]] = []

    def before(**arguments: Any) -> None:
        arguments["headers"]["added"] = True
        seen.append(("before", arguments))

    def after(**arguments: Any) -> None:
        seen.append(("after", arguments))

    signals.before_task_publish.connect(before)
    signals.after_task_publish.connect(after)
    yield seen
    signals.before_task_publish.disconnect(before)
    signals.after_task_publish.disconnect(after)


def send(app: Celery, producer: Producer, **options: Any) -> Any:
    message = app.amqp.as_task_v2("an-id", "t", (1,), {"a": 2}, reply_to="r")
    with pytest.raises(Stopped):
        app.amqp.send_task_message(producer, "t", message, **options)
    return message


def test_receivers_come_before_the_producer_is_used_for_anything_else(app: Celery, told: Any) -> None:
    producer = Producer()
    message = send(app, producer, queue="q", priority=3, headers={"given": 1}, serializer="json")
    ((when, arguments),) = told
    assert when == "before"
    assert set(arguments) == ARGUMENTS
    assert arguments["sender"] == "t"
    assert arguments["body"] is message.body
    assert (arguments["exchange"], arguments["routing_key"]) == ("", "q")
    assert [queue.name for queue in arguments["declare"]] == ["q"]
    assert arguments["properties"] == {"correlation_id": "an-id", "reply_to": "r", "priority": 3}
    # What they add is found in the message that was passed.
    assert arguments["headers"] is message.headers
    assert (message.headers["given"], message.headers["added"], message.headers["id"]) == (1, True, "an-id")
    ((body, options),) = producer.published
    assert body is message.body
    assert (options["exchange"], options["routing_key"], options["headers"]) == ("", "q", message.headers)


def test_after_task_publish_has_a_part_of_the_same_arguments(app: Celery, told: Any) -> None:
    app.send_task("t", task_id="an-id")
    (_, before), (_, after) = told
    assert set(after) == {"sender", "signal", "body", "headers", "exchange", "routing_key"}
    assert {name: after[name] for name in after if name != "signal"} == {
        name: before[name] for name in after if name != "signal"
    }


def test_a_message_can_be_given_another_body() -> None:
    message = task_message({"id": 1}, {}, ((), {}, {}), None)
    assert message._replace(body=((1,), {}, {})).headers is message.headers


def test_a_receiver_that_fails_is_logged_and_does_not_stop_the_others(
    app: Celery, told: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_kwargs: Any) -> None:
        raise RuntimeError("no")

    signals.before_task_publish.connect(fail)
    try:
        send(app, Producer())
    finally:
        signals.before_task_publish.disconnect(fail)
    assert len(told) == 1
    assert "RuntimeError('no')" in caplog.text


def test_a_signal_knows_who_listens_to_a_sender(told: Any) -> None:
    signal: Any = signals.after_task_publish

    def receiver(**_kwargs: Any) -> None:
        """Listen to one task."""

    signal.connect(receiver, sender="only")
    try:
        assert receiver in signal._live_receivers("only")
        assert receiver not in signal._live_receivers("other")
        assert signal.has_listeners("only")
    finally:
        signal.disconnect(receiver, sender="only")
    assert receiver not in signal._live_receivers("only")


def test_a_request_shows_what_celery_does_not_know_as_headers() -> None:
    request: Any = Context({"id": "an-id", "task": "t", "lang": "py", "argsrepr": "", "tenant": "a"})
    assert (request.headers, request.tenant) == ({"tenant": "a"}, "a")


def test_every_header_of_a_message_is_one_that_is_known(app: Celery) -> None:
    known = {*vars(Context), "argsrepr", "compression", "kwargsrepr", "lang", "task"}
    assert set(app.amqp.as_task_v2("an-id", "t").headers) <= known


@pytest.mark.parametrize("reply_to", [None, "a-queue"])
def test_a_message_names_this_thread_for_replies_unless_told_otherwise(app: Celery, reply_to: str | None) -> None:
    sent: list[Any] = []
    vars(app.amqp)["send_task_message"] = lambda _producer, _name, message, **_options: sent.append(message)
    app.send_task("t", reply_to=reply_to, ignore_result=True)
    assert [message.properties["reply_to"] for message in sent] == [reply_to or app.thread_oid]

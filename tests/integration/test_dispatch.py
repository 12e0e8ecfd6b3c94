"""A message is a doorbell: it says little, and losing it is no news to anybody."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from amqp.exceptions import PreconditionFailed
from celery import Celery, current_app
from django.db import transaction
from kombu.exceptions import OperationalError, SerializerNotInstalled

from conductor_app import transitions
from conductor_app.engine import sweeper
from conductor_app.host import publishing
from conductor_app.models import Execution
from conductor_app.store import clock
from conductor_app.store.process import Worker, process
from conductor_app.transitions import dispatch
from conductor_app.values.payloads import dump_options
from tests.support.executions import TASK, committing, fresh, invoke, new, queued, running

pytestmark = pytest.mark.messaging
#: As it is without the fixture ``broker``.


@pytest.fixture(autouse=True)
def transactional_db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of pytest-django's, which flushes every table after each test, and takes a second for that."""
    with committing(django_db_blocker):
        yield


@pytest.fixture(autouse=True)
def broker() -> Iterator[None]:
    """As with a broker server, one that has not failed yet."""
    process.worker.is_embedded = False


class Messages(list[Any]):
    """What was sent: ``(task, message, options)`` of Celery's ``send_task_message``; or raises ``error``."""

    error: Exception | None = None
    #: Raised when a connection is opened.
    refusal: Exception | None = None
    tried = 0
    opened_connections = dropped_connections = 0

    def __init__(self, transport: types.SimpleNamespace) -> None:
        super().__init__()
        self.transport = transport
        #: Raised one after another, before ``error``.
        self.errors: list[Exception] = []

    def send(self, _producer: Any, name: str, message: Any, **options: Any) -> None:
        self.tried += 1
        if self.errors:
            raise self.errors.pop(0)
        if self.error is not None:
            raise self.error
        self.append((name, message, options))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Messages:
    """Messages in the place of a broker's queue."""

    class Connection:
        """One that was opened for an earlier message."""

        alt: tuple[str, ...] = ()
        transport = types.SimpleNamespace(driver_type="redis")
        _connection: Any = object()

        @property
        def connected(self) -> bool:
            return self._connection is not None

        def ensure_connection(self, **_options: Any) -> None:
            assert self._connection is None, "it is replaced, not kept"
            if messages.refusal is not None:
                raise messages.refusal
            self._connection = object()
            messages.opened_connections += 1

        def collect(self) -> None:
            self._connection = None
            messages.dropped_connections += 1

        def as_uri(self) -> str:
            return "broker://at-work"

        def _reraise_as_library_errors(self) -> Any:
            return nullcontext()

    class Producer:
        connection: Any = Connection()

        def __enter__(self) -> Producer:
            return self

        def __exit__(self, *_error: object) -> None:
            pass

    messages = Messages(Connection.transport)
    monkeypatch.setattr(current_app, "producer_or_acquire", lambda producer=None: Producer())
    monkeypatch.setattr(current_app.amqp, "send_task_message", messages.send)
    return messages


def test_a_message_carries_the_id_and_no_payload(sent: Messages) -> None:
    execution = queued(payload='[["the secret"],{"card":"4111"}]', queue="payments", priority=7)
    ((task, message, options),) = sent
    assert task == TASK
    assert message.headers["id"] == message.properties["correlation_id"] == str(execution.pk)
    assert message.headers["root_id"] == str(execution.pk)
    assert options["headers"]["conductor"] == "doorbell"
    assert message.headers["ignore_result"] is True
    assert (message.headers["eta"], message.headers["expires"], message.headers["retries"]) == (None, None, 0)
    assert message.body[:2] == ((), {})
    assert options["queue"].name == "payments"
    assert (options["priority"], options["serializer"], options["retry"]) == (7, "json", False)
    assert "secret" not in repr((message, options))
    assert "4111" not in repr((message, options))


def test_a_childs_message_names_its_parent_and_root(sent: Messages) -> None:
    parent = running()
    child = invoke(parent)
    headers = sent[-1][1].headers
    assert (headers["id"], headers["parent_id"], headers["root_id"]) == (str(child.pk), str(parent.pk), str(parent.pk))


def test_celerys_options_are_in_every_message(sent: Messages) -> None:
    options = {"headers": {"trace": "abc"}, "time_limit": 30, "soft_time_limit": 20, "shadow": "shown", "link": []}
    execution = queued(options=dump_options(options))
    dispatch.publish(execution)
    assert len(sent) == 2
    for _task, message, sent_options in sent:
        assert message.headers["timelimit"] == [30, 20]
        assert message.headers["shadow"] == "shown"
        assert sent_options["headers"] == {"trace": "abc", "conductor": "doorbell"}


def test_an_exchange_takes_the_place_of_the_queue(sent: Messages) -> None:
    process.worker.is_embedded = False
    queued(options=dump_options({"exchange": "orders", "routing_key": "new"}))
    options = sent[-1][2]
    assert (options["exchange"], options["routing_key"]) == ("orders", "new")


def test_it_is_sent_after_the_commit(sent: Messages) -> None:
    with transaction.atomic():
        queued()
        assert sent == []
    assert len(sent) == 1
    with transaction.atomic():
        queued()
        transaction.set_rollback(True)
    assert len(sent) == 1


def test_a_savepoint_that_is_undone_sends_nothing(sent: Messages) -> None:
    with transaction.atomic():
        queued()
        with transaction.atomic():
            queued()
            transaction.set_rollback(True)
    assert len(sent) == 1


def test_nobody_publishes_into_the_memory_of_a_web_process(sent: Messages) -> None:
    process.worker.is_embedded = True
    queued()
    assert sent == []


def test_a_broker_that_is_away_is_nobodys_business(sent: Messages, caplog: pytest.LogCaptureFixture) -> None:
    sent.error = OperationalError("[Errno 111] Connection refused")
    later: list[str] = []
    with transaction.atomic():
        execution = queued(payload='[["the secret"],{}]')
        transaction.on_commit(lambda: later.append("still called"))
    assert later == ["still called"]
    assert fresh(execution).status == "queued"
    (record,) = [record for record in caplog.records if record.name == "conductor_app.transitions.dispatch"]
    assert record.levelno == logging.WARNING
    assert f"The execution {execution.pk} is saved as queued" in record.getMessage()
    assert "secret" not in caplog.text


def test_after_a_failure_the_broker_is_left_alone_for_a_while(sent: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    sent.error = ConnectionResetError("gone")
    queued()
    assert dispatch.is_broker_resting()
    sent.error = None
    execution = queued()
    assert sent.tried == 2, "nobody waits for a broker that has just failed"
    assert not dispatch.publish(execution)
    later = dispatch.time.monotonic() + dispatch.BREAKER_SECONDS + 1
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: later)
    assert dispatch.publish(execution)
    assert sent.tried == 3


@pytest.mark.parametrize(
    "error", [PreconditionFailed("inequivalent arg 'x-max-priority'"), ValueError("a name that is too long")], ids=repr
)
def test_a_message_that_cannot_be_sent_does_not_stop_the_others(sent: Messages, error: Exception) -> None:
    sent.error = error
    first = queued()
    assert not dispatch.publish(first)
    sent.error = None
    assert dispatch.publish(queued())


class Pool:
    """Producers that wait for no confirmation."""

    def __init__(self) -> None:
        self.acquired = 0

    @contextmanager
    def acquire(self, block: bool) -> Iterator[Any]:
        assert block
        self.acquired += 1
        with current_app.producer_or_acquire() as producer:
            yield producer


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Runs do not wait for confirmations, as in a worker whose RabbitMQ sends them."""
    pool = Pool()
    process.worker.runs_ahead = True
    monkeypatch.setattr(publishing, "_unconfirmed", lambda app, pid: pool)
    return pool


def test_what_a_commit_publishes_in_a_worker_waits_for_no_confirmation(sent: Messages, ahead: Pool) -> None:
    execution = queued()
    assert [message.headers["id"] for _task, message, _options in sent] == [str(execution.pk)]
    assert ahead.acquired == 1
    assert dispatch.publish(execution), "the sweeper waits"
    assert (len(sent), ahead.acquired) == (2, 1)


@pytest.fixture(params=["confirmed", "ahead"])
def either(request: pytest.FixtureRequest) -> None:
    """Each way to publish."""
    if request.param == "ahead":
        request.getfixturevalue("ahead")


@pytest.mark.usefixtures("either")
def test_a_connection_that_was_closed_meanwhile_is_replaced_at_once_and_only_once(
    sent: Messages, caplog: pytest.LogCaptureFixture
) -> None:
    sent.errors = [ConnectionResetError("closed while it was idle")]
    queued()
    assert (len(sent), sent.tried, sent.opened_connections) == (1, 2, 1)
    assert not dispatch.is_broker_resting()
    assert "did not take the message" not in caplog.text
    sent.errors = [ConnectionResetError("closed"), ConnectionResetError("and away")]
    queued()
    assert (len(sent), sent.tried, sent.opened_connections) == (1, 4, 2)
    assert dispatch.is_broker_resting()
    assert caplog.text.count("did not take the message") == 1


@pytest.mark.usefixtures("either")
def test_what_fails_on_a_new_connection_is_the_brokers_own_failure(sent: Messages) -> None:
    with current_app.producer_or_acquire() as producer:
        producer.connection.collect()
    sent.error = ConnectionResetError("away")
    queued()
    assert (sent.tried, sent.opened_connections) == (1, 1)
    assert dispatch.is_broker_resting()


@pytest.mark.usefixtures("either")
def test_a_message_that_cannot_be_sent_is_not_tried_again(sent: Messages) -> None:
    sent.error = ValueError("a name that is too long")
    queued()
    assert (sent.tried, sent.opened_connections) == (1, 0)


@pytest.mark.parametrize(
    ("alt", "named"),
    [
        ((), f"Broker {current_app.connection_for_write().as_uri()} did"),
        (("amqp://u:secret@one//", "amqp://two//"), "Broker amqp://u:**@one// and amqp://two// did"),
    ],
    ids=["one", "several"],
)
def test_the_brokers_that_were_tried_are_named(
    sent: Messages, caplog: pytest.LogCaptureFixture, alt: tuple[str, ...], named: str
) -> None:
    with current_app.producer_or_acquire() as producer:
        producer.connection.collect()
        producer.connection.alt = alt
    sent.refusal = OperationalError("refused")
    queued()
    assert named in caplog.text
    assert "secret" not in caplog.text
    dispatch.reset_breaker()
    caplog.clear()
    sent.refusal, sent.error = None, ConnectionResetError("gone")
    queued()
    assert "Broker broker://at-work did" in caplog.text, "the one that answered"


class Channel:
    """Of an idle connection that something may have forgotten."""

    def __init__(self) -> None:
        self.asked = 0
        self.error: Exception | None = None

    def basic_qos(self, *_arguments: object) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


def test_rabbitmq_is_asked_after_a_pause_whether_the_connection_lives(
    sent: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [dispatch.time.monotonic()]
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: seconds[0])
    sent.transport.driver_type = "amqp"
    with current_app.producer_or_acquire() as producer:
        kept: Any = producer.connection
        kept.default_channel = Channel()
        kept.connection = types.SimpleNamespace(
            transport=types.SimpleNamespace(having_timeout=lambda seconds: nullcontext())
        )
    queued()
    queued()
    assert (len(sent), kept.default_channel.asked) == (2, 0), "it was just used"
    seconds[0] += publishing.IDLE_SECONDS + 1
    queued()
    assert (len(sent), kept.default_channel.asked, sent.opened_connections) == (3, 1, 0)
    seconds[0] += publishing.IDLE_SECONDS + 1
    kept.default_channel.error = TimeoutError("no answer")
    queued()
    assert (len(sent), kept.default_channel.asked, sent.opened_connections) == (4, 2, 1)


@pytest.mark.parametrize("confirms", [True, False])
def test_a_worker_knows_whether_its_broker_confirms(confirms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)  # to Celery it says more than any app does
    process.worker = Worker()
    other = Celery(broker="amqp://nowhere", set_as_current=False)
    other.conf.broker_transport_options = {"confirm_publish": confirms}
    dispatch.settle_broker(other)
    assert process.worker.runs_ahead is confirms
    assert dispatch.is_embedded() is False
    other = Celery(broker="memory://", set_as_current=False)
    dispatch.settle_broker(other)
    assert dispatch.is_embedded() is True


def test_producers_that_wait_for_no_confirmation_are_apart_from_the_apps_own() -> None:
    other = Celery(broker="memory://", set_as_current=False)
    other.conf.broker_transport_options = {"confirm_publish": True, "kept": "yes"}
    with publishing._unconfirmed(other, 1).acquire(block=True) as producer:
        assert producer.connection.transport_options == {"confirm_publish": False, "kept": "yes"}
        with other.producer_or_acquire() as own:
            assert own.connection.transport_options["confirm_publish"] is True
            assert own.connection is not producer.connection


def test_an_error_of_any_kind_is_kept_from_the_caller(
    sent: Messages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that ``publish`` did not expect: the other callbacks of the commit are still called."""

    def refuse(execution: Execution) -> bool:
        raise KeyError("no such transport")

    monkeypatch.setattr(dispatch, "publish", refuse)
    later: list[str] = []
    with transaction.atomic():
        execution, _ = transitions.create(new())
        transaction.on_commit(lambda: later.append("still called"))
    assert later == ["still called"]
    assert fresh(execution).status == "queued"


def test_options_that_cannot_be_read_do_not_raise(sent: Messages) -> None:
    execution = queued()
    execution.options = "{not json"
    assert dispatch.publish(execution) is False
    assert not dispatch.is_broker_resting()


def test_a_serializer_that_is_not_there_is_no_fault_of_the_broker(sent: Messages) -> None:
    execution = queued()
    sent.error = SerializerNotInstalled("nowhere")
    assert dispatch.publish(execution) is False
    assert not dispatch.is_broker_resting()


def test_a_plain_tasks_message_carries_its_arguments_and_its_retries(sent: Messages) -> None:
    options = {"plain": {"acks_late": False}, "ignore_result": False, "serializer": "json", "headers": {"trace": "abc"}}
    execution = queued(options=dump_options(options), payload='[[1],{"y":2}]')
    execution.attempt = 3
    assert dispatch.publish(execution)
    _task, message, sent_options = sent[-1]
    assert message.body[:2] == ([1], {"y": 2})
    assert message.headers["retries"] == 2
    assert sent_options["headers"] == {"trace": "abc", "conductor": "plain", "ignore_result": False}


def test_a_row_whose_options_cannot_be_read_does_not_keep_others_from_being_published(sent: Messages) -> None:
    broken, fine = queued(), queued()
    Execution.objects.filter(pk=broken.pk).update(options="{not json")
    Execution.objects.update(dispatch_at=clock.after(-1))
    del sent[:]
    assert sweeper.publish_due() == 1
    assert sent[0][1].headers["id"] == str(fine.pk)


@pytest.mark.parametrize(
    ("url", "write_url", "embedded"),
    [
        ("memory://", None, True),
        ("memory://localhost//", None, True),
        ("redis://localhost", None, False),
        ("amqp://localhost", None, False),
        ("memory://", "amqp://localhost", False),
        (["memory://"], None, True),
        (["amqp://one", "amqp://two"], None, False),
        ("", None, False),
    ],
)
def test_embedded_is_what_has_no_broker_server(url: Any, write_url: Any, embedded: bool) -> None:
    class App:
        class conf:  # noqa: N801 - Celery's name
            broker_url = url
            broker_write_url = write_url

    assert dispatch.is_embedded(App()) is embedded


@pytest.mark.parametrize(
    ("error", "is_dropped"),
    [(OperationalError("timed out"), True), (PreconditionFailed(None, "no", None, ""), False)],
    ids=["timeout", "refusal"],
)
def test_rabbitmq_has_so_long_to_confirm_and_a_connection_that_failed_is_used_no_more(
    sent: Messages, error: Exception, is_dropped: bool
) -> None:
    """A confirmation that comes late would be taken for the next message's."""
    dispatch.publish(queued())
    assert "timeout" not in sent[-1][2], "Redis has socket_timeout"
    sent.transport.driver_type = "amqp"
    dispatch.publish(queued())
    assert sent[-1][2]["timeout"] == publishing.PUBLISH_SECONDS
    sent.error = error
    assert not dispatch.publish(queued())
    assert (sent.dropped_connections > 0) == is_dropped

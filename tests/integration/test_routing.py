"""The same task goes to the same queue, however it is started; what Celery refuses is refused at the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from celery.app.routes import prepare
from celery.exceptions import QueueNotFound
from kombu import Exchange, Queue

from conductor_app import ExecutionContext, api
from conductor_app.host.feed import Feed
from conductor_app.models import Execution
from conductor_app.store.process import process
from conductor_app.transitions import dispatch
from project.celery import app
from tests.app.plain import echo as plain_echo
from tests.app.scenarios import echo
from tests.support.bodies import durable, go_on

pytestmark = pytest.mark.django_db

Route = tuple[str | None, str | None, str | None]


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Declare these queues and routes, as the settings would."""

    def declare(*declared: Queue, routes: Any = (), create_missing: bool = True) -> None:
        known = app.amqp.Queues([Queue(app.conf.task_default_queue), *declared], create_missing=create_missing)
        monkeypatch.setitem(vars(app.amqp), "queues", known)  # its setter would make others of them
        monkeypatch.setattr(app.amqp, "_rtable", prepare(routes))
        monkeypatch.setitem(vars(app.amqp), "router", app.amqp.Router(known))

    return declare


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Route]]]:
    """Where messages go: the task, and queue, exchange and routing key as Celery passes them to kombu."""
    destinations: list[tuple[str, Route]] = []

    def send(_producer: Any, name: str, _message: Any, **options: Any) -> None:
        queue = options.get("queue")
        where = (getattr(queue, "name", queue), options.get("exchange"), options.get("routing_key"))
        destinations.append((name, where))

    connection = SimpleNamespace(
        transport=SimpleNamespace(driver_type="redis"),
        connected=True,
        as_uri=lambda: "broker://",
        _reraise_as_library_errors=nullcontext,
    )

    class Producer:
        def __init__(self) -> None:
            self.connection = connection

        def __enter__(self) -> Producer:
            return self

        def __exit__(self, *_error: object) -> None:
            pass

    monkeypatch.setattr(app, "producer_or_acquire", lambda producer=None: Producer())
    monkeypatch.setattr(app.amqp, "send_task_message", send)
    process.worker.is_embedded = False
    yield destinations
    dispatch.reset_breaker()


ORDERS = Queue("orders", Exchange("orders", type="topic"), routing_key="orders.#")


@pytest.mark.parametrize(
    ("route", "where", "queue"),
    [
        ({"queue": "orders"}, ("orders", None, None), "orders"),
        ({"exchange": "orders", "routing_key": "orders.new.eu"}, (None, "orders", "orders.new.eu"), "orders"),
        ({"exchange": Exchange("orders"), "routing_key": "orders.x"}, (None, "orders", "orders.x"), "orders"),
        ({"queue": "orders", "routing_key": "orders.new"}, ("orders", None, "orders.new"), "orders"),
        ({"exchange": "elsewhere", "routing_key": "x"}, (None, "elsewhere", "x"), None),
    ],
    ids=str,
)
def test_a_route_is_the_same_for_every_way_to_start(
    queues: Any, sent: list[tuple[str, Route]], route: dict[str, Any], where: Route, queue: str | None
) -> None:
    child = durable(name="tests.routing.child")(lambda ctx, n=0: n)
    queues(ORDERS, routes=[{child.name: route, plain_echo.name: route}])

    @durable
    def parent(ctx: ExecutionContext) -> None:
        ctx.start("started", child)
        ctx.start("plain", plain_echo, {"value": 1})
        ctx.map("mapped", child, [{"n": 1}, {"n": 2}])

    rows = Execution.objects.filter(task__in=[child.name, plain_echo.name])
    with dispatch.inline():
        child.delay()
        child.s().apply_async()
        parent.delay()
        go_on()
        other = child.apply_async(countdown=3_600)
        api.cancel(other)
        api.retry(other)
    assert {row.queue for row in rows} == {queue or app.conf.task_default_queue}
    assert len(rows) == 7
    for row in rows:
        del sent[:]
        assert dispatch.publish(row)
        assert sent == [(row.task, where)]


def test_a_route_that_looks_at_arguments_is_asked_once(queues: Any, sent: list[tuple[str, Route]]) -> None:
    """A message does not carry them."""

    def by_region(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_kwargs: Any) -> Any:
        return {"queue": f"orders-{kwargs['value']}", "priority": 7} if name == echo.name else None

    queues(routes=[by_region])
    result = echo.apply_async(kwargs={"value": "eu"})
    row = Execution.objects.get(pk=result.id)
    del sent[:]
    assert dispatch.publish(row)
    assert (row.queue, row.priority, sent) == ("orders-eu", 7, [(echo.name, ("orders-eu", None, None))])


@pytest.mark.parametrize("routes", [(), [{"some.other": {"queue": "orders"}}]], ids=["no routes", "routes"])
def test_a_queue_that_is_missing_is_refused_at_the_call(queues: Any, routes: Any) -> None:
    queues(ORDERS, routes=routes, create_missing=False)
    with pytest.raises(QueueNotFound, match="Queue 'typo' missing from task_queues"):
        echo.apply_async((1,), queue="typo")
    with pytest.raises(QueueNotFound, match="typo"):
        plain_echo.apply_async((1,), queue="typo")  # Celery's own
    assert not Execution.objects.exists()
    assert Execution.objects.get(pk=echo.apply_async((1,), queue="orders").id).queue == "orders"

    caught = []

    @durable
    def parent(ctx: ExecutionContext) -> None:
        for child in (echo, plain_echo):
            for call in (ctx.invoke, ctx.start):
                try:
                    call(f"{child.name}.{call.__name__}", child, {"value": 1}, queue="typo")
                except QueueNotFound as error:
                    caught.append(error)

    result = parent.delay()
    go_on()
    assert api.get_result(result, timeout=0) is None
    assert len(caught) == 4


def test_a_queue_that_is_new_is_not_one_that_this_process_serves(queues: Any) -> None:
    queues()
    feed = Feed(SimpleNamespace(app=app, hostname="w@h"))
    served = list(feed._queues())
    echo.apply_async((1,), queue="new")
    assert "new" not in app.amqp.queues
    app.amqp.queues["routed"]
    assert feed._queues() == served == [app.conf.task_default_queue]

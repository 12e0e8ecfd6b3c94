"""Messages for durable tasks that somebody else publishes by name: Beat, another project, another language."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import pytest
from celery import chain, chord, states
from celery.exceptions import ChordError, TaskRevokedError
from django_celery_results.models import TaskResult
from kombu import Exchange, Queue

from conductor_app import api
from conductor_app.host.inline import run_until_idle
from conductor_app.models import Execution
from conductor_app.transitions import dispatch
from project.celery import app
from tests.app import canvas, scenarios
from tests.app.ledger import count
from tests.app.models import Ledger
from tests.support import deliveries, results
from tests.support.broker import purge
from tests.support.polling import wait_until

PATIENCE = 60
ADD = "tests.app.scenarios.add"


@pytest.fixture(autouse=True)
def _empty_queue(db: None) -> None:
    purge(["adopted"])


def publish(*args: Any, task: str = ADD, **options: Any) -> Any:
    """Publish as somebody else, and take the message from the broker."""
    deliveries.stranger().send_task(task, args, **options)
    return deliveries.take()


def adopted(task: str = ADD) -> Execution:
    return Execution.objects.get(task=task, parent=None)


def test_a_message_becomes_one_execution_however_often_it_is_delivered(db: None) -> None:
    task_id = str(uuid.uuid4())
    message = publish(1, 2, task_id=task_id)
    for _ in range(3):
        deliveries.deliver(message)
    assert str(adopted().pk) == task_id
    assert adopted().status == "waiting"
    assert app.AsyncResult(task_id).state == "SUSPENDED"
    run_until_idle(app)
    deliveries.deliver(message)
    assert app.AsyncResult(task_id).get(timeout=PATIENCE) == 3
    assert (count("body", task_id), Execution.objects.count()) == (2, 2)
    assert TaskResult.objects.count() == results.IN_DATABASE


@pytest.mark.parametrize("task_id", ["order-7", "D3B07384-D113-4EC6-A1B2-8E0F6D1C2A3B", "urn:uuid:c157a790" * 8])
def test_the_publishers_task_id_names_the_result_whatever_it_looks_like(db: None, task_id: str) -> None:
    app.AsyncResult(task_id).forget()  # of an earlier run of this test, if a server keeps it
    for _ in range(2):
        deliveries.deliver(publish(1, 2, task_id=task_id))
    assert app.AsyncResult(task_id).state == "SUSPENDED"
    run_until_idle(app)
    assert app.AsyncResult(task_id).get(timeout=PATIENCE) == 3
    assert list(TaskResult.objects.values_list("task_id", flat=True)) == [task_id][: results.IN_DATABASE]
    assert api.get_result(adopted()) == 3


def test_what_the_publisher_added_to_the_message_outlives_a_suspension(db: None) -> None:
    deliveries.deliver(
        publish(
            1,
            2,
            headers={"tenant": "a"},
            stamped_headers=["batch"],
            batch="b-1",
            shadow="add for tenant a",
            time_limit=90,
            soft_time_limit=60,
            root_id="r",
            parent_id="p",
        )
    )
    resumed = deliveries.doorbell(adopted())
    assert resumed.headers[dispatch.HEADER] == dispatch.DOORBELL
    assert resumed.headers["tenant"] == "a"
    assert (resumed.headers["stamped_headers"], resumed.headers["stamps"]) == (["batch"], {"batch": "b-1"})
    assert resumed.headers["shadow"] == "add for tenant a"
    assert resumed.headers["timelimit"] == [90, 60]
    assert (resumed.headers["root_id"], resumed.headers["parent_id"]) == ("r", "p")
    assert resumed.headers["id"] == str(adopted().pk)
    # Nothing of the message's own machinery is carried along.
    assert set(adopted().get_options()["headers"]) == {"tenant"}


def test_the_canvas_of_a_message_is_acted_on_once_at_the_real_end(db: None) -> None:
    following = canvas.collect.s(key="chained").set(task_id=str(uuid.uuid4()))
    message = publish(
        1,
        2,
        link=[canvas.collect.s(key="linked")],
        link_error=[canvas.collect_error.s(key="error")],
        chain=[canvas.collect.s(key="after the chained").set(task_id=str(uuid.uuid4())), following],
    )
    deliveries.deliver(message)
    assert Execution.objects.filter(task=canvas.collect.name).count() == 0
    run_until_idle(app)
    deliveries.deliver(message)
    run_until_idle(app)
    assert {row.key: row.value for row in Ledger.objects.exclude(key="body")} == {
        "linked": "3",
        "chained": "3",
        "after the chained": "3",
    }


def test_a_part_of_a_chord_is_adopted(db: None) -> None:
    body = canvas.add_up.s().on_error(canvas.collect_error.s(key="error"))
    header = [scenarios.add.s(1, 2), scenarios.add.s(3, 4)]
    result = chord(header, body).apply_async()
    # The parts as a stranger would have published them, instead of the executions that this process has made of them.
    parts = [(row.pk, row.args, row.get_options()) for row in Execution.objects.all()]
    Execution.objects.all().delete()
    purge([])
    for task_id, args, options in parts:
        message = publish(
            *args,
            task_id=str(task_id),
            chord=options["chord"],
            group_id=options["group_id"],
            group_index=options["group_index"],
        )
        for _ in range(2):
            deliveries.deliver(message)
    run_until_idle(app)
    assert result.get(timeout=PATIENCE) == 10


def test_arguments_that_do_not_fit_fail_the_message_and_store_no_execution(db: None) -> None:
    following = canvas.collect.s(key="chained").set(task_id=str(uuid.uuid4()))
    message = publish(1, task_id="bad", link_error=[canvas.collect_error.s(key="error")], chain=[following])
    deliveries.deliver(message)
    assert not Execution.objects.filter(task=ADD).exists()
    run_until_idle(app)
    assert app.AsyncResult("bad").state == states.FAILURE
    with pytest.raises(TypeError, match=r"payload of tests\.app\.scenarios\.add does not fit .*missing a required"):
        app.AsyncResult("bad").get(timeout=PATIENCE)
    assert app.AsyncResult(following.options["task_id"]).state == states.FAILURE
    assert (Ledger.objects.get(key="error").value, count("chained")) == ("bad", 0)


def test_an_adopted_message_that_has_expired_is_not_run(db: None) -> None:
    message = publish(1, 2, task_id="late")
    # As if it had been taken from the queue in time, and had waited in the worker; brokers drop what has expired.
    message.headers["expires"] = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=30)).isoformat()
    deliveries.deliver(message)
    assert adopted().status == "queued"
    run_until_idle(app)
    assert adopted().status == "cancelled"
    with pytest.raises(TaskRevokedError, match="it expired before it started"):
        app.AsyncResult("late").get(timeout=PATIENCE)
    assert count("body") == 0


def test_an_adopted_execution_goes_on_in_the_queue_it_came_from(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue("adopted", Exchange("orders", type="topic"), routing_key="orders.add")
    monkeypatch.setitem(app.amqp.queues, "adopted", queue)
    deliveries.deliver(publish(1, 2, task_id="by default"))
    assert adopted().queue == app.conf.task_default_queue
    message = publish([1, 2], task=canvas.add_up.name)
    message.delivery_info.update(exchange="orders", routing_key="orders.add")
    deliveries.deliver(message)
    assert adopted(canvas.add_up.name).queue == "adopted"


def test_a_forged_doorbell_runs_nothing(db: None) -> None:
    """It names another task than the execution's, or an execution that is not there."""
    victim = scenarios.echo.apply_async((1,), countdown=0)
    purge([])
    deliveries.deliver(publish(1, 2, task_id=victim.id, headers={dispatch.HEADER: dispatch.DOORBELL}))
    deliveries.deliver(publish(1, 2, headers={dispatch.HEADER: dispatch.DOORBELL}))
    # Without our header, a message cannot take over an execution that is there either.
    deliveries.deliver(publish(1, 2, task_id=victim.id))
    assert list(Execution.objects.values_list("status", "attempt", "fence")) == [("queued", 1, 0)]
    assert count("body") == 0


@results.needs_broker
def test_a_worker_adopts_what_a_stranger_publishes(worker: Any) -> None:
    worker()
    stranger = deliveries.stranger()
    now = dt.datetime.now(dt.UTC)
    twice = [stranger.send_task(ADD, kwargs={"x": 1, "y": 2}, task_id="twice") for _ in range(2)]
    in_a_second = stranger.send_task(ADD, (3, 4), countdown=1)
    eta = stranger.send_task(ADD, (5, 6), eta=now + dt.timedelta(seconds=1))
    expired = stranger.send_task(ADD, (7, 8), countdown=1, expires=0.5)
    ignored = stranger.send_task(ADD, (9, 10), ignore_result=True)
    bad = stranger.send_task(ADD, ("only one",))
    chained = chain(
        stranger.signature(ADD, (1, 1)), stranger.signature(ADD, (1,)), stranger.signature(canvas.pass_on.name)
    ).apply_async()
    failing = chord(
        [stranger.signature(canvas.fail_late.name, (1,), app=stranger), canvas.pass_on.s(1)],
        canvas.collect.s(key="body").on_error(canvas.collect_error.s(key="chord error")),
        app=app,
    ).apply_async()

    def result(published: Any) -> Any:
        return app.AsyncResult(published.id)

    assert [result(one).get(timeout=PATIENCE) for one in (twice[0], in_a_second, eta, chained)] == [3, 7, 11, 3]
    with pytest.raises(TypeError, match="missing a required argument"):
        result(bad).get(timeout=PATIENCE)
    wait_until(lambda: Execution.objects.filter(pk=ignored.id, status="succeeded"))
    wait_until(lambda: result(failing).state == "FAILURE")
    assert isinstance(result(failing).result, ChordError)
    results.settled()
    assert (count("chord error"), count("body", failing.id)) == (1, 0)
    assert result(ignored).state == states.PENDING
    # The broker may have dropped the expired message before a worker saw it.
    assert not Execution.objects.filter(pk=expired.id).exclude(status="cancelled").exists()
    assert Execution.objects.filter(task=ADD, parent=None).exclude(pk=expired.id).count() == 6

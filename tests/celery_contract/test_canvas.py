"""Signatures, callbacks and result backends: relied on by ``announcements`` and ``durable``."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
from celery import Celery, chain, chord, group, states
from celery.app.task import Context
from celery.backends.base import Backend, DisabledBackend
from celery.canvas import Signature, maybe_signature
from celery.contrib.django.task import DjangoTask
from celery.utils.functional import head_from_fun
from django.db import router
from django_celery_results.backends.database import DatabaseBackend, trigger_callback
from django_celery_results.models import ChordCounter, TaskResult
from kombu.utils.json import dumps, loads

from project.celery import app as project_app


@pytest.fixture
def app() -> Celery:
    return Celery("contract", broker="memory://", backend="cache+memory://", set_as_current=False)


@pytest.fixture
def add(app: Celery) -> Any:
    @app.task(name="add", shared=False)
    def add(x: int = 0, y: int = 0) -> int:
        return x + y

    return add


def ids(signature: Any) -> list[str]:
    """All task ids in a stored signature."""
    if isinstance(signature, dict):
        own = [signature["options"]["task_id"]] if (signature.get("options") or {}).get("task_id") else []
        return own + [found for value in signature.values() for found in ids(value)]
    if isinstance(signature, (list, tuple)):
        return [found for item in signature for found in ids(item)]
    return []


def test_freezing_fixes_every_id_and_a_copy_keeps_them(app: Celery, add: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent twice, a stored canvas calls the same tasks twice, and not other ones."""
    sent: list[Any] = []
    monkeypatch.setattr(app, "send_task", lambda *_args, **options: sent.append(options))
    for canvas in (
        chain(add.s(1), add.s(2), app=app),
        group([add.s(1), add.s(2)], app=app),
        chord([add.s(1), add.s(2)], add.s(), app=app),
        chain(add.s(1), group([add.s(2), add.s(3)], app=app), add.s(4), app=app),
    ):
        canvas.freeze()
        stored = dumps(dict(canvas))
        runs = []
        for _ in range(2):
            sent.clear()
            maybe_signature(loads(stored), app=app).apply_async()
            runs.append({options["task_id"] for options in sent} | {*ids([options.get("chain") for options in sent])})
        assert runs[0] == runs[1]
        assert runs[0] <= set(ids(loads(stored)))


def test_only_freezing_sets_an_address_for_replies(app: Celery, add: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So `calls` tells an id that a canvas has made from one that somebody has chosen."""
    got: list[Any] = []
    monkeypatch.setattr(add, "apply_async", lambda *_args, **options: got.append(options))
    add.s(1).apply_async(task_id="chosen")
    add.s(1).set(task_id="chosen").apply_async()
    assert [set(options) for options in got] == [{"task_id"}] * 2
    got.clear()
    frozen = add.s(1)
    frozen.freeze()
    frozen.apply_async()
    chain(add.s(1), add.s(2), app=app).apply_async()
    group([add.s(1)], app=app).apply_async()
    assert all({"task_id", "reply_to"} <= set(options) for options in got)
    assert not any(options.get("parent_id") for options in got)


def test_what_follows_a_task_is_called_with_its_id_as_the_parent(
    app: Celery, add: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from celery.app.trace import build_tracer

    sent: list[Any] = []
    monkeypatch.setattr(app, "send_task", lambda name, *_args, **options: sent.append((name, options)))
    following = dict(Signature("next", app=app, options={"task_id": "n"}))
    request = {"id": "first", "callbacks": [Signature("link", app=app)], "chain": [following]}
    build_tracer(add.name, add, app=app)("first", (1,), {}, request)
    assert [(name, options["parent_id"]) for name, options in sent] == [("link", "first"), ("next", "first")]


def test_a_signature_is_a_dict_and_keeps_its_own_id(app: Celery, add: Any) -> None:
    signature = add.s(1)
    assert isinstance(signature, dict)
    assert signature.get("subtask_type") is None
    assert {"task", "args", "kwargs", "options"} <= set(signature)
    fixed = signature.clone()
    fixed.options["task_id"] = "mine"
    assert "task_id" not in signature.options
    assert fixed.freeze().id == "mine"
    assert [chain(add.s(), add.s()).get("subtask_type"), group([add.s()]).get("subtask_type")] == ["chain", "group"]
    header_and_body = chord([add.s()], add.s())
    assert header_and_body.get("subtask_type") == "chord"
    assert {"header", "body"} <= set(header_and_body["kwargs"])


def test_a_chain_travels_in_reverse_with_the_next_task_last(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(app, "send_task", lambda name, *args, **options: sent.append((name, options)))
    chain(*(Signature(name, app=app) for name in "abc"), app=app).apply_async()
    ((first, options),) = sent
    assert first == "a"
    assert [step["task"] for step in options["chain"]] == ["c", "b"]
    assert all(step["options"]["task_id"] for step in options["chain"])


def test_an_unregistered_task_is_sent_by_name(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(app, "send_task", lambda name, args, *_args, **options: sent.append((name, args)))
    Signature("elsewhere", app=app).apply_async((1,), parent_id="p", root_id="r")
    assert sent == [("elsewhere", (1,))]


def test_an_error_callback_with_a_bound_header_is_sent_with_the_failed_tasks_id(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other of more than one argument is called on the spot, with request, error and traceback."""
    called: list[Any] = []
    sent: list[Any] = []

    def on_error(ctx: Any, request: Any, extra: int = 0) -> None:
        called.append(request)

    bound = app.task(on_error, name="bound", shared=False, __header__=staticmethod(head_from_fun(on_error, bound=True)))
    assert isinstance(bound.__header__, functools.partial)

    @app.task(name="on the spot", shared=False)
    def on_the_spot(request: Any, exc: Any, trace: Any) -> None:
        called.append(request.id)

    monkeypatch.setattr(app, "send_task", lambda name, args, *_args, **options: sent.append((name, args, options)))
    request = Context(
        id="failed",
        errbacks=[Signature("bound", app=app, options={"task_id": "e"}), Signature("on the spot", app=app)],
        delivery_info={},
    )
    app.backend._call_task_errbacks(request, ValueError("no"), None)
    assert called == ["failed"]
    assert [(name, args, options["task_id"]) for name, args, options in sent] == [("bound", ("failed",), "e")]


def test_a_backend_is_told_of_a_failure_in_parts(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call result, chord and the rest of the chain, in any state; error callbacks only if asked for."""
    told: list[Any] = []
    monkeypatch.setattr(app.backend, "store_result", lambda id_, result, state, **_kwargs: told.append((id_, state)))
    monkeypatch.setattr(app.backend, "on_chord_part_return", lambda request, state, _result: told.append("chord"))
    monkeypatch.setattr(app.backend, "_call_task_errbacks", lambda *_args: told.append("errbacks"))
    following = Signature("next", app=app, options={"task_id": "n"})
    request = Context(id="id", chord={"task": "b"}, chain=[dict(following)], errbacks=[{"task": "e"}])
    app.backend.mark_as_failure("id", ValueError(), "trace", request=request, call_errbacks=False, state=states.REVOKED)
    assert told == [("id", "REVOKED"), "chord", ("n", "REVOKED")]
    told.clear()
    app.backend.mark_as_failure("id", ValueError(), request=request, store_result=False, call_errbacks=False)
    assert told == ["chord"]


def test_a_success_is_not_stored_for_a_request_that_ignores_it(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.backend, "store_result", lambda *_args, **_kwargs: pytest.fail("stored"))
    app.backend.mark_as_done("id", 1, request=Context(id="id", ignore_result=True))
    assert list(inspect.signature(Backend.mark_as_done).parameters)[1:5] == [
        "task_id",
        "result",
        "request",
        "store_result",
    ]


def test_no_result_backend_is_a_class_of_its_own() -> None:
    assert isinstance(Celery("none", set_as_current=False).backend, DisabledBackend)
    assert isinstance(Celery("none", backend="disabled://", set_as_current=False).backend, DisabledBackend)


def test_django_celery_results_counts_a_chord_down_in_the_callers_transaction() -> None:
    assert DatabaseBackend.TaskModel is TaskResult
    assert router.db_for_write(TaskResult) == router.db_for_write(ChordCounter)
    source = inspect.getsource(DatabaseBackend.on_chord_part_return)
    assert "transaction.atomic(using=router.db_for_write(ChordCounter))" in source
    assert "select_for_update()" in source
    # The body is called through its own attribute, on the very signature that the request holds.
    assert "maybe_signature(request.chord, app=self.app)" in source
    assert "callback.delay(ret)" in inspect.getsource(trigger_callback)
    signature = Signature("body", app=project_app)
    assert maybe_signature(signature, app=project_app) is signature


def test_a_chord_can_be_counted_only_once() -> None:
    assert ChordCounter._meta.get_field("group_id").unique


def test_every_option_that_a_message_needs_passes_through_send_task(app: Celery) -> None:
    accepted = set(inspect.signature(app.send_task).parameters)
    assert {
        "task_id",
        "root_id",
        "parent_id",
        "add_to_parent",
        "time_limit",
        "soft_time_limit",
        "shadow",
        "options",
    } <= accepted


def test_celerys_django_task_has_the_on_commit_variants() -> None:
    assert callable(DjangoTask.delay_on_commit)
    assert callable(DjangoTask.apply_async_on_commit)


def test_a_running_task_is_the_apps_current_worker_task(app: Celery) -> None:
    from celery.app.trace import build_tracer

    seen = []

    @app.task(shared=False)
    def task() -> None:
        seen.append(app.current_worker_task)

    build_tracer(task.name, task, app=app)("id", (), {}, {})
    assert seen == [task]
    assert app.current_worker_task is None


def test_a_route_names_a_queue_object(app: Celery) -> None:
    app.conf.task_routes = {"a.*": {"queue": "routed"}}
    assert app.amqp.router.route({}, "a.b", (), {}, None)["queue"].name == "routed"

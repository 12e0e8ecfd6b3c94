"""Executions in any state, made by the transitions themselves; no body runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.apps import apps
from django_celery_results.models import ChordCounter, TaskResult

from conductor_app import transitions
from conductor_app.exceptions import Failure
from conductor_app.models import Execution, OperationItem, Step
from conductor_app.states import OnTimeout
from conductor_app.store import clock
from conductor_app.store.ids import derive_child_id, new_root_id
from conductor_app.transitions import Invocation, Map, NewExecution, Sleep, creating
from project.celery import app
from tests.app.models import Ledger

TASK = "tests.app.scenarios.echo"
OWNER = "test@host/1"
FAILURE = Failure(type="builtins.ValueError", message="card declined", traceback="Traceback …")


@contextmanager
def committing(blocker: Any) -> Iterator[None]:
    """Let a test commit what it writes to our tables and to the result backend's, which are emptied afterwards.

    ``transactional_db`` empties all tables instead, and takes a second for that.
    """
    with blocker.unblock():
        try:
            yield
        finally:
            # Whatever table there is: a row that stays is the next test's.
            ours = [model for model in apps.get_app_config("conductor_app").get_models() if model is not Execution]
            for model in (ChordCounter, TaskResult, OperationItem, *ours, Ledger):
                model._base_manager.all()._raw_delete("default")
            for depth in sorted(set(Execution.objects.values_list("depth", flat=True)), reverse=True):
                Execution.objects.filter(depth=depth)._raw_delete("default")


def new(**fields: Any) -> NewExecution:
    """An execution to store."""
    values: dict[str, Any] = {
        "id": new_root_id(),
        "task": TASK,
        "queue": app.conf.task_default_queue,
        "payload": "[[],{}]",
        "max_attempts": 4,
    }
    return NewExecution(**{**values, **fields})


def unsaved(**fields: Any) -> Execution:
    """The row of a root that is queued."""
    row = creating.timeless_row(new(**fields))
    row.created_at = row.due_at = row.dispatch_at = clock.now()
    return row


def queued(**fields: Any) -> Execution:
    """A root that nobody has claimed."""
    execution, created = transitions.create(new(**fields))
    assert created
    return execution


def claimed(execution: Execution, owner: str = OWNER) -> Execution:
    """The execution, as the run that has just claimed it sees it."""
    run = transitions.claim(execution.pk, owner)
    assert run is not None, f"{fresh(execution).status} cannot be claimed"
    return run


def running(**fields: Any) -> Execution:
    """A root that a run has just claimed, as that run sees it."""
    return claimed(queued(**fields))


def invocation(parent: Execution, step: str = "child", **options: Any) -> Invocation:
    """What ``ctx.invoke`` of ``TASK`` asks for."""
    timeout = options.pop("timeout", None)
    on_timeout = OnTimeout(options.pop("on_timeout", "cancel"))
    child = new(id=derive_child_id(parent.pk, step), **options)
    return Invocation(step, child, payload_digest="", timeout=timeout, on_timeout=on_timeout)


def invoke(parent: Execution, step: str = "child", **options: Any) -> Execution:
    """Suspend a running parent on a new child, and return the queued child."""
    wait = invocation(parent, step, **options)
    assert transitions.suspend(parent, wait)
    return Execution.objects.get(pk=wait.child.id)


def family(**options: Any) -> tuple[Execution, Execution]:
    """A waiting parent and its running child, as their runs see them; ``options`` are those of ``invocation``."""
    parent = running()
    return parent, claimed(invoke(parent, **options))


def map_of(parent: Execution, count: int, **options: Any) -> Map:
    """What ``ctx.map`` of ``TASK`` asks for."""
    values: dict[str, Any] = {"timeout": None, "max_parallel": None, "fails_fast": True, **options}
    children = [new(id=derive_child_id(parent.pk, f"child[{number}]")) for number in range(count)]
    on_timeout = OnTimeout(values.pop("on_timeout", "cancel"))
    return Map("child", TASK, children, payload_digest="", on_timeout=on_timeout, **values)


def mapping(count: int, **options: Any) -> tuple[Execution, list[Execution]]:
    """A parent that waits for a map, and its children as they are stored."""
    parent = running()
    assert transitions.suspend(parent, map_of(parent, count, **options))
    return parent, list(Execution.objects.filter(parent=parent).order_by("position"))


def starting(count: int) -> tuple[Execution, list[Execution]]:
    """A running parent, and its started children as their runs see them; their steps are ``child-0`` and so on."""
    parent = running()
    steps = [f"child-{number}" for number in range(count)]
    started = [transitions.start_child(parent, invocation(parent, step)) for step in steps]
    return parent, [claimed(Execution.objects.get(pk=memory.child_id)) for memory in started]


def families(count: int) -> list[tuple[Execution, Execution]]:
    """As many families at once, copied from the rows of one."""
    template = family()
    step = step_of(template[0])
    pairs: list[tuple[Execution, Execution]] = []
    pending: list[Step] = []
    for _ in range(count):
        parent, child = (fresh(execution) for execution in template) if not pairs else map(copy.copy, pairs[0])
        parent.pk = parent.root_id = child.parent_id = child.root_id = new_root_id()
        child.pk = derive_child_id(parent.pk, child.step)
        pairs.append((parent, child))
        pending.append(copy.copy(step))
        pending[-1].pk, pending[-1].execution_id, pending[-1].child_id = None, parent.pk, child.pk
    Execution.objects.bulk_create([parent for parent, _ in pairs])
    Execution.objects.bulk_create([child for _, child in pairs])
    Step.objects.bulk_create(pending)
    return pairs


def napping(seconds: float = 60) -> Execution:
    """An execution that waits for the end of its step ``nap``."""
    execution = running()
    assert transitions.suspend(execution, Sleep("nap", seconds=seconds))
    return execution


def fresh(execution: Execution) -> Execution:
    """The row as it is now."""
    return Execution.objects.get(pk=execution.pk)


def step_of(execution: Execution, name: str = "child") -> Step:
    """A step as it is now."""
    return Step.objects.get(execution_id=execution.pk, name=name)


def snapshot() -> list[dict[str, Any]]:
    """Every row of our tables, to see that a loser has changed nothing."""
    executions = list(Execution.objects.order_by("pk").values())
    return [*executions, *Step.objects.order_by("pk").values()]

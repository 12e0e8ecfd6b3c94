"""Durable tasks in chains, groups and chords, and their callbacks: called once, at the real end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError

from conductor_app import ChildFailed, api
from conductor_app.exceptions import WorkerLost
from conductor_app.models import Execution
from conductor_app.transitions.dispatch import is_embedded
from project.celery import app
from tests.app import canvas, scenarios
from tests.app.ledger import count
from tests.app.models import Ledger
from tests.support import results
from tests.support.polling import wait_until
from tests.support.worker import pools

PATIENCE = 60


def values(key: str) -> list[str]:
    """What the ledger holds under ``key``, sorted."""
    return sorted(Ledger.objects.filter(key=key).values_list("value", flat=True))


@pools
def test_chains_go_on_and_callbacks_are_called_once_when_a_durable_task_really_ends(worker: Any, pool: str) -> None:
    link = [canvas.collect.s(key="linked"), canvas.plain_collect.s(key="linked plain")]
    error = [canvas.collect_error.s(key="error"), canvas.plain_error.s(key="error plain")]
    waiting = canvas.wait_for_ever.apply_async(link=link, link_error=error)
    worker(pool=pool)
    chains = {
        "durable": chain(canvas.pass_on.s(1), canvas.pass_on.s(), canvas.pass_on.s()),
        "plain in the middle": chain(canvas.pass_on.s(1), canvas.plain_add.s(2), canvas.pass_on.s()),
        "plain at the end": chain(canvas.pass_on.s(1), canvas.pass_on.s(), canvas.plain_add.s(3)),
        "immutable": chain(canvas.pass_on.s(1), canvas.pass_on.si(7), canvas.pass_on.s()),
        "retried": chain(canvas.flaky_parent.s(5), canvas.pass_on.s()),
        "group at the end": chain(canvas.pass_on.s(2), group(canvas.pass_on.s(), canvas.pass_on.s())),
    }
    running = {name: signature.apply_async() for name, signature in chains.items()}
    linked = [task.apply_async((8,), link=link, link_error=error) for task in (canvas.pass_on, canvas.flaky_parent)]
    failed = canvas.fail_late.apply_async(
        link=link, link_error=[canvas.broken_error.s(), *error, canvas.inline_error.s()]
    )
    failed_chain = chain(canvas.fail_late.s(1), canvas.collect.s(key="next")).apply_async(
        link_error=canvas.collect_error.s(key="chain error")
    )

    assert {name: result.get(timeout=PATIENCE) for name, result in running.items()} == {
        "durable": 1,
        "plain in the middle": 3,
        "plain at the end": 4,
        "immutable": 7,
        "retried": 5,
        "group at the end": [2, 2],
    }
    assert count("plain_add") == 2
    assert [result.get(timeout=PATIENCE) for result in linked] == [8, 8]
    for result in (failed, failed_chain):
        with pytest.raises(ChildFailed, match=r"^Child execution failed: card declined$"):
            result.get(timeout=PATIENCE)
    # Whatever it ran, the worker is idle now, but for the one that waits.
    wait_until(lambda: Execution.objects.open().count() == 1)
    wait_until(lambda: count("linked plain") >= 2 and count("error plain") >= 1 and count("chain error"))
    assert Execution.objects.get(pk=waiting.id).status == "waiting"
    assert values("linked") == values("linked plain") == ["8", "8"]
    assert values("error") == values("error plain") == [failed.id]
    assert values("inline_error") == [f"{failed.id} Child execution failed: card declined"]
    assert (count("next"), count("chain error")) == (0, 1)


@results.backends
def test_groups_and_chords(worker: Any, result_backend: str) -> None:
    ones = [canvas.pass_on.s(n) for n in range(3)]
    two = group(canvas.pass_on.s(), canvas.pass_on.s())
    expected = {
        "group": (group(ones), [0, 1, 2]),
        "chord": (chord(ones, canvas.add_up.s()), 3),
        "plain body": (chord(ones, canvas.plain_sum.s()), 3),
        "chain as its body": (chord(ones, canvas.add_up.s() | canvas.plain_add.s(4) | canvas.pass_on.s()), 7),
        "chains as its header": (
            chord(
                [canvas.pass_on.s(1) | canvas.pass_on.s(), canvas.flaky_parent.s(2) | canvas.plain_add.s(3)],
                canvas.add_up.s(),
            ),
            6,
        ),
        "in a chain": (canvas.pass_on.s(1) | chord([canvas.pass_on.s(), canvas.pass_on.s()], canvas.add_up.s()), 2),
        "in a chain, with plain tasks": (
            canvas.pass_on.s(1)
            | chord([canvas.plain_add.s(1), canvas.pass_on.s()], canvas.plain_sum.s())
            | canvas.pass_on.s(),
            3,
        ),
        "in a chord": (chord([chord(ones, canvas.add_up.s()), canvas.pass_on.s(1)], canvas.add_up.s()), 4),
        "twice in a chain": (group(ones) | canvas.add_up.s() | two | canvas.add_up.s(), 6),
    }
    if not is_embedded(app):  # where a message of this process reaches no worker
        plain = canvas.plain_add.s(1, 2)
        expected |= {
            "plain task first in a chain": (plain | canvas.pass_on.s(), 3),
            "plain task in a group": (group(plain, canvas.pass_on.s(4)), [3, 4]),
            "plain task in a chord": (chord([plain, canvas.pass_on.s(4)], canvas.add_up.s()), 7),
            "durable body alone": (chord([plain, plain], canvas.add_up.s()), 6),
        }
    error = canvas.collect_error.s(key="chord error")
    with results.using(result_backend) as env:
        worker(env=env)
        running = {name: signature.apply_async() for name, (signature, _result) in expected.items()}
        failed = chord(
            [canvas.pass_on.s(1), canvas.fail_late.s(), canvas.pass_on.s(2)],
            canvas.collect.s(key="body of a failed chord").on_error(error),
        ).apply_async()
        assert {name: result.get(timeout=PATIENCE) for name, result in running.items()} == {
            name: result for name, (_signature, result) in expected.items()
        }
        results.settled()
        assert isinstance(failed.result, ChordError)
        assert "card declined" in str(failed.result)
        assert [result.state for result in failed.parent.results] == ["SUCCESS", "FAILURE", "SUCCESS"]
    assert count("plain_sum") == 2
    assert (count("body of a failed chord"), count("chord error")) == (0, 1)
    unfinished = Execution.objects.exclude(status="succeeded").values_list("task", flat=True)
    assert sorted(unfinished) == [canvas.fail_late.name, scenarios.boom.name]


def test_an_end_without_a_run_is_told_too(worker: Any) -> None:
    """Cancelled while it waited or ran, expired before it started, lost with its process."""
    worker(conductor={"LEASE_SECONDS": 60, "HEARTBEAT_SECONDS": 0.2})
    error = [canvas.collect_error.s(key="error"), canvas.plain_error.s(key="error plain")]
    waiting = canvas.wait_for_ever.apply_async(link_error=error)
    in_chain = chain(canvas.wait_for_ever.s(), canvas.collect.s(key="next")).apply_async()
    body = canvas.collect.s(key="body").on_error(canvas.collect_error.s(key="chord error"))
    in_chord = chord([canvas.wait_for_ever.s(), canvas.pass_on.s(1)], body).apply_async()
    running = scenarios.slow.apply_async((90,), {"checkpoints": True}, link_error=error)
    expired = canvas.pass_on.apply_async((1,), countdown=60, expires=0.2, link_error=error)
    lost = canvas.die.apply_async(link_error=error)
    sleeping = Execution.objects.filter(task=canvas.wait_for_ever.name)
    wait_until(lambda: sleeping.filter(status="waiting").count() == 3 and count("body", running.id))
    for execution in [*sleeping, running]:
        assert api.cancel(execution, reason="not needed any more")

    for cancelled in (waiting, running, in_chain):
        with pytest.raises(TaskRevokedError, match="Cancelled: not needed any more"):
            cancelled.get(timeout=PATIENCE)
    with pytest.raises(TaskRevokedError, match="it expired before it started"):
        expired.get(timeout=PATIENCE)
    with pytest.raises(WorkerLost, match="Worker died"):
        lost.get(timeout=PATIENCE)
    results.settled()
    assert isinstance(in_chord.result, ChordError)
    assert "not needed any more" in str(in_chord.result)
    wait_until(lambda: count("error plain") == 4)
    assert values("error") == sorted([waiting.id, running.id, expired.id, lost.id])
    assert (count("next"), count("body", in_chord.id), count("chord error")) == (0, 0, 1)
    assert [result.state for result in (waiting, running, expired, lost)] == ["REVOKED"] * 3 + ["FAILURE"]


@results.backends
def test_callbacks_outlive_processes_that_die_between_an_outcome_and_its_announcement(
    worker: Any, tmp_path: Path, result_backend: str
) -> None:
    link = [canvas.collect.s(key="linked"), canvas.plain_collect.s(key="linked plain")]
    with results.using(result_backend) as env:
        options = {"concurrency": 4, "env": {**env, "CONDUCTOR_TEST_DIE_IN": str(tmp_path)}}
        alive = worker(**options)
        result = chord(
            [canvas.pass_on.s(point).set(link=link) for point in canvas.POINTS], canvas.collect.s(key="body")
        ).apply_async()
        chained = chain(canvas.pass_on.s(canvas.CALLBACKS_SENT), canvas.collect.s(key="next")).apply_async()
        while not (result.ready() and chained.ready()):
            # With memory://, the main process sends the callbacks, and is the one that dies while it does.
            wait_until(lambda alive=alive: not alive.is_alive or (result.ready() and chained.ready()), PATIENCE)
            if not alive.is_alive:
                assert is_embedded(app)
                # It may meet the next of these points before it is ready.
                alive = worker(**options, wait=False)
        assert result.get() == list(canvas.POINTS)
        assert chained.get() == canvas.CALLBACKS_SENT
        results.settled()
    assert all((tmp_path / point).exists() for point in canvas.POINTS)
    assert values("linked") == sorted(canvas.POINTS)
    assert (count("next"), count("body", result.id)) == (1, 1)
    if not is_embedded(app):  # where a message to a plain task dies with the worker
        wait_until(lambda: set(values("linked plain")) == set(canvas.POINTS))


def test_a_callback_that_cannot_be_called_fails_in_its_place(worker: Any) -> None:
    worker(pool="threads")
    result = chain(canvas.pass_on.s(1), canvas.pass_on.s(2, 3), canvas.collect.s(key="next")).apply_async()
    with pytest.raises(TypeError, match=r"does not fit tests\.app\.canvas\.pass_on"):
        result.get(timeout=PATIENCE)
    results.settled()
    assert result.parent.parent.get(timeout=PATIENCE) == 1
    assert count("next") == 0

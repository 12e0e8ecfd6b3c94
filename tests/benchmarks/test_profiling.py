"""Whose time a sample is."""

from __future__ import annotations

import pytest

from benchmarks.profiling import hot, owner, shares

LOOP = "_run_module_as_main (<frozen runpy>:198);loop (kombu/asynchronous/hub.py:1)"
BODY = f"{LOOP};apply_target (/x/site-packages/celery/concurrency/base.py:30);run (conductor_app/engine/executor.py:9)"


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (f"{LOOP};poll (/x/site-packages/kombu/utils/eventio.py:1)", "idle: no message"),
        (f"{LOOP};drain_events (/x/site-packages/amqp/connection.py:5)", "broker consume"),
        (f"{BODY};execute (/x/site-packages/django/db/backends/utils.py:3)", "Django"),
        (
            f"{BODY};execute (/x/site-packages/django/db/utils.py:3);wait (/x/site-packages/psycopg/connection.py:1)",
            "database driver",
        ),
        (
            f"{BODY};publish (/x/site-packages/kombu/messaging.py:1);wait (/x/site-packages/amqp/x.py:1)",
            "broker publish",
        ),
        (f"{BODY};acknowledge (conductor_app/host/request.py:1)", "broker acknowledge"),
        (BODY, "conductor_app"),
        (f"{BODY};steps (benchmarks/tasks.py:3)", "bodies"),
        (f"{BODY};sleep (time.py:3)", "other"),
    ],
)
def test_a_sample_belongs_to_the_one_who_has_the_worker(stack: str, expected: str) -> None:
    assert shares([f"thread (1);{stack} 3"]) == [(expected, 1.0)]


def test_start_up_and_other_threads_are_left_out() -> None:
    lines = [
        "thread (1);_run_module_as_main (<frozen runpy>:198);a (x.py);_find_and_load (<frozen importlib>);b (y.py) 50",
        "thread (2);_bootstrap (threading.py:1);sweep (conductor_app/host/sweeper_thread.py:1) 50",
        f"thread (1);{BODY} 1",
    ]
    assert shares(lines) == [("conductor_app", 1.0)]


def test_a_function_has_what_it_calls_outside_of_conductor_app() -> None:
    lines = [f"thread (1);{BODY};x (/x/site-packages/psycopg/a.py:1) 3", f"thread (1);{LOOP};x (y.py:1) 1"]
    assert hot(lines) == [("run (conductor_app/engine/executor.py)", 0.75)]


def test_no_samples_are_no_shares() -> None:
    assert shares([]) == []
    assert hot([]) == []
    assert owner([]) == "other"

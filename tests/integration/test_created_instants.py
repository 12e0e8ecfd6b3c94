"""Whoever hears of a new execution, or has created it, sees the instants that the database has stored."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import pytest
from django.test import TestCase

from conductor_app import signals, transitions
from conductor_app.models import Execution, database
from conductor_app.transitions import Map
from tests.support.executions import fresh, invocation, map_of, new, running

pytestmark = pytest.mark.django_db
INSTANTS = ("created_at", "due_at")


def mapped() -> None:
    parent = running()
    wait: Map = map_of(parent, 3, max_parallel=2)
    transitions.suspend(parent, wait)


@pytest.mark.parametrize(
    "create",
    [
        lambda: transitions.create(new()),
        lambda: transitions.create(new(countdown=60, expires=90)),
        lambda: transitions.create(new(eta=dt.datetime(2100, 1, 1, tzinfo=dt.UTC))),
        lambda: transitions.suspend(parent := running(), invocation(parent)),
        lambda: transitions.suspend(parent := running(), invocation(parent, countdown=60)),
        lambda: transitions.start_child(parent := running(), invocation(parent)),
        mapped,
    ],
    ids=[
        "a root",
        "a root that is due later and expires",
        "a root with an ETA",
        "a child",
        "a later child",
        "a started child",
        "a map",
    ],
)
def test_receivers_see_what_is_stored(create: Callable[[], object]) -> None:
    heard: list[Execution] = []

    def hear(execution: Execution, **_kwargs: object) -> None:
        heard.append(execution)

    signals.execution_created.connect(hear)
    try:
        with TestCase.captureOnCommitCallbacks(using=database(), execute=True):
            create()
    finally:
        signals.execution_created.disconnect(hear)
    assert heard
    for execution in heard:
        row = fresh(execution)
        assert {name: getattr(execution, name) for name in INSTANTS} == {name: getattr(row, name) for name in INSTANTS}


def test_a_root_that_is_there_already_is_returned_as_it_is_stored() -> None:
    first, is_new = transitions.create(new(idempotency_key="order-7"))
    again, is_new_again = transitions.create(new(idempotency_key="order-7"))
    assert (is_new, is_new_again, again) == (True, False, first)
    assert again.created_at == first.created_at

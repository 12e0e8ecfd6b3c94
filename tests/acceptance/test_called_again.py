"""A chain, group, chord or signature that is called again runs again, whole, as it does with stock tasks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import ANY

import celery
import pytest
from celery.exceptions import TimeoutError as LateError

from conductor_app.transitions.dispatch import is_embedded
from project.celery import app
from tests.app import shapes
from tests.app.models import Ledger
from tests.app.shapes import SHAPES, Family, Shape
from tests.support import results
from tests.support.polling import wait_until

PATIENCE = 60
#: Families by name; the stock ones say what Celery itself does.
FAMILIES: dict[str, Callable[[str], Family]] = {
    "durable": lambda shape: Family(f"{shape}, durable", shapes.durable, shapes.plain, shapes.fails),
    "suspended": lambda shape: Family(f"{shape}, suspended", shapes.suspended, shapes.plain, shapes.fails),
    "stock": lambda shape: Family(f"{shape}, stock", shapes.plain, shapes.plain, shapes.plain_fails),
}
REDIS = os.environ.get("CONDUCTOR_TEST_REDIS_URL", "")
BACKENDS = dict.fromkeys([*results.available(), *([REDIS] if REDIS and not is_embedded(app) else [])])

pytestmark = pytest.mark.parametrize("result_backend", BACKENDS, ids=lambda url: url.partition(":")[0])


@pytest.fixture
def backend(result_backend: str) -> Iterator[dict[str, str]]:
    with results.using(result_backend) as env:
        yield env


def runs(family: Family) -> Counter[str]:
    """How often each body has run, by its label."""
    return Counter(Ledger.objects.filter(key=family.shape).values_list("value", flat=True))


def taken(family: Family, shape: Shape) -> bool:
    """Whether a family can be tried with a shape here: with memory://, a message of this process reaches no worker."""
    is_stock = family.task is shapes.plain
    if celery.VERSION[:2] < shape.since:
        return False
    return not is_embedded(app) or not (is_stock or shape.has_plain)


def outcome(result: Any) -> Any:
    try:
        value = result.get(timeout=20)
    except ValueError:
        return None
    except LateError as error:
        return repr(error)
    return sorted(value) if isinstance(value, list) else value


@pytest.mark.timeout(300)
def test_every_shape_that_is_called_three_times_runs_three_times(worker: Any, backend: dict[str, str]) -> None:
    worker(pool="threads", concurrency=4, env=backend)
    started: list[tuple[Family, Shape, list[Any]]] = []
    for name, shape in SHAPES.items():
        for family in (make(name) for make in FAMILIES.values()):
            if not taken(family, shape):
                continue
            canvas, calls = shape.build(family), []
            for _ in range(3):
                calls.append(canvas.apply_async())
                if shape.one_by_one:
                    number = len(calls)
                    wait_until(lambda f=family, n=number: set(runs(f).values()) == {n}, PATIENCE)
                    outcome(calls[-1])
            started.append((family, shape, calls))
    for family, shape, _calls in started:
        wait_until(
            lambda f=family, s=shape: runs(f) >= Counter(s.runs),
            PATIENCE,
            message=lambda f=family, s=shape: f"{f.shape}: {dict(runs(f))}, expected {dict(s.runs)}",
        )
    results.settled()
    found = {
        family.shape: (dict(runs(family)), [ANY if shape.result is ANY else outcome(result) for result in calls])
        for family, shape, calls in started
    }
    assert found == {family.shape: (dict(shape.runs), [shape.result] * 3) for family, shape, _ in started}


def test_one_body_that_calls_an_object_three_times_runs_it_three_times(worker: Any, backend: dict[str, str]) -> None:
    worker(pool="threads", concurrency=4, env=backend)
    families = {is_durable: Family(f"thrice {is_durable}", None, None) for is_durable in (True, False)}
    for is_durable, family in families.items():
        if is_embedded(app):
            pytest.skip("needs a broker server: memory:// reaches no worker")
        shapes.calls_thrice.delay(family.shape, is_durable=is_durable)
    for family in families.values():
        wait_until(lambda f=family: runs(f) >= Counter(shapes.ABC), PATIENCE)
    results.settled()
    assert [dict(runs(family)) for family in families.values()] == [shapes.ABC, shapes.ABC]

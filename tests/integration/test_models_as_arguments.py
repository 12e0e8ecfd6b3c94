"""Pydantic models as arguments of calls and children, where the parameter is annotated so.

pydantic is no requirement of ``conductor_app``. Where it is not installed, a stand-in takes its place.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

import conductor_app
from conductor_app import testing
from conductor_app.exceptions import NotSerializable, PayloadMismatch
from conductor_app.models import Execution
from tests.support.bodies import child, counts, durable, failure, go_on, reload, run, start

if TYPE_CHECKING:
    from conductor_app import ExecutionContext

pytestmark = pytest.mark.django_db


class StandIn:
    """As much of ``pydantic.BaseModel`` as is called here."""

    def __init__(self, **values: Any) -> None:
        wrong = {name: value for name, value in values.items() if type(value) is not int}
        if wrong:
            raise ValueError(f"1 validation error for {type(self).__name__}")
        self.__dict__.update(values)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]

    def model_dump(self, mode: str = "python") -> dict[str, Any]:
        assert mode == "json"
        return dict(vars(self))

    @classmethod
    def model_validate(cls, value: Any) -> Any:
        return value if isinstance(value, cls) else cls(**value)


@pytest.fixture(params=["stand-in", "pydantic"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """A model class, which annotations in this module find as ``Order``."""
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "pydantic", types.SimpleNamespace(BaseModel=StandIn))  # type: ignore[arg-type]
        base: Any = StandIn
    elif importlib.util.find_spec("pydantic") is None:
        pytest.skip("pydantic is not installed")
    else:
        base = importlib.import_module("pydantic").BaseModel
    cls = type("Order", (base,), {"__annotations__": {"number": int}, "__module__": __name__})
    monkeypatch.setitem(globals(), "Order", cls)
    return cls


def bodies(order: type) -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    @durable
    def ship(ctx: ExecutionContext, order: Order, also: Order | None = None, *, last: Order | None = None) -> int:  # type: ignore[name-defined]  # noqa: F821
        seen.append((order, also, last))
        return int(order.number)

    return ship, seen


@pytest.mark.parametrize(
    "call",
    [
        lambda ship, order: ship.delay(order(number=1), order(number=2), last=order(number=3)),
        lambda ship, order: ship.delay(last=order(number=3), also=order(number=2), order=order(number=1)),
        lambda ship, order: ship.delay({"number": 1}, {"number": 2}, last={"number": 3}),
    ],
)
def test_a_model_is_stored_as_what_it_dumps_and_made_again(order: Any, call: Callable[..., Any]) -> None:
    ship, seen = bodies(order)
    result = call(ship, order)
    execution = reload(result)
    stored = sorted([*execution.args, *execution.kwargs.values()], key=lambda value: value["number"])
    assert stored == [{"number": 1}, {"number": 2}, {"number": 3}]
    go_on()
    assert seen == [(order(number=1), order(number=2), order(number=3))]
    assert reload(result).get_result() == 1


def test_models_are_payloads_of_children(order: Any) -> None:
    ship, seen = bodies(order)

    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return [
            ctx.invoke("alone", ship, order(number=1)),
            ctx.invoke("named", ship, {"order": order(number=2), "also": order(number=3)}),
            ctx.map("each", ship, [order(number=4), {"order": order(number=5)}]),
            ctx.invoke("signature", ship.s(order(number=6))),
        ]

    execution = run(parent)
    assert execution.get_result() == [1, 2, [4, 5], 6]
    assert child(execution, "named").kwargs == {"order": {"number": 2}, "also": {"number": 3}}
    assert [first.number for first, _also, _last in seen] == [1, 2, 4, 5, 6]
    assert testing.run(ship, {"order": order(number=7)}) == 7


def test_a_model_for_a_parameter_of_another_kind_is_refused_with_what_to_do(order: Any) -> None:
    @durable
    def body(ctx: ExecutionContext, order: dict[str, int], *rest: Any) -> None: ...

    for args in ((order(number=1),), ({}, order(number=1))):
        with pytest.raises(NotSerializable) as refusal:
            body.delay(*args)
        assert str(refusal.value).endswith(
            'is an Order. Annotate the parameter with its class, or pass .model_dump(mode="json").'
        )
    assert counts() == (0, 0, 0)


def test_what_a_model_does_not_take_fails_at_once(order: Any) -> None:
    ship, seen = bodies(order)
    execution = start(ship, order={"number": "x"})
    assert (execution.status, execution.attempt, seen) == ("failed", 1, [])
    assert failure(execution).error_class == f"{PayloadMismatch.__module__}.PayloadMismatch"
    assert failure(execution).message.startswith(f"The stored payload does not fit {ship.name}: 1 validation error")


def test_celery_s_own_option_makes_the_models_itself(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if order.__mro__[1] is StandIn:
        pytest.skip("Celery asks pydantic for more than the stand-in has")
    # Celery reads no annotation if one is known to type checkers alone.
    monkeypatch.setitem(globals(), "ExecutionContext", conductor_app.ExecutionContext)

    @durable(pydantic=True)
    def body(ctx: ExecutionContext, order: Order) -> int:  # type: ignore[name-defined]  # noqa: F821
        return int(order.number)

    assert run(body, order=order(number=4)).get_result() == 4
    assert Execution.objects.get().kwargs == {"order": {"number": 4}}

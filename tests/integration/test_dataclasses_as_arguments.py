"""Dataclasses as arguments of calls and children, where the parameter is annotated so."""

from __future__ import annotations

import datetime as dt
import functools
from dataclasses import InitVar, dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from conductor_app import testing
from conductor_app.exceptions import InvalidArgumentType, NotSerializable, PayloadMismatch
from conductor_app.models import Execution
from tests.support.bodies import child, counts, durable, failure, go_on, redeploy, reload, run, start

if TYPE_CHECKING:
    from conductor_app import ExecutionContext

pytestmark = pytest.mark.django_db


@dataclass(frozen=True)
class Address:
    street: str
    city: str = "Bern"


@dataclass
class Order:
    kinds: ClassVar[int] = 3
    number: int
    total: Decimal = Decimal(0)
    due: dt.date | None = None
    ships_to: Address | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class Larger(Order):
    size: int = 1


@dataclass
class Odd:
    number: int
    secret: InitVar[int] = 1

    def __post_init__(self, secret: int) -> None:
        self.hidden = secret


@dataclass
class Counted:
    number: int
    twice: int = field(init=False, default=0)


FULL = Order(7, Decimal("1.50"), dt.date(2026, 11, 29), Address("Marktgasse 1"), ["gift"])


def bodies() -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    @durable
    def ship(ctx: ExecutionContext, order: Order, also: Order | None = None, *, last: Order | None = None) -> int:
        seen.append((order, also, last))
        return order.number

    return ship, seen


def test_a_dataclass_is_stored_as_a_mapping_and_made_again() -> None:
    ship, seen = bodies()
    result = ship.delay(FULL, Order(2), last=Order(3))
    stored = reload(result)
    assert stored.args[0] == {
        "number": 7,
        "total": Decimal("1.50"),
        "due": dt.date(2026, 11, 29),
        "ships_to": {"street": "Marktgasse 1", "city": "Bern"},
        "tags": ["gift"],
    }
    go_on()
    assert seen == [(FULL, Order(2), Order(3))]
    assert reload(result).get_result() == 7


def test_a_mapping_is_taken_as_well_and_defaults_are_the_class_s() -> None:
    ship, seen = bodies()
    start(ship, order={"number": 1, "ships_to": {"street": "Kramgasse 2"}}, also=None)
    assert seen == [(Order(1, ships_to=Address("Kramgasse 2")), None, None)]


def test_dataclasses_are_payloads_of_children() -> None:
    ship, seen = bodies()

    @durable
    def parent(ctx: ExecutionContext) -> Any:
        return [
            ctx.invoke("alone", ship, Order(1)),
            ctx.invoke("named", ship, {"order": FULL, "also": Order(3)}),
            ctx.map("each", ship, [Order(4), {"order": Order(5)}]),
            ctx.invoke("signature", ship.s(Order(6))),
        ]

    execution = run(parent)
    assert execution.get_result() == [1, 7, [4, 5], 6]
    assert child(execution, "named").kwargs["order"]["ships_to"] == {"street": "Marktgasse 1", "city": "Bern"}
    assert seen[1] == (FULL, Order(3), None)
    assert testing.run(ship, {"order": Order(7)}) == 7


@pytest.mark.parametrize(
    ("order", "misfit"),
    [
        ({"number": 1, "currency": "EUR"}, "order: Order has no field 'currency'"),
        ({"total": 1}, "order: Order misses its field 'number'"),
        (
            {"number": 1, "ships_to": {"town": "Bern"}},
            "order.ships_to: Address has no field 'town'",
        ),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused_at_the_call(order: Any, misfit: str) -> None:
    ship, _seen = bodies()
    with pytest.raises(InvalidArgumentType) as refusal:
        ship.delay(order=order)
    assert str(refusal.value).endswith(misfit)
    assert counts() == (0, 0, 0)


def test_what_newer_code_has_stored_waits_for_a_worker_that_takes_it() -> None:
    ship, seen = bodies()
    result = ship.delay(Order(1))
    Execution.objects.filter(pk=result.id).update(payload='[[],{"order":{"number":1,"currency":"EUR"}}]')
    assert "has no field 'currency'" in ship.misfit(reload(result).args, reload(result).kwargs)
    go_on()  # where there is no other worker, the attempt fails
    assert seen == []
    assert failure(reload(result)).error_class == f"{PayloadMismatch.__module__}.PayloadMismatch"


def test_what_is_no_mapping_fails_at_once() -> None:
    ship, seen = bodies()
    execution = start(ship, order=7)
    assert (execution.status, execution.attempt, seen) == ("failed", 1, [])
    assert failure(execution).message.endswith("Order is made of a mapping, and int is stored")


@pytest.mark.parametrize("value", [Larger(1), Odd(1), Counted(1)], ids=["a subclass", "InitVar", "init=False"])
def test_what_could_not_be_made_again_is_refused_with_what_to_do(value: Any) -> None:
    @durable
    def body(
        ctx: ExecutionContext, order: Order | None = None, odd: Odd | None = None, counted: Counted | None = None
    ) -> None: ...

    name = {Larger: "order", Odd: "odd", Counted: "counted"}[type(value)]
    with pytest.raises(NotSerializable, match=r"Annotate the parameter with its class, or pass dataclasses\.asdict"):
        body.delay(**{name: value})
    assert counts() == (0, 0, 0)


def test_a_parameter_of_another_kind_takes_none() -> None:
    @durable
    def body(ctx: ExecutionContext, order: dict[str, int], *rest: Any, **named: Any) -> None: ...

    for args, kwargs in (((Order(1),), {}), (({}, Order(1)), {}), (({},), {"order_2": Order(1)})):
        with pytest.raises(NotSerializable, match="is an Order"):
            body.delay(*args, **kwargs)
    assert counts() == (0, 0, 0)


def test_a_body_that_is_no_plain_function_runs_as_before() -> None:
    def two(suffix: str, ctx: Any, value: str) -> str:
        return value + suffix

    @durable
    def body(ctx: ExecutionContext, value: str) -> str:
        return value

    redeploy(body, functools.partial(two, "!"))
    assert run(body, value="a").get_result() == "a!"

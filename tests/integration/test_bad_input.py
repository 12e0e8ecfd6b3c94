"""What happens to input that nobody can run: an error at the call, and nothing stored."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import io
import math
import time
import types
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group
from django.core.exceptions import ImproperlyConfigured
from django.utils.functional import SimpleLazyObject
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy

from conductor_app import ChildTimedOut, ExecutionContext, api
from conductor_app.exceptions import (
    IdempotencyConflict,
    InvalidArgument,
    InvalidArgumentType,
    MaxDepthExceeded,
    NotSerializable,
    PayloadTooLarge,
    ProgrammingError,
    StepNameReused,
    TooManySteps,
    UnknownTask,
)
from conductor_app.models import Execution
from tests.app import scenarios
from tests.app.models import Ledger
from tests.support.bodies import class_name, counts, durable, failure, reload, run

pytestmark = pytest.mark.django_db

ECHO = "tests.app.scenarios.echo(value: 'Any' = None) -> 'Any'"


class Colour(enum.Enum):
    RED = "red"


class Word(str, enum.Enum):  # noqa: UP042 - str() of it is not its value, as it is for a StrEnum
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


@dataclasses.dataclass
class Point:
    x: int = 1


Pair = collections.namedtuple("Pair", "left right")


def refused(call: Callable[[ExecutionContext], Any]) -> Exception:
    """Run ``call`` in a body, check that the execution failed at once and stored nothing, and return the error."""
    errors = []

    @durable
    def body(ctx: ExecutionContext) -> Any:
        try:
            return call(ctx)
        except Exception as error:
            errors.append(error)
            raise

    before = counts()
    execution = run(body)
    assert len(errors) == 1, f"The call was not refused: the execution {execution.status}"
    (error,) = errors
    assert isinstance(error, ProgrammingError)
    assert (execution.status, execution.attempt) == ("failed", 1)
    assert (failure(execution).error_class, failure(execution).message) == (class_name(type(error)), str(error))
    assert counts() == (before[0] + 1, before[1], before[2] + 1)
    return error


def refused_all(calls: list[tuple[Callable[[ExecutionContext, str], Any], type[Exception], str]]) -> None:
    """Make many calls in one body, each with a step name of its own, and check each error; nothing is stored."""
    found: list[tuple[type[Exception], str]] = []

    @durable
    def body(ctx: ExecutionContext) -> None:
        for index, (call, cls, _text) in enumerate(calls):
            with pytest.raises(cls) as refusal:
                call(ctx, f"s{index}")
            found.append((refusal.type, str(refusal.value).replace(f'"s{index}"', '"a"')))

    execution = run(body)
    assert (execution.status, execution.attempt) == ("succeeded", 1), execution.error_message
    assert found == [(cls, text) for _call, cls, text in calls]
    assert counts() == (1, 0, 0)


def check(error: Exception, cls: type[Exception], text: str) -> None:
    assert (type(error), str(error)) == (cls, text)


# ----------------------------------------------------------------------------------------------------------- step names

PATTERN = "must match [A-Za-z0-9][A-Za-z0-9_.:-]*: ASCII letters, digits and _ . : -"


NAMES: list[tuple[Any, type[Exception], str]] = [
    ("", InvalidArgument, "step name must be 1–128 characters"),
    (None, InvalidArgumentType, "step name must be str, got NoneType"),
    (5, InvalidArgumentType, "step name must be str, got int"),
    (b"a", InvalidArgumentType, "step name must be str, got bytes"),
    (gettext_lazy("a"), InvalidArgumentType, "step name must be str, got __proxy__"),
    (" a", InvalidArgument, f"step name ' a' {PATTERN}"),
    ("a ", InvalidArgument, f"step name 'a ' {PATTERN}"),
    ("a\n", InvalidArgument, f"step name 'a\\n' {PATTERN}"),
    ("a\x00", InvalidArgument, f"step name 'a\\x00' {PATTERN}"),
    ("a/b", InvalidArgument, f"step name 'a/b' {PATTERN}"),
    ("../../x", InvalidArgument, f"step name '../../x' {PATTERN}"),
    ("-a", InvalidArgument, f"step name '-a' {PATTERN}"),
    ("größe", InvalidArgument, f"step name 'größe' {PATTERN}"),
    ("\u0661", InvalidArgument, f"step name '\u0661' {PATTERN}"),
    ("a" * 129, InvalidArgument, "step name must be 1–128 characters: 129 > 128"),
    ("a" * 10_000, InvalidArgument, "step name must be 1–128 characters: 10000 > 128"),
]


def test_a_step_name_that_cannot_be_stored_is_refused_by_every_call() -> None:
    calls: list[Callable[[ExecutionContext, Any], Any]] = [
        lambda ctx, name: ctx.invoke(name, scenarios.echo),
        lambda ctx, name: ctx.step(name, int),
        lambda ctx, name: ctx.atomic_step(name, int),
        lambda ctx, name: ctx.sleep(name, 1),
        lambda ctx, name: ctx.sleep_until(name, dt.datetime.now(dt.UTC)),
        lambda ctx, name: ctx.idempotency_key(name),
    ]
    refused_all(
        [
            (lambda ctx, _step, call=call, name=name: call(ctx, name), cls, text)  # type: ignore[misc]
            for call in calls
            for name, cls, text in NAMES
        ]
    )


def test_a_refused_call_fails_the_execution_at_once() -> None:
    check(refused(lambda ctx: ctx.step("", int)), InvalidArgument, "step name must be 1–128 characters")
    text = 'payload["value"] is a set. Pass a sorted list.'
    check(refused(lambda ctx: ctx.invoke("a", scenarios.echo, {"value": {1}})), NotSerializable, text)


@pytest.mark.parametrize("name", ["a", "A" * 128, "0", "charge:7", "a.b_c-d", Text("text"), Word.RED])
def test_any_other_step_name_is_accepted(name: str) -> None:
    @durable
    def body(ctx: ExecutionContext) -> list[Any]:
        return [ctx.step(name, int, "3"), ctx.invoke(f"{name[:100]}-child", scenarios.echo, {"value": 4})]

    execution = run(body)
    assert execution.get_result() == [3, 4]
    assert [step.name for step in execution.steps.all()] == [str.__str__(name), f"{str.__str__(name)[:100]}-child"]


def test_step_names_that_differ_in_case_only_are_two_steps() -> None:
    @durable
    def body(ctx: ExecutionContext) -> list[int]:
        return [ctx.step("charge", int, 1), ctx.step("Charge", int, 2)]

    assert run(body).get_result() == [1, 2]


@pytest.mark.parametrize("second", ["step", "atomic_step", "invoke", "sleep", "sleep_until"])
def test_a_step_name_used_twice_is_refused_with_both_places(second: str) -> None:
    again: dict[str, Callable[[ExecutionContext], Any]] = {
        "step": lambda ctx: ctx.step("a", int),
        "atomic_step": lambda ctx: ctx.atomic_step("a", int),
        "invoke": lambda ctx: ctx.invoke("a", scenarios.echo),
        "sleep": lambda ctx: ctx.sleep("a", 1),
        "sleep_until": lambda ctx: ctx.sleep_until("a", dt.datetime.now(dt.UTC)),
    }
    call = again[second]

    @durable
    def body(ctx: ExecutionContext) -> None:
        ctx.step("a", int)
        call(ctx)

    execution = run(body)
    first = body.run.__code__.co_firstlineno + 2
    assert failure(execution).error_class == class_name(StepNameReused)
    assert failure(execution).message == (
        f'Step name "a" was already used at test_bad_input.py:{first} and again at '
        f"test_bad_input.py:{call.__code__.co_firstlineno}; give each call its own name, in a loop for example "
        'f"a-{index}".'
    )
    assert (execution.attempt, Execution.objects.count(), execution.steps.count()) == (1, 1, 1)


def test_a_loop_over_one_step_name_does_not_get_the_first_result_again() -> None:
    @durable
    def body(ctx: ExecutionContext) -> list[Any]:
        return [ctx.invoke("same", scenarios.echo, {"value": 1}) for _ in range(2)]

    execution = run(body)
    assert failure(execution).error_class == class_name(StepNameReused)
    assert (execution.attempt, execution.children.count()) == (1, 1)


# --------------------------------------------------------------------------------------------------------------- values


def deep(levels: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = wrap(value)
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def bomb() -> list[Any]:
    """90 small lists, and more values than atoms in the universe."""
    value: list[Any] = [1]
    for _ in range(90):
        value = [value, value]
    return value


async def coroutine() -> None: ...


class BrokenZone(dt.tzinfo):
    def utcoffset(self, when: dt.datetime | None) -> Any:
        raise ValueError("nowhere")


class Cunning(dict[str, Any]):
    """Has something else to say when it is encoded."""

    def __json__(self) -> str:
        return "{}"


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __hash__(self) -> int:
        return 1


NOT_JSON: list[tuple[str, Callable[[], Any], str]] = [
    ("object", object, 'payload["value"] is an object. Pass values that JSON knows, or convert it first.'),
    ("set", lambda: {"a": [0, 1, 2, {3}]}, 'payload["value"]["a"][3] is a set. Pass a sorted list.'),
    ("frozenset", lambda: (frozenset(),), 'payload["value"][0] is a frozenset. Pass a sorted list.'),
    ("generator", lambda: (x for x in "ab"), 'payload["value"] is a generator. Pass a list.'),
    ("iterator", lambda: iter([1]), 'payload["value"] is a list_iterator. Pass a list.'),
    ("range", lambda: range(3), 'payload["value"] is a range. Pass a list.'),
    ("map", lambda: map(int, "1"), 'payload["value"] is a map. Pass a list.'),
    ("dict keys", {"a": 1}.keys, 'payload["value"] is a dict_keys. Pass a list.'),
    ("deque", collections.deque, 'payload["value"] is a deque. Pass a list.'),
    ("enum", lambda: Colour.RED, 'payload["value"] is a Colour. Pass its .value.'),
    (
        "dataclass",
        Point,
        'payload["value"] is a Point. Annotate the parameter with its class, or pass dataclasses.asdict(…).',
    ),
    ("class of a dataclass", lambda: Point, 'payload["value"] is the class Point. Pass its name.'),
    ("function", lambda: run, 'payload["value"] is a function. Pass values that JSON knows, or convert it first.'),
    ("model instance", Ledger, 'payload["value"] is an instance of the model Ledger. Pass its primary key.'),
    (
        "lazy model instance",
        lambda: SimpleLazyObject(Ledger),
        'payload["value"] is an instance of the model Ledger. Pass its primary key.',
    ),
    ("queryset", Ledger.objects.all, 'payload["value"] is a QuerySet. Pass a list of primary keys.'),
    (
        "lazy text",
        lambda: gettext_lazy("Hello"),
        'payload["value"] is a lazy text. Pass str(…) of it: a translation has to be chosen now, not in the worker.',
    ),
    ("timedelta", dt.timedelta, 'payload["value"] is a timedelta. Pass .total_seconds().'),
    ("mapping", lambda: types.MappingProxyType({}), 'payload["value"] is a mappingproxy. Pass a dict.'),
    ("bytearray", bytearray, 'payload["value"] is a bytearray. Pass bytes(…).'),
    ("memoryview", lambda: memoryview(b""), 'payload["value"] is a memoryview. Pass bytes(…).'),
    ("complex", lambda: 1j, 'payload["value"] is a complex. Pass str(…).'),
    ("fraction", lambda: fractions.Fraction(1, 3), 'payload["value"] is a Fraction. Pass str(…).'),
    ("exception", lambda: ValueError("x"), 'payload["value"] is a ValueError. Pass str(…).'),
    ("file", io.BytesIO, 'payload["value"] is a BytesIO. Pass what you read from it, or its name.'),
    (
        "not implemented",
        lambda: NotImplemented,
        'payload["value"] is a NotImplementedType. Pass values that JSON knows, or convert it first.',
    ),
    ("NaN", lambda: {"x": math.nan}, 'NaN at payload["value"]["x"] is not JSON. Pass None or a string.'),
    ("infinity", lambda: -math.inf, 'Infinity at payload["value"] is not JSON. Pass None or a string.'),
    ("1e400", lambda: float("1e400"), 'Infinity at payload["value"] is not JSON. Pass None or a string.'),
    ("decimal NaN", lambda: decimal.Decimal("NaN"), 'NaN at payload["value"] is not JSON. Pass None or a string.'),
    ("decimal sNaN", lambda: decimal.Decimal("sNaN"), 'NaN at payload["value"] is not JSON. Pass None or a string.'),
    (
        "decimal infinity",
        lambda: decimal.Decimal("-Infinity"),
        'Infinity at payload["value"] is not JSON. Pass None or a string.',
    ),
    (
        "NUL",
        lambda: ["a\x00b"],
        'payload["value"][0] contains a NUL character, which PostgreSQL cannot store. Pass bytes, or strip it.',
    ),
    (
        "NUL in a key",
        lambda: {"a\x00b": 1},
        "The key 'a\\x00b' of payload[\"value\"] contains a NUL character, which PostgreSQL cannot store. "
        "Pass bytes, or strip it.",
    ),
    (
        "lone surrogate",
        lambda: "\ud800",
        'payload["value"] contains a lone surrogate, which is not valid Unicode. Pass bytes, or decode it properly.',
    ),
    (
        "integer of 5,000 digits",
        lambda: 10**5_000,
        'payload["value"] is an integer of more than 4,000 digits. Pass it as a string.',
    ),
    (
        "key of 5,000 digits",
        lambda: {10**5_000: 1},
        'payload["value"] has an integer of more than 4,000 digits as a key. Pass it as a string.',
    ),
    (
        "reserved shape",
        lambda: {"__type__": "uuid", "__value__": {"hex": "zz"}},
        'payload["value"] is a dict with exactly the keys "__type__" and "__value__", which is how typed values are '
        "stored. Rename one of them.",
    ),
    (
        "reserved shape in disguise",
        lambda: collections.OrderedDict([(Text("__value__"), 1), ("__type__", "uuid")]),
        'payload["value"] is a dict with exactly the keys "__type__" and "__value__", which is how typed values are '
        "stored. Rename one of them.",
    ),
    ("key None", lambda: {None: 1}, 'payload["value"] has the key None of type NoneType. Keys must be strings.'),
    ("key True", lambda: {True: 1}, 'payload["value"] has the key True of type bool. Keys must be strings.'),
    ("key 1.5", lambda: {1.5: 1}, 'payload["value"] has the key 1.5 of type float. Keys must be strings.'),
    ("key tuple", lambda: {(1, 2): 1}, 'payload["value"] has the key (1, 2) of type tuple. Keys must be strings.'),
    (
        "key unprintable",
        lambda: {Unprintable(): 1},
        'payload["value"] has the key ? of type Unprintable. Keys must be strings.',
    ),
    (
        "keys that collide",
        lambda: {"1": "a", 1: "b"},
        "payload[\"value\"] has the key '1' both as a string and as an integer. Use one of them.",
    ),
    (
        "long path",
        lambda: {"k" * 10_000: {"k" * 10_000: {1}}},
        'payload["value"]["kkkkkkkkkkkkkkkkkkkk…kkkkkkkkkkkkkkkk"]["kkkkkkkkkkkkkkkkkkkk…kkkkkkkkkkkkkkkk"] is a set. '
        "Pass a sorted list.",
    ),
    (
        "broken time zone",
        lambda: dt.datetime(2026, 1, 1, tzinfo=BrokenZone()),
        "payload cannot be encoded: ValueError: nowhere",
    ),
]


@pytest.mark.parametrize(("make", "text"), [case[1:] for case in NOT_JSON], ids=[case[0] for case in NOT_JSON])
def test_a_payload_that_is_not_json_is_refused_with_the_path_to_it(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(NotSerializable) as refusal:
        scenarios.echo.delay(value=make())
    assert str(refusal.value) == text
    assert counts() == (0, 0, 0)


def test_a_childs_payload_that_is_not_json_is_refused_with_the_path_to_it() -> None:
    refused_all(
        [
            (lambda ctx, step, make=make: ctx.invoke(step, scenarios.echo, {"value": make()}), NotSerializable, text)  # type: ignore[misc]
            for _name, make, text in NOT_JSON
        ]
    )


def test_the_path_starts_where_the_caller_wrote_the_payload() -> None:
    check(
        refused(lambda ctx: ctx.invoke("a", scenarios.echo, {1, 2})),
        NotSerializable,
        "payload is a set. Pass a sorted list.",
    )
    check(
        refused(lambda ctx: ctx.invoke("a", scenarios.echo, [0, {1}])),
        NotSerializable,
        "payload[1] is a set. Pass a sorted list.",
    )
    check(
        refused(lambda ctx: ctx.invoke("a", scenarios.add.s(1, {2}))),
        NotSerializable,
        "payload[1] is a set. Pass a sorted list.",
    )
    check(
        refused(lambda ctx: ctx.invoke("a", scenarios.add.s(1, y={2}))),
        NotSerializable,
        'payload["y"] is a set. Pass a sorted list.',
    )


def test_an_awaitable_is_refused_with_the_way_to_call_it() -> None:
    waiting = coroutine()
    text = "payload is a coroutine. Pass what it returns: asgiref.sync.async_to_sync calls an async function."
    check(refused(lambda ctx: ctx.invoke("a", scenarios.echo, waiting)), NotSerializable, text)
    waiting.close()


@pytest.mark.parametrize(
    ("make", "cls", "text"),
    [
        (lambda: deep(101, lambda value: [value]), NotSerializable, "is nested deeper than 100 levels. Flatten it."),
        (
            lambda: deep(100_000, lambda value: [value]),
            NotSerializable,
            "is nested deeper than 100 levels. Flatten it.",
        ),
        (
            lambda: deep(100_000, lambda value: {"a": value}),
            NotSerializable,
            "is nested deeper than 100 levels. Flatten it.",
        ),
        (
            lambda: deep(100_000, lambda value: (1, value)),
            NotSerializable,
            "is nested deeper than 100 levels. Flatten it.",
        ),
        (endless, NotSerializable, "is nested deeper than 100 levels. Flatten it."),
        (bomb, PayloadTooLarge, "more than 2097152 > 1048576 bytes"),
        (lambda: "x" * 300 * 2**20, PayloadTooLarge, "more than 2097152 > 1048576 bytes"),
        (lambda: "ü" * 10 * 2**20, PayloadTooLarge, "more than 2097152 > 1048576 bytes"),
        (lambda: b"x" * 10 * 2**20, PayloadTooLarge, "more than 2097152 > 1048576 bytes"),
        (lambda: [0] * 10**7, PayloadTooLarge, "more than 2097152 > 1048576 bytes"),
        (lambda: {"x" * 10 * 2**20: 1}, PayloadTooLarge, "more than 2097152 > 1048576 bytes"),
        (lambda: "\u2028" * 200_000, PayloadTooLarge, "too large: 1200017 > 1048576 bytes"),
    ],
    ids=["101", "lists", "dicts", "tuples", "cycle", "bomb", "300MB", "50MB", "bytes", "list", "key", "escapes"],
)
def test_a_huge_payload_is_refused_quickly(make: Callable[[], Any], cls: type, text: str) -> None:
    value = make()
    begin = time.process_time()
    with pytest.raises(cls) as refusal:
        scenarios.echo.delay(value=value)
    assert time.process_time() - begin < 10
    assert text in str(refusal.value)
    assert len(str(refusal.value)) < 300
    assert counts() == (0, 0, 0)


def test_a_childs_payload_that_is_too_large_or_too_deep_is_refused() -> None:
    deeper, larger = deep(101, lambda value: [value]), "x" * 2_000_000
    error = refused(lambda ctx: ctx.invoke("a", scenarios.echo, {"value": deeper}))
    assert isinstance(error, NotSerializable)
    error = refused(lambda ctx: ctx.invoke("a", scenarios.echo, {"value": larger}))
    assert isinstance(error, PayloadTooLarge)
    assert "too large: 2000017 > 1048576 bytes" in str(error)


def test_the_limit_of_a_payload_is_exact() -> None:
    frame = len('[[],{"value":""}]')
    limit = 1_048_576
    text = (
        f"The encoded payload is too large: {limit + 1} > {limit} bytes. Store the data elsewhere and pass a reference "
        "to it, or raise the limit in CONDUCTOR."
    )
    scenarios.echo.delay(value="x" * (limit - frame))
    with pytest.raises(PayloadTooLarge) as refusal:
        scenarios.echo.delay(value="x" * (limit - frame + 1))
    assert str(refusal.value) == text
    assert isinstance(refusal.value, ValueError)
    assert Execution.objects.count() == 1


def test_a_structure_of_100_levels_is_accepted() -> None:
    value = deep(99, lambda inner: [inner])  # the payload itself is one level
    assert run(scenarios.pass_through, value=value).get_result() == value


UTC = dt.UTC
NAIVE = dt.datetime(2026, 3, 29, 2, 30, 0, 1)  # noqa: DTZ001 - what users pass
ODD_ZONE = dt.timezone(dt.timedelta(hours=5, minutes=53, seconds=28))


#: What is passed, and what arrives.
VALUES: list[tuple[Any, Any]] = [
    (None, None),
    (0, 0),
    (False, False),
    ("", ""),
    ([], []),
    ({}, {}),
    (-0.0, -0.0),
    (1e308, 1e308),
    (10**4_000, 10**4_000),
    ("\u2028\x7f\x1b🎉", "\u2028\x7f\x1b🎉"),
    (NAIVE, NAIVE),
    (dt.datetime(2026, 1, 1, tzinfo=UTC), dt.datetime(2026, 1, 1, tzinfo=UTC)),
    (dt.datetime(1, 1, 1, tzinfo=ODD_ZONE), dt.datetime(1, 1, 1, tzinfo=ODD_ZONE)),
    (dt.date(2026, 2, 28), dt.date(2026, 2, 28)),
    (dt.time(23, 59, 59, 999_999), dt.time(23, 59, 59, 999_999)),
    (dt.time(1, 2, tzinfo=ODD_ZONE), dt.time(1, 2, tzinfo=ODD_ZONE)),
    (decimal.Decimal("0.10"), decimal.Decimal("0.10")),
    (decimal.Decimal("1e400"), decimal.Decimal("1e400")),
    (decimal.Decimal("-0"), decimal.Decimal("-0")),
    (uuid.UUID(int=7), uuid.UUID(int=7)),
    (b"", b""),
    (b"\x00\xff", b"\x00\xff"),
    (b"text", b"text"),
    ((1, (2,)), [1, [2]]),
    (Pair(1, 2), [1, 2]),
    ({1: "a", -2: "b"}, {"1": "a", "-2": "b"}),
    ({Number.ONE: 1}, {"1": 1}),
    ({Word.RED: 1}, {"red": 1}),
    ({"": 1}, {"": 1}),
    ({"__type__": "uuid"}, {"__type__": "uuid"}),
    ({"__type__": "uuid", "__value__": 1, "x": 2}, {"__type__": "uuid", "__value__": 1, "x": 2}),
    (Word.RED, "red"),
    (Number.ONE, 1),
    (Text("x"), "x"),
    (SafeString("<b>"), "<b>"),
    (Cunning(a=1), {"a": 1}),
    (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    (collections.Counter("aab"), {"a": 2, "b": 1}),
    (collections.defaultdict(list, a=[1]), {"a": [1]}),
]


def test_any_other_value_arrives_exactly_and_comes_back_exactly() -> None:
    values = [value for value, _arrives in VALUES]
    seen: list[list[Any]] = []

    @durable
    def receiver(ctx: ExecutionContext, value: list[Any]) -> Any:
        seen.append(value)
        return value

    @durable
    def body(ctx: ExecutionContext) -> Any:
        seen.append(ctx.step("step", lambda: values))
        seen.append(ctx.invoke("child", receiver, {"value": values}))
        return values

    execution = run(body)
    assert execution.status == "succeeded", execution.error_message
    # The step on the first run, the child, and both again on the replay.
    seen.append(execution.get_result())
    assert len(seen) == 5
    for found in seen:
        for value, (_passed, arrives) in zip(found, VALUES, strict=True):
            assert (value, type(value), repr(value)) == (arrives, type(arrives), repr(arrives))


def test_an_instant_comes_back_as_the_same_instant_with_an_offset_for_its_zone() -> None:
    zoneinfo = pytest.importorskip("zoneinfo")
    try:
        zone = zoneinfo.ZoneInfo("Europe/Berlin")
    except zoneinfo.ZoneInfoNotFoundError:
        pytest.skip("this machine has no time zones")
    twice = dt.datetime(2026, 10, 25, 2, 30, tzinfo=zone)
    for value in (twice, twice.replace(fold=1)):
        found = run(scenarios.pass_through, value=value).get_result()
        assert found.isoformat() == value.isoformat()


def test_the_stored_payload_is_a_copy() -> None:
    payload = {"value": [1]}
    result = scenarios.echo.delay(**payload)
    payload["value"].append(2)
    assert reload(result).kwargs == {"value": [1]}

    @durable
    def body(ctx: ExecutionContext) -> Any:
        try:
            return ctx.invoke("a", scenarios.echo, payload)
        finally:
            payload["value"].append(3)

    assert run(body).get_result() == [1, 2]


# -------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    ("make", "cls", "text"),
    [
        (object, NotSerializable, " is an object. Return values that JSON knows, or convert it first."),
        (lambda: {"a": {1}}, NotSerializable, '["a"] is a set. Return a sorted list.'),
        (lambda: (x for x in "ab"), NotSerializable, " is a generator. Return a list."),
        (Ledger, NotSerializable, " is an instance of the model Ledger. Return its primary key."),
        (
            lambda: "a\x00",
            NotSerializable,
            " contains a NUL character, which PostgreSQL cannot store. Return bytes, or strip it.",
        ),
        (
            lambda: "x" * 1_048_577,
            PayloadTooLarge,
            " is too large: 1048579 > 1048576 bytes. Store the data elsewhere and return a reference to it, or raise "
            "the limit in CONDUCTOR.",
        ),
    ],
)
def test_a_result_that_cannot_be_stored_fails_the_execution_without_running_it_again(
    make: Callable[[], Any], cls: type, text: str
) -> None:
    runs = []

    @durable
    def body(ctx: ExecutionContext) -> Any:
        runs.append(ctx.attempt)
        return make()

    execution = run(body)
    prefix = "The encoded " if cls is PayloadTooLarge else ""
    assert runs == [1]
    assert (execution.status, execution.attempt, execution.result) == ("failed", 1, None)
    assert failure(execution).error_class == class_name(cls)
    assert failure(execution).message == f"{prefix}result of {body.name}{text}"
    check(refused(lambda ctx: ctx.step("s", make)), cls, f'{prefix}result of ctx.step("s"){text}')
    check(refused(lambda ctx: ctx.atomic_step("s", make)), cls, f'{prefix}result of ctx.atomic_step("s"){text}')


# ------------------------------------------------------------------------------------------------------------- children


@pytest.mark.parametrize(
    ("child", "cls", "text"),
    [
        (
            "tests.app.scenarios.ehco",
            UnknownTask,
            'No task named "tests.app.scenarios.ehco". Did you mean "tests.app.scenarios.echo"?',
        ),
        ("os.system", UnknownTask, 'No task named "os.system". The nearest ones are '),
        ("", UnknownTask, 'No task named "". The nearest ones are '),
        ("x" * 100_000, UnknownTask, 'No task named "xxxxxxxx'),
        ("a\x00b", UnknownTask, 'No task named "a\\x00b".'),
        (
            print,
            UnknownTask,
            'ctx.invoke("a") needs a task, its name or a signature, got builtin_function_or_method print. '
            "Is @durable_task missing above its definition?",
        ),
        (lambda ctx: 1, UnknownTask, "got function <lambda>. Is @durable_task missing above its definition?"),
        (Point, UnknownTask, "got type Point. Is @durable_task missing"),
        (None, UnknownTask, "got NoneType None. Is @durable_task missing"),
        (7, UnknownTask, "got int 7. Is @durable_task missing"),
        (["x"] * 100_000, UnknownTask, "got list ['x', 'x', 'x', 'x"),
        (Unprintable(), UnknownTask, "got Unprintable ?. Is @durable_task missing"),
        (
            lambda: group(scenarios.echo.s(1), scenarios.echo.s(2)),
            InvalidArgumentType,
            'ctx.invoke("a") runs one task at a time, got a group.',
        ),
        (
            lambda: chain(scenarios.echo.s(1), scenarios.echo.s()),
            InvalidArgumentType,
            "one task at a time, got a chain.",
        ),
        (
            lambda: chord([scenarios.echo.s(1)], scenarios.echo.s()),
            InvalidArgumentType,
            "one task at a time, got a chord.",
        ),
    ],
)
def test_a_child_that_is_no_task_is_refused(child: Any, cls: type, text: str) -> None:
    made = child() if getattr(child, "__name__", "") == "<lambda>" and not child.__code__.co_argcount else child
    error = refused(lambda ctx: ctx.invoke("a", made))
    assert type(error) is cls
    assert text in str(error)
    assert len(str(error)) < 500


def test_a_task_of_another_celery_app_is_refused_by_its_name() -> None:
    from celery import Celery

    other = Celery("other", set_as_current=False)

    @other.task(name="other.work")
    def foreign() -> None: ...

    assert 'No task named "other.work".' in str(refused(lambda ctx: ctx.invoke("a", foreign)))


def test_a_signature_brings_its_arguments_and_takes_no_payload_besides() -> None:
    text = 'ctx.invoke("a") got a signature and a payload. Put the arguments into the signature.'
    check(refused(lambda ctx: ctx.invoke("a", scenarios.add.s(x=1), {"y": 2})), InvalidArgumentType, text)
    check(refused(lambda ctx: ctx.invoke("a", scenarios.add.s(x=1, y=2), {})), InvalidArgumentType, text)

    @durable
    def body(ctx: ExecutionContext) -> Any:
        return [ctx.invoke("a", scenarios.add.s(1, y=2)), ctx.invoke("b", scenarios.add.si(3, 4))]

    assert run(body).get_result() == [3, 7]


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (
            {"values": 1},
            f"payload of ctx.invoke(\"a\") does not fit {ECHO}: got an unexpected keyword argument 'values'",
        ),
        ({"ctx": 1}, f"payload of ctx.invoke(\"a\") does not fit {ECHO}: multiple values for argument 'ctx'"),
        (
            {1: 2},
            'payload of ctx.invoke("a") has the key 1 of type int: its keys are the child\'s argument names, so they '
            "must be strings.",
        ),
        (
            {None: 2},
            'payload of ctx.invoke("a") has the key None of type NoneType: its keys are the child\'s argument names, '
            "so they must be strings.",
        ),
    ],
)
def test_a_payload_that_does_not_fit_the_childs_arguments_is_refused(payload: Any, text: str) -> None:
    check(refused(lambda ctx: ctx.invoke("a", scenarios.echo, payload)), InvalidArgumentType, text)


def test_missing_and_surplus_arguments_are_refused_at_the_call() -> None:
    add = "does not fit tests.app.scenarios.add(x: 'int', y: 'int') -> 'int'"
    check(
        refused(lambda ctx: ctx.invoke("a", scenarios.add, {"x": 1})),
        InvalidArgumentType,
        f"payload of ctx.invoke(\"a\") {add}: missing a required argument: 'y'",
    )
    check(
        refused(lambda ctx: ctx.invoke("a", scenarios.add)),
        InvalidArgumentType,
        f"payload of ctx.invoke(\"a\") {add}: missing a required argument: 'x'",
    )
    before = counts()
    with pytest.raises(InvalidArgumentType, match="too many positional arguments") as refusal:
        scenarios.add.delay(1, 2, 3)
    assert str(refusal.value) == f"payload of tests.app.scenarios.add {add}: too many positional arguments"
    assert isinstance(refusal.value, TypeError)
    with pytest.raises(InvalidArgumentType, match="missing a required argument: 'y'"):
        scenarios.add.apply(args=[1])
    assert counts() == before


def test_the_context_cannot_be_passed_by_name_even_to_a_body_that_takes_everything() -> None:
    @durable
    def takes_all(ctx: ExecutionContext, **rest: Any) -> Any:
        return rest

    with pytest.raises(InvalidArgumentType, match="multiple values for argument 'ctx'"):
        takes_all.delay(ctx=1)
    assert run(takes_all, step="a", self=1, task_id="b", args=[], kwargs={}).get_result() == {
        "step": "a",
        "self": 1,
        "task_id": "b",
        "args": [],
        "kwargs": {},
    }


@pytest.mark.parametrize("payload", [0, False, "", [], "x", [1, 2], (1, 2)])
def test_a_payload_that_is_no_mapping_is_the_childs_only_argument(payload: Any) -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        return [ctx.invoke("a", scenarios.echo, payload)]

    assert run(body).get_result() == [list(payload) if isinstance(payload, tuple) else payload]


@pytest.mark.parametrize("payload", [None, {}])
def test_an_empty_payload_leaves_the_childs_defaults(payload: Any) -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        return [ctx.invoke("a", scenarios.echo, payload)]

    assert run(body).get_result() == [None]


def test_any_mapping_is_a_payload() -> None:
    from django.http import QueryDict

    @durable
    def body(ctx: ExecutionContext) -> Any:
        return [
            ctx.invoke("a", scenarios.echo, types.MappingProxyType({"value": 1})),
            ctx.invoke("b", scenarios.echo, collections.ChainMap({"value": 2})),
            ctx.invoke("c", scenarios.echo, QueryDict("value=3").dict()),
            ctx.invoke("d", scenarios.echo, {Word("red").replace("red", "value"): 4}),
        ]

    assert run(body).get_result() == [1, 2, "3", 4]


def test_a_task_that_invokes_itself_without_an_end_stops_at_the_limit(settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "MAX_DEPTH": 5}
    execution = run(scenarios.descend, levels=5)
    assert execution.get_result() == 5
    execution = run(scenarios.descend, levels=6)
    deepest = Execution.objects.filter(root=execution).order_by("-depth")[0]
    assert (execution.status, deepest.depth, deepest.attempt) == ("failed", 5, 1)
    assert failure(deepest).error_class == class_name(MaxDepthExceeded)
    assert failure(deepest).message == (
        'ctx.invoke("down") would be execution number 6 in a chain of parents and children; the limit is 5. '
        'Does tests.app.scenarios.descend invoke itself without an end? The limit is CONDUCTOR["MAX_DEPTH"].'
    )
    assert failure(execution).root_cause_id == deepest.pk
    assert failure(execution).message.startswith("Child execution failed: Child execution failed: ")
    assert issubclass(MaxDepthExceeded, RecursionError)


def test_more_steps_than_the_limit_are_refused(settings: Any) -> None:
    settings.CONDUCTOR = {**settings.CONDUCTOR, "MAX_STEPS": 3}

    @durable
    def body(ctx: ExecutionContext, steps: int) -> int:
        return sum(ctx.step(str(index), int, 1) for index in range(steps))

    assert run(body, steps=3).get_result() == 3
    execution = run(body, steps=4)
    assert (execution.attempt, execution.steps.count()) == (1, 3)
    assert failure(execution).error_class == class_name(TooManySteps)
    assert failure(execution).message == (
        f'"3" would be step number 4 of execution {execution.pk}; the limit is 3. Split the work into children, or '
        'raise CONDUCTOR["MAX_STEPS"].'
    )


# ------------------------------------------------------------------------------------------------------------ durations

DURATIONS: list[tuple[Any, type, str]] = [
    (-1, InvalidArgument, "must be {limit} 0 seconds, got -1"),
    (-0.001, InvalidArgument, "must be {limit} 0 seconds, got -0.001"),
    (dt.timedelta(seconds=-1), InvalidArgument, "must be {limit} 0 seconds, got -1.0"),
    (math.nan, InvalidArgument, "must be {limit} 0 seconds, got nan"),
    (math.inf, InvalidArgument, "must be {limit} 0 seconds, got inf"),
    (-math.inf, InvalidArgument, "must be {limit} 0 seconds, got -inf"),
    (10**400, InvalidArgument, "must be at most 3162240000 seconds (100 years), got a much larger one"),
    (1e300, InvalidArgument, "must be at most 3162240000 seconds (100 years), got 1e+300"),
    (3_162_240_001, InvalidArgument, "must be at most 3162240000 seconds (100 years), got 3162240001"),
    (dt.timedelta.max, InvalidArgument, "must be at most 3162240000 seconds (100 years), got 86400000000000.0"),
    ("30", InvalidArgumentType, "must be a number of seconds or a timedelta, got str"),
    (True, InvalidArgumentType, "must be a number of seconds or a timedelta, got bool"),
    (decimal.Decimal(3), InvalidArgumentType, "must be a number of seconds or a timedelta, got Decimal"),
    ([30], InvalidArgumentType, "must be a number of seconds or a timedelta, got list"),
    (dt.time(0, 1), InvalidArgumentType, "must be a number of seconds or a timedelta, got time"),
]


def test_an_impossible_duration_is_refused() -> None:
    calls: list[tuple[Callable[[ExecutionContext, str, Any], Any], str, str]] = [
        (lambda ctx, step, value: ctx.invoke(step, scenarios.echo, timeout=value), "timeout", ">"),
        (lambda ctx, step, value: ctx.sleep(step, value), 'seconds of ctx.sleep("a")', "≥"),
        (lambda ctx, step, value: ctx.retry(countdown=value), "countdown", "≥"),
    ]
    refused_all(
        [
            (
                lambda ctx, step, call=call, value=value: call(ctx, step, value),  # type: ignore[misc]
                cls,
                f"{name} {text.format(limit=limit)}",
            )
            for call, name, limit in calls
            for value, cls, text in DURATIONS
        ]
    )


@pytest.mark.parametrize(("value", "cls", "text"), DURATIONS)
def test_an_impossible_timeout_of_get_result_is_refused(value: Any, cls: type, text: str) -> None:
    with pytest.raises(cls) as refusal:
        api.get_result(uuid.UUID(int=1), timeout=value)
    assert str(refusal.value) == f"timeout {text.format(limit='≥')}"


@pytest.mark.parametrize("zero", [0, 0.0, dt.timedelta()])
def test_a_timeout_of_nothing_is_refused_and_a_sleep_of_nothing_is_one(zero: Any) -> None:
    check(
        refused(lambda ctx: ctx.invoke("a", scenarios.echo, timeout=zero)),
        InvalidArgument,
        f"timeout must be > 0 seconds, got {zero.total_seconds() if isinstance(zero, dt.timedelta) else zero}",
    )

    @durable
    def body(ctx: ExecutionContext) -> str:
        ctx.sleep("nap", zero)
        return "rested"

    assert run(body).get_result() == "rested"


@pytest.mark.parametrize("timeout", [0.001, 30, 30.5, Number.ONE, dt.timedelta(days=1), 30_000, 3_162_240_000])
def test_any_other_timeout_is_accepted(timeout: Any) -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        try:
            return ctx.invoke("a", scenarios.echo, {"value": "in time"}, timeout=timeout)
        except ChildTimedOut:
            return "late"

    execution = run(body)
    assert execution.get_result() in ({"in time", "late"} if timeout == 0.001 else {"in time"})
    expected = timeout.total_seconds() if isinstance(timeout, dt.timedelta) else float(timeout)
    assert execution.steps.get().timeout_seconds == expected


@pytest.mark.parametrize(
    ("timeout", "hint"),
    [
        (30_000, "timeout=30000 of step a means 8:20:00 (timeouts are seconds). Did you mean 30?"),
        (100_000, "timeout=100000 of step a means 1 day, 3:46:40 (timeouts are seconds). Did you mean 100?"),
        (30, ""),
        (86_400, ""),
        (
            90_000_000,
            "timeout=90000000 of step a means 1041 days, 16:00:00 (timeouts are seconds). Did you mean 90000?",
        ),
        (86_400_000, "timeout=86400000 of step a means 1000 days, 0:00:00 (timeouts are seconds). Did you mean 86400?"),
        (3 * 86_400, ""),
        (2_592_000, ""),
        (26 * 3_600, ""),
        (259_199.5, ""),
        (dt.timedelta(days=30), ""),
    ],
)
def test_a_timeout_that_looks_like_milliseconds_draws_a_hint_once(timeout: Any, hint: str, caplog: Any) -> None:
    @durable
    def body(ctx: ExecutionContext) -> Any:
        ctx.invoke("a", scenarios.echo, timeout=timeout)
        ctx.invoke("b", scenarios.echo)

    run(body)
    hints = [record.getMessage() for record in caplog.records if "timeouts are seconds" in record.getMessage()]
    assert hints == ([hint] if hint else [])


@pytest.mark.parametrize("value", ["ignore", None, True, "", ["cancel"], b"cancel"])
def test_an_unknown_way_to_time_out_is_refused(value: Any) -> None:
    check(
        refused(lambda ctx: ctx.invoke("a", scenarios.echo, timeout=1, on_timeout=value)),
        InvalidArgument,
        f'on_timeout must be "cancel" or "abandon", got {value!r}.',
    )


@pytest.mark.parametrize(
    ("when", "cls", "text"),
    [
        (30, InvalidArgumentType, "must be a datetime, got int"),
        (None, InvalidArgumentType, "must be a datetime, got NoneType"),
        ("2026-01-01", InvalidArgumentType, "must be a datetime, got str"),
        (dt.date(2026, 1, 1), InvalidArgumentType, "must be a datetime, got date"),
        (
            dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-12))),
            InvalidArgument,
            "must lie between the years 1900 and 9000, got 9999-12-31 23:59:59.999999-12:00",
        ),
        (
            dt.datetime.min.replace(tzinfo=dt.timezone(dt.timedelta(hours=14))),
            InvalidArgument,
            "must lie between the years 1900 and 9000, got 0001-01-01 00:00:00+14:00",
        ),
    ],
)
def test_an_impossible_instant_is_refused(when: Any, cls: type, text: str) -> None:
    check(refused(lambda ctx: ctx.sleep_until("a", when)), cls, f'when of ctx.sleep_until("a") {text}')


@pytest.mark.parametrize(
    "when",
    [
        dt.datetime(1900, 1, 1, tzinfo=ODD_ZONE),
        dt.datetime(2020, 1, 1),  # noqa: DTZ001 - in the project's time zone, as everywhere in Django
        dt.datetime(2020, 1, 1, tzinfo=UTC),
    ],
)
def test_a_sleep_until_an_instant_of_the_past_ends_at_once(when: dt.datetime) -> None:
    @durable
    def body(ctx: ExecutionContext) -> str:
        ctx.sleep_until("nap", when)
        return "rested"

    assert run(body).get_result() == "rested"


# ------------------------------------------------------------------------------------------- queues, priorities, things


@pytest.mark.parametrize(
    ("options", "cls", "text"),
    [
        ({"queue": 5}, InvalidArgumentType, "queue must be str, got int"),
        ({"queue": ""}, InvalidArgument, "queue must be 1–255 printable characters, got ''"),
        ({"queue": "a\x00"}, InvalidArgument, "queue must be 1–255 printable characters, got 'a\\x00'"),
        (
            {"queue": "q" * 256},
            InvalidArgument,
            f"queue must be 1–255 printable characters, got '{'q' * 99}…{'q' * 15}'",
        ),
        ({"priority": "5"}, InvalidArgumentType, "priority must be int, got str"),
        ({"priority": True}, InvalidArgumentType, "priority must be int, got bool"),
        ({"priority": 1.5}, InvalidArgumentType, "priority must be int, got float"),
        (
            {"priority": 10**9},
            InvalidArgument,
            "priority must lie between -32768 and 32767; brokers know 0 to 9 or 0 to 255",
        ),
    ],
)
def test_an_impossible_queue_or_priority_is_refused(options: Any, cls: type, text: str) -> None:
    check(refused(lambda ctx: ctx.invoke("a", scenarios.echo, **options)), cls, text)
    before = counts()
    with pytest.raises(cls) as refusal:
        scenarios.echo.apply_async(**options)
    assert str(refusal.value) == text
    assert counts() == before


def test_a_step_needs_a_callable() -> None:
    text = 'ctx.step("a") needs a callable, got int. Pass the function, not its result.'
    check(refused(lambda ctx: ctx.step("a", 5)), InvalidArgumentType, text)  # type: ignore[arg-type]
    text = 'ctx.atomic_step("a") needs a callable, got NoneType. Pass the function, not its result.'
    check(refused(lambda ctx: ctx.atomic_step("a", None)), InvalidArgumentType, text)  # type: ignore[arg-type]


def test_a_coroutine_in_a_result_is_not_awaited() -> None:
    text = (
        'result of ctx.step("a")[0] is a coroutine. Return what it returns: asgiref.sync.async_to_sync calls an async '
        "function."
    )

    def call(ctx: ExecutionContext) -> None:
        made = []
        try:
            ctx.step("a", lambda: made.append(coroutine()) or made)
        finally:
            made[0].close()

    check(refused(call), NotSerializable, text)


def test_the_reason_of_a_retry_is_an_exception() -> None:
    text = "exc of ctx.retry() must be an exception, got str"
    check(refused(lambda ctx: ctx.retry(exc="the bank sleeps")), InvalidArgumentType, text)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- apply_async


@pytest.mark.parametrize(
    ("options", "cls", "text"),
    [
        ({"countdown": "5"}, InvalidArgumentType, "countdown must be a number of seconds or a timedelta, got str"),
        ({"countdown": True}, InvalidArgumentType, "countdown must be a number of seconds or a timedelta, got bool"),
        ({"countdown": math.nan}, InvalidArgument, "countdown must be a finite number of seconds, got nan"),
        ({"countdown": math.inf}, InvalidArgument, "countdown must be a finite number of seconds, got inf"),
        ({"countdown": 1e300}, InvalidArgument, "countdown must be at most 3162240000 seconds (100 years), got 1e+300"),
        ({"eta": 5}, InvalidArgumentType, "eta must be a datetime, got int"),
        ({"eta": "tomorrow"}, InvalidArgument, "eta must be a datetime or its ISO 8601 text, got 'tomorrow'"),
        (
            {"eta": dt.datetime.max},  # noqa: DTZ901
            InvalidArgument,
            "eta must lie between the years 1900 and 9000, got 9999-12-31 23:59:59.999999",
        ),
        ({"expires": "later"}, InvalidArgument, "expires must be a datetime or its ISO 8601 text, got 'later'"),
        ({"expires": []}, InvalidArgumentType, "expires must be a number of seconds or a timedelta, got list"),
        ({"expires": True}, InvalidArgumentType, "expires must be a number of seconds or a timedelta, got bool"),
        ({"expires": math.nan}, InvalidArgument, "expires must be a finite number of seconds, got nan"),
        ({"expires": -1e300}, InvalidArgument, "expires must be at most 3162240000 seconds (100 years), got -1e+300"),
        (
            {"task_id": "order-7"},
            InvalidArgument,
            "task_id must be a UUID, since it is the execution's id, got 'order-7'. Use idempotency_key= for a key of "
            "your own.",
        ),
        ({"idempotency_key": 7}, InvalidArgumentType, "idempotency_key must be str, got int"),
        ({"idempotency_key": ""}, InvalidArgument, "idempotency_key must have 1–255 characters, got 0"),
        ({"idempotency_key": "k" * 256}, InvalidArgument, "idempotency_key must have 1–255 characters, got 256"),
        (
            {"idempotency_key": "k "},
            InvalidArgument,
            "idempotency_key must be printable text without spaces at its ends, got 'k '. Strip it.",
        ),
        (
            {"idempotency_key": "k\x00"},
            InvalidArgument,
            "idempotency_key must be printable text without spaces at its ends, got 'k\\x00'. Strip it.",
        ),
        (
            {"idempotency_key": "\ud800"},
            InvalidArgument,
            "idempotency_key must be printable text without spaces at its ends, got '\\ud800'. Strip it.",
        ),
        ({"args": "ab"}, InvalidArgumentType, "args of tests.app.scenarios.echo must be a list or a tuple, got str"),
        ({"args": 5}, InvalidArgumentType, "args of tests.app.scenarios.echo must be a list or a tuple, got int"),
        ({"kwargs": "ab"}, InvalidArgumentType, "kwargs of tests.app.scenarios.echo must be a mapping, got str"),
        (
            {"kwargs": {1: 2}},
            InvalidArgumentType,
            "kwargs of tests.app.scenarios.echo has the key 1 of type int, not str",
        ),
        (
            {"headers": {"x": object()}},
            NotSerializable,
            "Celery's options of the execution (headers, ignore_result, announce) have to be JSON, since they are "
            "stored: Object of type object is not JSON serializable",
        ),
    ],
)
def test_impossible_options_of_apply_async_are_refused(options: Any, cls: type, text: str) -> None:
    with pytest.raises(cls) as refusal:
        scenarios.echo.apply_async(**options)
    assert (type(refusal.value), str(refusal.value)) == (cls, text)
    assert counts() == (0, 0, 0)


def test_an_idempotency_key_returns_the_execution_that_has_it() -> None:
    first = scenarios.add.apply_async(kwargs={"x": 1, "y": 2}, idempotency_key="order-7")
    again = scenarios.add.apply_async(kwargs={"y": 2, "x": 1}, idempotency_key="order-7")
    other_case = scenarios.add.apply_async(kwargs={"x": 1, "y": 2}, idempotency_key="Order-7")
    other_task = scenarios.echo.apply_async(idempotency_key="order-7")
    assert first.id == again.id
    assert len({first.id, other_case.id, other_task.id}) == 3
    with pytest.raises(IdempotencyConflict) as conflict:
        scenarios.add.apply_async(kwargs={"x": 1, "y": 3}, idempotency_key="order-7")
    assert str(conflict.value) == (
        f"The idempotency key 'order-7' belongs to execution {first.id} of tests.app.scenarios.add with another "
        "payload. Use another key."
    )
    assert Execution.objects.count() == 3


def test_a_task_id_names_one_execution() -> None:
    task_id = str(uuid.uuid4())
    assert scenarios.echo.apply_async((1,), task_id=task_id).id == task_id
    assert scenarios.echo.apply_async((1,), task_id=task_id).id == task_id
    for task, args in ((scenarios.echo, (2,)), (scenarios.naps, (1,))):
        with pytest.raises(IdempotencyConflict) as conflict:
            task.apply_async(args, task_id=task_id)
        assert str(conflict.value) == (
            f"The id {task_id} belongs to execution {task_id} of tests.app.scenarios.echo with another payload. "
            "Use another key."
        )
    assert Execution.objects.count() == 1


# ------------------------------------------------------------------------------------------------------------------ api


@pytest.mark.parametrize("call", [api.cancel, api.retry, api.get_result])
@pytest.mark.parametrize(
    ("name", "cls", "text"),
    [
        (
            uuid.UUID(int=1),
            Execution.DoesNotExist,
            f"There is no execution {uuid.UUID(int=1)}. Was its transaction rolled back, or has it been pruned?",
        ),
        (
            str(uuid.UUID(int=1)),
            Execution.DoesNotExist,
            f"There is no execution {uuid.UUID(int=1)}. Was its transaction rolled back, or has it been pruned?",
        ),
        ("order-7", InvalidArgument, "an execution is named by a UUID, got 'order-7'"),
        (None, InvalidArgument, "an execution is named by a UUID, got None"),
        (7, InvalidArgument, "an execution is named by a UUID, got 7"),
        (b"1" * 16, InvalidArgument, f"an execution is named by a UUID, got {b'1' * 16!r}"),
        (
            "'; DROP TABLE conductor_app_execution; --",
            InvalidArgument,
            'an execution is named by a UUID, got "\'; DROP TABLE conductor_app_execution; --"',
        ),
    ],
)
def test_an_execution_that_does_not_exist_is_refused(call: Callable[..., Any], name: Any, cls: type, text: str) -> None:
    with pytest.raises(cls) as refusal:
        call(name)
    assert str(refusal.value) == text


def test_the_reason_of_a_cancel_is_text() -> None:
    result = scenarios.echo.delay()
    with pytest.raises(InvalidArgumentType, match=r"^reason must be str, got int$"):
        api.cancel(result, reason=7)  # type: ignore[arg-type]
    assert reload(result).status == "queued"
    assert api.cancel(result, reason="a\x00\ud800b" + "c" * 2_000)
    assert reload(result).cancel_reason == "a\\x00\\ud800b" + "c" * 985 + "..."


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("broken", [{"LEASE_SECONDZ": 5}, {"MAX_STEPS": 0}])
def test_wrong_settings_are_told_at_the_first_call_and_nothing_is_stored(settings: Any, broken: Any) -> None:
    settings.CONDUCTOR = broken
    with pytest.raises(ImproperlyConfigured, match="CONDUCTOR"):
        scenarios.echo.delay()
    settings.CONDUCTOR = {}
    assert counts() == (0, 0, 0)

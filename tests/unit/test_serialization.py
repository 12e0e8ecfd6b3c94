"""Text that is stored, and what comes back of it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import json
import math
import time
import uuid
from collections.abc import Callable
from typing import Any, ClassVar

import kombu.utils.json
import pytest
from django.core.exceptions import ValidationError
from django.utils.translation import gettext_lazy
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.json import register_type

from conductor_app.exceptions import Failure, NewerFormat, NotSerializable, PayloadTooLarge, StepFailed
from conductor_app.values.failures import describe, dump_failure, load_failure, revive
from conductor_app.values.payloads import digest, dump_call, dump_options, dumps, loads, round_trip
from conductor_app.values.storage_format import MAX_NESTING
from conductor_app.values.texts import clean_text, shown

# --------------------------------------------------------------------------------------------------------------- values

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
OFFSETS = st.integers(-86_399, 86_399).map(lambda seconds: dt.timezone(dt.timedelta(seconds=seconds)))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**4_000), 10**4_000),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
    st.binary(max_size=20),
    st.uuids(),
    st.dates(),
    st.times(timezones=st.none() | OFFSETS).map(lambda value: value.replace(fold=0)),
    st.datetimes(timezones=st.none() | OFFSETS).map(lambda value: value.replace(fold=0)),
    st.decimals(allow_nan=False, allow_infinity=False),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_whatever_is_accepted_comes_back_as_it_went_in(value: Any) -> None:
    try:
        text, back = round_trip(value, "value")
    except NotSerializable as error:
        assert "__type__" in str(error)  # the one shape that is reserved  # noqa: PT017
        return
    assert text.isascii()
    assert back == value
    assert repr(back) == repr(value)
    assert dumps(back, "value") == text


@given(st.recursive(SCALARS | st.sampled_from([math.nan, math.inf, "\x00", "\ud800", object(), {1}]), st.lists))
def test_a_value_is_either_accepted_or_refused_and_nothing_else(value: Any) -> None:
    try:
        json.loads(dumps(value, "value"))
    except NotSerializable as error:
        assert str(error).startswith(("value", "NaN at value", "Infinity at value"))  # noqa: PT017


@given(st.integers(1, 40), st.integers(0, 60))
def test_the_limit_counts_the_bytes_that_are_stored(size: int, limit: int) -> None:
    value = "é" * size
    encoded = len(json.dumps(value))
    if encoded <= limit:
        assert len(dumps(value, "value", limit)) == encoded
    else:
        with pytest.raises(PayloadTooLarge):
            dumps(value, "value", limit)


def test_nesting_is_limited_exactly() -> None:
    value: Any = 0
    for _ in range(MAX_NESTING):
        value = [value]
    assert loads(dumps(value, "value")) == value
    with pytest.raises(
        NotSerializable, match=r"^value\[0\]\[0\].*….* is nested deeper than 100 levels\. Flatten it\.$"
    ):
        dumps([value], "value")


def test_text_is_compact_and_stays_in_order() -> None:
    assert dumps({"b": [1, 2.5, None, True], "a": "é"}, "value") == '{"b":[1,2.5,null,true],"a":"\\u00e9"}'
    assert list(loads('{"b":1,"a":2}')) == ["b", "a"]


@pytest.mark.parametrize("text", [None, ""])
def test_no_text_is_none(text: str | None) -> None:
    assert loads(text) is None


def test_short_arguments_that_are_equal_and_not_the_same_are_told_apart() -> None:
    """Short arguments are looked up when they are stored again."""
    for _ in range(2):
        assert [dump_call([value], {}) for value in (1, True, "1", 1.0)] == [
            "[[1],{}]",
            "[[true],{}]",
            '[["1"],{}]',
            "[[1.0],{}]",
        ]
        assert dump_call([], {"n": 0}) == '[[],{"n":0}]'
        assert dump_call([], {"n": False}) == '[[],{"n":false}]'
        assert dump_call([], {"a": 1, "b": 2}) == '[[],{"a":1,"b":2}]'
        assert dump_call([], {"b": 2, "a": 1}) == '[[],{"b":2,"a":1}]'
        assert dump_call([0.0, -0.0], {}) == "[[0.0,-0.0],{}]"
        assert dump_call([1], {"n": 1}, limit=20) == '[[1],{"n":1}]'
        with pytest.raises(PayloadTooLarge):
            dump_call([1], {"n": 1}, limit=5)


@dataclasses.dataclass(frozen=True)
class Money:
    """As a project's own type."""

    cents: int
    currency: str


class Opaque:
    """A type that cannot tell whether it is the same."""

    def __init__(self, inside: Any = None) -> None:
        self.inside = inside


@pytest.fixture
def registering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register types with kombu, and forget them."""
    monkeypatch.setattr(kombu.utils.json, "_encoders", dict(kombu.utils.json._encoders))
    monkeypatch.setattr(kombu.utils.json, "_decoders", dict(kombu.utils.json._decoders))


@pytest.mark.usefixtures("registering")
def test_a_type_that_is_registered_with_kombu_is_stored_as_it_says() -> None:
    price = Money(1_250, "EUR")
    with pytest.raises(NotSerializable, match="is a Money"):
        dumps(price, "payload")
    register_type(Money, "shop.money", lambda money: [money.cents, money.currency], lambda parts: Money(*parts))
    value = {"price": price, "all": [price, Money(0, "USD")]}
    text = dumps(value, "payload")
    assert json.loads(text)["price"] == {"__type__": "shop.money", "__value__": [1_250, "EUR"]}
    assert loads(text) == value
    # Stored before the type was registered here, it is a newer version's.
    kombu.utils.json._decoders.pop("shop.money")
    with pytest.raises(NewerFormat, match=r"shop\.money"):
        loads(text)


@pytest.mark.usefixtures("registering")
@pytest.mark.parametrize(
    ("encoder", "decoder", "text"),
    [
        (lambda opaque: opaque.inside, Opaque, "Its class needs an __eq__"),
        (lambda opaque: opaque.inside, lambda inside: inside, "comes back from what is registered for it as None"),
        (lambda opaque: {1, 2}, Opaque, r'payload\["it"\] is a set'),
        (lambda opaque: "\x00", Opaque, "contains a NUL character"),
        (lambda opaque: opaque.missing, Opaque, "is an Opaque"),
        (lambda opaque: 1, lambda inside: inside.missing, "cannot be decoded again: AttributeError"),
        (lambda opaque: opaque, Opaque, "is nested deeper than 100 levels"),
    ],
)
def test_a_registered_type_that_would_not_come_back_is_refused(encoder: Any, decoder: Any, text: str) -> None:
    register_type(Opaque, "opaque", encoder, decoder)
    with pytest.raises(NotSerializable, match=text):
        dumps({"it": Opaque()}, "payload")


@pytest.mark.usefixtures("registering")
def test_a_type_that_is_registered_without_a_marker_is_refused() -> None:
    """Nothing could tell what comes back."""
    register_type(Opaque, None, lambda opaque: "opaque")
    with pytest.raises(NotSerializable, match="is an Opaque"):
        dumps(Opaque(), "payload")


def test_a_call_is_its_arguments() -> None:
    assert dump_call([], {}) == "[[],{}]"
    assert dump_call([1, (2,)], {"x": dt.date(2026, 1, 2)}) == (
        '[[1,[2]],{"x":{"__type__":"date","__value__":"2026-01-02"}}]'
    )
    for args, kwargs, path in [
        ([{1}], {}, "payload is"),
        ([1, {1}], {}, "payload[1] is"),
        ([], {"x": {1}}, 'payload["x"] is'),
        ([[{1}]], {}, "payload[0] is"),
    ]:
        with pytest.raises(NotSerializable) as refusal:
            dump_call(args, kwargs)
        assert str(refusal.value) == f"{path} a set. Pass a sorted list."


@given(st.dictionaries(TEXTS, st.integers() | TEXTS | st.dictionaries(TEXTS, st.integers(), max_size=3), max_size=5))
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, Any]) -> None:
    backwards = dict(reversed(value.items()))
    try:
        first, second = dumps(value, "value"), dumps(backwards, "value")
    except NotSerializable:
        return
    assert digest(first) == digest(second)
    assert len(digest(first)) == 32
    assert digest(first) != digest(dumps({**value, "another": 1.5}, "value"))


def test_options_that_are_not_json_are_refused_by_name() -> None:
    assert dump_options({}) == ""
    assert loads(dump_options({"headers": {"id": uuid.UUID(int=1)}})) == {"headers": {"id": uuid.UUID(int=1)}}
    with pytest.raises(NotSerializable, match=r"^Celery's options of the execution \(link, headers\) have to be JSON"):
        dump_options({"link": [], "headers": {"x": object()}})


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_what_is_shown_of_a_value_is_short_and_safe() -> None:
    assert shown("a\n") == "'a\\n'"
    assert shown(Rude()) == "?"
    assert shown(10**5_000) == "?"
    assert len(shown("x" * 10**6)) < 150


# ----------------------------------------------------------------------------------------------------------- clean text


@pytest.mark.parametrize(
    ("text", "limit", "clean"),
    [
        ("plain", 10, "plain"),
        ("a\x00b", 10, "a\\x00b"),
        ("a\ud800b", 10, "a\\ud800b"),
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abc..."),
        ("ééé", 6, "ééé"),
        ("éééé", 6, "é..."),
        ("🎉🎉", 7, "🎉..."),
        ("abcdef", 2, "..."),
    ],
)
def test_clean_text_is_valid_and_short(text: str, limit: int, clean: str) -> None:
    assert clean_text(text, limit) == clean


@given(st.text(), st.integers(3, 40))
def test_clean_text_can_be_stored_whatever_it_was(text: str, limit: int) -> None:
    clean = clean_text(text, limit)
    assert len(clean.encode()) <= limit
    assert "\x00" not in clean


# ------------------------------------------------------------------------------------------------------------- failures


class Custom(Exception):
    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.secret = object()


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:  # noqa: BLE001
        return caught


def test_a_failure_is_described_as_text_and_revived_from_it() -> None:
    failure = describe(raised(Custom(7, "no")), 10_000)
    assert failure.type == f"{__name__}.Custom"
    assert failure.message == "(7, 'no')"
    assert failure.args == (7, "no")
    assert failure.attributes == {"code": 7}
    assert failure.is_partial
    assert failure.traceback.startswith("Traceback (most recent call last):")
    stored = load_failure(dump_failure(failure))
    assert (stored.type, stored.message, stored.args, stored.traceback) == (
        failure.type,
        failure.message,
        failure.args,
        "",
    )
    revived = revive(stored)
    assert type(revived) is Custom
    assert (revived.args, revived.code) == ((7, "no"), 7)
    assert hasattr(revived, "secret")


def test_parts_of_a_failure_that_are_too_large_to_remember_are_left_out() -> None:
    failure = describe(raised(ValueError("x" * 5_000)), 100)
    assert failure.message == "x" * 97 + "..."
    assert failure.args is None
    assert revive(failure).args == (failure.message,)


def test_a_failure_that_was_never_raised_has_no_traceback_but_its_own_line() -> None:
    assert describe(ValueError("x"), 100).traceback == "ValueError: x\n"


def test_local_values_are_never_part_of_a_traceback() -> None:
    password = "s3cret"  # noqa: F841
    assert "s3cret" not in describe(raised(ValueError("x")), 10_000).traceback.replace("password =", "")


@pytest.mark.parametrize(
    "text", [None, "", "null", "[]", "{}", "no json", '{"type": 1}', '{"message": "x"}', "5", '"x"']
)
def test_stored_text_that_is_no_failure_is_an_unknown_one(text: str | None) -> None:
    failure = load_failure(text)
    assert failure.type == "Unknown"
    assert failure.message == (text or "unknown error")
    assert type(revive(failure)) is StepFailed


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.SystemExit",
        "builtins.BaseException",
        "builtins.ExceptionGroup",
        "subprocess.CalledProcessError.__init__",
        "no.such.module.Error",
        "conductor_app.ChildFailed",  # a module that answers getattr() with an import
        "tests.unit.test_serialization.Custom.secret",
        "Custom",
        "",
        ".",
        "..",
        "\n",
    ],
)
def test_only_an_exception_class_that_is_already_imported_is_revived(name: str) -> None:
    failure = Failure(type=name, message="no", args=("echo pwned",), attributes={"__class__": "x", "args": [1]})
    revived = revive(failure)
    assert type(revived) is StepFailed
    assert str(revived) == "no"


def test_a_revived_exception_ignores_attributes_that_it_cannot_take() -> None:
    class_name = f"{__name__}.Custom"
    revived = revive(
        Failure(type=class_name, message="no", args=(1,), attributes={"__dict__": 5, "__class__": 5, "x": 1})
    )
    assert type(revived) is Custom
    assert vars(revived) == {"x": 1}


class Calls(Exception):
    """Notes each call of what a row must not call."""

    made: ClassVar[list[str]] = []

    def __new__(cls, *args: object) -> Any:
        cls.made.append("__new__")
        return super().__new__(cls, *args)

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.made.append("__init__")
        self.handle = object()

    def __setstate__(self, state: object) -> None:
        self.made.append("__setstate__")


@pytest.mark.parametrize("is_partial", [True, False])
@pytest.mark.parametrize("args", [(), ("echo pwned",), None])
def test_no_constructor_is_called_by_a_name_that_was_stored(is_partial: bool, args: Any) -> None:
    name = f"{__name__}.Calls"
    nested = {"failure": {"type": name, "message": "no", "args": ["x"], "is_partial": is_partial}}
    Calls.made.clear()
    revived: Any = revive(
        load_failure(dump_failure(Failure(name, "no", "", args, {"code": 7}, is_partial, {"first": nested})))
    )
    assert Calls.made == []
    assert (type(revived), type(revived.first), revived.code) == (Calls, Calls, 7)


def remembered(error: Exception) -> Any:
    return revive(load_failure(dump_failure(describe(raised(error), 10_000))))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ValidationError("no", code="x", params={"limit": 7}),
        lambda: ValidationError(gettext_lazy("Enter a valid value."), code="invalid"),
        lambda: ValidationError(["no", ValidationError("never", code="y")]),
        lambda: ValidationError({"name": ["no", ValidationError("never")], "age": ["old"]}),
    ],
)
def test_an_exception_that_holds_others_or_itself_is_remembered_with_them(make: Callable[[], ValidationError]) -> None:
    first, again = make(), remembered(make())
    assert (type(again), str(again), repr(again), again.messages) == (
        ValidationError,
        str(first),
        repr(first),
        first.messages,
    )
    assert hasattr(again, "error_dict") is hasattr(first, "error_dict")
    assert again == first


def test_what_an_exception_holds_is_remembered_as_far_as_it_goes() -> None:
    error = ValueError("outer")
    inner = KeyError("inner")
    inner.back, inner.more = error, [error, object()]  # type: ignore[attr-defined]
    error.cause, error.stream, error.large = inner, object(), [KeyError("x" * 5_000)]  # type: ignore[attr-defined]
    again = remembered(error)
    assert (type(again.cause), again.cause.args) == (KeyError, ("inner",))
    assert again.stream is again.large is None
    assert isinstance(again.cause.more, list)
    assert len(dump_failure(describe(raised(error), 10_000))) < 10_000


def test_an_exception_that_holds_more_than_can_be_told_is_told_in_no_time() -> None:
    error = ValueError("outer")
    wide: list[Any] = [object()]
    for _ in range(6):
        wide = [wide] * 90
    error.wide, error.many = wide, [KeyError()] * 1_000_000  # type: ignore[attr-defined]
    begun = time.monotonic()
    assert remembered(error).many is None
    assert time.monotonic() - begun < 5


def test_a_remembered_decimal_stays_a_decimal() -> None:
    failure = load_failure(dump_failure(describe(ValueError(decimal.Decimal("1.10")), 100)))
    assert revive(failure).args == (decimal.Decimal("1.10"),)

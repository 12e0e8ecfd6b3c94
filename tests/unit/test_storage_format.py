"""Format 1 of what is stored: the text of each value, as version 0.1 wrote it, and as every later one has to read it.

The texts are kombu's doing. If a later kombu writes another one, that is a new format, which older workers have to tell
from this one: docs/reference/storage.md.
"""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from typing import Any

import pytest

from conductor_app.exceptions import Failure, NewerFormat
from conductor_app.values.failures import dump_failure, load_failure, read_failure
from conductor_app.values.payloads import dump_call, dumps, loads
from conductor_app.values.storage_format import MARK

AT = dt.datetime(2026, 11, 28, 12, 30, 15, 250_000, tzinfo=dt.UTC)

FORMAT_1: list[tuple[Any, str]] = [
    (None, "null"),
    ([True, False], "[true,false]"),
    ([0, -1, 2**70], "[0,-1,1180591620717411303424]"),
    ([0.1, 1e300], "[0.1,1e+300]"),
    ('ä"\\\n\u2028😀', '"\\u00e4\\"\\\\\\n\\u2028\\ud83d\\ude00"'),
    ({"b": 1, "a": []}, '{"b":1,"a":[]}'),
    (decimal.Decimal("12.30"), '{"__type__":"decimal","__value__":"12.30"}'),
    (
        uuid.UUID("0190a5d8-6a7e-7cc4-8f00-0123456789ab"),
        '{"__type__":"uuid","__value__":{"hex":"0190a5d86a7e7cc48f000123456789ab"}}',
    ),
    (AT, '{"__type__":"datetime","__value__":"2026-11-28T12:30:15.250000+00:00"}'),
    (AT.replace(tzinfo=None), '{"__type__":"datetime","__value__":"2026-11-28T12:30:15.250000"}'),
    (AT.date(), '{"__type__":"date","__value__":"2026-11-28"}'),
    (dt.time(12, 30, 15), '{"__type__":"time","__value__":"12:30:15"}'),
    (b"text", '{"__type__":"bytes","__value__":"text"}'),
    (b"\x00\xff", '{"__type__":"base64","__value__":"AP8="}'),
]


@pytest.mark.parametrize(("value", "text"), FORMAT_1, ids=lambda part: str(part)[:30])
def test_each_type_is_written_and_read_as_in_format_1(value: Any, text: str) -> None:
    assert dumps(value, "value") == text
    assert loads(text) == value
    assert type(loads(text)) is type(value)


def test_a_payload_is_its_arguments_and_a_failure_its_parts() -> None:
    assert dump_call([1], {"a": b"x"}) == '[[1],{"a":{"__type__":"bytes","__value__":"x"}}]'
    failure = Failure(type="shop.Declined", message="no funds", args=(402,), attributes={"code": 402})
    text = '{"type":"shop.Declined","message":"no funds","args":[402],"attributes":{"code":402}}'
    assert dump_failure(failure) == text
    assert load_failure(text) == read_failure(text)
    assert read_failure(text).args == (402,)


@pytest.mark.parametrize(
    "text", [f"{MARK}2:[1]", MARK, '[[{"__type__":"timedelta","__value__":3}],{}]', '{"__type__":"x","__value__":{}}']
)
def test_what_a_newer_version_has_stored_is_told_from_damage(text: str) -> None:
    for read in (loads, read_failure):
        with pytest.raises(NewerFormat, match=r"a stored value has the (format|type) '.*', unknown here"):
            read(text)
    assert load_failure(text).message.startswith("The error cannot be read: a stored value has the ")


@pytest.mark.parametrize("text", ["[1", '{"__type__":"datetime","__value__":"yesterday"}', "+2:[1]"])
def test_damage_is_no_newer_format(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting|Invalid isoformat"):
        loads(text)

"""What is masked of stored values, whole ones and beginnings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conductor_app.values.redaction import MASK, WITHHELD, decode, masked_beginning, readable, redact

SECRET = "hunter2"
CALL = [
    [],
    {
        "user": {
            "name": "ana",
            "Password": SECRET,
            "keys": [{"api-key": SECRET}, {"API_KEY": [SECRET, {"a": SECRET}]}],
        },
        "token": {"deep": {"er": SECRET}},
        "tokens": "kept",
        "text": 'a "password": in a text',
    },
]


def test_values_are_masked_at_any_depth_whatever_the_case() -> None:
    masked = redact(CALL)
    assert SECRET not in json.dumps(masked)
    assert masked[1]["user"]["name"] == "ana"
    assert masked[1]["tokens"] == "kept"
    assert masked[1]["token"] == MASK
    assert masked[1]["user"]["keys"][1] == {"API_KEY": MASK}
    assert CALL[1]["token"] == {"deep": {"er": SECRET}}, "the value itself is left alone"


def test_the_setting_names_the_keys(settings: Any) -> None:
    settings.CONDUCTOR = {"REDACT": ["IBAN"]}
    assert redact({"iban": SECRET, "password": "shown"}) == {"iban": MASK, "password": "shown"}
    settings.CONDUCTOR = {"REDACT": ()}
    assert redact({"password": "shown"}) == {"password": "shown"}
    assert readable('{"password": broken') == '{"password": broken'


def test_typed_values_are_shown_as_such_and_masked_too() -> None:
    text = '{"price":{"__type__":"decimal","__value__":"42.00"},"secret":{"__type__":"decimal","__value__":"7"}}'
    assert readable(text) == f'{{"price": "42.00", "secret": "{MASK}"}}'
    assert decode('{"at":{"__type__":"datetime","__value__":"no date"},"token":"x"}')["token"] == MASK


@pytest.mark.parametrize(
    "text", [json.dumps(CALL), json.dumps(CALL, indent=2), json.dumps(CALL, separators=(",", ":"))]
)
def test_no_beginning_of_a_value_shows_a_secret(text: str) -> None:
    for end in range(len(text) + 1):
        shown = readable(text[:end], is_cut=end < len(text))
        assert SECRET not in shown, text[:end]
        assert "hunter" not in shown, text[:end]


def test_a_beginning_is_otherwise_shown_as_it_stands() -> None:
    text = json.dumps(CALL)
    assert masked_beginning('{"a": [1, "x') == '{"a": [1, "x'
    whole = json.loads(masked_beginning(text))
    assert whole == redact(CALL)


def test_a_key_that_is_spelled_with_escapes_is_masked() -> None:
    assert SECRET not in masked_beginning(rf'{{"pass\u0077ord": "{SECRET}", "b": ')
    assert SECRET not in masked_beginning(rf'{{"password" : "quote \" {SECRET}')


def test_text_that_is_not_json_is_withheld_if_it_may_hold_a_secret() -> None:
    assert readable(f"{{'password': '{SECRET}'}}") == WITHHELD
    assert readable("{broken") == "{broken"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5_000, "", '"', "\\", '"\\', "]}", ":,"])
def test_nothing_that_is_stored_breaks_it(text: str) -> None:
    assert isinstance(readable(text), str)
    assert isinstance(readable(text, is_cut=True), str)

"""``settings.CONDUCTOR``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from conductor_app.conf import LINK_PLACEHOLDERS, ConductorSettings, conductor_settings


def refusal(values: Any) -> str:
    with pytest.raises(ImproperlyConfigured) as refused:
        ConductorSettings.from_dict(values)
    return str(refused.value)


def test_every_key_is_optional() -> None:
    settings = ConductorSettings.from_dict({})
    assert settings == ConductorSettings()
    assert (settings.LEASE_SECONDS, settings.HEARTBEAT_SECONDS, settings.SWEEP_SECONDS) == (60, 15, 5)
    assert (settings.MAX_DEPTH, settings.MAX_STEPS, settings.STRICT_REPLAY) == (100, 10_000, False)
    assert (settings.MAX_PAYLOAD_BYTES, settings.MAX_RESULT_BYTES, settings.MAX_ERROR_BYTES) == (
        1_048_576,
        1_048_576,
        65_536,
    )


def test_what_is_masked_is_a_tuple_and_what_is_given_replaces_it() -> None:
    assert {"password", "secret", "token", "authorization", "api_key"} <= set(ConductorSettings().REDACT)
    assert ConductorSettings.from_dict({"REDACT": ["iban"]}).REDACT == ("iban",)
    assert ConductorSettings.from_dict({"REDACT": ()}).REDACT == ()


def test_every_key_can_be_set_and_keeps_its_type() -> None:
    given: dict[str, Any] = {
        field.name: field.default if isinstance(field.default, bool) else field.default * 2
        for field in dataclasses.fields(ConductorSettings)
        if field.default is not dataclasses.MISSING and field.default is not None
    }
    given |= {"METRICS": True, "METRICS_LISTEN": "127.0.0.1:9464", "METRICS_TOKEN": "s3cret", "TRACING": True}
    given |= {"AROUND_BODY": "shop.tenancy.scope", "REPORTED_STATE": "STARTED", "LINKS": {"Logs": "/{task}"}}
    given |= {"KEEP": 604_800.0, "KEEP_FAILED": 7_776_000.0}
    settings = ConductorSettings.from_dict(given)
    assert dataclasses.asdict(settings) == given
    whole = ConductorSettings.from_dict({"LEASE_SECONDS": 90, "HEARTBEAT_SECONDS": 30})
    assert (type(whole.LEASE_SECONDS), whole.LEASE_SECONDS) == (float, 90.0)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("LEASE_SECS", ' Did you mean "LEASE_SECONDS"?'),
        ("LEASE_SECOND", ' Did you mean "LEASE_SECONDS"?'),
        ("lease_seconds", None),
        ("MAX_PAYLOAD", ' Did you mean "MAX_PAYLOAD_BYTES"?'),
        ("SRICT_REPLAY", ' Did you mean "STRICT_REPLAY"?'),
        ("X", None),
        (5, None),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: Any, hint: str | None) -> None:
    message = refusal({key: 5})
    assert message.startswith(f'CONDUCTOR has an unknown key "{key}".')
    if hint is None:
        assert " Known keys: AROUND_BODY, AUDIT_SECONDS, " in message
    else:
        assert message.endswith(hint)


@pytest.mark.parametrize("values", [None, [], "LEASE_SECONDS=5", 5])
def test_the_setting_is_a_dict(values: Any) -> None:
    assert refusal(values) == f"CONDUCTOR must be a dict, got {type(values).__name__}."


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("LEASE_SECONDS", "60", "must be a number of seconds, got '60'."),
        ("LEASE_SECONDS", None, "must be a number of seconds, got None."),
        ("LEASE_SECONDS", True, "must be a number of seconds, got True."),
        ("LEASE_SECONDS", math.nan, "must be greater than 0 and finite, got nan."),
        ("LEASE_SECONDS", math.inf, "must be greater than 0 and finite, got inf."),
        ("LEASE_SECONDS", 0, "must be greater than 0 and finite, got 0."),
        ("SWEEP_SECONDS", -1, "must be greater than 0 and finite, got -1."),
        ("MAX_DEPTH", 1.5, "must be an integer, got 1.5."),
        ("REDACT", "password", "must be a tuple of texts, got 'password'."),
        ("REDACT", ["password", ""], "must be a tuple of texts, got ['password', '']."),
        ("REDACT", [7], "must be a tuple of texts, got [7]."),
        ("REDACT", None, "must be a tuple of texts, got None."),
        ("MAX_DEPTH", "100", "must be an integer, got '100'."),
        ("MAX_DEPTH", 0, "must be greater than 0 and finite, got 0."),
        ("STRICT_REPLAY", 1, "must be True or False, got 1."),
        ("STRICT_REPLAY", "yes", "must be True or False, got 'yes'."),
        ("REPORTED_STATE", "PROGRESS", """must be "SUSPENDED" or "STARTED", got 'PROGRESS'."""),
        ("REPORTED_STATE", None, "must be printable ASCII text, got None."),
        ("METRICS_LISTEN", 9464, "must be printable ASCII text, got 9464."),
        ("METRICS_TOKEN", b"s3cret", "must be printable ASCII text, got other text or bytes."),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(key: str, value: Any, text: str) -> None:
    assert refusal({key: value}) == f'CONDUCTOR["{key}"] {text}'


def test_values_have_to_fit_each_other() -> None:
    assert refusal({"LEASE_SECONDS": 30}) == (
        'CONDUCTOR["LEASE_SECONDS"] = 30 must be at least 3 times CONDUCTOR["HEARTBEAT_SECONDS"] = 15: '
        "a lease must survive a late heartbeat."
    )
    assert refusal({"SWEEP_SECONDS": 61}) == (
        'CONDUCTOR["SWEEP_SECONDS"] = 61 must not exceed CONDUCTOR["LEASE_SECONDS"] = 60.'
    )
    assert ConductorSettings.from_dict({"LEASE_SECONDS": 45}).LEASE_SECONDS == 45


def test_settings_are_read_once_and_again_when_a_test_overrides_them(settings: Any) -> None:
    assert conductor_settings() is conductor_settings()
    settings.CONDUCTOR = {"MAX_DEPTH": 7}
    assert conductor_settings().MAX_DEPTH == 7
    settings.CONDUCTOR = {"MAX_DEPTHS": 7}
    with pytest.raises(ImproperlyConfigured, match="MAX_DEPTH"):
        conductor_settings()
    del settings.CONDUCTOR
    assert conductor_settings() == ConductorSettings()


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        (["/logs"], "must be a dict of labels and URLs"),
        ({"": "/logs"}, "must be a label and a URL"),
        ({1: "/logs"}, "must be a label and a URL"),
        ({"Logs": None}, "must be a label and a URL"),
        ({"Logs": "javascript:alert(1)"}, 'must begin with "https://", "http://" or "/"'),
        ({"Logs": "logs/{task}"}, 'must begin with "https://", "http://" or "/"'),
        ({"Logs": "//elsewhere.example.com/"}, 'must begin with "https://", "http://" or "/"'),
        ({"Logs": "/\\elsewhere.example.com/"}, 'must begin with "https://", "http://" or "/"'),
        ({"Logs": "https:///{task}"}, 'must begin with "https://", "http://" or "/"'),
        ({"Logs": "https://{task}.example.com/"}, "must name its server without placeholders"),
        ({"Logs": "https://logs.example.com/a b"}, "must be a URL without spaces"),
        ({"Logs": "/logs\n"}, "must be a URL without spaces"),
        ({"Logs": "/{exection_id}"}, "unknown placeholder {exection_id}. Did you mean {execution_id}?"),
        ({"Logs": "/{zzz}"}, "unknown placeholder {zzz}. There are {execution_id}, {root_id}"),
        ({"Logs": "/{}"}, "unknown placeholder {}."),
        ({"Logs": "/{task.__class__}"}, "unknown placeholder {task.__class__}"),
        ({"Logs": "/{task!r}"}, "must have {task} as it is"),
        ({"Logs": "/{task:>9}"}, "must have {task} as it is"),
        ({"Logs": "/{task"}, "A brace that is meant is doubled: {{ or }}."),
    ],
)
def test_wrong_links_are_refused(links: Any, expected: str) -> None:
    message = refusal({"LINKS": links})
    assert message.startswith('CONDUCTOR["LINKS"]')
    assert expected in message


def test_links_may_have_every_placeholder_and_braces_that_are_doubled() -> None:
    url = "https://logs.example.com/?q={{%22a%22}}" + "".join(f"&{name}={{{name}}}" for name in LINK_PLACEHOLDERS)
    links = {"Logs": url, "Here": "/"}
    kept = ConductorSettings.from_dict({"LINKS": links})
    assert links == kept.LINKS
    assert ConductorSettings().LINKS == {}

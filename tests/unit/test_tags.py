"""Which tags are taken."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import pytest

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType, TooManyTags
from conductor_app.values.tags import check_changes, check_tags, parse_tag, tags_of_call

MANY = {f"k{number}": "v" for number in range(11)}


class Tenant(StrEnum):
    ACME = "acme"


def test_tags_are_returned_as_they_are() -> None:
    tags = {"tenant": "acme", "Tenant": "A:c=me", "k" * 64: "v" * 128, "größe": "ü", "conductors": "x"}

    assert check_tags(tags) == tags


def test_a_member_of_an_enum_is_its_value() -> None:
    (value,) = check_tags({"tenant": Tenant.ACME}).values()

    assert (value, type(value)) == ("acme", str)


@pytest.mark.parametrize(
    ("tags", "error", "message"),
    [
        (["tenant"], InvalidArgumentType, 'tags must be a mapping such as {"order": "7"}, got list'),
        (
            {"order": 7},
            InvalidArgumentType,
            'tag "order" must be str, got int 7. Nothing is converted: write it',
        ),
        ({"order": None}, InvalidArgumentType, 'tag "order" must be str, got NoneType None. Nothing'),
        ({7: "order"}, InvalidArgumentType, "a key of tags must be str, got int 7. Nothing"),
        ({b"order": "7"}, InvalidArgumentType, "a key of tags must be str, got bytes b'order'. Nothing"),
        ({"": "7"}, InvalidArgument, "a key of tags must have 1–64 characters, got none"),
        ({"order": ""}, InvalidArgument, 'tag "order" must have 1–128 characters, got none'),
        ({"k" * 65: "7"}, InvalidArgument, "a key of tags must have 1–64 characters, got 65: "),
        ({"order": "7" * 129}, InvalidArgument, 'tag "order" must have 1–128 characters, got 129: '),
        ({"order": "7\x00"}, InvalidArgument, 'tag "order" must be printable text without spaces at its ends'),
        ({"or\nder": "7"}, InvalidArgument, "a key of tags must be printable text without spaces at its ends"),
        ({"order": "7 "}, InvalidArgument, 'tag "order" must be printable text without spaces at its ends'),
        ({"order": "\ud800"}, InvalidArgument, 'tag "order" must be printable text'),
        ({"a:b": "7"}, InvalidArgument, "a key of tags must not contain : or ="),
        ({"a=b": "7"}, InvalidArgument, "a key of tags must not contain : or ="),
        *(
            (
                {key: "7"},
                InvalidArgument,
                f"a key of tags is reserved: '{key}'. Keys that begin with conductor or celery",
            )
            for key in ("conductor", "celery", "conductor.x", "celery_x", "conductor-x", "Celery.x")
        ),
        (MANY, TooManyTags, "tags would make 11 tags, and a tree of executions has 10 at most: k0, k1, k10, k2, "),
    ],
    ids=str,
)
def test_what_cannot_be_a_tag_is_refused_with_the_reason(tags: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        check_tags(tags)

    assert type(caught.value) is error
    assert str(caught.value).startswith(message)


def test_none_removes_a_tag_where_tags_are_changed() -> None:
    assert check_changes({"order": None, "tenant": "acme"}) == {"order": None, "tenant": "acme"}


def test_the_tags_of_a_call_win_over_the_decorators() -> None:
    def source(order: int, note: str = "") -> dict[str, str]:
        return {"order": str(order), "note": note}

    assert tags_of_call(source, {"note": "call"}, [7], {"note": "decorator"}) == {"order": "7", "note": "call"}
    assert tags_of_call({"kind": "x"}, None, [], {}) == {"kind": "x"}
    assert tags_of_call(lambda: None, None, [], {}) == {}


def test_the_tags_of_a_call_and_of_the_decorator_are_counted_together() -> None:
    with pytest.raises(TooManyTags, match="the tags of the call and of @durable_task together would make 11 tags"):
        tags_of_call({"a": "1"}, {key: MANY[key] for key in list(MANY)[:10]}, [], {})


@pytest.mark.parametrize(
    ("text", "tag"),
    [("a=b", ("a", "b")), ("a:b", ("a", "b")), ("a=b:c=d", ("a", "b:c=d")), ("a::", ("a", ":"))],
)
def test_a_tag_is_written_as_one_text(text: str, tag: tuple[str, str]) -> None:
    assert parse_tag(text) == tag


@pytest.mark.parametrize("text", ["", "a", "a=", "=b", ":"])
def test_a_text_without_key_or_value_is_no_tag(text: str) -> None:
    with pytest.raises(InvalidArgument, match="a tag is given as key=value"):
        parse_tag(text)

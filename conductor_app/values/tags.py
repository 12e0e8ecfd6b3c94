"""Tags: what callers and bodies say about a tree of executions, for people to find it by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from conductor_app.exceptions import InvalidArgument, InvalidArgumentType, TooManyTags
from conductor_app.values.texts import shown

#: Most tags of one tree.
MOST_TAGS = 10
KEY_LENGTH = 64
VALUE_LENGTH = 128
#: What stands between a key and its value where people write both as one text; no key has one.
SEPARATORS = ":="

_RESERVED = re.compile(r"(conductor|celery)([._-]|\Z)", re.IGNORECASE)

#: Fixed tags, or a function that gets a task's arguments and returns tags.
TagSource = Mapping[str, str] | Callable[..., Mapping[str, str] | None]


def check_tags(tags: object, what: str = "tags") -> dict[str, str]:
    """Return tags that may be stored.

    Args:
        tags: A mapping from keys to values.
        what: How it is called in an error.

    Raises:
        InvalidArgumentType: It is no mapping, or a key or a value is no text. Nothing is converted.
        InvalidArgument: A key or a value cannot be stored, or a key is reserved.
        TooManyTags: There are more than a tree may have.
    """
    checked = {key: value for key, value in check_changes(tags, what, may_remove=False).items() if value is not None}
    check_number(checked, what)
    return checked


def check_changes(tags: object, what: str = "tags", *, may_remove: bool = True) -> dict[str, str | None]:
    """Return tags to set, and with ``None`` the keys of those to remove.

    Raises:
        InvalidArgumentType, InvalidArgument: As for ``check_tags``.
    """
    if not isinstance(tags, Mapping):
        raise InvalidArgumentType(f'{what} must be a mapping such as {{"order": "7"}}, got {type(tags).__name__}')
    found: dict[str, str | None] = {}
    for key, value in tags.items():
        name = check_key(key, f"a key of {what}")
        found[name] = None if value is None and may_remove else check_value(value, f'tag "{name}"')
    return found


def check_key(key: object, what: str) -> str:
    """Return the key of a tag.

    Raises:
        InvalidArgumentType, InvalidArgument: It cannot be one.
    """
    text = _checked(key, what, KEY_LENGTH)
    if any(separator in text for separator in SEPARATORS):
        raise InvalidArgument(f"{what} must not contain : or =, which divide it from the value, got {shown(text)}")
    if _RESERVED.match(text):
        raise InvalidArgument(
            f"{what} is reserved: {shown(text)}. Keys that begin with conductor or celery are; choose another one."
        )
    return text


def check_value(value: object, what: str) -> str:
    """Return the value of a tag.

    Raises:
        InvalidArgumentType, InvalidArgument: It cannot be one.
    """
    return _checked(value, what, VALUE_LENGTH)


def check_number(tags: Mapping[str, Any], what: str) -> None:
    """Refuse more tags than a tree may have.

    Raises:
        TooManyTags: There are more.
    """
    if len(tags) > MOST_TAGS:
        raise TooManyTags(
            f"{what} would make {len(tags)} tags, and a tree of executions has {MOST_TAGS} at most: "
            f"{', '.join(sorted(tags))}. Keep in the payload what nobody looks for."
        )


def tags_of_call(source: TagSource | None, given: object, args: list[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of a call: those that its task says, and those of the call, which win.

    Args:
        source: What the task's decorator says.
        given: The option ``tags`` of the call.
        args: The call's arguments.
        kwargs: The call's arguments.

    Raises:
        InvalidArgumentType, InvalidArgument, TooManyTags: They cannot be stored.
    """
    if source is None and given is None:
        return {}
    said = source(*args, **kwargs) if callable(source) else source
    own = {} if said is None else check_tags(said, "tags of @durable_task")
    tags = {**own, **({} if given is None else check_tags(given))}
    check_number(tags, "the tags of the call and of @durable_task together")
    return tags


def parse_tag(text: str) -> tuple[str, str]:
    """Return the key and the value that ``key=value`` or ``key:value`` names.

    Raises:
        InvalidArgument: It names none.
    """
    found = re.match(rf"([^{SEPARATORS}]+)[{SEPARATORS}](.+)\Z", text, re.DOTALL)
    if found is None:
        raise InvalidArgument(f"a tag is given as key=value, got {shown(text)}")
    return found[1], found[2]


def _checked(text: object, what: str, limit: int) -> str:
    if not isinstance(text, str):
        raise InvalidArgumentType(
            f"{what} must be str, got {type(text).__name__} {shown(text, 40)}. Nothing is converted: write it as text."
        )
    if not text:
        raise InvalidArgument(f"{what} must have 1–{limit} characters, got none")
    if len(text) > limit:
        raise InvalidArgument(f"{what} must have 1–{limit} characters, got {len(text)}: {shown(text)}. Shorten it.")
    # MySQL ignores spaces at the end when it compares, so two values would be one there, and only there.
    if text != text.strip() or not text.isprintable():
        raise InvalidArgument(f"{what} must be printable text without spaces at its ends, got {shown(text)}. Strip it.")
    return str.__str__(text)  # a member of an Enum is written by its value

"""The storage format: JSON, the mark of later formats, and what a value may be at most.

The format is the one Celery itself uses for messages: JSON with kombu's types (datetime, date, time, Decimal, UUID,
bytes, and those that a project has registered there).

That is format 1 of what is stored, and has no mark. A later format begins each value with ``MARK`` and its number, as
no JSON does: so older versions tell it from damage, and leave it to newer ones.
"""

from __future__ import annotations

import json
from typing import Any

from kombu.utils.json import JSONEncoder, object_hook

from conductor_app.exceptions import NewerFormat
from conductor_app.values.texts import shown

MAX_NESTING = 100
#: Python refuses to parse longer integers (``sys.int_info.default_max_str_digits``).
MAX_INT_BITS = 14_000
ENVELOPE = {"__type__", "__value__"}
#: The first character of a value in another format than the first one.
MARK = "#"
encoder = JSONEncoder(allow_nan=False, separators=(",", ":"))
encode_json = encoder.encode


def _object_hook(found: dict[str, Any]) -> Any:
    """As kombu's, which says the same of a type that it does not know and of a value that is damaged."""
    if found.keys() != ENVELOPE:
        return found
    try:
        return object_hook(found)
    except ValueError as error:
        if error.args[:1] == ("Unsupported type",):
            raise NewerFormat(f"a stored value has the type {shown(found['__type__'], 40)}, unknown here") from None
        raise


#: As kombu's ``loads``, which makes a decoder for each text.
_decode_first_format = json.JSONDecoder(object_hook=_object_hook).decode


def decode_json(text: str) -> Any:
    """Return the value that a stored text stands for.

    Raises:
        NewerFormat: A newer version stored it.
        ValueError: It is damaged.
    """
    try:
        return _decode_first_format(text)
    except ValueError:
        if text.startswith(MARK):
            raise NewerFormat(f"a stored value has the format {shown(text[:8])}, unknown here") from None
        raise

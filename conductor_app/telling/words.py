"""Texts of tasks and callers, names, lengths of time and instants as they are shown, and phrases of sentences."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence

from django.utils import timezone
from django.utils.translation import gettext as _

#: Characters that a terminal would obey, that reorder or hide the text around them, and halves of characters, which
#: cannot be encoded. Tabs and line feeds are none of them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def short_name(task: str) -> str:
    """Return the last part of a task's name."""
    return task.rpartition(".")[2]


def middle(text: str, limit: int) -> str:
    """Return a name that has at most ``limit`` characters: of a longer one the beginning and the end."""
    if len(text) <= limit:
        return text
    end = (limit - 1) // 2
    return f"{text[: limit - 1 - end]}…{text[len(text) - end :]}"


def duration(seconds: float) -> str:
    """Return a length of time in its largest unit: ``40 ms``, ``0.2 s``, ``12 s``, ``6 min``, ``3 h``, ``4 d``."""
    seconds = max(seconds, 0.0)
    if seconds < 0.0995:
        return f"{seconds * 1_000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for limit, unit, size in ((120, "s", 1), (7_200, "min", 60), (172_800, "h", 3_600)):
        if seconds < limit:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds // 86_400:.0f} d"


def offset(seconds: float) -> str:
    """Return how long after a beginning something was: ``+0.123 s``, ``+12.3 s``, ``+5 min 7 s``, ``+3 d 0 h``."""
    sign, seconds = "-" if seconds < 0 else "+", abs(seconds)
    if seconds < 59.95:
        return f"{sign}{seconds:.3f} s" if seconds < 9.9995 else f"{sign}{seconds:.1f} s"
    whole = round(seconds)
    for limit, unit, size, smaller, small in ((3_600, "min", 60, "s", 1), (86_400, "h", 3_600, "min", 60)):
        if whole < limit:
            return f"{sign}{whole // size} {unit} {whole % size // small} {smaller}"
    return f"{sign}{whole // 86_400:,} d {whole % 86_400 // 3_600} h"


def instant(when: dt.datetime, now: dt.datetime) -> str:
    """Return an instant in the current time zone: the time of day, and the date if it is another day."""
    when, now = _local(when), _local(now)
    return f"{when:%H:%M:%S}" if when.date() == now.date() else f"{when:%Y-%m-%d %H:%M:%S}"


def exact(when: dt.datetime) -> str:
    """Return an instant in the current time zone, in full."""
    return f"{_local(when):%Y-%m-%d %H:%M:%S %Z}".rstrip()


def clean(text: str) -> str:
    """Return ``text`` as ``visible`` does, and on one line."""
    return visible(text).replace("\n", "\\n")


def visible(text: str) -> str:
    """Return ``text`` with the characters spelled out that a screen would obey instead of showing them."""
    return _INVISIBLE.sub(_spelled_out, text)


def first_line(text: str, limit: int = 200) -> str:
    """Return the first line of what a task wrote, cut to ``limit`` characters.

    What would begin another line of a log, or steer a terminal, is written out: ``\\x1b``.
    """
    lines = text.strip().splitlines()
    line = visible(lines[0][: limit + 1]) if lines else ""
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _spelled_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def _local(when: dt.datetime) -> dt.datetime:
    return timezone.localtime(when) if timezone.is_aware(when) else when


def attempt_of(attempt: int, max_attempts: int | None) -> str:
    """Return ``attempt 2 of 4``, or ``attempt 2`` if there is no limit."""
    if max_attempts is None:
        return _("attempt %(attempt)d") % {"attempt": attempt}
    return _("attempt %(attempt)d of %(allowed)d") % {"attempt": attempt, "allowed": max_attempts}


def seconds_between(begin: dt.datetime, end: dt.datetime) -> float:
    """Return how many seconds lie between two instants; none if a clock went backwards."""
    return max((end - begin).total_seconds(), 0.0)


def since(when: dt.datetime, now: dt.datetime) -> str:
    """Return how long ago something was."""
    return duration((now - when).total_seconds())


def due_in(when: dt.datetime, now: dt.datetime) -> str:
    """Return in what time something is due."""
    seconds = (when - now).total_seconds()
    return _("in %(time)s") % {"time": duration(seconds)} if seconds > 0 else _("now due")


def dated(when: dt.datetime, now: dt.datetime) -> dict[str, str]:
    """Return the values of a sentence that says when something is due."""
    return {"instant": instant(when, now), "when": due_in(when, now)}


def sentence(text: str) -> str:
    """Return a text that ends like a sentence."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


def reason(refused: str) -> str:
    """Return the reason for which an execution was put off, as a sentence."""
    return sentence(first_line(refused, 400))


def quoted(names: Sequence[str]) -> str:
    """Return names in quotation marks, the first five of them."""
    shown = ", ".join(f'"{name}"' for name in names[:5])
    return _("%(names)s and %(count)d more") % {"names": shown, "count": len(names) - 5} if len(names) > 5 else shown

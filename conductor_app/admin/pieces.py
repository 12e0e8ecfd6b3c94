"""The pieces of an execution's page: pills, instants, previews, hints with their commands."""

from __future__ import annotations

import datetime as dt
import json
import re
from dataclasses import dataclass

from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from conductor_app.models import Step
from conductor_app.states import StepStatus
from conductor_app.telling import labels, words
from conductor_app.values.failures import load_failure
from conductor_app.values.redaction import decode, readable
from conductor_app.values.state import ExecutionState

#: Characters of a step's result and of an event's payload.
PREVIEW = 500

#: Whatever language and punctuation stand before it.
_COMMAND = re.compile(r"(?:manage\.py conductor|celery -A) .*\Z", re.DOTALL)


@dataclass(frozen=True)
class Pill:
    """A status as a shape and a word, and the classes that colour them."""

    mark: str
    word: str
    classes: str


def pill(label: labels.Label, status: str) -> Pill:
    """Return a status as the stylesheets know it: ``cd-pill--failed``, and ``cd-pill--held-back`` for a finer word."""
    classes = dict.fromkeys(f"cd-pill--{word}" for word in (status, re.sub(r"\W+", "-", label.word)))
    return Pill(label.mark, _(label.word), " ".join(["cd-pill", *classes]))


def step_pill(step: Step) -> Pill:
    """Return a step's status."""
    status = StepStatus(step.status)
    word = step.get_status_display()
    return Pill(labels.STEP_MARKS[status], word, f"cd-pill cd-pill--{status.value.replace('_', '-')}")


def in_short(error: str, limit: int) -> str:
    """Return the first line of an error's message, or its class if the message may not be seen."""
    failure = load_failure(error)
    return words.visible(words.first_line(failure.message or words.short_name(failure.type), limit))


def with_command(hint: str) -> SafeString:
    """Return a hint with the command at its end as code."""
    hint = words.visible(hint)
    command = _COMMAND.search(hint)
    if command is None:
        return format_html("{}", hint)
    return format_html("{}<code>{}</code>", hint[: command.start()], command[0])


def left_out(number: int) -> str:
    """Return how many are left out, with separators; nothing if none is."""
    return f"{number:,}" if number > 0 else ""


def elapsed(seconds: float) -> str:
    """Return the time since the beginning: ``+1.250 s``, ``+2:46:40``, ``+3 d 0:00:10``."""
    if abs(seconds) < 1_000:
        return f"{seconds:+.3f} s"
    days, rest = divmod(round(abs(seconds)), 86_400)
    clock = f"{rest // 3_600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{'+' if seconds > 0 else '-'}{f'{days} d ' if days else ''}{clock}"


def isolated(text: str) -> SafeString:
    """Return what a task or its caller has written, with a direction of its own."""
    return format_html("<bdi>{}</bdi>", words.visible(text))


def instant(when: dt.datetime, now: dt.datetime) -> SafeString:
    """Return an instant, and how far from now it is."""
    seconds = (now - when).total_seconds()
    near = words.duration(abs(seconds))
    relative = _("%(time)s ago") % {"time": near} if seconds >= 0 else _("in %(time)s") % {"time": near}
    return format_html(
        '<time datetime="{}">{}</time> <span class="cd-quiet">({})</span>',
        when.isoformat(),
        words.exact(when),
        relative,
    )


def bar(state: ExecutionState, *, with_note: bool) -> SafeString:
    """Return how far an execution is: a bar, if it is known how much there is, the numbers, and the note."""
    done = f"{state.done:,}"
    numbers = done if state.total is None else _("%(done)s of %(total)s") % {"done": done, "total": f"{state.total:,}"}
    note = isolated(state.note) if state.note and with_note else ""
    if state.fraction is None:
        return format_html("{} {}", numbers, note)
    value = f"{state.fraction:.4f}"
    return format_html(
        '<progress class="cd-progress" value="{}" max="1" aria-label="{}"></progress> <span>{}</span> {}',
        value,
        _("progress"),
        numbers,
        note,
    )


def preview(value: str | None, length: int | None) -> str:
    """Return the beginning of a stored value that has so many characters in all, or of as much of it as was read."""
    if value is None:
        return ""
    text = words.visible(readable(value, is_cut=len(value) < (length or 0)))
    if len(text) <= PREVIEW and len(value) >= (length or 0):
        return text
    return _("%(beginning)s… (%(length)s characters)") % {"beginning": text[:PREVIEW], "length": f"{length:,}"}


def pretty(name: str, text: str) -> str:
    """Return a value on several lines; of a payload the keyword arguments alone, if there are no others."""
    if name == "payload":
        try:
            args, kwargs = decode(text)
            shown = {"args": args, "kwargs": kwargs} if args else kwargs
            return json.dumps(shown, indent=2, default=str, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError):  # damaged
            pass
    return readable(text, indent=2)

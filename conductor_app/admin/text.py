"""How the admin shows what tasks, workers and people wrote: as text, whatever is in it."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from conductor_app.models import Step
from conductor_app.states import StepStatus
from conductor_app.telling.labels import STEP_MARKS, Label
from conductor_app.telling.words import clean, duration, exact, middle, short_name, visible
from conductor_app.values.redaction import readable

T = TypeVar("T")
Row = TypeVar("Row")

#: Every word that ``labels.label`` says, and those of workers and queues, for translators.
WORDS: dict[str, Any] = {
    "queued": _("queued"),
    "scheduled": _("scheduled"),
    "held back": _("held back"),
    "retrying": _("retrying"),
    "running": _("running"),
    "waiting": _("waiting"),
    "sleeping": _("sleeping"),
    "succeeded": _("succeeded"),
    "failed": _("failed"),
    "cancelled": _("cancelled"),
    "held": _("held"),
    "paused": _("paused"),
    "alive": _("alive"),
    "stopping": _("stopping"),
    "silent": _("silent"),
    "served": _("served"),
    "all busy": _("all busy"),
    "served by nobody": _("served by nobody"),
}


#: Characters of a task's name in lists and tables.
LONGEST_NAME = 28


def or_dash(look: Callable[[Any, Row], T | None]) -> Callable[[Any, Row], T | str]:
    """Let a column or a field say "-" where there is nothing: on a row's own page, Django would say "None"."""

    @functools.wraps(look)
    def looked(page: Any, row: Row) -> T | str:
        found = look(page, row)
        return "-" if found is None else found

    return looked


def shown(text: object, title: str = "") -> SafeString:
    """Return text that comes from the database: isolated, with control characters spelled out."""
    if title:
        return format_html('<bdi title="{}">{}</bdi>', clean(title), clean(str(text)))
    return format_html("<bdi>{}</bdi>", clean(str(text)))


def readable_value(text: str | None) -> SafeString | None:
    """Return a stored value as indented JSON, without what ``CONDUCTOR["REDACT"]`` names."""
    if not text:
        return None
    return format_html('<pre class="cd-value"><bdi>{}</bdi></pre>', visible(readable(text, indent=2)))


def task_name(task: str) -> SafeString:
    """Return the last part of a task's name, without its middle if it is long; the whole to whoever points."""
    return shown(middle(short_name(task), LONGEST_NAME), title=task)


def tail(key: object) -> str:
    """Return the end of an execution's id: those of a tree begin alike."""
    return f"…{str(key)[-8:]}"


def pill(label: Label, word: str = "") -> SafeString:
    """Return a status as a shape and a word, which is another one than the label's for a step."""
    return format_html(
        '<span class="cd-pill cd-pill--{}"><span aria-hidden="true">{}</span> {}</span>',
        label.word.replace(" ", "-").replace("_", "-"),
        label.mark,
        word or WORDS.get(label.word, label.word),
    )


def step_pill(status: str) -> SafeString:
    """Return a step's status as a shape and a word."""
    return pill(Label(STEP_MARKS.get(cast(StepStatus, status), "?"), status), Step(status=status).get_status_display())


def ago(when: dt.datetime | None, now: dt.datetime) -> SafeString | None:
    """Return how long ago an instant was, and the instant itself to whoever points at it."""
    if when is None:
        return None
    passed = duration((now - when).total_seconds())
    return format_html(
        '<time datetime="{}" title="{}">{}</time>',
        when.isoformat(),
        exact(when),
        _("%(duration)s ago") % {"duration": passed},
    )

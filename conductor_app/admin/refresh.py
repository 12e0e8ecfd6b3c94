"""Pages that load themselves again: ``?refresh=5``, without a script."""

from __future__ import annotations

from dataclasses import dataclass

from django.http import HttpRequest, HttpResponseBase
from django.utils.translation import gettext as _

PARAMETER = "refresh"
#: Seconds between two loads that a page may be asked for.
INTERVALS = (5, 15)


@dataclass(frozen=True)
class Link:
    """One choice of how often the page loads itself again."""

    text: str
    url: str
    is_current: bool


def interval(request: HttpRequest) -> int | None:
    """Return the seconds that ``?refresh=`` asks for, as the nearest longer one of ``INTERVALS``; ``None``: not at all.

    What is not a whole number above 0 asks for nothing.
    """
    asked = request.GET.get(PARAMETER, "")
    if not (asked.isascii() and asked.isdigit()) or not asked.strip("0"):
        return None
    return next((seconds for seconds in INTERVALS if len(asked) < 4 and int(asked) <= seconds), INTERVALS[-1])


def apply_refresh(request: HttpRequest, response: HttpResponseBase) -> None:
    """Let the browser load the page again, if its address asks for it."""
    seconds = interval(request)
    if request.method == "GET" and response.status_code == 200 and seconds is not None:
        response.headers["Refresh"] = str(seconds)


def links(request: HttpRequest) -> list[Link]:
    """Return the choices for a template: each interval, and off; the rest of the address stays as it is."""
    current = interval(request)
    choices: list[Link] = []
    for seconds in (*INTERVALS, None):
        query = request.GET.copy()
        query.pop(PARAMETER, None)
        if seconds is not None:
            query[PARAMETER] = str(seconds)
        text = _("off") if seconds is None else _("%(seconds)d s") % {"seconds": seconds}
        choices.append(Link(text, f"?{query.urlencode()}", seconds == current))
    return choices

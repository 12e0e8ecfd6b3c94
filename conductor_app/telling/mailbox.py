"""Events that were sent to an execution and that no step has taken."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from django.db.models import Count
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from conductor_app.models import Event, database


def mailbox_of(execution_id: uuid.UUID) -> dict[str, int]:
    """Return how many events of each name were sent to an execution that no step has taken."""
    waiting = Event.objects.using(database()).filter(execution_id=execution_id, taken_at__isnull=True)
    return dict(waiting.order_by("name").values_list("name").annotate(number=Count("pk")))


def unclaimed(mailbox: Mapping[str, int]) -> str:
    """Return what to say of events that were sent and not taken, counted by name; nothing if there are none."""
    if not mailbox:
        return ""
    count = sum(mailbox.values())
    text = ngettext(
        "%(count)s event that nobody waits for: %(names)s",
        "%(count)s events that nobody waits for: %(names)s",
        count,
    )
    names = [
        name if number == 1 or number == count else f"{name} ({number:,})" for name, number in sorted(mailbox.items())
    ]
    shown = ", ".join(names[:5])
    if len(names) > 5:
        shown = _("%(names)s and %(count)d more") % {"names": shown, "count": len(names) - 5}
    return text % {"count": f"{count:,}", "names": shown}

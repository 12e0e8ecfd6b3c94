"""Links from an execution's page to its logs and traces elsewhere, as ``CONDUCTOR["LINKS"]`` says."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from urllib.parse import quote

from django.utils import timezone

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution

#: W3C's, with the trace's id.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-.*")
#: What is logged about a beginning and an end comes a little before and after.
_MARGIN = dt.timedelta(seconds=1)


def links(execution: Execution, now: dt.datetime) -> Iterator[tuple[str, str]]:
    """Return the label and the URL of each link; one that needs a trace is left out where there is none."""
    templates = conductor_settings().LINKS
    if not templates:
        return
    trace_id = trace_id_of(execution)
    started = _utc(execution.started_at or execution.created_at) - _MARGIN
    finished = _utc(execution.finished_at or now) + _MARGIN
    values = {
        "execution_id": str(execution.pk),
        "root_id": str(execution.root_id),
        "task": execution.task,
        "trace_id": trace_id,
        "started": _iso(started),
        "finished": _iso(finished),
        "started_ms": str(int(started.timestamp() * 1000)),
        "finished_ms": str(int(finished.timestamp() * 1000)),
    }
    quoted = {name: quote(value, safe="") for name, value in values.items()}
    for label, template in templates.items():
        if trace_id or "{trace_id}" not in template:
            yield label, template.format_map(quoted)


def trace_id_of(execution: Execution) -> str:
    """Return the id of the trace that an execution belongs to, from the headers that it keeps; empty if of none."""
    if "traceparent" not in execution.options:
        return ""
    found = _TRACEPARENT.fullmatch(str((execution.get_options().get("headers") or {}).get("traceparent", "")))
    return found[1] if found and set(found[1]) != {"0"} else ""


def _utc(instant: dt.datetime) -> dt.datetime:
    return (timezone.make_aware(instant) if timezone.is_naive(instant) else instant).astimezone(dt.UTC)


def _iso(instant: dt.datetime) -> str:
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")

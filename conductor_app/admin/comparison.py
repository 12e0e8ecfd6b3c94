"""An execution beside another one of its task, by default the latest that has succeeded."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils.translation import gettext as _

from conductor_app.admin import access, pieces
from conductor_app.admin.page import ExecutionPage
from conductor_app.admin.text import shown
from conductor_app.models import Execution, Step, database
from conductor_app.telling import comparison, labels, words
from conductor_app.telling.story import Story, tell
from conductor_app.values.redaction import readable

#: Characters of a payload that are compared.
_LONGEST = 20_000


def urls(owner: ExecutionPage) -> list[URLPattern]:
    """Return the address of the page."""
    view: Callable[..., Any] = owner.admin_site.admin_view

    def page(request: HttpRequest, object_id: uuid.UUID) -> HttpResponse:
        return show(owner, request, object_id)

    return [path("<uuid:object_id>/compare/", view(page), name="conductor_app_execution_compare")]


def show(owner: ExecutionPage, request: HttpRequest, object_id: uuid.UUID) -> HttpResponse:
    """Return the page.

    Raises:
        PermissionDenied: The user may not see executions.
        Http404: One of the two is not there, or is not shown to this user.
    """
    if not owner.has_view_permission(request):
        raise PermissionDenied
    execution = owner.get_object(request, str(object_id))
    if execution is None:
        raise Http404
    wanted = request.GET.get("with", "").strip()
    other = _other(owner, request, execution, wanted)
    is_open = access.may_see_payloads(request)
    context = {
        **owner.admin_site.each_context(request),
        "opts": owner.opts,
        "title": _("Compare two executions"),
        "media": owner.media,
        "execution": execution,
        "own_url": owner.address("change", execution.pk),
        "list_url": owner.address("changelist"),
        "wanted": words.visible(wanted),
        "is_missing": other is None and bool(wanted),
        "name": shown(words.short_name(execution.task), title=execution.task),
    }
    if other is not None:
        stories = [
            tell(row, preview=pieces.PREVIEW if is_open else 0, seen=owner.seen(request), with_messages=is_open)
            for row in (execution, other)
        ]
        context |= _compared(owner, *stories, is_open=is_open)
    return TemplateResponse(request, "admin/conductor_app/execution/compare.html", context)


def _other(owner: ExecutionPage, request: HttpRequest, execution: Execution, wanted: str) -> Execution | None:
    if wanted:
        return owner.get_object(request, wanted)
    found = comparison.partner(execution, owner.get_queryset(request).using(database()))
    return None if found is None else owner.get_object(request, str(found.pk))


def _compared(owner: ExecutionPage, own: Story, other: Story, *, is_open: bool) -> dict[str, Any]:
    steps = list(comparison.pairs(own, other))
    longest = max([0.0, *(seconds for pair in steps for seconds in (_gap(pair),) if seconds is not None)])
    return {
        "sides": [_side(owner, story) for story in (own, other)],
        "steps": [
            {
                "name": words.visible(pair.name),
                "differs": pair.differs,
                "cells": [_cell(owner, pair.own, own), _cell(owner, pair.other, other)],
                "is_slowest": bool(longest) and _gap(pair) == longest,
            }
            for pair in steps
        ],
        "is_cut": own.step_count > len(own.steps) or other.step_count > len(other.steps),
        "payload": list(comparison.lines(*(_payload(story.execution) for story in (own, other)))) if is_open else None,
        "is_other_task": own.execution.task != other.execution.task,
    }


def _gap(pair: comparison.Pair) -> float | None:
    own, other = comparison.seconds(pair.own), comparison.seconds(pair.other)
    return None if own is None or other is None else abs(own - other)


def _side(owner: ExecutionPage, story: Story) -> dict[str, Any]:
    execution = story.execution
    totals = comparison.totals(story)
    return {
        "link": owner.link(execution.pk),
        "pill": pieces.pill(labels.label(execution, story.now, story.situation.pending), execution.status),
        "facts": [
            (_("task"), pieces.isolated(execution.task)),
            (_("created"), words.exact(execution.created_at)),
            (_("took"), words.duration(totals["total"])),
            (_("in the queue"), words.duration(totals["queued"])),
            (_("running"), words.duration(totals["running"])),
            (_("waiting"), words.duration(totals["waiting"])),
            (_("attempt"), labels.attempts(execution)),
            (_("runs"), f"{execution.fence:,}"),
            (_("queue"), pieces.isolated(execution.queue)),
        ],
        "error": pieces.in_short(execution.error, pieces.PREVIEW) if execution.error else "",
    }


def _cell(owner: ExecutionPage, step: Step | None, story: Story) -> dict[str, Any] | None:
    if step is None:
        return None
    took = comparison.seconds(step)
    error = story.error_of(step)
    return {
        "pill": pieces.step_pill(step),
        "took": "" if took is None else words.duration(took),
        "child": None if step.child_id is None else owner.link(step.child_id, text=str(step.child_id)[:8]),
        "error": pieces.in_short(error, pieces.PREVIEW) if error else "",
    }


def _payload(execution: Execution) -> str:
    return words.visible(readable(execution.payload, indent=2)[:_LONGEST])

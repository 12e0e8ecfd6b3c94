"""What an execution is doing and why, or how it ended, in one or two sentences."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

from django.utils.translation import gettext as _

from conductor_app.conf import conductor_settings
from conductor_app.models import Execution
from conductor_app.states import ExecutionStatus
from conductor_app.store.owners import node_name
from conductor_app.telling.endings import cancelled, failed, succeeded
from conductor_app.telling.hints import add_worker, start_worker
from conductor_app.telling.labels import MARKS, RETRYING_MARK, STOPPED_MARK
from conductor_app.telling.queues import is_unanswered
from conductor_app.telling.situation import Headline, Situation
from conductor_app.telling.stops import why_held, why_paused
from conductor_app.telling.waits import waiting
from conductor_app.telling.words import (
    attempt_of,
    dated,
    due_in,
    duration,
    first_line,
    instant,
    reason,
    sentence,
    short_name,
    since,
)
from conductor_app.values.failures import load_failure

#: Why a worker could not read a message.
_REFUSALS = frozenset({"kombu.exceptions.ContentDisallowed", "kombu.exceptions.DecodeError"})


def headline(situation: Situation) -> Headline:
    """Return what an execution is doing, or how it ended, in one or two sentences."""
    write = {
        ExecutionStatus.QUEUED: _queued,
        ExecutionStatus.RUNNING: _running,
        ExecutionStatus.WAITING: waiting,
        ExecutionStatus.SUCCEEDED: succeeded,
        ExecutionStatus.FAILED: failed,
        ExecutionStatus.CANCELLED: cancelled,
    }[ExecutionStatus(situation.execution.status)]
    said = _stopped(situation, write(situation))
    more = [text for text in (_astray(situation.execution), _bounded(situation)) if text]
    return replace(said, text=" ".join([sentence(said.text), *more])) if more else said


def _stopped(situation: Situation, said: Headline) -> Headline:
    """Return what is to be said of one that people keep from beginning, before what it does or waits for."""
    execution, now = situation.execution, situation.now
    if execution.is_held:
        hint = _("Let it go on: %(command)s") % {"command": f"manage.py conductor release {execution.pk}"}
        text = why_held(execution, now)
        if execution.status == ExecutionStatus.RUNNING:
            stops = _("Its run ends at its next ctx call.")
            text = f"{text} {stops}"
        elif execution.status == ExecutionStatus.WAITING or (execution.due_at is not None and execution.due_at > now):
            text = f"{text} {said.text}"
        return Headline(STOPPED_MARK, text, (hint,))
    if situation.paused is not None and execution.cancel_requested_at is None:
        command = f"manage.py conductor unpause {situation.paused.name}"
        hint = _("Let its runs begin again: %(command)s") % {"command": command}
        return Headline(STOPPED_MARK, why_paused(situation.paused, now), (hint,))
    return said


def _astray(execution: Execution) -> str:
    """Return what is to be said of a run that has missed the step that had woken it, unless that has failed it."""
    if execution.status in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
        return ""
    # Not where a list has left them out: that would be a query for each line.
    if "options" in execution.get_deferred_fields():
        return ""
    try:
        found = execution.astray
    except (ValueError, RecursionError):  # damaged options
        return ""
    if not isinstance(found, dict):
        return ""
    values = {"woken": found.get("woken_by"), "instead": found.get("came_to")}
    if values["instead"] is None:
        return _('A run that step "%(woken)s" had woken returned without coming to it again.') % values
    text = _('A run that step "%(woken)s" had woken came to step "%(instead)s" without coming to it again.')
    return text % values


def _bounded(situation: Situation) -> str:
    """Return what is to be said of the deadline of its tree, while that has not passed into a cancellation."""
    execution, at = situation.execution, situation.deadline
    if at is None or execution.is_final or execution.cancel_requested_at is not None:
        return ""
    if at <= situation.now:
        text = _("The deadline of its tree was %(instant)s: it is cancelled at the next sweep.")
        return text % {"instant": instant(at, situation.now)}
    return _("It will be cancelled at %(instant)s (%(when)s), with its tree.") % dated(at, situation.now)


def _queued(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.QUEUED]
    if execution.cancel_requested_at is not None:
        return Headline(mark, _("Queued, and cancelled at the next sweep."))
    if execution.due_at is None and execution.unique_key is not None and execution.position is None:
        values = {"execution": execution.predecessor, "key": execution.unique_key}
        if execution.predecessor is None:  # one that the reader may not see
            return Headline(
                mark, _('Waits until the execution before it of the unique key "%(key)s" has ended.') % values
            )
        return Headline(mark, _('Waits until execution %(execution)s of the unique key "%(key)s" has ended.') % values)
    if execution.due_at is None:
        return Headline(mark, _("Held back until another child of its map ends (max_parallel)."))
    if execution.is_parked:
        return Headline(mark, _parked(situation), _who_holds(situation))
    refused = execution.put_off_because
    if execution.due_at > now and refused:
        values = {"reason": reason(refused), "when": due_in(execution.due_at, now)}
        return Headline(RETRYING_MARK, _("Put off, no attempt is used up: %(reason)s Next try %(when)s.") % values)
    if execution.due_at > now:
        if execution.attempt > 1:
            return Headline(RETRYING_MARK, _retrying(execution, execution.due_at, now))
        return Headline(mark, _("Scheduled for %(instant)s (%(when)s).") % dated(execution.due_at, now))
    waited = (now - execution.due_at).total_seconds()
    values = {"time": duration(waited), "queue": execution.queue}
    refusal = load_failure(execution.error) if execution.error else None
    if refusal is not None and refusal.type in _REFUSALS:
        text = _('Queued for %(time)s in queue "%(queue)s". %(error)s')
        hint = _("Add json to CELERY_ACCEPT_CONTENT in the workers' settings (conductor.E032), and restart them.")
        return Headline(mark, text % {**values, "error": sentence(first_line(refusal.message))}, (hint,))
    if is_unanswered(execution, now):
        if situation.at_work:
            text = _('Queued for %(time)s in queue "%(queue)s", whose workers are busy (%(running)s running).')
            text %= {**values, "running": f"{situation.at_work:,}"}
            return Headline(mark, _with_refusal(text, refused), (add_worker(situation, execution.queue),))
        text = _('Queued for %(time)s in queue "%(queue)s": no worker took it.') % values
        return Headline(mark, _with_refusal(text, refused), (start_worker(situation, execution.queue),))
    return Headline(mark, _with_refusal(_('Queued for %(time)s in queue "%(queue)s".') % values, refused))


def _parked(situation: Situation) -> str:
    parked = situation.parked
    if parked is None:
        return _("Parked: it waits for a place of a limit.")
    values = {
        "time": since(parked.since, situation.now),
        "limit": f'"{parked.limit}"' + (f" ({parked.key})" if parked.key else ""),
        "taken": parked.taken,
        "number": parked.number,
        "before": parked.before,
    }
    if parked.number is None:
        text = _("Parked for %(time)s: the rate of limit %(limit)s lets no more start yet; %(before)s wait before it.")
    else:
        text = _(
            "Parked for %(time)s: %(taken)s of %(number)s places of limit %(limit)s are taken; %(before)s wait before "
            "it."
        )
    return text % values


def _who_holds(situation: Situation) -> tuple[str, ...]:
    """Return how to look at those that have a place."""
    holders = () if situation.parked is None else situation.parked.holders
    return tuple(f"manage.py conductor show {holder}" for holder in holders)


def _with_refusal(text: str, refused: str) -> str:
    if not refused:
        return text
    before = _("It was put off before: %(reason)s") % {"reason": reason(refused)}
    return f"{text} {before}"


def _retrying(execution: Execution, due_at: dt.datetime, now: dt.datetime) -> str:
    failure = load_failure(execution.error)
    values = {
        "attempt": execution.attempt - 1,
        "allowed": execution.max_attempts,
        "error": _error(failure.type, failure.message),
        "when": due_in(due_at, now),
    }
    if execution.max_attempts is None:
        return _("Attempt %(attempt)d failed (%(error)s). Next try %(when)s.") % values
    return _("Attempt %(attempt)d of %(allowed)d failed (%(error)s). Next try %(when)s.") % values


def _error(error_class: str, message: str) -> str:
    """Return an error in one line; its class alone if its message may not be seen."""
    return f"{short_name(error_class)}: {first_line(message)}" if message else short_name(error_class)


def _running(situation: Situation) -> Headline:
    execution, now = situation.execution, situation.now
    mark = MARKS[ExecutionStatus.RUNNING]
    values = {
        "worker": node_name(execution.lease_owner),
        "attempt": attempt_of(execution.attempt, execution.max_attempts),
    }
    if execution.lease_expires_at is not None:
        settings = conductor_settings()
        heartbeat = execution.lease_expires_at - dt.timedelta(seconds=settings.LEASE_SECONDS)
        silent = (now - heartbeat).total_seconds()
        if silent > 2 * settings.HEARTBEAT_SECONDS:
            values |= {"time": duration(silent)}
            text = _("Running, but worker %(worker)s stopped sending heartbeats %(time)s ago.") % values
            return Headline(mark, f"{text} {_when_lapsed(execution, instant(execution.lease_expires_at, now))}")
    if execution.started_at is None:
        text = _("Running on %(worker)s, %(attempt)s.") % values
    else:
        values |= {"time": since(execution.started_at, now)}
        text = _("Running on %(worker)s, %(attempt)s; first started %(time)s ago.") % values
    if execution.cancel_requested_at is not None:
        text = f"{text} {_when_cancelled(execution, since(execution.cancel_requested_at, now))}"
    return Headline(mark, text)


def _when_cancelled(execution: Execution, since: str) -> str:
    if _is_plain(execution):
        text = _(
            "Its cancellation was requested %(time)s ago: a plain Celery task cannot be stopped while it runs, so it "
            "runs to its end, and its result is kept."
        )
    else:
        text = _("Its cancellation was requested %(time)s ago: the body stops at its next ctx call.")
    return text % {"time": since}


def _is_plain(execution: Execution) -> bool:
    try:
        return execution.is_plain
    except (ValueError, RecursionError):  # damaged options: whatever they were, the rest can be told
        return False


def _runs_again(execution: Execution) -> bool:
    try:
        return execution.runs_again
    except (ValueError, TypeError, KeyError, RecursionError):
        return True


def _when_lapsed(execution: Execution, at: str) -> str:
    if _runs_again(execution):
        return _("It will be re-queued automatically at %(instant)s.") % {"instant": at}
    text = _("A plain Celery task without acks_late is not run twice: it will be failed at %(instant)s.")
    return text % {"instant": at}

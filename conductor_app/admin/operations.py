"""What an operator may do to executions in the admin: forms, what each action does, for which ones, and the words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from django import forms
from django.contrib import messages
from django.db.models import Exists, OuterRef, Q
from django.utils.text import capfirst
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from conductor_app import api
from conductor_app.body.names import check_name
from conductor_app.conf import conductor_settings
from conductor_app.exceptions import ActionRefused, ConductorError, ExecutionFinished
from conductor_app.models import Execution, Step, database
from conductor_app.states import FINAL_STATUSES, OPEN_STATUSES, ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.values.payloads import dumps

#: A due execution whose message may have been lost: nobody has taken it for so many seconds.
OVERDUE_SECONDS = 60


# ------------------------------------------------------------------------------------------------- the actions' forms


class NoForm(forms.Form):
    """Nothing to fill in."""


class CancelForm(forms.Form):
    """Why it is cancelled."""

    reason = forms.CharField(
        label=_("Reason"),
        required=False,
        max_length=250,
        help_text=_("Optional. Stored with the executions and shown."),
        widget=forms.TextInput(attrs={"class": "vTextField"}),
    )


class EventForm(forms.Form):
    """The event that is sent."""

    event = forms.CharField(
        label=_("Event"),
        help_text=_("Its name, as in ctx.wait_for."),
        widget=forms.TextInput(attrs={"class": "vTextField", "autocomplete": "off"}),
    )
    payload = forms.CharField(
        label=_("Payload"),
        required=False,
        strip=False,
        help_text=_('JSON, which ctx.wait_for returns; empty is null. A text needs its quotes: "yes".'),
        widget=forms.Textarea(attrs={"class": "vLargeTextField", "rows": 4, "spellcheck": "false"}),
    )
    #: The same form sent twice, by a double click or a reload, sends one event.
    key = forms.CharField(widget=forms.HiddenInput, max_length=100)

    def clean_event(self) -> str:
        """Check the name as ``api.send_event`` does."""
        try:
            return check_name(self.cleaned_data["event"], "event name")
        except ConductorError as error:
            raise forms.ValidationError(capfirst(str(error))) from None

    def clean_payload(self) -> Any:
        """Decode the payload, and check that it can be stored."""
        text = self.cleaned_data["payload"]
        if not text.strip():
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise forms.ValidationError(_("This is not JSON: %(error)s."), params={"error": error}) from None
        try:
            dumps(value, "payload", conductor_settings().MAX_PAYLOAD_BYTES)
        except ConductorError as error:
            raise forms.ValidationError(capfirst(str(error))) from None
        return value


class RerunForm(forms.Form):
    """Nothing to say; the same form sent twice, by a double click or a reload, starts one new execution."""

    key = forms.CharField(widget=forms.HiddenInput, max_length=100, required=False)


# -------------------------------------------------------------------------------------------------------- the actions


class Unchanged(Exception):
    """An action found nothing to do; ``str()`` says why in a few words."""


@dataclass(frozen=True)
class Action:
    """One thing that an operator may do."""

    name: str
    #: On buttons and in lists.
    label: Any
    #: Codename of the permission that it takes.
    permission: str
    #: What was done, after a number: "12 retried".
    done: Any
    #: What was done to one alone.
    told: Any
    #: What it will do, for the page that asks.
    effect: Any
    #: Does it to one execution. Raises ``ActionRefused``, ``Unchanged`` or ``Execution.DoesNotExist``.
    act: Callable[[Execution, dict[str, Any]], None]
    #: Which executions it is for, as of now.
    fits: Callable[[], Q]
    #: When an execution's page offers it, if not whenever it fits.
    offered: Callable[[], Q] | None = None
    form: type[forms.Form] = NoForm
    #: What the audit says of one.
    audit: Callable[[dict[str, Any]], str] = field(default=lambda data: "")
    is_destructive: bool = False


def _cancel(execution: Execution, data: dict[str, Any]) -> None:
    if not api.cancel(execution, reason=data["reason"]):
        raise Unchanged(gettext("ended already"))


def _send(execution: Execution, data: dict[str, Any]) -> None:
    try:
        if not api.send_event(execution, data["event"], data["payload"], id=data["key"]):
            raise Unchanged(gettext("sent already"))
    except ExecutionFinished:
        raise Unchanged(gettext("ended already")) from None


def _rerun(execution: Execution, data: dict[str, Any]) -> None:
    key = f"{data['key']}-{execution.pk}" if data["key"] else None
    data["created"] = api.rerun(execution, idempotency_key=key)


def _publish(execution: Execution, _data: dict[str, Any]) -> None:
    if not api.publish_again(execution):
        raise ActionRefused(
            gettext("The broker did not take the message. Workers will publish it later."),
            reason=gettext("the broker did not take the message"),
        )


def _waits_for_an_instant() -> Q:
    sleeps = Step.objects.using(database()).filter(
        execution=OuterRef("pk"), kind=StepKind.SLEEP, status=StepStatus.PENDING
    )
    is_later = Q(status=ExecutionStatus.QUEUED, due_at__gt=clock.now(), cancel_requested_at__isnull=True)
    return is_later | (Q(status=ExecutionStatus.WAITING) & Q(Exists(sleeps)))


def _is_due_since(seconds: float) -> Q:
    return Q(status=ExecutionStatus.QUEUED, due_at__lte=clock.after(-seconds), cancel_requested_at__isnull=True)


#: Those that a retry runs again.
RETRIED_STATUSES = frozenset({ExecutionStatus.FAILED, ExecutionStatus.CANCELLED})
_FINAL, _OPEN = sorted(FINAL_STATUSES), sorted(OPEN_STATUSES)

RETRY = Action(
    name="retry",
    label=_("Retry from the failed step"),
    permission="retry_execution",
    done=_("retried"),
    told=_("The execution is retried."),
    effect=_(
        "Runs it again from what failed. Finished steps keep their results; failed and cancelled children run again, "
        "and attempts are counted anew."
    ),
    act=lambda execution, data: api.retry(execution),
    fits=lambda: Q(parent__isnull=True, status__in=[ExecutionStatus.FAILED, ExecutionStatus.CANCELLED]),
    audit=lambda data: "Retried from the failed step.",
)
RERUN = Action(
    name="rerun",
    label=_("Run again as new"),
    permission="retry_execution",
    done=_("run again as new"),
    told=_("This is a new execution."),
    effect=_(
        "Starts a new execution with the same task and payload, by the code of today. It keeps no step, so side "
        "effects happen again. The old one stays as it is."
    ),
    act=_rerun,
    fits=lambda: Q(parent__isnull=True, status__in=_FINAL),
    form=RerunForm,
    audit=lambda data: f"Run again as new execution {data['created'].pk}.",
)
CANCEL = Action(
    name="cancel",
    label=_("Cancel"),
    permission="cancel_execution",
    done=_("cancelled"),
    told=_("The execution is cancelled."),
    effect=_("Queued and waiting executions end at once. A running body is not killed: it stops at its next ctx call."),
    act=_cancel,
    fits=lambda: Q(status__in=_OPEN),
    offered=lambda: Q(status__in=_OPEN, cancel_requested_at__isnull=True),
    form=CancelForm,
    audit=lambda data: f"Cancelled: {data['reason']}" if data["reason"] else "Cancelled.",
    is_destructive=True,
)
WAKE = Action(
    name="wake",
    label=_("Wake now"),
    permission="retry_execution",
    done=_("woken"),
    told=_("The execution is woken."),
    effect=_("Ends its sleep, or its wait for a retry or a countdown, now instead of later."),
    act=lambda execution, data: api.wake(execution),
    fits=_waits_for_an_instant,
    audit=lambda data: "Woken.",
)
SEND = Action(
    name="send",
    label=_("Send an event"),
    permission="send_event",
    done=_("sent the event"),
    told=_("The event is sent."),
    effect=_("The step that waits for this event takes it; if none does yet, it is kept."),
    act=_send,
    fits=lambda: Q(status__in=_OPEN),
    form=EventForm,
    audit=lambda data: f"Sent the event {data['event']!r}.",
)
PUBLISH = Action(
    name="publish",
    label=_("Publish again"),
    permission="retry_execution",
    done=_("published again"),
    told=_("The message is published again."),
    effect=_("Publishes its Celery message once more. A message too many changes nothing."),
    act=_publish,
    fits=lambda: _is_due_since(0),
    offered=lambda: _is_due_since(OVERDUE_SECONDS),
    audit=lambda data: "Published again.",
)

ACTIONS: dict[str, Action] = {action.name: action for action in (RETRY, RERUN, CANCEL, WAKE, SEND, PUBLISH)}


# ------------------------------------------------------------------------------------------------------------ outcomes


class Outcomes:
    """What became of each execution, counted."""

    def __init__(self) -> None:
        self.done: list[Execution] = []
        self.skipped: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        #: The last refusal in full, for whoever acted on one execution alone.
        self.why = ""

    def sentence(self, action: Action) -> str:
        """Return the counts in words: "12 retried, 3 skipped: not failed, 1 refused: a child"."""
        parts = [f"{len(self.done):,} {action.done}"]
        parts += [self._counted(self.skipped, gettext("skipped"))] if self.skipped else []
        parts += [self._counted(self.refused, gettext("refused"))] if self.refused else []
        return f"{', '.join(parts)}."

    @staticmethod
    def _counted(reasons: Counter[str], word: str) -> str:
        text = " / ".join(
            reason if len(reasons) == 1 else f"{count:,} {reason}" for reason, count in reasons.most_common()
        )
        return f"{sum(reasons.values()):,} {word}: {text}"

    @property
    def level(self) -> int:
        """The level of the message."""
        if not self.done:
            return messages.ERROR
        return messages.WARNING if self.skipped or self.refused else messages.SUCCESS

"""What an operator may do to executions in the admin: forms, what each action does, for which ones, and the words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from django import forms
from django.contrib import messages
from django.db.models import Q
from django.utils.text import capfirst
from django.utils.translation import gettext, pgettext_lazy
from django.utils.translation import gettext_lazy as _

from conductor_app import api
from conductor_app.body.names import check_name
from conductor_app.conf import conductor_settings
from conductor_app.engine.acting import fork_plan
from conductor_app.exceptions import ActionRefused, ConductorError, ExecutionFinished
from conductor_app.models import Execution
from conductor_app.telling import possible
from conductor_app.values.payloads import dumps

#: A due execution whose message may have been lost: nobody has taken it for so many seconds.
OVERDUE_SECONDS = 60


# ------------------------------------------------------------------------------------------------- the actions' forms


class ReasonForm(forms.Form):
    """Why it is done."""

    reason = forms.CharField(
        label=_("Reason"),
        required=False,
        max_length=250,
        help_text=_("Optional. Kept with your name, and shown in the history of each execution."),
        widget=forms.TextInput(attrs={"class": "vTextField"}),
    )


class HoldForm(forms.Form):
    """Why it is held, for whoever finds it."""

    reason = forms.CharField(
        label=_("Reason"),
        max_length=250,
        help_text=_("Shown with your name wherever the execution is, as long as it is held."),
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
        value = _decoded(self.cleaned_data["payload"])
        try:
            dumps(value, "payload", conductor_settings().MAX_PAYLOAD_BYTES)
        except ConductorError as error:
            raise forms.ValidationError(capfirst(str(error))) from None
        return value


class RerunForm(ReasonForm):
    """Why it is done; the same form sent twice, by a double click or a reload, starts one new execution."""

    key = forms.CharField(widget=forms.HiddenInput, max_length=100, required=False)


class ForkForm(RerunForm):
    """From which step it runs again, with which payload, and why."""

    before = forms.CharField(widget=forms.HiddenInput, max_length=128)
    payload = forms.CharField(
        label=_("Payload"),
        required=False,
        strip=False,
        help_text=_("JSON, an object with the task's keyword arguments; empty keeps the old payload."),
        widget=forms.Textarea(attrs={"class": "vLargeTextField", "rows": 4, "spellcheck": "false"}),
    )
    field_order = ("payload", "reason")
    #: Which one it is about, as far as somebody has said so: with it, the payload is held against its task.
    execution: Execution | None = None

    def clean_payload(self) -> Any:
        """Decode the payload; ``None`` keeps the old one."""
        return _decoded(self.cleaned_data["payload"])

    def clean(self) -> dict[str, Any]:
        """Check that the task takes the payload. What is impossible for the execution, the action tells."""
        data = super().clean() or {}
        if self.execution is not None and data.get("payload") is not None and data.get("before"):
            try:
                fork_plan(self.execution, data["before"], data["payload"])
            except ActionRefused:
                pass
            except ConductorError as error:
                self.add_error("payload", capfirst(str(error)))
        return data


def _decoded(text: str) -> Any:
    """Return what stands in a field for JSON; ``None`` if that is empty.

    Raises:
        ValidationError: It is none.
    """
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise forms.ValidationError(_("This is not JSON: %(error)s."), params={"error": error}) from None


# -------------------------------------------------------------------------------------------------------- the actions


#: Why an execution was refused; looked up when it is told, since it is stored as well.
_NOT_TAKEN: Any = _("the broker did not take the message")


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
    form: type[forms.Form] = ReasonForm
    #: What the audit says of one.
    audit: Callable[[dict[str, Any]], str] = field(default=lambda data: "")
    is_destructive: bool = False
    #: Whether sweepers can do it to many.
    in_background: bool = False
    #: Whether it is for one at a time, since it takes something that each has its own of.
    is_for_one: bool = False


def _because(text: str, data: dict[str, Any]) -> str:
    return f"{text}: {data['reason']}" if data.get("reason") else f"{text}."


def _cancel(execution: Execution, data: dict[str, Any]) -> None:
    if not api.cancel(execution, reason=data["reason"]):
        raise Unchanged(_("ended already"))


def _send(execution: Execution, data: dict[str, Any]) -> None:
    try:
        if not api.send_event(execution, data["event"], data["payload"], id=data["key"]):
            raise Unchanged(_("sent already"))
    except ExecutionFinished:
        raise Unchanged(_("ended already")) from None


def _rerun(execution: Execution, data: dict[str, Any]) -> None:
    key = f"{data['key']}-{execution.pk}" if data["key"] else None
    data["created"] = api.rerun(execution, idempotency_key=key)


def _fork(execution: Execution, data: dict[str, Any]) -> None:
    data["created"] = api.fork(execution, data["before"], data["payload"], idempotency_key=data["key"] or None)


def _hold(execution: Execution, data: dict[str, Any]) -> None:
    if not api.hold(execution, data["reason"]):
        raise Unchanged(_("held already"))


def _release(execution: Execution, _data: dict[str, Any]) -> None:
    if not api.release(execution):
        raise Unchanged(_("not held"))


def _publish(execution: Execution, _data: dict[str, Any]) -> None:
    if not api.publish_again(execution):
        raise ActionRefused(
            gettext("The broker did not take the message. Workers will publish it later."),
            reason=_NOT_TAKEN,
        )


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
    fits=possible.to_retry,
    audit=lambda data: _because("Retried from the failed step", data),
    in_background=True,
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
    fits=possible.to_rerun,
    form=RerunForm,
    audit=lambda data: _because(f"Run again as new execution {data['created'].pk}", data),
    in_background=True,
)
FORK = Action(
    name="fork",
    label=_("Run again from a step"),
    permission="fork_execution",
    done=_("run again from a step"),
    told=_("This is a new execution."),
    effect=_(
        "Starts a new execution that remembers what this one had recorded before a step, and runs the rest again, by "
        "the code of today. It has new ids and idempotency keys, so side effects of what runs again happen again. "
        "Tags are kept; events that no step had taken are not. The old one stays as it is."
    ),
    act=_fork,
    fits=possible.to_rerun,
    form=ForkForm,
    audit=lambda data: _because(f"Run again before {data['before']!r} as new execution {data['created'].pk}", data),
    is_for_one=True,
)
CANCEL = Action(
    name="cancel",
    label=_("Cancel"),
    permission="cancel_execution",
    done=_("cancelled"),
    told=_("The execution is cancelled."),
    effect=_("Queued and waiting executions end at once. A running body is not killed: it stops at its next ctx call."),
    act=_cancel,
    fits=possible.to_cancel,
    offered=lambda: possible.to_cancel() & Q(cancel_requested_at__isnull=True),
    audit=lambda data: _because("Cancelled", data),
    is_destructive=True,
    in_background=True,
)
WAKE = Action(
    name="wake",
    label=_("Wake now"),
    permission="retry_execution",
    done=_("woken"),
    told=_("The execution is woken."),
    effect=_("Ends its sleep, or its wait for a retry or a countdown, now instead of later."),
    act=lambda execution, data: api.wake(execution),
    fits=possible.to_wake,
    audit=lambda data: _because("Woken", data),
    in_background=True,
)
SEND = Action(
    name="send",
    label=_("Send an event"),
    permission="send_event",
    done=_("sent the event"),
    told=_("The event is sent."),
    effect=_("The step that waits for this event takes it; if none does yet, it is kept."),
    act=_send,
    fits=possible.to_send,
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
    fits=possible.to_publish,
    offered=lambda: possible.to_publish(OVERDUE_SECONDS),
    audit=lambda data: _because("Published again", data),
)

HOLD = Action(
    name="hold",
    label=_("Hold"),
    permission="hold_execution",
    done=_("held"),
    told=_("The execution is held."),
    effect=_(
        "No run of it begins until somebody releases it, nor of anything below it. What it waits for goes on, and so "
        "do timeouts. A running body ends at its next ctx call, and no attempt is used up."
    ),
    act=_hold,
    fits=possible.to_hold,
    offered=lambda: possible.to_hold() & Q(cancel_requested_at__isnull=True),
    form=HoldForm,
    audit=lambda data: _because("Held", data),
    in_background=True,
)
RELEASE = Action(
    name="release",
    label=_("Release"),
    permission="hold_execution",
    done=pgettext_lazy("operation", "released"),
    told=_("The execution is released."),
    effect=_("It goes on, and so does all below it that was held with it."),
    act=_release,
    fits=possible.to_release,
    audit=lambda data: _because("Released", data),
    in_background=True,
)

ACTIONS: dict[str, Action] = {
    action.name: action for action in (RETRY, RERUN, FORK, CANCEL, WAKE, SEND, PUBLISH, HOLD, RELEASE)
}


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

"""``Step``: what an execution remembers."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from conductor_app.models.execution import Execution
from conductor_app.models.fields import ExactCharField, PartialIndex
from conductor_app.states import OnTimeout, StepKind, StepStatus
from conductor_app.values.payloads import loads

_KIND_CHOICES = [(kind.value, _(kind.value)) for kind in StepKind]
#: With a context: in many languages an execution and a step are of two genders.
_STATUS_CHOICES = [
    (StepStatus.PENDING.value, pgettext_lazy("step", "pending")),
    (StepStatus.SUCCEEDED.value, pgettext_lazy("step", "succeeded")),
    (StepStatus.FAILED.value, pgettext_lazy("step", "failed")),
    (StepStatus.TIMED_OUT.value, pgettext_lazy("step", "timed out")),
    (StepStatus.CANCELLED.value, pgettext_lazy("step", "cancelled")),
]


class Step(models.Model):
    """One named outcome of an execution: what the *parent* knows, while the child's own row is what the child *is*.

    An invocation's result is not copied: a succeeded step of kind ``invoke`` reads it from its child. In a fork it is:
    a step of its source holds all that a replay needs, and what its ``child`` is, only tells where that came from.
    Rows change only in ``conductor_app.transitions``.
    """

    id = models.BigAutoField(primary_key=True)
    execution = models.ForeignKey(Execution, models.CASCADE, verbose_name=_("execution"), related_name="steps")
    name = ExactCharField(_("name"), max_length=128)
    kind = models.CharField(_("kind"), max_length=16, choices=_KIND_CHOICES)
    status = models.CharField(_("status"), max_length=16, choices=_STATUS_CHOICES)
    #: The task that an invocation names, or the event that is waited for: to notice that the code has changed.
    task = ExactCharField(_("task"), max_length=255, blank=True, default="")
    payload_digest = models.CharField(_("payload digest"), max_length=32, blank=True, default="")
    child = models.ForeignKey(
        Execution,
        models.SET_NULL,
        verbose_name=_("child"),
        null=True,
        blank=True,
        related_name="parent_step",
        db_constraint=False,
        db_index=False,
    )
    #: The gather that waits for this invocation; it is counted down when this is decided.
    group = models.ForeignKey(
        "self",
        models.SET_NULL,
        verbose_name=_("gather"),
        null=True,
        blank=True,
        related_name="members",
        db_constraint=False,
        db_index=False,
    )
    #: Of a map or gather: how many children it has.
    total = models.IntegerField(_("children"), null=True, blank=True)
    #: Of a map or gather: how many of them have not ended.
    remaining = models.PositiveIntegerField(_("remaining"), null=True, blank=True)
    #: Of a map: how many children may be in flight at once.
    max_parallel = models.IntegerField(_("at most in parallel"), null=True, blank=True)
    #: Of a map or gather: whether the first failure decides it.
    fails_fast = models.BooleanField(_("fails fast"), default=True, db_default=True)
    #: Of one that the first failure does not decide yet: how many it lets pass. Null is none, or without limit.
    max_failures = models.IntegerField(_("failures let pass"), null=True, blank=True)
    #: How many it has let pass.
    failures = models.IntegerField(_("failures"), default=0, db_default=0)
    #: Of a step that not all of its members decide: the names of those that do, each with a comma behind it, in the
    #: order in which they came. Null if all do.
    counted = models.TextField(_("decided by"), null=True, blank=True)  # noqa: DJ001 - none yet is not null
    result = models.TextField(_("result"), null=True, blank=True)  # noqa: DJ001 - no result is not an empty one
    error = models.TextField(_("error"), null=True, blank=True)  # noqa: DJ001
    #: Seconds, as the caller gave them: for the error's text, and for a new deadline when an operator retries.
    timeout_seconds = models.FloatField(_("timeout"), null=True, blank=True)
    on_timeout = models.CharField(_("on timeout"), max_length=16, blank=True, default=OnTimeout.CANCEL.value)
    #: While pending: when the sweeper decides it (a timeout, the end of a sleep).
    deadline_at = models.DateTimeField(_("deadline"), null=True, blank=True)
    #: 0 if it was copied.
    attempt = models.IntegerField(_("attempt"), default=1)
    #: The fence of the run that recorded it; 0 if none did, and it was copied when its execution was forked.
    fence = models.BigIntegerField(_("fence"), default=0)
    created_at = models.DateTimeField(_("created"))
    finished_at = models.DateTimeField(_("finished"), null=True, blank=True)

    class Meta:
        verbose_name = _("step")
        verbose_name_plural = _("steps")
        ordering: ClassVar[list[str]] = ["id"]
        indexes: ClassVar[list[models.Index]] = [
            PartialIndex(fields=["status", "deadline_at"], where=Q(status="pending"), name="conductor_step_deadline"),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["execution", "name"], name="conductor_step_name"),
            models.CheckConstraint(
                condition=models.Case(
                    models.When(finished_at__isnull=True, then=Q(status="pending")),
                    default=Q(status__in=[status.value for status in StepStatus if status != StepStatus.PENDING]),
                    output_field=models.BooleanField(),
                ),
                name="conductor_step_status",
            ),
        ]

    def __str__(self) -> str:
        return str(self.name)

    @property
    def counted_names(self) -> list[str]:
        """The names of the members that have decided it, or have done their part."""
        return [name for name in (self.counted or "").split(",") if name]

    @property
    def is_copied(self) -> bool:
        """Whether no run of this execution recorded it: it was copied from the one of which this is a fork."""
        return self.fence == 0 and self.attempt == 0

    def get_result(self) -> Any:
        """Return the decoded result of a step of kind ``step`` or ``event``; ``None`` if there is none.

        What a body gets is read in ``transitions.steps``, which tells a result that is gone from ``None``.
        """
        return loads(self.result)

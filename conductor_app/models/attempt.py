"""``Attempt``: one run of an execution's body that has ended."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _

from conductor_app.models.execution import Execution
from conductor_app.models.fields import ExactCharField
from conductor_app.states import RunOutcome

_OUTCOME_CHOICES = [
    (RunOutcome.SUSPENDED.value, _("suspended")),
    (RunOutcome.SUCCEEDED.value, _("succeeded")),
    (RunOutcome.FAILED.value, _("failed")),
    (RunOutcome.RETRIED.value, _("failed, retried")),
    (RunOutcome.LOST.value, _("lost")),
    (RunOutcome.RELEASED.value, _("released")),
    (RunOutcome.CANCELLED.value, _("cancelled")),
]


class Attempt(models.Model):
    """One run that has ended: who ran it, when, and how it ended.

    Written once, in the transaction that ends the run, and never changed: an operator's retry removes the
    ``FailedExecution``, and leaves what had failed here. A run that goes on is told by its execution.
    """

    id = models.BigAutoField(primary_key=True)
    execution = models.ForeignKey(
        Execution,
        models.CASCADE,
        verbose_name=_("execution"),
        related_name="attempts",
        db_constraint=False,
        db_index=False,
    )
    #: The attempt that the run belongs to; after a suspension, the next run belongs to the same one.
    attempt = models.IntegerField(_("attempt"))
    #: The number of the run: the fence of its claim.
    run = models.BigIntegerField(_("run"))
    #: As ``Execution.lease_owner``; see ``owners``.
    worker = models.CharField(_("worker"), max_length=255)
    #: Since when it could have been claimed.
    due_at = models.DateTimeField(_("due"))
    started_at = models.DateTimeField(_("started"))
    finished_at = models.DateTimeField(_("finished"))
    outcome = models.CharField(_("outcome"), max_length=16, choices=_OUTCOME_CHOICES)
    #: The step that a suspended run waits for.
    step = ExactCharField(_("step"), max_length=128, blank=True, default="")
    error_class = models.CharField(_("error class"), max_length=255, blank=True, default="")
    message = models.TextField(_("message"), blank=True, default="")
    traceback = models.TextField(_("traceback"), blank=True, default="")

    class Meta:
        verbose_name = _("attempt")
        verbose_name_plural = _("attempts")
        ordering: ClassVar[list[str]] = ["id"]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["execution", "run"], name="conductor_attempt_run"),
        ]

    def __str__(self) -> str:
        return f"run {self.run} of {self.execution_id}"

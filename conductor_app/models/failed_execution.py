"""``FailedExecution``: why an execution failed for good."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _

from conductor_app.models.execution import Execution
from conductor_app.models.fields import ExactCharField


class FailedExecution(models.Model):
    """One row per execution that failed for good, written in the transaction that failed it; a retry removes it."""

    execution = models.OneToOneField(
        Execution, models.CASCADE, verbose_name=_("execution"), primary_key=True, related_name="failure"
    )
    task = ExactCharField(_("task"), max_length=255)
    #: Attempts made.
    attempts = models.PositiveIntegerField(_("attempts"))
    error_class = models.CharField(_("error class"), max_length=255)
    message = models.TextField(_("message"))
    traceback = models.TextField(_("traceback"), blank=True, default="")
    #: The step at which it failed, if the failure is a child's, or an event's that did not come.
    step = ExactCharField(_("failing step"), max_length=128, blank=True, default="")
    #: The deepest descendant whose failure is behind this one; null if the failure is its own.
    root_cause = models.ForeignKey(
        Execution,
        models.SET_NULL,
        verbose_name=_("root cause"),
        null=True,
        blank=True,
        related_name="caused_failures",
        db_constraint=False,
    )
    failed_at = models.DateTimeField(_("failed"))

    class Meta:
        verbose_name = _("failed execution")
        verbose_name_plural = _("failed executions")
        ordering: ClassVar[list[str]] = ["-failed_at"]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["-failed_at"], name="conductor_fail_failed_at"),
        ]

    def __str__(self) -> str:
        # Not the message: Django's admin shows this to whoever may see the row, and in forms of other models.
        return f"{self.error_class.rpartition('.')[2]} in {self.task} {self.execution_id}"

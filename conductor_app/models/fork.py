"""``Fork``: what an execution was forked from; ``CopiedOutcome``: how one child of a map ended, in a fork."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _

from conductor_app.models.execution import STATUS_CHOICES, Execution
from conductor_app.models.fields import ExactCharField
from conductor_app.models.step import Step


class Fork(models.Model):
    """One row per root that was begun with what another one had recorded before a step. Written once, with the root."""

    execution = models.OneToOneField(
        Execution,
        models.CASCADE,
        verbose_name=_("execution"),
        primary_key=True,
        related_name="fork",
        db_constraint=False,
    )
    #: Its source, which may be pruned by now.
    forked_from = models.ForeignKey(
        Execution,
        models.DO_NOTHING,
        verbose_name=_("forked from"),
        related_name="forks",
        db_constraint=False,
        db_index=False,
    )
    #: Name of the first step of the source, in the order of recording, that was not copied.
    before = ExactCharField(_("before the step"), max_length=128)

    class Meta:
        verbose_name = _("fork")
        verbose_name_plural = _("forks")
        ordering: ClassVar[list[str]] = ["execution"]
        indexes: ClassVar[list[models.Index]] = [
            # The forks of an execution.
            models.Index(fields=["forked_from", "execution"], name="conductor_fork_source"),
        ]

    def __str__(self) -> str:
        return f"{self.execution_id} from {self.forked_from_id}"


class CopiedOutcome(models.Model):
    """How a child of a map of the source stood when it was forked, since the child itself is pruned with its own tree.

    A row for each child: a map has up to 10,000, each with a result of up to 1 MiB. Written once, with the fork.
    """

    id = models.BigAutoField(primary_key=True)
    step = models.ForeignKey(
        Step, models.CASCADE, verbose_name=_("step"), related_name="outcomes", db_constraint=False, db_index=False
    )
    #: The child's place among the payloads of ``ctx.map``, counted from 0.
    position = models.IntegerField(_("position"))
    #: The child of the source; it may be pruned by now.
    child_id = models.UUIDField(_("child"))
    status = models.CharField(_("status"), max_length=16, choices=STATUS_CHOICES)
    result = models.TextField(_("result"), null=True, blank=True)  # noqa: DJ001 - no result is not an empty one
    error = models.TextField(_("error"), null=True, blank=True)  # noqa: DJ001

    class Meta:
        verbose_name = _("copied outcome")
        verbose_name_plural = _("copied outcomes")
        ordering: ClassVar[list[str]] = ["step", "position"]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["step", "position"], name="conductor_copied_position"),
        ]

    def __str__(self) -> str:
        return f"{self.step_id}[{self.position}]"

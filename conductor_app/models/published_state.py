"""``PublishedState``: what a body tells of itself beside its steps."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _

from conductor_app.models.execution import Execution


class PublishedState(models.Model):
    """One row per execution whose body has called ``ctx.progress`` or ``ctx.publish``; the last word counts.

    Rows change only in ``transitions.stating``, under the execution's row lock, by the run that holds it.
    """

    execution = models.OneToOneField(
        Execution,
        models.CASCADE,
        verbose_name=_("execution"),
        primary_key=True,
        related_name="published_state",
        db_constraint=False,
    )
    done = models.FloatField(_("done"), null=True, blank=True)
    total = models.FloatField(_("in total"), null=True, blank=True)
    note = models.TextField(_("note"), blank=True, default="")
    #: A JSON object; empty if nothing is published.
    published = models.TextField(_("published values"), blank=True, default="")
    updated_at = models.DateTimeField(_("updated"))

    class Meta:
        verbose_name = _("published state")
        verbose_name_plural = _("published states")
        ordering: ClassVar[list[str]] = ["execution"]

    def __str__(self) -> str:
        return f"{self.done} of {self.total}" if self.total is not None else f"{self.done}"

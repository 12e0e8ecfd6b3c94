"""``PausedTask``: a task of which no run begins, until somebody unpauses it."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _

from conductor_app.models.fields import ExactCharField


class PausedTask(models.Model):
    """Which task is paused, since when, by whom and why.

    Rows change only in ``conductor_app.transitions.pausing``. Each claim looks here. There are few rows, mostly none.
    """

    #: The task's name. Not called ``task``: a claim compares it with the execution's column of that name.
    name = ExactCharField(_("task"), primary_key=True, max_length=255)
    paused_at = models.DateTimeField(_("paused since"))
    paused_by = models.CharField(_("paused by"), max_length=150, blank=True, default="")
    reason = models.TextField(_("reason"))

    class Meta:
        verbose_name = _("paused task")
        verbose_name_plural = _("paused tasks")
        ordering: ClassVar[list[str]] = ["name"]

    def __str__(self) -> str:
        return str(self.name)

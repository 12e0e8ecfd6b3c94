"""``Schedule``: when a task is started by itself, what became of it last, and whether it is paused."""

from __future__ import annotations

import datetime as dt
from typing import Any, ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _

from conductor_app.models.fields import ExactCharField
from conductor_app.models.operation import ACTOR_LENGTH
from conductor_app.values.payloads import loads
from conductor_app.values.schedules import CatchUp, Overlap
from conductor_app.values.timetables import LINE_LENGTH, ZONE_LENGTH

#: Words of the code, which are the same in every language.
_OVERLAP_CHOICES = [(member.value, member.value) for member in Overlap]
_CATCH_UP_CHOICES = [(member.value, member.value) for member in CatchUp]


class Schedule(models.Model):
    """One schedule of a task, as the workers that have it in their code know it.

    Rows change only in ``conductor_app.transitions.scheduling``. There is one for each schedule that a worker has ever
    had; no row goes by itself.
    """

    id = models.BigAutoField(primary_key=True)
    #: The task's own, or what ``schedule=`` of the decorator says.
    name = ExactCharField(_("name"), max_length=255, unique=True)
    task = ExactCharField(_("task"), max_length=255)
    #: A line of cron with five fields.
    line = models.CharField(_("line"), max_length=LINE_LENGTH)
    zone = models.CharField(_("time zone"), max_length=ZONE_LENGTH)
    overlap = models.CharField(_("overlap"), max_length=16, choices=_OVERLAP_CHOICES)
    catch_up = models.CharField(_("catch up"), max_length=16, choices=_CATCH_UP_CHOICES)
    #: The next instant. Null if the line names no more.
    next_at = models.DateTimeField(_("next"), null=True, blank=True)
    #: Null unless somebody has paused it.
    paused_at = models.DateTimeField(_("paused"), null=True, blank=True)
    paused_by = models.CharField(_("paused by"), max_length=ACTOR_LENGTH, blank=True, default="")
    pause_reason = models.TextField(_("reason"), blank=True, default="")
    #: Since when no worker has it in its code; a pause, too.
    absent_at = models.DateTimeField(_("left the code"), null=True, blank=True)
    #: The last instant that was acted on.
    last_tick_at = models.DateTimeField(_("last tick"), null=True, blank=True)
    #: What was started last.
    last_execution_id = models.UUIDField(_("last execution"), null=True, blank=True)
    #: Instants that wait for the end of that one, as stored text.
    waiting = models.TextField(_("waiting"), blank=True, default="")
    #: What was left out, or waits, and why.
    note = models.TextField(_("note"), blank=True, default="")
    #: When a worker has last said that it is in its code.
    seen_at = models.DateTimeField(_("last seen"))
    #: When the process was started whose code says this.
    declared_at = models.DateTimeField(_("declared"))
    #: Counts changes; whoever has read an older one changes nothing.
    version = models.BigIntegerField(_("version"), default=0)

    class Meta:
        verbose_name = _("schedule")
        verbose_name_plural = _("schedules")
        ordering: ClassVar[list[str]] = ["name"]
        default_permissions = ("view",)
        permissions: ClassVar[list[tuple[str, Any]]] = [
            ("pause_schedule", _("Can pause, unpause and run schedules")),
        ]

    def __str__(self) -> str:
        return str(self.name)

    @property
    def is_paused(self) -> bool:
        """Whether nothing is started by itself, because of somebody or since no worker's code has it."""
        return self.paused_at is not None or self.absent_at is not None

    @property
    def waiting_instants(self) -> list[dt.datetime]:
        """The instants whose turn comes when the last execution has ended."""
        return list(loads(self.waiting) or []) if self.waiting else []

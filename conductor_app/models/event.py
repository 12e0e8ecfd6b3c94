"""``Event``: what somebody has sent to an execution."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _

from conductor_app.models.execution import Execution
from conductor_app.models.fields import ExactCharField, PartialIndex
from conductor_app.models.step import Step
from conductor_app.values.payloads import loads


class Event(models.Model):
    """One event, kept until a step of kind ``event`` takes it. Rows change only in ``transitions.mailbox``."""

    id = models.BigAutoField(primary_key=True)
    execution = models.ForeignKey(
        Execution, models.CASCADE, verbose_name=_("execution"), related_name="events", db_index=False
    )
    name = ExactCharField(_("name"), max_length=128)
    #: The sender's own id, or one made up for the occasion: sent twice, it is one event.
    key = ExactCharField(_("key"), max_length=255)
    #: As ``conductor_app.values.payloads`` stores it.
    payload = models.TextField(_("payload"))
    #: The step that has taken it; null while nobody has.
    step = models.ForeignKey(
        Step,
        models.SET_NULL,
        verbose_name=_("taken by"),
        null=True,
        blank=True,
        related_name="events",
        db_constraint=False,
        db_index=False,
    )
    taken_at = models.DateTimeField(_("taken"), null=True, blank=True)
    created_at = models.DateTimeField(_("sent"))

    class Meta:
        verbose_name = _("event")
        verbose_name_plural = _("events")
        ordering: ClassVar[list[str]] = ["id"]
        indexes: ClassVar[list[models.Index]] = [
            # Oldest first: what waits in an execution's mailbox.
            PartialIndex(
                fields=["execution", "name", "taken_at", "id"],
                where=Q(taken_at__isnull=True),
                name="conductor_event_mailbox",
            ),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["execution", "name", "key"], name="conductor_event_key"),
        ]

    def __str__(self) -> str:
        return str(self.name)

    def get_payload(self) -> Any:
        """Return the decoded payload."""
        return loads(self.payload)

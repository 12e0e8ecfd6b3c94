"""``Place``: how an execution stands to a limit of its task; ``LimitKey``: the lock of those of one key."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _

from conductor_app.models.execution import Execution
from conductor_app.models.fields import ExactCharField
from conductor_app.states import LimitKind, PlaceState
from conductor_app.values.limits import KEY_BYTES, NAME_LENGTH

_KIND_CHOICES = [
    (LimitKind.RUN.value, _("runs")),
    (LimitKind.OPEN.value, _("open executions")),
    (LimitKind.RATE.value, _("starts in a time")),
]
_STATE_CHOICES = [
    (PlaceState.PARKED.value, _("parked")),
    (PlaceState.GRANTED.value, _("granted")),
    (PlaceState.HELD.value, _("held")),
]


class LimitKey(models.Model):
    """One key of a limit. Whoever admits, parks or grants locks it first, before any execution's row."""

    id = models.BigAutoField(primary_key=True)
    limit = ExactCharField(_("limit"), max_length=NAME_LENGTH)
    key = ExactCharField(_("key"), max_length=KEY_BYTES, blank=True)
    kind = models.CharField(_("counts"), max_length=8, choices=_KIND_CHOICES)
    #: As the worker knew it that has used the key last: how many at the same time; of a rate, at once.
    number = models.IntegerField(_("number"))
    #: Of a rate: seconds from one start to the next.
    seconds = models.FloatField(_("seconds"), null=True, blank=True)
    #: Of a rate: when all starts that it has allowed so far are paid for (GCRA's "theoretical arrival time").
    paid_until = models.DateTimeField(_("paid until"), null=True, blank=True)
    used_at = models.DateTimeField(_("used"))

    class Meta:
        verbose_name = _("key of a limit")
        verbose_name_plural = _("keys of limits")
        ordering: ClassVar[list[str]] = ["limit", "key"]
        indexes: ClassVar[list[models.Index]] = [
            # The sweeper: what nobody has used for long.
            models.Index(fields=["used_at"], name="conductor_limit_key_used"),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["limit", "key"], name="conductor_limit_key"),
        ]

    def __str__(self) -> str:
        return f"{self.limit} {self.key}".rstrip()


class Place(models.Model):
    """How one execution stands to one limit. Rows change only in ``transitions.limiting``, under the key's lock.

    That a place is free again is no write here: one of a run counts while its execution runs, an open one until its
    execution is final. So nothing leaks, whatever dies.
    """

    id = models.BigAutoField(primary_key=True)
    execution = models.ForeignKey(
        Execution,
        models.CASCADE,
        verbose_name=_("execution"),
        related_name="places",
        db_constraint=False,
        db_index=False,
    )
    limit = ExactCharField(_("limit"), max_length=NAME_LENGTH)
    key = ExactCharField(_("key"), max_length=KEY_BYTES, blank=True)
    kind = models.CharField(_("counts"), max_length=8, choices=_KIND_CHOICES)
    state = models.CharField(_("state"), max_length=8, choices=_STATE_CHOICES)
    #: Of a rate: the attempt whose start was allowed.
    attempt = models.IntegerField(_("attempt"), default=0)
    #: Since when it waits, or waited: when its execution was due.
    since = models.DateTimeField(_("since"))

    class Meta:
        verbose_name = _("place")
        verbose_name_plural = _("places")
        ordering: ClassVar[list[str]] = ["limit", "key", "since"]
        indexes: ClassVar[list[models.Index]] = [
            # Who has a place of a key; who waits for one, the oldest first.
            models.Index(fields=["limit", "key", "state", "since"], name="conductor_place_key"),
            # The sweeper: the keys for which somebody waits.
            models.Index(fields=["state", "since"], name="conductor_place_state"),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            # Also serves the places of one execution.
            models.UniqueConstraint(fields=["execution", "limit"], name="conductor_place_once"),
        ]

    def __str__(self) -> str:
        return f"{self.limit} {self.key} {self.state}"

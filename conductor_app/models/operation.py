"""``Operation``: what somebody has asked for, of one execution or of many; ``OperationItem``: what became of each."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from conductor_app.models.execution import Execution
from conductor_app.models.fields import PartialIndex
from conductor_app.states import ItemState, OperationKind, OperationSource

#: Characters of an actor's name, as of a user's in Django.
ACTOR_LENGTH = 150

_KIND_CHOICES = [
    (OperationKind.RETRY.value, _("retry")),
    (OperationKind.RERUN.value, _("rerun")),
    (OperationKind.FORK.value, _("fork")),
    (OperationKind.CANCEL.value, _("cancel")),
    (OperationKind.WAKE.value, _("wake")),
    (OperationKind.SEND.value, _("send")),
    (OperationKind.PUBLISH.value, _("publish")),
    (OperationKind.HOLD.value, _("hold")),
    # Not the release that is deployed.
    (OperationKind.RELEASE.value, pgettext_lazy("operation", "release")),
]
_SOURCE_CHOICES = [
    (OperationSource.ADMIN.value, _("admin")),
    (OperationSource.COMMAND.value, _("command")),
    (OperationSource.API.value, _("API")),
]
_STATE_CHOICES = [
    (ItemState.PENDING.value, _("pending")),
    (ItemState.DONE.value, _("done")),
    (ItemState.REFUSED.value, _("refused")),
    (ItemState.GONE.value, _("gone")),
    (ItemState.FAILED.value, _("failed")),
    (ItemState.STOPPED.value, _("stopped")),
]


class Operation(models.Model):
    """Who has asked for what, when, why, and of how many executions what became.

    Rows change only in ``conductor_app.transitions.operating``. While it goes on, its items tell how far it is: the
    counts are written at its end.
    """

    id = models.BigAutoField(primary_key=True)
    kind = models.CharField(_("kind"), max_length=16, choices=_KIND_CHOICES)
    #: A user's name in the admin, ``--as`` on the command line, ``actor=`` of a call.
    actor = models.CharField(_("actor"), max_length=ACTOR_LENGTH, blank=True, default="")
    reason = models.TextField(_("reason"), blank=True, default="")
    source = models.CharField(_("source"), max_length=16, choices=_SOURCE_CHOICES)
    #: What chose the executions, in words; empty if their ids did.
    filters = models.TextField(_("filters"), blank=True, default="")
    created_at = models.DateTimeField(_("created"))
    #: Null while it goes on.
    finished_at = models.DateTimeField(_("finished"), null=True, blank=True)
    stop_requested_at = models.DateTimeField(_("stop requested"), null=True, blank=True)
    #: How many executions it is about, and what became of so many of them.
    total = models.IntegerField(_("executions"), default=0)
    done = models.IntegerField(_("done"), default=0)
    refused = models.IntegerField(_("refused"), default=0)
    gone = models.IntegerField(_("gone"), default=0)
    failed = models.IntegerField(_("failed"), default=0)
    stopped = models.IntegerField(_("stopped"), default=0)

    class Meta:
        verbose_name = _("operation")
        verbose_name_plural = _("operations")
        ordering: ClassVar[list[str]] = ["-id"]
        indexes: ClassVar[list[models.Index]] = [
            # The pruner: what ended long ago; the sweeper: what goes on.
            models.Index(fields=["finished_at"], name="conductor_op_finished"),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.pk}"


class OperationItem(models.Model):
    """One execution that an operation is about. It outlives its execution, and goes with its operation."""

    id = models.BigAutoField(primary_key=True)
    operation = models.ForeignKey(
        Operation,
        models.CASCADE,
        verbose_name=_("operation"),
        related_name="items",
        db_constraint=False,
        db_index=False,
    )
    execution = models.ForeignKey(
        Execution,
        models.DO_NOTHING,
        verbose_name=_("execution"),
        related_name="operation_items",
        db_constraint=False,
    )
    state = models.CharField(_("state"), max_length=16, choices=_STATE_CHOICES)
    #: Why it was refused, in a few words.
    message = models.TextField(_("message"), blank=True, default="")
    #: What a rerun or a fork has started.
    created = models.ForeignKey(
        Execution,
        models.DO_NOTHING,
        verbose_name=_("started"),
        related_name="made_by_operation_items",
        null=True,
        blank=True,
        db_constraint=False,
        db_index=False,
    )
    decided_at = models.DateTimeField(_("decided"), null=True, blank=True)

    class Meta:
        verbose_name = _("item of an operation")
        verbose_name_plural = _("items of operations")
        ordering: ClassVar[list[str]] = ["id"]
        indexes: ClassVar[list[models.Index]] = [
            # The sweeper: what is left to do; the pages: how many there are of each state.
            models.Index(fields=["operation", "state", "id"], name="conductor_op_item_state"),
            # The history of an execution that a rerun or a fork has started.
            PartialIndex(fields=["created"], where=Q(created__isnull=False), name="conductor_op_item_created"),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["operation", "execution"], name="conductor_op_item_once"),
        ]

    def __str__(self) -> str:
        return f"{self.execution_id} of operation {self.operation_id}"

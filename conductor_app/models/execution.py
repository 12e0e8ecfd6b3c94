"""``Execution``: one durable run of a task with one payload, from creation to a final status; and its named reads."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from django.db import models
from django.db.models import Exists, OuterRef, Q, Subquery
from django.db.models.base import ModelState
from django.db.models.functions import Coalesce
from django.utils.translation import gettext_lazy as _

from conductor_app.exceptions import OutcomeLost
from conductor_app.models.fields import ExactCharField, PartialIndex
from conductor_app.models.paused_task import PausedTask
from conductor_app.states import FINAL_STATUSES, LATE_REASON, OPEN_STATUSES, ExecutionStatus
from conductor_app.store import clock
from conductor_app.store.statements import Literal
from conductor_app.values.failures import load_failure
from conductor_app.values.payloads import loads, read_result

STATUS_CHOICES = [
    (ExecutionStatus.QUEUED.value, _("queued")),
    (ExecutionStatus.RUNNING.value, _("running")),
    (ExecutionStatus.WAITING.value, _("waiting")),
    (ExecutionStatus.SUCCEEDED.value, _("succeeded")),
    (ExecutionStatus.FAILED.value, _("failed")),
    (ExecutionStatus.CANCELLED.value, _("cancelled")),
]

#: Among the attributes of a stored failure that is none of a run's: by which fence a worker could not run it.
PUT_OFF_AT_FENCE = "put_off_at_fence"

#: When an execution is due that waits for a place of a limit (``Place``): when it is handed one.
PARKED_UNTIL = clock.NEVER
#: ``dispatch_at`` of what is queued and out of the way: parked, held, or of a paused task. Whoever ends that puts the
#: real one back. Behind all others in the index by which the sweeper and the feed look for what is due, so that it
#: costs them nothing.
PARKED_AT = clock.Never()
#: Of an execution whose task somebody has paused. By no manager: it is read where the query around it is.
IS_PAUSED = Exists(models.QuerySet(PausedTask).filter(name=OuterRef("task")))
#: Of one that people keep from beginning, if it is queued.
IS_STOPPED = Q(held_at__isnull=False) | Q(IS_PAUSED)


class ExecutionQuerySet(models.QuerySet["Execution"]):
    """Executions, by what may be done with them: callers say what they look for, the condition stands here once."""

    def with_status(self, status: ExecutionStatus) -> Self:
        """Executions of one status, in a form that a partial index serves."""
        return self.filter(status=Literal(status.value))

    def open(self) -> Self:
        """Not final."""
        return self.filter(status__in=sorted(OPEN_STATUSES))

    def held_by(self, run: Execution) -> Self:
        """The execution, if the run that claimed it as ``run`` still holds it.

        The fence alone does not tell: a claim that a crash of the database has undone, and the one that followed, have
        the same. They have other owners, or the second one raises the fence (``claims``).
        """
        return self.filter(pk=run.pk, fence=run.fence, lease_owner=run.lease_owner, status=ExecutionStatus.RUNNING)

    def claimable(self, attempt: int | None = None) -> Self:
        """Queued, due, neither cancelled nor expired, not held, and not of a paused task.

        Args:
            attempt: That of a plain task's message. Celery's own retry message comes by a worker's clock, so being due
                does not count; being about this attempt does, or a copy of the last one's message would take it early.
        """
        ready = self.filter(
            Q(deadline_at__isnull=True) | Q(deadline_at__gt=clock.now()) | Q(started_at__isnull=False),
            ~Q(IS_PAUSED),
            status=ExecutionStatus.QUEUED,
            cancel_requested_at__isnull=True,
            held_at__isnull=True,
        )
        if attempt is None:
            return ready.filter(due_at__lte=clock.now())
        return ready.filter(due_at__isnull=False, attempt=attempt)

    def held(self) -> Self:
        """Not final, and held by somebody."""
        # Not by the status, whose indexes SQLite would take for better.
        return self.filter(held_at__isnull=False, finished_at__isnull=True)

    def of_paused_tasks(self) -> Self:
        """Queued, and kept from beginning since somebody has paused its task."""
        paused = PausedTask.objects.using(self.db).values("name")
        return self.with_status(ExecutionStatus.QUEUED).filter(task__in=paused)

    def to_dispatch(self) -> Self:
        """Queued, and its message is to be published (again)."""
        return self.with_status(ExecutionStatus.QUEUED).filter(dispatch_at__lte=clock.now()).order_by("dispatch_at")

    def foremost(self, number: int) -> Self:
        """Queued, about so many: those to be published first, those that are held back, and last what is parked."""
        queued = self.with_status(ExecutionStatus.QUEUED)
        nth = queued.order_by("dispatch_at").values("dispatch_at")[number : number + 1]
        last = Coalesce(Subquery(nth), PARKED_AT)
        return queued.filter(Q(dispatch_at__isnull=True) | Q(dispatch_at__lte=last))

    def lapsed(self) -> Self:
        """Running, and the worker has not renewed the lease in time."""
        return (
            self.with_status(ExecutionStatus.RUNNING)
            .filter(lease_expires_at__lt=clock.now())
            .order_by("lease_expires_at")
        )

    def at_work(self) -> Self:
        """Running, and the worker renews the lease."""
        return self.with_status(ExecutionStatus.RUNNING).filter(lease_expires_at__gt=clock.now())

    def to_cancel(self) -> Self:
        """Flagged as cancelled, and no run is there to notice."""
        return self.filter(
            cancel_requested_at__isnull=False, status__in=[ExecutionStatus.QUEUED, ExecutionStatus.WAITING]
        ).order_by("cancel_requested_at")

    def unasked(self) -> Self:
        """Nobody has asked for its end: it is not flagged as cancelled, or only because it is late for a timeout."""
        return self.filter(Q(cancel_requested_at__isnull=True) | Q(cancel_reason__startswith=LATE_REASON))

    def expired(self) -> Self:
        """Queued past Celery's ``expires``, never started."""
        overdue = self.with_status(ExecutionStatus.QUEUED).filter(deadline_at__lte=clock.now())
        return overdue.filter(started_at__isnull=True).order_by("deadline_at")

    def past_deadline(self) -> Self:
        """Open, past the deadline of the tree of which it is the root, and nobody has asked for its end."""
        # Not by the status, as in ``held``.
        overdue = self.filter(finished_at__isnull=True, tree_deadline_at__lte=clock.now())
        return overdue.filter(cancel_requested_at__isnull=True).order_by("tree_deadline_at")

    def tagged(self, tags: Mapping[str, str]) -> Self:
        """Of a tree that has all of these tags."""
        tag: Any = Execution._meta.get_field("tags").related_model
        found = self
        for key, value in tags.items():
            trees = tag.objects.using(self.db).filter(key=key, value=value)
            found = found.filter(root__in=trees.order_by().values("root"))
        return found

    def to_announce(self) -> Self:
        """Final, and Celery has not been told."""
        return self.filter(announce_at__lte=clock.now()).order_by("announce_at")


class Execution(models.Model):
    """What a durable task *is*: the truth behind every message, lease and result.

    Rows change only in ``conductor_app.transitions``, each time by a compare-and-set on ``status`` and ``fence``.
    """

    #: What its claim has read of its steps, for the run that begins (``steps.MEMORY_FIELDS`` of each); ``None`` if it
    #: has not looked. No column.
    claimed_steps: list[list[Any]] | None = None
    #: The limits of its task with its keys, as its claim has computed them, or what that has raised. No column.
    limit_keys: list[tuple[Any, str]] | Exception | None = None
    #: The execution whose unique key this one, which was just created, has taken over. No column.
    replaced: uuid.UUID | None = None

    #: Also the Celery task id of every run.
    id = models.UUIDField(primary_key=True, editable=False)
    task = ExactCharField(_("task"), max_length=255)
    queue = ExactCharField(_("queue"), max_length=255)
    priority = models.SmallIntegerField(_("priority"), null=True, blank=True)
    #: ``[args, kwargs]``, as ``conductor_app.values.payloads`` stores it.
    payload = models.TextField(_("payload"))
    status = models.CharField(_("status"), max_length=16, choices=STATUS_CHOICES)
    #: The current attempt, counted from 1. Failures and crashes count it up, suspensions do not.
    attempt = models.IntegerField(_("attempt"), default=1)
    #: ``max_retries`` + 1; null is without limit.
    max_attempts = models.IntegerField(_("attempts allowed"), null=True, blank=True)
    result = models.TextField(_("result"), null=True, blank=True)  # noqa: DJ001 - no result is not an empty one
    #: The last failure, or why it was cancelled.
    error = models.TextField(_("error"), null=True, blank=True)  # noqa: DJ001
    parent = models.ForeignKey(
        "self",
        models.CASCADE,
        verbose_name=_("parent"),
        null=True,
        blank=True,
        related_name="children",
        db_index=False,
    )
    #: The top of the tree; a root names itself.
    root = models.ForeignKey("self", models.CASCADE, verbose_name=_("root"), related_name="tree", db_constraint=False)
    depth = models.IntegerField(_("depth"), default=0)
    #: Name of the step in the parent that this child stands for.
    step = ExactCharField(_("step in parent"), max_length=128, blank=True, default="")
    #: The child's place among the payloads of ``ctx.map``, counted from 0; null for other executions.
    position = models.IntegerField(_("position"), null=True, blank=True)

    #: Counts claims. A run may write only while it holds the row's fence, so a zombie cannot.
    fence = models.BigIntegerField(_("fence"), default=0)
    #: ``<worker's node name>/<worker's token>/<process id>`` of the run that holds the lease; see ``owners``.
    lease_owner = models.CharField(_("worker"), max_length=255, blank=True, default="")
    lease_expires_at = models.DateTimeField(_("lease expires"), null=True, blank=True)

    #: While queued: not to be claimed before. Null holds a child back until ``max_parallel`` of its map lets it go, and
    #: another one until its ``predecessor`` has ended.
    due_at = models.DateTimeField(_("due"), null=True, blank=True)
    #: Celery's ``expires``: not to be started after. Of a root with ``tree_deadline_at``, that one, if it is earlier.
    deadline_at = models.DateTimeField(_("start deadline"), null=True, blank=True)
    #: Of a root: when it is cancelled with its whole tree, if it is open then. By ``deadline=`` or ``max_duration=``.
    tree_deadline_at = models.DateTimeField(_("deadline of the tree"), null=True, blank=True)
    #: While queued: when the sweeper publishes the message (again).
    dispatch_at = models.DateTimeField(_("next dispatch"), null=True, blank=True)
    #: How often the sweeper has published since it was queued.
    dispatches = models.IntegerField(_("dispatches"), default=0)
    cancel_requested_at = models.DateTimeField(_("cancel requested"), null=True, blank=True)
    cancel_reason = models.TextField(_("cancel reason"), blank=True, default="")
    #: Final, and Celery (result backend, callbacks, chain, chord) has not been told yet: told again at this instant.
    announce_at = models.DateTimeField(_("next announcement"), null=True, blank=True)
    idempotency_key = ExactCharField(_("idempotency key"), max_length=255, null=True, blank=True)
    #: While it is open, of no other execution of the task; null from the write that makes it final, or lets another one
    #: take it. ``own_key`` is what it was given.
    unique_key = ExactCharField(_("unique key"), max_length=255, null=True, blank=True)
    #: While queued: the execution that had the same unique key before, and whose end makes this one due. No foreign
    #: key: it means nothing any more when that has ended.
    predecessor = models.UUIDField(_("predecessor"), null=True, blank=True)
    #: With a predecessor: when it is due at the earliest.
    due_then = models.DateTimeField(_("due then"), null=True, blank=True)
    #: Celery's options that outlive a suspension: link, link_error, chain, chord, group, headers, time limits.
    options = models.TextField(_("Celery options"), blank=True, default="")

    #: Since when somebody holds it: no run of it begins. All that one call holds have the same instant. Kept when it is
    #: cancelled, and forgotten when it is retried.
    held_at = models.DateTimeField(_("held since"), null=True, blank=True)
    held_by = models.CharField(_("held by"), max_length=150, null=True, blank=True)  # noqa: DJ001 - as held_at
    hold_reason = models.TextField(_("reason of the hold"), null=True, blank=True)  # noqa: DJ001

    created_at = models.DateTimeField(_("created"))
    started_at = models.DateTimeField(_("started"), null=True, blank=True)
    #: When the current run, or the last one, was claimed.
    run_started_at = models.DateTimeField(_("run started"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished"), null=True, blank=True)

    objects = ExecutionQuerySet.as_manager()

    class Meta:
        verbose_name = _("execution")
        verbose_name_plural = _("executions")
        ordering: ClassVar[list[str]] = ["-id"]
        #: What people may do in the admin, beside Django's own `view_execution`.
        permissions: ClassVar[list[tuple[str, Any]]] = [
            ("retry_execution", _("Can retry, rerun, wake and publish executions")),
            ("fork_execution", _("Can run executions again from a step")),
            ("cancel_execution", _("Can cancel executions")),
            ("hold_execution", _("Can hold and release executions, and pause tasks")),
            ("send_event", _("Can send events to executions")),
            ("view_payload", _("Can see payloads and results of executions")),
        ]
        indexes: ClassVar[list[models.Index]] = [
            # The embedded feed and the sweeper: what is to be published.
            PartialIndex(fields=["status", "dispatch_at"], where=Q(status="queued"), name="conductor_ex_dispatch"),
            # The sweeper: whose worker died.
            PartialIndex(fields=["status", "lease_expires_at"], where=Q(status="running"), name="conductor_ex_lease"),
            # The sweeper: what is to be cancelled. The status first: a cancelled execution stays flagged.
            PartialIndex(
                fields=["status", "cancel_requested_at"],
                where=Q(cancel_requested_at__isnull=False),
                name="conductor_ex_cancel",
            ),
            # The sweeper: whose outcome Celery has not been told.
            PartialIndex(fields=["announce_at"], where=Q(announce_at__isnull=False), name="conductor_ex_announce"),
            # The sweeper: what must not start any more.
            PartialIndex(
                fields=["status", "deadline_at"],
                where=Q(status="queued", deadline_at__isnull=False),
                name="conductor_ex_deadline",
            ),
            # The sweeper: whose time is over.
            PartialIndex(
                fields=["finished_at", "tree_deadline_at"],
                where=Q(finished_at__isnull=True, tree_deadline_at__isnull=False),
                name="conductor_ex_tree_deadline",
            ),
            # The children of one parent, those of a map in the order of their payloads.
            models.Index(fields=["parent", "step", "position"], name="conductor_ex_children"),
            # One open execution of a task per key. The key first: all others are null.
            PartialIndex(
                fields=["unique_key", "task"],
                where=Q(unique_key__isnull=False),
                unique=True,
                name="conductor_ex_unique",
            ),
            # An end: who has the key of what has ended. The audit: who waits for that.
            PartialIndex(fields=["predecessor"], where=Q(predecessor__isnull=False), name="conductor_ex_predecessor"),
            # The audit: who waits.
            PartialIndex(fields=["status", "id"], where=Q(status="waiting"), name="conductor_ex_waiting"),
            # The pages: what is held.
            PartialIndex(fields=["held_at"], where=Q(held_at__isnull=False), name="conductor_ex_held"),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["task", "idempotency_key"], name="conductor_ex_idempotency"),
            # Which instants a status has. Few and short constraints: PostgreSQL parses the text of each one anew in
            # each statement that writes a row. Eleven of them took a quarter of its time.
            models.CheckConstraint(
                condition=models.Case(
                    models.When(
                        finished_at__isnull=False,
                        then=Q(
                            status__in=sorted(status.value for status in FINAL_STATUSES),
                            lease_expires_at__isnull=True,
                            dispatch_at__isnull=True,
                        ),
                    ),
                    models.When(lease_expires_at__isnull=False, then=Q(status="running", dispatch_at__isnull=True)),
                    models.When(dispatch_at__isnull=False, then=Q(status="queued")),
                    default=Q(status="waiting") | Q(status="queued", due_at__isnull=True),
                    output_field=models.BooleanField(),
                ),
                name="conductor_ex_status",
            ),
            models.CheckConstraint(
                condition=Q(fence__gte=0, attempt__gte=1)
                & (Q(parent__isnull=True, depth=0) | Q(parent__isnull=False, depth__gt=0)),
                name="conductor_ex_counters",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.task} {self.id}"

    def copied(self, **changed: Any) -> Execution:
        """Return a copy of what is in memory, with other values; ``copy.copy`` takes ten times as long for a model."""
        row = Execution.__new__(Execution)
        vars(row).update(vars(self), _state=ModelState(), **changed)
        row._state.adding, row._state.db = self._state.adding, self._state.db
        return row

    @property
    def is_final(self) -> bool:
        """Whether nothing but an operator's retry will change it."""
        return self.status in FINAL_STATUSES

    @property
    def is_parked(self) -> bool:
        """Whether it waits for a place of a limit; what it waits for, a ``Place`` tells."""
        return (
            self.status == ExecutionStatus.QUEUED
            and self.due_at is not None
            and self.due_at == clock.aware(PARKED_UNTIL)
        )

    @property
    def told_due_at(self) -> dt.datetime | None:
        """When it is due, while that is known: queued, neither parked nor held back."""
        return self.due_at if self.status == ExecutionStatus.QUEUED and not self.is_parked else None

    @property
    def is_held(self) -> bool:
        """Whether somebody holds it, so that no run of it begins."""
        return self.held_at is not None and not self.is_final

    @property
    def has_kept_result(self) -> bool:
        """Whether it is cancelled, and its body had returned a result by then; an operator's retry adopts that."""
        return self.status == ExecutionStatus.CANCELLED and self.result is not None

    @property
    def has_attempts_left(self) -> bool:
        """Whether another attempt may follow the current one."""
        return self.max_attempts is None or self.attempt < self.max_attempts

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain Celery task's: Celery runs and retries it."""
        # Without a look at most options: the sweeper asks this of each row that it publishes.
        return '"plain"' in self.options and "plain" in self.get_options()

    @property
    def is_fork(self) -> bool:
        """Whether it remembers steps before its first run: those of the execution that it was forked from."""
        # Without a look at most options: each first run asks this.
        return '"forked"' in self.options and bool(self.get_options().get("forked"))

    @property
    def own_key(self) -> str | None:
        """The unique key that it was given; it has it (``unique_key``) while it is open, unless another took it."""
        # Without a look at most options: each end asks this.
        return self.get_options().get("unique") if '"unique"' in self.options else None

    @property
    def max_duration(self) -> float | None:
        """``max_duration`` of the task of which it is a root, in seconds: a retry has as much time again."""
        # Without a look at most options: see ``own_key``.
        return self.get_options().get("max_duration") if '"max_duration"' in self.options else None

    @property
    def runs_again(self) -> bool:
        """Whether a dead process costs it one attempt, and not its life: not a plain task without ``acks_late``."""
        return not self.is_plain or bool(self.get_options()["plain"]["acks_late"])

    @property
    def args(self) -> list[Any]:
        """The decoded positional arguments."""
        return list(loads(self.payload)[0])

    @property
    def kwargs(self) -> dict[str, Any]:
        """The decoded keyword arguments."""
        return dict(loads(self.payload)[1])

    @property
    def error_message(self) -> str:
        """The last failure's message, or an empty string."""
        return load_failure(self.error).message if self.error else ""

    @property
    def put_off_because(self) -> str:
        """Why the last worker that got it could not run it, while it is queued for others; or an empty text."""
        if self.status != ExecutionStatus.QUEUED or not self.error or PUT_OFF_AT_FENCE not in self.error:
            return ""
        failure = load_failure(self.error)
        return failure.message if (failure.attributes or {}).get(PUT_OFF_AT_FENCE) == self.fence else ""

    @property
    def astray(self) -> dict[str, Any] | None:
        """The last run that did not come to the step that had woken it; ``None`` if each has.

        ``woken_by`` is the step, ``came_to`` the one for which it waited instead (``None``: it returned), ``fence`` the
        run's, and ``runs`` how many in a row it was the last of.
        """
        return self.get_options().get("astray") if '"astray"' in self.options else None

    def get_result(self) -> Any:
        """Return the decoded result; ``None`` if it has not succeeded.

        Raises:
            OutcomeLost: It has, and its result is not there any more.
        """
        if self.status != ExecutionStatus.SUCCEEDED:
            return loads(self.result)
        return read_result(self.result, self._lost)

    def _lost(self) -> OutcomeLost:
        return OutcomeLost(
            f"Execution {self.pk} of {self.task} has succeeded, and its result is gone: its row has been changed. "
            "Restore it, or start a new execution."
        )

    def get_options(self) -> dict[str, Any]:
        """Return Celery's options that were carried over."""
        return dict(loads(self.options) or {})

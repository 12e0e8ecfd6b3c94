"""All that is stored about one execution, for ``manage.py conductor show`` and the execution's page in the admin.

Read in a number of queries, and of rows, that does not depend on how large its tree is.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from django.db import connections
from django.db.models import Case, Count, F, IntegerField, Q, QuerySet, Sum, TextField, Value, When, Window
from django.db.models.functions import Coalesce, Length, RowNumber, Substr
from django.utils.translation import gettext as _

from conductor_app.exceptions import Failure
from conductor_app.models import Event, Execution, FailedExecution, Step, database
from conductor_app.states import OPEN_STATUSES, ExecutionStatus, StepKind, StepStatus
from conductor_app.store import clock
from conductor_app.telling.explain import Census, Situation, duration, short_name, unanswered_queue
from conductor_app.values.serialization import dump_failure, load_failure

#: What is read of each execution of a tree; payloads and results stay in the database.
TREE_FIELDS = (
    "id",
    "task",
    "queue",
    "status",
    "attempt",
    "max_attempts",
    "parent_id",
    "root_id",
    "depth",
    "step",
    "position",
    "fence",
    "lease_owner",
    "lease_expires_at",
    "due_at",
    "dispatches",
    "cancel_requested_at",
    "cancel_reason",
    "created_at",
    "started_at",
    "finished_at",
)
#: Most executions of a tree that are read, beside those on the way from the root to the execution.
MOST_NODES = 200
#: Most of them that are children of the execution, and of each other one: those that failed come first, then those that
#: are under way.
MOST_CHILDREN = 50
MOST_SIBLINGS = 20
#: Most steps that are read: those that are pending, and the latest.
MOST_STEPS = 200
#: Most children whose own waits are read, and most waits of each.
MOST_LANES = 40
MOST_WAITS = 20
#: Characters of an error that are read of each execution and step, and of each failure's message.
ERROR_LENGTH = 1_000

_FAILURE = re.compile(r'\{"type":"((?:[^"\\]|\\.)*)","message":"((?:[^"\\]|\\.)*)', re.DOTALL)


@dataclass(frozen=True)
class Branch:
    """One execution of the tree as it is drawn."""

    execution: Execution
    depth: int
    #: Whether it is the one that the story is about.
    is_current: bool
    #: Whether it is that one, or stands between it and the root.
    is_on_path: bool
    children: list[Branch] = field(default_factory=list)
    #: How many children more it has.
    hidden: int = 0


@dataclass(frozen=True)
class Cause:
    """One failure of the chain from an execution down to its root cause."""

    execution_id: uuid.UUID
    task: str
    #: The step at which it failed, if another failure is behind it.
    step: str
    error_class: str
    message: str
    traceback: str
    attempts: int
    failed_at: dt.datetime | None


@dataclass(frozen=True)
class Moment:
    """Something that happened, or that will."""

    at: dt.datetime
    text: str


@dataclass(frozen=True)
class Story:
    """All rows about one execution."""

    execution: Execution
    situation: Situation
    #: Steps of the execution, in the order in which they were recorded. Each has ``value``, the beginning of its stored
    #: result, and ``value_length``, the length of all of it.
    steps: list[Step]
    #: How many steps it has.
    step_count: int
    #: What its children remember, as far as they wait or have waited.
    waits: Mapping[uuid.UUID, list[Step]]
    #: The failures from the execution down to the root cause.
    causes: list[Cause]
    #: How many executions its tree has.
    node_count: int
    #: How many children each parent has.
    child_counts: Mapping[uuid.UUID | None, int]
    #: How many events of each name were sent to it that no step has taken.
    mailbox: Mapping[str, int] = field(default_factory=dict)

    @property
    def now(self) -> dt.datetime:
        """The database's clock when it was read."""
        return self.situation.now

    @property
    def tree(self) -> Mapping[uuid.UUID, Execution]:
        """The executions of its tree that were read."""
        return self.situation.tree

    def child_of(self, step: Step) -> Execution | None:
        """Return the child that stands behind a step, if it was read."""
        return self.tree.get(step.child_id) if step.child_id is not None else None

    def branches(self) -> Branch:
        """Return the tree from its root, or from the highest ancestor that is still there."""
        path = [row.pk for row in ancestry(self.execution, self.tree)]
        children: dict[uuid.UUID | None, list[Execution]] = defaultdict(list)
        for row in self.tree.values():
            # The highest one has no parent here, even if a hand has made rows each other's parents.
            if row.pk != path[-1]:
                children[row.parent_id].append(row)
        for below in children.values():
            below.sort(key=lambda row: (row.created_at, row.position or 0, row.pk))
        top = self._branch(self.tree[path[-1]], 0, path, children[path[-1]])
        to_draw = [top]
        while to_draw:
            branch = to_draw.pop()
            branch.children.extend(
                self._branch(row, branch.depth + 1, path, children[row.pk]) for row in children[branch.execution.pk]
            )
            to_draw.extend(branch.children)
        return top

    def _branch(self, row: Execution, depth: int, path: list[uuid.UUID], below: list[Execution]) -> Branch:
        hidden = max(self.child_counts.get(row.pk, 0) - len(below), 0)
        return Branch(row, depth, row.pk == self.execution.pk, row.pk in path, hidden=hidden)


def ancestry(execution: Execution, tree: Mapping[uuid.UUID, Execution]) -> list[Execution]:
    """Return an execution, its parent and so on, as far up as they are known."""
    path = [execution]
    seen = {execution.pk}
    while (parent_id := path[-1].parent_id) is not None and parent_id in tree and parent_id not in seen:
        seen.add(parent_id)
        path.append(tree[parent_id])
    return path


# ------------------------------------------------------------------------------------------------------------- reading


def read(execution_id: uuid.UUID, *, preview: int | None, whole: bool = False) -> Story | None:
    """Read everything about one execution; ``None`` if there is none.

    Args:
        execution_id: Which one.
        preview: Characters of each step's result to read; ``None`` reads all of it.
        whole: Whether to read all of its tree and steps, however many there are.
    """
    rows = Execution.objects.using(database()).select_related("failure")
    execution = rows.filter(pk=execution_id).first()
    return None if execution is None else tell(execution, preview=preview, whole=whole, with_mailbox=True)


def tell(
    execution: Execution,
    *,
    preview: int | None,
    whole: bool = False,
    seen: QuerySet[Execution] | None = None,
    with_messages: bool = True,
    with_mailbox: bool = False,
) -> Story:
    """Read everything about an execution that was read with ``select_related("failure")``; see ``read``.

    Args:
        execution: Which one.
        preview: As for ``read``.
        whole: As for ``read``.
        seen: The executions that may be told of beside it; ``None`` are all. It is told as if the others did not exist.
        with_mailbox: Whether to look for events that no step has taken.
        with_messages: Whether the messages and tracebacks of errors may be told, and not their classes alone.
    """
    own: FailedExecution | None = getattr(execution, "failure", None)
    now = clock.read(database())
    if whole:
        rows = Execution.objects.using(database()).filter(root_id=execution.root_id).order_by("created_at", "id")
        tree = {row.pk: row for row in rows.only(*TREE_FIELDS, "error")}
        picked = _Picked(keys=list(tree), lanes=[], nodes=len(tree), children={})
    else:
        picked = _pick(execution, seen)
        cause = own.root_cause_id if own is not None else None
        keys = {execution.pk, *picked.keys, *([] if cause is None else [cause])}
        tree = {row.pk: row for row in _read_with_ancestors(sorted(keys))}
    tree[execution.pk] = execution
    steps, waits = _read_steps(execution, picked.lanes, preview, whole=whole)
    if seen is not None:
        tree = _as_seen(seen, execution, own, steps, tree)
    failures = _read_failures(execution, own, tree, whole=whole)
    if not with_messages:
        withhold(tree.values(), steps, failures.values())
    situation = Situation(
        execution=execution,
        now=now,
        steps=steps,
        tree=tree,
        failures=failures,
        counted=picked.children.get(execution.pk),
    )
    situation = with_queue(situation, seen)
    return Story(
        execution=execution,
        situation=situation,
        steps=steps,
        step_count=max((step.step_count for step in steps), default=0),  # type: ignore[attr-defined]  # annotated
        waits=waits,
        causes=list(_causes(execution, own, failures, tree)),
        node_count=max(picked.nodes, len(tree)),
        child_counts={key: census.total for key, census in picked.children.items()},
        mailbox=mailbox_of(execution.pk) if with_mailbox else {},
    )


def with_queue(situation: Situation, seen: QuerySet[Execution] | None = None) -> Situation:
    """Return the situation with what workers do in the queue that has not answered; one query if there is one."""
    queue = unanswered_queue(situation)
    if queue is None:
        return situation
    rows: Any = Execution.objects.using(database()) if seen is None else seen
    return replace(situation, at_work=rows.order_by().at_work().filter(queue=queue).count())


@dataclass(frozen=True)
class _Picked:
    """Which executions of a tree are read."""

    keys: list[uuid.UUID]
    #: The children whose own waits are read.
    lanes: list[uuid.UUID]
    #: How many the whole tree has.
    nodes: int
    #: How many children each parent of one of them has.
    children: dict[uuid.UUID | None, Census]


def withhold(
    executions: Iterable[Execution], steps: Iterable[Step] = (), failures: Iterable[FailedExecution] = ()
) -> None:
    """Leave of the errors in rows that were read their classes alone."""
    rows: list[Execution | Step] = [*executions, *steps]
    for row in rows:
        if row.error:
            row.error = dump_failure(Failure(type=load_failure(row.error).type, message=""))
    for failure in failures:
        failure.message = failure.traceback = ""


def mailbox_of(execution_id: uuid.UUID) -> dict[str, int]:
    """Return how many events of each name were sent to an execution that no step has taken."""
    waiting = Event.objects.using(database()).filter(execution_id=execution_id, taken_at__isnull=True)
    return dict(waiting.order_by("name").values_list("name").annotate(number=Count("pk")))


def _as_seen(
    seen: QuerySet[Execution],
    execution: Execution,
    own: FailedExecution | None,
    steps: Collection[Step],
    tree: Mapping[uuid.UUID, Execution],
) -> dict[uuid.UUID, Execution]:
    """Return the executions that may be told of, and take the ids of the others from the rows; one query."""
    cause = own.root_cause_id if own is not None else None
    named = (execution.parent_id, execution.root_id, cause, *(step.child_id for step in steps))
    keys = {*tree, *(key for key in named if key is not None)}
    found = set(seen.filter(pk__in=keys).values_list("pk", flat=True)) | {execution.pk}
    if own is not None and cause not in found:
        own.root_cause_id = None
    for step in steps:
        if step.child_id not in found:
            step.child_id = None
    if execution.parent_id not in found:
        execution.parent_id = None
    if execution.root_id not in found:
        execution.root_id = execution.pk
    return {key: row for key, row in tree.items() if key in found}


def _pick(execution: Execution, seen: QuerySet[Execution] | None) -> _Picked:
    """Choose what is read of a tree: of narrow columns alone, since the database has to look at all of its rows."""
    # Of thousands of children those that somebody looks for: what failed, then what is under way.
    weight = Case(
        When(status=ExecutionStatus.FAILED, then=0),
        When(status__in=[ExecutionStatus.RUNNING, ExecutionStatus.WAITING], then=1),
        When(status=ExecutionStatus.SUCCEEDED, then=3),
        default=2,
        output_field=IntegerField(),
    )
    siblings: dict[str, Any] = {"partition_by": [F("parent_id")]}
    rows: QuerySet[Execution] = Execution.objects.using(database()) if seen is None else seen
    rows = rows.filter(root_id=execution.root_id)
    drawn = rows.annotate(
        place=Window(RowNumber(), order_by=[weight, F("created_at").asc(), F("id").asc()], **siblings),
        siblings=Window(Count("id"), **siblings),
        siblings_open=Window(Sum(_one_if(status__in=sorted(OPEN_STATUSES))), **siblings),
        siblings_cancelled=Window(Sum(_one_if(status=ExecutionStatus.CANCELLED)), **siblings),
        nodes=Window(Count("id")),
        # Children of the execution first, then level by level, so that no branch uses up what the others need.
        is_far=Case(When(parent_id=execution.pk, then=0), default=1, output_field=IntegerField()),
    ).filter(Q(place__lte=MOST_SIBLINGS) | Q(parent_id=execution.pk, place__lte=MOST_CHILDREN))
    found = drawn.order_by("is_far", "depth", "place", "id").values_list(
        "id", "parent_id", "siblings", "siblings_open", "siblings_cancelled", "nodes"
    )[:MOST_NODES]
    keys: list[uuid.UUID] = []
    lanes: list[uuid.UUID] = []
    children: dict[uuid.UUID | None, Census] = {}
    nodes = 1
    for key, parent_id, total, still_open, cancelled, nodes in found:  # noqa: B007 - the same in each row
        keys.append(key)
        if parent_id is not None:
            children[parent_id] = Census(total, int(still_open), int(cancelled))
        if parent_id == execution.pk and len(lanes) < MOST_LANES:
            lanes.append(key)
    return _Picked(keys, lanes, nodes, children)


def _one_if(**condition: Any) -> Case:
    return Case(When(**condition, then=1), default=0, output_field=IntegerField())


def _read_with_ancestors(keys: list[uuid.UUID]) -> Iterator[Execution]:
    """Read executions and all that stand above them: the way from the root to each is never cut."""
    connection = connections[database()]
    meta = Execution._meta
    quote = connection.ops.quote_name
    columns = [field.column for field in meta.concrete_fields if field.attname in TREE_FIELDS]
    table, names = quote(meta.db_table), ", ".join(f"e.{quote(str(column))}" for column in columns)
    places = ", ".join(["%s"] * len(keys))
    # UNION, not UNION ALL: it ends with rows that point at each other, which nothing but an UPDATE by hand makes.
    sql = (
        f"WITH RECURSIVE up (id, parent_id) AS ("  # noqa: S608 - names of our own table
        f"SELECT id, parent_id FROM {table} WHERE id IN ({places}) UNION "
        f"SELECT a.id, a.parent_id FROM {table} a JOIN up ON a.id = up.parent_id) "
        f"SELECT {names}, SUBSTR(e.error, 1, {ERROR_LENGTH}) AS error_head FROM up JOIN {table} e ON e.id = up.id"
    )
    params = [meta.pk.get_db_prep_value(key, connection) for key in keys]
    for row in Execution.objects.using(database()).raw(sql, params):
        row.error = _whole_failure(row.error_head)  # type: ignore[attr-defined]  # a column of the query
        yield row


def _read_steps(
    execution: Execution, children: list[uuid.UUID], preview: int | None, *, whole: bool
) -> tuple[list[Step], dict[uuid.UUID, list[Step]]]:
    value = Coalesce("result", F("child__result"), output_field=TextField())
    shown: Any = value if preview is None else Substr(value, 1, preview + 1)
    rows: QuerySet[Step, Any] = Step.objects.using(database()).filter(execution_id=execution.pk)
    if whole:
        steps = list(rows.annotate(value=shown, value_length=Length(value)).defer("result").order_by("id"))
        for step in steps:
            step.step_count = len(steps)
        return steps, {}
    is_own = Q(execution_id=execution.pk)
    by_execution: dict[str, Any] = {"partition_by": [F("execution_id")]}
    is_decided = Case(When(status=StepStatus.PENDING, then=0), default=1, output_field=IntegerField())
    rows = Step.objects.using(database()).filter(execution_id__in=[execution.pk, *children])
    drawn = (
        rows.annotate(
            value=Case(When(is_own, then=shown), default=Value(None), output_field=TextField()),
            value_length=Case(When(is_own, then=Length(value)), default=Value(None), output_field=IntegerField()),
            error_head=Substr("error", 1, ERROR_LENGTH),
            place=Window(RowNumber(), order_by=[is_decided, F("id").desc()], **by_execution),
            step_count=Window(Count("id"), **by_execution),
        )
        .filter(Q(place__lte=MOST_WAITS) | Q(is_own, place__lte=MOST_STEPS))
        .defer("result", "error")
        .order_by("id")
    )
    own: list[Step] = []
    waits: dict[uuid.UUID, list[Step]] = defaultdict(list)
    for step in drawn:
        step.error = _whole_failure(step.error_head)
        (own if step.execution_id == execution.pk else waits[step.execution_id]).append(step)
    return own, waits


def _read_failures(
    execution: Execution, own: FailedExecution | None, tree: Mapping[uuid.UUID, Execution], *, whole: bool
) -> dict[uuid.UUID, FailedExecution]:
    """Return the failures from an execution to its root cause by id; of those between them only what is shown."""
    if own is None or execution.status != ExecutionStatus.FAILED:
        return {}
    keys = _between(execution, own, tree)
    if not keys:
        return {own.pk: own}
    cause = own.root_cause_id
    below = FailedExecution.objects.using(database()).filter(pk__in=keys)
    if whole:
        return {own.pk: own, **below.in_bulk()}
    shown = below.defer("message", "traceback").annotate(
        message_head=Substr("message", 1, ERROR_LENGTH),
        trace=Case(When(pk=cause, then=F("traceback")), default=Value(""), output_field=TextField()),
    )
    found = {own.pk: own}
    for failure in shown:
        failure.message, failure.traceback = failure.message_head, failure.trace
        found[failure.pk] = failure
    return found


def _between(execution: Execution, own: FailedExecution, tree: Mapping[uuid.UUID, Execution]) -> list[uuid.UUID]:
    """Return the ids below an execution on the way to its root cause, from the highest to the lowest."""
    if own.root_cause_id is None:
        return []
    cause = tree.get(own.root_cause_id)
    if cause is None:
        return [own.root_cause_id]
    path = [row.pk for row in ancestry(cause, tree)]
    return path[: path.index(execution.pk)][::-1] if execution.pk in path else [cause.pk]


def _causes(
    execution: Execution,
    own: FailedExecution | None,
    failures: Mapping[uuid.UUID, FailedExecution],
    tree: Mapping[uuid.UUID, Execution],
) -> Iterator[Cause]:
    if own is None or own.pk not in failures:
        return
    for key in [execution.pk, *_between(execution, own, tree)]:
        failure, row = failures.get(key), tree.get(key)
        if failure is not None:
            yield Cause(
                execution_id=key,
                task=failure.task,
                step=failure.step,
                error_class=failure.error_class,
                message=failure.message,
                traceback=failure.traceback,
                attempts=failure.attempts,
                failed_at=failure.failed_at,
            )
        elif row is not None and row.error:
            # An operator's retry of the child, or a hand, has taken its failure away; or it has timed out.
            told = head_of_failure(row.error)
            yield Cause(key, row.task, "", told.type, told.message, "", row.attempt, row.finished_at)


def head_of_failure(text: str) -> Failure:
    """Return class and message of a stored failure, even if the text ends somewhere in the message."""
    found = _FAILURE.match(text)
    if found is None:
        return Failure(type="Unknown", message=text)
    return Failure(type=_string(found[1]), message=_string(found[2]))


def _whole_failure(text: str | None) -> str | None:
    """Return a stored failure of which only the beginning was read as one that can be loaded."""
    return text if text is None or len(text) < ERROR_LENGTH else dump_failure(head_of_failure(text))


def _string(inside: str) -> str:
    # The last escape sequence may have been cut in the middle.
    for end in range(len(inside), max(len(inside) - 6, 0), -1):
        try:
            return str(json.loads(f'"{inside[:end]}"', strict=False))
        except ValueError:
            continue
    return ""


# ------------------------------------------------------------------------------------------------------------- history


def history(story: Story) -> list[Moment]:
    """Return what has happened to an execution, as far as its rows tell, and what will; in order.

    There is no table of moves: the time of a failed attempt, and of a wake-up's next run, is not kept.
    """
    return sorted(_moments(story), key=lambda moment: moment.at)


def shortened(moments: list[Moment], most: int) -> list[Moment]:
    """Return the first and the last moments, and in their middle how many are left out."""
    if len(moments) <= most:
        return moments
    half = most // 2
    hidden = len(moments) - 2 * half
    left_out = Moment(moments[half].at, _("… %(count)s more") % {"count": f"{hidden:,}"})
    return [*moments[:half], left_out, *moments[-half:]]


def _moments(story: Story) -> Iterator[Moment]:
    execution, now = story.execution, story.now
    queued = _('queued by its parent, for step "%(step)s"') if execution.parent_id else _('queued in queue "%(queue)s"')
    yield Moment(execution.created_at, queued % {"step": execution.step, "queue": execution.queue})
    if execution.started_at is not None:
        yield Moment(execution.started_at, _("first run started"))
    for attempt, at in attempts_begun(story.steps):
        yield Moment(at, _("attempt %(attempt)d under way") % {"attempt": attempt})
    for step in story.steps:
        yield from _step_moments(step, story)
    due_at = execution.due_at if execution.status == ExecutionStatus.QUEUED else None
    if due_at is not None and due_at > execution.created_at:
        yield Moment(due_at, _("queued again") if due_at <= now else _("due"))
    if execution.cancel_requested_at is not None:
        reason = execution.cancel_reason.rstrip(": ")
        requested = _("cancel requested: %(reason)s") % {"reason": reason} if reason else _("cancel requested")
        yield Moment(execution.cancel_requested_at, requested)
    if execution.status == ExecutionStatus.RUNNING and execution.lease_expires_at is not None:
        yield Moment(execution.lease_expires_at, _("its lease expires, unless it is renewed"))
    if execution.finished_at is not None:
        yield Moment(execution.finished_at, execution.get_status_display())


def attempts_begun(steps: Iterable[Step]) -> list[tuple[int, dt.datetime]]:
    """Return each attempt after the first with the time of its first new step: it has begun by then."""
    first: dict[int, dt.datetime] = {}
    for step in steps:
        if step.attempt > 1:
            first[step.attempt] = min(first.get(step.attempt, step.created_at), step.created_at)
    return sorted(first.items())


def _step_moments(step: Step, story: Story) -> Iterator[Moment]:
    values = {"step": step.name, "status": step.get_status_display()}
    if step.kind == StepKind.STEP:
        yield Moment(step.created_at, _('step "%(step)s" %(status)s') % values)
        return
    yield Moment(step.created_at, _begun(step))
    child = story.child_of(step)
    if child is not None and child.started_at is not None:
        values |= {
            "task": short_name(child.task),
            "time": duration((child.started_at - child.created_at).total_seconds()),
        }
        yield Moment(child.started_at, _('step "%(step)s": %(task)s started after %(time)s in the queue') % values)
    if step.finished_at is not None:
        values["time"] = duration((step.finished_at - step.created_at).total_seconds())
        yield Moment(step.finished_at, _('step "%(step)s" %(status)s after %(time)s') % values)
    elif step.deadline_at is not None and not story.execution.is_final:
        ends = _('step "%(step)s" ends') if step.kind == StepKind.SLEEP else _('step "%(step)s" times out')
        yield Moment(step.deadline_at, ends % values)


def _begun(step: Step) -> str:
    values = {"step": step.name, "task": short_name(step.task), "event": step.task, "count": f"{step.total or 0:,}"}
    match step.kind:
        case StepKind.INVOKE:
            text = _('step "%(step)s": %(task)s queued, waits for it; no worker is held')
        case StepKind.START:
            text = _('step "%(step)s": %(task)s queued; goes on')
        case StepKind.MAP:
            text = _('step "%(step)s": %(count)s %(task)s queued, waits for them; no worker is held')
        case StepKind.GATHER:
            text = _('step "%(step)s": waits for %(count)s started children; no worker is held')
        case StepKind.SLEEP:
            text = _('step "%(step)s": sleeps; no worker is held')
        case StepKind.EVENT:
            text = _('step "%(step)s": waits for the event "%(event)s"; no worker is held')
        case _:
            text = _('step "%(step)s": waits; no worker is held')
    return text % values

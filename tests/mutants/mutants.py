"""The mutants, as data: what is replaced by what, and which tests are to turn red."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TRANSITIONS = "tests/integration/test_transitions.py"
PARALLEL = "tests/integration/test_parallel.py"
EVENTS = "tests/integration/test_events.py"
CANCEL = "tests/integration/test_cancel.py"
SWEEPER = "tests/integration/test_sweeper.py"
COMMITS = "tests/integration/test_commits.py"
DISPATCH = "tests/integration/test_dispatch.py"
DECORATOR = "tests/integration/test_decorator.py"
LEASES = "tests/integration/test_leases.py"
OPERATOR = "tests/integration/test_operator_retry.py"
CONTEXT = "tests/integration/test_context.py"
FAILURES = "tests/integration/test_failures.py"
REPLAY = "tests/integration/test_replay.py"
HAND_OFF = "tests/integration/test_hand_off.py"
FAN_IN = "tests/races/test_fan_in.py"
RACING_EVENTS = "tests/races/test_events.py"
HOLDERS = "tests/races/test_holders.py"
OPERATORS = "tests/races/test_operators.py"
OUTCOMES = "tests/races/test_outcomes.py"
SWEEPERS = "tests/races/test_sweepers.py"
WAKE_UPS = "tests/races/test_wake_ups.py"
HASTENING = "tests/integration/test_hastening.py"
PLAIN = "tests/integration/test_plain.py"
AMNESIA = "tests/acceptance/test_database_amnesia.py"

#: What PostgreSQL runs in the place of some of the other transitions.
STATEMENTS = "transitions/statements.py"


@dataclass(frozen=True)
class Mutant:
    """One replacement in one file of ``conductor_app``.

    Attributes:
        name: What the product does not do any more.
        file: Below ``conductor_app``.
        old: Text that stands there exactly once.
        new: What it becomes.
        tests: Test files, or tests, of which one has to fail. Those below ``tests/races`` need PostgreSQL.
        on_postgres: Whether all of them are run there: they are about what only PostgreSQL does.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    on_postgres: bool = False

    @property
    def needs_postgres(self) -> bool:
        """Whether a test of it needs PostgreSQL."""
        return self.on_postgres or any(test.startswith("tests/races/") for test in self.tests)

    def applied(self, text: str) -> str:
        """Return the file's text with the replacement.

        Raises:
            ValueError: ``old`` is not there, or not once.
        """
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"Mutant {self.name!r}: {self.old!r} stands {found} times in conductor_app/{self.file}.")
        return text.replace(self.old, self.new)

    def check(self, root: Path) -> None:
        """Raise ``ValueError`` unless it fits the sources below ``root``."""
        self.applied((root / "conductor_app" / self.file).read_text())


MUTANTS = [
    # --- claim
    Mutant(
        "claim whatever the status",
        "models/querysets.py",
        "            status=ExecutionStatus.QUEUED,\n            cancel_requested_at__isnull=True,\n",
        "            cancel_requested_at__isnull=True,\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "claim before it is due",
        "models/querysets.py",
        "            return ready.filter(due_at__lte=clock.now())\n",
        "            return ready\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "claim what is to be cancelled",
        "models/querysets.py",
        "            status=ExecutionStatus.QUEUED,\n            cancel_requested_at__isnull=True,\n",
        "            status=ExecutionStatus.QUEUED,\n",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "claim what has expired",
        "models/querysets.py",
        "            Q(deadline_at__isnull=True) | Q(deadline_at__gt=clock.now()) | Q(started_at__isnull=False),\n",
        "",
        (TRANSITIONS, SWEEPER),
    ),
    Mutant(
        "claim by the name of another task",
        "transitions/claiming.py",
        "        named = named.filter(task=task)\n",
        "        pass\n",
        (TRANSITIONS, DECORATOR, "tests/integration/test_concurrency.py", CONTEXT),
    ),
    Mutant(
        "claim without a new fence", "transitions/claiming.py", '        fence=F("fence") + 1,\n', "", (TRANSITIONS,)
    ),
    Mutant(
        "forget when it was started first",
        "transitions/claiming.py",
        'started_at=Coalesce("started_at", clock.now())',
        "started_at=clock.now()",
        (TRANSITIONS, SWEEPER),
    ),
    Mutant(
        "take over the lease of a run in the same process after an outage",
        "executor.py",
        "if execution is None and not keeper.holds(execution_id):",
        "if execution is None:",
        (COMMITS,),
    ),
    Mutant(
        "take over another process's lease after an outage",
        "transitions/claiming.py",
        "        pk=execution_id, status=ExecutionStatus.RUNNING, lease_owner=owner\n",
        "        pk=execution_id, status=ExecutionStatus.RUNNING\n",
        (COMMITS,),
    ),
    Mutant(
        "claim a plain task by the message of another attempt",
        "models/querysets.py",
        "filter(due_at__isnull=False, attempt=attempt)",
        "filter(due_at__isnull=False)",
        ("tests/integration/test_plain.py",),
    ),
    # --- the fence
    Mutant(
        "hold with any fence",
        "models/querysets.py",
        "self.filter(pk=run.pk, fence=run.fence, lease_owner",
        "self.filter(pk=run.pk, lease_owner",
        (TRANSITIONS,),
    ),
    Mutant(
        "hold in any status",
        "models/querysets.py",
        # A row of another status has no owner: either says it.
        "fence=run.fence, lease_owner=run.lease_owner, status=ExecutionStatus.RUNNING)",
        "fence=run.fence)",
        (TRANSITIONS,),
    ),
    Mutant(
        "let a loser go on",
        "transitions/guards.py",
        "    raise lease_lost(execution) if cancel_requested else refusal(execution)\n",
        "    if not cancel_requested and held.exists():\n        raise refusal(execution)\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "record steps without holding the execution",
        "transitions/running.py",
        '    flags = list(locked(held).values_list("cancel_requested_at", flat=True))\n    if not flags:\n',
        '    flags = list(locked(held).values_list("cancel_requested_at", flat=True)) or [None]\n    if not flags:\n',
        (TRANSITIONS, LEASES),
    ),
    Mutant(
        "gather without holding the execution",
        "transitions/suspending.py",
        "    running.lock_held(execution)  # what a run records, it records while it holds its execution\n",
        "",
        (FAN_IN,),
    ),
    Mutant(
        "renew the lease of another run",
        "leases.py",
        "mine |= Q(pk=lease.execution.pk, fence=lease.execution.fence, lease_owner=lease.execution.lease_owner)",
        "mine |= Q(pk=lease.execution.pk, lease_owner=lease.execution.lease_owner)",
        (LEASES,),
    ),
    Mutant(
        "recognise no end after a lost answer",
        "transitions/running.py",
        "guards.persist(work, unless_already=is_recorded)",
        "guards.persist(work)",
        (COMMITS,),
    ),
    # --- cancelling
    Mutant(
        "suspend what is to be cancelled",
        "transitions/suspending.py",
        "status=ExecutionStatus.WAITING, cancel_requested=False, **guards",
        "status=ExecutionStatus.WAITING, **guards",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "retry what is to be cancelled",
        "transitions/running.py",
        "                cancel_requested=False,\n",
        "",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "start a child of what is to be cancelled",
        "transitions/suspending.py",
        "            if running.lock_held(execution):\n                raise CancelExecution\n            _open_child",
        "            running.lock_held(execution)\n            _open_child",
        (TRANSITIONS,),
    ),
    Mutant(
        "wait for an event although it is to be cancelled",
        "transitions/suspending.py",
        "    if running.lock_held(execution):\n        raise CancelExecution\n    return sending",
        "    running.lock_held(execution)\n    return sending",
        (TRANSITIONS, EVENTS),
    ),
    Mutant(
        "cancel a run whose cancellation was withdrawn",
        "transitions/cancelling.py",
        "            if row.cancel_requested_at is None:\n",
        "            if False:\n",
        (TRANSITIONS, CANCEL, OPERATOR),
    ),
    Mutant(
        "cancel what runs or has ended",
        "models/querysets.py",
        "            cancel_requested_at__isnull=False, status__in=[ExecutionStatus.QUEUED, ExecutionStatus.WAITING]\n",
        "            cancel_requested_at__isnull=False\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "flag what has ended",
        "transitions/cancelling.py",
        "        .open()\n        .update(cancel_requested_at=clock.now()",
        "        .update(cancel_requested_at=clock.now()",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "leave the children of what is cancelled alone",
        "transitions/cancelling.py",
        "            flag_children(execution_id)\n",
        "",
        (CANCEL,),
    ),
    Mutant(
        "leave the children of a cancelled run alone",
        "transitions/cancelling.py",
        "            flag_children(execution.pk)\n",
        "",
        (TRANSITIONS,),
    ),
    Mutant(
        "let a parent wait for a cancelled child",
        "transitions/cancelling.py",
        "    waking.settle_parent(execution, StepStatus.CANCELLED, error=_cancel_error(execution))\n",
        "",
        (CANCEL,),
    ),
    Mutant(
        "cancel siblings that run",
        "transitions/waking.py",
        "children.filter(status=ExecutionStatus.QUEUED, started_at__isnull=True)",
        "children.open().exclude(status=ExecutionStatus.RUNNING)",
        (TRANSITIONS, PARALLEL),
    ),
    # --- waking
    Mutant(
        "wake with a condition on the status",
        "transitions/waking.py",
        "        Execution.objects.using(database()).filter(pk=execution_id),\n        (*dispatch",
        "        Execution.objects.using(database()).filter(pk=execution_id, status=ExecutionStatus.WAITING),\n"
        "        (*dispatch",
        (WAKE_UPS,),
    ),
    Mutant(
        "wake whatever the status",
        "transitions/waking.py",
        '        status=Case(waiting, default=F("status")),\n',
        "        status=ExecutionStatus.QUEUED,\n",
        (TRANSITIONS, PARALLEL),
    ),
    Mutant(
        "suspend without looking again",
        "transitions/suspending.py",
        "                if not steps.is_pending(execution.pk, wait.step):\n",
        "                if False:\n",
        (TRANSITIONS, WAKE_UPS),
    ),
    Mutant(
        "succeed without waking the parent",
        "transitions/running.py",
        "            waking.settle_parent(execution, StepStatus.SUCCEEDED)\n",
        "",
        (TRANSITIONS,),
    ),
    Mutant(
        "fail without waking the parent",
        "transitions/failing.py",
        "    waking.settle_parent(execution, StepStatus.FAILED)\n",
        "",
        (TRANSITIONS, FAILURES),
    ),
    # --- steps and counts
    Mutant(
        "decide a step twice",
        "steps.py",
        "of(execution_id, name).filter(status=StepStatus.PENDING)\n    if only_overdue",
        "of(execution_id, name)\n    if only_overdue",
        (TRANSITIONS, OUTCOMES),
    ),
    Mutant(
        "count a decided map down",
        "steps.py",
        '        counted.filter(status=StepStatus.PENDING), ("execution_id"',
        '        counted, ("execution_id"',
        (PARALLEL,),
    ),
    Mutant("decide a map too late", "steps.py", "Q(remaining__lte=1)", "Q(remaining__lte=0)", (PARALLEL,)),
    Mutant("decide a map too early", "steps.py", "Q(remaining__lte=1)", "Q(remaining__lte=2)", (PARALLEL,)),
    Mutant(
        "wait for all although one has failed",
        "steps.py",
        "        decisions.insert(0, When(fails_fast=True, then=Value(status.value)))\n"
        "        is_last |= Q(fails_fast=True)\n",
        "        pass\n",
        (PARALLEL,),
    ),
    Mutant(
        "fail a map that asked for exceptions",
        "steps.py",
        "        decisions.insert(0, When(fails_fast=True, then=Value(status.value)))\n"
        "        is_last |= Q(fails_fast=True)\n",
        "        decisions.insert(0, When(remaining__gte=0, then=Value(status.value)))\n"
        "        is_last |= Q(remaining__gte=0)\n",
        (PARALLEL,),
    ),
    Mutant(
        "forget who was late",
        "transitions/recovering.py",
        "                steps.note_late(step)\n",
        "                pass\n",
        (PARALLEL,),
    ),
    Mutant(
        "cancel siblings of a map that was decided before",
        "transitions/waking.py",
        "                transaction.set_rollback(True, using=database())\n        return\n",
        "                pass\n        return\n",
        (FAN_IN,),
    ),
    Mutant(
        "start all children of a map at once",
        "transitions/suspending.py",
        "is_held=position >= in_flight)",
        "is_held=False)",
        (PARALLEL,),
    ),
    Mutant(
        "let no sibling go",
        "transitions/waking.py",
        "        _release_sibling(child)\n",
        "        pass\n",
        (PARALLEL,),
    ),
    Mutant(
        "let a sibling go for one that was held itself",
        "transitions/waking.py",
        'if child.get_options().get("throttled") and not _is_held(child):',
        'if child.get_options().get("throttled"):',
        (PARALLEL,),
    ),
    Mutant(
        "give up when siblings are just let go by others",
        "transitions/waking.py",
        "locked(held, skip=True).first() or locked(held).first()",
        "locked(held, skip=True).first()",
        (FAN_IN,),
    ),
    Mutant(
        "queue behind those who let the same sibling go",
        "transitions/waking.py",
        "locked(held, skip=True).first() or locked(held).first()",
        "locked(held).first()",
        (FAN_IN,),
    ),
    Mutant(
        "let a sibling go that is to be cancelled",
        "transitions/waking.py",
        "due_at__isnull=True, cancel_requested_at__isnull=True)",
        "due_at__isnull=True)",
        (TRANSITIONS,),
    ),
    Mutant(
        "leave children held back that nothing lets go",
        "transitions/recovering.py",
        "    waking.release_held(children, step.max_parallel)\n",
        "",
        (PARALLEL,),
    ),
    Mutant(
        "do not look for maps and gathers whose children are not in flight",
        "maintenance/sweeper.py",
        "    ids += [step.execution_id for step in steps.in_vain(conductor_settings().SWEEP_BATCH)]\n",
        "",
        (PARALLEL,),
    ),
    Mutant(
        "send to what has ended",
        "transitions/sending.py",
        "filter(pk=execution_id).open().update(fence",
        "filter(pk=execution_id).update(fence",
        (EVENTS,),
    ),
    Mutant(
        "store an event although a step has begun to wait",
        "transitions/sending.py",
        "            if has_missed_step or not mailbox.put",
        "            if not mailbox.put",
        (RACING_EVENTS,),
    ),
    Mutant(
        "send without writing the execution",
        "transitions/sending.py",
        'filter(pk=execution_id).open().update(fence=F("fence")):',
        "filter(pk=execution_id).open().exists():",
        (RACING_EVENTS,),
    ),
    Mutant(
        "take an event twice",
        "mailbox.py",
        "name=step.task, taken_at__isnull=True\n",
        "name=step.task\n",
        (EVENTS,),
    ),
    Mutant("take the newest event", "mailbox.py", 'untaken.order_by("id")', 'untaken.order_by("-id")', (EVENTS,)),
    Mutant(
        "wait although the event is there",
        "transitions/suspending.py",
        "    return sending.deliver(steps.open_event(execution, wait.step, wait.event, timeout=wait.timeout))\n",
        "    steps.open_event(execution, wait.step, wait.event, timeout=wait.timeout)\n    return False\n",
        (EVENTS,),
    ),
    # --- the sweeper
    Mutant(
        "lose executions of other processes",
        "transitions/recovering.py",
        "rows = rows.filter(lease_owner=owner) if owner else rows.filter",
        "rows = rows if owner else rows.filter",
        (TRANSITIONS,),
    ),
    Mutant(
        "lose executions whose lease holds",
        "transitions/recovering.py",
        "if owner else rows.filter(lease_expires_at__lt=clock.now())",
        "if owner else rows",
        (TRANSITIONS,),
    ),
    Mutant(
        "count no attempt for a dead worker",
        "transitions/recovering.py",
        '                attempt=F("attempt") + 1,\n',
        "",
        (TRANSITIONS,),
    ),
    Mutant(
        "let a body kill its workers for ever",
        "transitions/recovering.py",
        "            used_up = not execution.has_attempts_left\n",
        "            used_up = False\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "queue a dead run that is to be cancelled",
        "transitions/recovering.py",
        "            if execution.cancel_requested_at is not None:\n",
        "            if False:\n",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "time out before the deadline",
        "transitions/recovering.py",
        "status, only_overdue=True)",
        "status)",
        (TRANSITIONS, SWEEPER, OPERATORS),
    ),
    Mutant(
        "let a late child go on",
        "transitions/recovering.py",
        "                _cancel_late(step)\n",
        "                pass\n",
        (TRANSITIONS, SWEEPER),
    ),
    Mutant(
        "expire what has been started",
        "models/querysets.py",
        '        return overdue.filter(started_at__isnull=True).order_by("deadline_at")',
        '        return overdue.order_by("deadline_at")',
        (TRANSITIONS, SWEEPER),
    ),
    Mutant(
        "publish again at every sweep",
        "transitions/recovering.py",
        "dispatch_at=clock.after(pause * 2 ** min(dispatches, 5)), dispatches",
        "dispatches",
        (SWEEPER,),
    ),
    Mutant(
        "publish again after the same pause",
        "transitions/recovering.py",
        "pause * 2 ** min(dispatches, 5)",
        "pause",
        (SWEEPER,),
    ),
    Mutant(
        "take executions that another sweeper takes",
        "transitions/recovering.py",
        "            taken = list(locked(rows, skip=True).only(",
        "            taken = list(rows.only(",
        (SWEEPERS,),
    ),
    Mutant(
        "put back what has been queued anew",
        "transitions/recovering.py",
        "for execution in executions], status=ExecutionStatus.QUEUED, dispatches__gt=0\n",
        "for execution in executions], status=ExecutionStatus.QUEUED\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "tell Celery of an end twice",
        "transitions/announcing.py",
        "announce_at__isnull=False)\n        return bool",
        "pk__isnull=False)\n        return bool",
        (TRANSITIONS, OUTCOMES, SWEEPERS),
    ),
    # --- messages
    Mutant(
        "let one callback after the commit stop the others",
        "dispatch.py",
        "using=database(), robust=True)",
        "using=database())",
        (DISPATCH,),
    ),
    Mutant(
        "publish before the commit",
        "dispatch.py",
        "        transaction.on_commit(lambda: publish_all(executions), using=database(), robust=True)\n",
        "        publish_all(executions)\n",
        (DISPATCH,),
    ),
    # --- an operator's retry
    Mutant(
        "retry what has succeeded or is open",
        "transitions/reopening.py",
        "            if execution.status not in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):\n",
        "            if False:\n",
        (OPERATOR, TRANSITIONS),
    ),
    Mutant(
        "retry a child whose parent has seen the outcome",
        "transitions/reopening.py",
        "            if execution.parent_id is not None:\n",
        "            if False:\n",
        (OPERATOR, TRANSITIONS),
    ),
    Mutant(
        "reopen what has changed meanwhile",
        "transitions/reopening.py",
        "        .filter(pk=execution.pk, status=execution.status, fence=execution.fence)\n",
        "        .filter(pk=execution.pk)\n",
        (OPERATORS,),
    ),
    Mutant(
        "keep the cancellation of a child that is to go on",
        "transitions/reopening.py",
        'open_row.update(cancel_requested_at=None, cancel_reason="")',
        'open_row.update(cancel_reason="")',
        (OPERATOR, TRANSITIONS),
    ),
    # --- an operator's hurry
    Mutant(
        "wake what is to be cancelled",
        "transitions/hastening.py",
        "        due_at__gt=clock.now(),\n        cancel_requested_at__isnull=True,\n",
        "        due_at__gt=clock.now(),\n",
        (HASTENING,),
    ),
    Mutant(
        "wake what is due or running",
        "transitions/hastening.py",
        "        status=ExecutionStatus.QUEUED,\n        due_at__gt=clock.now(),\n",
        "        due_at__gt=clock.now(),\n",
        (HASTENING,),
    ),
    Mutant(
        "end the sleep of what has been cancelled meanwhile",
        "transitions/hastening.py",
        "            if Execution.objects.using(database()).filter(pk=execution_id).open().exists():\n",
        "            if True:\n",
        (HASTENING, "tests/races/test_hastening.py"),
    ),
    Mutant(
        "publish what is not due",
        "transitions/hastening.py",
        "filter(pk=execution_id).claimable()\n",
        "filter(pk=execution_id)\n",
        (HASTENING,),
    ),
    # --- repetition after a lost answer
    Mutant(
        "abandon a run whose decided gather was recorded",
        "transitions/suspending.py",
        "        if not isinstance(wait, AwaitEvent | Gather) and not (isinstance(wait, Map) and not wait.children):\n",
        "        if not isinstance(wait, AwaitEvent):\n",
        (COMMITS,),
    ),
    # --- hand-off
    Mutant(
        "hand off what goes to another queue",
        "hand_off.py",
        "if following.queue != ending.queue or following.priority is not None:",
        "if following.priority is not None:",
        (HAND_OFF,),
    ),
    Mutant(
        "hand off what has a priority",
        "hand_off.py",
        "if following.queue != ending.queue or following.priority is not None:",
        "if following.queue != ending.queue:",
        (HAND_OFF,),
    ),
    Mutant(
        "hand off a task with a rate limit",
        "hand_off.py",
        "task.rate_limit or task.time_limit",
        "task.time_limit",
        (HAND_OFF,),
    ),
    Mutant("hand off while the worker shuts down", "hand_off.py", " or not gate.is_open()", "", (HAND_OFF,)),
    Mutant(
        "leave a handed off claim without an answer to its lease",
        "executor.py",
        "offer.claimed or _claimed_unheard(offer.wanted, execution.lease_owner)",
        "offer.claimed",
        (HAND_OFF,),
    ),
    Mutant(
        "keep what was handed off and cannot be run",
        "durable_runs.py",
        "            _give_back(delivery)\n",
        "",
        (HAND_OFF,),
    ),
    Mutant(
        "let what a dead process had not begun lose an attempt",
        "worker.py",
        "if end.running is None or plain:",
        "if True:",
        (HAND_OFF,),
    ),
    Mutant(
        "blame the execution that was delivered for a death",
        "worker.py",
        "        if self.worker_pid is not None and self._is_running_in(int(self.worker_pid)):\n            news",
        "        if self.worker_pid is not None:\n            news",
        (HAND_OFF,),
    ),
    Mutant(
        "hand receivers of signals the run that they follow",
        "transitions/suspending.py",
        """                with claiming.handing_off(hand_off):
                    _open_child(execution, wait, StepKind.INVOKE)
""",
        """                claiming._hand_off.set(hand_off)
                _open_child(execution, wait, StepKind.INVOKE)
""",
        (HAND_OFF,),
    ),
    # --- statements that do several things at once
    Mutant(
        "claim at once what is not queued",
        STATEMENTS,
        " AND status || '' = 'queued' AND due_at",
        " AND due_at",
        (TRANSITIONS, HOLDERS),
        on_postgres=True,
    ),
    Mutant(
        "claim at once before it is due",
        STATEMENTS,
        " AND due_at <= {_NOW}\n        AND cancel",
        "\n        AND cancel",
        (TRANSITIONS, CONTEXT),
        on_postgres=True,
    ),
    Mutant(
        "claim at once what is to be cancelled",
        STATEMENTS,
        "        AND cancel_requested_at IS NULL\n        AND (deadline",
        "        AND (deadline",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "claim at once what has expired",
        STATEMENTS,
        "(deadline_at IS NULL OR deadline_at",
        "(TRUE OR deadline_at",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "claim at once by the name of another task",
        STATEMENTS,
        " AND task = COALESCE(%(task)s, task)",
        "",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "claim at once without a new fence",
        STATEMENTS,
        "fence = fence + 1, lease_owner",
        "lease_owner",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "forget at once when it was started first",
        STATEMENTS,
        "COALESCE(started_at, {_NOW})",
        "{_NOW}",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "write at once whatever the fence", STATEMENTS, " AND fence = %(fence)s", "", (TRANSITIONS,), on_postgres=True
    ),
    Mutant(
        "write at once whatever the status",
        STATEMENTS,
        "AND status || '' = 'running'\"",
        '"',
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "suspend at once what is to be cancelled",
        STATEMENTS,
        "{_HELD} AND cancel_requested_at IS NULL",
        "{_HELD}",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "settle at once what is settled",
        STATEMENTS,
        " AND is_open\n",
        "\n",
        (OUTCOMES, COMMITS, TRANSITIONS),
        on_postgres=True,
    ),
    Mutant(
        "wake at once before a map's last child",
        STATEMENTS,
        " WHERE status <> 'pending')",
        ")",
        (COMMITS,),
        on_postgres=True,
    ),
    Mutant(
        "count a map's children down at once to one too many",
        STATEMENTS,
        "CASE WHEN remaining <= 1 THEN 'succeeded'",
        "CASE WHEN remaining <= 0 THEN 'succeeded'",
        (COMMITS,),
        on_postgres=True,
    ),
    Mutant(
        "judge a step at once by how it stood before",
        STATEMENTS,
        " FOR NO KEY UPDATE OF {_STEPS}\n",
        "\n",
        (OPERATORS, FAN_IN),
        on_postgres=True,
    ),
    Mutant(
        "judge a parent at once by how it stood before",
        STATEMENTS,
        "        FOR NO KEY UPDATE\n    ), parent",
        "    ), parent",
        (WAKE_UPS,),
        on_postgres=True,
    ),
    Mutant(
        "wake at once only a parent that waits",
        STATEMENTS,
        " WHERE id = found_id\n",
        " WHERE id = found_id AND was_waiting\n",
        (WAKE_UPS,),
        on_postgres=True,
    ),
    Mutant(
        "leave the old run's lease to a parent that is woken at once",
        STATEMENTS,
        " WHEN was_waiting THEN NULL ELSE lease_expires_at",
        " ELSE lease_expires_at",
        (WAKE_UPS,),
        on_postgres=True,
    ),
    Mutant(
        "settle a started child's step at once",
        STATEMENTS,
        " AND kind = '{kind.value}'",
        "",
        (COMMITS, PARALLEL),
        on_postgres=True,
    ),
    Mutant(
        "claim at once a parent that is to be cancelled",
        STATEMENTS,
        " AND cancel_requested_at IS NULL AND %(is_claimed)s",
        " AND %(is_claimed)s",
        (COMMITS,),
        on_postgres=True,
    ),
    Mutant(
        "claim at once a parent that this process may not run",
        STATEMENTS,
        " AND %(is_claimed)s::boolean AS",
        " AS",
        (COMMITS,),
        on_postgres=True,
    ),
    Mutant(
        "claim a parent at once without a new fence",
        STATEMENTS,
        "            fence = fence + is_claimed::integer,\n",
        "",
        (COMMITS,),
        on_postgres=True,
    ),
    Mutant(
        "let a loser suspend at once",
        "transitions/suspending.py",
        """    if not suspended:
        raise guards.refusal(execution)
    guards.send_signal(signals.execution_created, child)
""",
        "    guards.send_signal(signals.execution_created, child)\n",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "let a loser record at once",
        "transitions/running.py",
        "            if cancelled is None:\n                raise guards.lease_lost(execution)\n",
        "",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "end at once a child whose end lets a sibling go",
        "transitions/running.py",
        """    if execution.position is not None and execution.get_options().get("throttled"):
        return False  # its end lets a sibling go
""",
        "",
        (COMMITS, PARALLEL),
        on_postgres=True,
    ),
    Mutant(
        "forget a parent that was woken at once",
        "transitions/running.py",
        "        claiming.pass_on(ended.queued, hand_off)\n",
        "        pass\n",
        (COMMITS,),
        on_postgres=True,
    ),
    Mutant(
        "believe at once a parent that another run has had meanwhile",
        STATEMENTS,
        "fence = %(known)s::bigint AS was_known",
        "TRUE AS was_known",
        (COMMITS, HAND_OFF),
        on_postgres=True,
    ),
    Mutant(
        "keep the old fence of a parent that is known here, at once",
        STATEMENTS,
        '_CHANGED = ("id", "status", "fence", "due_at")',
        '_CHANGED = ("id", "status", "due_at")',
        (COMMITS, HAND_OFF),
        on_postgres=True,
    ),
    Mutant(
        "publish at once what another sweeper has just taken",
        STATEMENTS,
        "        FOR NO KEY UPDATE SKIP LOCKED\n    ), taken",
        "    ), taken",
        (SWEEPERS,),
        on_postgres=True,
    ),
    Mutant(
        "publish at once what is not due",
        STATEMENTS,
        "WHERE status = 'queued' AND dispatch_at <= {_NOW}\n",
        "WHERE status = 'queued'\n",
        (TRANSITIONS, SWEEPER, DISPATCH),
        on_postgres=True,
    ),
    Mutant(
        "publish at once from every queue",
        STATEMENTS,
        "            AND (%(queues)s::text[] IS NULL OR queue = ANY(%(queues)s::text[]))\n",
        "            AND (%(queues)s::text[] IS NULL OR TRUE)\n",
        (TRANSITIONS, SWEEPER, DISPATCH),
        on_postgres=True,
    ),
    Mutant(
        "publish at once as often as one likes",
        STATEMENTS,
        "%(pause)s::interval * 2 ^ LEAST(dispatches, 5)",
        "%(pause)s::interval",
        (TRANSITIONS, SWEEPER, DISPATCH),
        on_postgres=True,
    ),
    Mutant(
        "publish at once the youngest first",
        STATEMENTS,
        "        ORDER BY dispatch_at\n        LIMIT",
        "        ORDER BY dispatch_at DESC\n        LIMIT",
        (TRANSITIONS, SWEEPER, DISPATCH),
        on_postgres=True,
    ),
    Mutant(
        "tell at once of the next publication instead of this one",
        STATEMENTS,
        '"dispatches": "was_dispatches",',
        '"dispatches": "dispatches",',
        (TRANSITIONS, SWEEPER, DISPATCH),
        on_postgres=True,
    ),
    Mutant(
        "publish at once a plain task's message without its arguments",
        STATEMENTS,
        """CASE WHEN options LIKE '%%"plain"%%' THEN payload ELSE '' END""",
        "''",
        (PLAIN,),
        on_postgres=True,
    ),
    Mutant(
        "let a loser wait at once for a map",
        "transitions/suspending.py",
        """    if not suspended:
        raise guards.refusal(execution)
    dispatch.on_commit(*children[:in_flight])
""",
        "    dispatch.on_commit(*children[:in_flight])\n",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "queue at once the children that a map holds back",
        STATEMENTS,
        "0, '', CASE WHEN number <= %(in_flight)s::bigint THEN {_NOW} END,",
        "0, '', {_NOW},",
        (PARALLEL,),
        on_postgres=True,
    ),
    Mutant(
        "number a map's children at once from 1",
        STATEMENTS,
        "number - 1, 0,",
        "number, 0,",
        (PARALLEL,),
        on_postgres=True,
    ),
    Mutant(
        "take at once all children of a map for lost at the same time",
        STATEMENTS,
        "LEAST({_NOW} + dispatch_in * INTERVAL '1 second',",
        "LEAST({_NOW} + INTERVAL '30 seconds',",
        (PARALLEL, TRANSITIONS),
        on_postgres=True,
    ),
    Mutant(
        "forget at once the timeout of a map",
        STATEMENTS,
        "            STATEMENT_TIMESTAMP() + %(deadline)s::interval, %(attempt)s::integer, %(fence)s::bigint, {_NOW}\n"
        "        FROM parent\n    )\n    SELECT {_NOW} FROM parent",
        "            NULL, %(attempt)s::integer, %(fence)s::bigint, {_NOW}\n"
        "        FROM parent\n    )\n    SELECT {_NOW} FROM parent",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "publish at once the children that a map holds back",
        "transitions/suspending.py",
        """        raise guards.refusal(execution)
    dispatch.on_commit(*children[:in_flight])
""",
        """        raise guards.refusal(execution)
    dispatch.on_commit(*children)
""",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "bring with a claim the steps of another order",
        STATEMENTS,
        " ORDER BY step_id) FILTER",
        " ORDER BY name) FILTER",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "bring with a claim no children",
        STATEMENTS,
        "AS child ON child.id = {_STEPS}.child_id",
        "AS child ON FALSE",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "bring with a claim everybody's steps",
        STATEMENTS,
        "WHERE {_STEPS}.execution_id = claimed.id",
        "WHERE TRUE",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    # --- what a crash of the database may undo
    Mutant(
        "hold at once whoever the owner is",
        STATEMENTS,
        " AND lease_owner = %(holder)s",
        "",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "hold whoever the owner is",
        "models/querysets.py",
        " lease_owner=run.lease_owner,",
        "",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "renew whoever the owner is",
        "leases.py",
        ", lease_owner=lease.execution.lease_owner)",
        ")",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "forget the claim of a last attempt",
        STATEMENTS,
        " AND (max_attempts IS NULL OR attempt < max_attempts)",
        "",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "forget a claim that may come too late",
        STATEMENTS,
        "deadline_at IS NULL AND (max",
        "(max",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "let a claim inside of a transaction be forgotten, and what else is in that",
        STATEMENTS,
        "is_alone=is_transaction(database())",
        "is_alone=True",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "let a suspension inside of a transaction be forgotten, and what else is in that",
        "transitions/suspending.py",
        "is_alone=is_transaction(database())",
        "is_alone=True",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "let an announcement inside of a transaction be forgotten, and what else is in that",
        "announcements.py",
        "is_alone = is_transaction(database())",
        "is_alone = True",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "note at once whatever was noted",
        STATEMENTS,
        "WHERE id = %(id)s::uuid AND announce_at IS NOT NULL",
        "WHERE id = %(id)s::uuid",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "forget the suspension of a last attempt",
        STATEMENTS,
        " and execution.has_attempts_left",
        "",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "forget the claim of a child's last attempt",
        STATEMENTS,
        " and child.has_attempts_left",
        "",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "forget a suspension that others go on with",
        STATEMENTS,
        "may_be_lost=is_alone and is_claimed and ",
        "may_be_lost=is_alone and ",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "wait for the disk at each claim",
        STATEMENTS,
        "CASE WHEN {condition} THEN",
        "CASE WHEN FALSE THEN",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "give two runs in one process the same fence",
        "executor.py",
        "if execution is not None and keeper.holds(execution_id, execution.fence):",
        "if False:",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "leave a parent whose suspension was forgotten to its lease",
        "executor.py",
        "            on_loss()\n",
        "",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "resume only the innermost of several parents whose suspensions were forgotten",
        "executor.py",
        "    for parent in reversed(parents):",
        "    for parent in parents[-1:]:",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "leave a parent to its lease while its lost child's body goes on",
        "leases.py",
        "        if is_news:\n            lease.on_loss()\n",
        "",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "take another run's result for one's own",
        "transitions/running.py",
        "status=ExecutionStatus.SUCCEEDED, result=result)",
        "status=ExecutionStatus.SUCCEEDED)",
        (AMNESIA,),
        on_postgres=True,
    ),
]

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
REMEMBERED = "tests/integration/test_remembered.py"
POSTPONING = "tests/integration/test_postponing.py"
HAND_OFF = "tests/integration/test_hand_off.py"
ENDINGS = "tests/integration/test_endings.py"
FORKS = "tests/integration/test_forks.py"
LOST_CONNECTIONS = "tests/integration/test_lost_connections.py"
OWNERS = "tests/unit/test_owners.py"
SOFT_LIMITS = "tests/unit/test_soft_limits.py"
INTERRUPTED = "tests/integration/test_interrupted_statements.py"
FAN_IN = "tests/races/test_fan_in.py"
RACING_EVENTS = "tests/races/test_events.py"
HOLDERS = "tests/races/test_holders.py"
LOCKED_ROWS = "tests/races/test_locked_rows.py"
OPERATORS = "tests/races/test_operators.py"
OUTCOMES = "tests/races/test_outcomes.py"
SWEEPERS = "tests/races/test_sweepers.py"
WAKE_UPS = "tests/races/test_wake_ups.py"
HASTENING = "tests/integration/test_hastening.py"
PLAIN = "tests/integration/test_plain.py"
AMNESIA = "tests/acceptance/test_database_amnesia.py"
SECRETS = "tests/integration/admin/test_secrets.py"
NARROWED = "tests/integration/admin/test_narrowed.py"
THREATS = "tests/security/test_threats.py"
EAGER = "tests/integration/test_eager.py"
CALLS = "tests/integration/test_calls.py"
WAITING = "tests/integration/test_waiting.py"
HEADERS = "tests/integration/test_headers.py"
SIGNALS = "tests/integration/test_celery_signals.py"
ANNOUNCEMENTS = "tests/integration/test_announcements.py"

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
        "models/execution.py",
        "            status=ExecutionStatus.QUEUED,\n            cancel_requested_at__isnull=True,\n",
        "            cancel_requested_at__isnull=True,\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "claim before it is due",
        "models/execution.py",
        "            return ready.filter(due_at__lte=clock.now())\n",
        "            return ready\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "claim what is to be cancelled",
        "models/execution.py",
        "            status=ExecutionStatus.QUEUED,\n            cancel_requested_at__isnull=True,\n",
        "            status=ExecutionStatus.QUEUED,\n",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "claim what has expired",
        "models/execution.py",
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
        "engine/claims.py",
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
        "models/execution.py",
        "filter(due_at__isnull=False, attempt=attempt)",
        "filter(due_at__isnull=False)",
        ("tests/integration/test_plain.py",),
    ),
    # --- the fence
    Mutant(
        "hold with any fence",
        "models/execution.py",
        "self.filter(pk=run.pk, fence=run.fence, lease_owner",
        "self.filter(pk=run.pk, lease_owner",
        (TRANSITIONS,),
    ),
    Mutant(
        "hold in any status",
        "models/execution.py",
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
        "transitions/leases.py",
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
    # --- what is remembered
    Mutant(
        "remember no error of an atomic step",
        "body/context.py",
        "                self._unrecorded = (step, done.error)\n",
        "",
        (REMEMBERED,),
    ),
    Mutant(
        "let a body catch an error of ours",
        "body/run.py",
        "            self._ending = EndAttempt(error)\n            raise self._ending from None\n",
        "            raise\n",
        (REMEMBERED,),
    ),
    Mutant(
        "let a body swallow an error of ours",
        "engine/executor.py",
        "        error = context.ending\n",
        "        pass\n",
        (REMEMBERED,),
    ),
    Mutant(
        "run no atomic step again that was undone",
        "transitions/running.py",
        "        elif errors.is_undone(error) or (attempt.has_acted and errors.is_conflict(error)):\n",
        "        elif attempt.has_acted and errors.is_conflict(error):\n",
        (REMEMBERED,),
        on_postgres=True,
    ),
    Mutant(
        "run an atomic step again that is done",
        "transitions/running.py",
        "        if attempt.has_acted and (recorded :=",
        "        if not attempt.has_acted and (recorded :=",
        (REMEMBERED,),
    ),
    Mutant(
        "run an atomic step again for another database",
        "transitions/running.py",
        "        if connection.in_atomic_block or not attempt.is_of_ours:\n",
        "        if connection.in_atomic_block:\n",
        (REMEMBERED,),
    ),
    Mutant(
        "run an atomic step again that is to be cancelled",
        "transitions/running.py",
        "            transactions.pause_after_conflict(conflicts)\n        check_held(execution)\n",
        "            transactions.pause_after_conflict(conflicts)\n",
        (REMEMBERED,),
        on_postgres=True,
    ),
    Mutant(
        "replay a result that is gone as None",
        "values/payloads.py",
        "    if not text:\n        raise lost()\n",
        "    if not text:\n        return None\n",
        (REMEMBERED,),
    ),
    Mutant(
        "replay an error that is gone as another one",
        "transitions/steps.py",
        '        if self.error is None and self.status == StepStatus.FAILED:\n            raise self.lost("error")\n',
        "",
        (REMEMBERED,),
    ),
    Mutant(
        "call a body with arguments that it does not take",
        "engine/misfits.py",
        'misfit = "" if arguments is None else task.misfit(*arguments)',
        'misfit = ""',
        (POSTPONING,),
    ),
    Mutant(
        "let a base class make an error of arguments that the body does not take",
        "host/durable_runs.py",
        '                misfits.put_off_misfit(started, is_eager=request["is_eager"])\n',
        "                pass\n",
        (POSTPONING,),
    ),
    Mutant(
        "put off for ever",
        "transitions/postponing.py",
        "    if is_limited and (now - since).total_seconds() >= MAX_SECONDS:\n        return None, 0.0\n",
        "",
        (POSTPONING,),
    ),
    Mutant(
        "put off what another message's task names",
        "transitions/postponing.py",
        "filter(pk=execution_id, task=task).claimable()",
        "filter(pk=execution_id).claimable()",
        (POSTPONING,),
    ),
    Mutant(
        "put off what is not due or not queued",
        "transitions/postponing.py",
        "filter(pk=execution_id, task=task).claimable()",
        "filter(pk=execution_id, task=task)",
        (POSTPONING,),
    ),
    Mutant(
        "put off what is to be cancelled",
        "transitions/postponing.py",
        "                cancel_requested=False,\n",
        "",
        (POSTPONING,),
    ),
    Mutant(
        "let Celery record a failure of an unknown task",
        "host/unknown_tasks.py",
        "        if dispatch.HEADER not in headers:\n            return original(self, body, message, exc)\n",
        "        return original(self, body, message, exc)\n",
        (POSTPONING,),
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
        "status=ExecutionStatus.QUEUED,\n                cancel_requested=False,\n",
        "status=ExecutionStatus.QUEUED,\n",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "let what is to be cancelled succeed",
        "transitions/running.py",
        "                cancel_requested=False,\n                # A late",
        "                # A late",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "refuse the success of a late child",
        "transitions/running.py",
        "                is_late=True,\n",
        "",
        (TRANSITIONS,),
    ),
    Mutant(
        "let what is to be cancelled fail",
        "transitions/failing.py",
        "(execution, cancel_requested=False, **failed",
        "(execution, **failed",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "leave the wait of a cancelled execution to its deadline",
        "transitions/cancelling.py",
        "            steps.end_waits(execution_id, _cancel_error(flagged))\n",
        "",
        (CANCEL,),
    ),
    Mutant(
        "let a retry skip the sleep that a cancel has ended",
        "transitions/reopening.py",
        "            steps.resume_sleep(step)\n            waits = True\n",
        "            pass\n",
        (CANCEL,),
    ),
    Mutant(
        "let a retry overlook the wait that a cancel has ended",
        "transitions/reopening.py",
        "        or (step.status == StepStatus.CANCELLED and",
        "        or (False and",
        (CANCEL,),
    ),
    Mutant(
        "forget what a cancelled body returned",
        "transitions/cancelling.py",
        "running=True), **kept)",
        "running=True))",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "run again what has returned and whose cancellation was withdrawn",
        "transitions/cancelling.py",
        "        if result is None:\n            running.release",
        "        if True:\n            running.release",
        (OPERATORS,),
    ),
    Mutant(
        "let a late child's success stand against who cancels it",
        "transitions/cancelling.py",
        "        .filter(pk=execution_id)\n        .open()\n        .unasked()\n",
        "        .filter(pk=execution_id, cancel_requested_at__isnull=True)\n        .open()\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "run a body again that has returned",
        "transitions/reopening.py",
        "    if execution.has_kept_result:\n",
        "    if False:\n",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "wait for a child whose result is adopted",
        "transitions/reopening.py",
        "    if child.status == ExecutionStatus.SUCCEEDED or not (yield _let_go_on(child)):\n",
        "    if child.status == ExecutionStatus.SUCCEEDED or (yield _let_go_on(child)) is None:\n",
        (TRANSITIONS, CANCEL),
    ),
    Mutant(
        "wait for the children of a map whose results are adopted",
        "transitions/reopening.py",
        "    undone = [child for child in without_success if not child.has_kept_result]\n",
        "    undone = without_success\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "begin a step while the worker shuts down",
        "body/context.py",
        "            self._give_way()\n            self._ask_unless",
        "            self._ask_unless",
        (CONTEXT,),
    ),
    Mutant(
        "begin a step without a look at the database",
        "body/context.py",
        "            self._ask_unless_asked_within(STEP_FRESH_SECONDS)\n",
        "",
        (CONTEXT,),
    ),
    Mutant(
        "start a child while the worker shuts down",
        "body/context.py",
        "            wait = remembered\n            self._give_way()\n",
        "            wait = remembered\n",
        (CONTEXT,),
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
        "    if running.lock_held(execution):\n        raise CancelExecution\n    step = steps",
        "    running.lock_held(execution)\n    step = steps",
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
        "models/execution.py",
        "            cancel_requested_at__isnull=False, status__in=[ExecutionStatus.QUEUED, ExecutionStatus.WAITING]\n",
        "            cancel_requested_at__isnull=False\n",
        (TRANSITIONS,),
    ),
    Mutant(
        "flag what has ended",
        "transitions/cancelling.py",
        "        .open()\n        .unasked()\n        .update(cancel_requested_at=clock.now()",
        "        .unasked()\n        .update(cancel_requested_at=clock.now()",
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
    # --- rows that somebody has locked
    Mutant(
        "wait for a locked row in the background",
        "store/transactions.py",
        "            if limit is not None and (\n",
        "            if limit is not None and False and (\n",
        (LOCKED_ROWS,),
    ),
    Mutant(
        "decide together whatever becomes of the child",
        "transitions/recovering.py",
        " or step.child_id in children]\n",
        " or step.child_id]\n",
        (LOCKED_ROWS,),
    ),
    Mutant(
        "decide together although the execution is locked",
        "transitions/recovering.py",
        "if step.execution_id in free and step.pk in pending]",
        "if step.pk in pending]",
        (LOCKED_ROWS,),
    ),
    Mutant(
        "take a lease away as soon as its row is not locked any more",
        "engine/findings.py",
        "        if time.monotonic() - left.free_since < conductor_settings().HEARTBEAT_SECONDS:\n",
        "        if time.monotonic() - left.free_since < 0:\n",
        (LOCKED_ROWS,),
    ),
    Mutant(
        "take a lease for lost whose row is locked",
        "transitions/leases.py",
        "for pk, fence, flag in held.values_list(*columns)} if passed_over else {}\n",
        "for pk, fence, flag in held.none().values_list(*columns)}\n",
        (HOLDERS, LOCKED_ROWS),
    ),
    # --- waking
    Mutant(
        "wake with a condition on the status",
        "transitions/waking.py",
        "    _wake(Execution.objects.using(database()).filter(pk=execution_id), root_id)\n",
        "    _wake(\n"
        "        Execution.objects.using(database()).filter(pk=execution_id, status=ExecutionStatus.WAITING), root_id\n"
        "    )\n",
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
        "transitions/steps.py",
        "of(execution_id, name).filter(status=StepStatus.PENDING)\n    if only_overdue",
        "of(execution_id, name)\n    if only_overdue",
        (TRANSITIONS, OUTCOMES),
    ),
    Mutant(
        "count a decided map down",
        "transitions/steps.py",
        '        counted.filter(status=StepStatus.PENDING), ("execution_id"',
        '        counted, ("execution_id"',
        (PARALLEL,),
    ),
    Mutant("decide a map too late", "transitions/steps.py", "Q(remaining__lte=1)", "Q(remaining__lte=0)", (PARALLEL,)),
    Mutant("decide a map too early", "transitions/steps.py", "Q(remaining__lte=1)", "Q(remaining__lte=2)", (PARALLEL,)),
    Mutant(
        "wait for all although one has failed",
        "transitions/steps.py",
        "        decisions.insert(0, When(fails_fast=True, then=Value(status.value)))\n"
        "        is_last |= Q(fails_fast=True)\n",
        "        pass\n",
        (PARALLEL,),
    ),
    Mutant(
        "fail a map that asked for exceptions",
        "transitions/steps.py",
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
        "engine/findings.py",
        " for step in steps.in_vain(conductor_settings().SWEEP_BATCH, root_id=root_id)]\n",
        " for step in ()]\n",
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
        "transitions/mailbox.py",
        "name=step.task, taken_at__isnull=True\n",
        "name=step.task\n",
        (EVENTS,),
    ),
    Mutant(
        "take the newest event",
        "transitions/mailbox.py",
        'untaken.order_by("id")',
        'untaken.order_by("-id")',
        (EVENTS,),
    ),
    Mutant(
        "wait although the event is there",
        "transitions/suspending.py",
        "    if sending.deliver(step):\n        return True\n    if wait.timeout != 0:",
        "    if wait.timeout != 0:",
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
        "models/execution.py",
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
        "return bool(ended.filter(announce_at__isnull=False).update",
        "return bool(ended.update",
        (TRANSITIONS, OUTCOMES, SWEEPERS),
    ),
    # --- messages
    Mutant(
        "let one callback after the commit stop the others",
        "transitions/dispatch.py",
        "using=database(), robust=True)",
        "using=database())",
        (DISPATCH,),
    ),
    Mutant(
        "publish before the commit",
        "transitions/dispatch.py",
        "        transaction.on_commit(lambda: publish_all(told), using=database(), robust=True)\n",
        "        publish_all(told)\n",
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
        ".filter(pk=execution.pk, status=execution.status, fence=execution.fence)\n",
        ".filter(pk=execution.pk)\n",
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
        "engine/hand_off.py",
        "if following.queue != ending.queue or following.priority is not None:",
        "if following.priority is not None:",
        (HAND_OFF,),
    ),
    Mutant(
        "hand off what has a priority",
        "engine/hand_off.py",
        "if following.queue != ending.queue or following.priority is not None:",
        "if following.queue != ending.queue:",
        (HAND_OFF,),
    ),
    Mutant(
        "hand off a task with a rate limit",
        "engine/hand_off.py",
        "task.rate_limit or task.time_limit",
        "task.time_limit",
        (HAND_OFF,),
    ),
    Mutant("hand off while the worker shuts down", "engine/hand_off.py", " or not gate.is_open()", "", (HAND_OFF,)),
    Mutant(
        "leave a handed off claim without an answer to its lease",
        "engine/claims.py",
        "offer.claimed or _claimed_unheard(offer.wanted, execution.lease_owner)",
        "offer.claimed",
        (HAND_OFF,),
    ),
    Mutant(
        "keep what was handed off and cannot be run",
        "host/durable_runs.py",
        "            _give_back(delivery)\n",
        "",
        (HAND_OFF,),
    ),
    Mutant(
        "let what a dead process had not begun lose an attempt",
        "host/sweeper_thread.py",
        "if end.running is None or plain:",
        "if True:",
        (HAND_OFF,),
    ),
    Mutant(
        "blame the execution that was delivered for a death",
        "host/request.py",
        "if pid is not None and self._is_running_in(int(pid)):",
        "if pid is not None:",
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
        "write at once whatever the fence",
        STATEMENTS,
        "AND fence = %(fence)s AND lease_owner",
        "AND lease_owner",
        (TRANSITIONS,),
        on_postgres=True,
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
        "{_HELD} AND cancel_requested_at IS NULL\n        RETURNING id",
        "{_HELD}\n        RETURNING id",
        (TRANSITIONS,),
        on_postgres=True,
    ),
    Mutant(
        "succeed at once although it is to be cancelled",
        STATEMENTS,
        '{_HELD} AND cancel_requested_at IS NULL\n"""',
        '{_HELD}\n"""',
        (TRANSITIONS, OUTCOMES),
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
        "models/execution.py",
        " lease_owner=run.lease_owner,",
        "",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "renew whoever the owner is",
        "transitions/leases.py",
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
        "a message says whether a plain child's result is kept",
        "host/plain_runs.py",
        'execution.get_options().get("ignore_result", task.ignore_result)',
        'request["ignore_result"]',
        (PLAIN,),
    ),
    Mutant(
        "an error callback's own arguments are taken for the failure's",
        "engine/callbacks.py",
        "    if not errback.immutable and (errback.args or errback.kwargs):",
        "    if False:",
        ("tests/acceptance/test_canvas.py",),
    ),
    Mutant(
        "an error callback that raises keeps the others from being called",
        "engine/callbacks.py",
        """        except Exception:
            logger.exception("Error callback %s of %s raised an exception.", errback.task, request.id)
""",
        """        except Exception:
            raise
""",
        ("tests/acceptance/test_canvas.py",),
    ),
    Mutant(
        "let an announcement inside of a transaction be forgotten, and what else is in that",
        "engine/announcements.py",
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
        "engine/claims.py",
        "if execution is not None and keeper.holds(execution_id, execution.fence):",
        "if False:",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "leave a parent whose suspension was forgotten to its lease",
        "engine/endings.py",
        "        started.lease.on_loss()\n",
        "",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "resume only the innermost of several parents whose suspensions were forgotten",
        "engine/claims.py",
        "    for parent in reversed(parents):",
        "    for parent in parents[-1:]:",
        (AMNESIA,),
        on_postgres=True,
    ),
    Mutant(
        "leave a parent to its lease while its lost child's body goes on",
        "transitions/leases.py",
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
    Mutant(
        "take an error of an atomic step's COMMIT for one of its function",
        "transitions/running.py",
        "                self.is_of_ours = True\n",
        "                pass\n",
        (REMEMBERED,),
        on_postgres=True,
    ),
    Mutant(
        "leave open what a body has left open",
        "engine/executor.py",
        "    found = context._left_open(error)\n",
        "    found: list[str] = []\n",
        (ENDINGS,),
    ),
    Mutant(
        "go on with a connection that the soft time limit has struck in the middle of a statement",
        "store/soft_limits.py",
        "                interrupted.close_interrupted(frame)\n",
        "                pass\n",
        (INTERRUPTED,),
        on_postgres=True,
    ),
    Mutant(
        "lose a soft time limit that comes in a finalizer",
        "store/soft_limits.py",
        "        if _is_in_finalizer(frame):\n",
        "        if False:\n",
        (SOFT_LIMITS,),
    ),
    Mutant(
        "claim on a connection that the task before has left open",
        "host/durable_runs.py",
        '            left_open.clear(f"{task.name}[{task_id}]")\n',
        "",
        (ENDINGS,),
    ),
    Mutant(
        "record a step whose function has left a transaction open",
        "body/context.py",
        "        self._must_be_closed(self._watch.added(), call)\n",
        "",
        (ENDINGS,),
    ),
    Mutant(
        "leave a run to its lease that has not come as far as its body",
        "host/durable_runs.py",
        "        return outcome if started.is_over else _settle(started, outcome)\n",
        "        return outcome\n",
        (ENDINGS,),
    ),
    Mutant(
        "let a body begin inside of a transaction that its base class has opened",
        "engine/executor.py",
        "    if found := started.watch.added():\n",
        "    if found := []:\n",
        (ENDINGS,),
    ),
    Mutant(
        "store how a run has ended inside of a transaction that a hook has left open",
        "host/durable_runs.py",
        "    error = outcome.info.retval if outcome.info else None\n    started.watch.clean()\n",
        "    error = outcome.info.retval if outcome.info else None\n",
        (ENDINGS,),
    ),
    Mutant(
        "end a body that has caught a step's failure before that is remembered",
        "body/run.py",
        "        self.flush()\n        self._lease_must_hold()\n\n    def _must",
        "        self._lease_must_hold()\n        self.flush()\n\n    def _must",
        (REMEMBERED,),
    ),
    Mutant(
        "take what is to end a process for a step's outcome",
        "values/failures.py",
        "not issubclass(cls, (SystemExit, KeyboardInterrupt, GeneratorExit, ControlFlow))",
        "True",
        (REMEMBERED,),
    ),
    Mutant(
        "let a checkpoint end a body that has caught a step's failure before that is remembered",
        "body/context.py",
        "        self.flush()\n        self._lease_must_hold()\n        self._give_way()",
        "        self._lease_must_hold()\n        self._give_way()",
        (REMEMBERED,),
    ),
    Mutant(
        "leave a run to its lease whose last write has failed",
        "engine/endings.py",
        '            report(started.execution, "could not end as it was to", error)\n',
        "            raise\n",
        (ENDINGS,),
    ),
    Mutant(
        "fail a body that a shutdown ends",
        "engine/draining.py",
        "    return is_draining() or isinstance(error, (WorkerShutdown, WorkerTerminate))\n",
        "    return False\n",
        (ENDINGS,),
    ),
    Mutant(
        "believe a message's headers",
        "host/durable_runs.py",
        "lambda: request_of(execution, request, task_id)",
        "lambda: request",
        (ENDINGS,),
    ),
    Mutant(
        "repeat a run for ever that changes nothing",
        "host/inline.py",
        "    if row.exists():\n",
        "    if False:\n",
        (ENDINGS,),
    ),
    Mutant(
        "let a subclass of the admin open a private column",
        "admin/rows.py",
        "        if access.is_private(self.model, lookup) and (request is None or not may_see_payloads(request)):\n"
        "            return False\n",
        "",
        (SECRETS,),
    ),
    Mutant(
        "look only at the first part of a lookup",
        "admin/access.py",
        "        model = field.related_model\n    return False",
        "        return False\n    return False",
        (SECRETS,),
    ),
    Mutant(
        "take lookups of a filter's column that the filter does not know",
        "admin/changelist.py",
        'raise DisallowedModelAdminLookup(f"Filtering by {name} not allowed")',
        "pass",
        (SECRETS,),
    ),
    Mutant(
        "tell messages to who may not see them",
        "telling/withholding.py",
        'row.error = dump_failure(Failure(type=load_failure(row.error).type, message=""))',
        "pass",
        (SECRETS,),
    ),
    Mutant(
        "group failures by messages for who may not see them",
        "admin/figures.py",
        "causes.groups(sight.failures, with_messages=sight.with_messages)",
        "causes.groups(sight.failures)",
        (SECRETS,),
    ),
    Mutant(
        "share the overview with who sees other rows",
        "admin/figures.py",
        "repr([self.with_messages, _as_text(self.executions), _as_text(self.failures)])",
        "repr([self.with_messages])",
        (NARROWED,),
    ),
    Mutant(
        "share the overview with who may not see messages",
        "admin/figures.py",
        "repr([self.with_messages, _as_text(self.executions), _as_text(self.failures)])",
        "repr([_as_text(self.executions), _as_text(self.failures)])",
        (SECRETS,),
    ),
    Mutant(
        "narrow executions alone",
        "admin/rows.py",
        'return rows if seen is None else rows.filter(execution__in=seen.values("pk"))',
        "return rows",
        (NARROWED,),
    ),
    Mutant(
        "link to executions that are not shown",
        "admin/access.py",
        "                setattr(row, name, None)",
        "                pass",
        (NARROWED,),
    ),
    Mutant(
        "draw a tree with executions that are not shown",
        "telling/withholding.py",
        "    return {key: row for key, row in tree.items() if key in found}",
        "    return dict(tree)",
        (NARROWED,),
    ),
    Mutant(
        "import any module that a row names",
        "tasks/own.py",
        'any(f"{module_name}.".startswith(f"{config.name}.") for config in apps.get_app_configs())',
        "module_name",
        (THREATS,),
    ),
    Mutant(
        "sweep everybody's on behalf of one tree",
        "host/inline.py",
        "sweeper.sweep(reclaim=False, publish=False, root_id=root_id)",
        "sweeper.sweep(reclaim=False, publish=False)",
        (EAGER,),
    ),
    Mutant(
        "decide other trees' steps in an eager run",
        "engine/turns.py",
        "overdue = steps.overdue(limit, known, root_id)",
        "overdue = steps.overdue(limit, known)",
        (EAGER,),
    ),
    Mutant(
        "expire other trees' executions in an eager run",
        "engine/sweeper.py",
        "findings.ids(executions.expired(), known)",
        "findings.ids(_of(None).expired(), known)",
        (EAGER,),
    ),
    Mutant(
        "cancel other trees' flagged executions in an eager run",
        "engine/sweeper.py",
        "findings.ids(executions.to_cancel(), known)",
        "findings.ids(_of(None).to_cancel(), known)",
        (EAGER,),
    ),
    Mutant(
        "tell Celery of other trees in an eager run",
        "engine/findings.py",
        "take_for_announcement(limit, root_id)",
        "take_for_announcement(limit)",
        (EAGER,),
    ),
    Mutant(
        "lease by a clock that skips",
        "transitions/claiming.py",
        "LEASE_SECONDS, skipping=False)",
        "LEASE_SECONDS)",
        (EAGER,),
    ),
    Mutant(
        "lease by a clock that skips, in one statement",
        STATEMENTS,
        "LEASE_SECONDS, skipping=False)",
        "LEASE_SECONDS)",
        (EAGER,),
        on_postgres=True,
    ),
    Mutant(
        "give what an eager body starts the time that its tree has skipped",
        "store/eager.py",
        "tree is None or _is_outside.get() else tree.skipped",
        "tree is None else tree.skipped",
        (EAGER,),
    ),
    Mutant(
        "publish nothing of what an eager body starts",
        "store/eager.py",
        "tree is not None and (not _is_outside.get() or root_id == tree.root_id)",
        "tree is not None",
        (EAGER,),
    ),
    Mutant(
        "apply inside a body that a worker runs",
        "tasks/task.py",
        "running.task is not None and running.task.request.is_eager)",
        "running.task is not None)",
        (EAGER,),
    ),
    Mutant(
        "drain a database of others",
        "testing/driving.py",
        "    if not any_database:\n",
        "    if False:\n",
        (EAGER,),
    ),
    Mutant(
        "take another call of one id for a repetition",
        "engine/calls.py",
        "    return execution.task == task and caller.name in known and not is_too_old",
        "    return True",
        (CALLS,),
    ),
    Mutant(
        "take a repetition for another call of one id",
        "engine/calls.py",
        "    return execution.task == task and caller.name in known and not is_too_old",
        "    return False",
        (CALLS,),
    ),
    Mutant(
        "take a frozen id literally",
        "engine/calls.py",
        "return nobody() if is_frozen else None",
        "return None",
        (CALLS,),
    ),
    Mutant(
        "take every id for a canvas's",
        "engine/calls.py",
        "return nobody() if is_frozen else None",
        "return nobody()",
        (CALLS,),
    ),
    Mutant(
        "know a message of others by its id alone",
        "engine/calls.py",
        "    if parent_id is None or _is_of(known, task, caller):",
        "    if True:",
        (CALLS,),
    ),
    Mutant(
        "fail a callback under the id of another call",
        "engine/announcements.py",
        "if task_id and not self._is_known(task_id)]",
        "if task_id]",
        (CALLS,),
    ),
    Mutant(
        "leave what has another id than it was revoked by",
        "engine/calls.py",
        'if row.get_options().get("celery_id") == str(execution_id))]',
        "if False)]",
        (CALLS,),
    ),
    Mutant(
        "apply nothing to an id that is taken",
        "tasks/task.py",
        "calls.create(new, calls.nobody())",
        "calls.create(new, None)",
        (CALLS,),
    ),
    # --- connections and owners
    Mutant(
        "send no message twice",
        "host/publishing.py",
        "    for is_second in (False, True):\n",
        "    for is_second in (True,):\n",
        (DISPATCH,),
    ),
    Mutant(
        "take a new connection's failure for a dead one's",
        "host/publishing.py",
        "                if not is_kept or time",
        "                if is_second or time",
        (DISPATCH,),
    ),
    Mutant(
        "trust a connection that was idle for long",
        "host/publishing.py",
        " or time.monotonic() - used_at < IDLE_SECONDS:",
        " or True:",
        (DISPATCH,),
    ),
    Mutant(
        "let a forked process go on with its parent's database connection",
        "store/forks.py",
        "        connection.connection = None\n",
        "",
        (FORKS,),
    ),
    Mutant(
        "let a forked process go on with its parent's broker connections",
        "host/inherited.py",
        "    pool._resource, pool._dirty = LifoQueue(), set()\n",
        "",
        (FORKS,),
    ),
    Mutant(
        "take another worker of the same name for oneself",
        "store/owners.py",
        "    return pid is not None and owner == lease_owner(hostname, pid)\n",
        "    return pid is not None and node_name(owner) == hostname\n",
        (OWNERS,),
    ),
    Mutant(
        "take an execution whose commit got no answer for somebody else's",
        "transitions/creating.py",
        "            return existing if tries == 1 or existing.pk != new.id else None\n",
        "            return existing\n",
        (LOST_CONNECTIONS,),
    ),
    Mutant(
        "note a refused message over an earlier failure",
        "transitions/recovering.py",
        "status=ExecutionStatus.QUEUED, error=None)\n",
        "status=ExecutionStatus.QUEUED)\n",
        (SWEEPER,),
    ),
    Mutant(
        "refuse to wait for what an earlier transaction has created",
        "store/opened.py",
        "    return is_open and kept[0] is connection.atomic_blocks[0] and key in kept[1]",
        "    return bool(kept) and key in kept[1]",
        (WAITING,),
    ),
    Mutant(
        "wait for what this transaction has created",
        "transitions/creating.py",
        "    note_created(using, row.pk)\n",
        "",
        (WAITING,),
        on_postgres=True,
    ),
    Mutant(
        "let a later message say which headers a plain child sees",
        "host/plain_runs.py",
        "            **_with_headers(request, headers.kept_by(execution)),\n",
        "            **request,\n",
        (HEADERS,),
    ),
    Mutant(
        "let a receiver win over the headers of the call",
        "body/headers.py",
        "    headers = {**found, **given}\n",
        "    headers = {**given, **found}\n",
        (HEADERS,),
    ),
    Mutant(
        "let children inherit what speaks of their parent's message",
        "body/headers.py",
        "for name, value in (headers or {}).items() if not _is_foreign(name)}",
        "for name, value in (headers or {}).items()}",
        (HEADERS,),
    ),
    Mutant(
        "leave current what a receiver of before_task_publish has begun",
        "body/headers.py",
        "            return copy_context().run(_show_message, row)\n",
        "            return _show_message(row)\n",
        (HEADERS,),
    ),
    Mutant(
        "raise a soft time limit inside a receiver of before_task_publish",
        "body/headers.py",
        "    with uninterrupted():  # Celery would swallow a soft time limit that is raised in a receiver\n",
        "    if True:\n",
        (HEADERS,),
    ),
    Mutant(
        "keep for ever what a tracer begins at a publish",
        "body/headers.py",
        '            if getattr(receiver, "__module__", None) in modules:\n',
        "            if False:\n",
        (HEADERS,),
    ),
    Mutant(
        "let a result backend rest after an outage of the executions' own database",
        "engine/announcements.py",
        "is_own = shares_database and isinstance(error, DatabaseError | InterfaceError)",
        "is_own = False",
        (ANNOUNCEMENTS,),
    ),
    Mutant(
        "take one end's announcement for the next one's",
        "transitions/announcing.py",
        "filter(pk=execution.pk, status=status, fence=execution.fence)",
        "filter(pk=execution.pk)",
        (ANNOUNCEMENTS,),
    ),
    Mutant(
        "take one end's announcement for the next one's, in one statement",
        STATEMENTS,
        """AND status || '' = %(status)s AND fence = %(fence)s
        AND (%(ended_at)s""",
        """AND %(status)s::text IS NOT NULL AND %(fence)s::bigint IS NOT NULL
        AND (%(ended_at)s""",
        (ANNOUNCEMENTS,),
        on_postgres=True,
    ),
    Mutant(
        "take the announcement of one cancel for that of the next",
        "transitions/announcing.py",
        "rows if ended_at is None else",
        "rows if True else",
        (ANNOUNCEMENTS,),
    ),
    Mutant(
        "take the announcement of one cancel for that of the next, in one statement",
        STATEMENTS,
        "(%(ended_at)s::timestamptz IS NULL OR finished_at <= %(ended_at)s)",
        "(%(ended_at)s::timestamptz IS NULL OR TRUE)",
        (ANNOUNCEMENTS,),
        on_postgres=True,
    ),
    Mutant(
        "call an error callback for the first end alone",
        "engine/announcements.py",
        'end = "" if status == ExecutionStatus.SUCCEEDED else f" {status} {execution.fence}"',
        'end = ""',
        (ANNOUNCEMENTS,),
    ),
    Mutant(
        "leave the result of an end that was retried over the one that followed",
        "engine/announcements.py",
        "            _show_as_it_stands(execution)\n",
        "            pass\n",
        (ANNOUNCEMENTS,),
    ),
    Mutant(
        "tell of an end that Celery tells of itself",
        "host/ends.py",
        "    return is_its_own and status == ExecutionStatus.FAILED",
        "    return False",
        (SIGNALS,),
    ),
    Mutant(
        "leave a body's cancellation to Celery, which does not tell of it",
        "host/ends.py",
        "    return is_its_own and status == ExecutionStatus.FAILED",
        "    return is_its_own",
        (SIGNALS,),
    ),
    Mutant(
        "read an execution again although nobody listens",
        "host/ends.py",
        "if send is None or not _is_heard(getattr(celery_signals, name)) or",
        "if send is None or",
        (SIGNALS,),
    ),
    Mutant(
        "forget what Celery has told",
        "host/ends.py",
        "    _told[of_task_id(task_id)] = now",
        "    pass",
        (SIGNALS,),
    ),
]

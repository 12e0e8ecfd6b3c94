"""The demo as it happens, from the first order to the last check."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from dataclasses import asdict
from pathlib import Path
from uuid import UUID

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.utils import timezone
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from conductor_app.models import Execution
from project.demo.approver import Approver
from project.demo.batch import Batch, is_refused
from project.demo.checks import Check, check_all
from project.demo.crash import Crash, kill_a_process
from project.demo.report import LEGEND, draw_time_line, draw_tree, short_name
from project.demo.screen import Screen
from project.demo.worker import Worker
from project.shop.models import BankCall

#: The process is killed when this share of the cards is charged.
KILL_AT = 0.4
#: How often to look into the database.
POLL_SECONDS = 0.1
#: The user for the admin, if the database is the demo's own.
ADMIN = "demo"


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


class Demo:
    """One run of the demo.

    Args:
        orders: How many orders to place.
        deadline: Seconds after which the demo gives up.
        owns_database: Whether a user for the admin may be made.
    """

    def __init__(self, console: Console, *, orders: int, deadline: float, owns_database: bool) -> None:
        self.console = console
        self.order_count = orders
        self.deadline = deadline
        self.owns_database = owns_database
        self.batch = Batch()
        self.approver = Approver(self.batch)
        #: Which answers the approver has given so far.
        self._answers: set[str] = set()
        self.screen = Screen(console, orders)
        self.worker = Worker(Path(settings.VAR_DIR) / "demo-worker.log")
        self.crash: Crash | None = None
        #: When the process was killed, when its execution was queued again, when that was final: seconds.
        self.killed_after: float | None = None
        self.missed_after: float | None = None
        self.recovered_after: float | None = None
        self.done_after: float | None = None
        #: Why the demo could not go on; empty if it could.
        self.failure = ""
        self.checks: list[Check] = []

    @property
    def holds(self) -> bool:
        """Whether everything is as it should be."""
        return not self.failure and all(check.holds for check in self.checks)

    def run(self) -> None:
        """Run the demo and check what the database says afterwards."""
        call_command("migrate", verbosity=0)
        self.screen.say(f"tables created; the worker logs to {_relative(self.worker.log_path)}")
        with self.worker, self.screen:
            try:
                self._place_orders()
                while not self._look():
                    time.sleep(POLL_SECONDS)
            except DemoFailed as error:
                self.failure = str(error)
        self.done_after = self.screen.seconds
        self.checks = list(check_all(self.batch, self.crash))

    # What happens

    def _place_orders(self) -> None:
        for _order in self.batch.place(self.order_count):
            if self.screen.is_due(POLL_SECONDS):
                self._look()
        self.screen.say(f"orders placed: {self.order_count}, each with an execution of project.shop.tasks.fulfil")

    def _look(self) -> bool:
        """Look how far it is, act on that, and return whether all is done."""
        if self.worker.has_ended:
            raise DemoFailed("the worker has ended by itself")
        if self.screen.seconds > self.deadline:
            raise DemoFailed(f"not done after {self.deadline:g} s")
        self._answer_approvals()
        progress = self.batch.progress()
        self.screen.show(progress, self.batch.expected_executions)
        if self.crash is not None:
            self._watch_recovery(self.crash)
        elif self.batch.payments.count() >= int(KILL_AT * self.order_count):
            self._kill_a_process()
        return progress.orders_done == self.order_count

    def _answer_approvals(self) -> None:
        for order in self.approver.answer():
            answer = "refused" if is_refused(order) else "approved"
            if answer not in self._answers:  # the first of each kind is told
                self._answers.add(answer)
                waited = (timezone.now() - order.updated_at).total_seconds()
                self.screen.say(
                    f"[bold]{answer}[/]: {order} over {order.total} waited {waited:.1f} s, without a worker"
                )

    def _kill_a_process(self) -> None:
        self.crash = crash = kill_a_process(self.batch, self.worker)
        if crash is None:
            return
        self.killed_after = self.screen.seconds
        moment = "the bank has charged, the worker has not noted it" if crash.bank_had_charged else "in the middle"
        self.screen.say(
            f"[bold red]☠ kill -9 {crash.pid}[/] during {short_name(crash.task)} of {crash.order}: {moment}"
        )

    def _watch_recovery(self, crash: Crash) -> None:
        if self.recovered_after is not None:
            return
        execution = Execution.objects.get(pk=crash.execution_id)
        name = f"{short_name(crash.task)} of {crash.order}"
        if self.missed_after is None and execution.attempt > 1:
            self.missed_after = self.screen.seconds
            self.screen.say(f"[bold yellow]↻ {crash.pid} is missed[/]: {name} is queued again, as attempt 2")
        if self.missed_after is not None and execution.is_final:
            self.recovered_after = self.screen.seconds
            is_repeated = self.batch.bank_calls.filter(
                order_number=crash.order.number, answer=BankCall.Answer.REPEATED
            ).exists()
            hint = "; the bank knew the idempotency key and charged nothing" if is_repeated else ""
            self.screen.say(f"[bold green]✓ recovered[/]: {name} {execution.status}{hint}")

    # What is told afterwards

    def tell(self) -> None:
        """Print what the database says."""
        if not self.failure:
            executions = self.batch.executions.count()
            self.screen.say(f"[bold green]✓ all done[/]: {len(self.batch.orders)} orders, {executions} executions")
            self._draw_one_order()
        self.console.print("\n[bold]What holds, counted in the database:[/]")
        for check in self.checks:
            mark = "[green]✓[/]" if check.holds else "[bold red]✗[/]"
            self.console.print(f"{mark} {check.promise}: [dim]{escape(check.figures)}[/]", soft_wrap=True)
        if not self.holds:
            self.console.print(f"\n[bold red]The demo failed: {escape(self.failure or 'not every check holds')}.[/]")
            self.console.print(f"The end of {_relative(self.worker.log_path)}:")
            self.console.print(self.worker.log_tail(), markup=False, soft_wrap=True)
        if self.batch.orders:
            self._tell_what_is_next()

    def _draw_one_order(self) -> None:
        root_id = self._order_to_show()
        order = self.batch.orders[root_id]
        self.console.print(f"\n[bold]{order}[/] over {order.total}, as the database tells it:")
        self.console.print(Padding(draw_tree(root_id, self.crash), (0, 2), expand=False))
        self.console.print()
        width = min(self.console.width, 100) - 4
        self.console.print(Padding(draw_time_line(root_id, self.crash, width), (0, 2), expand=False))
        self.console.print(f"  [dim]{LEGEND}[/]", soft_wrap=True)

    def _order_to_show(self) -> UUID:
        return self.crash.root_id if self.crash is not None else next(iter(self.batch.orders))

    def _tell_what_is_next(self) -> None:
        url = os.environ["DATABASE_URL"] if self.owns_database else "…"  # which may hold a password
        manage = f"DATABASE_URL={url} {_relative(Path(sys.executable))} manage.py"
        self.console.print("\n[bold]Next:[/]")
        self.console.print(f"  {manage} conductor show {self._order_to_show()}", soft_wrap=True)
        self.console.print(f"  {manage} runserver", soft_wrap=True)
        if self.owns_database:
            password = secrets.token_urlsafe(9)
            user, _ = get_user_model().objects.get_or_create(username=ADMIN, is_staff=True, is_superuser=True)
            user.set_password(password)
            user.save()
            self.console.print(f"  [dim]then http://127.0.0.1:8000/admin/, user {ADMIN}, password {password}[/]")

    def as_json(self) -> str:
        """Return the outcome as a JSON document."""
        crash = self.crash
        document = {
            "ok": self.holds,
            "failure": self.failure,
            "orders": self.order_count,
            "executions": self.batch.progress().executions,
            "seconds": self.done_after,
            "crash": crash
            and {
                "pid": crash.pid,
                "execution": crash.execution_id,
                "root": crash.root_id,
                "task": crash.task,
                "bank_had_charged": crash.bank_had_charged,
                "killed_after_seconds": self.killed_after,
                "missed_after_seconds": self.missed_after,
                "recovered_after_seconds": self.recovered_after,
            },
            "checks": [asdict(check) for check in self.checks],
        }
        return json.dumps(document, indent=2, default=str)


def _relative(path: Path) -> str:
    """Return ``path`` as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

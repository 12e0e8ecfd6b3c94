"""The demo as it happens, from the first order to the last check."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from dataclasses import asdict
from pathlib import Path

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from conductor_app.models import Execution
from project.demo.batch import Batch
from project.demo.checks import Check, check_all
from project.demo.crash import Crash, kill_a_process
from project.demo.report import LEGEND, draw_time_line, draw_tree, short_name
from project.demo.screen import Screen
from project.demo.worker import Worker

#: The process is killed when so many of the cards are charged.
KILL_AT = 0.4
POLL_SECONDS = 0.1
ADMIN = "demo"


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


class Demo:
    """One run of the demo.

    Args:
        orders: How many orders to place.
        deadline: Seconds after which the demo gives up.
        as_json: Whether the outcome is printed as one JSON document, on stdout.
    """

    def __init__(self, console: Console, *, orders: int, deadline: float, as_json: bool) -> None:
        self.console = console
        self.order_count = orders
        self.deadline = deadline
        self.as_json = as_json
        self.batch = Batch()
        self.worker = Worker(Path(settings.VAR_DIR) / "demo-worker.log")
        self.crash: Crash | None = None
        #: When the killed execution was first seen again, and when it was final; seconds since the start.
        self.noticed_after: float | None = None
        self.recovered_after: float | None = None
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def run(self) -> int:
        """Run it all and return the exit status: 0 if every check holds."""
        call_command("migrate", verbosity=0)
        self.console.print(f"migrated; the worker logs to {_relative(self.worker.log_path)}", self._clock())
        failure = ""
        with self.worker, Screen(self.console, self.order_count) as screen:
            try:
                self._place_orders(screen)
                self._watch(screen)
            except DemoFailed as error:
                failure = str(error)
        done_after = self.seconds
        checks = list(check_all(self.batch, self.crash))
        holds = not failure and all(check.holds for check in checks)

        if not failure:
            self.console.print(f"[green]✓[/] {self.order_count} orders done", self._clock())
            self._draw_one_order()
        self._print_checks(checks)
        if not holds:
            self._print_failure(failure)
        self._print_next_commands()
        if self.as_json:
            self._print_json(holds, failure, checks, done_after)
        return 0 if holds else 1

    # What happens

    def _place_orders(self, screen: Screen) -> None:
        for _order in self.batch.place(self.order_count):
            self._look(screen)
        screen.say(
            f"{self.order_count} orders placed, each with an execution of project.shop.tasks.fulfil", self._clock()
        )

    def _watch(self, screen: Screen) -> None:
        while not self._look(screen):
            time.sleep(POLL_SECONDS)

    def _look(self, screen: Screen) -> bool:
        """Look how far it is, act on it, and return whether everything is done."""
        if self.worker.has_ended:
            raise DemoFailed("the worker has ended by itself")
        if self.seconds > self.deadline:
            raise DemoFailed(f"not done after {self.deadline:g} s")
        if not screen.is_due(POLL_SECONDS):
            return False
        progress = self.batch.progress()
        screen.show(progress)
        if self.crash is None:
            self._kill_if_it_is_time(screen)
        else:
            self._watch_recovery(screen, self.crash)
        return progress.orders_done == self.order_count

    def _kill_if_it_is_time(self, screen: Screen) -> None:
        if self.batch.payments.count() < KILL_AT * self.order_count:
            return
        self.crash = crash = kill_a_process(self.batch, self.worker)
        if crash is not None:
            moment = "the bank has charged, nobody has noted it" if crash.bank_had_charged else "in the middle"
            name = crash.task.rpartition(".")[2]
            screen.say(f"[red]☠ kill -9 {crash.pid}[/] during {name} of {crash.order}: {moment}", self._clock())

    def _watch_recovery(self, screen: Screen, crash: Crash) -> None:
        if self.recovered_after is not None:
            return
        execution = Execution.objects.get(pk=crash.execution_id)
        name = f"{short_name(execution)} of {crash.order}"
        if self.noticed_after is None and execution.attempt > 1:
            self.noticed_after = self.seconds
            screen.say(f"[yellow]↻ the worker misses {crash.pid}[/]: {name} is queued again", self._clock())
        if self.noticed_after is not None and execution.is_final:
            self.recovered_after = self.seconds
            screen.say(f"[green]✓ {name} {execution.status}[/] at attempt {execution.attempt}", self._clock())

    # What is told afterwards

    def _draw_one_order(self) -> None:
        root_id = self.crash.root_id if self.crash is not None else next(iter(self.batch.orders))
        order = self.batch.orders[root_id]
        self.console.print(f"\n[bold]{order}[/] of {escape(order.customer)}, {order.total}, as the database tells it:")
        self.console.print(Padding(draw_tree(root_id, self.crash), (0, 2)), soft_wrap=True)
        self.console.print()
        self.console.print(Padding(draw_time_line(root_id, self.crash), (0, 2)))
        self.console.print(f"  [dim]{LEGEND}[/]")

    def _print_checks(self, checks: list[Check]) -> None:
        self.console.print("\n[bold]What holds, counted in the database:[/]")
        for check in checks:
            mark = "[green]✓[/]" if check.holds else "[red]✗[/]"
            self.console.print(f"{mark} {check.promise}: [dim]{escape(check.figures)}[/]", soft_wrap=True)

    def _print_failure(self, failure: str) -> None:
        self.console.print(f"\n[red bold]The demo failed: {escape(failure or 'not every check holds')}.[/]")
        self.console.print(f"The end of {_relative(self.worker.log_path)}:")
        self.console.print(self.worker.log_tail(), markup=False, soft_wrap=True)

    def _print_next_commands(self) -> None:
        root_id = self.crash.root_id if self.crash is not None else next(iter(self.batch.orders), "")
        manage = f"DATABASE_URL={os.environ['DATABASE_URL']} {_relative(Path(sys.executable))} manage.py"
        password = secrets.token_urlsafe(9)
        user, _ = get_user_model().objects.get_or_create(username=ADMIN, is_staff=True, is_superuser=True)
        user.set_password(password)
        user.save()
        self.console.print("\n[bold]Next:[/]")
        self.console.print(f"  {manage} conductor show {root_id}", soft_wrap=True)
        self.console.print(f"  {manage} runserver", soft_wrap=True)
        self.console.print(f"  [dim]http://127.0.0.1:8000/admin/, user {ADMIN}, password {password}[/]")

    def _print_json(self, holds: bool, failure: str, checks: list[Check], done_after: float) -> None:
        crash = self.crash
        document = {
            "ok": holds,
            "failure": failure,
            "orders": self.order_count,
            "seconds": round(done_after, 3),
            "executions": self.batch.progress().executions,
            "crash": crash
            and {
                "pid": crash.pid,
                "execution": str(crash.execution_id),
                "root": str(crash.root_id),
                "task": crash.task,
                "bank_had_charged": crash.bank_had_charged,
                "noticed_after_seconds": self.noticed_after,
                "recovered_after_seconds": self.recovered_after,
            },
            "checks": [asdict(check) for check in checks],
        }
        json.dump(document, sys.stdout, indent=2)
        sys.stdout.write("\n")

    def _clock(self) -> str:
        return f"[dim]+{self.seconds:.1f} s[/]"


def _relative(path: Path) -> str:
    """Return ``path`` as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

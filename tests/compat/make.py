"""Write down what this version stores: one execution for each way to wait, to end and to be queued.

    python -m tests.compat.make tests/compat/version_0_1.json

The files that lie here are what released versions have stored. A version is added, and none is ever made again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(path: str) -> None:
    """Run the executions in a database of their own, and write its rows to ``path``."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ["DATABASE_URL"] = f"sqlite:///{directory}/stored.sqlite3"
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
        import django

        django.setup()
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        _store()
        call_command("dumpdata", "conductor_app", indent=1, output=path)
        # Tracebacks name files of this machine.
        written = Path(path).read_text()
        for folder in (str(ROOT), sys.prefix):
            written = written.replace(folder, "/srv/shop")
        Path(path).write_text(written)


def _store() -> None:
    from conductor_app import api, transitions
    from conductor_app.host import inline
    from conductor_app.models import Execution
    from conductor_app.store import clock
    from conductor_app.transitions import dispatch
    from project.celery import app
    from tests.app import stored

    with dispatch.inline():
        for task in (
            stored.waits_in_time,
            stored.invokes,
            stored.invokes_in_time,
            stored.maps,
            stored.gathers,
            stored.sleeps,
            stored.fails_below,
            stored.retries,
        ):
            task.delay()
        stored.waits.delay(name="alone")
        stored.echo.delay(stored.VALUES)
        stored.remembers.delay(given=stored.VALUES)
        cancelled = stored.waits.delay(name="cancelled")
        inline.run_until_idle(app)
        api.cancel(cancelled, reason="not wanted")

        linked = stored.waits.s(name="linked").set(link=stored.echo.s(), link_error=stored.echo.si("failed"))
        linked.apply_async(headers={"tenant": "north"}, idempotency_key="order-7", priority=3)
        inline.run_until_idle(app)

        plain = stored.invokes_plain.delay()
        inline.run_once(Execution.objects.get(pk=plain.id), app)
        later = stored.echo.apply_async(("later",), countdown=3_600)
        assert Execution.objects.get(pk=later.id).status == "queued"
        died = stored.echo.delay("died")
        transitions.claim(Execution.objects.get(pk=died.id).pk, "celery@old-host/4711")
        Execution.objects.filter(pk=died.id).update(lease_expires_at=clock.after(-3_600))


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))

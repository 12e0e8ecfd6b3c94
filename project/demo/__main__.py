"""Run the demo: place the orders, kill a pool process in the middle, and check what the database then says.

It uses a database of its own and the embedded ``memory://`` broker, so there is no server to start.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
DATABASE = ROOT / "var" / "demo.sqlite3"
#: Enough for some 30 seconds on two cores.
ORDERS = 100
#: Seconds; for machines that are slow or busy. Less than the 10 minutes after which ``fulfil`` gives up a charge.
DEADLINE = 240


def main() -> int:
    """Return the exit status: 0 if every check holds."""
    options = parse_arguments()
    # With --json the story goes to stderr, and stdout is one JSON document.
    console = Console(stderr=options.json, highlight=False)
    os.chdir(ROOT)
    database = options.database_url or "sqlite:///" + quote(str(DATABASE.relative_to(ROOT)))
    if not options.database_url and not options.keep_database:
        remove_database(DATABASE)
    configure(database)
    # A terminated program cleans up too: the worker must not outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    where = database.partition("://")[0] if options.database_url else f"SQLite {DATABASE.relative_to(ROOT)}"
    console.print(
        f"[bold]conductor_app demo[/]: {where}, no broker server, one worker with 2 processes", soft_wrap=True
    )

    import django  # noqa: PLC0415 - reads the environment set above

    django.setup()
    from project.demo.story import Demo  # noqa: PLC0415 - imports models

    demo = Demo(console, orders=options.orders, deadline=options.deadline, owns_database=options.database_url is None)
    try:
        demo.run()
    except KeyboardInterrupt:
        console.print("interrupted")
        return 128 + signal.SIGINT
    demo.tell()
    if options.json:
        sys.stdout.write(demo.as_json() + "\n")
    return 0 if demo.holds else 1


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m project.demo", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--orders", type=positive, default=ORDERS, metavar="N", help=f"how many orders (default: {ORDERS})"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON document")
    parser.add_argument(
        "--keep-database", action="store_true", help=f"keep the orders of earlier runs in var/{DATABASE.name}"
    )
    parser.add_argument(
        "--database-url", metavar="URL", help="use this database; what it holds is kept (default: an SQLite file)"
    )
    parser.add_argument(
        "--deadline",
        type=positive,
        default=DEADLINE,
        metavar="SECONDS",
        help=f"give up after so long (default: {DEADLINE})",
    )
    return parser.parse_args()


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def configure(database: str) -> None:
    """Set what ``project.settings`` reads, for this process and for the worker that it starts."""
    os.environ.update(
        DJANGO_SETTINGS_MODULE="project.settings",
        DATABASE_URL=database,
        CELERY_BROKER_URL="memory://",
        CELERY_RESULT_BACKEND="django-db",
        DEBUG="false",  # Django would keep every query in memory
        SECRET_KEY=secrets.token_urlsafe(50),
        EMAIL_BACKEND="django.core.mail.backends.dummy.EmailBackend",
    )


def remove_database(path: Path) -> None:
    """Remove the SQLite file and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

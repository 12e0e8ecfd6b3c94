"""Take the pictures of the admin that the README and the docs show, from a shop that a real worker serves.

    python -m tests.browser.screenshots [--directory docs/images]

It needs what ``make test-browser`` needs, and a font with the marks of statuses (Debian's fonts-noto-core).
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
ORDERS = 24
#: There is none of it, so orders that want it fail in the end.
SOLD_OUT = 2
SIZE = {"width": 1240, "height": 800}
LARGEST_BYTES = 200_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.browser.screenshots", description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=ROOT / "docs/images")
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="conductor-screenshots-") as temporary:
        os.environ.update(
            DATABASE_URL=f"sqlite:///{temporary}/shop.sqlite3",
            CELERY_BROKER_URL="memory://",
            DJANGO_SETTINGS_MODULE="project.settings",
            DJANGO_ALLOW_ASYNC_UNSAFE="true",
        )
        import django

        django.setup()
        shop = open_shop()
        with running("celery", "-A", "project", "worker", "--concurrency=2", "--loglevel=WARNING"), server() as url:
            serve(shop)
            take(url, directory)
    for picture in sorted(directory.glob("admin-*.png")):
        size = picture.stat().st_size
        print(f"{picture}: {size // 1_000} kB")
        if size > LARGEST_BYTES:
            print(f"{picture} is larger than {LARGEST_BYTES // 1_000} kB.", file=sys.stderr)
            return 1
    return 0


def open_shop() -> Any:
    """Place orders; some cannot be filled."""
    from django.core.management import call_command

    from project.demo.batch import Batch
    from project.shop.models import Stock

    call_command("migrate", verbosity=0)
    batch = Batch()
    list(batch.place(ORDERS))
    for shelf in Stock.objects.order_by("-quantity")[:SOLD_OUT]:
        Stock.objects.filter(pk=shelf.pk).update(quantity=0)
    return batch


def serve(batch: Any) -> None:
    """Wait until every order has ended, or waits for a person."""
    from conductor_app.models import Execution
    from tests.support.polling import wait_until

    busy = Execution.objects.filter(status__in=["queued", "running"])
    wait_until(lambda: batch.parents.filter(status="failed").exists() and not busy.exists(), 120, 0.5)


def take(url: str, directory: Path) -> None:
    from django.conf import settings
    from django.contrib.auth.models import User
    from django.test import Client
    from django.urls import reverse

    from conductor_app.models import Execution
    from project.shop.tasks import fulfil
    from tests.browser import chromium

    client = Client()
    client.force_login(User.objects.create_superuser("ana"))
    cookie = {"name": settings.SESSION_COOKIE_NAME, "value": client.cookies[settings.SESSION_COOKIE_NAME].value}
    failed = Execution.objects.filter(task=fulfil.name, status="failed").first()
    execution = reverse("admin:conductor_app_execution_change", args=[failed.pk])
    pictures = [
        ("admin-executions", reverse("admin:conductor_app_execution_changelist"), "light"),
        ("admin-execution", execution, "light"),
        ("admin-execution-dark", execution, "dark"),
        ("admin-overview", reverse("admin:conductor_app_execution_overview"), "light"),
    ]
    with chromium.launched() as browser:
        for name, path, scheme in pictures:
            context = browser.new_context(viewport=SIZE, color_scheme=scheme)
            context.add_init_script("localStorage.setItem('django.admin.navSidebarIsOpen', 'false')")
            context.add_cookies([{**cookie, "url": url}])
            page = context.new_page()
            assert page.goto(f"{url}{path}").status == 200, path
            page.screenshot(path=directory / f"{name}.png")
            context.close()


@contextmanager
def running(*command: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with running("django", "runserver", "--noreload", f"127.0.0.1:{port}"):
        deadline = time.monotonic() + 30
        while True:
            try:
                urlopen(f"{url}/admin/login/", timeout=5).close()
                break
            except URLError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield url


if __name__ == "__main__":
    sys.exit(main())

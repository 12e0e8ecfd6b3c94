"""A server that shows the test's database in some theme of the admin: themes take over when Django starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.error import URLError
from urllib.request import urlopen

from django.db import connection

from tests.support.polling import wait_until
from tests.support.worker import ROOT

#: By the names of their apps; Django's own admin has none.
THEMES = ("", "unfold", "jazzmin")


@contextmanager
def served(theme: str) -> Iterator[str]:
    """Start a server, and return its address when it answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "CONDUCTOR_TEST_DATABASE_NAME": str(connection.settings_dict["NAME"]),
        "CONDUCTOR_TEST_THEME": theme,
        "DJANGO_SETTINGS_MODULE": "tests.browser.themed_settings",
    }
    command = [sys.executable, "-m", "django", "runserver", "--noreload", "--verbosity=0", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, f"the server of {theme or 'Django'} has ended"
        with suppress(URLError), urlopen(f"{url}/admin/login/", timeout=5):
            return True
        return False

    try:
        wait_until(answers, 60, 0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)

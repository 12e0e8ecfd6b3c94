"""A real browser on a real server, over the database in which a real worker runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.test import Client, override_settings
from pytest_django.live_server_helper import LiveServer

from tests.browser import chromium

#: Milliseconds that the browser waits for what is to appear.
PATIENCE = 15_000


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium."""
    if find_spec("playwright") is None or chromium.path() is None:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(chromium.HOW_TO_INSTALL)
        pytest.skip(chromium.HOW_TO_INSTALL)
    # Playwright keeps an event loop in this thread, beside which Django would refuse to ask the database.
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
    with chromium.launched() as started:
        yield started
    del os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"]


@pytest.fixture(scope="session")
def live_server(django_db_setup: None) -> Iterator[LiveServer]:
    """In the place of pytest-django's: each page comes with a strict policy."""
    middleware = [*settings.MIDDLEWARE, "tests.browser.policy.strict_policy"]
    with override_settings(MIDDLEWARE=middleware):
        server = LiveServer("localhost")
        yield server
        server.stop()


class Tab:
    """One page of the browser, and what went wrong in it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.url = url
        #: Violations of the policy, and errors of scripts.
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self._hear(message.type, message.text, message.location["url"]))
        page.on("pageerror", lambda error: self._hear("error", str(error)))

    def _hear(self, kind: str, text: str, source: str = "") -> None:
        if source.endswith("/favicon.ico"):
            # The browser asks for it by itself, and the project has none.
            return
        if kind == "error" or "Content Security Policy" in text:
            self.complaints.append(f"{self.page.url}: {text}")

    def open(self, path: str) -> Any:
        """Go to a path of the server and return the page."""
        response = self.page.goto(f"{self.url}{path}")
        assert response.status == 200, f"{path}: {response.status}"
        return self.page


@pytest.fixture
def tab(browser: Any, live_server: LiveServer, transactional_db: None) -> Iterator[Callable[..., Tab]]:
    """A function that opens a tab, by default of somebody who may do everything; it takes the options of a context."""
    contexts: list[Any] = []

    def open_tab(*, username: str | None = "ana", **options: Any) -> Tab:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        if username is not None:
            user = User.objects.filter(username=username).first() or User.objects.create_superuser(username)
            client = Client()
            client.force_login(user)
            cookie = client.cookies[settings.SESSION_COOKIE_NAME]
            context.add_cookies([{"name": cookie.key, "value": cookie.value, "url": live_server.url}])
        return Tab(context.new_page(), live_server.url)

    yield open_tab
    for context in contexts:
        context.close()

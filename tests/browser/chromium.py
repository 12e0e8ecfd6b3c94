"""Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HOW_TO_INSTALL = (
    "The browser tests need Playwright and Chromium: `make test-browser` installs the first, and as root on Debian the "
    "second, too; otherwise run `apt-get install chromium`, or set CHROMIUM to a browser's path."
)


def path() -> str | None:
    """Return the path of the browser, if there is one."""
    names = [os.environ.get("CHROMIUM", "chromium"), "chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if (found := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Any]:
    """Start the browser, and end it."""
    from playwright.sync_api import sync_playwright

    # Chromium's own sandbox needs a user other than root, and containers often lack what it is made of.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path(), args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()

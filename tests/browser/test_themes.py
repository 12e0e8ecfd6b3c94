"""The pages in Django's own theme, in Unfold and in Jazzmin, light and dark, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from conductor_app.models import Operation
from tests.browser import axe, scene, themes

pytestmark = pytest.mark.django_db(transaction=True)

#: What is ours on any page: the content of the pages of figures and of an execution, and the cells of lists.
OURS = (
    *("#content-main.cd-overview", "#content-main.cd-page", "#content-main.cd-confirmation"),
    *(".cd-pill", ".cd-id", ".cd-why", ".cd-note", ".cd-refresh", ".cd-links", ".cd-filter"),
)
#: Wide and high; the least that lists have to fit into, and a phone.
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 840}
#: How a theme is told to be dark, if the browser's preference does not tell it.
DARK = {
    "unfold": "isDark => document.documentElement.classList.toggle('dark', isDark)",
    "jazzmin": "isDark => document.documentElement.setAttribute('data-bs-theme', isDark ? 'dark' : 'light')",
}
#: Bootstrap's links, wherever Jazzmin's pages have one, differ too little from the grey of its own ground.
THEIRS = "foreground color: #0d6efd"
#: A box that shows less than there is in it, and does not scroll.
CUT_OFF = """() => [...document.querySelectorAll("#content-main table, #result_list")].filter(table => {
    let box = table.parentElement;
    while (box && getComputedStyle(box).overflowX === "visible") box = box.parentElement;
    return box && box.scrollWidth > box.clientWidth + 1;
}).map(table => table.id || table.innerText.slice(0, 40))"""


@pytest.fixture(params=themes.THEMES, ids=lambda theme: theme or "django")
def theme(request: pytest.FixtureRequest, browser: Any, transactional_db: None) -> Iterator[Callable[..., Any]]:
    """A function that opens a page of a theme's server, as somebody who may do everything."""
    name = request.param
    if name and find_spec(name) is None:
        pytest.skip(f"requirements-browser.txt has {name}")
    user = User.objects.filter(username="ana").first() or User.objects.create_superuser("ana")
    client = Client()
    client.force_login(user)
    cookie = client.cookies[settings.SESSION_COOKIE_NAME]
    contexts: list[Any] = []
    with themes.served(name) as url:

        def open_tab() -> Callable[[str], Any]:
            context = browser.new_context(viewport=DESK)
            contexts.append(context)
            context.add_cookies([{"name": cookie.key, "value": cookie.value, "url": url}])
            page = context.new_page()

            def go(path: str) -> Any:
                response = page.goto(f"{url}{path}")
                assert response.status == 200, f"{path}: {response.status}"
                return page

            return go

        open_tab.name = name  # type: ignore[attr-defined]
        yield open_tab
        for context in contexts:
            context.close()


def pages(played: scene.Scene) -> dict[str, str]:
    """Return the paths of the pages that an operator reads."""
    lists = {
        name: reverse(f"admin:conductor_app_{name}_changelist")
        for name in ("execution", "failedexecution", "operation")
    }
    figures = {
        name: reverse(f"admin:conductor_app_execution_{name}") for name in ("overview", "slow", "workers", "limits")
    }
    known = {
        name: reverse("admin:conductor_app_execution_change", args=[played.known[name].pk])
        for name in ("failed", "stuck", "retried")
    }
    failed = played.known["failed"].pk
    return {
        **lists,
        "failed ones": f"{lists['execution']}?status__exact=failed",
        "steps": reverse("admin:conductor_app_step_changelist"),
        **figures,
        **known,
        "slowest first": f"{known['failed']}?tree=slowest",
        "comparison": reverse("admin:conductor_app_execution_compare", args=[failed]),
        "an operation": reverse("admin:conductor_app_operation_change", args=[Operation.objects.first().pk]),
        "confirmation": reverse("admin:conductor_app_execution_act", args=[played.known["stuck"].pk, "cancel"]),
    }


# A server of its own, and some fifty looks at pages.
@pytest.mark.timeout(400)
def test_a_page_is_readable_and_fits_in_each_theme(theme: Any, subtests: Any) -> None:
    played = scene.play()
    go = theme()
    for name, path in pages(played).items():
        page = go(path)
        with subtests.test(msg=f"{theme.name} {name}"):
            assert ours(page) == []
            assert page.evaluate(CUT_OFF) == []
        with subtests.test(msg=f"{theme.name} {name}, dark"), dark(page, theme.name):
            assert ours(page) == []
        with subtests.test(msg=f"{theme.name} {name}, on a phone"):
            page.set_viewport_size(PHONE)
            assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        page.set_viewport_size(DESK)


@contextmanager
def dark(page: Any, theme: str) -> Iterator[None]:
    """Let the page be dark, at once: a colour on its way from light to dark is none that anybody reads."""
    page.add_style_tag(content="*, *::before, *::after { transition: none !important; animation: none !important; }")
    page.emulate_media(color_scheme="dark")
    if theme in DARK:
        page.evaluate(DARK[theme], True)
    try:
        yield
    finally:
        page.emulate_media(color_scheme="light")
        if theme in DARK:
            page.evaluate(DARK[theme], False)


def ours(page: Any) -> list[Any]:
    """Return what is hard to read of what is ours."""
    here = [selector for selector in OURS if page.locator(selector).count()]
    found = axe.violations(page, {"include": here}, **axe.COLOURS)
    return [violation for violation in found if THEIRS not in violation[2]]


def test_the_index_and_the_sidebar_lead_to_every_page_in_each_theme(theme: Any) -> None:
    scene.play()
    page = theme()(reverse("admin:index"))
    wanted = ["Overview", "What takes long", "Workers and queues", "Operations", "Executions", "Failed executions"]
    for words in wanted:
        page.get_by_role("link", name=words, exact=True).first.click()
        page.wait_for_load_state()
        assert page.title().startswith(words), page.title()

"""A newcomer's first hour, in a fresh project with a stock worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.docs.pages import Block, blocks
from tests.docs.terminals import Reader

pytestmark = [
    pytest.mark.worker,
    pytest.mark.skipif(
        bool(os.environ.get("DATABASE_URL") or os.environ.get("CELERY_BROKER_URL")),
        reason="has a project of its own, on SQLite and memory:// whatever the suite runs on",
    ),
]

#: What is in the project before the four steps.
CELERY_APP = """
import os
from celery import Celery
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
app = Celery("mysite")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
"""
PLAIN_TASK = """
from celery import shared_task

@shared_task
def add(x, y):
    return x + y
"""
PLAIN_SESSION = """
>>> from conductor_app import DurableTask
>>> from shop.tasks import add, double
>>> add.apply(args=(2, 3)).get()
5
>>> isinstance(add, DurableTask), isinstance(double, DurableTask)
(False, True)
"""


def test_the_four_steps_of_the_readme_add_durable_tasks_to_an_existing_project(tmp_path: Path) -> None:
    steps = [block for block in blocks("README.md") if block.section == "Add it to your project"]
    assert [block.language for block in steps] == ["console", "python", "console", "python", "console", "pycon"]
    with Reader(tmp_path) as reader:
        reader.type("django-admin startproject mysite .", "", "the existing project")
        reader.type("python manage.py startapp shop", "", "the existing project")
        reader.save("mysite/celery.py", CELERY_APP)
        reader.save("mysite/__init__.py", "from mysite.celery import app as celery_app\n")
        reader.save("mysite/settings.py", 'INSTALLED_APPS += ["shop"]\nCELERY_BROKER_URL = "memory://"\n')
        reader.save("shop/tasks.py", PLAIN_TASK)
        for step in steps:
            reader.follow(step)
        assert "shop.tasks.add" in reader.log()
        reader.enter(Block("the existing task", 1, "pycon", PLAIN_SESSION))


def test_the_tutorial_works_word_for_word(tmp_path: Path) -> None:
    with Reader(tmp_path) as reader:
        for block in blocks("docs/tutorial.md"):
            if block.language == "text":
                for line in block.text.splitlines():
                    reader.expect(line, str(block))
            else:
                reader.follow(block)
        assert "the bank is asked" not in reader.log(), "a recorded step ran again"

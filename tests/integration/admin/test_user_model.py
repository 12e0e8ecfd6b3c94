"""A project whose users are of a model of its own, named by UUIDs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.worker import ROOT

MODELS = """
import uuid

from django.contrib.auth.models import AbstractUser
from django.db import models


class Person(AbstractUser):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
"""

SETTINGS = """
from project.settings import *

INSTALLED_APPS = [*INSTALLED_APPS, "people"]
AUTH_USER_MODEL = "people.Person"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ALLOWED_HOSTS = ["*"]
"""

PROGRAM = """
import django

django.setup()

from django.contrib.admin.models import LogEntry
from django.core.management import call_command
from django.test import Client
from django.urls import reverse

from conductor_app.models import Execution
from people.models import Person
from project.shop.tasks import validate

call_command("migrate", run_syncdb=True, verbosity=0)
ana = Person.objects.create_superuser("ana")
client = Client()
client.force_login(ana)
waiting = validate.apply_async(args=[1], countdown=600)
for page in ("changelist", "overview"):
    assert client.get(reverse(f"admin:conductor_app_execution_{page}")).status_code == 200, page
assert client.get(reverse("admin:conductor_app_execution_change", args=[waiting.id])).status_code == 200
act = reverse("admin:conductor_app_execution_act", args=[waiting.id, "cancel"])
answer = client.post(act, {"confirmed": "yes", "reason": "wrong order"}, follow=True)
assert answer.status_code == 200
assert Execution.objects.get().status == "cancelled"
print(LogEntry.objects.get().user.username, "has cancelled it")
"""


def test_people_of_ones_own_see_and_act(tmp_path: Path) -> None:
    package = tmp_path / "people"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "models.py").write_text(MODELS)
    (tmp_path / "settings_of_people.py").write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "DJANGO_SETTINGS_MODULE": "settings_of_people",
            "DATABASE_URL": f"sqlite:///{tmp_path / 'people.sqlite3'}",
            "CELERY_BROKER_URL": "memory://",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ana has cancelled it"

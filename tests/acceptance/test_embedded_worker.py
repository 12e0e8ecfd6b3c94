"""A worker of ``celery.contrib.testing``, in a thread of the program that calls: Celery's ``celery_worker`` fixture."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from django.db import connection

from tests.support.worker import ROOT


@pytest.mark.django_db(transaction=True)
def test_timers_retries_and_countdowns_fire_in_each_and_nothing_is_left_behind(tmp_path: Any) -> None:
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "CONDUCTOR_TEST_DATABASE_NAME": str(connection.settings_dict["NAME"]),
    }
    told = subprocess.run(
        [sys.executable, "-m", "tests.support.embedded_worker"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told.stdout.splitlines() == ["[2, 2]", "[2, 2]", '[false, "Gate", null] [2, 2]'], told.stderr

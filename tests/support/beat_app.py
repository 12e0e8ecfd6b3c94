"""The project's Celery app with a schedule, for a Celery Beat that a test starts."""

from datetime import timedelta

from project.celery import app

app.conf.beat_schedule = {
    "often": {"task": "tests.app.scenarios.echo", "schedule": timedelta(seconds=0.5), "kwargs": {"value": "beat"}}
}

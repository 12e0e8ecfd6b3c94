"""The project's Celery app, told to read no JSON, for a worker that a test starts."""

from django.conf import settings

from project.celery import app

# Before the app reads it. What is set in ``app.conf`` later, Celery 5.6 passes over for Django's settings.
settings.CELERY_ACCEPT_CONTENT = ["application/x-yaml"]

__all__ = ["app"]

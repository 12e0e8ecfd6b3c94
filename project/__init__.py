"""The Django project around the example shop."""

# Tasks find the Celery app through this import. Without it, a web process would publish to amqp://guest@localhost,
# under an app called "default", and no error would tell.
from project.celery import app as celery_app

__all__ = ["celery_app"]

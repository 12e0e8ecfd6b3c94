"""The decorator, the task class, and the Celery task of our own."""

from conductor_app.tasks import own as own  # registers it where Celery looks for tasks

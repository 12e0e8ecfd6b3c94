"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.exceptions import ImproperlyConfigured
from django.utils.translation import gettext_lazy as _


class ConductorConfig(AppConfig):
    """``conductor_app`` in ``INSTALLED_APPS``."""

    name = "conductor_app"
    label = "conductor_app"
    verbose_name = _("Durable executions")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect checks and signal receivers; no query is made and none of the project's tasks imported."""
        from celery.signals import celeryd_init  # noqa: PLC0415

        from conductor_app import checks, tasks  # noqa: F401, PLC0415 - registers our own Celery tasks
        from conductor_app.host import receivers  # noqa: F401, PLC0415

        # After the receivers, which install the sweeper. Celery hides system checks.
        celeryd_init.connect(checks.report_to_worker, dispatch_uid="conductor_app.checks", weak=False)
        observe()


def observe() -> None:
    """Put in the hooks that ``CONDUCTOR`` asks for; without it, not even their modules are imported.

    Raises:
        ImportError: An extra is not installed.
    """
    from celery.signals import worker_ready  # noqa: PLC0415

    from conductor_app.conf import conductor_settings  # noqa: PLC0415

    try:
        settings = conductor_settings()
    except ImproperlyConfigured:
        return  # the system checks say so
    if settings.METRICS:
        from conductor_app import metrics  # noqa: PLC0415

        metrics.install()
        if settings.METRICS_LISTEN:
            worker_ready.connect(metrics.serve, dispatch_uid="conductor_app.metrics", weak=False)
    if settings.TRACING:
        from conductor_app import tracing  # noqa: PLC0415

        tracing.install()

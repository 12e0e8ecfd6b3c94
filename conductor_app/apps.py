"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class ConductorConfig(AppConfig):
    """``conductor_app`` in ``INSTALLED_APPS``."""

    name = "conductor_app"
    label = "conductor_app"
    verbose_name = _("Durable executions")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect checks and signal receivers; no query is made and no task imported."""
        from conductor_app import checks, receivers  # noqa: F401, PLC0415

        receivers.observe()

"""The Django app."""

from django.apps import AppConfig


class ShopConfig(AppConfig):
    """``project.shop`` in ``INSTALLED_APPS``."""

    name = "project.shop"
    label = "shop"
    verbose_name = "Shop"
    default_auto_field = "django.db.models.BigAutoField"

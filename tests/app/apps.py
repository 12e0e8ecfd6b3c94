from django.apps import AppConfig


class TestAppConfig(AppConfig):
    """Tasks and tables for the tests."""

    name = "tests.app"
    label = "testapp"
    default_auto_field = "django.db.models.BigAutoField"

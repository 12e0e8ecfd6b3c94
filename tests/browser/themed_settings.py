"""The settings of the tests, for a server in another theme of the admin: ``CONDUCTOR_TEST_THEME`` names its app."""

import os

from tests import settings as base
from tests.settings import *  # noqa: F403

# A theme's templates take the place of Django's, so it stands before the admin.
INSTALLED_APPS = [*os.environ["CONDUCTOR_TEST_THEME"].split(), *base.INSTALLED_APPS]
DEBUG = True
ALLOWED_HOSTS = ["127.0.0.1"]
# The default theme asks Google for its fonts.
JAZZMIN_SETTINGS = {"use_google_fonts_cdn": False}

"""Django's settings and ``CONDUCTOR``."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from typing import Any

from django.conf import settings
from django.core import checks
from django.core.checks import CheckMessage
from django.core.exceptions import ImproperlyConfigured

from conductor_app.body import scopes
from conductor_app.checks import subject
from conductor_app.conf import conductor_settings


@checks.register(subject.TAG)
def check_settings(**_kwargs: Any) -> list[CheckMessage]:
    """E017: ``CONDUCTOR`` is wrong."""
    try:
        if path := conductor_settings().AROUND_BODY:
            scopes.of_project(path)
    except ImproperlyConfigured as error:
        return [
            checks.Error(
                str(error), hint="docs/reference/settings.md lists the keys of CONDUCTOR.", id="conductor.E017"
            )
        ]
    return []


@checks.register(subject.TAG)
def check_time_zone(**_kwargs: Any) -> list[CheckMessage]:
    """E033: instants that are stored as local times, where clocks are put back."""
    if settings.USE_TZ or not _has_daylight_saving():
        return []
    return [
        checks.Error(
            f"USE_TZ is False and the clocks of {settings.TIME_ZONE or 'this machine'} are put forward and back: what "
            "is due around then comes an hour late, or at once, and leases lapse an hour late, or at once.",
            hint='Set USE_TZ = True, or a TIME_ZONE without daylight saving, such as "UTC". Do it while no execution '
            "is open: instants that are stored keep their old meaning.",
            id="conductor.E033",
        )
    ]


def _has_daylight_saving() -> bool:
    """Tell whether the offset to UTC changes within the year that comes."""
    zone = zoneinfo.ZoneInfo(settings.TIME_ZONE) if settings.TIME_ZONE else None
    first = dt.datetime.now(dt.UTC)
    offsets = {(first + dt.timedelta(days=day)).astimezone(zone).utcoffset() for day in range(0, 371, 7)}
    return len(offsets) > 1


@checks.register(subject.TAG)
def check_tenants(**_kwargs: Any) -> list[CheckMessage]:
    """E035: django-tenants gives each tenant tables of ours, at which no worker looks."""
    if not getattr(settings, "TENANT_MODEL", None):
        return []
    of_tenants = {"TENANT_APPS": getattr(settings, "TENANT_APPS", ())}
    if getattr(settings, "HAS_MULTI_TYPE_TENANTS", False):
        public = getattr(settings, "PUBLIC_SCHEMA_NAME", "public")
        types = getattr(settings, "TENANT_TYPES", {})
        of_tenants = {f'TENANT_TYPES["{name}"]': kind.get("APPS", ()) for name, kind in types.items() if name != public}
    return [
        checks.Error(
            f"conductor_app is in {where}: each tenant gets tables of its own, and workers look at those of the public "
            "schema. What a tenant's request starts is stored and never runs.",
            hint="Move conductor_app to SHARED_APPS (the APPS of the public type), and migrate. A task's tenant "
            "travels in its payload or in a header.",
            id="conductor.E035",
        )
        for where, apps in of_tenants.items()
        if any(name.partition(".")[0] == "conductor_app" for name in apps)
    ]

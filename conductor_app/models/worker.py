"""``Worker``: who is at work, as each worker's sweeper says from time to time."""

from __future__ import annotations

import json
from typing import ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _

from conductor_app.models.fields import ExactCharField


class Worker(models.Model):
    """One worker that is alive, or was a moment ago. Rows change only in ``transitions.attending``.

    Nothing depends on it: leases alone say who runs what. A worker that ends removes its row, and sweepers those of
    workers that were killed.
    """

    #: What the names of its processes as owners of leases begin with: ``<node name>/<token>``.
    id = ExactCharField(primary_key=True, max_length=255, editable=False)
    name = ExactCharField(_("node name"), max_length=255)
    host = models.CharField(_("host"), max_length=255)
    #: Of its main process.
    pid = models.BigIntegerField(_("process"))
    pool = models.CharField(_("pool"), max_length=64)
    #: How many bodies it runs at once, at most.
    slots = models.IntegerField(_("slots"))
    #: Names of the queues that it consumes, as a JSON list.
    queues = models.TextField(_("queues"))
    package = models.CharField(_("version of conductor_app"), max_length=64)
    celery = models.CharField(_("version of Celery"), max_length=64)
    django = models.CharField(_("version of Django"), max_length=64)
    python = models.CharField(_("version of Python"), max_length=64)
    #: ``CONDUCTOR["RELEASE"]``.
    release = models.CharField(_("release"), max_length=255, blank=True, default="")
    #: Whether it shuts down, and begins nothing more.
    is_stopping = models.BooleanField(_("stopping"), default=False)
    started_at = models.DateTimeField(_("started"))
    seen_at = models.DateTimeField(_("last seen"))

    class Meta:
        verbose_name = _("worker")
        verbose_name_plural = _("workers")
        ordering: ClassVar[list[str]] = ["name", "id"]
        # They are seen on a page of those who may see executions.
        default_permissions = ()

    def __str__(self) -> str:
        return str(self.name)

    def queue_names(self) -> list[str]:
        """Return the queues that it consumes."""
        return [str(name) for name in json.loads(self.queues)]

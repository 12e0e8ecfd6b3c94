"""``Tag``: what people find a tree of executions by."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _

from conductor_app.models.execution import Execution
from conductor_app.models.fields import ExactCharField
from conductor_app.values.tags import KEY_LENGTH, VALUE_LENGTH


class Tag(models.Model):
    """A key and its value, of a whole tree. Rows change only in ``transitions.tagging``, under the root's row lock."""

    id = models.BigAutoField(primary_key=True)
    root = models.ForeignKey(
        Execution,
        models.CASCADE,
        verbose_name=_("root"),
        related_name="tags",
        db_constraint=False,
        db_index=False,
    )
    key = ExactCharField(_("key"), max_length=KEY_LENGTH)
    value = ExactCharField(_("value"), max_length=VALUE_LENGTH)

    class Meta:
        verbose_name = _("tag")
        verbose_name_plural = _("tags")
        ordering: ClassVar[list[str]] = ["key"]
        indexes: ClassVar[list[models.Index]] = [
            # The trees that have a tag.
            models.Index(fields=["key", "value", "root"], name="conductor_tag_value"),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            # Also serves the tags of one tree.
            models.UniqueConstraint(fields=["root", "key"], name="conductor_tag_key"),
        ]

    def __str__(self) -> str:
        return f"{self.key}={self.value}"

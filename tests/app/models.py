"""The table in which test tasks leave traces."""

from django.db import models


class Ledger(models.Model):
    """One side effect: what a task did, in which process. Tests count and order the rows."""

    execution_id = models.UUIDField(null=True, db_index=True)
    key = models.CharField(max_length=200, db_index=True)
    value = models.TextField(default="", blank=True)
    pid = models.IntegerField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return f"{self.key}={self.value} (pid {self.pid})"

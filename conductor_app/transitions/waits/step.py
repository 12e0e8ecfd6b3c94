"""What ``ctx.step`` remembers: no wait, since the body's own code decides it. ``recording.record_step`` writes it."""

from __future__ import annotations

from django.utils.translation import gettext as _

from conductor_app.models import Step
from conductor_app.transitions.kinds import Kind, Words


class FunctionKind(Kind):
    """The outcome of a function."""

    is_wait = False
    suspends = False
    is_lasting = True

    def words(self, step: Step) -> Words:
        """Return what is said of a step, which is recorded when it is decided."""
        return Words(begun=_('step "%(step)s" %(status)s'), ends="", waits="", resumes="", what="", then=())


KIND = FunctionKind()

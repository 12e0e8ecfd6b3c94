"""What the kinds of steps do: the interface of ``waits``, which has a module for each.

Whoever moves or tells of a step asks ``of(step.kind)``, and no kind by its name. So a kind stands in one file.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from django.db.models import QuerySet
from django.utils.translation import gettext as _

from conductor_app.models import Execution, Step
from conductor_app.states import StepKind, StepStatus

#: What calls itself for each level of a tree: it yields the calls, and ``reopening`` sends it what they return.
Walk = Generator["Walk", Any, Any]


class Next(Enum):
    """What an execution does when an operator has reopened it, as far as one of its steps has a say."""

    #: This step has none.
    ANYTHING = "anything"
    #: It waits for this step.
    WAIT = "wait"
    #: It runs, whatever the others say: nothing wakes it for this step.
    RUN = "run"


@dataclass(frozen=True)
class Words:
    """What is said of one step, in the reader's language.

    ``telling.waits.values_of`` fills in its columns: ``%(step)s``, ``%(event)s`` (what ``task`` holds), ``%(task)s``
    (the last part of that), ``%(execution)s``, ``%(total)s``, ``%(left)s``, ``%(needed)s``, ``%(limit)s``;
    ``%(time)s``, for how long it waits; and its deadline, if it has one: ``%(instant)s`` and ``%(when)s``.
    """

    #: In the history, when it was opened.
    begun: str
    #: There, at its deadline.
    ends: str
    #: In the headline, for how long its execution waits for what.
    waits: str
    #: What stands there after "It resumes"; empty if that is said already.
    resumes: str
    #: In the admin's panel: what is waited for.
    what: str
    #: What happens when it is decided, in whole sentences.
    then: tuple[str, ...]
    #: What happens at its deadline; empty if that is said already.
    at_deadline: str = ""
    #: What somebody can do to decide it.
    hint: str = ""
    #: What stands in the place of ``%(children)s``.
    children: str = ""


class Kind:
    """One kind of steps; what stands here holds for one that another version has written and this one does not know."""

    #: Whether something else than the body's own code decides it.
    is_wait = True
    #: Whether a run ends for it, and its execution waits until it is decided.
    suspends = True
    #: Whether it stands for one child, whose outcome is its own.
    has_child = False
    #: Whether it stands for many children, each with a position.
    has_children = False
    #: Whether it waits for other steps, whose names it has as its result.
    has_members = False
    #: Whether any one of these decides it, unless it lets failures pass.
    is_decided_by_one = False
    #: Whether its row is locked after that of the step that waits for it, and not before.
    comes_after_group = False
    #: Whether no operator's retry takes back that it has succeeded.
    is_lasting = False
    #: Whether a cancel of its execution decides it, since nobody else will.
    ends_with_execution = False
    #: Whether it waits for an instant alone, which an operator may bring forward.
    is_until_instant = False
    #: How its deadline decides it.
    when_overdue = StepStatus.TIMED_OUT
    #: Whether its end always wakes its execution, and nobody else.
    wakes_alone = False
    #: What its one child that succeeds, or one of its children, writes to the step in the same move; ``None`` if that
    #: takes more than this.
    when_child_succeeds: Mapping[str, Any] | None = None
    #: What its column ``task`` names, and what the code does with that.
    noun, verb = "task", "calls"
    #: The word for an execution that waits for such steps alone, instead of its status.
    status_word = ""

    # What it does. Those that write are called in the transaction that decides.

    def child_ended(self, child: Execution, status: StepStatus, *, error: str | None) -> None:
        """Take note that one of its children has ended."""
        raise NotImplementedError

    def member_failed(
        self,
        execution_id: uuid.UUID,
        name: str,
        status: StepStatus,
        error: str | None,
        *,
        gather: int,
        only_overdue: bool,
        root_id: uuid.UUID | None,
    ) -> bool:
        """Decide a pending step whose failure decides the one that waits for it, too; tell whether it was pending."""
        raise NotImplementedError

    def pass_on(self, step: Step, status: StepStatus, *, error: str | None, root_id: uuid.UUID | None) -> None:
        """Tell whoever waits for a step that has just been decided, and does not suspend."""

    def decided(self, step: Step, *, by: str | None) -> None:
        """Do what follows when a child or a member has just decided a step that counts them; its row is locked.

        Args:
            step: Its key, ``execution_id``, ``name``, ``status``, ``max_failures``, ``counted`` and ``on_timeout``.
            by: The member.
        """

    def cancel_late(self, step: Step) -> None:
        """Cancel what is late, before the step is decided: children come before steps, as everywhere."""

    def note_late(self, step: Step) -> None:
        """Note who was late, after the deadline has decided the step."""

    def reopen(self, execution: Execution, step: Step) -> Walk:
        """Make the step as it has to be for an operator's retry; return a ``Next``."""
        yield from ()
        return Next.WAIT if step.status == StepStatus.PENDING else Next.ANYTHING

    def in_flight(self) -> QuerySet[Any] | None:
        """Return what an undecided step waits for, for a subquery; ``None`` if the audit need not look."""
        return None

    def recount(self, step: Step) -> None:
        """Decide an undecided step that waits for nothing, or mend it; its row is locked. For the audit."""

    # What is said of it.

    def held_by(self, child_id: uuid.UUID | None) -> str:
        """Return what has become of a recorded outcome that is gone."""
        return "has been deleted or changed"

    def named(self, step: Step) -> str:
        """Return in some words what an undecided step waits for, beside its child."""
        return ""

    def words(self, step: Step) -> Words:
        """Return what is said of a step."""
        return Words(
            begun=_('step "%(step)s": waits; no worker is held'),
            ends=_('step "%(step)s" times out'),
            waits=_('Waiting (step "%(step)s") since %(time)s ago. No worker is held.'),
            resumes=_("when that is decided"),
            what=_("What another version waits for."),
            then=(_("It resumes."),),
            at_deadline=_("At %(instant)s (%(when)s) it times out."),
        )


_UNKNOWN = Kind()
_known: dict[str, Kind] = {}


def register(kind: StepKind, does: Kind) -> None:
    """Say what a kind of steps does."""
    _known[kind.value] = does


def of(kind: str) -> Kind:
    """Return what a kind of steps does."""
    return _known.get(kind, _UNKNOWN)


def those(does: Callable[[Kind], bool]) -> list[str]:
    """Return the kinds of which something holds, as they are stored."""
    return [kind for kind, known in _known.items() if does(known)]

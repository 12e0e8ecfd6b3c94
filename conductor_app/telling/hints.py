"""What can be done about an execution, one command or piece of advice each."""

from __future__ import annotations

import sys
from types import ModuleType

from celery import Celery, current_app
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from conductor_app.states import ExecutionStatus, StepStatus
from conductor_app.telling.situation import Situation
from conductor_app.telling.words import quoted, short_name

#: Modules that hold an app for other reasons than to be its place.
_NOT_A_PROJECT = ("__", "celery.", "conductor_app", "django_celery_")


def mismatch_hint(error_class: str) -> tuple[str, ...]:
    """Return what to do if an execution has failed because the code has changed."""
    if short_name(error_class) != "StepMismatch":
        return ()
    return (
        _(
            "The code changed while this execution was in flight. Before it is run again, give the new call a name of "
            "its own, or deploy the old code for as long as such executions are open"
        ),
    )


def retry_hint(situation: Situation) -> tuple[str, ...]:
    """Return how to run an execution again, if its root has not gone on without it."""
    execution = situation.execution
    root = situation.tree.get(execution.root_id, execution)
    if root.status not in (ExecutionStatus.FAILED, ExecutionStatus.CANCELLED):
        return ()  # the root went on without it
    values = {"command": f"manage.py conductor retry {execution.root_id}"}
    kept = [step.name for step in situation.steps if step.status == StepStatus.SUCCEEDED]
    if not kept:
        return (_("Run it again from where it stopped: %(command)s") % values,)
    text = ngettext(
        "Run it again from where it stopped, keeping the result of %(names)s: %(command)s",
        "Run it again from where it stopped, keeping the results of %(names)s: %(command)s",
        len(kept),
    )
    return (text % {**values, "names": quoted(kept)},)


def start_worker(situation: Situation, queue: str) -> str:
    """Return how to start a worker for a queue that has none."""
    return _("Start a worker: %(command)s") % {"command": _worker_command(situation, queue)}


def add_worker(situation: Situation, queue: str) -> str:
    """Return how to start one more worker for a queue whose workers are busy."""
    text = _("If it has to run sooner, start one more worker: %(command)s")
    return text % {"command": _worker_command(situation, queue)}


def _worker_command(situation: Situation, queue: str) -> str:
    return f"celery -A {situation.app or app_to_load()} worker -Q {queue}"


def app_to_load() -> str:
    """Return what ``celery -A`` takes to load the current app: a module or package that has been imported.

    An app's own name is a label that its author has chosen; ``celery -A`` wants the place.
    """
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    name = str(app.main or "")
    if name and _loads(name, app):
        return name
    places = [place for place in list(sys.modules) if not place.startswith(_NOT_A_PROJECT) and _loads(place, app)]
    # Of packages that import it from the module that makes it, the highest.
    found = min(places, key=lambda place: place.count("."), default=name or "project")
    package = found.removesuffix(".celery")
    return package if _loads(package, app) else found


def _loads(place: str, app: object) -> bool:
    """Tell whether ``celery -A place`` finds the app, as ``celery.app.utils.find_app`` would, of imported modules."""
    module = sys.modules.get(place)
    if module is None:
        return False
    names = vars(module)
    for attribute in ("app", "celery"):
        value = names.get(attribute)
        if value is not None and not isinstance(value, ModuleType):
            return value is app
    if "__path__" in names and f"{place}.celery" in sys.modules:
        return _loads(f"{place}.celery", app)
    # By type(): to ask a lazy object for its class may evaluate it.
    return next((value for value in list(names.values()) if issubclass(type(value), Celery)), None) is app

"""What the app plugs in when it is ready: the host's part of the engine, receivers of Celery's signals, log lines."""

from __future__ import annotations

import logging
from typing import Any

from celery import signals as celery_signals
from celery.utils.log import ColorFormatter

from conductor_app import signals
from conductor_app.body.logger import body_logger
from conductor_app.engine.run import RunEnded
from conductor_app.host import durable_runs, ending, ends, inherited, lines, plain_runs, publishing
from conductor_app.store.process import process


def prepare_worker(**kwargs: Any) -> None:
    """Install the sweeper in a worker that starts."""
    # Celery's worker modules are heavy, and web processes never need them.
    from conductor_app.host import bootsteps  # noqa: PLC0415

    bootsteps.install(**kwargs)


def prepare_embedded_worker(sender: Any = None, **_kwargs: Any) -> None:
    """Install the sweeper in a worker that another program starts: Celery's ``start_worker`` does so, for tests."""
    from conductor_app.host import bootsteps  # noqa: PLC0415

    bootsteps.install(instance=sender)


def show_ids(logger: logging.Logger, **_kwargs: Any) -> None:
    """Let a worker show task and id on each line of ``ctx.logger``, as on those of ``get_task_logger``.

    Receiver of ``celery.signals.after_setup_task_logger``. Where somebody else has said how lines are to look, by a
    handler on one of our loggers or on the root, they go there and nowhere else.

    Args:
        logger: Celery's, with the handler that shows them.
    """
    ours = [body_logger, *(logging.getLogger(name) for name in ("conductor_app.execution", "conductor_app"))]
    is_celerys = all(type(handler.formatter) is ColorFormatter for handler in logging.getLogger().handlers)
    if not is_celerys or any(one.handlers or not one.propagate for one in ours):
        return
    # This forgets what it knew of its parents' levels, too.
    body_logger.setLevel(next((one.level for one in ours if one.level), logging.NOTSET))
    body_logger.parent = logger


class SuspensionWording(logging.Filter):
    """Rewords Celery's line for an ended run: it says "ignored" where the execution is suspended."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Reword the record if it is about one of our runs; never drop it."""
        data = getattr(record, "data", None)
        if isinstance(data, dict) and data.get("description") == "ignored":
            ended = RunEnded.describe(str(data.get("exc", "")))
            if ended and isinstance(record.args, dict):
                record.args = {**record.args, "description": ended}
        return True


process.broker = publishing
process.forgetting.append(inherited.forget_brokers)
process.is_told_to_end = ending.is_told_to_end

celery_signals.celeryd_init.connect(prepare_worker, dispatch_uid="conductor_app.worker", weak=False)
celery_signals.worker_init.connect(prepare_embedded_worker, dispatch_uid="conductor_app.worker", weak=False)
celery_signals.worker_process_init.connect(
    plain_runs.guard_pool_process, dispatch_uid="conductor_app.host.plain_runs", weak=False
)
celery_signals.worker_process_init.connect(
    durable_runs.guard_pool_process, dispatch_uid="conductor_app.host.durable_runs", weak=False
)
celery_signals.after_setup_task_logger.connect(show_ids, dispatch_uid="conductor_app.logging", weak=False)
celery_signals.task_postrun.connect(plain_runs.on_postrun, dispatch_uid="conductor_app.host.plain_runs", weak=False)
lines.connect()
signals.execution_finished.connect(ends.tell, dispatch_uid="conductor_app.host.ends", weak=False)
logging.getLogger("celery.app.trace").addFilter(SuspensionWording())

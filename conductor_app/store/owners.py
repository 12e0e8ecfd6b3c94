"""Who holds a lease: ``<worker's node name>/<token>/<process id>``.

Node names and process ids repeat: replicas share a fixed ``-n celery@app``, and in containers every worker's processes
have the same few ids. So each worker makes up a token when it starts, and its pool processes inherit that. A process
that is no worker's has a token of its own, and so has each that is forked from it.

Versions before this one wrote ``<worker's node name>/<process id>``. Such an owner is another worker's to every worker.
"""

from __future__ import annotations

import os
import re
import secrets
import socket

from conductor_app.store.process import process

#: Of the field ``Execution.lease_owner``.
MAX_LENGTH = 255
#: How a worker tells its token to pool processes that are started anew, not forked.
_ENVIRONMENT = "CONDUCTOR_WORKER_TOKEN"
_FORM = re.compile(r"(?P<node>.*?)(?:/(?P<token>[0-9a-f]{8}))?/(?P<pid>[0-9]+)", re.DOTALL)


def begin_worker() -> None:
    """Make up this worker's token, for it and for all processes that it starts."""
    process.workers_token = os.environ[_ENVIRONMENT] = _new_token()


def join_worker() -> None:
    """Take over the token of the worker whose pool process this is."""
    process.workers_token = process.workers_token or os.environ.get(_ENVIRONMENT)


def token() -> str:
    """Return the token of this process's worker, or its own."""
    if process.workers_token is not None:
        return process.workers_token
    if process.own_token is None or process.own_token[0] != os.getpid():
        process.own_token = (os.getpid(), _new_token())
    return process.own_token[1]


def lease_owner(hostname: str | None, pid: int | None = None) -> str:
    """Return the name under which a process holds leases.

    Args:
        hostname: The worker's node name; this machine's if it is not known.
        pid: A process of this worker; this one by default.
    """
    rest = f"/{token()}/{os.getpid() if pid is None else pid}"
    return (hostname or socket.gethostname())[: MAX_LENGTH - len(rest)] + rest


def is_of_this_worker(owner: str, hostname: str | None) -> bool:
    """Tell whether a lease is held by a process of this worker."""
    pid = pid_of(owner)
    return pid is not None and owner == lease_owner(hostname, pid)


def node_name(owner: str) -> str:
    """Return the node name of the worker that holds a lease."""
    found = _FORM.fullmatch(owner)
    return owner if found is None else found["node"]


def worker_of(owner: str) -> str:
    """Return what all processes of one worker, and of no other, have in common."""
    return owner.rpartition("/")[0] or owner


def pid_of(owner: str) -> int | None:
    """Return the process that holds a lease, as its own machine numbers it."""
    found = _FORM.fullmatch(owner)
    return None if found is None else int(found["pid"])


def shown(owner: str) -> str:
    """Return an owner for people: the node name and the process."""
    found = _FORM.fullmatch(owner)
    return owner if found is None else f"{found['node']}/{found['pid']}"


def _new_token() -> str:
    return secrets.token_hex(4)

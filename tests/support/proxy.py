"""Servers that go away: a proxy between a client and a server, and this process's own connection to the broker."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from kombu import pools

from conductor_app import dispatch
from project.celery import app

_DEFAULT_PORTS = {"redis": 6379, "amqp": 5672, "pyamqp": 5672, "postgres": 5432, "mysql": 3306}


class Proxy:
    """Hands bytes through to the server of a URL, while it is open.

    Closed, it ends every connection and refuses new ones, as a server does that was shut down.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or "127.0.0.1", parts.port or _DEFAULT_PORTS[parts.scheme.partition("+")[0]])
        self._listener = _listen(0)
        self._port = self._listener.getsockname()[1]
        credentials = f"{parts.username}:{parts.password}@" if parts.username else ""
        #: The server's URL by way of the proxy.
        self.url = urlunsplit(parts._replace(netloc=f"{credentials}127.0.0.1:{self._port}"))
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._serve()

    def close(self) -> None:
        """Let the server go away."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connected in self._sockets:
                with suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)

    def open(self) -> None:
        """Let it come back, on the same port."""
        self._listener = _listen(self._port)
        self._serve()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server:
            with self._lock:
                self._sockets |= {client, server}
            with suppress(OSError):
                _pump(client, server)
            with self._lock:
                self._sockets -= {client, server}


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    return listener


def _pump(first: socket.socket, second: socket.socket) -> None:
    """Copy bytes both ways until one side ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(first, selectors.EVENT_READ, second)
        selector.register(second, selectors.EVENT_READ, first)
        while True:
            for key, _ in selector.select():
                if not (data := key.fileobj.recv(65_536)):  # type: ignore[union-attr]
                    return
                key.data.sendall(data)


@contextmanager
def broker_at(url: str) -> Iterator[None]:
    """Let this process publish to the broker at ``url``."""
    before = app.conf.broker_write_url
    _reconnect(url)
    try:
        yield
    finally:
        _reconnect(before)


def _reconnect(url: str | None) -> None:
    app.conf.broker_write_url = url
    pools.reset()
    app._pool = app.amqp._producer_pool = None
    dispatch.reset_breaker()

"""Servers that go away: a proxy between a client and a server."""

import random
import re
import selectors
import socket
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit, urlunsplit

_DEFAULT_PORTS = {"redis": 6379, "amqp": 5672, "pyamqp": 5672, "postgres": 5432, "mysql": 3306}
#: What ends a transaction: ``COMMIT``, and the statements that are transactions of their own.
_COMMITS = re.compile(rb"COMMIT|WITH (held|parent|child) AS|SET\s+status = 'running'")


class Proxy:
    """Hands bytes through to the server of a URL, while it is open.

    Closed, it ends every connection and refuses new ones, as a server does that was shut down. Silenced, it takes
    connections and bytes and answers nothing, as a network does that drops packets. Abandoned, the connections that it
    has never say or end anything again, and new ones are served: the address belongs to another host by now.

    Args:
        url: The server's.
        gives_up_after: After so many seconds the kernel of the client of an abandoned connection ends it, as
            ``tcp_user_timeout`` lets it do; never, if not given.
    """

    def __init__(self, url: str, gives_up_after: float | None = None) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or "127.0.0.1", parts.port or _DEFAULT_PORTS[parts.scheme.partition("+")[0]])
        self._listener = _listen(0)
        self._port = self._listener.getsockname()[1]
        credentials = f"{parts.username}:{parts.password}@" if parts.password else ""
        credentials = credentials or (f"{parts.username}@" if parts.username else "")
        #: The server's URL by way of the proxy.
        self.url = urlunsplit(parts._replace(netloc=f"{credentials}127.0.0.1:{self._port}"))
        #: How many of PostgreSQL's commits, from 0 to 1, lose their answer together with the connection. The server has
        #: seen one half of them, and the other half not.
        self.cut_commits = 0.0
        #: How many did.
        self.commits_cut = 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        #: Connections that are older than this are abandoned.
        self._generation = 0
        self._gives_up_after = gives_up_after
        self._is_over = threading.Event()
        self._speaks = threading.Event()
        self._speaks.set()
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

    def silence(self) -> None:
        """Let the server be reached, and never answer."""
        self._speaks.clear()

    def speak(self) -> None:
        """Let it answer again; connections that have asked meanwhile are ended."""
        self._speaks.set()

    def abandon(self) -> None:
        """Never speak again on the connections that are there."""
        self._generation += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.close()
        self.speak()

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
        with client, suppress(OSError), socket.create_connection(self._server) as server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, server}
            try:
                self._pump(client, server)
            finally:
                with self._lock:
                    self._sockets -= {client, server}

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        """Copy bytes both ways until one side ends, or the proxy ends it."""
        generation = self._generation
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    if generation != self._generation:
                        self._is_over.wait(self._gives_up_after)  # nor is an end passed on
                        return
                    if not (data := key.fileobj.recv(65_536)):  # type: ignore[union-attr]
                        return
                    if not self._speaks.is_set():
                        self._speaks.wait()
                        return
                    if key.fileobj is client and _COMMITS.search(data) and random.random() < self.cut_commits:
                        self._cut(server, data)
                        return
                    key.data.sendall(data)

    def _cut(self, server: socket.socket, data: bytes) -> None:
        with self._lock:
            self.commits_cut += 1
            is_seen = self.commits_cut % 2
        if is_seen:
            server.sendall(data)
            server.recv(1)  # it is committed


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    return listener

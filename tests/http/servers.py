"""Real servers on real sockets, and what travels to and from them byte by byte."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from retryproof.http.types import App

SECONDS = 10.0


@contextmanager
def uvicorn_server(app: App, *, http: Any = "h11", **options: Any) -> Iterator[int]:
    """The port on which uvicorn serves the app, on 127.0.0.1, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http=http, log_level="critical", lifespan="on", **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        try:
            _wait_for(port)
            yield port
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive(), "uvicorn did not stop"


def _wait_for(port: int) -> None:
    """The listener takes connections before the server does; an answer says that it serves."""
    assert exchange(port, b"GET /ready HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").startswith(b"HTTP/1.1 ")


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """A TCP connection to a server on this machine."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        yield connection


def request_bytes(
    path: str = "/charges", *, key: str | None = None, body: bytes = b"{}", headers: tuple[str, ...] = ()
) -> bytes:
    """A POST as it travels."""
    lines = [f"POST {path} HTTP/1.1", "host: test", "connection: close", *headers]
    if not any(line.lower().startswith(("content-length:", "transfer-encoding:")) for line in headers):
        lines.append(f"content-length: {len(body)}")
    if key is not None:
        lines.append(f"idempotency-key: {key}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def exchange(port: int, request: bytes) -> bytes:
    """What a server answers to these bytes, up to the end of the connection."""
    with connected(port) as connection:
        connection.sendall(request)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection, however it ends."""
    received = b""
    with suppress(ConnectionError):
        while chunk := connection.recv(65_536):
            received += chunk
    return received


def split(answer: bytes) -> tuple[int, dict[bytes, list[bytes]], bytes]:
    """Status, headers by name, and body of an answer; a chunked body is put together."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers.setdefault(name.lower(), []).append(value.strip())
    if headers.get(b"transfer-encoding") == [b"chunked"]:
        body = _dechunked(body)
    return int(first.split()[1]), headers, body


def ended_cleanly(answer: bytes) -> bool:
    """Whether a chunked answer has its last chunk."""
    return answer.endswith(b"0\r\n\r\n")


def _dechunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        if not size or int(size, 16) == 0:
            break
        whole += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return whole


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something that another thread does is done."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def replay(port: int, path: str, key: str, **options: Any) -> tuple[int, dict[bytes, list[bytes]], bytes]:
    """The replay of an operation, as soon as it is done."""
    found: list[Any] = []

    def is_done() -> bool:
        found[:] = split(exchange(port, request_bytes(path, key=key, **options)))
        return b"idempotency-replayed" in found[1]

    eventually(is_done)
    status, headers, body = found
    return status, headers, body

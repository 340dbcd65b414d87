"""Real receivers: an HTTP server and an SMTP server that keep what they got, each in threads of the test's process."""

import subprocess
import threading
from asyncio import Server
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller


@dataclass
class Request:
    """One that was received whole."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """answer: (status, headers) for a request; 204 unless set."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    answer: Callable[[Request], tuple[int, dict[str, str]]] = lambda request: (204, {})


@contextmanager
def http_receiver() -> Iterator[Receiver]:
    """A server on a free port."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            body = self.rfile.read(length)
            if len(body) < length:  # its sender died half-way: that is no request
                self.close_connection = True
                return
            request = Request(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            receiver.requests.append(request)
            status, headers = receiver.answer(request)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    receiver.url = f"http://127.0.0.1:{server.server_port}/hooks"
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Mailbox:
    """aiosmtpd's handler: keeps (sender, recipients, message); `refuse` gives an answer instead."""

    def __init__(self) -> None:
        self.mails: list[tuple[str, list[str], bytes]] = []
        self.refuse: Callable[[bytes], str | None] = lambda content: None
        self.port = 0

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        answer = self.refuse(envelope.content)
        if answer is not None:
            return answer
        self.mails.append((envelope.mail_from, list(envelope.rcpt_tos), envelope.content))
        return "250 OK"


@contextmanager
def smtp_receiver(**options: Any) -> Iterator[Mailbox]:
    """A server on a free port."""
    mailbox = Mailbox()
    controller = FreePort(mailbox, hostname="127.0.0.1", port=0, **options)
    controller.start()
    mailbox.port = controller.port
    try:
        yield mailbox
    finally:
        controller.stop()


class FreePort(Controller):
    """A controller that learns which port it was given before it tries it."""

    def _trigger_server(self) -> None:
        assert isinstance(self.server, Server)
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()  # type: ignore[no-untyped-call] # aiosmtpd's


def certificate(folder: Path) -> tuple[Path, Path]:
    """A new certificate for localhost, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return cert, key

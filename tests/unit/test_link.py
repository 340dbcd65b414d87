"""The fault link, over real sockets."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from random import Random

import pytest

from retryproof.testing.link import FaultLink


class _Echo(socketserver.StreamRequestHandler):
    """Answers each line with "got <line>", and notes it."""

    server: _Server

    def handle(self) -> None:
        try:
            for line in self.rfile:
                with self.server.changed:
                    self.server.lines.append(line)
                    self.server.changed.notify_all()
                self.wfile.write(b"got " + line)
        except OSError:
            pass


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Echo)
        self.lines: list[bytes] = []
        self.changed = threading.Condition()

    def wait_for(self, count: int) -> list[bytes]:
        with self.changed:
            self.changed.wait_for(lambda: len(self.lines) >= count, timeout=10)
            return list(self.lines)


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture
def link(server: _Server) -> Iterator[FaultLink]:
    with FaultLink("127.0.0.1", server.server_address[1], random=Random(1)) as link:
        yield link


def connect(link: FaultLink) -> socket.socket:
    return socket.create_connection((link.host, link.port), timeout=10)


def ask(link: FaultLink, line: bytes = b"hello\n") -> bytes:
    """What comes back for one line, up to its end or the end of the connection."""
    with connect(link) as connection:
        connection.sendall(line)
        return connection.makefile("rb").readline()


def test_forwards_both_ways(link: FaultLink) -> None:
    assert ask(link) == b"got hello\n"
    assert link.stats["exchanges"] == 1
    assert (link.stats["bytes_to_target"], link.stats["bytes_to_client"]) == (6, 10)


def test_forwards_much_and_a_half_closed_side(link: FaultLink) -> None:
    line = b"x" * 1_000_000 + b"\n"
    with connect(link) as connection:
        connection.sendall(line)
        connection.shutdown(socket.SHUT_WR)
        assert connection.makefile("rb").read() == b"got " + line


def test_refuses_and_opens_the_same_port_again(link: FaultLink) -> None:
    port = link.port
    link.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(link)
    link.heal()
    assert (link.port, ask(link)) == (port, b"got hello\n")


def test_loses_the_reply_of_a_request_that_went_through(link: FaultLink, server: _Server) -> None:
    link.lose_reply(times=1)
    assert ask(link) == b""
    assert server.wait_for(1) == [b"hello\n"]
    assert ask(link) == b"got hello\n"
    assert link.stats["lose_reply"] == 1


def test_loses_a_later_reply_on_a_kept_connection(link: FaultLink, server: _Server) -> None:
    with connect(link) as connection:
        file = connection.makefile("rb")
        connection.sendall(b"one\n")
        assert file.readline() == b"got one\n"
        link.lose_reply()
        connection.sendall(b"two\n")
        assert file.readline() == b""
    assert server.wait_for(2) == [b"one\n", b"two\n"]


def test_cuts_the_reply_after_its_bytes(link: FaultLink) -> None:
    link.cut_after(3)
    assert ask(link) == b"got"
    assert link.stats["cut_after"] == 1


def test_a_cut_lets_a_shorter_reply_pass(link: FaultLink) -> None:
    link.cut_after(10)
    assert ask(link) == b"got hello\n"


def test_cuts_the_request_after_its_bytes(link: FaultLink, server: _Server) -> None:
    link.cut_after(2, direction="request")
    ask(link)
    assert server.wait_for(1) == [b"he"]


def test_a_black_hole_keeps_the_client_waiting(link: FaultLink, server: _Server) -> None:
    link.black_hole()
    with connect(link) as connection:
        connection.sendall(b"hello\n")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    assert server.lines == []


def test_resets_before_the_request_is_forwarded(link: FaultLink, server: _Server) -> None:
    link.reset(times=1)
    with pytest.raises(ConnectionResetError):
        ask(link)
    assert server.lines == []


def test_resets_all_open_connections(link: FaultLink) -> None:
    with connect(link) as connection:
        connection.sendall(b"hello\n")
        assert connection.makefile("rb").readline() == b"got hello\n"
        link.reset_all()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_duplicates_the_request_and_drops_the_second_reply(link: FaultLink, server: _Server) -> None:
    link.duplicate(times=1)
    assert ask(link) == b"got hello\n"
    assert server.wait_for(2) == [b"hello\n", b"hello\n"]


@pytest.mark.parametrize("direction", ["request", "reply"])
def test_delays(link: FaultLink, direction: str) -> None:
    link.delay(0.3, direction="request" if direction == "request" else "reply")
    with connect(link) as connection:
        connection.sendall(b"hello\n")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        assert connection.recv(100) == b"got hello\n"


def test_resets_a_client_whose_target_is_down(link: FaultLink) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        link.target = unused.getsockname()
        with pytest.raises(ConnectionResetError):
            ask(link)


def test_the_same_seed_gives_the_same_faults(server: _Server) -> None:
    def run() -> list[bytes]:
        with FaultLink("127.0.0.1", server.server_address[1], random=Random(5)) as link:
            link.lose_reply(probability=0.5)
            return [ask(link) for _ in range(12)]

    first = run()
    assert first == run()
    assert len(set(first)) == 2


def test_closing_twice_is_harmless_and_a_closed_link_says_so(server: _Server) -> None:
    link = FaultLink("127.0.0.1", server.server_address[1]).start()
    link.close()
    link.close()
    with pytest.raises(RuntimeError, match="not running"):
        link.refuse()


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_refuses_a_probability_that_is_none(link: FaultLink, probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        link.reset(probability=probability)


def test_waits_for_a_count(link: FaultLink) -> None:
    ask(link)
    link.wait_for("exchanges")
    with pytest.raises(TimeoutError, match="exchanges is 1"):
        link.wait_for("exchanges", 2, timeout=0.01)

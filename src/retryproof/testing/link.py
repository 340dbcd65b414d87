"""A TCP proxy with faults, between client, app and store. Its faults can be changed while it runs.

    with FaultLink("127.0.0.1", app_port, random=Random(7)) as link:
        link.lose_reply(probability=0.2)
        httpx.post(f"http://127.0.0.1:{link.port}/charges", …)
        link.heal()

Most faults happen to an **exchange**. It begins with the first bytes that a client sends on a connection, or sends
after a reply. For protocols of request and reply (HTTP/1.1, Redis, PostgreSQL) that is one request or round trip, also
on kept-alive connections; pipelined requests are one exchange.

The link runs on an event loop in a thread of its own, so that sync tests, async tests and other processes can use it.
With a seeded `random`, the same order of exchanges gets the same faults.
"""

from __future__ import annotations

import asyncio
import math
import random as random_module
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

__all__ = ["FaultLink"]

Direction = Literal["request", "reply"]
T = TypeVar("T")

_CHUNK = 65536
_CONTROL_TIMEOUT = 10.0
# How long the copy of a duplicated request waits for its answer before it closes the connection.
_TWIN_TIMEOUT = 30.0


@dataclass(slots=True)
class _Rule:
    """A fault, its probability, and how often it may still happen."""

    name: str
    probability: float
    times: float
    amount: float = 0.0
    direction: Direction = "request"

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError("probability must be between 0 and 1")
        if not (self.times >= 0 and self.amount >= 0):
            raise ValueError("times, seconds and bytes must be zero or more")
        if self.direction not in ("request", "reply"):
            raise ValueError("direction is 'request' or 'reply'")


@dataclass(slots=True)
class _Plan:
    """The faults of one exchange, and how far the exchange has come."""

    delay: float = 0.0
    reply_delay: float = 0.0
    black_hole: bool = False
    reset: bool = False
    lose_reply: bool = False
    twin_delay: float | None = None
    request_left: float = math.inf
    reply_left: float = math.inf

    @classmethod
    def of(cls, rules: list[_Rule]) -> _Plan:
        plan = cls()
        for rule in rules:
            match rule.name, rule.direction:
                case "delay", "request":
                    plan.delay = rule.amount
                case "delay", "reply":
                    plan.reply_delay = rule.amount
                case "cut", "request":
                    plan.request_left = rule.amount
                case "cut", "reply":
                    plan.reply_left = rule.amount
                case "duplicate", _:
                    plan.twin_delay = rule.amount
                case name, _:
                    setattr(plan, name, True)
        return plan


class FaultLink:
    """Forwards `127.0.0.1:port` to a target, with faults. Use it as a context manager, or call `start` and `close`.

    Each fault takes `probability` (for each exchange) and `times` (after which it stops). A second call of a fault
    replaces the first one, and `heal` ends all faults. An exchange may have several faults. Random numbers are drawn in
    the order in which the faults were set. You may call the methods from any thread but the link's own. They return
    when the fault is active.
    """

    def __init__(
        self, target_host: str, target_port: int, *, port: int = 0, random: random_module.Random | None = None
    ) -> None:
        self.target = (target_host, target_port)
        self.host = "127.0.0.1"
        self.port = port
        self._random = random if random is not None else random_module.Random(0)
        self._rules: dict[tuple[str, Direction], _Rule] = {}
        self._stats: Counter[str] = Counter()
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # Faults.

    def refuse(self) -> None:
        """Close the port: new connections are refused, open ones continue. `heal` opens the same port again."""
        self._call(self._stop_listening())

    def black_hole(self, *, probability: float = 1.0, times: float = math.inf) -> None:
        """Accept the request, and forward nothing more on this connection; the client waits."""
        self._inject(_Rule("black_hole", probability, times))

    def delay(
        self, seconds: float, *, direction: Direction = "request", probability: float = 1.0, times: float = math.inf
    ) -> None:
        """Hold the request before it is forwarded, or the reply before its first byte."""
        self._inject(_Rule("delay", probability, times, seconds, direction))

    def cut_after(
        self, size: int, *, direction: Direction = "reply", probability: float = 1.0, times: float = math.inf
    ) -> None:
        """Forward `size` bytes of the request or of the reply, then close both sides. Shorter ones pass unchanged."""
        self._inject(_Rule("cut", probability, times, size, direction))

    def lose_reply(self, *, probability: float = 1.0, times: float = math.inf) -> None:
        """Forward the request, wait for the first bytes of the reply, drop them and close both sides."""
        self._inject(_Rule("lose_reply", probability, times))

    def reset(self, *, probability: float = 1.0, times: float = math.inf) -> None:
        """Answer the request with a TCP reset; nothing is forwarded."""
        self._inject(_Rule("reset", probability, times))

    def duplicate(self, *, after: float = 0.0, probability: float = 1.0, times: float = math.inf) -> None:
        """Send the request's bytes on a second connection too, `after` seconds later; its reply is dropped."""
        self._inject(_Rule("duplicate", probability, times, after))

    def reset_all(self) -> None:
        """Reset every open connection, now, on both sides."""
        self._call(self._reset_all())

    def heal(self) -> None:
        """End all faults, and open the port if it was closed. A connection that forwards nothing stays so."""
        with self._lock:
            self._rules.clear()
        self._call(self._listen())

    @property
    def stats(self) -> dict[str, int]:
        """A copy of the counters; a fault that never happened counts zero.

        `connections`, `exchanges`, `twin_replies`, `bytes_to_target`, `bytes_to_client`, and the faults by the names
        of their methods: a fault counts when it is drawn, `cut_after` when it cuts.
        """
        with self._lock:
            return Counter(self._stats)

    def wait_for(self, name: str, count: int = 1, *, timeout: float = 10.0) -> None:
        """Block until a counter of `stats` reaches `count`; TimeoutError if it does not in time (seconds)."""
        with self._lock:
            if not self._lock.wait_for(lambda: self._stats[name] >= count, timeout):
                raise TimeoutError(f"{name} is {self._stats[name]} after {timeout} s, not {count}")

    @property
    def url(self) -> str:
        """The link as an HTTP base URL."""
        return f"http://{self.host}:{self.port}"

    # Life.

    def start(self) -> Self:
        """Start the thread and open the port; then `port` is known."""
        if self._thread is not None:
            raise RuntimeError("this link was started before; make a new one")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-link", daemon=True)
        self._thread.start()
        try:
            self._call(self._listen())
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Reset open connections and end the thread. A second call does nothing."""
        if self._loop is None or self._thread is None or self._loop.is_closed():
            return
        self._call(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CONTROL_TIMEOUT)
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # For the connections, on the link's event loop.

    def draw(self) -> _Plan:
        """Draw the faults of the next exchange."""
        with self._lock:
            self._stats["exchanges"] += 1
            drawn = [rule for rule in self._rules.values() if self._random.random() < rule.probability and rule.times]
            for rule in drawn:
                rule.times -= 1
                if rule.name != "cut":
                    self._stats[rule.name] += 1
            self._lock.notify_all()
            return _Plan.of(drawn)

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter of `stats`."""
        with self._lock:
            self._stats[name] += amount
            self._lock.notify_all()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task that ends at the latest with the link."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _inject(self, rule: _Rule) -> None:
        with self._lock:
            self._rules[rule.name, rule.direction] = rule

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None or self._loop.is_closed():
            work.close()
            raise RuntimeError("this link is not running")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CONTROL_TIMEOUT)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, self.host, self.port, backlog=1024)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count("connections")
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        # A task of our own, since the tasks of start_server cannot be found and cancelled.
        self.spawn(connection.run()).add_done_callback(lambda _: self._connections.discard(connection))

    async def _reset_all(self) -> None:
        for connection in list(self._connections):
            connection.abort()

    async def _shut_down(self) -> None:
        await self._stop_listening()
        await self._reset_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(eq=False, slots=True)
class _Connection:
    """A client's connection, and its connection to the target."""

    link: FaultLink
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    target: asyncio.StreamWriter | None = None
    plan: _Plan = field(default_factory=_Plan)
    replied: bool = True  # so that the first bytes begin an exchange
    twin: asyncio.Queue[bytes] | None = None

    async def run(self) -> None:
        """Forward both ways until either side or a fault ends it."""
        try:
            target_reader, self.target = await asyncio.open_connection(*self.link.target)
            ways = {asyncio.ensure_future(self._requests()), asyncio.ensure_future(self._replies(target_reader))}
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            # The target is down. The client is connected already, so only a reset can tell it.
            self.abort()
        finally:
            self._close()

    def abort(self) -> None:
        """Reset both sides."""
        for writer in (self.writer, self.target):
            if writer is not None:
                _reset(writer)

    def _close(self) -> None:
        for writer in (self.writer, self.target):
            if writer is not None:
                writer.close()

    async def _requests(self) -> None:
        """Return when the connection has to be closed."""
        while data := await _read(self.reader):
            if self.replied:
                await self._begin_exchange()
            if self.plan.black_hole:
                continue
            if self.plan.reset:
                return self.abort()
            if self.twin is not None:
                self.twin.put_nowait(data)
            data, self.plan.request_left, cut = _limited(data, self.plan.request_left)
            await self._forward(data, self.target, "bytes_to_target")
            if cut:
                return self.link.count("cut_after")
        if self.target is not None and not self.plan.black_hole:
            # The client may close its side and still read.
            self.target.write_eof()
            await asyncio.Event().wait()
        return None

    async def _begin_exchange(self) -> None:
        if self.plan.black_hole:
            return
        self.replied = False
        self.plan = self.link.draw()
        self.twin = None
        if self.plan.twin_delay is not None:
            self.twin = asyncio.Queue()
            self.link.spawn(_send_twin(self.link, self.twin, self.plan.twin_delay))
        if self.plan.delay:
            await asyncio.sleep(self.plan.delay)

    async def _replies(self, reader: asyncio.StreamReader) -> None:
        """Return when the connection has to be closed."""
        while data := await _read(reader):
            plan = self.plan
            if plan.black_hole:
                continue
            if plan.lose_reply:
                return None
            if not self.replied and plan.reply_delay:
                await asyncio.sleep(plan.reply_delay)
            self.replied = True
            data, plan.reply_left, cut = _limited(data, plan.reply_left)
            await self._forward(data, self.writer, "bytes_to_client")
            if cut:
                return self.link.count("cut_after")
        if self.plan.black_hole:
            # The target closed an idle connection; the client has to continue waiting.
            await asyncio.Event().wait()
        return None

    async def _forward(self, data: bytes, writer: asyncio.StreamWriter | None, counter: str) -> None:
        if writer is not None and data:
            self.link.count(counter, len(data))
            writer.write(data)
            await writer.drain()


async def _send_twin(link: FaultLink, chunks: asyncio.Queue[bytes], delay: float) -> None:
    """Send the bytes from the queue on a separate connection, until the target answers."""
    try:
        await asyncio.sleep(delay)
        reader, writer = await asyncio.open_connection(*link.target)
    except OSError:
        return

    async def pour() -> None:
        while True:
            writer.write(await chunks.get())
            await writer.drain()

    pouring = asyncio.ensure_future(pour())
    try:
        async with asyncio.timeout(_TWIN_TIMEOUT):
            if await _read(reader):
                link.count("twin_replies")
    except TimeoutError:
        pass
    finally:
        pouring.cancel()
        writer.close()  # first, so that no cancellation can prevent it
        await asyncio.gather(pouring, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> bytes:
    """The next bytes; none at the end of the connection, with or without an error."""
    try:
        return await reader.read(_CHUNK)
    except OSError:
        return b""


def _limited(data: bytes, left: float) -> tuple[bytes, float, bool]:
    """The part of `data` within the remaining bytes, the remaining bytes after it, and whether data was cut."""
    if len(data) <= left:
        return data, left - len(data), False
    return data[: int(left)], 0, True


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset instead of a normal end."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.is_closing():
        # Linger on, for zero seconds: close sends RST (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

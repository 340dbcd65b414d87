#!/usr/bin/env python3
"""The work of one operation, counted: Python's instructions and calls, the same on a busy machine and on an idle one.

Each subject runs operations in this process, over a store in memory, under a tracer that counts the instructions of
Python code (bytecode) and the functions that are called. Beside ours stands the least that gives the same answers,
written by hand, and the ratio to it. What C code does is not seen, nor how long an instruction takes: this guards
against work that is added, and says little about speed. The tests hold the ratios to LIMITS.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import asyncpg

if __name__ == "__main__":  # the package benchmarks, not the files in it, is what may be imported
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from retryproof import AsyncIdempotency, Idempotency
from retryproof.core.fingerprint import raw
from retryproof.http import by_header
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.stores.forwarding import AsyncForwardingStore
from retryproof.stores.memory import MemoryStore
from retryproof.transaction import Outbox

LIMITS = {
    "engine, new key": 7.3,
    "engine, replay": 7.0,
    "engine in threads, new key": 15.0,
    "engine and lanes, 32 new keys": 8.8,
    "HTTP, new key": 11.6,
    "HTTP, replay": 7.4,
    "outbox, a message": 4.1,
}
"""The most instructions that ours may take, as a multiple of the least by hand: what it took when this was written, and
ten per cent. Lower them when the code gets leaner; a change that raises one has to say why."""
WARM, COUNTED = 20, 10
"""Rounds of operations that fill caches, and rounds that are counted."""

Operation = Callable[[int], Awaitable[None]]


@dataclass(frozen=True)
class Count:
    """Of one operation."""

    instructions: float
    calls: float


class Tracer:
    """Counts the instructions and calls of one thread's Python code."""

    def __init__(self) -> None:
        self.instructions = self.calls = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> Tracer:
        if event == "call":
            self.calls += 1
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            self.instructions += 1
        return self


async def count(operation: Operation, together: int) -> Count:
    """What an operation takes where so many tasks run one each at the same time."""
    for round in range(WARM):
        await asyncio.gather(*(operation(round * together + task) for task in range(together)))
    tracer = Tracer()
    for round in range(WARM, WARM + COUNTED):
        tasks = [asyncio.ensure_future(operation(round * together + task)) for task in range(together)]
        sys.settrace(tracer)
        try:
            await asyncio.wait(tasks)
        finally:
            sys.settrace(None)
        for task in tasks:
            task.result()
    operations = COUNTED * together
    return Count(tracer.instructions / operations, tracer.calls / operations)


async def nothing(number: int) -> None:
    """An operation that does nothing: what the loop and the counting themselves take."""


async def compared(subject: Subject) -> tuple[Count, Count]:
    """What ours and the least by hand take, without what the loop takes for a task."""
    ours, least, idle = [await count(it, subject.together) for it in (subject.ours, subject.least, nothing)]
    return (
        Count(ours.instructions - idle.instructions, ours.calls - idle.calls),
        Count(least.instructions - idle.instructions, least.calls - idle.calls),
    )


class AwaitedMemory(AsyncForwardingStore):
    """The store in memory as one that is awaited, so that commands travel in lanes."""

    def __init__(self) -> None:
        self._calls = MemoryStore()
        self.capabilities = self._calls.capabilities

    async def _make(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return call(*arguments, **options)

    async def aclose(self) -> None:
        """There is nothing to let go of."""


class Answered(asyncpg.Connection):
    """A connection in a transaction whose server does at once what it is told."""

    def __init__(self) -> None:
        self._protocol = None

    def is_closed(self) -> bool:
        return False

    def is_in_transaction(self) -> bool:
        return True

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        return "INSERT 0 1"


# The least that gives the same answers


class Least:
    """Claims and completes by hand: a digest as the id, a nonce as the fence, the result as JSON."""

    def __init__(self) -> None:
        self._records: dict[bytes, list[Any]] = {}

    async def run(self, key: str, fn: Callable[[], Awaitable[Any]], scope: str) -> Any:
        """Run the function, or replay its result."""
        id = hashlib.sha256(b"%d:%b%d:%b" % (len(scope), scope.encode(), len(key), key.encode())).digest()
        record = self._records.get(id)
        if record is not None:
            return json.loads(record[1])
        nonce = os.urandom(16)
        self._records[id] = [nonce, None]
        value = await fn()
        result = json.dumps(value)
        record = self._records[id]
        if record[0] == nonce:
            record[1] = result
        return json.loads(result)


class LeastLayer:
    """A layer by hand for small responses: the caller's header as scope, the whole response kept and replayed."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._records: dict[bytes, list[Any]] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        user = key = b""
        for name, content in scope["headers"]:
            if name == b"idempotency-key":
                key = content
            elif name == b"x-user":
                user = content
        message = await receive()
        path, body = scope["raw_path"], message["body"]
        id = hashlib.sha256(b"%d:%b%d:%b%d:%b" % (len(user), user, len(path), path, len(key), key)).digest()
        fingerprint = hashlib.sha256(b"%b\n%b" % (path, body)).digest()
        record = self._records.get(id)
        if record is not None:
            if record[0] == fingerprint and record[2] is not None:
                for kept in record[2]:
                    await send(kept)
            return
        record = self._records[id] = [fingerprint, os.urandom(16), None]
        sent: list[Any] = []

        async def receive_again() -> Any:
            return message

        async def keep(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive_again, keep)
        record[2] = sent
        for message in sent:
            await send(message)


# What is counted


async def work() -> dict[str, str]:
    """A function's value."""
    return {"paid": "yes"}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """An application without a framework: one body in, one response out."""
    await receive()
    await send({"type": "http.response.start", "status": 201, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b'{"paid": "yes"}'})


def request(layer: Any, key: str) -> Awaitable[None]:
    """One request to an application behind a layer."""
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/charges",
        "raw_path": b"/charges",
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", b"14"),
            (b"x-user", b"alice"),
            (b"idempotency-key", key.encode()),
        ],
    }
    messages = iter([{"type": "http.request", "body": b'{"amount": 10}', "more_body": False}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        return None

    answered: Awaitable[None] = layer(scope, receive, send)
    return answered


def key_of(number: int) -> str:
    """A key as clients make them, of a fixed length."""
    return f"0d5f1c9e-77aa-4c5e-9d0a-{number:012d}"


@dataclass(frozen=True)
class Subject:
    """Ours and the least by hand, each as an operation by number; and how many run together."""

    name: str
    ours: Operation
    least: Operation
    together: int


def subjects() -> list[Subject]:
    """What is counted, made in the running loop."""
    direct, lanes, least = AsyncIdempotency(MemoryStore()), AsyncIdempotency(AwaitedMemory()), Least()
    blocking = Idempotency(MemoryStore())
    layer = IdempotencyMiddleware(app, store=MemoryStore(), scope=by_header("x-user"), fingerprint=raw)
    least_layer = LeastLayer(app)
    outbox, connection = Outbox(), Answered()

    def run(engine: Any, key: Callable[[int], str]) -> Operation:
        async def operation(number: int) -> None:
            await engine.run(key(number), work, scope="charges")

        return operation

    def block(key: Callable[[int], str]) -> Operation:
        async def operation(number: int) -> None:
            blocking.run(key(number), dict, scope="charges")

        return operation

    def ask(layer: Any, key: Callable[[int], str]) -> Operation:
        async def operation(number: int) -> None:
            await request(layer, key(number))

        return operation

    async def add(number: int) -> None:
        await outbox.aadd(connection, topic="orders", payload=b"{}", key=key_of(number))

    async def insert(number: int) -> None:
        await connection.execute("INSERT …", uuid4(), "orders", key_of(number), b"{}")

    def same(number: int) -> str:
        return key_of(0)

    return [
        Subject("engine, new key", run(direct, key_of), run(least, key_of), 1),
        Subject("engine, replay", run(direct, same), run(least, same), 1),
        Subject("engine in threads, new key", block(key_of), run(least, key_of), 1),
        Subject("engine and lanes, 32 new keys", run(lanes, key_of), run(least, key_of), 32),
        Subject("HTTP, new key", ask(layer, key_of), ask(least_layer, key_of), 1),
        Subject("HTTP, replay", ask(layer, same), ask(least_layer, same), 1),
        Subject("outbox, a message", add, insert, 1),
    ]


async def main() -> None:
    """Print the counts, and exit with 1 where a limit is passed."""
    passed = True
    print(f"{'':32}{'ours':>18}{'by hand':>18}{'ratio':>8}{'limit':>8}   (instructions, calls)")
    for subject in subjects():
        ours, least = await compared(subject)
        ratio = ours.instructions / least.instructions
        passed = passed and ratio <= LIMITS[subject.name]
        print(
            f"{subject.name:32}{ours.instructions:>12.0f}{ours.calls:>6.0f}"
            f"{least.instructions:>12.0f}{least.calls:>6.0f}{ratio:>8.2f}{LIMITS[subject.name]:>8.2f}"
        )
    sys.exit(not passed)


if __name__ == "__main__":
    asyncio.run(main())

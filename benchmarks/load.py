"""The load generator, a process of its own: HTTP/1.1 keep-alive over plain protocols, one request a connection.

Prints one JSON object: what was answered, how long it took, which statuses came back.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import cast

import uvloop

BODY = b'{"order":"8f14e45f","amount":4200}'
GRACE_SECONDS = 10.0
_HEAD = (
    b"POST /charges HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nx-user: alice\r\n"
    b"content-length: %d\r\nidempotency-key: " % len(BODY)
)
_TAIL = b"\r\n\r\n" + BODY


class Load:
    """What all connections share: the keys left, the end, the tally."""

    def __init__(self, keys: Iterator[bytes]) -> None:
        self.keys = keys
        self.deadline = 0.0
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []
        self.broken = 0


class Connection(asyncio.Protocol):
    """Sends the next request as soon as the last one is answered."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._buffer = b""
        self._sent_at = 0.0
        self._busy = False
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio.Transport in shape, not by inheritance.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        if not complete(buffer):
            self._buffer = buffer
            return
        self._buffer = b""
        self._busy = False
        load = self._load
        load.statuses[int(buffer[9:12])] += 1
        load.latencies.append(time.perf_counter() - self._sent_at)
        self.send_next()

    def connection_lost(self, error: Exception | None) -> None:
        if self._busy:
            self._load.broken += 1
        if not self.finished.done():
            self.finished.set_result(None)

    def send_next(self) -> None:
        now = time.perf_counter()
        key = next(self._load.keys, None) if now < self._load.deadline else None
        if key is None:
            self._transport.close()
            return
        self._sent_at, self._busy = now, True
        self._transport.write(_HEAD + key + _TAIL)


def complete(buffer: bytes) -> bool:
    """Whether the whole answer has come; at most one is on its way, so a chunked one ends where the buffer ends."""
    head_end = buffer.find(b"\r\n\r\n")
    if head_end < 0:
        return False
    length_at = buffer.find(b"content-length: ", 0, head_end)
    if length_at < 0:
        return buffer.endswith(b"\r\n0\r\n\r\n")
    length = int(buffer[length_at + 16 : buffer.index(b"\r\n", length_at)])
    return len(buffer) >= head_end + 4 + length


def new_keys(prefix: str, count: int) -> Iterator[bytes]:
    encoded = prefix.encode()
    return (b"%b-%d" % (encoded, number) for number in range(count))


def repeated_keys(prefix: str, distinct: int, count: int) -> Iterator[bytes]:
    return itertools.islice(itertools.cycle(list(new_keys(prefix, distinct))), count)


async def generate(port: int, connections: int, keys: Iterator[bytes], seconds: float) -> dict[str, object]:
    """The clock starts when all connections are open."""
    loop = asyncio.get_running_loop()
    load = Load(keys)
    opened = [await loop.create_connection(lambda: Connection(load), "127.0.0.1", port) for _ in range(connections)]
    started = time.perf_counter()
    load.deadline = started + seconds
    for _, protocol in opened:
        protocol.send_next()
    await asyncio.wait([protocol.finished for _, protocol in opened], timeout=seconds + GRACE_SECONDS)
    elapsed = time.perf_counter() - started
    unanswered = sum(not protocol.finished.done() for _, protocol in opened)
    latencies = sorted(load.latencies) or [0.0]
    return {
        "seconds": elapsed,
        "statuses": dict(load.statuses),
        "broken": load.broken + unanswered,
        "p50_ms": 1e3 * latencies[len(latencies) // 2],
        "p99_ms": 1e3 * latencies[len(latencies) * 99 // 100],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--count", type=int, default=1_000_000, help="requests at most")
    parser.add_argument("--prefix", required=True, help="keys are prefix-0, prefix-1, …")
    parser.add_argument("--distinct", type=int, default=0, help="cycle through so many keys; 0: never repeat one")
    options = parser.parse_args()
    if options.distinct:
        keys = repeated_keys(options.prefix, options.distinct, options.count)
    else:
        keys = new_keys(options.prefix, options.count)
    answer = uvloop.run(generate(options.port, options.connections, keys, options.seconds))
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()

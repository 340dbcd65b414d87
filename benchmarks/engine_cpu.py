#!/usr/bin/env python3
"""The processor time of an engine over a store that answers at once, beside the least by hand, in one process.

What is left is the engine's own: key and id, claim, keeper, the function's run, encoding, settling, events. Both run
in turns; the ratio is the median of the turns. And the memory of operations that are in flight, all at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # the package benchmarks, not the files in it, is what may be imported
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.instructions import Least, key_of, work
from retryproof import AsyncIdempotency, Idempotency
from retryproof.core.commands import DONE, Acquired, Claim, Complete
from retryproof.stores.memory import MemoryStore


class Nothing(MemoryStore):
    """Acquires and completes everything, and keeps nothing."""

    def claim(self, claims: Sequence[Claim]) -> Sequence[Any]:
        return [Acquired(1, 1, 1, claim.nonce) for claim in claims]

    def complete(self, commands: Sequence[Complete]) -> Sequence[Any]:
        return [DONE] * len(commands)


async def awaited(run: Callable[[str], Any], count: int) -> float:
    """Seconds of the processor for an operation."""
    began = time.process_time()
    for number in range(count):
        await run(key_of(number))
    return (time.process_time() - began) / count


async def in_flight(operations: int) -> float:
    """Bytes of an operation whose function waits."""
    engine, open_gate = AsyncIdempotency(Nothing()), asyncio.Event()

    async def wait() -> None:
        await open_gate.wait()

    await engine.run("first", work, scope="charges")
    gc.collect()
    tracemalloc.start()
    tasks = [asyncio.ensure_future(engine.run(key_of(number), wait, scope="charges")) for number in range(operations)]
    await asyncio.sleep(0.01)
    size = tracemalloc.get_traced_memory()[0] / operations
    tracemalloc.stop()
    open_gate.set()
    await asyncio.gather(*tasks)
    return size


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    engine, threads, least = AsyncIdempotency(Nothing()), Idempotency(Nothing()), Least()

    async def in_thread(key: str) -> None:
        threads.run(key, dict, scope="charges")

    ways: dict[str, Callable[[str], Any]] = {
        "by hand": lambda key: least.run(key, work, "charges"),
        "engine": lambda key: engine.run(key, work, scope="charges"),
        "engine in threads": in_thread,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.turns):
        least._records.clear()
        for name, run in ways.items():
            found[name].append(await awaited(run, options.count))
    for name, seconds in found.items():
        ratio = median(mine / hand for mine, hand in zip(seconds, found["by hand"], strict=True))
        print(f"{name:20}{ratio:6.2f} of the least by hand{min(seconds) * 1e6:9.2f} µs at best")
    print(f"{'in flight':20}{await in_flight(10_000):6.0f} bytes an operation")


if __name__ == "__main__":
    asyncio.run(main())

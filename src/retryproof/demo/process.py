"""Starts the server, waits until it is killed, and starts it again with the same files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, TypeVar, get_args

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0

Stream = TypeVar("Stream", asyncio.StreamReader, asyncio.StreamWriter)
Moment = Literal["after", "before", "within", "any"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)


@dataclass(frozen=True, slots=True)
class Death:
    """When a server is killed: around its nth charge, or at `any` moment, in seconds.

    `before` the charge is written, `within` its transaction, or `after` the commit and before the response.
    """

    moment: Moment
    count: int = 0
    seconds: float = 0.0


def deaths(random: Random, charges: int) -> list[Death]:
    """A plan of kills at random moments, at least one of each kind, for a run with this number of charges."""
    number = max(4, charges // 30)
    others = [*MOMENTS[1:], *random.choices(MOMENTS, k=number - len(MOMENTS))]
    random.shuffle(others)
    share = max(2, charges // (2 * number))
    return [
        Death(moment, seconds=random.uniform(0.1, 0.5))
        if moment == "any"
        else Death(moment, count=random.randint(1, share))
        # The first one is the kind that a retry cannot detect, so that even a short run has it.
        for moment in (MOMENTS[0], *others)
    ]


class ServerFailed(RuntimeError):
    """The server ended without being killed."""


class Server:
    """A payments API that is killed as planned, and started again each time.

    files: a directory for its ledger. idempotent: whether to use the middleware. moved: called with each new port.
    """

    def __init__(self, files: Path, *, idempotent: bool, moved: Callable[[int], None]) -> None:
        self.database = files / "payments.db"
        self._idempotent = idempotent
        self._log = files / "server.log"
        self._moved = moved
        self.kills: Counter[Moment] = Counter()

    async def live(self, plan: Sequence[Death]) -> None:
        """Run through the planned kills, then stay up until cancelled; leave no process behind."""
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "retryproof.demo.server", stdin=PIPE, stdout=PIPE, stderr=log
            )
        try:
            for death in plan:
                await self._live_once(process, death)
                self.kills[death.moment] += 1
            await self._live_once(process, None)
        finally:
            await stop(process)

    async def _live_once(self, process: Process, death: Death | None) -> None:
        """Run one server to its planned end; raise ServerFailed if it ends in another way."""
        life = {
            "database": str(self.database),
            "idempotent": self._idempotent,
            "dies": death.moment if death else "never",
            "count": death.count if death else 0,
        }
        pipe(process.stdin).write(json.dumps(life).encode() + b"\n")
        async with asyncio.timeout(START_TIMEOUT):
            started = await self._hear(process)
        if "port" not in started:
            raise self._failed(started)
        self._moved(started["port"])
        if death is not None and death.moment == "any":
            await asyncio.sleep(death.seconds)
            # The child is alive, or has failed and was not waited for yet: nobody else can have its id.
            with contextlib.suppress(ProcessLookupError):
                os.kill(started["pid"], signal.SIGKILL)
        ended = await self._hear(process)
        if death is None or ended.get("exit") != -signal.SIGKILL:
            raise self._failed(ended)

    async def _hear(self, process: Process) -> dict[str, int]:
        line = await pipe(process.stdout).readline()
        message: dict[str, int] = json.loads(line or b"{}")
        return message

    def _failed(self, message: dict[str, int]) -> ServerFailed:
        said = self._log.read_text(errors="replace").strip()[-2000:]
        return ServerFailed(f"The demo's server ended by itself (exit code {message.get('exit')}).\n{said}")


async def stop(process: Process) -> None:
    """Close its input, which tells it to end, and make sure that it ends."""
    pipe(process.stdin).close()
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            # Its remaining output must be read; otherwise it could not end.
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()


def pipe(stream: Stream | None) -> Stream:
    """A pipe of the process."""
    if stream is None:
        raise TypeError("the server was started without pipes")
    return stream

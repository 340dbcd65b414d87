"""The same apps called in process, without sockets or a server: what remains is the layer's own processor time."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from benchmarks import serve
from benchmarks.figures.http import HttpSubject
from benchmarks.load import BODY
from benchmarks.measure import Figure, OutOfTime, Pace, Run, Sample, interleave

REQUESTS_TOGETHER = 32
METHOD = (
    f"the ASGI app called in process, {REQUESTS_TOGETHER} requests together, uvloop, no sockets but the store's; "
    "subjects in turn; compare by CPU"
)
_prefixes = itertools.count()
Message = MutableMapping[str, Any]


class CalledApp:
    """One app with its lifespan begun, to be called with one request after another."""

    def __init__(self, subject: HttpSubject) -> None:
        self._app = serve.SUBJECTS[subject.serve](subject.store)
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()

    async def open(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._lifespan = asyncio.create_task(self._app(scope, self._to_app.get, self._from_app.put))
        await self._tell("lifespan.startup")

    async def close(self) -> None:
        await self._tell("lifespan.shutdown")
        await self._lifespan

    async def _tell(self, event: str) -> None:
        await self._to_app.put({"type": event})
        answer = await self._from_app.get()
        if not answer["type"].endswith(".complete"):
            raise RuntimeError(f"{event}: {answer}")

    async def post(self, key: bytes) -> int:
        """The status."""
        status = 0
        unread = True

        async def receive() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": BODY, "more_body": False}
            await asyncio.get_running_loop().create_future()  # a client that stays
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        await self._app(request_scope(key), receive, send)
        return status


def request_scope(key: bytes) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
        "method": "POST", "path": "/charges", "raw_path": b"/charges", "query_string": b"", "root_path": "",
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 50000), "state": {},
        "headers": [
            (b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"x-user", b"alice"),
            (b"content-length", b"%d" % len(BODY)), (b"idempotency-key", key),
        ],
    }  # fmt: skip


def requests(app: CalledApp, keys_of_run: Callable[[], Callable[[], bytes]]) -> Run:
    async def run(seconds: float) -> Sample:
        next_key = keys_of_run()
        good = bad = 0
        cpu, started = time.process_time(), time.perf_counter()

        async def client() -> None:
            nonlocal good, bad
            while time.perf_counter() - started < seconds:
                if await app.post(next_key()) == 201:
                    good += 1
                else:
                    bad += 1

        await asyncio.gather(*(client() for _ in range(REQUESTS_TOGETHER)))
        return Sample(good, time.perf_counter() - started, time.process_time() - cpu, bad)

    return run


def new_keys() -> Callable[[], bytes]:
    prefix, numbers = f"asgi-{os.getpid()}-{next(_prefixes)}", itertools.count()
    return lambda: f"{prefix}-{next(numbers)}".encode()


async def repeated_key(app: CalledApp) -> Callable[[], Callable[[], bytes]]:
    key = new_keys()()
    await app.post(key)
    return lambda: lambda: key


async def figures(subjects: list[HttpSubject], pace: Pace) -> list[Figure]:
    """Of the subjects that run in this interpreter."""
    apps = {subject.name: CalledApp(subject) for subject in subjects if subject.python == sys.executable}
    for app in apps.values():
        await app.open()
    taken: list[Figure] = []
    try:
        runs: Mapping[str, Run] = {name: requests(app, new_keys) for name, app in apps.items()}
        taken.append(await interleave("asgi new", METHOD, runs, pace))
        runs = {name: requests(app, await repeated_key(app)) for name, app in apps.items()}
        taken.append(await interleave("asgi replay", METHOD, runs, pace))
    except OutOfTime:
        pass
    finally:
        for app in apps.values():
            await app.close()
    return taken

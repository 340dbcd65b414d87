"""A TCP link that counts round trips: how often a client speaks after its server has spoken."""

from __future__ import annotations

import asyncio
from typing import Self
from urllib.parse import urlsplit, urlunsplit

CHUNK = 65536


class CountingLink:
    """Listens on a free port and passes everything on to the server of a URL."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self.round_trips = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        user, at, _ = self._parts.netloc.rpartition("@")
        port = self._server.sockets[0].getsockname()[1]
        return urlunsplit(self._parts._replace(netloc=f"{user}{at}127.0.0.1:{port}"))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        # True when the server spoke last: what the client says next begins a round trip.
        turn = [True]
        for source, target, from_client in ((reader, server_writer, True), (server_reader, writer, False)):
            task = asyncio.create_task(self._pass_on(source, target, turn, from_client=from_client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, turn: list[bool], *, from_client: bool
    ) -> None:
        try:
            while data := await source.read(CHUNK):
                if from_client and turn[0]:
                    self.round_trips += 1
                turn[0] = not from_client
                target.write(data)
                await target.drain()
        except ConnectionError:
            pass
        finally:
            target.close()

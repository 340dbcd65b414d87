"""One request's connection to its client, as the app inside the middleware sees it.

`receive` gives the body once. Then it waits for the real disconnect, and reports it when the operation is settled
(H11). An app that learnt of it earlier would stop, and its response would be incomplete. Messages to a client that has
left are dropped, so that the handler runs to its end. If the app has to stop, sending raises an OSError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from retryproof.http.body import Body
from retryproof.http.departed import ClientLeft
from retryproof.http.types import AsgiMessage, Receive, Send

DISCONNECT = "http.disconnect"


class ClientLink:
    """Receives from and sends to one client.

    body: as it was read; bytes when it came in one message.
    left: the client is known to have gone. on_left: called when that is found out, once.
    detached: the server is done with this request; nothing is sent any more.
    tells: whether the app is told that its client has left; otherwise it is when `tell` is called.
    stops: whether the app is to stop when its client leaves: sending raises ClientLeft then.
    """

    # What a link begins with: set where it is otherwise.
    tells = True
    stops = False
    on_left: Callable[[], None] | None = None
    unread = True
    _chunks: Iterator[bytes] | None = None
    _given = 0

    def __init__(self, receive: Receive, send: Send, body: bytes | Body = b"") -> None:
        self._receive = receive
        self._send = send
        self.body = body
        self.left = False
        self.detached = False
        self._watch: asyncio.Future[AsgiMessage] | None = None
        self._telling: asyncio.Future[None] | None = None

    async def receive(self) -> AsgiMessage:
        """The body, then what the server has to say."""
        if self.unread:
            body = self.body
            if isinstance(body, bytes):
                self.unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return self._next_chunk(body)
        watch = self.watch()
        message = watch.result() if watch.done() else await asyncio.shield(watch)
        if message["type"] != DISCONNECT:
            if self._watch is watch:
                self._watch = None
            return message
        if not self.tells:
            if self._telling is None:
                self._telling = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._telling)
        return message

    def _next_chunk(self, body: Body) -> AsgiMessage:
        if self._chunks is None:
            self._chunks = body.chunks()
        chunk = next(self._chunks, b"")
        self._given += len(chunk)
        self.unread = self._given < body.size
        if not self.unread:
            body.close()
        return {"type": "http.request", "body": chunk, "more_body": self.unread}

    def watch(self) -> asyncio.Future[AsgiMessage]:
        """The server's next message, usually the client's departure; received once for all who wait."""
        if self._watch is None:
            self._watch = asyncio.ensure_future(self._receive())
            self._watch.add_done_callback(self._note)
        return self._watch

    def _note(self, watch: asyncio.Future[AsgiMessage]) -> None:
        if not watch.cancelled() and (watch.exception() is not None or watch.result()["type"] == DISCONNECT):
            self._leave()

    def _leave(self) -> None:
        first, self.left = not self.left, True
        if first and self.on_left is not None:
            self.on_left()

    async def send(self, *messages: AsgiMessage) -> None:
        """Send to the client, if it is still there."""
        for message in messages:
            if self.detached:
                return
            if self.left and self.stops:
                raise ClientLeft("The client has left.")
            try:
                await self._send(message)
            except OSError as error:
                self._leave()
                if self.stops:
                    raise ClientLeft("The client has left.") from error

    def stop_without_client(self) -> None:
        """From now on the app is to stop when its client leaves, and is told."""
        self.stops = True
        self.tell()
        self.watch()

    def tell(self) -> None:
        """From now on the app may know that its client has left."""
        self.tells = True
        if self._telling is not None and not self._telling.done():
            self._telling.set_result(None)

    async def stays(self, seconds: float) -> bool:
        """Wait, at most until the client leaves; return whether it is still connected."""
        watch = self.watch()
        if watch.done():
            await asyncio.sleep(seconds)
        else:
            await asyncio.wait({watch}, timeout=seconds)
            if watch.done():
                self._note(watch)
        return not self.left

    def close(self) -> None:
        """Let go of the body and of what is still awaited."""
        if not isinstance(self.body, bytes):
            self.body.close()
        if self._watch is not None:
            self._watch.cancel()
        if self._telling is not None:
            self.tell()

"""One request's connection to its client, as the app behind the layer sees it.

The body that was read is given once; after it, `receive` waits for the real disconnect (H11). What is sent to a client
that has left is dropped while the response can still be stored whole, so that the handler runs to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from retryproof.http.body import Body
from retryproof.http.types import Message, Receive, Send

DISCONNECT = "http.disconnect"


class ClientLink:
    """Receives from and sends to one client.

    body: as it was read; bytes when it came in one message.
    left: the client is known to have gone.
    detached: the server is done with this request; nothing is sent any more.
    keeps_going: whether the response goes on without its client; otherwise sending to one that left is an OSError.
    """

    __slots__ = (
        "_chunks",
        "_given",
        "_receive",
        "_receiving",
        "_send",
        "_unread",
        "_watch",
        "body",
        "detached",
        "keeps_going",
        "left",
    )

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._chunks: Iterator[bytes] | None = None
        self._given = 0
        self._receiving = 0
        self._unread = True
        self._watch: asyncio.Future[Message] | None = None
        self.body: bytes | Body = b""
        self.left = False
        self.detached = False
        self.keeps_going = True

    def whole_body(self) -> bytes:
        """All of the body, in memory."""
        return self.body if isinstance(self.body, bytes) else self.body.read()

    def body_size(self) -> int:
        """Bytes of the body."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.size

    def body_chunks(self) -> Iterable[bytes]:
        """The body in order."""
        return (self.body,) if isinstance(self.body, bytes) else self.body.chunks()

    async def receive(self) -> Message:
        """The body, then what the server has to say."""
        if self._unread:
            return self._next_chunk()
        if self._watch is not None:
            return await self._from_watch(self._watch)
        self._receiving += 1
        try:
            message = await self._receive()
        finally:
            self._receiving -= 1
        if message["type"] == DISCONNECT:
            self.left = True
        return message

    def _next_chunk(self) -> Message:
        body = self.body
        if isinstance(body, bytes):
            self._unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        if self._chunks is None:
            self._chunks = body.chunks()
        chunk = next(self._chunks, b"")
        self._given += len(chunk)
        self._unread = self._given < body.size
        if not self._unread:
            body.close()
        return {"type": "http.request", "body": chunk, "more_body": self._unread}

    async def _from_watch(self, watch: asyncio.Future[Message]) -> Message:
        message = watch.result() if watch.done() else await asyncio.shield(watch)
        if message["type"] == DISCONNECT:
            self.left = True
        elif self._watch is watch:
            self._watch = None
        return message

    async def send(self, message: Message) -> None:
        """Send to the client, if it is still there."""
        if self.detached:
            return
        if self._watch is not None and self._watch.done():
            self._note(self._watch)
        if self.left and not self.keeps_going:
            raise OSError("The client has left.")
        try:
            await self._send(message)
        except OSError:
            self.left = True
            if not self.keeps_going:
                raise

    def stop_without_client(self) -> None:
        """From now on the response ends when its client leaves: nothing of it can be stored."""
        self.keeps_going = False
        if self._watch is None and not self._receiving:
            self._watch = asyncio.ensure_future(self._receive())

    async def stays(self, seconds: float) -> bool:
        """Wait; whether the client is still there. Ends early when it leaves."""
        if self._watch is None:
            self._watch = asyncio.ensure_future(self._receive())
        if self._watch.done():
            await asyncio.sleep(seconds)
        else:
            await asyncio.wait({self._watch}, timeout=seconds)
        if self._watch.done():
            self._note(self._watch)
        return not self.left

    def _note(self, watch: asyncio.Future[Message]) -> None:
        if watch.cancelled() or watch.exception() is not None or watch.result()["type"] == DISCONNECT:
            self.left = True

    def close(self) -> None:
        """Let go of the body and of what is still awaited."""
        if not isinstance(self.body, bytes):
            self.body.close()
        if self._watch is not None:
            self._watch.cancel()

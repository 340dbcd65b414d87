"""One connection of an event loop to the server, with one request on its way at a time.

redis-py makes the connection: it knows addresses, certificates and passwords. Where hiredis is installed, what is sent
and answered after that goes by a protocol of the store's own: a call over redis-py's streams, in a time-out context,
takes the client twice as long, and each batch of a lane is a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol, cast

from redis.asyncio.connection import DefaultParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, NoScriptError, RedisError

from retryproof.stores.lanes.alarm import NEVER, Alarm
from retryproof.stores.lanes.replies import clock
from retryproof.stores.redis.protocol import RedisReply
from retryproof.stores.redis.wire import Reader


class Connection(Protocol):
    """redis-py's, as much of it as is used."""

    async def connect(self) -> None: ...
    async def send_packed_command(self, command: Sequence[bytes], check_health: bool) -> None: ...
    async def read_response(self) -> RedisReply: ...
    async def disconnect(self, nowait: bool = False) -> None: ...


class Link(Protocol):
    """A connection that is made."""

    def ask(self, command: bytes, deadline: float) -> Awaitable[RedisReply]:
        """The answer to a packed command; an error of the server's may be an answer, or raised.

        deadline: by `time.monotonic`; after it TimeoutError. A caller that gets no answer must close the connection.
        """

    async def close(self, nowait: bool = False) -> None:
        """Close the connection; nowait: without waiting until it is."""


async def connected(connection: Connection, deadline: float) -> Link:
    """Connect by this deadline."""
    try:
        async with asyncio.timeout(deadline - clock()):
            await connection.connect()
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    writer = getattr(connection, "_writer", None)  # not public; without it the streams serve as well
    if Reader is None or not isinstance(writer, asyncio.StreamWriter):
        return _Streams(connection)
    return _Direct(connection, cast("asyncio.Transport", writer.transport))


class _Streams:
    """Over redis-py's streams."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def ask(self, command: bytes, deadline: float) -> RedisReply:
        async with asyncio.timeout(deadline - clock()):
            await self._connection.send_packed_command([command], check_health=False)
            try:
                return await self._connection.read_response()
            except NoScriptError as error:
                return error

    async def close(self, nowait: bool = False) -> None:
        await self._connection.disconnect(nowait=nowait)


class _Direct(asyncio.Protocol):
    """Over the transport that redis-py has connected. Answers come in whole, and nothing comes unasked (RESP2)."""

    def __init__(self, connection: Connection, transport: asyncio.Transport) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._transport = transport
        self._reader: Any = cast("Any", Reader)(protocolError=InvalidResponse, replyError=DefaultParser.parse_error)
        self._answer: asyncio.Future[RedisReply] | None = None  # awaited
        self._deadline = NEVER
        self._alarm = Alarm(self._loop, self._expire)
        self._lost = False
        self._streams = transport.get_protocol()
        transport.set_protocol(self)

    def ask(self, command: bytes, deadline: float) -> asyncio.Future[RedisReply]:
        if self._lost:
            raise RedisConnectionError(_CLOSED)
        answer: asyncio.Future[RedisReply] = self._loop.create_future()
        self._answer, self._deadline = answer, deadline
        self._alarm.wake_by(deadline)
        self._transport.write(command)
        return answer

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            reply = self._reader.gets()
        except RedisError as error:
            self._break_off(error)
            return
        if reply is False:  # more is to come
            return
        if self._answer is None or self._reader.has_data():  # what is left would answer the next call
            self._break_off(InvalidResponse("something that was not asked for"))
            return
        self._tell(reply)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self._streams.connection_lost(error)  # redis-py waits for this when it closes
        self._tell(RedisConnectionError(_CLOSED))

    def _expire(self) -> float:
        if self._answer is None:
            return NEVER
        if self._deadline > clock():
            return self._deadline
        self._break_off(TimeoutError())
        return NEVER

    def _break_off(self, error: Exception) -> None:
        """Nothing that still comes over this connection is an answer."""
        self._tell(error)
        self._transport.abort()

    def _tell(self, reply: RedisReply) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():  # an error too: as an exception it would have to be fetched
            answer.set_result(reply)

    async def close(self, nowait: bool = False) -> None:
        await self._connection.disconnect(nowait=nowait)


_CLOSED = "Connection closed by server."

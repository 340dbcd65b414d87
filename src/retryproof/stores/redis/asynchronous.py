"""The store for an event loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.connection import Connection as TcpConnection
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from retryproof.core.commands import Checkpoint, Claim, ClaimReply, Complete, FenceReply, Release, Renew
from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.core.record import Record, State
from retryproof.stores.base import Batch, Reaped
from retryproof.stores.lanes.replies import clock
from retryproof.stores.redis.blocking import RedisStore
from retryproof.stores.redis.link import Connection, Link, connected
from retryproof.stores.redis.protocol import CAPABILITIES, Plan, Protocol, Reply, Request
from retryproof.stores.redis.settings import Settings
from retryproof.stores.redis.wire import pack, unavailable

T = TypeVar("T")

_CONNECTIONS = {"tcp": TcpConnection, "tls": SSLConnection, "unix": UnixDomainSocketConnection}


class AsyncRedisStore:
    """Records in Redis or Valkey, for one event loop: each call in flight has a connection.

    The options are RedisStore's; `timeout` is for a whole call. Cancelled, a call may have been done.
    """

    capabilities = CAPABILITIES

    def __init__(self, url_or_client: str | Redis, *, prefix: str = "retryproof", timeout: float = 2.0) -> None:
        self._settings = Settings.of(url_or_client, Redis, prefix, timeout)
        self._protocol = Protocol(self._settings.prefix)
        self._idle: list[Link] = []
        self._closed = False
        try:
            self._connection()
        except (TypeError, ValueError, RedisError) as error:
            raise ConfigurationError(f"redis-py refuses these options: {error}") from error

    async def claim(self, claims: Sequence[Claim]) -> Batch[ClaimReply]:
        return await self.perform(self._protocol.claim(claims))

    async def complete(self, commands: Sequence[Complete]) -> Batch[FenceReply]:
        return await self.perform(self._protocol.settle(commands))

    async def release(self, commands: Sequence[Release]) -> Batch[FenceReply]:
        return await self.perform(self._protocol.settle(commands))

    async def renew(self, commands: Sequence[Renew]) -> Batch[FenceReply]:
        return await self.perform(self._protocol.renew(commands))

    async def checkpoint(self, commands: Sequence[Checkpoint]) -> Batch[FenceReply]:
        return await self.perform(self._protocol.checkpoint(commands))

    async def get(self, ids: Sequence[bytes]) -> Sequence[Record | None]:
        return await self.perform(self._protocol.get(ids))

    async def scan(
        self,
        *,
        prefix: bytes = b"",
        state: State | None = None,
        tenant: bytes | None = None,
        after: bytes = b"",
        limit: int = 100,
    ) -> Sequence[Record]:
        """A page, without results and checkpoints; each page looks at all keys of the database."""
        return await self.perform(
            self._protocol.scan(prefix=prefix, state=state, tenant=tenant, after=after, limit=limit)
        )

    async def evict(self, ids: Sequence[bytes]) -> Sequence[bool]:
        return await self.perform(self._protocol.evict(ids))

    async def reap(self, limit: int = 1_000, told: Sequence[Record] = ()) -> Reaped:
        return await self.perform(self._protocol.reap(limit, told))

    def keeper(self) -> RedisStore:
        """A blocking store over the same records."""
        return RedisStore.with_settings(self._settings)

    async def aclose(self) -> None:
        self._closed = True
        while self._idle:
            await self._idle.pop().close()

    async def perform(self, plan: Plan[T]) -> T:
        """Send a plan's requests, and give its own answer."""
        try:
            request = next(plan)
            while True:
                try:
                    reply = await self._send(request)
                except StoreUnavailable as error:
                    request = plan.throw(error)
                else:
                    request = plan.send(reply)
        except StopIteration as end:
            return cast("T", end.value)

    async def _send(self, request: Request) -> Reply:
        deadline = clock() + self._settings.timeout
        try:
            if request.repeatable and self._idle:
                try:
                    return await self._exchange(self._idle.pop(), request, deadline)
                except RedisConnectionError:
                    pass  # closed while it was idle, by a restart say
            return await self._exchange(await connected(self._connection(), deadline), request, deadline)
        except TimeoutError as error:
            raise StoreUnavailable(f"Redis has given no answer within {self._settings.timeout:g} s") from error
        except RedisError as error:
            raise unavailable(error) from error

    async def _exchange(self, link: Link, request: Request, deadline: float) -> Reply:
        reply = None
        try:
            for arguments in request.forms():
                reply = await link.ask(pack(arguments), deadline)
                if not isinstance(reply, NoScriptError):
                    break
            if isinstance(reply, Exception):
                raise reply
        except BaseException:
            await link.close(nowait=True)
            raise
        if self._closed:
            await link.close(nowait=True)
        else:
            self._idle.append(link)
        return reply

    def _connection(self) -> Connection:
        # Without a socket_timeout redis-py makes no task to send in; the whole call has one of its own.
        options = self._settings.connection_options(Retry(NoBackoff(), 0), None)
        return cast("Connection", _CONNECTIONS[self._settings.transport](**options))

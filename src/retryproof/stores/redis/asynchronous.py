"""The store for an event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.connection import Connection as TcpConnection
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from retryproof.core.errors import ConfigurationError, StoreUnavailable
from retryproof.drive import apump
from retryproof.stores.forwarding import AsyncForwardingStore
from retryproof.stores.lanes.replies import clock
from retryproof.stores.redis.blocking import RedisStore
from retryproof.stores.redis.link import Connection, Link, connected
from retryproof.stores.redis.protocol import CAPABILITIES, Plan, Protocol, RedisReply, RedisRequest
from retryproof.stores.redis.settings import Settings
from retryproof.stores.redis.wire import unavailable

T = TypeVar("T")

_CONNECTIONS = {"tcp": TcpConnection, "tls": SSLConnection, "unix": UnixDomainSocketConnection}


class AsyncRedisStore(AsyncForwardingStore):
    """Records in Redis or Valkey, for one event loop: each call in flight has a connection.

    The options are RedisStore's; `timeout` is for a whole call. Cancelled, a call may have been done.
    """

    capabilities = CAPABILITIES

    def __init__(self, url_or_client: str | Redis, *, prefix: str = "retryproof", timeout: float = 2.0) -> None:
        self._settings = Settings.of(url_or_client, Redis, prefix, timeout)
        self._calls = Protocol(self._settings.prefix)
        self._idle: list[Link] = []
        self._closed = False
        try:
            self._connection()
        except (TypeError, ValueError, RedisError) as error:
            raise ConfigurationError(f"redis-py refuses these options: {error}") from error

    async def _make(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return await self.perform(call(*arguments, **options))

    def keeper(self) -> RedisStore:
        """A blocking store over the same records."""
        return RedisStore.with_settings(self._settings)

    async def aclose(self) -> None:
        self._closed = True
        while self._idle:
            await self._idle.pop().close()

    async def perform(self, plan: Plan[T]) -> T:
        """Send a plan's requests, and give its own answer."""
        return await apump(plan, self._send)

    async def _send(self, request: RedisRequest) -> RedisReply:
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

    async def _exchange(self, link: Link, request: RedisRequest, deadline: float) -> RedisReply:
        reply = None
        try:
            for command in request.forms():
                reply = await link.ask(command, deadline)
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

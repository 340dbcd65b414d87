"""The store for threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast
from typing import Protocol as Interface

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from retryproof.core.errors import ConfigurationError
from retryproof.drive import pump
from retryproof.stores.forwarding import ForwardingStore
from retryproof.stores.redis.protocol import CAPABILITIES, Plan, Protocol, RedisReply, RedisRequest
from retryproof.stores.redis.settings import Settings
from retryproof.stores.redis.wire import unavailable

T = TypeVar("T")

_CONNECTIONS = {"tcp": Connection, "tls": SSLConnection, "unix": UnixDomainSocketConnection}


class _Connection(Interface):
    def connect(self) -> None: ...
    def send_packed_command(self, command: Sequence[bytes], check_health: bool) -> None: ...
    def read_response(self) -> RedisReply: ...
    def disconnect(self) -> None: ...


class RedisStore(ForwardingStore):
    """Records in Redis or Valkey, for any number of threads: each call in flight has a connection.

    url_or_client: the server. A client gives its address, login and TLS options. The store makes connections of its own
        with them. It does not use the client, its decoding or its retries, and does not close it.
    prefix: of all keys; also a URL's option.
    timeout: seconds that connecting, and then waiting for an answer, may take; also a URL's option.
    """

    capabilities = CAPABILITIES

    def __init__(self, url_or_client: str | Redis, *, prefix: str = "retryproof", timeout: float = 2.0) -> None:
        self._open(Settings.of(url_or_client, Redis, prefix, timeout))

    @classmethod
    def with_settings(cls, settings: Settings) -> RedisStore:
        """A store that reaches the server in the same way as another."""
        store = cls.__new__(cls)
        store._open(settings)
        return store

    def _open(self, settings: Settings) -> None:
        self._settings = settings
        self._calls = Protocol(settings.prefix)
        self._idle: list[_Connection] = []
        self._closed = False
        try:
            self._connection()
        except (TypeError, ValueError, RedisError) as error:
            raise ConfigurationError(f"redis-py refuses these options: {error}") from error

    def _make(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self.perform(call(*arguments, **options))

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().disconnect()

    def perform(self, plan: Plan[T]) -> T:
        """Send what a plan asks for, and give it the answers."""
        return pump(plan, self._send)

    def _send(self, request: RedisRequest) -> RedisReply:
        try:
            kept = self._kept() if request.repeatable else None
            if kept is not None:
                try:
                    return self._exchange(kept, request)
                except RedisConnectionError:
                    pass  # closed while it was idle, by a restart say
            return self._exchange(self._connection(), request)
        except RedisError as error:
            raise unavailable(error) from error

    def _exchange(self, connection: _Connection, request: RedisRequest) -> RedisReply:
        reply = None
        try:
            for command in request.forms():
                connection.send_packed_command([command], check_health=False)
                try:
                    reply = connection.read_response()
                    break
                except NoScriptError:
                    continue
        except BaseException:
            connection.disconnect()
            raise
        if self._closed:
            connection.disconnect()
        else:
            self._idle.append(connection)
        return reply

    def _kept(self) -> _Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _connection(self) -> _Connection:
        options = self._settings.connection_options(Retry(NoBackoff(), 0), self._settings.timeout)
        return cast("_Connection", _CONNECTIONS[self._settings.transport](**options))

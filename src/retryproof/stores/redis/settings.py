"""How to reach the server: one description for both colours, from a URL or from a client of the caller's.

The store makes connections of its own, so that no retry, decoding, health check or replica of a client gets between
it and the server: a time-out has to mean that what was asked may have been done, once (C3).
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.connection import Connection as AsyncConnection
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection
from redis.asyncio.connection import UnixDomainSocketConnection as AsyncUnixConnection
from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection

from retryproof.core.errors import ConfigurationError

Transport = Literal["tcp", "tls", "unix"]

_TRANSPORTS: Mapping[type, Transport] = {
    Connection: "tcp",
    SSLConnection: "tls",
    UnixDomainSocketConnection: "unix",
    AsyncConnection: "tcp",
    AsyncSSLConnection: "tls",
    AsyncUnixConnection: "unix",
}

_TAKEN_OVER = {"host", "port", "path", "db", "username", "password", "credential_provider", "client_name"} | {
    f"socket_{name}" for name in ("keepalive", "keepalive_options", "read_size", "type")
}
"""What is taken over from a client, beside its ssl_ options; the rest is the store's own choice."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the server is, and the options of redis-py's connections."""

    transport: Transport
    options: Mapping[str, Any] = field(repr=False)  # with the password
    prefix: str
    timeout: float

    @classmethod
    def of(cls, source: object, client_class: type[Redis | AsyncRedis], prefix: str, timeout: float) -> Settings:
        """From a URL, or from a client of the store's own colour."""
        if isinstance(source, str):
            return cls._from_url(source, prefix, timeout)
        return cls._from_client(source, client_class, prefix, timeout)

    @classmethod
    def _from_url(cls, url: str, prefix: str, timeout: float) -> Settings:
        address, _, query_text = url.partition("?")
        query = dict(parse_qsl(query_text, keep_blank_values=True))
        prefix, timeout = query.pop("prefix", prefix), _seconds(query.pop("timeout", timeout))
        try:
            pool = ConnectionPool.from_url(f"{address}?{urlencode(query)}")
        except ValueError as error:
            raise ConfigurationError(f"the Redis URL makes no sense: {error}") from error
        return cls._of_pool(pool, dict(pool.connection_kwargs), prefix, timeout)

    @classmethod
    def _from_client(
        cls, client: object, client_class: type[Redis | AsyncRedis], prefix: str, timeout: float
    ) -> Settings:
        if not isinstance(client, client_class):
            module = client_class.__module__.removesuffix(".client")
            raise ConfigurationError(
                f"a Redis URL or a {module}.Redis client is needed, not {type(client).__module__}."
                f"{type(client).__qualname__}; RedisStore takes redis.Redis, AsyncRedisStore redis.asyncio.Redis"
            )
        pool = client.connection_pool
        if pool.connection_kwargs.get("redis_connect_func") is not None:
            raise ConfigurationError("a client with a redis_connect_func cannot be taken over; pass a URL")
        options = {
            name: value
            for name, value in pool.connection_kwargs.items()
            if name in _TAKEN_OVER or name.startswith("ssl_")
        }
        return cls._of_pool(pool, options, prefix, _seconds(timeout))

    @classmethod
    def _of_pool(cls, pool: Any, options: dict[str, Any], prefix: str, timeout: float) -> Settings:
        transport = _TRANSPORTS.get(pool.connection_class)
        if transport is None:
            raise ConfigurationError(
                f"connections of {pool.connection_class.__qualname__} are not supported: the store must talk to one "
                "master; pass a redis://, rediss:// or unix:// URL"
            )
        if not prefix:
            raise ConfigurationError("the prefix of the store's keys must not be empty")
        if transport == "tls" and options.get("ssl_cert_reqs", "required") in ("required", ssl.CERT_REQUIRED):
            options.setdefault("ssl_check_hostname", True)  # redis-py 5 takes a certificate of any host otherwise
        return cls(transport, options, prefix, timeout)

    def connection_options(self, retry: object, socket_timeout: float | None) -> dict[str, Any]:
        """The keyword arguments of a connection, with everything off that would repeat, decode or redirect."""
        return {
            **self.options,
            "retry": retry,  # of no retries: redis-py 8 makes ten by default
            "retry_on_error": [],
            "retry_on_timeout": False,
            "health_check_interval": 0,
            "decode_responses": False,
            "protocol": 2,  # no HELLO to wait for, and no push messages between the replies
            "socket_timeout": socket_timeout,
            "socket_connect_timeout": self.timeout,
        }


def _seconds(value: str | float) -> float:
    try:
        seconds = float(value)
    except ValueError as error:
        raise ConfigurationError(f"the store's timeout must be seconds, not {value!r}") from error
    if not 0 < seconds < float("inf"):
        raise ConfigurationError(f"the store's timeout must be more than 0 seconds, not {seconds:g}")
    return seconds

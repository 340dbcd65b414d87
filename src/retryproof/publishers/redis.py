"""Redis Streams: each message is an entry with the fields id, topic, payload, and optionally key, headers, …

Redis makes the entry's own id, which differs on a resend. Consumers have to use the field `id`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import Message
from retryproof.publishers.base import DELIVERED, UNTRIED, Batch, Failed, Outcome, described
from retryproof.publishers.destination import identity

TIMEOUT = 5.0
_ABOUT_THE_ENTRY = ("WRONGTYPE", "ERR")
"""Errors about an entry or its stream; others (OOM, READONLY, LOADING, NOPERM, …) are about the server."""


class RedisStreamPublisher:
    """Appends to a stream. A batch is one MULTI, so that all of it is appended, or nothing.

    stream: its name, or None for a stream with the name of the topic. max_length: entries to keep, approximately.
    """

    max_payload: int | None = 512 << 20

    def __init__(
        self, url: str, stream: str | None = None, *, max_length: int | None = None, timeout: float = TIMEOUT
    ) -> None:
        self._stream = stream
        self.destination = f"{identity(url, query=False)}{stream or ''}"
        self._max_length = max_length
        # The client does not retry: the relay decides whether a batch arrived.
        tls = {"ssl_check_hostname": True} if checks_hostname(url) else {}  # redis-py 5 does not by itself
        self._client = Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0), **tls
        )

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        """Append the messages in their order."""
        if not batch.live():
            return [UNTRIED] * len(batch.messages)
        pipeline = self._client.pipeline(transaction=True)
        for message in batch.messages:
            pipeline.xadd(self._stream or message.topic, fields(message), maxlen=self._max_length)
        try:
            answers = await pipeline.execute(raise_on_error=False)
        except RedisError as error:
            return [Failed(described(error), kind="unreachable")] * len(batch.messages)
        return [_judge(answer) for answer in answers]

    async def close(self) -> None:
        """Close the connection."""
        await self._client.aclose()


def checks_hostname(url: str) -> bool:
    """Whether to check that the server's certificate is for the URL's host: with TLS, unless the URL says otherwise."""
    options = dict(parse_qsl(urlsplit(url).query))
    return url.startswith("rediss://") and not {"ssl_check_hostname", "ssl_cert_reqs"} & set(options)


def _judge(answer: object) -> Outcome:
    if not isinstance(answer, RedisError):
        return DELIVERED
    text = str(answer)
    about = isinstance(answer, ResponseError) and text.startswith(_ABOUT_THE_ENTRY)
    return Failed(described(answer), kind="answer" if about else "unreachable")


def fields(message: Message) -> dict[Any, Any]:
    """An entry's fields."""
    kept = {
        "id": str(message.id),
        "topic": message.topic,
        "payload": message.payload,
        "key": message.key,
        "content-type": message.content_type,
        "traceparent": message.trace,
        "headers": json.dumps(dict(message.headers)) if message.headers else None,
    }
    return {name: value for name, value in kept.items() if value is not None}


def from_url(url: str, *, timeout: float = TIMEOUT, public_only: bool = False) -> RedisStreamPublisher:
    """The publisher of redis://host:6379/stream or redis://host:6379/0/stream, with an optional ?maxlen=."""
    if public_only:
        raise ConfigurationError("public_only is for webhooks; a stream's address is not looked at.")
    parts = urlsplit(url)
    path = [unquote(part) for part in parts.path.split("/") if part]
    database = path.pop(0) if len(path) == 2 else "0"
    options = dict(parse_qsl(parts.query))
    maxlen = options.pop("maxlen", None)
    if len(path) != 1 or not database.isdigit() or not (maxlen is None or maxlen.isdigit()):
        raise ConfigurationError(
            "A stream's URL is redis://host:6379/stream or redis://host:6379/0/stream?maxlen=1000."
        )
    server = urlunsplit(parts._replace(path=f"/{database}", query=urlencode(options)))
    return RedisStreamPublisher(server, path[0], max_length=int(maxlen) if maxlen else None, timeout=timeout)

"""HTTP webhooks, signed according to Standard Webhooks (https://www.standardwebhooks.com).

    webhook-id: the message's id, the same on every resend      webhook-timestamp: seconds, of this attempt
    webhook-signature: v1,base64(HMAC-SHA256(secret, id.timestamp.body)), one for each secret, with spaces between

Redirects are not followed: a receiver must not send messages elsewhere. With `public_only`, each host name is resolved
here, and refused unless all its addresses are public. Then one of exactly these addresses is used for the connection,
so that the name cannot point elsewhere in between.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from retryproof.core.address import check_address
from retryproof.core.errors import ConfigurationError
from retryproof.core.message import Message
from retryproof.publishers.base import CONCURRENCY, DELIVERED, Batch, Failed, Outcome, described, one_by_one
from retryproof.publishers.destination import identity

SECRET_VARIABLE = "RETRYPROOF_WEBHOOK_SECRET"  # noqa: S105 - the name of a variable
SECRET_PREFIX = "whsec_"  # noqa: S105 - what a secret begins with
TIMEOUT = 10.0
MAX_ANSWER = 65_536
"""How many bytes of a response are read, so that the connection can be used again; its content is not used."""
MAX_RETRY_AFTER = 86_400.0
_OUT_OF_REACH = frozenset({429, 502, 503, 504})
"""Answers that say nothing about the message."""
_OWN = frozenset({"host", "content-length", "transfer-encoding", "connection", "authorization"})


class HttpPublisher:
    """Posts each payload to one URL; 2xx is delivery, 410 a permanent refusal; after all others it tries again.

    429 and 502 to 504 mean that the receiver is out of reach; other answers are about the message.

    secrets: the secrets to sign with; there may be several during a rotation. Each is base64, with or without `whsec_`
        before it, as in Standard Webhooks, or the key itself as bytes. timeout: seconds for one message.
    public_only: refuse loopback, private, link-local and other addresses that are not public.
    """

    def __init__(
        self,
        url: str,
        *,
        secrets: Sequence[str | bytes] = (),
        timeout: float = TIMEOUT,
        public_only: bool = False,
        max_payload: int | None = None,
        concurrency: int = CONCURRENCY,
    ) -> None:
        check_address(url)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError("A webhook's URL is https://host/path.")
        self.max_payload = max_payload
        self.destination = identity(url)
        try:
            self._url = httpx.URL(url)
        except httpx.InvalidURL:  # its message repeats a part of the URL
            raise ConfigurationError("A webhook's URL is https://host/path; this one has no valid host.") from None
        self._keys = [_key(secret) for secret in secrets]
        self._timeout = timeout
        self._public_only = public_only
        self._concurrency = concurrency
        self._client: httpx.AsyncClient | None = None

    async def publish(self, batch: Batch) -> Sequence[Outcome]:
        """Post the messages, those of a key one after another."""
        return await one_by_one(batch, self._send, self._concurrency)

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _send(self, message: Message) -> Outcome:
        async with asyncio.timeout(self._timeout):
            try:
                request = await self._request(message)
                response = await self._opened().send(request, stream=True)
                try:
                    outcome = _judge(response)
                    await _drain(response)
                finally:
                    await response.aclose()
            except (httpx.LocalProtocolError, httpx.UnsupportedProtocol):
                raise
            except (httpx.TransportError, OSError) as error:
                return Failed(described(error), kind="unreachable")
        return outcome

    def _opened(self) -> httpx.AsyncClient:
        if self._client is None:
            # No limit: messages that wait for a slow receiver must not take the connections of others.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._concurrency)
            # trust_env: use no proxy of the environment, since a proxy would resolve names by itself.
            self._client = httpx.AsyncClient(timeout=self._timeout, limits=limits, trust_env=False)
        return self._client

    async def _request(self, message: Message) -> httpx.Request:
        headers = self._headers(message)
        if not self._public_only:
            return self._opened().build_request("POST", self._url, content=message.payload, headers=headers)
        host, port = self._url.host, self._url.port or (443 if self._url.scheme == "https" else 80)
        headers["host"] = self._url.netloc.decode().rpartition("@")[2]
        address = await _public_address(host, port)
        return self._opened().build_request(
            "POST",
            self._url.copy_with(host=address),
            content=message.payload,
            headers=headers,
            extensions={"sni_hostname": host},
        )

    def _headers(self, message: Message) -> dict[str, str]:
        headers = {name.lower(): value for name, value in message.headers.items() if name.lower() not in _OWN}
        headers["content-type"] = message.content_type or "application/octet-stream"
        headers["user-agent"] = "retryproof"
        if message.trace:
            headers["traceparent"] = message.trace
        id, timestamp = str(message.id), str(int(time.time()))
        headers |= {"webhook-id": id, "webhook-timestamp": timestamp, "idempotency-key": f'"{id}"'}
        if self._keys:
            headers["webhook-signature"] = " ".join(sign(key, id, timestamp, message.payload) for key in self._keys)
        return headers


def sign(key: bytes, id: str, timestamp: str, payload: bytes) -> str:
    """One signature, with its version."""
    signed = f"{id}.{timestamp}.".encode() + payload
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def _key(secret: str | bytes) -> bytes:
    try:
        key = secret if isinstance(secret, bytes) else _decoded(secret)
    except ValueError:
        raise ConfigurationError(
            "A webhook's secret is base64, with whsec_ before it or without, as Standard Webhooks has it; "
            "one that is not goes in as bytes, in Python."
        ) from None
    if not key:
        raise ConfigurationError("A webhook's secret is empty: anyone could sign with it.")
    return key


def _decoded(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)


async def _public_address(host: str, port: int) -> str:
    """An address of the host; raises OSError unless all that it has are public."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    hidden = [address for address in addresses if not _is_public(address)]
    if hidden or not addresses:
        raise OSError(f"{host} has an address that is not public: {', '.join(hidden) or 'none'}")
    return addresses[0]


_SPECIAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        "::/96",  # IPv4-compatible: an IPv4 address inside
        "64:ff9b::/96",  # NAT64, which leads to the IPv4 address inside
        "64:ff9b:1::/48",  # NAT64 of a local network
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fec0::/10",  # site-local
        "192.88.99.0/24",  # 6to4 relays
    )
)
"""Networks that Python counts as global, but that lead to other addresses, or may."""


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _SPECIAL)


def _judge(response: httpx.Response) -> Outcome:
    if response.is_success:
        return DELIVERED
    status = response.status_code
    what = "a redirect, which is not followed" if 300 <= status < 400 else "no success"
    return Failed(
        f"the receiver answered {status}: {what}",
        permanent=status == httpx.codes.GONE,
        retry_after=_retry_after(response.headers.get("retry-after")),
        kind="unreachable" if status in _OUT_OF_REACH else "answer",
    )


def _retry_after(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = float(given) if given.strip().isdigit() else _until(given)
    except (TypeError, ValueError):
        return None
    return max(0.0, min(MAX_RETRY_AFTER, seconds))


def _until(date: str) -> float:
    moment = parsedate_to_datetime(date)
    return (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


async def _drain(response: httpx.Response) -> None:
    """Read a short answer, so that the connection can be used again."""
    read = 0
    async for part in response.aiter_raw():
        read += len(part)
        if read > MAX_ANSWER:
            return


def from_url(url: str, *, public_only: bool = False, timeout: float = TIMEOUT) -> HttpPublisher:
    """The publisher of a URL; its secrets are in RETRYPROOF_WEBHOOK_SECRET, separated by spaces."""
    secrets = os.environ.get(SECRET_VARIABLE, "").split()
    return HttpPublisher(url, secrets=secrets, timeout=timeout, public_only=public_only)

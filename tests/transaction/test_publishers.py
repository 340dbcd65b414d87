"""Publishers against real receivers: HTTP, SMTP, Redis Streams and functions."""

import asyncio
import base64
import hashlib
import hmac
import ssl
from dataclasses import replace
from email import message_from_bytes
from pathlib import Path

import pytest
from redis import Redis

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import Message, queue_of, uuid7
from retryproof.publishers import DELIVERED, UNTRIED, Batch, Failed, Untried, open_publisher
from retryproof.publishers.function import FunctionPublisher
from retryproof.publishers.httpx import HttpPublisher
from retryproof.publishers.redis import RedisStreamPublisher
from retryproof.publishers.smtp import SmtpPublisher
from tests.conftest import PrivateServer
from tests.transaction.outgoing import mail
from tests.transaction.receivers import certificate, http_receiver, smtp_receiver


def message(payload: bytes = b"{}", key: str | None = None, topic: str = "t", **more: object) -> Message:
    id = uuid7()
    made = Message(id, topic, payload, key=key, queue=queue_of(key, id), created_at=1_700_000_000_000_000)
    return replace(made, **more)  # type: ignore[arg-type] # fields of Message


# HTTP


async def test_m6_a_webhook_is_signed_as_standard_webhooks_has_it() -> None:
    sent = message(b'{"a":1}', content_type="application/json", headers={"X-Kind": "receipt"}, trace="00-aa-bb-01")
    secret = b"0" * 24
    with http_receiver() as receiver:
        publisher = HttpPublisher(receiver.url, secrets=["whsec_" + base64.b64encode(secret).decode(), b"older"])
        assert await publisher.publish(Batch([sent])) == [DELIVERED]
        await publisher.close()
    (request,) = receiver.requests
    headers = request.headers
    signed = f"{sent.id}.{headers['webhook-timestamp']}.".encode() + request.body
    expected = [
        "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in (secret, b"older")
    ]
    assert headers["webhook-signature"] == " ".join(expected)
    assert (headers["webhook-id"], headers["idempotency-key"]) == (str(sent.id), f'"{sent.id}"')
    assert (headers["content-type"], headers["x-kind"]) == ("application/json", "receipt")
    assert headers["traceparent"] == "00-aa-bb-01"
    assert request.body == b'{"a":1}'


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (500, {}, (False, None)),
        (302, {"location": "http://127.0.0.1:1/"}, (False, None)),
        (410, {}, (True, None)),
        (429, {"retry-after": "7"}, (False, 7.0)),
        (503, {"retry-after": "soon"}, (False, None)),
    ],
)
async def test_m6_a_refusal_is_a_failure(
    status: int, headers: dict[str, str], expected: tuple[bool, float | None]
) -> None:
    with http_receiver() as receiver:
        receiver.answer = lambda request: (status, headers)
        publisher = HttpPublisher(receiver.url)
        (outcome,) = await publisher.publish(Batch([message()]))
        await publisher.close()
    assert isinstance(outcome, Failed)
    assert str(status) in outcome.reason
    assert (outcome.permanent, outcome.retry_after) == expected
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((status, "unreachable") for status in (429, 502, 503, 504)),
        *((status, "answer") for status in (302, 400, 401, 404, 408, 422, 500, 501)),
        (410, "refusal"),
    ],
)
async def test_t6_an_answer_about_the_message_and_one_of_nobody_are_told_apart(status: int, expected: str) -> None:
    with http_receiver() as receiver:
        receiver.answer = lambda request: (status, {})
        publisher = HttpPublisher(receiver.url)
        (outcome,) = await publisher.publish(Batch([message()]))
        await publisher.close()
    assert isinstance(outcome, Failed)
    assert outcome.counts_as == expected


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "http://no-such-host.invalid/"])
async def test_t6_a_receiver_without_a_connection_is_out_of_reach(url: str) -> None:
    with http_receiver() as receiver:
        pass
    publisher = HttpPublisher(url.format(port=receiver.url.rsplit(":")[-1].partition("/")[0]))
    (outcome,) = await publisher.publish(Batch([message()]))
    await publisher.close()
    assert isinstance(outcome, Failed)
    assert outcome.counts_as == "unreachable"


@pytest.mark.parametrize("behaviour", ["hangs", "closes"])
async def test_t6_a_receiver_that_accepts_and_never_answers_is_out_of_reach(behaviour: str) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if behaviour == "hangs":
            await reader.read()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    publisher = HttpPublisher(f"http://127.0.0.1:{port}/", timeout=0.2)
    (outcome,) = await publisher.publish(Batch([message()]))
    await publisher.close()
    server.close()
    assert isinstance(outcome, Failed)
    assert outcome.counts_as == "unreachable"


async def test_t6_a_message_that_makes_no_request_counts_against_itself() -> None:
    with http_receiver() as receiver:
        publisher = HttpPublisher(receiver.url)
        (outcome,) = await publisher.publish(Batch([message(headers={"bad name": "v"})]))
        await publisher.close()
    assert isinstance(outcome, Failed)
    assert outcome.counts_as == "answer"


async def test_t6_after_a_failure_later_messages_of_its_key_are_not_sent() -> None:
    batch = [message(b"1", "a"), message(b"2", "b"), message(b"3", "a"), message(b"4", "b")]
    with http_receiver() as receiver:
        receiver.answer = lambda request: (500 if request.body == b"1" else 200, {})
        publisher = HttpPublisher(receiver.url)
        outcomes = await publisher.publish(Batch(batch))
        await publisher.close()
    assert [isinstance(outcome, Failed) for outcome in outcomes] == [True, False, False, False]
    assert outcomes[1:] == [DELIVERED, UNTRIED, DELIVERED]
    assert sorted(request.body for request in receiver.requests) == [b"1", b"2", b"4"]


SPECIAL = [
    "[64:ff9b::a00:8]",  # NAT64 of 10.0.0.8
    "[64:ff9b::808:808]",
    "[64:ff9b:1::1]",
    "[fec0::1]",
    "[::10.0.0.8]",
    "[2002:a00:8::1]",
    "[2001:0:4136:e378:8000:63bf:3fff:fdd2]",
    "192.88.99.1",
    "224.0.0.1",
]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.8", "169.254.169.254", "[::ffff:10.0.0.8]", *SPECIAL]
)
async def test_m6_private_addresses_are_refused_by_choice(host: str) -> None:
    with http_receiver() as receiver:
        port = receiver.url.rsplit(":")[-1]
        publisher = HttpPublisher(f"http://{host}:{port}", public_only=True)
        (outcome,) = await publisher.publish(Batch([message()]))
        await publisher.close()
    assert isinstance(outcome, Failed)
    assert "not public" in outcome.reason
    assert receiver.requests == []


async def test_t7_a_relay_whose_lease_is_over_sends_no_more() -> None:
    with http_receiver() as receiver:
        publisher = HttpPublisher(receiver.url)
        batch = Batch([message(b"1", "a"), message(b"2", "a")], live=lambda: len(receiver.requests) < 1)
        assert await publisher.publish(batch) == [DELIVERED, UNTRIED]
        await publisher.close()


# SMTP


def test_m6_an_email_has_the_same_message_id_on_a_resend() -> None:
    sent = message(mail(Bcc="audit@example.com"))
    with smtp_receiver() as mailbox:
        publisher = SmtpPublisher("127.0.0.1", mailbox.port, tls="off", domain="example.com")
        assert publisher.publish(Batch([sent])) == [DELIVERED]
        assert publisher.publish(Batch([sent])) == [DELIVERED]
    parsed = [message_from_bytes(content) for _, _, content in mailbox.mails]
    assert [it["Message-ID"] for it in parsed] == [f"<{sent.id}@example.com>"] * 2
    assert [it["Date"] for it in parsed] == ["Tue, 14 Nov 2023 22:13:20 +0000"] * 2
    assert parsed[0]["Bcc"] is None
    assert mailbox.mails[0][:2] == ("shop@example.com", ["ada@example.com", "audit@example.com"])
    assert parsed[0].get_payload(decode=True) == b"Thank you.\r\n.\r\n"


def test_m6_a_refused_email_fails_alone_for_good_with_5xx() -> None:
    batch = [message(mail(), "a"), message(mail("no@example.com"), "b"), message(mail("later@example.com"), "c")]
    with smtp_receiver() as mailbox:
        mailbox.refuse = lambda content: (
            "550 no such user" if b"no@" in content else "451 later" if b"later@" in content else None
        )
        publisher = SmtpPublisher("127.0.0.1", mailbox.port, tls="off")
        first, never, later = publisher.publish(Batch(batch))
    assert first == DELIVERED
    assert isinstance(never, Failed)
    assert isinstance(later, Failed)
    assert (never.counts_as, later.counts_as) == ("refusal", "answer")
    assert "no such user" in never.reason


def test_c15_a_connection_that_is_lost_over_one_email_counts_no_attempt_of_the_others() -> None:
    batch = [message(mail(), "a"), message(mail("poison@example.com"), "b"), message(mail(), "c"), message(mail(), "d")]
    with smtp_receiver() as mailbox:
        mailbox.refuse = lambda content: "421 too much for me" if b"poison@" in content else None
        publisher = SmtpPublisher("127.0.0.1", mailbox.port, tls="off")
        outcomes = publisher.publish(Batch(batch))
    assert [outcomes[0], *outcomes[2:]] == [DELIVERED, UNTRIED, UNTRIED]
    assert isinstance(outcomes[1], Failed)
    assert outcomes[1].counts_as == "unreachable"


def test_m6_a_server_that_cannot_be_reached_fails_the_first_email_of_each_key() -> None:
    with smtp_receiver() as mailbox:
        pass
    publisher = SmtpPublisher("127.0.0.1", mailbox.port, tls="off")
    outcomes = publisher.publish(Batch([message(mail(), "a"), message(mail(), "a"), message(mail(), "b")]))
    assert [type(outcome) for outcome in outcomes] == [Failed, Untried, Failed]
    assert {outcome.counts_as for outcome in outcomes if isinstance(outcome, Failed)} == {"unreachable"}


def test_m6_starttls_is_required_and_the_certificate_checked(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(cert, key)
    trusting = ssl.create_default_context(cafile=str(cert))
    with smtp_receiver(tls_context=server_side, require_starttls=True) as mailbox:
        publisher = SmtpPublisher("localhost", mailbox.port, context=trusting)
        assert publisher.publish(Batch([message(mail())])) == [DELIVERED]
        (outcome,) = SmtpPublisher("localhost", mailbox.port).publish(Batch([message(mail())]))
        assert isinstance(outcome, Failed)
        assert "certificate" in outcome.reason
    with smtp_receiver() as plain:
        (outcome,) = SmtpPublisher("127.0.0.1", plain.port).publish(Batch([message(mail())]))
        assert isinstance(outcome, Failed)
        assert plain.mails == []


def test_m6_what_is_no_email_fails_for_good() -> None:
    with smtp_receiver() as mailbox:
        (outcome,) = SmtpPublisher("127.0.0.1", mailbox.port, tls="off").publish(Batch([message(b"hello")]))
    assert isinstance(outcome, Failed)
    assert outcome.permanent


# Redis Streams, functions, URLs


async def test_m6_a_stream_gets_the_messages_in_order(redis_url: str, unique: str) -> None:
    batch = [message(b"\xff1", "a", headers={"n": "v"}), message(b"2")]
    publisher = RedisStreamPublisher(redis_url, unique)
    assert await publisher.publish(Batch(batch)) == [DELIVERED, DELIVERED]
    await publisher.close()
    with Redis.from_url(redis_url) as client:
        first, second = (entry for _, entry in client.xrange(unique))
        client.delete(unique)
    assert first[b"id"].decode() == str(batch[0].id)
    assert (first[b"payload"], first[b"key"], first[b"headers"]) == (b"\xff1", b"a", b'{"n": "v"}')
    assert second[b"payload"] == b"2"


async def test_m6_a_function_fails_by_an_exception() -> None:
    def refuse(sent: Message) -> None:
        if sent.payload == b"bad":
            raise RuntimeError("no")

    async def arefuse(sent: Message) -> None:
        refuse(sent)

    for function in (refuse, arefuse):
        batch = Batch([message(b"bad", "a"), message(b"ok", "a"), message(b"ok")])
        outcomes = await FunctionPublisher(function).publish(batch)
        assert outcomes == [Failed("RuntimeError: no"), UNTRIED, DELIVERED]


async def test_t6_a_stream_that_is_none_counts_against_the_entry_and_a_server_that_takes_none_does_not(
    private_redis: PrivateServer, unique: str
) -> None:
    server = private_redis()
    with Redis.from_url(server.url) as client:
        client.set("text", "x")
        publisher = RedisStreamPublisher(server.url, "text")
        (wrong,) = await publisher.publish(Batch([message()]))
        await publisher.close()
        client.config_set("maxmemory", "1")
        publisher = RedisStreamPublisher(server.url, unique)
        (full,) = await publisher.publish(Batch([message()]))
    server.kill()
    (gone,) = await publisher.publish(Batch([message()]))
    await publisher.close()
    kinds = [outcome.counts_as for outcome in (wrong, full, gone) if isinstance(outcome, Failed)]
    assert kinds == ["answer", "unreachable", "unreachable"]


async def test_t6_a_function_says_by_its_exception_or_a_failure_what_it_counts_towards() -> None:
    class Wrapped(Exception):
        """A library's own."""

    def send(sent: Message) -> Failed | None:
        match sent.payload:
            case b"refused":
                raise ConnectionRefusedError
            case b"late":
                raise TimeoutError
            case b"wrapped":
                try:
                    raise ConnectionResetError
                except OSError as error:
                    raise Wrapped from error
            case b"missing":
                raise FileNotFoundError("template")
            case b"given":
                return Failed("no such customer", permanent=True)
        return None

    async def asend(sent: Message) -> Failed | None:
        return send(sent)

    for function in (send, asend):
        names = [b"refused", b"late", b"wrapped", b"missing", b"given", b"ok"]
        outcomes = await FunctionPublisher(function).publish(Batch([message(name) for name in names]))
        assert [outcome.counts_as if isinstance(outcome, Failed) else None for outcome in outcomes] == [
            *("unreachable", "unreachable", "unreachable", "answer", "refusal", None)
        ]


@pytest.mark.parametrize("url", ["ftp://host/", "nothing", "no_such_module:f", "json:nothing", "redis://h/", "smtp://"])
def test_a_url_without_a_publisher_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_publisher(url)


@pytest.mark.parametrize("secret", ["whsec_", "", b"", "whsec_not base64!", "plain words"], ids=repr)
def test_m6_a_secret_that_would_sign_wrongly_or_with_nothing_is_refused(secret: str | bytes) -> None:
    with pytest.raises(ConfigurationError, match="secret"):
        HttpPublisher("https://example.com", secrets=[secret])


async def test_m6_a_secret_means_the_same_with_its_prefix_and_without() -> None:
    secret = base64.b64encode(b"k" * 24).decode()
    with http_receiver() as receiver:
        publisher = HttpPublisher(receiver.url, secrets=[secret, f"whsec_{secret}", b"k" * 24])
        await publisher.publish(Batch([message()]))
        await publisher.close()
    signatures = receiver.requests[0].headers["webhook-signature"].split()
    assert len(signatures) == 3
    assert len(set(signatures)) == 1


@pytest.mark.parametrize(
    "field",
    [
        "=?utf-8?q?eve=40example.org=2C?= <ada@example.com>",
        "=?utf-8?b?ZXZlQGV4YW1wbGUub3JnLA==?= <ada@example.com>",
        "=?utf-8?q?=3Ceve=40example.org=3E=2C?= <ada@example.com>",
        '"eve@example.org," <ada@example.com>',
        "=?utf-8?q?Ad=C3=A1?= <ada@example.com>",
    ],
)
def test_m6_an_encoded_name_is_no_recipient(field: str) -> None:
    payload = f"From: shop@example.com\r\nTo: {field}\r\nSubject: hello\r\n\r\nText\r\n".encode()
    with smtp_receiver() as mailbox:
        publisher = SmtpPublisher("127.0.0.1", mailbox.port, tls="off")
        assert publisher.publish(Batch([message(payload)])) == [DELIVERED]
    assert [recipients for _, recipients, _ in mailbox.mails] == [["ada@example.com"]]


def test_m6_an_encoded_address_fails_for_good() -> None:
    payload = b"From: shop@example.com\r\nTo: =?utf-8?q?eve=40example.org?=\r\n\r\nText\r\n"
    with smtp_receiver() as mailbox:
        publisher = SmtpPublisher("127.0.0.1", mailbox.port, tls="off")
        (outcome,) = publisher.publish(Batch([message(payload)]))
    assert isinstance(outcome, Failed)
    assert outcome.permanent
    assert mailbox.mails == []


@pytest.mark.parametrize("url", ["smtp://localhost:25?tls=off", "redis://localhost/stream", "os:getcwd"])
def test_m6_public_only_is_refused_where_it_would_do_nothing(url: str) -> None:
    with pytest.raises(ConfigurationError, match="public_only"):
        open_publisher(url, public_only=True)

"""E-mail: each payload is a whole message (RFC 5322), as `EmailMessage.as_bytes()` gives it.

Its Message-ID is made from the message's id in the outbox. So it is the same on every resend, and mail systems that
check it keep one copy. SMTP has no other way to mark a repeated message: if a relay crashes after the server's "250"
and before it has recorded that, the message is sent twice.
"""

from __future__ import annotations

import smtplib
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from email.utils import format_datetime, getaddresses
from urllib.parse import parse_qsl, unquote, urlsplit

from retryproof.core.errors import ConfigurationError
from retryproof.core.message import Message
from retryproof.publishers.base import DELIVERED, UNTRIED, Batch, Failed, Outcome, described, queues

TIMEOUT = 30.0
_OUT_OF_REACH = (0, 421, 454)
"""Codes for no answer, "service not available", and a temporary failure of TLS or authentication."""


class SmtpPublisher:
    """Sends messages to one SMTP server, over one connection for each batch.

    tls: "starttls" (which the server must support), "implicit", or "off", which sends without encryption.
    domain: of Message-IDs. timeout: seconds for each step. context: for TLS; by default, the system's authorities.
    """

    def __init__(
        self,
        host: str,
        port: int = 587,
        *,
        user: str | None = None,
        password: str | None = None,
        tls: str = "starttls",
        domain: str = "retryproof.invalid",
        timeout: float = TIMEOUT,
        max_payload: int | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        if tls not in ("starttls", "implicit", "off"):
            raise ConfigurationError("tls= is 'starttls', 'implicit' or 'off'")
        if user is not None and tls == "off":
            raise ConfigurationError("a password is not sent without TLS")
        self.max_payload = max_payload
        self.destination = f"smtp://{host.lower()}:{port}"
        self._address = (host, port)
        self._login = (user, password or "") if user is not None else None
        self._tls = tls
        self._domain = domain
        self._timeout = timeout
        self._context = context

    def publish(self, batch: Batch) -> Sequence[Outcome]:
        """Send the messages one after another. If the server is out of reach, the first message of each key fails.

        If the connection is lost during a message, that message fails, and later ones are not tried.
        """
        outcomes: list[Outcome] = [UNTRIED] * len(batch.messages)
        order = queues(batch.messages)
        try:
            with self._connected() as server:
                for queue in order:
                    if not self._send_queue(server, batch, queue, outcomes):
                        break
        except OSError as error:  # of connecting; SMTPException is one
            for queue in order:
                outcomes[queue[0]] = Failed(described(error), kind="unreachable")
        return outcomes

    def close(self) -> None:
        """Do nothing: connections end with their batch."""

    def _send_queue(self, server: smtplib.SMTP, batch: Batch, queue: list[int], outcomes: list[Outcome]) -> bool:
        """Send until a message fails; return whether the connection is still open."""
        for position in queue:
            if not batch.live():
                break
            try:
                outcomes[position] = self._send(server, batch.messages[position])
            except OSError as error:  # SMTPException is one
                outcomes[position] = _refused(error)
                with suppress(OSError):
                    server.rset()
            except ValueError as error:
                outcomes[position] = Failed(described(error), permanent=True)
            if outcomes[position] is not DELIVERED:
                break
        return server.sock is not None

    @contextmanager
    def _connected(self) -> Iterator[smtplib.SMTP]:
        host, port = self._address
        context = self._context or ssl.create_default_context()
        if self._tls == "implicit":
            server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=self._timeout, context=context)
        else:
            server = smtplib.SMTP(host, port, timeout=self._timeout)
        try:
            if self._tls == "starttls":
                server.starttls(context=context)
            if self._login is not None:
                server.login(*self._login)
            yield server
        finally:
            with suppress(OSError, smtplib.SMTPException):
                server.quit()
            server.close()

    def _send(self, server: smtplib.SMTP, message: Message) -> Outcome:
        mail = _parsed(message, self._domain)
        sender, recipients = _envelope(mail)
        del mail["Bcc"]
        server.sendmail(sender, recipients, mail.as_bytes(policy=policy.SMTP))
        return DELIVERED


def message_id(message: Message, domain: str) -> str:
    """The Message-ID of a message, on every attempt."""
    return f"<{message.id}@{domain}>"


def _parsed(message: Message, domain: str) -> EmailMessage:
    mail = BytesParser(policy=policy.SMTP).parsebytes(message.payload)
    del mail["Message-ID"]
    mail["Message-ID"] = message_id(message, domain)
    if "Date" not in mail:  # the time of writing, not of sending: the same on every attempt
        mail["Date"] = format_datetime(datetime.fromtimestamp(message.created_at / 1e6, UTC))
    return mail


def _envelope(mail: EmailMessage) -> tuple[str, list[str]]:
    """The sender's and the recipients' addresses; raises ValueError if one is missing or malformed.

    They are read from the fields without decoding: encoded words (RFC 2047) belong in names, and a decoded one could
    contain an address that nobody wrote.
    """
    fields: dict[str, list[str]] = {}
    for name, value in mail.raw_items():
        fields.setdefault(name.lower(), []).append("".join(str(value).splitlines()))
    senders = getaddresses(fields.get("sender") or fields.get("from") or [])
    written = getaddresses([value for name in ("to", "cc", "bcc") for value in fields.get(name, ())])
    recipients = [address for _, address in written if address]
    if any("=?" in address for address in (*recipients, *(address for _, address in senders))):
        raise ValueError("the e-mail has an encoded word in an address, where only a name may be encoded")
    if not senders or not senders[0][1] or not recipients:
        raise ValueError("the payload is no e-mail with a sender (From) and recipients (To, Cc or Bcc)")
    return senders[0][1], recipients


def _refused(error: OSError) -> Failed:
    """A 5xx is permanent; with several recipients, only if all are 5xx. 421 or no code: out of reach."""
    codes = [getattr(error, "smtp_code", 0)]
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
    silent = all(code in _OUT_OF_REACH for code in codes)
    return Failed(
        described(error),
        permanent=bool(codes) and all(code >= 500 for code in codes),
        kind="unreachable" if silent else "answer",
    )


def from_url(url: str, *, timeout: float = TIMEOUT, public_only: bool = False) -> SmtpPublisher:
    """The publisher of smtp://user:password@host:587?domain=example.com, smtps://…, or smtp://host:25?tls=off."""
    if public_only:
        raise ConfigurationError("public_only is for webhooks; a mail server's address is not looked at.")
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    implicit = parts.scheme == "smtps"
    tls = options.pop("tls", "implicit" if implicit else "starttls")
    domain = options.pop("domain", parts.hostname or "")
    if not parts.hostname or options:
        raise ConfigurationError("An SMTP URL is smtp://user:password@host:587?domain=example.com&tls=starttls.")
    return SmtpPublisher(
        parts.hostname,
        parts.port or (465 if implicit else 587),
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=tls,
        domain=domain,
        timeout=timeout,
    )

"""Asks a server, in its own protocol, what it is: an open port alone proves nothing."""

import hashlib
import json
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRWPair
from urllib.parse import SplitResult, unquote, urlsplit

TIMEOUT = 2.0  # seconds; a server on this machine answers in milliseconds, a hung one never
ANSWER_BYTES = 1 << 16  # of an answer over HTTP that are read


class NoAnswer(Exception):
    """Nothing that speaks the protocol, and lets us in, is there."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says it is."""

    product: str
    version: str


def probe_resp(url: str) -> Answer:
    """PING, then INFO, over RESP; tells Redis from Valkey."""
    parts = urlsplit(url)
    with _connected(parts, default_port=6379) as stream:
        if parts.password:
            user = [unquote(parts.username)] if parts.username else []
            _resp_call(stream, "AUTH", *user, unquote(parts.password))
        if _resp_call(stream, "PING") != "PONG":
            raise NoAnswer(f"{parts.hostname}:{parts.port} does not answer PING with PONG")
        fields = dict(line.split(":", 1) for line in _resp_call(stream, "INFO", "server").splitlines() if ":" in line)
    if fields.get("server_name") == "valkey":
        return Answer("Valkey", fields.get("valkey_version", "?"))
    return Answer("Redis", fields.get("redis_version", "?"))


def probe_postgres(url: str) -> Answer:
    """Logs in by a startup packet; where a password is asked for and given, by psycopg."""
    parts = urlsplit(url)
    user = unquote(parts.username or "postgres")
    database = parts.path.lstrip("/") or user
    with _connected(parts, default_port=5432, tls=False) as stream:
        parameters = b"".join(part.encode() + b"\0" for part in ("user", user, "database", database)) + b"\0"
        stream.write(struct.pack("!ii", len(parameters) + 8, 196608) + parameters)
        stream.flush()
        version = _postgres_version(stream)
        if version is not None:
            stream.write(b"X\0\0\0\4")
            stream.flush()
    if version is None:
        if parts.password is None:
            raise NoAnswer(f"PostgreSQL at {parts.hostname}:{parts.port} asks {user} for a password")
        version = _postgres_version_by_psycopg(url)
    return Answer("PostgreSQL", version.split()[0])


def probe_mariadb(url: str) -> Answer:
    """Logs in by MySQL's native password, which a root without one passes too; tells MariaDB from MySQL."""
    parts = urlsplit(url)
    with _connected(parts, default_port=3306, tls=False) as stream:
        greeting = _mysql_packet(stream)
        if greeting[:1] != b"\n":
            raise NoAnswer(f"MariaDB at {parts.hostname}:{parts.port} refuses: {greeting[3:].decode(errors='replace')}")
        version, _, rest = greeting[1:].partition(b"\0")
        salt = rest[4:12] + rest[31:43]
        stream.write(_mysql_login(unquote(parts.username or "root"), unquote(parts.password or ""), salt))
        stream.flush()
        answer = _mysql_packet(stream)
        if answer[:1] != b"\0":
            raise NoAnswer(f"MariaDB at {parts.hostname}:{parts.port} lets nobody in by that user and password")
        stream.write(b"\1\0\0\0\1")  # COM_QUIT
        stream.flush()
    said = version.decode(errors="replace").removeprefix("5.5.5-")  # a prefix for the replicas of old MySQLs
    return Answer("MariaDB" if "MariaDB" in said else "MySQL", said.partition("-")[0])


def probe_dynamodb(url: str) -> Answer:
    """Lists tables, signed by nobody, which emulators take; tells ministack from others by its page of health."""
    parts = urlsplit(url)
    credential = "Credential=probe/20260101/us-east-1/dynamodb/aws4_request, SignedHeaders=host, Signature=0"
    head = {
        "X-Amz-Target": "DynamoDB_20120810.ListTables",
        "Content-Type": "application/x-amz-json-1.0",
        "Authorization": f"AWS4-HMAC-SHA256 {credential}",
    }
    with _connected(parts, default_port=8000, tls=False) as stream:
        status, fields, _ = _http_call(stream, "POST / HTTP/1.1", {"Host": parts.netloc, **head}, b"{}")
        if status != "200" or "x-amzn-requestid" not in fields:
            raise NoAnswer(f"{parts.hostname}:{parts.port} does not list tables: {status!r}")
    with _connected(parts, default_port=8000, tls=False) as stream:
        status, _, body = _http_call(stream, "GET /_ministack/health HTTP/1.1", {"Host": parts.netloc}, b"")
        health = json.loads(body) if status == "200" else {}
    if "edition" not in health:
        return Answer("another server of DynamoDB's protocol", "?")
    return Answer("ministack", str(health.get("version", "?")))


def _http_call(stream: BufferedRWPair, start: str, head: dict[str, str], body: bytes) -> tuple[str, set[str], bytes]:
    """Status, names of the header fields in lower case, and body of the answer to a request; the connection ends."""
    head = {**head, "Content-Length": str(len(body)), "Connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    stream.write(f"{start}\r\n{lines}\r\n".encode() + body)
    stream.flush()
    answer, _, said = stream.read(ANSWER_BYTES).partition(b"\r\n\r\n")
    first, *fields = answer.decode("latin-1").split("\r\n")
    return first.partition(" ")[2][:3], {field.partition(":")[0].lower() for field in fields}, said


@contextmanager
def _connected(parts: SplitResult, default_port: int, *, tls: bool = True) -> Iterator[BufferedRWPair]:
    host = parts.hostname or "127.0.0.1"
    try:
        with socket.create_connection((host, parts.port or default_port), timeout=TIMEOUT) as plain:
            link: socket.socket = plain
            if tls and parts.scheme in ("rediss", "valkeys"):
                link = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            with link.makefile("rwb") as stream:
                yield stream
    except (OSError, struct.error, UnicodeDecodeError, ValueError) as cause:
        raise NoAnswer(f"{host}:{parts.port or default_port}: {cause}") from cause


def _resp_call(stream: BufferedRWPair, *words: str) -> str:
    request = f"*{len(words)}\r\n" + "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
    stream.write(request.encode())
    stream.flush()
    line = stream.readline().rstrip(b"\r\n").decode()
    match line[:1]:
        case "+":
            return line[1:]
        case "$":
            return stream.read(int(line[1:]) + 2)[:-2].decode()
        case _:
            raise NoAnswer(f"answers {words[0]} with {line[:80]!r}")


def _postgres_version(stream: BufferedRWPair) -> str | None:
    """Reads up to ReadyForQuery; None when the server wants a password."""
    version = "?"
    while True:
        kind, length = struct.unpack("!ci", stream.read(5))
        body = stream.read(length - 4)
        match kind:
            case b"R" if struct.unpack("!i", body[:4])[0] != 0:
                return None
            case b"S":
                name, value, _ = body.split(b"\0", 2)
                if name == b"server_version":
                    version = value.decode()
            case b"E":
                fields = {field[:1]: field[1:].decode(errors="replace") for field in body.split(b"\0")}
                raise NoAnswer(f"PostgreSQL says: {fields.get(b'M', '?')}")
            case b"Z":
                return version
            case _:
                pass


def _postgres_version_by_psycopg(url: str) -> str:
    try:
        import psycopg
    except ImportError as cause:
        raise NoAnswer("PostgreSQL asks for a password, and psycopg is not installed to give it") from cause
    try:
        with psycopg.connect(url, connect_timeout=int(TIMEOUT)) as connection:
            return connection.info.parameter_status("server_version") or "?"
    except psycopg.Error as cause:
        raise NoAnswer(f"PostgreSQL says: {cause}") from cause


def _mysql_packet(stream: BufferedRWPair) -> bytes:
    head = stream.read(4)
    length = int.from_bytes(head[:3], "little")
    body = stream.read(length)
    if len(head) < 4 or len(body) < length or not body:
        raise NoAnswer("ends in the middle of a MySQL packet")
    return body


def _mysql_login(user: str, password: str, salt: bytes) -> bytes:
    """A HandshakeResponse41 with the native proof: SHA1(p) XOR SHA1(salt + SHA1(SHA1(p))), or none for no password."""
    capabilities = 0x1 | 0x200 | 0x8000 | 0x80000  # long password, protocol 4.1, secure connection, plugin auth
    once = hashlib.sha1(password.encode()).digest()  # noqa: S324  # the protocol's own
    mask = hashlib.sha1(salt + hashlib.sha1(once).digest()).digest()  # noqa: S324  # as above
    proof = bytes(a ^ b for a, b in zip(once, mask, strict=True)) if password else b""
    body = struct.pack("<IIB23x", capabilities, 1 << 24, 45) + user.encode() + b"\0"
    body += bytes([len(proof)]) + proof + b"mysql_native_password\0"
    return len(body).to_bytes(3, "little") + b"\1" + body

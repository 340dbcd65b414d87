"""The command line, run in process, over a store of each kind."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from retryproof.cli.commands import retryproof
from retryproof.core.commands import Acquired, Claim
from retryproof.core.keys import record_id, tenant_digest
from retryproof.core.record import Record
from retryproof.stores import Store, open_store
from retryproof.stores.sql.migrate import migrate

FINGERPRINT = b"\x01\x06" + b"f" * 32


@dataclass
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command: `run("keys", "list", url)`."""
    for name in ("RETRYPROOF_STORE", "RETRYPROOF_PEPPER", "RETRYPROOF_AUDIT_FILE"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*arguments: str, stdin: str | None = None) -> Ran:
        result = CliRunner().invoke(retryproof, arguments, input=stdin, catch_exceptions=True)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return invoke


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> str:
    """The URL of an empty store of each kind."""
    match request.param:
        case "redis":
            return f"{request.getfixturevalue('redis_url')}?prefix={unique}"
        case "postgres":
            url = f"{request.getfixturevalue('postgres_url')}?schema={unique}"
            migrate(url)
            return url
        case _:
            return f"sqlite:///{tmp_path}/keys.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = open_store(url, timeout=10.0)
    yield opened
    opened.close()


def claim(
    store: Store,
    key: str = "k",
    scope: tuple[str | bytes, ...] = ("charge",),
    *,
    lease: float = 60.0,
    id: bytes | None = None,
    **more: Any,
) -> tuple[Claim, Acquired]:
    """Take an operation, as an attempt does."""
    wanted = Claim(
        id=id or record_id(scope, key),
        fingerprint=FINGERPRINT,
        nonce=os.urandom(16),
        lease=lease,
        retention=3600.0,
        unsettled_retention=more.pop("unsettled_retention", 3600.0),
        **more,
    )
    (reply,) = store.claim([wanted])
    assert isinstance(reply, Acquired)
    return wanted, reply


def abandon(store: Store, key: str = "k", scope: tuple[str | bytes, ...] = ("charge",), **more: Any) -> Record:
    """Leave an operation as an attempt does that dies: in progress, its lease over."""
    claimed, _ = claim(store, key, scope, lease=0.001, **more)
    return until_its_lease_is_over(store, claimed.id)


def until_its_lease_is_over(store: Store, id: bytes) -> Record:
    """The record, when no attempt holds it by the store's own clock."""
    while True:
        record = found(store, id)
        if not record.live(record.read_at):
            return record


def found(store: Store, id: bytes) -> Record:
    (record,) = store.get([id])
    assert record is not None
    return record


TENANT = tenant_digest("acme")

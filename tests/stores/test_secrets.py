"""Settings, files and certificates: what is secret stays so, and who answers is who was asked."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from redis import Redis

from retryproof.core.errors import StoreUnavailable
from retryproof.sql.postgres.url import parse
from retryproof.stores import open_store
from retryproof.stores.redis.settings import Settings
from tests.transaction.receivers import certificate


def test_the_representation_of_settings_has_no_password() -> None:
    assert "hush" not in repr(Settings.of("redis://u:hush@h/0", Redis, "p", 1.0))
    assert "hush" not in repr(parse("postgresql://u:hush@h/d"))


@pytest.mark.parametrize(
    ("query", "checked"),
    [
        ("", True),
        ("?ssl_cert_reqs=required", True),
        ("?ssl_cert_reqs=none", None),
        ("?ssl_check_hostname=False", False),
    ],
)
def test_a_certificate_has_to_be_of_the_host_that_was_asked(query: str, checked: bool | None) -> None:
    options = Settings.of(f"rediss://h/0{query}", Redis, "p", 1.0).options
    assert options.get("ssl_check_hostname") is checked


def test_a_server_with_another_hosts_certificate_is_refused(tmp_path: Path) -> None:
    path, key = certificate(tmp_path)  # of localhost
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    received: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                with context.wrap_socket(connection, server_side=True) as secured:
                    received.append(secured.recv(1))
            except OSError:
                received.append(b"")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        store = open_store(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={path}", timeout=1.0)
        with pytest.raises(StoreUnavailable):
            store.get([b"i" * 32])
        thread.join()
        store.close()
    assert received == [b""]


def test_a_file_behind_a_symbolic_link_is_its_owners_alone(tmp_path: Path) -> None:
    """SQLite makes its other files with the rights of the first."""
    target, link = tmp_path / "data" / "keys.db", tmp_path / "link.db"
    target.parent.mkdir()
    link.symlink_to(target)
    mask = os.umask(0o022)
    try:
        store = open_store(f"sqlite:///{link}")
        store.get([b"i" * 32])
    finally:
        os.umask(mask)
    found = {file.name: stat.S_IMODE(file.stat().st_mode) for file in target.parent.iterdir()}
    store.close()
    assert found == {"keys.db": 0o600, "keys.db-wal": 0o600, "keys.db-shm": 0o600}

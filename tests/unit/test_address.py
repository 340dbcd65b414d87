"""No message shows a part of a password, however badly its URL is written."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retryproof.core.address import check_address, destination, redacted, scrubbed
from retryproof.core.errors import ConfigurationError, IdempotencyError
from retryproof.publishers import open_publisher
from retryproof.stores import open_store

PART = st.text("QXZ", min_size=4, max_size=8)
"""Letters that no host, message or word below has in this number."""
SPECIAL = st.sampled_from(list("/?#@:[]%&=+ ,;\\\"'<>{}|^`~$\x85\u202e"))
PASSWORD = st.builds(
    lambda pairs: "".join(part + mark for part, mark in pairs),
    st.lists(st.tuples(PART, SPECIAL), min_size=2, max_size=3),
)
URL = st.sampled_from(
    [
        "redis://u:{}@127.0.0.1:1/0",
        "rediss://:{}@127.0.0.1:1/0",
        "postgresql://u:{}@127.0.0.1:1/db",
        "postgresql+psycopg://u:{}@127.0.0.1:1/db?schema=s",
        "redis+cluster://u:{}@127.0.0.1:1",
        "u:{}@127.0.0.1://",
    ]
)
DESTINATION = st.sampled_from(
    ["smtp://u:{}@127.0.0.1:1", "smtps://{}@127.0.0.1:1", "redis://u:{}@127.0.0.1:1/s", "https://u:{}@127.0.0.1:1/{}"]
)


def assert_silent(text: str) -> None:
    assert re.search("[QXZ]{4}", text) is None, text


def said_by_store(url: str) -> str:
    """What opening and asking a store says; a password that is right is tried on a closed port."""
    try:
        store = open_store(url, timeout=0.2)
    except IdempotencyError as error:
        return f"{error} {error.__cause__} {error.__context__ if not error.__suppress_context__ else ''}"
    try:
        store.get([b"i" * 32])
    except IdempotencyError as error:
        return str(error)
    finally:
        store.close()
    return ""


@given(url=URL, password=PASSWORD)
@example(url="postgresql://u:{}@127.0.0.1:1/db", password="QXZQ/XZQX?ZQXZ")
@example(url="redis://u:{}@127.0.0.1:1/0", password="QXZQ#XZQX@ZQXZ")
@settings(max_examples=150, deadline=None)
def test_a_store_that_cannot_be_opened_or_asked_says_nothing_of_its_password(url: str, password: str) -> None:
    badly = url.format(password)
    assert_silent(scrubbed(said_by_store(badly), badly))
    assert_silent(redacted(badly))


@given(url=DESTINATION, password=PASSWORD)
@settings(max_examples=150, deadline=None)
def test_a_publisher_that_cannot_be_made_says_nothing_of_its_password(url: str, password: str) -> None:
    badly = url.replace("{}", password)
    try:
        open_publisher(badly)
    except ConfigurationError as error:
        assert_silent(str(error))
    assert_silent(destination(badly))


@given(password=PASSWORD)
def test_an_escaped_password_is_taken_whatever_it_holds(password: str) -> None:
    for scheme in ("redis", "postgresql", "https", "smtp"):
        url = f"{scheme}://user:{quote(password, safe='')}@host:1/path?x=y"
        check_address(url)
        assert_silent(redacted(url))
        assert_silent(scrubbed(f"cannot log in with {password}, {password!r} or {quote(password)}", url))


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://[::1]:6379/0",
        "postgresql://u:p@one:1,two:2,three/db?schema=s",
        "postgresql:///db?host=/var/run/postgresql",
        "postgresql://u@h/d?application_name=x",
        "https://example.com/hooks/@me",
        "sqlite:///var/lib/a@b:c/keys.db",
        "memory://name",
    ],
)
def test_ordinary_addresses_are_taken(url: str) -> None:
    check_address(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@example.com:8443/hooks/secret?access_token=abc&sig=def", "https://example.com:8443"),
        ("https://example.com", "https://example.com"),
        ("smtp://u:p@mail.example.com:587?domain=d", "smtp://mail.example.com:587"),
        ("smtp://u:p/q@mail.example.com", "smtp://***"),
        ("package.module:function", "package.module:function"),
    ],
)
def test_a_destination_is_shown_as_scheme_and_host(url: str, shown: str) -> None:
    assert destination(url) == shown

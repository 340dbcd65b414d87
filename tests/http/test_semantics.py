"""What is pure about HTTP: methods, statuses, headers, scopes, problem documents, options."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.authentication import SimpleUser, UnauthenticatedUser

from retryproof.core.errors import ConfigurationError
from retryproof.core.policy import Policy
from retryproof.http import by_header, by_user, problem, single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.http.body import SPOOL_FROM, Body, Budget, OverBudget
from retryproof.http.key_source import json_field
from retryproof.http.semantics import (
    accepts,
    covered_methods,
    is_event_stream,
    kept_headers,
    retry_after,
    settles,
    settles_always,
    settles_success,
)
from retryproof.http.types import AsgiScope, Receive, Send
from retryproof.stores.memory import MemoryStore


async def nothing(scope: AsgiScope, receive: Receive, send: Send) -> None:
    """An app that is never called."""


# Construction: bad options are refused, nothing is opened


def test_h5_a_forgotten_scope_names_the_four_choices() -> None:
    with pytest.raises(ConfigurationError) as caught:
        IdempotencyMiddleware(nothing, store="memory://")
    for choice in ("by_user", "by_header", "single_tenant", "callable"):
        assert choice in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "user"},
        {"scope": by_header},
        {"store": "nosuch://host"},
        {"store": 1},
        {"policy": 10.0},
        {"policy": Policy},
        {"required": "yes"},
        {"methods": "POST"},
        {"methods": ()},
        {"methods": ("post",)},
        {"methods": ("GET",)},
        {"methods": ("POST", "HEAD")},
        {"key": "Idempotency Key"},
        {"key": None},
        {"keys": "weak"},
        {"key": json_field("k"), "strict": True},
        {"endpoint": 1},
        {"fingerprint": "raw"},
        {"store_when": "always"},
        {"authorize": "admin"},
        {"max_body": -1},
        {"max_body": 1.5},
        {"max_body": True},
        {"fail_open": 1},
        {"replay_header": "a: b"},
        {"replay_header": ""},
        {"docs_url": "https://example.org/a b"},
        {"docs_url": "https://example.org/\r\nx: y"},
        {"docs_url": ""},
        {"pepper": "secret"},
        {"name": 1},
    ],
    ids=lambda options: ", ".join(f"{name}={getattr(value, '__name__', value)!r}" for name, value in options.items()),
)
def test_options_that_make_no_sense_are_refused_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        IdempotencyMiddleware(nothing, **{"store": "memory://", "scope": single_tenant, **options})


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "sqlite:////nosuch/dir/keys.db", "postgresql://127.0.0.1:1/x"])
def test_the_constructor_opens_nothing(url: str) -> None:
    IdempotencyMiddleware(nothing, store=url, scope=single_tenant)


def test_an_unknown_store_url_names_the_schemes() -> None:
    with pytest.raises(ConfigurationError, match=r"sqlite://.*redis://|redis://.*sqlite://"):
        IdempotencyMiddleware(nothing, store="nosuch://host", scope=single_tenant)


def test_a_store_object_is_taken_as_it_is() -> None:
    IdempotencyMiddleware(nothing, store=MemoryStore(), scope=single_tenant)


# H1


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "QUERY", "CONNECT"])
def test_h1_some_methods_can_never_be_covered(method: str) -> None:
    with pytest.raises(ConfigurationError, match=method):
        covered_methods(("POST", method))


# H5


class Account:
    def __init__(self, **names: Any) -> None:
        self.__dict__.update(names)


@pytest.mark.parametrize(
    ("user", "identity"),
    [
        (SimpleUser("alice"), "starlette.authentication.SimpleUser str alice"),
        (UnauthenticatedUser(), None),
        (None, None),
        ("alice", "alice"),
        ("", None),
        ({"sub": "alice"}, "builtins.dict str alice"),
        (Account(id=0), f"{__name__}.Account int 0"),
        (Account(id="0"), f"{__name__}.Account str 0"),
        (Account(pk=7, username="a"), f"{__name__}.Account int 7"),
        (Account(is_authenticated=False, id=1), None),
    ],
    ids=[
        "simple",
        "unauthenticated",
        "none",
        "text",
        "empty",
        "claims",
        "zero",
        "zero as text",
        "pk before name",
        "not authenticated",
    ],
)
def test_h5_by_user_finds_who_is_calling(user: Any, identity: str | None) -> None:
    assert by_user({"user": user}) == identity


class Staff(Account):
    """Another table, with numbers of its own."""


def test_h5_by_user_tells_users_of_two_classes_and_ids_of_two_types_apart() -> None:
    users = [Account(id=1), Staff(id=1), Account(id="1"), Account(id=b"1"), Account(id=True), {"id": 1}, "1"]
    assert len({by_user({"user": user}) for user in users}) == len(users)


class Lazy:
    """A proxy such as Django's, which has the class of what is behind it."""

    def __init__(self, behind: object) -> None:
        self.__dict__["behind"] = behind

    @property  # type: ignore[misc]  # as proxies do
    def __class__(self) -> type:
        return type(self.__dict__["behind"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["behind"], name)


def test_h5_by_user_looks_through_a_proxy() -> None:
    assert by_user({"user": Lazy(Account(id=1))}) == by_user({"user": Account(id=1)})


def test_h5_by_user_without_authentication_is_an_error_unless_it_is_allowed() -> None:
    with pytest.raises(ConfigurationError, match="absent="):
        by_user({})
    assert by_user(absent="anonymous")({}) is None
    assert by_user({"user": None}) is None  # the authentication says that it is nobody


def test_h5_by_user_refuses_a_user_that_it_cannot_tell_from_others() -> None:
    with pytest.raises(ConfigurationError, match="Account"):
        by_user({"user": Account(display_name="Alice")})


@pytest.mark.parametrize(
    ("values", "identity"), [([], None), ([b""], None), ([b"k"], b"k"), ([b"a", b"b"], b"a\nb")], ids=repr
)
def test_h5_by_header_finds_the_credential(values: list[bytes], identity: bytes | None) -> None:
    assert by_header("X-API-Key")({"headers": [(b"x-api-key", value) for value in values]}) == identity


@pytest.mark.parametrize("name", ["", "x api key", "x-api-key:", "ключ"])
def test_h5_by_header_refuses_what_is_no_headers_name(name: str) -> None:
    with pytest.raises(ConfigurationError):
        by_header(name)


# H7


def test_h7_every_problem_has_a_code_of_its_own() -> None:
    assert len(problem.KINDS) == 14
    for kind in problem.KINDS.values():
        status, headers, body = problem.render(problem.Problem(kind, "What to do.", 3, "ab"), "https://example.org/d")
        document = json.loads(body)
        assert document == {
            "type": f"https://example.org/d#{kind.code}",
            "title": kind.title,
            "status": status,
            "code": kind.code,
            "detail": "What to do.",
            "operation": "ab",
        }
        assert (b"link", b'<https://example.org/d>; rel="describedby"') in headers
        assert (b"retry-after", b"3") in headers
        assert (b"content-length", b"%d" % len(body)) in headers


@pytest.mark.parametrize(("left", "seconds"), [(10.0, 1), (9.9, 1), (7.0, 1), (6.5, 7), (1.2, 2), (0.1, 1), (0.0, 1)])
def test_h7_retry_after_waits_out_the_lease_of_a_holder_that_seems_dead(left: float, seconds: int) -> None:
    assert retry_after(left, lease=10.0) == seconds


# H8


def test_h8_the_presets() -> None:
    statuses = [200, 302, 400, 401, 403, 404, 408, 409, 422, 425, 429, 500, 503]
    assert [s for s in statuses if settles(s, ())] == [200, 302, 400, 404, 422]
    assert [s for s in statuses if settles_success(s, ())] == [200, 302]
    assert [s for s in statuses if settles_always(s, ())] == statuses


# H9

NAMES = st.sampled_from([b"set-cookie", b"x-a", b"Location", b"date", b"x-ratelimit-limit", b"content-length"])


@given(st.lists(st.tuples(NAMES, st.binary(max_size=5))))
def test_h9_kept_headers_keep_order_and_repetition(headers: list[tuple[bytes, bytes]]) -> None:
    kept = {b"set-cookie", b"x-a", b"location"}
    lowered = [(name.lower(), value) for name, value in headers]
    assert kept_headers(headers) == [(name, value) for name, value in lowered if name in kept]


@pytest.mark.parametrize(
    ("value", "found"),
    [(b"text/event-stream", True), (b"Text/Event-Stream;charset=utf-8", True), (b"text/html", False)],
)
def test_h10_an_event_stream_is_known_by_its_type(value: bytes, found: bool) -> None:
    assert is_event_stream([(b"Content-Type", value)]) is found


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (b"", True),
        (b"gzip", True),
        (b"br, GZIP;q=0.1", True),
        (b"br", False),
        (b"*", True),
        (b"gzip;q=0", False),
        (b"gzip;q=0.000, *", False),
        (b"*;q=0", False),
    ],
)
def test_h14_accept_encoding_is_understood(header: bytes, accepted: bool) -> None:
    assert accepts(b"gzip", header) is accepted


# The body's place


def test_h7_a_small_body_stays_in_memory() -> None:
    body = Body(Budget(SPOOL_FROM))
    body.append(b"a" * SPOOL_FROM)
    assert body._file is None
    assert body.read() == b"a" * SPOOL_FROM


def test_h7_large_bodies_share_a_budget_and_give_it_back() -> None:
    budget = Budget(2 * SPOOL_FROM)
    body = Body(budget)
    for _ in range(2):
        body.append(b"a" * SPOOL_FROM)
    with pytest.raises(OverBudget):
        body.append(b"a")
    body.close()
    body.close()
    again = Body(budget)
    for _ in range(2):
        again.append(b"b" * SPOOL_FROM)
    assert again.read() == b"b" * 2 * SPOOL_FROM
    again.close()


def test_h7_a_spooled_body_has_no_name_and_is_its_owners_alone() -> None:
    body = Body()
    body.append(b"a" * (SPOOL_FROM + 1))
    assert body._file is not None
    found = os.fstat(body._file.fileno())
    assert (found.st_nlink, stat.S_IMODE(found.st_mode)) == (0, 0o600)
    body.close()

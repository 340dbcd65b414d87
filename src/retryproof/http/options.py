"""The options of the HTTP middleware, checked when it is made; the same for every server interface. Pure."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, iscoroutinefunction, signature
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, cast, get_args

from retryproof.core.errors import ConfigurationError
from retryproof.core.fingerprint import Strategy, strategy_for
from retryproof.core.keys import Strength
from retryproof.core.policy import Policy
from retryproof.http.ending import answers_of
from retryproof.http.key_source import FindKey, HeaderKey, JsonFieldKey, KeySource, key_source_for
from retryproof.http.problem import check_docs_url
from retryproof.http.request import HttpRequest
from retryproof.http.scope import AsgiScope, ByHeader, Identify, Identity, check_scope
from retryproof.http.semantics import Header, Preset, StoreWhen, covered_methods, is_preset, store_when_for

V = TypeVar("V")
PerRequest: TypeAlias = V | Callable[[Any], V]
"""A value, or a callable of the ASGI scope that returns it."""

Authorize: TypeAlias = Callable[[Any], bool | Awaitable[bool]]
"""Says before each replay whether this caller may have the stored response (H13)."""

Departure: TypeAlias = Literal["finish", "stop"]
"""What happens to a handler whose client has left (H11)."""
HeadDeparture: TypeAlias = Callable[[int, Sequence[Header]], Departure]
"""That, by the status and headers of its response."""
OnDeparture: TypeAlias = PerRequest[Departure] | HeadDeparture

MAX_DEPARTED = 1_000
MAX_BODY = 64 * 1024 * 1024
BODY_TIMEOUT = 30.0


class Choice(Generic[V]):
    """An option that is a value or a callable of the request.

    fixed: the value, where it is one.
    """

    __slots__ = ("_function", "_kind", "_name", "fixed")

    def __init__(self, name: str, option: PerRequest[V], kind: Any) -> None:
        if isinstance(option, type) or iscoroutinefunction(option):
            raise ConfigurationError(f"{name}={option!r} is neither a {name} nor a plain callable that returns one.")
        if not callable(option) and not isinstance(option, kind):
            raise ConfigurationError(f"{name}={option!r} is neither a {name} nor a callable that returns one.")
        self._name = name
        self._kind = kind
        self.fixed: V | None = None
        self._function: Callable[[Any], V] | None = None
        if callable(option):
            self._function = option
        else:
            self.fixed = option

    @property
    def varies(self) -> bool:
        """Whether it is a callable."""
        return self._function is not None

    def of(self, scope: AsgiScope) -> V:
        """Its value for this request; ConfigurationError where the callable returns something else."""
        if self._function is None:
            return cast("V", self.fixed)
        value: V = self._function(scope)
        if isinstance(value, self._kind):
            return value
        if isinstance(value, Coroutine):
            value.close()
        # Do not use its truth value: a coroutine is true, and would open a route that has to fail closed.
        raise ConfigurationError(
            f"The callable {self._name}= returned {type(value).__name__}, which is no {self._name}."
        )


class Settings(NamedTuple):
    """What the options say of one request whose body is there."""

    endpoint: str | None
    fails_open: bool
    on_departure: Departure | HeadDeparture


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one layer was told; see IdempotencyMiddleware for the meaning of each.

    identify: what `scope` says of the request, where it need not look at all of it. key_header: the header that holds
    the key, where one does. answers: what `store_when` makes of a response by its
    status, where it is a preset. fixed: the settings of all requests, where they do not vary.
    not_kept: headers of responses that are left out of the record by choice; the app may have handed on another
    service's mark of a replay.
    """

    scope: Identify
    identify: Callable[[HttpRequest], Identity] | None
    policy: Choice[Policy | None]
    required: Choice[bool]
    methods: frozenset[str]
    key: KeySource
    key_header: bytes | None
    strength: Strength
    endpoint: Choice[str | None]
    fingerprint: Strategy
    store_when: StoreWhen
    answers: Mapping[int, str]
    on_departure: Departure | Choice[str] | HeadDeparture
    fixed: Settings | None
    max_departed: int
    authorize: Authorize | None
    max_body: int
    body_timeout: float
    fail_open: Choice[bool]
    replay_header: bytes
    not_kept: frozenset[bytes]
    docs_url: str
    pepper: bytes
    name: str

    def settings(self, context: Any) -> Settings:
        """What they say of one request."""
        departure = self.on_departure
        return Settings(
            self.endpoint.of(context),
            self.fail_open.of(context),
            cast("Departure", departure.of(context)) if isinstance(departure, Choice) else departure,
        )


def check_options(
    *,
    scope: object,
    policy: PerRequest[Policy | None],
    required: PerRequest[bool],
    methods: Iterable[str],
    key: str | JsonFieldKey | FindKey,
    keys: Strength,
    strict: bool,
    endpoint: PerRequest[str | None],
    fingerprint: object,
    store_when: Preset | StoreWhen,
    on_departure: OnDeparture,
    max_departed: int,
    authorize: Authorize | None,
    max_body: int,
    body_timeout: float,
    fail_open: PerRequest[bool],
    replay_header: str,
    keep_set_cookie: bool,
    docs_url: str,
    pepper: bytes,
    name: str,
) -> Options:
    """The checked options; ConfigurationError names the first one that cannot work."""
    if keys not in get_args(Strength):
        raise ConfigurationError(f"keys={keys!r} must be one of {', '.join(map(repr, get_args(Strength)))}.")
    if authorize is not None and not callable(authorize):
        raise ConfigurationError(
            f"authorize={authorize!r} must be a callable of the request: ASGI's scope, or the environ."
        )
    _check_size("max_body", max_body)
    _check_timeout("body_timeout", body_timeout)
    _check_bytes_and_text(pepper, name)
    source = key_source_for(key, strict=strict)
    identify = check_scope(scope)
    mark = _header_name("replay_header", replay_header)
    pinned = Choice("endpoint", endpoint, str | None)
    fails_open = Choice("fail_open", fail_open, bool)
    departure = _departure(on_departure)
    fixed = None
    if not (pinned.varies or fails_open.varies or isinstance(departure, Choice)):
        fixed = Settings(pinned.fixed, fails_open.of({}), departure)
    settling = store_when_for(store_when)
    return Options(
        scope=identify,
        identify=identify.of if isinstance(identify, ByHeader) else None,
        policy=Choice("policy", policy, Policy | None),
        required=Choice("required", required, bool),
        methods=covered_methods(methods),
        key=source,
        key_header=source.name if isinstance(source, HeaderKey) else None,
        strength=keys,
        endpoint=pinned,
        fingerprint=strategy_for(fingerprint),
        store_when=settling,
        answers=answers_of(settling) if is_preset(settling) else {},
        on_departure=departure,
        fixed=fixed,
        max_departed=_count("max_departed", max_departed),
        authorize=authorize,
        max_body=max_body,
        body_timeout=body_timeout,
        fail_open=fails_open,
        replay_header=mark,
        not_kept=frozenset({mark} if keep_set_cookie else {mark, b"set-cookie"}),
        docs_url=check_docs_url(docs_url),
        pepper=pepper,
        name=name,
    )


class _DepartureChoice(Choice[str]):
    """The choice of a route; a value that is neither of the two is an error before anything is claimed."""

    __slots__ = ()

    def of(self, scope: AsgiScope) -> Departure:
        return _checked_departure(super().of(scope))


def _checked_departure(value: object) -> Departure:
    if value == "finish" or value == "stop":
        return value
    raise ConfigurationError(f"on_departure={value!r} must be 'finish' or 'stop'.")


def _departure(option: Any) -> Departure | Choice[str] | HeadDeparture:
    """A value or a callable of the ASGI scope; or, where it takes two arguments, one of a response's head."""
    if isinstance(option, str):
        return _checked_departure(option)
    choice = _DepartureChoice("on_departure", option, str)
    match _arguments(option):
        case 1:
            return choice
        case 2:
            return cast("HeadDeparture", option)
        case _:
            raise ConfigurationError(
                f"on_departure={option!r} must take one argument, the ASGI scope, or two, the status and headers of a "
                "response."
            )


def _arguments(function: Callable[..., object]) -> int | None:
    """How many arguments it has to be called with; None where that cannot be told."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds and parameter.default is Parameter.empty for parameter in parameters)


def _count(name: str, value: int) -> int:
    given: object = value
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ConfigurationError(f"{name}={value!r} must be a whole number.")
    return value


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"{name}={value!r} must be a whole number of bytes.")


def _check_timeout(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"{name}={value!r} must be a number of seconds, more than zero.")


def _check_bytes_and_text(pepper: object, name: object) -> None:
    if not isinstance(pepper, bytes):
        raise ConfigurationError("pepper must be bytes: a secret that all servers of this app share.")
    if not isinstance(name, str):
        raise ConfigurationError(f"name={name!r} must be a string that tells this app from others on the same store.")


def _header_name(option: str, name: object) -> bytes:
    source = key_source_for(name, strict=False) if isinstance(name, str) else None
    if not isinstance(source, HeaderKey):
        raise ConfigurationError(f"{option}={name!r} must be a header's name.")
    return source.name

"""What the middleware of all server interfaces share: the options, checked when it is made, and the engine."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

from retryproof.core.fingerprint import CustomFingerprint, Strategy, raw
from retryproof.core.keys import Strength
from retryproof.core.policy import Policy
from retryproof.http.key_source import FindKey, JsonFieldKey
from retryproof.http.options import (
    BODY_TIMEOUT,
    MAX_BODY,
    MAX_DEPARTED,
    Authorize,
    OnDeparture,
    Options,
    PerRequest,
    check_options,
)
from retryproof.http.problem import DOCS_URL
from retryproof.http.scope import Identify
from retryproof.http.semantics import Preset, StoreWhen
from retryproof.observe.events import Listener
from retryproof.observe.logging import log_event
from retryproof.stores.base import AsyncStore, DatabaseEngine, Store

Application = TypeVar("Application")
LayerEngine = TypeVar("LayerEngine")


class Layer(ABC, Generic[Application, LayerEngine]):
    """A middleware around an application; `_make_engine` says what runs its requests."""

    def __init__(
        self,
        app: Application,
        *,
        store: str | Store | AsyncStore | DatabaseEngine,
        scope: Identify | None = None,
        policy: PerRequest[Policy | None] = Policy(),  # noqa: B008  # frozen
        required: PerRequest[bool] = False,
        methods: Iterable[str] = ("POST", "PATCH"),
        key: str | JsonFieldKey | FindKey = "Idempotency-Key",
        keys: Strength = "any",
        strict: bool = False,
        endpoint: PerRequest[str | None] = None,
        fingerprint: Strategy | CustomFingerprint = raw,
        store_when: Preset | StoreWhen = "default",
        on_departure: OnDeparture = "finish",
        max_departed: int = MAX_DEPARTED,
        authorize: Authorize | None = None,
        max_body: int = MAX_BODY,
        body_timeout: float = BODY_TIMEOUT,
        fail_open: PerRequest[bool] = False,
        replay_header: str = "Idempotency-Replayed",
        keep_set_cookie: bool = True,
        docs_url: str = DOCS_URL,
        events: Sequence[Listener] = (log_event,),
        pepper: bytes = b"",
        name: str = "",
    ) -> None:
        options = check_options(
            scope=scope,
            policy=policy,
            required=required,
            methods=methods,
            key=key,
            keys=keys,
            strict=strict,
            endpoint=endpoint,
            fingerprint=fingerprint,
            store_when=store_when,
            on_departure=on_departure,
            max_departed=max_departed,
            authorize=authorize,
            max_body=max_body,
            body_timeout=body_timeout,
            fail_open=fail_open,
            replay_header=replay_header,
            keep_set_cookie=keep_set_cookie,
            docs_url=docs_url,
            pepper=pepper,
            name=name,
        )
        if "django.core.signals" in sys.modules:
            import retryproof.http.django  # noqa: F401  # hears what Django makes a response of
        self.app = app
        self._options = options
        self._engine = self._make_engine(
            app, options, store=store, policy=policy if isinstance(policy, Policy) else None, events=events
        )

    @abstractmethod
    def _make_engine(self, app: Application, options: Options, **engine_options: Any) -> LayerEngine:
        """The engine of this layer."""

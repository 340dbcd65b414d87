"""Publishers by URL, for the command line; each is imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any

from retryproof.core.address import FUNCTION, check_address, scheme_of
from retryproof.core.errors import ConfigurationError
from retryproof.publishers.base import Publisher
from retryproof.publishers.function import from_path

_SCHEMES = {
    "http": ("retryproof.publishers.httpx", "httpx"),
    "https": ("retryproof.publishers.httpx", "httpx"),
    "smtp": ("retryproof.publishers.smtp", None),
    "smtps": ("retryproof.publishers.smtp", None),
    "redis": ("retryproof.publishers.redis", "redis"),
    "rediss": ("retryproof.publishers.redis", "redis"),
}


def open_publisher(url: str, **options: Any) -> Publisher:
    """The publisher of https://…, smtp://…, redis://…/stream or module:function; it connects when it first sends."""
    if FUNCTION.fullmatch(url):
        if options:
            raise ConfigurationError(f"A function takes none of these options: {', '.join(options)}.")
        return from_path(url)
    scheme = scheme_of(url)
    module, extra = _SCHEMES.get(scheme, ("", None))
    if not module:
        raise ConfigurationError(
            f"There is no publisher for {scheme + '://' if scheme else 'what was given'}. Known: https://, http://, "
            "smtp://, smtps://, redis://…/stream, rediss://…/stream, and module:function."
        )
    check_address(url)
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("retryproof"):
            raise
        raise ConfigurationError(f"This publisher needs {extra!r}: pip install 'retryproof[{extra}]'.") from error
    publisher: Publisher = loaded.from_url(url, **options)
    return publisher

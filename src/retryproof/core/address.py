"""Addresses of servers, which may contain a password: they are checked first, and shown without the password.

If a password has an unescaped `/`, `?`, `#` or `@`, every library that reads URLs cuts it at the wrong place, and shows
its parts in messages as hosts and ports. So URLs are checked here first, and refused with messages of our own.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from retryproof.core.errors import ConfigurationError

HIDDEN = "***"
_SECRET_OPTIONS = ("password", "passwd", "pwd", "secret", "token", "sslpassword", "ssl_password")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""module:function."""
_NO_SERVER = frozenset({"sqlite", "memory"})


def scheme_of(url: str) -> str:
    """The scheme in lower case; "" if there is none that can be shown."""
    scheme, separator, _ = url.partition("://")
    return scheme.lower() if separator and _SCHEME.fullmatch(scheme) else ""


def check_address(url: str) -> None:
    """Refuse a URL that can be read in more than one way, with a ConfigurationError that shows no part of it."""
    scheme = scheme_of(url)
    if scheme in _NO_SERVER:
        return
    if not _has_one_reading(url):
        raise ConfigurationError(
            f"The {scheme or 'given'} URL cannot be read: its user or password holds one of / ? # @ : [ ] as it is, "
            "or its host or port is malformed. Write / as %2F, ? as %3F, # as %23, @ as %40."
        ) from None


def _has_one_reading(url: str) -> bool:
    if not scheme_of(url) or any(not character.isprintable() or character.isspace() for character in url):
        return False
    authority, rest = _parts(url)
    if authority.count("@") > 1:
        return False
    # A later "@" may mean that the text before it is a part of the password, and that the host follows it.
    # The path of a webhook may contain an "@", if the authority is only a host.
    if "@" in rest and not (scheme_of(url) in ("http", "https") and ":" not in authority and "@" not in authority):
        return False
    try:
        return all(_is_server(part) for part in authority.rpartition("@")[2].split(",")) and bool(urlsplit(url))
    except ValueError:
        return False


def _parts(url: str) -> tuple[str, str]:
    """The authority, and everything after it."""
    behind = url.partition("://")[2]
    authority = re.split(r"[/?#]", behind, maxsplit=1)[0]
    return authority, behind[len(authority) :]


def _is_server(host: str) -> bool:
    """host, host:port, [address]:port, or nothing."""
    return re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:\\\"'<>{}|^`]*)(:[0-9]{0,5})?", host) is not None


def redacted(url: str) -> str:
    """A URL as it may be shown, without its password."""
    try:
        check_address(url)
    except ConfigurationError:
        return f"{scheme_of(url) or '?'}://{HIDDEN}"
    return scrubbed(url, url)


def destination(url: str) -> str:
    """Only scheme and host, since the path and query of a webhook may be secrets too; or module:function."""
    if FUNCTION.fullmatch(url):
        return url
    try:
        check_address(url)
    except ConfigurationError:
        return f"{scheme_of(url) or '?'}://{HIDDEN}"
    return f"{scheme_of(url)}://{_parts(url)[0].rpartition('@')[2]}"


def scrubbed(text: str, url: str) -> str:
    """A text, such as a driver's message, without the secrets of this URL, however they are escaped."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets(url: str) -> set[str]:
    authority, rest = _parts(url)
    userinfo, at, _ = authority.rpartition("@")
    found = [userinfo.partition(":")[2]] if at else []
    query = rest.partition("#")[0].rpartition("?")[2]
    found += [value for name, value in parse_qsl(query) if name.lower() in _SECRET_OPTIONS]
    found += [
        option.partition("=")[2] for option in query.split("&") if option.partition("=")[0].lower() in _SECRET_OPTIONS
    ]
    return {
        spelling
        for secret in found
        for plain in (secret, unquote(secret))
        for spelling in (plain, quote(plain), quote(plain, safe=""), repr(plain)[1:-1])
        if spelling
    }

"""Keeping passwords out of what is printed: a store's URL holds one."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit

HIDDEN = "***"
_SECRET_OPTIONS = ("password", "passwd", "pwd", "secret", "token", "sslpassword", "ssl_password")


def redacted(url: str) -> str:
    """The URL as it may be shown."""
    return scrubbed(url, url)


def scrubbed(text: str, url: str) -> str:
    """A text, such as a driver's message, without the secrets of this URL in either spelling."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets(url: str) -> set[str]:
    userinfo, at, _ = url.partition("://")[2].partition("?")[0].rpartition("@")
    found = [userinfo.partition(":")[2]] if at else []
    query = urlsplit(url).query
    found += [value for name, value in parse_qsl(query) if name.lower() in _SECRET_OPTIONS]
    found += [
        option.partition("=")[2] for option in query.split("&") if option.partition("=")[0].lower() in _SECRET_OPTIONS
    ]
    return {spelling for secret in found if secret for spelling in (secret, unquote(secret))}

"""A request in a WSGI environ (PEP 3333): its parts as bytes, its headers, and its body. Pure.

The server has joined a header that came several times, with commas; the single values cannot be recovered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from retryproof.http.body import Body
from retryproof.http.request import HttpRequest

_RAW = ("RAW_URI", "REQUEST_URI")
"""Where servers leave the target as it was sent: gunicorn in the first, uWSGI, mod_wsgi and others in the second."""


_APART = ("HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH")
"""What a client's `Content_Length` becomes, say: CGI has other names for the real ones."""


class EnvironContext(Mapping[str, Any]):
    """An environ with the names of an ASGI scope too, so that `by_user`, `by_header` and callables work with both.

    `user` is what a layer further out has put into the environ under that name, or else `REMOTE_USER`, if it says one.
    """

    __slots__ = ("_environ", "_headers", "_made", "_raw_path")

    def __init__(self, environ: Mapping[str, Any], headers: Mapping[bytes, bytes], raw_path: bytes) -> None:
        self._environ = environ
        self._headers = headers
        self._raw_path = raw_path
        self._made: dict[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        return self._environ[name] if name in self._environ else self._names()[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._environ
        yield from (name for name in self._names() if name not in self._environ)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _names(self) -> dict[str, Any]:
        """What an ASGI scope has, made when it is first asked for."""
        made = self._made
        if made is None:
            environ = self._environ
            made = self._made = {
                "type": "http",
                "method": environ["REQUEST_METHOD"],
                "scheme": environ.get("wsgi.url_scheme", "http"),
                "path": _bytes(_path(environ)).decode("utf-8", "surrogateescape"),
                "raw_path": self._raw_path,
                "root_path": _bytes(environ.get("SCRIPT_NAME", "")).decode("utf-8", "surrogateescape"),
                "query_string": _bytes(environ.get("QUERY_STRING", "")),
                "headers": list(self._headers.items()),
            }
            if environ.get("REMOTE_USER"):
                made["user"] = environ["REMOTE_USER"]
        return made


def request_of(environ: Mapping[str, Any], key_header: bytes | None) -> HttpRequest:
    """The request in an environ. Callables of the user's are given an EnvironContext."""
    headers = {
        _bytes(name[5:].replace("_", "-").lower()): _bytes(str(value))
        for name, value in environ.items()
        if name.startswith("HTTP_") and name not in _APART
    }
    for name, header in (("CONTENT_TYPE", b"content-type"), ("CONTENT_LENGTH", b"content-length")):
        if environ.get(name):
            headers[header] = _bytes(environ[name])
    raw_path = _raw_path(environ)
    key_name = b"" if key_header is None else key_header.replace(b"_", b"-")  # an environ cannot tell them apart
    lines = (headers[key_name],) if key_name in headers else ()
    query = _bytes(environ.get("QUERY_STRING", ""))
    context = EnvironContext(environ, headers, raw_path)
    return HttpRequest(environ["REQUEST_METHOD"], raw_path, query, headers, True, lines, context)


def _path(environ: Mapping[str, Any]) -> str:
    path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return path


def _raw_path(environ: Mapping[str, Any]) -> bytes:
    for name in _RAW:
        raw = environ.get(name)
        if raw:
            target: str = raw.partition("?")[0]
            if target.startswith("/"):
                return _bytes(target)
            try:
                return _bytes(urlsplit(target).path or "/")  # proxies send an absolute form
            except ValueError:  # or something that is no address
                break
    return quote(_bytes(_path(environ))).encode("ascii")


def _bytes(text: str) -> bytes:
    """As the server decoded it; a layer further out may have put any text there."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")


def body_file(body: bytes | Body | None) -> BinaryIO:
    """A body that was read, to be read again."""
    return body.file() if isinstance(body, Body) else BytesIO(body or b"")

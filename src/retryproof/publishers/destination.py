"""A publisher's destination in a relay's routes: different for each destination, independent of the password."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlencode, urlsplit

_SECRET = re.compile(r"token|sig|secret|key|pass|pwd|auth|code|cred", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443, "smtp": 587, "smtps": 465, "redis": 6379, "rediss": 6379}


def identity(url: str, *, query: bool = True) -> str:
    """Scheme, host, port, path, and options that seem to contain no secret; all spellings of a URL give the same."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    options = [(name, value) for name, value in parse_qsl(parts.query) if query and not _SECRET.search(name)]
    host, port = (parts.hostname or "").lower(), parts.port or _PORTS.get(scheme, 0)
    return f"{scheme}://{host}:{port}{parts.path.rstrip('/')}?{urlencode(sorted(options))}"

"""`migrate`, by the name that applications import it by."""

from __future__ import annotations

from retryproof.sql.postgres.migrate import migrate

__all__ = ["migrate"]

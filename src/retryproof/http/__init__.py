"""HTTP: an API whose requests can be retried without a second effect."""

from retryproof.http.scope import by_header, by_host, by_user, single_tenant

__all__ = ["by_header", "by_host", "by_user", "single_tenant"]

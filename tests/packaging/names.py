"""The public names: add to them, do not rename them."""

from __future__ import annotations

NAMES = {
    "retryproof": {
        "AsyncIdempotency",
        "Idempotency",
        "Outcome",
        "Policy",
        "current_operation",
        "errors",
        "operation_key",
    },
    "retryproof.stores": {"InLoop", "aopen_store", "open_store"},
    "retryproof.http": {"by_header", "by_host", "by_user", "single_tenant"},
    "retryproof.http.asgi": {"IdempotencyMiddleware"},
    "retryproof.client.httpx": {"AsyncRetryTransport", "RetryTransport"},
    "retryproof.testing": {"AsyncStoreConformance", "StoreConformance"},
}

"""Events to Prometheus: the number of each kind, and durations.

    listener = PrometheusListener()
    app.add_middleware(IdempotencyMiddleware, store=…, scope=…, events=[log_event, listener])

Labels are `kind` and `where` (the endpoint's name or the function's scope), never a key or a digest (C11). Use few
names of endpoints. After `max_where` names, all others count as "other", so that no caller can fill the registry.
"""

from __future__ import annotations

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "PrometheusListener needs prometheus-client: pip install 'retryproof[prometheus]'", name="prometheus_client"
    ) from missing

from retryproof.observe.events import Event

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
"""Buckets in seconds: from a replay from memory to an attempt that runs for the default `max_run`."""
OTHER = "other"


class PrometheusListener:
    """`retryproof_events_total{kind,where}` and `retryproof_seconds{kind,where}`; make one for each registry.

    seconds: from before the claim to the outcome, for outcomes that have a duration.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, max_where: int = 100) -> None:
        registry = REGISTRY if registry is None else registry
        labels = ("kind", "where")
        self._events = Counter("retryproof_events", "Outcomes of operations.", labels, registry=registry)
        self._seconds = Histogram(
            "retryproof_seconds",
            "Seconds from before the claim to the outcome.",
            labels,
            registry=registry,
            buckets=BUCKETS,
        )
        self._max_where = max_where
        self._seen: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Count an event."""
        where = self._bounded(event.where)
        self._events.labels(event.kind.value, where).inc()
        if event.seconds > 0:
            self._seconds.labels(event.kind.value, where).observe(event.seconds)

    def _bounded(self, where: str) -> str:
        if where not in self._seen:
            if len(self._seen) >= self._max_where:
                return OTHER
            self._seen.add(where)
        return where

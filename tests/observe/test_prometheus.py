"""Outcomes as Prometheus metrics, through a real registry (O3)."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from retryproof import Idempotency
from retryproof.observe.events import Event, Kind
from retryproof.observe.prometheus import OTHER, PrometheusListener


def test_o3_counts_fresh_and_replayed_outcomes_of_a_real_engine() -> None:
    registry = CollectorRegistry()
    with Idempotency("memory://", events=[PrometheusListener(registry)]) as engine:
        for _ in range(3):
            engine.run("order-1", lambda: 1, scope="charge")

    assert registry.get_sample_value("retryproof_events_total", {"kind": "fresh", "where": "charge"}) == 1
    assert registry.get_sample_value("retryproof_events_total", {"kind": "replayed", "where": "charge"}) == 2
    assert registry.get_sample_value("retryproof_seconds_count", {"kind": "fresh", "where": "charge"}) == 1


def test_c11_no_label_holds_a_key_or_a_digest() -> None:
    registry = CollectorRegistry()
    with Idempotency("memory://", events=[PrometheusListener(registry)]) as engine:
        engine.run("secret-key", lambda: 1, scope="charge")
        digest = engine.id_of("charge", "secret-key").hex()[:16]

    exposed = generate_latest(registry).decode()
    assert "secret-key" not in exposed
    assert digest not in exposed


def test_an_event_without_a_duration_is_counted_and_not_timed() -> None:
    registry = CollectorRegistry()
    PrometheusListener(registry)(Event(kind=Kind.WEAK_KEY))

    assert registry.get_sample_value("retryproof_events_total", {"kind": "weak_key", "where": ""}) == 1
    assert registry.get_sample_value("retryproof_seconds_count", {"kind": "weak_key", "where": ""}) is None


@pytest.mark.parametrize("kind", Kind)
def test_o3_every_kind_is_counted(kind: Kind) -> None:
    registry = CollectorRegistry()
    PrometheusListener(registry)(Event(kind=kind, seconds=0.5))

    assert registry.get_sample_value("retryproof_events_total", {"kind": kind.value, "where": ""}) == 1


def test_names_past_the_limit_count_as_other() -> None:
    registry = CollectorRegistry()
    listener = PrometheusListener(registry, max_where=2)
    for where in ("a", "b", "c", "d", "a"):
        listener(Event(kind=Kind.FRESH, where=where))

    assert registry.get_sample_value("retryproof_events_total", {"kind": "fresh", "where": "a"}) == 2
    assert registry.get_sample_value("retryproof_events_total", {"kind": "fresh", "where": OTHER}) == 2

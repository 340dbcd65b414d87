"""Outcomes as spans that are linked across attempts, through the real SDK (O3)."""

from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from retryproof import AsyncIdempotency, Idempotency
from retryproof.http import single_tenant
from retryproof.http.asgi import IdempotencyMiddleware
from retryproof.observe.events import Event, Kind, Listener
from retryproof.observe.opentelemetry import OpenTelemetryListener, current_traceparent

REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """A tracer provider and what it has exported."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.listener = OpenTelemetryListener(self.provider)
        self.tracer = self.provider.get_tracer("app")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def only(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def traced() -> Traced:
    return Traced()


def test_o3_a_replay_in_another_trace_links_to_the_first_attempt(traced: Traced) -> None:
    with Idempotency("memory://", events=[traced.listener]) as engine:
        with traced.tracer.start_as_current_span("first") as first:
            engine.run("k", lambda: 1, scope="charge")
        with traced.tracer.start_as_current_span("second") as second:
            engine.run("k", lambda: 1, scope="charge")

    fresh, replayed = traced.only("retryproof fresh"), traced.only("retryproof replayed")
    assert fresh.parent is not None
    assert fresh.parent.span_id == first.get_span_context().span_id
    assert fresh.links == ()
    assert replayed.parent is not None
    assert replayed.parent.span_id == second.get_span_context().span_id
    assert [link.context.span_id for link in replayed.links] == [first.get_span_context().span_id]
    assert [link.context.trace_id for link in replayed.links] == [first.get_span_context().trace_id]


def test_o3_a_second_attempt_links_to_the_first(traced: Traced) -> None:
    def fail() -> int:
        raise RuntimeError("no answer from the bank")

    with Idempotency("memory://", events=[traced.listener]) as engine:
        with traced.tracer.start_as_current_span("first") as first, pytest.raises(RuntimeError):
            engine.run("k", fail, scope="charge")
        with traced.tracer.start_as_current_span("second"):
            engine.run("k", lambda: 1, scope="charge")

    failed, fresh = traced.only("retryproof failed"), traced.only("retryproof fresh")
    assert failed.status.status_code is StatusCode.ERROR
    assert [link.context.span_id for link in fresh.links] == [first.get_span_context().span_id]


async def test_o3_the_async_engine_records_the_current_span(traced: Traced) -> None:
    async with AsyncIdempotency("memory://", events=[traced.listener]) as engine:
        with traced.tracer.start_as_current_span("first") as first:
            await engine.run("k", lambda: 1, scope="charge")
        await engine.run("k", lambda: 1, scope="charge")

    replayed = traced.only("retryproof replayed")
    assert [link.context.span_id for link in replayed.links] == [first.get_span_context().span_id]


@pytest.mark.parametrize("inside_a_span", [False, True])
async def test_o3_a_request_records_its_span_or_else_its_traceparent_header(
    traced: Traced, inside_a_span: bool
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    layer = IdempotencyMiddleware(app, store="memory://", scope=single_tenant, events=[traced.listener])
    headers = {"idempotency-key": "k", "traceparent": REMOTE}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(layer), base_url="http://test") as client:
        if inside_a_span:
            with traced.tracer.start_as_current_span("server") as server:
                await client.post("/charges", headers=headers)
            expected = server.get_span_context().span_id
        else:
            await client.post("/charges", headers=headers)
            expected = int("b7ad6b7169203331", 16)
        again = await client.post("/charges", headers=headers)

    assert again.headers["idempotency-replayed"] == "true"
    assert [link.context.span_id for link in traced.only("retryproof replayed").links] == [expected]


def test_a_span_has_the_events_duration_digest_and_error_and_no_key(traced: Traced) -> None:
    error = RuntimeError("down")
    traced.listener(
        Event(kind=Kind.STORE_ERROR, digest="ab" * 8, where="charge", attempt=2, seconds=1.5, error=error, note="n")
    )

    span = traced.only("retryproof store_error")
    assert dict(span.attributes or {}) == {
        "retryproof.kind": "store_error",
        "retryproof.attempt": 2,
        "retryproof.digest": "ab" * 8,
        "retryproof.where": "charge",
        "retryproof.note": "n",
    }
    assert span.end_time is not None
    assert span.start_time is not None
    assert span.end_time - span.start_time == 1_500_000_000
    assert [event.name for event in span.events] == ["exception"]


@pytest.mark.parametrize("trace", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_malformed_recorded_trace_makes_no_link(traced: Traced, trace: str) -> None:
    with traced.tracer.start_as_current_span("current"):
        traced.listener(Event(kind=Kind.REPLAYED, trace=trace))

    assert traced.only("retryproof replayed").links == ()


def test_there_is_no_traceparent_outside_a_span(traced: Traced) -> None:
    assert current_traceparent() == ""
    with traced.tracer.start_as_current_span("current") as span:
        assert f"{span.get_span_context().span_id:016x}" in current_traceparent()


def test_a_listener_whose_trace_fails_changes_nothing() -> None:
    class Broken:
        def current_trace(self) -> str:
            raise RuntimeError("broken")

        def __call__(self, event: Event) -> None:
            pass

    broken: Listener = Broken()
    with Idempotency("memory://", events=[broken]) as engine:
        assert engine.run("k", lambda: 1, scope="charge").value == 1

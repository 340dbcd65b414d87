"""Events to OpenTelemetry: a span for each outcome that took time, linked to the trace that saw the operation first.

    listener = OpenTelemetryListener()
    app.add_middleware(IdempotencyMiddleware, store=…, scope=…, events=[log_event, listener])

The first claim records the trace context of its caller, which the engine gets from this listener. A retry, on any
server and at any later time, is a span in its caller's own trace, with a link to the first one. So you can find the
attempts at one operation from each other, and no trace grows for a day.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

try:
    from opentelemetry import trace
    from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "OpenTelemetryListener needs opentelemetry-api: pip install 'retryproof[opentelemetry]'", name="opentelemetry"
    ) from missing

from retryproof.observe.events import Event, Kind

ERRORS = frozenset(
    {Kind.FAILED, Kind.UNKNOWN, Kind.LEASE_LOST, Kind.UNSTORED, Kind.NEVER_STORED, Kind.STORE_ERROR, Kind.UNREADABLE}
)
_HEADER = "traceparent"
_PROPAGATOR = TraceContextTextMapPropagator()


def current_traceparent() -> str:
    """The current span's context as a W3C traceparent, or "" if there is none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get(_HEADER, "")


class OpenTelemetryListener:
    """Makes a span `retryproof <kind>` for each event, below the span that is current at that moment.

    Attributes: `retryproof.kind`, `.digest`, `.where`, `.attempt`, `.note`; never the key (C11).
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("retryproof", tracer_provider=tracer_provider)

    def current_trace(self) -> str:
        """The trace that the engine records with a first claim."""
        return current_traceparent()

    def __call__(self, event: Event) -> None:
        """Make the span. It ends now, and has the event's duration."""
        end = time.time_ns()
        span = self._tracer.start_span(
            f"retryproof {event.kind}",
            links=_links(event.trace),
            start_time=end - round(event.seconds * 1e9),
            attributes=_attributes(event),
        )
        if event.error is not None:
            span.record_exception(event.error)
        if event.kind in ERRORS:
            span.set_status(Status(StatusCode.ERROR, event.kind.value))
        span.end(end)


def _attributes(event: Event) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {"retryproof.kind": event.kind.value, "retryproof.attempt": event.attempt}
    for name, value in (("digest", event.digest), ("where", event.where), ("note", event.note)):
        if value:
            attributes[f"retryproof.{name}"] = value
    return attributes


def _links(recorded: str) -> Sequence[Link]:
    """Links to the recorded span, unless it is the current span itself, as in the first attempt."""
    context = _span_context(recorded)
    if not context.is_valid or context.span_id == trace.get_current_span().get_span_context().span_id:
        return ()
    return (Link(context, {"retryproof.link": "first attempt"}),)


def _span_context(traceparent: str) -> SpanContext:
    # A separate context, so that a malformed trace gives no span, and not the current one.
    extracted = _PROPAGATOR.extract({_HEADER: traceparent}, context=trace.set_span_in_context(trace.INVALID_SPAN))
    return trace.get_current_span(extracted).get_span_context()

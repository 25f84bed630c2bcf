"""Requests as OpenTelemetry spans, made when each has its end from the times of its stages. Needs `latentd[otel]`.

Where they go, how they are sampled and what they are called besides is said by OpenTelemetry's own OTEL_* variables.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)

from app import __version__
from app.api.door.access import Served, Trace
from app.api.door.traceparent import Parent


@dataclass(frozen=True)
class Spans:
    """What makes the spans of a request, and what sends the last of them."""

    make: Trace  # None where OpenTelemetry is switched off
    close: Callable[[], None]


def exporting() -> Spans:
    """Sent to OTEL_EXPORTER_OTLP_ENDPOINT by a thread of their own, which drops what it cannot keep up with."""
    provider = TracerProvider(resource=Resource.create({"service.name": "latentd", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return spans_to(provider)


def spans_to(provider: TracerProvider) -> Spans:
    """Those of `provider`."""
    return Spans(partial(_make, provider.get_tracer("latentd", __version__)), provider.shutdown)


def _make(tracer: Tracer, served: Served) -> str | None:
    now = time.perf_counter()
    zero = time.time_ns() - round(now * 1e9)  # of that clock

    def at(moment: float) -> int:
        return zero + round(moment * 1e9)

    root = tracer.start_span(
        served.name, _below(served.parent), SpanKind.SERVER, served.attributes, start_time=at(served.started)
    )
    inside = set_span_in_context(root, Context())
    for name, start, end in served.stages:
        tracer.start_span(name, inside, start_time=at(start)).end(at(end))
    if served.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        root.set_status(StatusCode.ERROR)
    root.end(at(now))
    found = root.get_span_context()
    return f"{found.trace_id:032x}" if found.is_valid else None


def _below(parent: Parent | None) -> Context:
    if parent is None:
        return Context()
    span = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), True, TraceFlags(parent.flags))
    return set_span_in_context(NonRecordingSpan(span), Context())

"""Spans, in an exporter that keeps them."""

import logging
import re
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from app import main, traces
from app.settings import Settings
from tests.service import latent, npy, picture, serving

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STAGES = ["admission", "read", "queue", "load", "compute", "write"]


@pytest.fixture
def kept(monkeypatch):
    """What is exported; the endpoint is set and nothing is sent there."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setenv(main.ENDPOINTS[0], "http://127.0.0.1:9")
    monkeypatch.setattr(traces, "exporting", lambda: traces.spans_to(provider))
    return exporter


async def test_a_request_is_a_span_with_its_stages_inside(models, kept, caplog):
    async with serving(models, default_model="kl") as service:
        with caplog.at_level(logging.INFO, "app.access"):
            answer = await service.post("/decode", content=npy(latent()), headers={"traceparent": PARENT})
        await service.get("/healthz/live")
        await service.get("/metrics")
    *stages, root = kept.get_finished_spans()
    assert (root.name, root.kind, root.status.status_code) == ("POST /decode", SpanKind.SERVER, StatusCode.UNSET)
    assert f"{root.context.trace_id:032x}-{root.parent.span_id:016x}" in PARENT
    assert root.attributes["latentd.model"] == "kl"
    assert root.attributes["latentd.request_id"] == answer.headers["X-Request-Id"]
    assert root.attributes["http.response.status_code"] == 200
    assert {span.parent.span_id for span in stages} == {root.context.span_id}
    assert all(root.start_time <= span.start_time <= span.end_time <= root.end_time for span in stages)
    assert sorted({span.name for span in stages}, key=STAGES.index) == STAGES
    told = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", answer.headers["Server-Timing"])}
    for name, ms in told.items():
        took = sum(span.end_time - span.start_time for span in stages if span.name == name)
        assert took / 1e6 == pytest.approx(ms, abs=0.06)
    assert f" trace={root.context.trace_id:032x} " in caplog.records[0].getMessage()


async def test_an_error_says_which(models, kept):
    async with serving(models, default_model="kl") as service:
        await service.post("/encode", content=b"no picture")
        await service.get("/no/such/route")
        service.engine.draining = True
        await service.post("/encode", content=picture())
    bad, lost, late = (span for span in kept.get_finished_spans() if span.kind is SpanKind.SERVER)
    assert (bad.name, bad.attributes["error.type"], bad.status.status_code) == (
        "POST /encode",
        "unsupported_media",
        StatusCode.UNSET,
    )
    assert bad.parent is None
    assert (lost.name, lost.attributes["error.type"]) == ("GET", "not_found")
    assert (late.attributes["error.type"], late.status.status_code) == ("unavailable", StatusCode.ERROR)


async def test_what_is_not_sampled_is_not_kept_and_has_its_trace_all_the_same(models, kept, caplog):
    async with serving(models, default_model="kl") as service:
        with caplog.at_level(logging.INFO, "app.access"):
            await service.get("/models", headers={"traceparent": PARENT[:-1] + "0"})
    assert not kept.get_finished_spans()
    assert caplog.records[0].__dict__["facts"]["trace_id"] == PARENT[3:35]


def test_it_is_off_without_an_endpoint(tmp_path, monkeypatch):
    for name in main.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "app.traces", None)  # an import would fail
    main.create_app(Settings(models=tmp_path, device="cpu"))


def test_an_endpoint_without_the_extra_is_told_and_does_not_end_the_start(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(main.ENDPOINTS[1], "http://127.0.0.1:9")
    monkeypatch.delitem(sys.modules, "app.traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    main.create_app(Settings(models=tmp_path, device="cpu"))
    assert "latentd[otel]" in caplog.text


async def test_a_collector_that_is_not_there_costs_nobody_anything(models, monkeypatch):
    monkeypatch.setenv(main.ENDPOINTS[0], "http://127.0.0.1:9")
    async with serving(models, default_model="kl") as service:
        assert (await service.get("/models")).status_code == 200

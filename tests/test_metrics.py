from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from app.metrics import SECONDS, DeviceMetrics, Metrics, StateCollector

PROMISED = {
    "vae_requests": ("op", "model", "status"),
    "vae_request_duration_seconds": ("op", "model"),
    "vae_stage_duration_seconds": ("op", "stage"),
    "vae_rejected": ("reason",),
    "vae_cancelled": ("stage",),
    "vae_batch_size": ("device", "op", "model"),
    "vae_batch_executions": ("device",),
    "vae_batch_items": ("device",),
    "vae_pixels": ("device", "op"),
    "vae_batch_item_failures": (
        "device",
        "reason",
    ),
    "vae_batch_retries": (
        "device",
        "reason",
    ),
    "vae_mode_executions": (
        "device",
        "mode",
    ),
    "vae_mode_fallbacks": ("device", "from", "to", "reason"),
    "vae_oom": ("device",),
    "vae_nonfinite": ("device",),
    "vae_model_loads": (
        "device",
        "result",
    ),
    "vae_model_load_duration_seconds": ("device",),
    "vae_model_evictions": (
        "device",
        "reason",
    ),
}


@pytest.mark.parametrize(("name", "labels"), PROMISED.items())
def test_each_metric_has_its_name_and_labels(name, labels):
    metrics = Metrics(CollectorRegistry())
    found = {metric._name: metric._labelnames for metric in vars(metrics).values() if hasattr(metric, "_labelnames")}
    assert found[name] == labels


def test_state_is_read_when_it_is_asked_for():
    registry = CollectorRegistry()
    depth = 3.0

    def gauges():
        yield "queue_depth", "Waiting.", {"op": "encode", "model": "a"}, depth
        yield "queue_depth", "Waiting.", {"op": "decode", "model": 'b"\n'}, 1
        yield "draining", "Shutting down.", {}, True

    registry.register(StateCollector(gauges))
    assert registry.get_sample_value("vae_queue_depth", {"op": "encode", "model": "a"}) == 3
    depth = 4.0
    assert registry.get_sample_value("vae_queue_depth", {"op": "encode", "model": "a"}) == 4
    text = generate_latest(registry).decode()
    assert text.count("# TYPE vae_queue_depth gauge") == 1
    assert r'model="b\"\n"' in text
    assert "vae_draining 1.0" in text


def test_two_services_do_not_share_their_counts():
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    DeviceMetrics(first, "cpu").oom.inc()
    assert first.registry.get_sample_value("vae_oom_total", {"device": "cpu"}) == 1
    assert second.registry.get_sample_value("vae_oom_total", {"device": "cpu"}) is None


def test_what_a_device_does_has_its_name():
    metrics = Metrics(CollectorRegistry())
    here, there = (DeviceMetrics(metrics, name) for name in ("cuda:0", "cuda:1"))
    here.pixels("decode").inc(512 * 512)
    there.pixels("decode").inc(1)
    there.load_seconds.observe(0.2)
    there.fallbacks("fp16", "fp32", "nonfinite").inc(2)
    value = metrics.registry.get_sample_value
    assert value("vae_pixels_total", {"device": "cuda:0", "op": "decode"}) == 512 * 512
    assert value("vae_pixels_total", {"device": "cuda:1", "op": "decode"}) == 1
    assert value("vae_model_load_duration_seconds_count", {"device": "cuda:1"}) == 1
    labels = {"device": "cuda:1", "from": "fp16", "to": "fp32", "reason": "nonfinite"}
    assert value("vae_mode_fallbacks_total", labels) == 2


def test_the_buckets_tell_half_a_millisecond_from_ten_minutes():
    assert list(SECONDS) == sorted(set(SECONDS))
    assert (SECONDS[0], SECONDS[-1]) == (0.0005, 600)
    assert all(upper <= 3 * lower for lower, upper in pairwise(SECONDS))  # a quantile is never far off

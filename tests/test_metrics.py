import pytest
from prometheus_client import CollectorRegistry, generate_latest

from app.metrics import Metrics, StateCollector

PROMISED = {
    "vae_requests": ("op", "model", "status"),
    "vae_request_duration_seconds": ("op", "model"),
    "vae_stage_duration_seconds": ("op", "stage"),
    "vae_rejected": ("reason",),
    "vae_cancelled": ("stage",),
    "vae_batch_size": ("op", "model"),
    "vae_batch_executions": (),
    "vae_batch_items": (),
    "vae_batch_item_failures": ("reason",),
    "vae_batch_retries": ("reason",),
    "vae_mode_executions": ("mode",),
    "vae_mode_fallbacks": ("from", "to", "reason"),
    "vae_oom": (),
    "vae_nonfinite": (),
    "vae_model_loads": ("result",),
    "vae_model_load_duration_seconds": (),
    "vae_model_evictions": ("reason",),
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
    first.oom.inc()
    assert first.registry.get_sample_value("vae_oom_total") == 1
    assert second.registry.get_sample_value("vae_oom_total") == 0

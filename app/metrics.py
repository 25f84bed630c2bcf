"""Every Prometheus object, on a registry it is given. Label values come from the model registry and fixed sets only."""

from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""From a stage of a small picture on a fast card to a very large one on a slow device."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)

Gauge = tuple[str, str, dict[str, str], float]
"""(name, help, labels, value) of something that is read at scrape time."""


class Metrics:
    """The counters and histograms that the service moves as it works."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vae_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"vae_{name}", text, labels, buckets=buckets, registry=registry)

        self.registry = registry
        self.requests = counter("requests", "Answered requests.", "op", "model", "status")
        self.request_seconds = histogram("request_duration_seconds", "From first byte to last.", "op", "model")
        self.stage_seconds = histogram("stage_duration_seconds", "Time in each stage of a request.", "op", "stage")
        self.rejected = counter("rejected", "Requests refused or dropped before compute.", "reason")
        self.cancelled = counter("cancelled", "Requests whose client went away.", "stage")
        self.batch_size = histogram("batch_size", "Items in a forward.", "device", "op", "model", buckets=BATCHES)
        self.batches = counter("batch_executions", "Forwards.", "device")
        self.items = counter("batch_items", "Items in forwards.", "device")
        self.pixels = counter("pixels", "Pixels of the pictures that were encoded or decoded.", "device", "op")
        self.item_failures = counter("batch_item_failures", "Items that failed in compute.", "device", "reason")
        self.retries = counter("batch_retries", "Forwards run again.", "device", "reason")
        self.executions = counter("mode_executions", "Forwards by mode.", "device", "mode")
        self.fallbacks = counter("mode_fallbacks", "Changes of mode.", "device", "from", "to", "reason")
        self.oom = counter("oom", "Forwards that ran out of memory.", "device")
        self.nonfinite = counter("nonfinite", "Items whose output was not finite.", "device")
        self.loads = counter("model_loads", "Models brought to a device.", "device", "result")
        self.load_seconds = histogram("model_load_duration_seconds", "Time to bring a model to a device.", "device")
        self.evictions = counter("model_evictions", "Models removed from a device.", "device", "reason")

    def forget(self, model: str) -> None:
        """Removes what is labelled with a model."""
        for metric in (self.requests, self.request_seconds, self.batch_size):
            metric.remove_by_labels({"model": model})


class DeviceMetrics:
    """What moves as one device works: `Metrics` with the device filled in; called with the labels that are left."""

    def __init__(self, metrics: Metrics, device: str) -> None:
        self.rejected, self.cancelled = metrics.rejected, metrics.cancelled
        self.batch_size = partial(metrics.batch_size.labels, device)
        self.batches = metrics.batches.labels(device)
        self.items = metrics.items.labels(device)
        self.pixels = partial(metrics.pixels.labels, device)
        self.item_failures = partial(metrics.item_failures.labels, device)
        self.retries = partial(metrics.retries.labels, device)
        self.executions = partial(metrics.executions.labels, device)
        self.fallbacks = partial(metrics.fallbacks.labels, device)
        self.oom = metrics.oom.labels(device)
        self.nonfinite = metrics.nonfinite.labels(device)
        self.loads = partial(metrics.loads.labels, device)
        self.load_seconds = metrics.load_seconds.labels(device)
        self.evictions = partial(metrics.evictions.labels, device)


class StateCollector:
    """Reads the service's state when Prometheus asks, instead of keeping gauges up to date."""

    def __init__(self, gauges: Callable[[], Iterator[Gauge]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        """One family per gauge name."""
        families: dict[str, GaugeMetricFamily] = {}
        for name, text, labels, value in self._gauges():
            if name not in families:
                families[name] = GaugeMetricFamily(f"vae_{name}", text, labels=list(labels))
            families[name].add_metric(list(labels.values()), value)
        yield from families.values()

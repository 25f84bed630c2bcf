"""Every Prometheus object, on a registry it is given. Label values come from the model registry and fixed sets only."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

# OpenTelemetry's advice for http.server.request.duration, and 20 and 40 s for very large pictures on small devices.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40)
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
        self.batch_size = histogram("batch_size", "Items in a forward.", "op", "model", buckets=BATCHES)
        self.batches = counter("batch_executions", "Forwards.")
        self.items = counter("batch_items", "Items in forwards.")
        self.item_failures = counter("batch_item_failures", "Items that failed in compute.", "reason")
        self.retries = counter("batch_retries", "Forwards run again.", "reason")
        self.executions = counter("mode_executions", "Forwards by mode.", "mode")
        self.fallbacks = counter("mode_fallbacks", "Changes of mode.", "from", "to", "reason")
        self.oom = counter("oom", "Forwards that ran out of memory.")
        self.nonfinite = counter("nonfinite", "Items whose output was not finite.")
        self.loads = counter("model_loads", "Models brought to a device.", "result")
        self.load_seconds = histogram("model_load_duration_seconds", "Time to bring a model to a device.")
        self.evictions = counter("model_evictions", "Models removed from a device.", "reason")


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

"""Every metric of the server, declared once, and none of them labelled by sequence id."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

# When a series began is noise on a page; Prometheus finds out by itself.
disable_created_metrics()

_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class ArrayHistogram(Collector):
    """A histogram that observes whole arrays: one call a run, not one a chunk."""

    def __init__(
        self, name: str, text: str, buckets: Iterable[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = np.array(sorted(buckets))
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}
        registry.register(self)

    def observe(self, model: str, values: NDArray[np.float64]) -> None:
        """Count every value of the array."""
        counts = self._counts.setdefault(model, np.zeros(len(self._bounds) + 1, np.int64))
        if len(values) == 1:
            counts[self._bounds.searchsorted(values[0])] += 1
        else:
            counts += np.bincount(self._bounds.searchsorted(values), minlength=len(counts))
        self._sums[model] = self._sums.get(model, 0.0) + float(values.sum())

    def collect(self) -> Iterable[Metric]:
        """What Prometheus reads."""
        family = HistogramMetricFamily(self._name, self._text, labels=["model"])
        for model, counts in self._counts.items():
            bounds = [*(str(bound) for bound in self._bounds), "+Inf"]
            buckets = list(zip(bounds, np.cumsum(counts).tolist(), strict=True))
            family.add_metric([model], buckets, self._sums[model])
        yield family


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sluice_{name}", text, ["model", *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"sluice_{name}", text, ["model"], registry=registry)

        def arrays(name: str, text: str, buckets: Iterable[float]) -> ArrayHistogram:
            return ArrayHistogram(f"sluice_{name}", text, buckets, registry)

        self.build = Info("sluice_build", "Versions of what runs here.", registry=registry)
        self.is_ready = Gauge("sluice_ready", "1 while requests are welcome.", registry=registry)
        self.streams = gauge("streams_open", "Infer streams that are open.")
        self.steps = counter("steps", "Steps applied.")
        self.chunks = counter("chunks", "Chunks received.")
        self.runs = counter("runs", "Calls of ONNX Runtime.")
        self.runs_failed = counter("runs_failed", "Calls of ONNX Runtime that failed.")
        self.padding = counter("padding_steps", "Steps computed only to fill a run up.")
        self.run_sequences = arrays("run_sequences", "Sequences in one run.", _SIZES)
        self.run_seconds = Histogram(
            "sluice_run_seconds", "One run.", ["model"], buckets=_SECONDS, registry=registry
        )
        self.queue_seconds = arrays(
            "queue_seconds", "From a chunk's arrival until it is taken into a run.", _SECONDS
        )
        self.response_seconds = arrays(
            "response_seconds",
            "From the arrival of a chunk until its outputs are handed to the stream.",
            _SECONDS,
        )
        self.sequences_live = gauge("sequences_live", "Sequences with a state here.")
        self.sequences_parked = gauge("sequences_parked", "Live sequences on no stream.")
        self.sequences_max = gauge("sequences_max", "Live sequences that are allowed.")
        self.state_bytes = gauge("state_bytes", "Bytes of all live states.")
        self.opened = counter("sequences_opened", "Sequences opened, by origin.", "origin")
        self.closed = counter("sequences_closed", "Sequences and lanes ended.", "reason")
        self.faults = counter("faults", "Faults told to clients.", "code", "reason")
        self.load_seconds = gauge("model_load_seconds", "Load, self-test and warm-up.")
        self.is_bit_exact = gauge(
            "model_bit_exact", "1 when the self-test gave the same bits however it ran."
        )

    def follow(self, model: str, gauges: dict[Gauge, Callable[[], float]]) -> None:
        """Let gauges read their values at scrape time."""
        for gauge, read in gauges.items():
            gauge.labels(model).set_function(read)

    def model(self, name: str) -> "ModelMetrics":
        """What one model's host counts."""
        return ModelMetrics(self, name)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The page for a scrape that accepts `accept`: (body, content type)."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class ModelMetrics:
    """The counters of one model, looked up once."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.name = name
        self.all = metrics
        self._steps = metrics.steps.labels(name)
        self._chunks = metrics.chunks.labels(name)
        self._runs = metrics.runs.labels(name)
        self._runs_failed = metrics.runs_failed.labels(name)
        self._padding = metrics.padding.labels(name)
        self._run_seconds = metrics.run_seconds.labels(name)

    def chunks_received(self, chunks: int) -> None:
        """A message with that many chunks has come."""
        self._chunks.inc(chunks)

    def run_started(self, waited: NDArray[np.float64]) -> None:
        """A run takes chunks that waited that many seconds."""
        self.all.queue_seconds.observe(self.name, waited)

    def run_ended(self, *, sequences: int, steps: int, cells: int, seconds: float) -> None:
        """A run of `cells` = sequences × longest chunk had `steps` that count."""
        self._runs.inc()
        self._steps.inc(steps)
        self._padding.inc(cells - steps)
        self._run_seconds.observe(seconds)
        self.all.run_sequences.observe(self.name, np.array([sequences], np.float64))

    def run_failed(self) -> None:
        """ONNX Runtime refused a run."""
        self._runs_failed.inc()

    def delivered(self, took: NDArray[np.float64]) -> None:
        """Outputs are handed to the streams that many seconds after their chunks came."""
        self.all.response_seconds.observe(self.name, took)

    def opened(self, origin: str) -> None:
        """A sequence was opened: started, resumed, taken over …"""
        self.all.opened.labels(self.name, origin).inc()

    def closed(self, reason: str) -> None:
        """A sequence or its lane ended."""
        self.all.closed.labels(self.name, reason).inc()

    def fault(self, code: str, reason: str) -> None:
        """A client was told of a fault."""
        self.all.faults.labels(self.name, code, reason).inc()


def as_info(versions: dict[str, Any]) -> dict[str, str]:
    """Label values for `build`."""
    return {key.replace("-", "_"): str(value) for key, value in versions.items()}

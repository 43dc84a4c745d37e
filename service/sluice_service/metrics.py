"""Declares every metric of the server, labelled by model and never by sequence id."""

import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

# Without the series that tell when each counter was created: Prometheus does not need them.
disable_created_metrics()

_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class _ByModel(Collector):
    """A family of metrics by model, kept as plain numbers and read when Prometheus scrapes.

    For those that each run changes. prometheus_client's own take a lock for each change;
    these need none, because they change on the event loop only.
    """

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name = f"sluice_{name}"
        self._text = text
        registry.register(self)


class Counters(_ByModel):
    """A family of counters, one for each model."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        super().__init__(name, text, registry)
        self._counts: dict[str, Count] = {}

    def model(self, name: str) -> "Count":
        """The counter of one model."""
        return self._counts.setdefault(name, Count())

    def collect(self) -> Iterable[Metric]:
        """The samples of a scrape."""
        family = CounterMetricFamily(self._name, self._text, labels=["model"])
        for name, count in self._counts.items():
            family.add_metric([name], count.value)
        yield family


class Count:
    """The counter of one model."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int = 1) -> None:
        """Increase it."""
        self.value += amount


class Histograms(_ByModel):
    """A family of histograms with the same buckets, one for each model."""

    def __init__(
        self, name: str, text: str, bounds: Iterable[float], registry: CollectorRegistry
    ) -> None:
        super().__init__(name, text, registry)
        self._bounds = list(bounds)
        self._models: dict[str, Histogram] = {}

    def model(self, name: str) -> "Histogram":
        """The histogram of one model."""
        return self._models.setdefault(name, Histogram(self._bounds))

    def collect(self) -> Iterable[Metric]:
        """The samples of a scrape."""
        family = HistogramMetricFamily(self._name, self._text, labels=["model"])
        names = [*map(str, self._bounds), "+Inf"]
        for model, one in self._models.items():
            buckets = list(zip(names, itertools.accumulate(one.counts), strict=True))
            family.add_metric([model], buckets, one.sum)
        yield family


class Histogram:
    """The histogram of one model."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: list[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        """Add a value, `weight` times."""
        self.counts[bisect_left(self._bounds, value)] += weight
        self.sum += value * weight

    def observe_ages(self, now: float, moments: list[float], weights: list[int]) -> None:
        """Add the time from each of `moments` until `now`, as often as its weight says."""
        bounds, counts = self._bounds, self.counts
        for moment, weight in zip(moments, weights, strict=True):
            counts[bisect_left(bounds, now - moment)] += weight
            self.sum += (now - moment) * weight


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._models: dict[str, ModelMetrics] = {}
        self._followed: dict[str, list[Gauge]] = {}
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sluice_{name}", text, ["model", *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"sluice_{name}", text, ["model"], registry=registry)

        def counters(name: str, text: str) -> Counters:
            return Counters(name, text, registry)

        def histograms(name: str, text: str, bounds: Iterable[float]) -> Histograms:
            return Histograms(name, text, bounds, registry)

        self.build = Info(
            "sluice_build", "Versions of the software that runs here.", registry=registry
        )
        self.is_ready = Gauge(
            "sluice_ready", "1 while the server accepts requests, else 0.", registry=registry
        )
        self.streams = gauge("streams_open", "Open Infer streams.")
        self.steps = counters("steps", "Steps applied.")
        self.chunks = counters("chunks", "Chunks received.")
        self.runs = counters("runs", "Runs: calls of ONNX Runtime.")
        self.padding = counters("padding_steps", "Steps computed only as padding.")
        self.run_sequences = histograms("run_sequences", "Sequences in each run.", _SIZES)
        self.run_seconds = histograms("run_seconds", "Duration of each run.", _SECONDS)
        self.queue_seconds = histograms(
            "queue_seconds", "Time from the arrival of a chunk until a run takes it.", _SECONDS
        )
        self.response_seconds = histograms(
            "response_seconds",
            "Time from the arrival of a chunk until its outputs are handed to its stream.",
            _SECONDS,
        )
        self.sequences_live = gauge(
            "sequences_live", "Live sequences: those with a state in this process."
        )
        self.sequences_parked = gauge(
            "sequences_parked", "Live sequences that are not attached to a stream."
        )
        self.sequences_max = gauge("sequences_max", "The limit of live sequences.")
        self.sequences_waiting = gauge(
            "sequences_waiting", "New sequences that wait in the backlog for a place."
        )
        self.state_bytes = gauge("state_bytes", "Bytes of all live states.")
        self.opened = counter("sequences_opened", "Sequences opened, by origin.", "origin")
        self.closed = counter("sequences_closed", "Sequences and lanes ended, by reason.", "reason")
        self.faults = counter(
            "faults", "Faults sent to clients, by code and reason.", "code", "reason"
        )
        self.restored = counter(
            "sequences_restored",
            "Sequences restored from the store; exact: with bit-identical arithmetic.",
            "exact",
        )
        self.fenced = counter(
            "sequences_fenced", "Sequences lost because another process has claimed them."
        )
        self.checkpoints = counters("checkpoints", "Checkpoints written.")
        self.checkpoint_seconds = histograms(
            "checkpoint_seconds", "Duration of each write of checkpoints to the store.", _SECONDS
        )
        self.store_failures = counter("store_failures", "Calls that the store did not answer.")
        self.store_down_seconds = gauge(
            "store_down_seconds", "How long the store has not answered; 0 while it answers."
        )
        self.undurable_steps = gauge(
            "undurable_steps",
            "Steps not in the store yet, of the sequence that is furthest ahead of it.",
        )
        self.load_seconds = gauge("model_load_seconds", "Duration of load, self-test and warm-up.")
        self.version = gauge("model_version", "The version that new sequences use.")
        self.versions_loaded = gauge(
            "model_versions_loaded", "Versions that live or new sequences use."
        )
        self.load_failures = counter(
            "model_load_failures", "Model files of the repository that could not be served."
        )
        self.is_bit_exact = gauge(
            "model_bit_exact",
            "1 if the self-test gave the same bits alone, batched, padded and cut.",
        )

    def follow(self, model: str, gauges: dict[Gauge, Callable[[], float]]) -> None:
        """Have gauges read their values when Prometheus scrapes."""
        self._followed.setdefault(model, []).extend(gauges)
        for gauge, read in gauges.items():
            gauge.labels(model).set_function(read)

    def forget(self, model: str) -> None:
        """Remove the gauges of a model that is not served any more; its counters stay."""
        for gauge in self._followed.pop(model):
            gauge.remove(model)

    def model(self, name: str) -> "ModelMetrics":
        """The metrics that one model's host changes."""
        if name not in self._models:
            self._models[name] = ModelMetrics(self, name)
        return self._models[name]

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The page for a scrape that accepts `accept`: (body, content type)."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class ModelMetrics:
    """The metrics that one model's host changes."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.name = name
        self.all = metrics
        self.chunks = metrics.chunks.model(name)
        self.steps = metrics.steps.model(name)
        self.runs = metrics.runs.model(name)
        self._padding = metrics.padding.model(name)
        self.run_sequences = metrics.run_sequences.model(name)
        self.run_seconds = metrics.run_seconds.model(name)
        self.queue_seconds = metrics.queue_seconds.model(name)
        self._response_seconds = metrics.response_seconds.model(name)
        self._checkpoints = metrics.checkpoints.model(name)
        self._checkpoint_seconds = metrics.checkpoint_seconds.model(name)
        # Seconds spent composing, executing and delivering runs, each multiplied by the number
        # of sequences in the run.
        self.composing_seconds = self.computed_seconds = self.delivering_seconds = 0.0

    def run_started(self, began: float, arrived: list[float], chunks: list[int]) -> None:
        """A run, composed since `began`, takes chunks whose messages arrived at these times."""
        now = time.monotonic()
        self.composing_seconds += (now - began) * sum(chunks)
        self.queue_seconds.observe_ages(now, arrived, chunks)

    def run_ended(self, sequences: int, steps: int, cells: int, seconds: float) -> None:
        """A run of `cells` (sequences × longest chunk) has applied `steps`."""
        self.runs.value += 1
        self.steps.value += steps
        self._padding.value += cells - steps
        self.run_sequences.observe(sequences)
        self.run_seconds.observe(seconds)
        self.computed_seconds += seconds * sequences

    def delivered(self, began: float, arrived: list[float], chunks: list[int]) -> None:
        """Outputs, delivered since `began`, of messages that arrived at these times."""
        now = time.monotonic()
        self.delivering_seconds += (now - began) * sum(chunks)
        self._response_seconds.observe_ages(now, arrived, chunks)

    def opened(self, origin: str) -> None:
        """A sequence was opened; `origin` tells how, such as create or resume."""
        self.all.opened.labels(self.name, origin).inc()

    def closed(self, reason: str) -> None:
        """A sequence or its lane ended."""
        self.all.closed.labels(self.name, reason).inc()

    def restored(self, *, is_exact: bool) -> None:
        """A sequence continues from the store; `is_exact`: this machine gives the same bits."""
        self.all.restored.labels(self.name, str(is_exact).lower()).inc()

    def fenced(self) -> None:
        """Another process has claimed a sequence."""
        self.all.fenced.labels(self.name).inc()

    def checkpointed(self, count: int, seconds: float) -> None:
        """The store has written that many checkpoints in one call."""
        self._checkpoints.add(count)
        self._checkpoint_seconds.observe(seconds)

    def store_failed(self) -> None:
        """The store did not answer."""
        self.all.store_failures.labels(self.name).inc()

    def fault(self, code: str, reason: str) -> None:
        """A fault was sent to a client."""
        self.all.faults.labels(self.name, code, reason).inc()


def merge_pages(pages: dict[int, str]) -> tuple[bytes, str]:
    """The text pages of several workers as one; each sample gets its worker's number."""
    families: dict[str, Metric] = {}
    for number, page in pages.items():
        for family in text_string_to_metric_families(page):
            merged = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            merged.samples += [
                sample._replace(labels={**sample.labels, "worker": str(number)})
                for sample in family.samples
            ]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(families.values()))
    encoder, content_type = choose_encoder("")
    return encoder(registry), content_type


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def as_info(versions: dict[str, Any]) -> dict[str, str]:
    """Label values for `build`."""
    return {key.replace("-", "_"): str(value) for key, value in versions.items()}

"""Every metric of the server, declared once, and none of them labelled by sequence id."""

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

# When a series began is noise on a page; Prometheus finds out by itself.
disable_created_metrics()

_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class _ByModel(Collector):
    """A family of figures by model that a run changes: plain numbers, read at scrape time.

    The library's own take a lock for each change; all of these change on one
    event loop only.
    """

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name = f"sluice_{name}"
        self._text = text
        registry.register(self)


class Tally(_ByModel):
    """Counters."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        super().__init__(name, text, registry)
        self._counts: dict[str, Count] = {}

    def model(self, name: str) -> "Count":
        """The counter of one model."""
        return self._counts.setdefault(name, Count())

    def collect(self) -> Iterable[Metric]:
        """What Prometheus reads."""
        family = CounterMetricFamily(self._name, self._text, labels=["model"])
        for name, count in self._counts.items():
            family.add_metric([name], count.value)
        yield family


class Count:
    """One counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int = 1) -> None:
        """Count up."""
        self.value += amount


class Histograms(_ByModel):
    """Histograms with the same buckets."""

    def __init__(
        self, name: str, text: str, bounds: Iterable[float], registry: CollectorRegistry
    ) -> None:
        super().__init__(name, text, registry)
        self._bounds = list(bounds)
        self._models: dict[str, Distribution] = {}

    def model(self, name: str) -> "Distribution":
        """The histogram of one model."""
        return self._models.setdefault(name, Distribution(self._bounds))

    def collect(self) -> Iterable[Metric]:
        """What Prometheus reads."""
        family = HistogramMetricFamily(self._name, self._text, labels=["model"])
        names = [*map(str, self._bounds), "+Inf"]
        for model, one in self._models.items():
            buckets = list(zip(names, itertools.accumulate(one.counts), strict=True))
            family.add_metric([model], buckets, one.sum)
        yield family


class Distribution:
    """One histogram."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: list[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        """Count a value that came up `weight` times."""
        self.counts[bisect_left(self._bounds, value)] += weight
        self.sum += value * weight

    def observe_ages(self, now: float, moments: list[float], weights: list[int]) -> None:
        """Count how long ago each of `moments` was, as often as its weight says."""
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

        def tally(name: str, text: str) -> Tally:
            return Tally(name, text, registry)

        def histograms(name: str, text: str, bounds: Iterable[float]) -> Histograms:
            return Histograms(name, text, bounds, registry)

        self.build = Info("sluice_build", "Versions of what runs here.", registry=registry)
        self.is_ready = Gauge("sluice_ready", "1 while requests are welcome.", registry=registry)
        self.streams = gauge("streams_open", "Infer streams that are open.")
        self.steps = tally("steps", "Steps applied.")
        self.chunks = tally("chunks", "Chunks received.")
        self.runs = tally("runs", "Calls of ONNX Runtime.")
        self.padding = tally("padding_steps", "Steps computed only to fill a run up.")
        self.run_sequences = histograms("run_sequences", "Sequences in one run.", _SIZES)
        self.run_seconds = histograms("run_seconds", "One run.", _SECONDS)
        self.queue_seconds = histograms(
            "queue_seconds", "From a chunk's arrival until it is taken into a run.", _SECONDS
        )
        self.response_seconds = histograms(
            "response_seconds",
            "From the arrival of a chunk until outputs of it are handed to its stream.",
            _SECONDS,
        )
        self.sequences_live = gauge("sequences_live", "Sequences with a state here.")
        self.sequences_parked = gauge("sequences_parked", "Live sequences on no stream.")
        self.sequences_max = gauge("sequences_max", "Live sequences that are allowed.")
        self.sequences_waiting = gauge("sequences_waiting", "New sequences that wait for a place.")
        self.state_bytes = gauge("state_bytes", "Bytes of all live states.")
        self.opened = counter("sequences_opened", "Sequences opened, by origin.", "origin")
        self.closed = counter("sequences_closed", "Sequences and lanes ended.", "reason")
        self.faults = counter("faults", "Faults told to clients.", "code", "reason")
        self.restored = counter(
            "sequences_restored", "Sequences taken from the store; exact: the same bits.", "exact"
        )
        self.fenced = counter("sequences_fenced", "Sequences that another process has claimed.")
        self.checkpoints = tally("checkpoints", "Checkpoints written.")
        self.checkpoint_seconds = histograms(
            "checkpoint_seconds", "One write of many checkpoints.", _SECONDS
        )
        self.store_failures = counter("store_failures", "Times the store did not answer.")
        self.store_down_seconds = gauge(
            "store_down_seconds", "For how long the store has not answered; 0 while it does."
        )
        self.undurable_steps = gauge(
            "undurable_steps", "Steps that the sequence furthest ahead is ahead of the store."
        )
        self.load_seconds = gauge("model_load_seconds", "Load, self-test and warm-up.")
        self.version = gauge("model_version", "The version on which sequences begin.")
        self.versions_loaded = gauge(
            "model_versions_loaded", "Versions on which sequences run or begin."
        )
        self.load_failures = counter("model_load_failures", "Files that could not be served.")
        self.is_bit_exact = gauge(
            "model_bit_exact", "1 when the self-test gave the same bits however it ran."
        )

    def follow(self, model: str, gauges: dict[Gauge, Callable[[], float]]) -> None:
        """Let gauges read their values at scrape time."""
        self._followed.setdefault(model, []).extend(gauges)
        for gauge, read in gauges.items():
            gauge.labels(model).set_function(read)

    def forget(self, model: str) -> None:
        """Let go of the gauges of a model that is served no more; what was counted stays."""
        for gauge in self._followed.pop(model):
            gauge.remove(model)

    def model(self, name: str) -> "ModelMetrics":
        """What one model's host counts."""
        if name not in self._models:
            self._models[name] = ModelMetrics(self, name)
        return self._models[name]

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The page for a scrape that accepts `accept`: (body, content type)."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class ModelMetrics:
    """What one model's host counts."""

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
        # How long runs took, once for each sequence in them: to put together, to execute,
        # to hand out.
        self.composing_seconds = self.computed_seconds = self.delivering_seconds = 0.0

    def run_started(self, began: float, arrived: list[float], chunks: list[int]) -> None:
        """A run, put together since `began`, takes chunks of messages that came at these times."""
        now = time.monotonic()
        self.composing_seconds += (now - began) * sum(chunks)
        self.queue_seconds.observe_ages(now, arrived, chunks)

    def run_ended(self, sequences: int, steps: int, cells: int, seconds: float) -> None:
        """A run of `cells` = sequences × longest chunk has applied `steps`."""
        self.runs.value += 1
        self.steps.value += steps
        self._padding.value += cells - steps
        self.run_sequences.observe(sequences)
        self.run_seconds.observe(seconds)
        self.computed_seconds += seconds * sequences

    def delivered(self, began: float, arrived: list[float], chunks: list[int]) -> None:
        """Outputs, handed out since `began`, of messages that came then are with their streams."""
        now = time.monotonic()
        self.delivering_seconds += (now - began) * sum(chunks)
        self._response_seconds.observe_ages(now, arrived, chunks)

    def opened(self, origin: str) -> None:
        """A sequence was opened: started, resumed, taken over …"""
        self.all.opened.labels(self.name, origin).inc()

    def closed(self, reason: str) -> None:
        """A sequence or its lane ended."""
        self.all.closed.labels(self.name, reason).inc()

    def restored(self, *, is_exact: bool) -> None:
        """A sequence goes on from the store, with the same bits or with those of this machine."""
        self.all.restored.labels(self.name, str(is_exact).lower()).inc()

    def fenced(self) -> None:
        """A sequence turned out to be another process's."""
        self.all.fenced.labels(self.name).inc()

    def checkpointed(self, count: int, seconds: float) -> None:
        """The store has taken so many checkpoints at once."""
        self._checkpoints.add(count)
        self._checkpoint_seconds.observe(seconds)

    def store_failed(self) -> None:
        """The store did not answer."""
        self.all.store_failures.labels(self.name).inc()

    def fault(self, code: str, reason: str) -> None:
        """A client was told of a fault."""
        self.all.faults.labels(self.name, code, reason).inc()


def merge_pages(pages: dict[int, str]) -> tuple[bytes, str]:
    """The text pages of several workers as one, each sample with its worker's number."""
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

"""Prometheus metrics: names in the style of the field, labels model and version only.

With several workers prometheus_client keeps the numbers in files of a directory that the parent makes
(PROMETHEUS_MULTIPROC_DIR), so that any worker can tell the sum of all. Versions come and go for years: the
series of one that is not loaded any more are not told, and forgotten where they are in memory.
"""

import os
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from deploy.server.versions import Slot

Series = TypeVar("Series", Counter, Histogram)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counts what is served; ``text`` tells it."""

    def __init__(self, release: str) -> None:
        self._is_shared = MULTIPROCESS_VARIABLE in os.environ
        self._series: dict[tuple[Any, ...], Any] = {}  # its own search costs more than counting
        self._registry = CollectorRegistry()
        if not self._is_shared:
            ProcessCollector(registry=self._registry)
            PlatformCollector(registry=self._registry)
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each, which nobody asks for
        registry = self._registry
        self._requests = Counter(
            "dynlora_inference_requests",
            "Inference requests by outcome: success, invalid, rejected, timeout, error.",
            ["model", "version", "outcome"],
            registry=registry,
        )
        self._seconds = Histogram(
            "dynlora_inference_duration_seconds",
            "Time of successful requests by stage: decode, queue, infer, rank, total.",
            ["model", "version", "stage"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._rows = Counter(
            "dynlora_inference_rows", "Images or texts computed.", ["model", "version"], registry=registry
        )
        self._in_flight = Gauge(
            "dynlora_inference_in_flight",
            "Inference requests being worked on.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._version = Gauge(
            "dynlora_model_version_info",
            "1 for the version that answers, 0 for earlier ones.",
            ["model", "version", "sha256"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._swaps = Counter(
            "dynlora_swaps", "Attempts to bring a version live.", ["outcome"], registry=registry
        )
        self._swap_seconds = Histogram(
            "dynlora_swap_duration_seconds",
            "Time to load and warm a version, and to switch to it.",
            ["phase"],
            registry=registry,
        )
        self._last_swap = Gauge(
            "dynlora_last_swap_timestamp_seconds",
            "When the live version became live.",
            multiprocess_mode="livemax",
            registry=registry,
        )
        Gauge(
            "dynlora_build_info",
            "The release of dynlora.",
            ["release"],
            multiprocess_mode="livemax",
            registry=registry,
        ).labels(release).set(1)

    def began(self) -> None:
        """Count a request in."""
        self._in_flight.inc()

    def ended(self, model: str, version: str, *, outcome: str, stages: dict[str, float], rows: int) -> None:
        """Count a request that began out again."""
        self._in_flight.dec()
        self._of(self._requests, model, version, outcome).inc()
        if outcome == "success":
            self._of(self._rows, model, version).inc(rows)
            for stage, seconds in stages.items():
                self._of(self._seconds, model, version, stage).observe(seconds)

    def rejected(self, model: str, version: str) -> None:
        """Count a request that was not even begun."""
        self._requests.labels(model, version, "rejected").inc()

    def swapped(self, slot: Slot, before: Slot | None, models: Iterable[str], *, counts: bool = True) -> None:
        """Tell which version answers now; of several workers only one ``counts`` the swap."""
        for model in models:
            if before is not None:
                self._info(model, before).set(0)
            self._info(model, slot).set(1)
        self._last_swap.set(time.time())
        if before is not None and counts:
            self._swaps.labels("success").inc()

    def swap_failed(self) -> None:
        """Count a version that could not be brought live."""
        self._swaps.labels("failure").inc()

    def swap_took(self, phase: str, seconds: float) -> None:
        """Time loading (`load`) or switching (`switch`)."""
        self._swap_seconds.labels(phase).observe(seconds)

    def text(self, served: Collection[str]) -> bytes:
        """Return all of it in the text format of Prometheus, of these versions only."""
        if not self._is_shared:
            self._forget_all_but(served)
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(_Served(registry, served))

    def _of(self, metric: Series, *labels: str) -> Series:
        """The series of a metric with these labels."""
        found: Series | None = self._series.get((metric, *labels))
        if found is None:
            found = self._series[metric, *labels] = metric.labels(*labels)
        return found

    def _forget_all_but(self, served: Collection[str]) -> None:
        self._series.clear()
        by_version = (self._requests, self._seconds, self._rows, self._version)
        for metric in by_version:
            for version in {sample.labels["version"] for each in metric.collect() for sample in each.samples}:
                if version not in served:
                    metric.remove_by_labels({"version": version})

    def _info(self, model: str, slot: Slot) -> Gauge:
        weights = slot.loaded.manifest.files["weights.safetensors"].sha256
        return self._version.labels(model, str(slot.version), weights)


class _Served(Collector):
    """What a registry collects, without versions that are not served: files of ended workers have them."""

    def __init__(self, registry: CollectorRegistry, served: Collection[str]) -> None:
        self._registry, self._served = registry, served

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics with what is left of their samples."""
        for metric in self._registry.collect():
            metric.samples = [
                sample for sample in metric.samples if sample.labels.get("version", "") in {*self._served, ""}
            ]
            yield metric

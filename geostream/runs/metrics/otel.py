"""Keep the newest values of all metrics, and let OpenTelemetry's SDK collect them.

Collecting happens in threads of the SDK, which read the values: a training only puts them down, at some microseconds a
record. The SDK's provider is our own and not the process's, so a program that trains may have another one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from prometheus_client import CollectorRegistry, start_http_server

from geostream import __version__
from geostream.runs.log import Record
from geostream.runs.metrics.table import METRICS, Metric, readings

FLUSH_TIMEOUT = 3000.0  # milliseconds in which the last values are sent
END_TIMEOUT = 0.5  # seconds for sending to end when it is given up
PORT = 9464  # for Prometheus, by OpenTelemetry's specification

logger = logging.getLogger(__name__)

Attributes = dict[str, str]
Key = tuple[tuple[str, str], ...]


class Export:
    """Metrics that are exported while the context is open.

    Args:
        to: "otlp", "prometheus" or both.
        where: Gives the attributes of all metrics, as they are now.
        known: Records of earlier sessions.
    """

    def __init__(self, to: set[str], where: Callable[[], Attributes], known: Sequence[Record] = ()) -> None:
        self._where = where
        self._lock = threading.Lock()
        self._values: dict[str, dict[Key, tuple[float, Attributes]]] = {metric.name: {} for metric in METRICS}
        self._counted: dict[tuple[str, Key, int], float] = {}
        for record in known:
            self.add(record, count=False)
        readers = [reader for kind in sorted(to) if (reader := self._open(kind)) is not None]
        self._provider: MeterProvider | None = None
        if readers:
            resource = Resource({"service.name": "geostream", "service.version": __version__})
            resource = resource.merge(OTELResourceDetector().detect())  # what the environment says counts
            self._provider = MeterProvider(readers, resource, shutdown_on_exit=False)
            self._observe(self._provider)

    def __enter__(self) -> Export:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._provider is not None:
            with suppress(Exception):  # that it takes too long; the values before have been sent
                self._provider.shutdown(FLUSH_TIMEOUT)

    def add(self, record: Record, *, count: bool = True) -> None:
        """Take in the values of a record.

        Args:
            record: The record.
            count: Add to what only grows; False notes what had been counted before.
        """
        where = self._where()
        with self._lock:
            for metric, value, own in readings(record):
                values, key = self._values[metric.name], tuple(sorted(own.items()))
                if metric.counts:
                    of_epoch = (metric.name, key, record["epoch"])
                    more = max(0.0, value - self._counted.get(of_epoch, 0.0)) if count else 0.0
                    self._counted[of_epoch] = value
                    key = tuple(sorted((own | where).items()))  # each layout has a count of its own
                    value = values.get(key, (0.0, {}))[0] + more
                values[key] = (value, own | where)

    def _observe(self, provider: MeterProvider) -> None:
        """Make an instrument for each metric, which gives what was put down."""

        def observed(metric: Metric) -> Callable[[CallbackOptions], Iterable[Observation]]:
            def give(_: CallbackOptions) -> Iterable[Observation]:
                with self._lock:
                    return [Observation(value, attributes) for value, attributes in self._values[metric.name].values()]

            return give

        meter = provider.get_meter("geostream", __version__)
        for metric in METRICS:
            make = meter.create_observable_counter if metric.counts else meter.create_observable_gauge
            make(metric.name, [observed(metric)], metric.unit, metric.description)

    def _open(self, kind: str) -> MetricReader | None:
        """Return what takes the metrics out, or say in one line why they are not exported."""
        try:
            return PeriodicExportingMetricReader(_Push()) if kind == "otlp" else _Endpoint()
        except Exception as error:  # whatever it is, the training is worth more
            logger.warning("metrics are not exported to %s: %s; all else goes on without", kind, error)
            return None


class _Push(OTLPMetricExporter):
    """Send metrics to a collector, and say once that it does not take them, until it does again."""

    def __init__(self) -> None:
        super().__init__()
        self._away = False
        self._sending = threading.Lock()
        # The SDK has a line for each of its tries.
        logging.getLogger(OTLPMetricExporter.__module__).setLevel(logging.CRITICAL)

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **more: Any
    ) -> MetricExportResult:
        """Send metrics."""
        with self._sending:
            result = super().export(metrics_data, timeout_millis, **more)
            self._note(away=result is not MetricExportResult.SUCCESS)
        return result

    def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
        """Give up what is being sent, and say so."""
        super().shutdown(timeout_millis, **more)
        if self._sending.acquire(timeout=END_TIMEOUT):
            self._sending.release()
        else:
            self._note(away=True)

    def _note(self, *, away: bool) -> None:
        if away and not self._away:
            logger.warning("metrics: %s takes none (OTLP over HTTP); all else goes on without", self._endpoint)
        self._away = away


class _Endpoint(PrometheusMetricReader):
    """Serve metrics over HTTP until it is shut down."""

    def __init__(self) -> None:
        host = os.environ.get("OTEL_EXPORTER_PROMETHEUS_HOST") or "localhost"
        port = os.environ.get("OTEL_EXPORTER_PROMETHEUS_PORT") or str(PORT)
        registry = CollectorRegistry()
        super().__init__(scope_info_enabled=False, registry=registry)
        try:
            self._server, self._thread = start_http_server(int(port), host, registry)
        except OSError as error:
            raise OSError(f"{host}:{port} (OTEL_EXPORTER_PROMETHEUS_HOST, …_PORT): {error.strerror}") from error

    def shutdown(self, timeout_millis: float = 30_000, **more: Any) -> None:
        """Close the endpoint."""
        self._server.shutdown()
        self._server.server_close()
        super().shutdown(timeout_millis, **more)

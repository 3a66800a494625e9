"""A collector of metrics for tests: a real HTTP server that decodes what is pushed by OTLP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from infra.process import LOOPBACK


@dataclass
class Collector:
    """What was pushed to ``url``, oldest first."""

    url: str
    pushed: list[ExportMetricsServiceRequest] = field(default_factory=list)

    def newest(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Name, attributes and value of all that was pushed last."""
        for scope in self.pushed[-1].resource_metrics[0].scope_metrics:
            for metric in scope.metrics:
                for point in getattr(metric, metric.WhichOneof("data") or "gauge").data_points:
                    yield metric.name, {one.key: one.value.string_value for one in point.attributes}, point.as_double

    def values(self) -> dict[tuple[str, ...], float]:
        """The newest values by name and attributes, without those of the run."""
        of_run = ("dataset", "run", "layout")
        return {
            (name, *(where[key] for key in sorted(where) if key not in of_run)): value
            for name, where, value in self.newest()
        }

    def points(self, metric: str) -> list[tuple[dict[str, str], float]]:
        """Attributes and value of the newest values of a metric."""
        return [(where, value) for name, where, value in self.newest() if name == metric]


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/metrics"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            running.pushed.append(ExportMetricsServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as server:
        running = Collector(f"http://{LOOPBACK}:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield running
        server.shutdown()

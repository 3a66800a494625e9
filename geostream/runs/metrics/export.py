"""Export the records of a run as metrics while it trains, where the environment asks for it.

OpenTelemetry's standard variables say where to. ``OTEL_EXPORTER_OTLP_ENDPOINT`` pushes to a collector by OTLP over
HTTP, which also suits jobs that end. ``OTEL_METRICS_EXPORTER`` names ``otlp``, or ``prometheus``, which opens an
endpoint to be scraped, or both. OpenTelemetry was chosen because it does both with one table of metrics, and because
platforms set its variables already. Without them nothing is imported or started; with them, starting takes about half
a second.

No trouble with metrics stops or slows a training: it becomes one line in the log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from geostream.runs.log import Record

logger = logging.getLogger(__name__)

Tell = Callable[[Record], None]
Attributes = dict[str, str]


def wanted() -> set[str]:
    """Return how metrics are to be exported, by the environment: ``otlp``, ``prometheus``, both or not at all."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return set()
    named = os.environ.get("OTEL_METRICS_EXPORTER", "")
    if not named:
        endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
        return {"otlp"} if any(os.environ.get(name) for name in endpoints) else set()
    names = {name.strip() for name in named.split(",")} - {"", "none"}
    if unknown := names - {"otlp", "prometheus"}:
        logger.warning(
            "OTEL_METRICS_EXPORTER=%s: geostream can export metrics to otlp and prometheus, not to %s",
            named,
            ", ".join(sorted(unknown)),
        )
    return names & {"otlp", "prometheus"}


@contextmanager
def exporting(where: Callable[[], Attributes], known: Sequence[Record] = ()) -> Iterator[Tell]:
    """Export records while the context is open. Leaving it sends the last values, for three seconds at most.

    Args:
        where: Gives the attributes of all metrics, such as the run's name, as they are now.
        known: Records of earlier sessions. Their values are shown, but what only grows begins at zero in each session,
            as counters do.

    Yields:
        A function that takes in a record.
    """
    to = wanted()
    if not to:
        yield lambda record: None
        return
    from geostream.runs.metrics.otel import Export

    with Export(to, where, known) as export:
        yield export.add


def push(record: Record, **attributes: str) -> None:
    """Send the record of work that is over to the collector, where there is one; an endpoint would be gone too soon.

    Args:
        record: The record.
        **attributes: Of its metrics.
    """
    to = wanted() & {"otlp"}
    if to:
        from geostream.runs.metrics.otel import Export

        with Export(to, lambda: attributes) as export:
            export.add(record)

"""Read from the S3 server's own counters what it sent: the same measure for every contestant, whatever client it uses.

So nothing is patched into a peer, and also clients in Rust and programs such as curl are counted. Everything that a
contestant fetches counts, its index included.
"""

from __future__ import annotations

import re
import urllib.request
from typing import NamedTuple

COUNTER = re.compile(r"^SeaweedFS_s3_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)


class Traffic(NamedTuple):
    """What a server has sent."""

    requests: int  # GETs, without those that it refused or had nothing for
    bytes_fetched: int

    def since(self, before: Traffic) -> Traffic:
        """Return what was sent after ``before``."""
        return Traffic(self.requests - before.requests, self.bytes_fetched - before.bytes_fetched)


def read_traffic(metrics_url: str) -> Traffic:
    """Return what the server with these metrics has sent since it started."""
    with urllib.request.urlopen(metrics_url, timeout=10) as answer:
        return parse(answer.read().decode())


def parse(metrics: str) -> Traffic:
    """Return what a server has sent, from the text that SeaweedFS offers to Prometheus."""
    requests = sent = 0.0
    for name, labels, value in COUNTER.findall(metrics):
        if name == "request_total" and 'type="GET"' in labels and 'code="20' in labels:
            requests += float(value)
        if name == "bucket_traffic_sent_bytes_total":
            sent += float(value)
    return Traffic(int(requests), int(sent))

"""One repeat of tests/benchmarks/train.py in a process of its own; prints what it came to as JSON."""

from __future__ import annotations

import json
import sys

from geostream.settings import make_settings
from tests.benchmarks.train import train


def main(text: str) -> None:
    job = json.loads(text)
    print(json.dumps(train(job["url"], make_settings(job["settings"]))))


if __name__ == "__main__":
    main(sys.argv[1])

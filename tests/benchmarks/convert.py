"""The pairs in a peer's own format: ``python -m tests.benchmarks.convert MODULE PAIRS OUT``, in that peer's Python."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    importlib.import_module(sys.argv[1]).write(Path(sys.argv[2]), Path(sys.argv[3]))
    print("{}")  # the result, as a contestant prints its own

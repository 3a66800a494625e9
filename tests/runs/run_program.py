"""A run in a process of its own, slow enough to be met where a test wants it: ``… STORE SETTINGS HOLD GO``.

It waits within the step after step number HOLD of this process until the file GO is there, or its parent is gone.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from geostream.errors import GeostreamError
from geostream.layout import open_layout
from geostream.runs.loop import train
from geostream.settings import make_settings
from geostream.store import Store
from geostream.training.step import TrainStep

PACE = 0.02  # seconds a step

taken, parent, step = 0, os.getppid(), TrainStep.step


def slowly(self: TrainStep, *arguments: Any) -> Tensor:
    global taken
    taken += 1
    while taken > int(sys.argv[3]) and os.getppid() == parent and not Path(sys.argv[4]).exists():
        time.sleep(0.01)
    time.sleep(PACE)
    return step(self, *arguments)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    TrainStep.step = slowly  # type: ignore[assignment, method-assign]
    store = Store.open(sys.argv[1])
    try:
        train(store, open_layout(store), "one", make_settings(json.loads(sys.argv[2])))
    except GeostreamError as error:  # as the command does
        print(f"geostream: {error}", file=sys.stderr)
        sys.exit(1)

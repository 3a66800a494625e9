"""The processes of ``geostream.runs.launch``, slow enough to be met in the middle of an epoch."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from geostream.runs import launch_process
from geostream.training.step import TrainStep

PACE = 0.25  # seconds a step

step = TrainStep.step


def slowly(self: TrainStep, *arguments: Any) -> Tensor:
    time.sleep(PACE)
    return step(self, *arguments)


if __name__ == "__main__":
    setattr(launch_process, "MODULE", "tests.runs.launch_slowly")  # noqa: B010  # for the ranks
    TrainStep.step = slowly  # type: ignore[assignment, method-assign]
    launch_process.main()

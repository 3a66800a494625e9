"""What a Dask worker loads so that somebody is killed in the middle of each stage: itself, or the process $VICTIM."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from dask.utils import key_split
from distributed import Worker, WorkerPlugin


class Killer(WorkerPlugin):
    """Kills when the first task of a stage begins whose name begins with $AT; the folder $KILLED says which it was."""

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        stage = key_split(key)
        if finish != "executing" or not stage.startswith(os.environ["AT"]):
            return
        try:
            Path(os.environ["KILLED"], stage).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(int(os.environ["VICTIM"]) or os.getpid(), signal.SIGKILL)


async def dask_setup(worker: Worker) -> None:
    await worker.plugin_add(Killer())

"""Take large results from two workers, of which one is killed while it hands over its own: ``python -m … FOLDER``.

The first two results arrive. The worker of the third suspends this process, so that the result fills the pipe and the
worker cannot write on. A moment later a thread of the worker resumes this process and kills its own. The other worker
hands over nothing meanwhile. How many results came, and the error, are printed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from geostream.errors import GeostreamError
from sharding.workers import in_order

BYTES = 64 * 2**20
DIES = 2  # number of the task


def make(task: tuple[int, Path]) -> bytes:
    number, folder = task
    if number == DIES:
        wait_for(folder / "others-came")
        os.kill(os.getppid(), signal.SIGSTOP)
        threading.Thread(target=resume_and_die, args=(folder / "died",), daemon=True).start()
    elif number > DIES:
        wait_for(folder / "died")
    return bytes(BYTES)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def resume_and_die(path: Path) -> None:
    time.sleep(1)
    path.touch()
    os.kill(os.getppid(), signal.SIGCONT)
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    came = 0
    try:
        for result in in_order(make, [(number, folder) for number in range(8)], workers=2):
            came += len(result) == BYTES
            if came == DIES:
                (folder / "others-came").touch()
    except GeostreamError as error:
        print(came, error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

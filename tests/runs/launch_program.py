"""What stands in for the child process of ``geostream.runs.launch``, and does what its run is called after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def deaf() -> None:
    """Neither listen to signals nor to the end of the input; not for ever, should a test fail."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(pid=os.getpid())
    time.sleep(60)


if __name__ == "__main__":
    what = json.loads(sys.argv[1])["run"]
    print("the last words", file=sys.stderr, flush=True)
    if what == "done":
        print("no report")
        tell(level=30, text="a warning", fields={"epoch": 3})
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stopped":
        sys.exit(143)
    elif what == "wordless":
        sys.exit(3)
    elif what == "defect":
        tell(error="ValueError: seven", kind="", trace="Traceback of seven")
        sys.exit(1)
    elif what == "refused":
        tell(error="another rank ended", kind="Stalled", trace="")
        tell(error="nowhere: no such folder", kind="BadInput", trace="")
        tell(error="rank 0 was ended by SIGKILL", kind="Stalled", trace="")
        sys.exit(1)
    elif what == "lost":
        tell(error="another rank ended", kind="Stalled", trace="")
        tell(error="rank 1 was ended by SIGKILL", kind="Stalled", trace="")
        sys.exit(1)
    elif what == "deaf":
        subprocess.Popen([sys.executable, "-c", "from tests.runs.launch_program import deaf; deaf()"])
        deaf()

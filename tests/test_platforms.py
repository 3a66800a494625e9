"""What only Linux has is not needed: a run trains where it is absent, as on macOS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import ctypes, importlib, os, pathlib, pkgutil, sys
for name in ("sched_getaffinity", "sched_setaffinity", "memfd_create", "pidfd_open", "eventfd", "posix_fadvise"):
    if hasattr(os, name):
        delattr(os, name)
if hasattr(os, "process_cpu_count"):
    os.process_cpu_count = os.cpu_count  # as Python 3.13 has it there
library = ctypes.CDLL

class Bare:
    "The C library, without what is glibc's."

def without_glibc(name, *how, **named):
    return Bare() if name is None else library(name, *how, **named)

ctypes.CDLL = without_glibc
read_text, readlink = pathlib.Path.read_text, pathlib.Path.readlink

def no_proc(self, *how, **named):
    if str(self).startswith("/proc/"):
        raise FileNotFoundError(self)
    return read_text(self, *how, **named)

def no_link(self):
    if str(self).startswith("/proc/"):
        raise FileNotFoundError(self)
    return readlink(self)

pathlib.Path.read_text, pathlib.Path.readlink = no_proc, no_link
sys.modules["trio"] = None  # comes with selenium, and takes sys.platform's word for what glibc has
import flows, geostream, infra, sharding
for package in (geostream, sharding, infra):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
from geostream.store import Store
from geostream.runs.loop import train
from tests.helpers import tiny_layout
from tests.training.settings import TINY
store = Store.open(sys.argv[1])
result = train(store, tiny_layout(store, places=16), "one", TINY.changed(epochs=2))
print(result.epochs, "epochs")
"""


@pytest.mark.slow
def test_a_run_trains_without_what_only_linux_has(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 epochs"

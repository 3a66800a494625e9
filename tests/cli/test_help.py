"""``--help`` and ``--version`` import none of the heavy libraries, so that they answer at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from geostream import __version__
from sharding import ADAPTERS
from tests.command import said

HEAVY = {"torch", "timm", "prefect", "pyarrow", "obstore", "zarr", "numpy", "dask", "webdataset", "matplotlib"}
PROGRAM = """
import sys
from geostream.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words", ["--help", "--version", "train --help", "shard --help", "demo --help", "layouts list --help"]
)
def test_help_imports_nothing_heavy(words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words.split()], capture_output=True, text=True, check=True, env=os.environ
    )
    assert not HEAVY & set(done.stderr.split())
    assert words != "--help" or all(command in done.stdout for command in ("train", "shard", "demo", "layouts"))


def test_version() -> None:
    assert said("--version") == f"geostream {__version__}\n"


def test_help_of_shard_names_every_adapter() -> None:
    text = said("shard", "--help")
    assert all(name in text for name in ADAPTERS)

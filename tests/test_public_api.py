"""``import geostream`` offers the public API, and imports nothing heavy before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import geostream


def test_every_public_name_is_there() -> None:
    assert set(geostream.__all__) <= set(dir(geostream))
    for name in geostream.__all__:
        assert getattr(geostream, name).__name__ == name
        assert name in str(geostream.__doc__)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(geostream.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_checkers = {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert for_checkers == geostream._MODULES
    assert sorted(for_checkers) == geostream.__all__


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="stream_everything"):
        geostream.stream_everything  # noqa: B018


def test_the_import_is_light() -> None:
    program = "import geostream, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pyarrow", "obstore", "zarr", "pydantic", "prefect", "typer"} & set(loaded)

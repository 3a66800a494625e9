"""The rules that keep the tree what the README says it is: imports go one way, and nothing is unpickled."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("geostream", "sharding", "flows", "infra")
SHARDING_MAY_USE = {"cores", "errors", "images", "store", "layout", "layout_files", "progress"}
# The demo and the stack start what runs around the flows; nobody else does.
MAY_USE_INFRA = {"flows/demo.py", "flows/prefect_plugin.py"}


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    used = imports(path)
    of = {p: {u for u in used if u == p or u.startswith(f"{p}.")} for p in PACKAGES}
    if package == "geostream":
        assert not of["sharding"] | of["flows"]
    if package == "sharding":
        assert not of["flows"]
        if path.name != "cli.py":
            assert {u.split(".")[1] for u in of["geostream"] if "." in u} <= SHARDING_MAY_USE
    if package == "infra":
        assert not of["sharding"] | of["flows"]
    elif name not in MAY_USE_INFRA:
        assert not of["infra"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    text = path.read_text()
    assert "pickle" not in imports(path)
    assert "allow_pickle" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)

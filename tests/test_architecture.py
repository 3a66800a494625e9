"""The rules that keep the tree what docs/architecture.md says it is: imports go one way, and nothing is unpickled."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("geostream", "sharding", "flows", "infra")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
# Each may import those before it.
ROOMS = "errors images progress arrays settings store layout dask mining planning streaming reclustering training"
ROOMS += " evaluation runs locating serving report cli __main__"
SHARDING_MAY_USE = {"errors", "images", "progress", "arrays", "store", "layout"}
# The demo and the week start what runs around the flows; nobody else does.
MAY_USE_INFRA = {"flows/demo.py", "flows/prefect_plugin.py", "flows/week.py"}


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


def may_import(name: str) -> set[str]:
    """Rooms of geostream, and other packages, that the file may use."""
    package, room = name.split("/")[0], name.split("/")[1].removesuffix(".py")
    rooms = ROOMS.split()
    if name == "geostream/__init__.py":
        return set(rooms)
    if package == "geostream":
        return set(rooms[: rooms.index(room) + 1])
    if package == "sharding":
        return {"sharding", *(SHARDING_MAY_USE if room not in ("cli", "index_cli") else rooms)}
    if package == "infra":
        return {"infra", *rooms}
    return {"flows", "sharding", *rooms, *({"infra"} if name in MAY_USE_INFRA else ())}


def test_imports_go_one_way() -> None:
    wrong = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        ours = [module.split(".") for module in imports(path) if module.split(".")[0] in PACKAGES]
        used = {parts[1] if parts[0] == "geostream" else parts[0] for parts in ours if parts != ["geostream"]}
        wrong += [f"{name}: {room}" for room in used - may_import(name) - {"__version__"}]
    assert not wrong


def test_few_modules_lie_loose() -> None:
    loose = {path.name for path in (ROOT / "geostream").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(loose) <= 6


def test_nothing_is_unpickled() -> None:
    for path in FILES:
        text = path.read_text()
        assert "pickle" not in imports(path), path
        assert "allow_pickle" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path

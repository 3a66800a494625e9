"""The documentation names files, tests, commands, options, settings and Python names that exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer

from geostream.cli.main import app
from geostream.settings import TrainSettings
from geostream.store import Store
from sharding import ShardOptions, shard
from tests.helpers import tiny_layout
from tests.vigor_raw import jpeg

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMED = re.compile(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`")
FILE = re.compile(r"`((?:geostream|sharding|flows|infra|tests|docs)/[\w./-]*)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Pages of what once was: files that they name may have gone.
PAST = {ROOT / "CHANGELOG.md", *(ROOT / "docs" / "notes").glob("*.md")}


def test_each_promise_names_a_test_that_is_there() -> None:
    file, found = Path(), 0
    for path, test in NAMED.findall((ROOT / "docs" / "guarantees.md").read_text()):
        if not path and not test:
            continue
        file = ROOT / path if path else file
        assert file.is_file(), path
        assert not test or re.search(rf"^def {test}\(", file.read_text(), re.MULTILINE), f"{path}::{test}"
        found += 1
    assert found > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_links_of_a_page_are_there(page: Path) -> None:
    text = page.read_text()
    gone = [] if page in PAST else [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    gone += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not gone


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    """Return (page, words) of each line of a shell block, joined where it is continued, without its comment."""
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text()):
            if language in ("", "sh", "bash"):
                for line in block.replace("\\\n", " ").splitlines():
                    yield page.name, line.split(" # ")[0].split()


def test_commands_and_options_exist() -> None:
    top: Any = typer.main.get_command(app)
    context = top.make_context("geostream", ["--help"], resilient_parsing=True)
    joined = {point.name: point for point in entry_points(group="geostream.commands")}
    found, settings = 0, TrainSettings().flat()
    for page, words in shell_lines():
        if "geostream" not in words or words[-1] == "geostream" or words[0] in ("docker", "kubectl"):
            continue
        line = f"{page}: {' '.join(words)}"
        name, *rest = words[words.index("geostream") + 1 :]
        if name.startswith(("-", "'")):
            continue
        if (command := top.get_command(context, name)) is None:
            assert name in joined, line
            one = typer.Typer()
            one.command()(joined[name].load())
            command = typer.main.get_command(one)
        if hasattr(command, "commands"):
            assert rest[0] in command.commands, line
            command = command.commands[rest[0]]
        known = {"--help"}.union(*([*parameter.opts, *parameter.secondary_opts] for parameter in command.params))
        for word, after in zip(rest, [*rest[1:], ""], strict=True):
            assert not word.startswith("--") or word in known, line
            assert word != "--set" or after.partition("=")[0] in settings, line
        found += 1
    assert found > 10


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = {(page, words[1]) for page, words in shell_lines() if len(words) > 1 and words[0] == "make"}
    wanted |= {(page.name, name) for page in PAGES for name in re.findall(r"`make ([a-z][\w-]*)", page.read_text())}
    assert wanted and {target for _, target in wanted} <= targets


def test_deployments_exist() -> None:
    known = re.findall(r"^  - name: (\S+)", (ROOT / "prefect.yaml").read_text(), re.MULTILINE)
    run = [words for _, words in shell_lines() if {"prefect", "deployment", "run"} <= set(words)]
    assert run
    for words in run:
        assert words[words.index("run") + 1].rpartition("/")[2] in known, shlex.join(words)


def test_python_names_exist() -> None:
    blocks = [code for page in PAGES for language, code in BLOCK.findall(page.read_text()) if language == "python"]
    assert blocks
    for code in blocks:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


def test_the_adapter_of_the_page_shards_a_folder(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "own-dataset.md").read_text()
    blocks = dict(BLOCK.findall(page))
    adapter = ModuleType("adapter")
    exec(compile(blocks["python"], "own-dataset.md", "exec"), adapter.__dict__)
    head = next(block for language, block in BLOCK.findall(page) if not language and block.startswith("split,"))
    rng, raw = np.random.default_rng(0), tmp_path / "raw"
    lines = head.splitlines() + [f"test,Graz,tiles/b{n}.jpg,photos/{n}.jpg,47.0{n},15.4" for n in range(3)]
    (raw / "tiles").mkdir(parents=True)
    (raw / "photos").mkdir()
    for line in lines[1:]:
        for name in line.split(",")[2:4]:
            (raw / name).write_bytes(jpeg(rng, (30, 30)))
    (raw / "pairs.csv").write_text("\n".join(lines))
    layout = shard(adapter.read_places(raw), Store.open(tmp_path / "store"), "photos", "base", ShardOptions()).layout
    assert layout.info["pairs"] == {"train": 1, "test": 3}
    assert layout.coordinates == "latlon"


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (code for language, code in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python")
    tiny_layout(Store.open(tmp_path), places=24)
    small = "batch_size=8, neighbours=4, tile_size=32, view_height=16, view_width=64"
    for text, instead in (("s3://bucket/geo", str(tmp_path)), ("batch_size=64", small), ("range(1, 11)", "(1, 2)")):
        assert text in code
        code = code.replace(text, instead)
    shapes: list[tuple[int, ...]] = []
    exec(code, {"train_step": lambda tile, view: shapes.append((*tile.shape, *view.shape))})
    assert shapes == [(8, 3, 32, 32, 8, 3, 16, 64)] * 6

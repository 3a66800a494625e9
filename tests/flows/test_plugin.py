"""The bare-name plugin without a server: what it takes for a name, and how it fails. With one: test_flows.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import prefect_plugin
from flows.prefect_plugin import bare_name, is_prefect_command, split_profile, stack_address

ROOT = Path(prefect_plugin.__file__).parents[1]
PREFECT = str(Path(sysconfig.get_path("scripts")) / "prefect")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("deployment run shard-vigor", "shard-vigor"),
        ("deployments run shard-vigor", "shard-vigor"),
        ("deployment run shard-vigor --watch", "shard-vigor"),
        ("deployment run --watch shard-vigor", "shard-vigor"),
        ("deployment run -p city=small shard-vigor", "shard-vigor"),
        ("deployment run --param city=small -p raw=/a/b --watch-timeout 60 shard-vigor --tag x", "shard-vigor"),
        ("deployment run --params {} --no-watch --job-variable=a=1 -jv b=2 shard-vigor", "shard-vigor"),
        ("deployment run -- shard-vigor", "shard-vigor"),
        ("deployment run shard/shard-vigor", None),
        ("deployment run shard/shard-vigor --tag shard-vigor", None),
        ("deployment run -p raw=/a/b", None),
        ("deployment run --id 1234", None),
        ("deployment run --id", None),
        ("deployment run shard-vigor --help", None),
        ("deployment run", None),
        ("deployment inspect shard-vigor", None),
        ("deployment ls", None),
        ("flow-run cancel shard-vigor", None),
        ("worker start run shard-vigor", None),
        ("", None),
    ],
)
def test_finds_the_bare_name_and_only_that(line: str, name: str | None) -> None:
    arguments = line.split()
    position = bare_name(arguments)
    assert (None if position is None else arguments[position]) == name


@given(st.lists(st.sampled_from(["deployment", "run", "a", "f/d", "-p", "k=v", "--watch", "--", "--id", "--x=1", ""])))
@settings(deadline=None)
def test_never_fails_and_never_takes_an_option_or_a_full_name(arguments: list[str]) -> None:
    position = bare_name(arguments)
    if position is not None:
        assert arguments[:2] == ["deployment", "run"] and position >= 2
        assert arguments[position] and "/" not in arguments[position]
        assert not arguments[position].startswith("-") or arguments[position - 1] == "--"


@pytest.mark.parametrize(
    ("line", "profile", "rest"),
    [
        ("--profile p deployment run x", "p", "deployment run x"),
        ("-p p --no-prompt deployment run x", "p", "deployment run x"),
        ("--profile=p deployment run x", "p", "deployment run x"),
        ("--no-prompt deployment run x -p k=v", None, "deployment run x -p k=v"),
        ("--profile", None, ""),
    ],
)
def test_profile_before_the_command(line: str, profile: str | None, rest: str) -> None:
    assert split_profile(line.split()) == (profile, rest.split())


def test_knows_prefect_from_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, orig_argv, expected in [
        (["/venv/bin/prefect", "version"], ["python", "/venv/bin/prefect", "version"], True),
        (["-m", "version"], ["python", "-m", "prefect", "version"], True),
        (["-m"], ["python", "-m", "prefect.engine"], False),
        (["/venv/bin/pytest"], ["python", "/venv/bin/pytest"], False),
        (["-c"], ["python", "-c", "import prefect"], False),
    ]:
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", orig_argv)
        assert is_prefect_command() is expected, argv


def test_the_stack_of_this_folder_is_found_unless_another_server_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    assert stack_address() is None
    state = tmp_path / "runs" / "stack" / "stack.json"
    state.parent.mkdir(parents=True)
    for text in ("", "{}", '{"prefect_api_url": null}'):
        state.write_text(text)
        assert stack_address() is None
    state.write_text(json.dumps({"prefect_api_url": "http://127.0.0.1:4321/api"}))
    assert stack_address() == "http://127.0.0.1:4321/api"
    monkeypatch.setenv("PREFECT_PROFILE", "mine")
    assert stack_address() is None


def _prefect(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command, in a folder whose pyproject.toml is the checkout's."""
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return subprocess.run(
        [PREFECT, *arguments],
        cwd=folder,
        env={**kept, "PREFECT_HOME": str(folder / "home"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "PREFECT_API_URL"),
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "http://127.0.0.1:9/api"),
    ],
)
def test_without_a_server_one_line_and_exit_code_1(tmp_path: Path, environment: dict[str, str], says: str) -> None:
    done = _prefect(tmp_path, "deployment", "run", "shard-vigor", **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and says in done.stderr and "make up" in done.stderr


def test_unknown_profile_is_no_traceback(tmp_path: Path) -> None:
    done = _prefect(tmp_path, "--profile", "nobody", "deployment", "run", "shard-vigor")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "'nobody'" in done.stderr.splitlines()[-1]  # Prefect warns before it


def test_other_commands_do_not_notice(tmp_path: Path) -> None:
    """Not even with a server that is down: they are not asked to reach it."""
    done = _prefect(tmp_path, "deployment", "run", "--help", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 0 and "FLOW_NAME" in done.stdout

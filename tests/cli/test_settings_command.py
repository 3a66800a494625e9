"""``geostream settings`` lists every setting with its value, what is allowed, and what it means."""

from __future__ import annotations

import sys
from unittest.mock import patch

import pytest

from geostream.settings import GROUPS, SETTINGS, TrainSettings, recipe_names
from tests.command import refused, said


def lines(*words: str) -> dict[str, str]:
    """The command's lines of settings, by name."""
    text = [line for line in said("settings", *words).splitlines() if line]
    return {line.split()[0]: line for line in text if line.split()[0] in SETTINGS}


def test_every_setting_has_a_line() -> None:
    shown = lines()
    assert list(shown) == list(SETTINGS)
    for name, (group, field) in SETTINGS.items():
        info = (GROUPS[group] if group else TrainSettings).model_fields[field]
        assert shown[name].endswith(str(info.description))
    assert shown["schedule"].split()[1:6] == ["cosine", "cosine,", "linear,", "one-cycle,", "constant"]
    assert "null, integer ≥ 1" in shown["micro_batch"]
    assert all(f"\n{group}: " in said("settings") for group in GROUPS)


def test_a_recipe_shows_where_it_differs() -> None:
    shown = lines("vigor")
    assert "timm (scratch)" in shown["weights"]
    assert "(" not in shown["batch_size"]
    for name in recipe_names():
        assert lines(name)


def test_it_fits_a_terminal_of_100_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with patch("geostream.cli.settings.sys", wraps=sys) as seen:
        seen.stdout.isatty.return_value = True
        text = said("settings", "simcity-cvact")
    assert max(map(len, text.splitlines()[1:])) <= 100
    assert all(name in text for name in SETTINGS)


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    line = refused("settings", "tokyo")
    assert "tokyo" in line and all(name in line for name in recipe_names())

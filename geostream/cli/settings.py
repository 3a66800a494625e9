"""Define the command ``settings``, which lists the settings of a training run."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

UNWRAPPED = 500  # columns where stdout is no terminal: one line a setting, for grep
WIDTHS = (22, 20, 11, None)  # of the columns in a terminal, the same in each section; the last takes the rest
KINDS = {int: "integer", float: "number", str: "text", dict: "object", tuple: "two numbers", list: "names"}


def settings(
    recipe: Annotated[str | None, typer.Argument(help="Show the values of this recipe; default: the defaults.")] = None,
) -> None:
    """List every setting of a training run: its value, the allowed values, and its meaning."""
    from geostream.settings import GROUPS, SETTINGS, TrainSettings, default_settings, recipe_names

    defaults = TrainSettings().flat()
    values = defaults if recipe is None else default_settings(recipe, recipe).flat()
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, (group, field) in SETTINGS.items():
        info = (GROUPS[group] if group else TrainSettings).model_fields[field]
        value = _text(values[name])
        if values[name] != defaults[name]:
            value += f" ({_text(defaults[name])})"
        sections.setdefault(group, []).append((name, value, _allowed(info), str(info.description)))
    titles = {group: f"{group}: {kind.__doc__}" for group, kind in GROUPS.items()} | {"": "the run as a whole"}
    print("Change a setting with --set NAME=VALUE.", end=" ")
    if recipe is None:
        names = ", ".join(recipe_names())
        print(f"Recipes, for geostream settings RECIPE and geostream train --recipe RECIPE: {names}.")
    else:
        print(f"Where the recipe {recipe} differs, the default follows in brackets.")
    for group, rows in sections.items():
        print(f"\n{titles[group]}")
        _print_rows(("setting", "default" if recipe is None else recipe, "allowed", "meaning"), rows)


def _print_rows(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table as wide as the terminal, or with one line a row where there is none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNWRAPPED
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head, width in zip(heads, WIDTHS, strict=True):
        table.add_column(head, width=None if columns == UNWRAPPED else width, min_width=width, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    drawn = io.StringIO()
    Console(file=drawn, width=columns).print(table)
    print("\n".join(line.rstrip() for line in drawn.getvalue().splitlines()))


def _text(value: object) -> str:
    """Return a value as it is typed behind ``--set NAME=``."""
    return value if isinstance(value, str) else json.dumps(value)


def _allowed(info: FieldInfo) -> str:
    """Return in words which values a setting takes."""
    kinds = get_args(info.annotation) if type(None) in get_args(info.annotation) else (info.annotation,)
    words = _kind(next(kind for kind in kinds if kind is not type(None)))
    limits = {name: f"{value:g}" for limit in info.metadata for name, value in asdict(limit).items()}
    match limits:
        case {"ge": least, "le": most}:
            words = f"{least} to {most}"
        case {"ge": least, "lt": most}:
            words = f"{least} to <{most}"
        case {"ge": least}:
            words += f" ≥ {least}"
        case {"gt": least, "le": most}:
            words = f">{least} to {most}"
        case {"gt": least}:
            words += f" > {least}"
    return f"null, {words}" if type(None) in kinds else words


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return "true, false" if kind is bool else KINDS[get_origin(kind) or kind]

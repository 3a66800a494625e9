"""The table of ``docs/scale.md`` as the command computes it: ``python -m tests.report.scale_table`` prints it."""

from __future__ import annotations

import json

from tests.command import said

COMMAND = "geostream cost --places {} --workers 64 --gpus 64 --lanes 4096 --dim 128 --neighbours 64 --json"
PLACES = (100_000_000, 1_000_000_000)


def rows() -> list[str]:
    """A line for each stage and the total, with five columns for each number of places."""
    costs = [json.loads(said(*COMMAND.format(places).split()[1:])) for places in PLACES]
    stages = zip(*([*one["stages"], one["total"]] for one in costs), strict=True)
    return [
        "| " + " | ".join([some[0]["name"], *(cell for one in some for cell in _cells(one))]) + " |" for some in stages
    ]


def _cells(stage: dict[str, float]) -> list[str]:
    requests = (stage["gets"] + stage["puts"]) / 1e6
    numbers = (stage["seconds"] / 3600, stage["memory"] / 1e9, (stage["read"] + stage["written"]) / 1e12, requests)
    return [_text(number) for number in (*numbers, stage["dollars"])]


def _text(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or number < 0.005 else f"{number:.2g}"


if __name__ == "__main__":
    print("\n".join(rows()))

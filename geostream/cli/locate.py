"""Define the command ``locate``, which answers where photos were taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geostream.cli.options import Dataset, open_store, print_table
from geostream.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from geostream.locating.locate import Answer, Locator

BATCH = 32  # photos that are decoded at once


def locate(
    photos: Annotated[list[Path], typer.Argument(help="Photos: JPEG, PNG or what else Pillow reads.")],
    store: Annotated[str, typer.Option(help="s3://bucket/prefix or a local folder.")],
    dataset: Dataset = None,
    index: Annotated[str | None, typer.Option(help="Name of the index; default: the only one.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The index that this promoted model has made: current, or its number.")
    ] = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Only by an index with similarities averaged over flips and turns.")
    ] = False,
    best: Annotated[int, typer.Option(min=1, max=50, help="Places that an answer has.")] = 5,
    geojson: Annotated[
        Path | None, typer.Option(help="Write the answers to this file as GeoJSON; - prints them instead of the table.")
    ] = None,
) -> None:
    """Answer where photos were taken: the best places with scores, and whether the first is sure."""
    from geostream.locating.choice import index_of_model
    from geostream.locating.locate import Locator, as_geojson

    to_stdout = geojson is not None and str(geojson) == "-"
    if geojson is not None and not to_stdout and (geojson.is_dir() or not geojson.parent.is_dir()):
        raise BadInput(f"--geojson {geojson}: {'a folder' if geojson.is_dir() else 'no such folder'}; name a file")
    opened = open_store(store, write=False, listed=not (dataset and index))
    if model is not None:
        index = index_of_model(opened, dataset, model, index)
    locator = Locator.open(opened, dataset=dataset, index=index)
    if tta and not locator.tta:
        raise BadInput(f"--tta: the tiles of index {locator.info['name']} were embedded without; geostream index --tta")
    answers, refused = [], 0
    for start in range(0, len(photos), BATCH):
        some, unread = _read(photos[start : start + BATCH])
        refused += unread
        answers += _answered(locator, some, best)
    if to_stdout:
        print(json.dumps(as_geojson(answers), indent=1))
    else:
        _print_answers(locator, answers)
    if geojson is not None and not to_stdout:
        geojson.write_text(json.dumps(as_geojson(answers), indent=1) + "\n", encoding="utf-8")
        print(f"GeoJSON: {geojson}")
    if refused:
        raise BadInput(f"{refused} of {len(photos)} photos could not be read; the others are answered above")


def _read(paths: list[Path]) -> tuple[list[tuple[str, Image]], int]:
    """Decode photos; print a line for each that cannot be, and return how many those are."""
    from geostream.locating.photos import read_photo

    found: list[tuple[str, Image]] = []
    for path in paths:
        try:
            found.append((str(path), read_photo(path)))
        except BadInput as error:
            print(f"geostream: {error}", file=sys.stderr)
    return found, len(paths) - len(found)


def _answered(locator: Locator, photos: list[tuple[str, Image]], best: int) -> list[Answer]:
    from geostream.locating.photos import taken_at

    images = [image for _, image in photos]
    return locator.answer(images, [name for name, _ in photos], best, [taken_at(image) for image in images])


def answer_rows(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """Return the rows of a table of answers: a photo's best places, one after the other.

    Args:
        answers: The answers, in order.
    """
    return [
        {
            "photo": Path(answer.photo).name if rank == 1 else "",
            "sure": ("sure" if answer.sure else "not sure") if rank == 1 else "",
            "rank": str(rank),
            "place": one.key,
            "score": one.score,
            "latitude": None if one.latitude is None else f"{one.latitude:.6f}",
            "longitude": None if one.longitude is None else f"{one.longitude:.6f}",
            "error (m)": f"{answer.error_metres:,.0f}" if rank == 1 and answer.error_metres is not None else None,
        }
        for answer in answers
        for rank, one in enumerate(answer.candidates, 1)
    ]


def _print_answers(locator: Locator, answers: list[Answer]) -> None:
    if answers:
        print_table(f"index {locator.info['name']} of {locator.info['tiles']:,} tiles", answer_rows(answers))
    calibration = locator.info["calibration"]
    if calibration["threshold"] is None:
        print(
            f"No answer is called sure: the {calibration['queries']} test photos do not show "
            f"a precision of {calibration['precision']:.0%} at any threshold"
        )
    if attribution := (locator.info["source"] or {}).get("attribution"):
        print(f"Tiles: {attribution}")

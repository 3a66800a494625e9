"""Say what an answer of the page consists of: the models of its JSON, from which the schema is made."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from geostream.arrays import Float32, Float64, Int64
from geostream.locating.locate import Answer, as_geojson
from geostream.serving.base_map import BaseMap

HEAT_PLACES = 200  # best places whose heat is shown
HEAT_SCALE = 0.05  # difference in score by which a place's heat falls to 1 / e
COLDEST = 0.01  # heat that still shows

Point = tuple[float, float]


class Place(BaseModel):
    """A place that fits a photo."""

    place: int = Field(description="Id of the place in its layout.")
    key: str
    score: float = Field(description="Similarity of its tile and the photo, -1 to 1.")
    latitude: float | None = Field(description="Of the tile's centre in degrees; null where the data set has none.")
    longitude: float | None
    point: Point | None = Field(description="Longitude and latitude on the map of this page.")
    tile: str = Field(description="URL of its tile, relative to the page.")


class PhotoAnswer(BaseModel):
    """The answer for one photo."""

    photo: str = Field(description="The file's name.")
    sure: bool = Field(description="Whether the best place is right with the precision the index is calibrated for.")
    error_metres: float | None = Field(description="From the best place to where the photo's EXIF data say it was.")
    truth: Point | None = Field(description="Longitude and latitude on the map where the EXIF data say it was.")
    candidates: list[Place] = Field(description="The best places, best first.")
    heat: list[tuple[float, float, float]] = Field(description="Longitude, latitude and heat, 0 to 1, of more places.")
    geojson: dict[str, Any] = Field(description="The answer as `geostream locate` writes it: a FeatureCollection.")


class PhotoError(BaseModel):
    """Why there is no answer for one photo."""

    photo: str
    error: str = Field(description="One line.")


class Answers(BaseModel):
    """The answers for the photos of a request, in their order, and which photos have none."""

    answers: list[PhotoAnswer]
    errors: list[PhotoError]


class Failure(BaseModel):
    """Why a request has no answer."""

    error: str = Field(description="One line.")


class MapTile(BaseModel):
    """A tile of the map."""

    place: int
    url: str = Field(description="Relative to the page.")
    bounds: tuple[float, float, float, float] = Field(description="West, south, east and north edge on the map.")


class MapPart(BaseModel):
    """What a part of the map shows: tiles, or where there would be too many, how many places lie where."""

    tiles: list[MapTile]
    cells: list[tuple[float, float, int]] = Field(description="Longitude, latitude and number of places.")


class Bounds(BaseModel):
    """A part of the map, in degrees of the map."""

    west: float
    south: float
    east: float
    north: float


class MapInfo(BaseModel):
    """What the map is made of."""

    kind: str = Field(description="earth; plane: metres without a zone, laid around 0, 0; none: no coordinates.")
    bounds: Bounds | None
    tile_metres: float = Field(description="Side of a tile on the ground.")
    tile_metres_estimated: bool = Field(description="Whether that is estimated from the distance of neighbours.")


class LimitsInfo(BaseModel):
    """What a request may contain."""

    file_bytes: int
    request_bytes: int
    files: int
    pixels: int


class Info(BaseModel):
    """What this page answers from."""

    dataset: str
    layout: str
    places: int
    model: str
    attribution: str | None = Field(description="Of the imagery, to be shown with it.")
    map: MapInfo
    limits: LimitsInfo
    version: str


def photo_answer(answer: Answer, places: Int64, scores: Float32, base_map: BaseMap, layout_id: str) -> PhotoAnswer:
    """Put an answer together for the page.

    Args:
        answer: The best places.
        places: (k,) more places, best first.
        scores: (k,) their scores.
        base_map: Where they are on the map.
        layout_id: Part of the tiles' URLs, so that browsers may keep tiles for ever.
    """
    candidates = [
        Place(
            place=one.place,
            key=one.key,
            score=one.score,
            latitude=one.latitude,
            longitude=one.longitude,
            point=base_map.point(one.place),
            tile=tile_url(one.place, layout_id),
        )
        for one in answer.candidates
    ]
    shown = answer.truth is not None and base_map.kind == "earth"
    return PhotoAnswer(
        photo=answer.photo,
        sure=answer.sure,
        error_metres=answer.error_metres,
        truth=(answer.truth[1], answer.truth[0]) if answer.truth is not None and shown else None,
        candidates=candidates,
        heat=[(x, y, weight) for x, y, weight in heat(base_map.centre[places], scores).tolist()],
        geojson=as_geojson([answer]),
    )


def tile_url(place: int, layout_id: str) -> str:
    """Return the URL of a place's tile, relative to the page."""
    return f"tiles/{place}.jpg?layout={layout_id}"


def heat(points: Float64, scores: Float32) -> Float64:
    """Return how hot each place is: 1 for the best, and 1 / e for each ``HEAT_SCALE`` by which its score is lower.

    Args:
        points: (k, 2) longitude and latitude; NaN where unknown.
        scores: (k,) scores, best first.

    Returns:
        (n, 3) longitude, latitude and heat of the places that have coordinates and are hot enough to show.
    """
    weight = np.exp((scores - scores.max(initial=-np.inf)).astype(np.float64) / HEAT_SCALE)
    shown = np.isfinite(points).all(axis=1) & (weight >= COLDEST)
    return np.column_stack([points[shown], weight[shown].round(4)])

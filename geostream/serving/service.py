"""Answer the photos of concurrent requests with one model, and read tiles for the map.

A photo goes through three stages. Decoding threads bring it to the model's input size. The batcher's thread runs the
network and the search for all that wait. The event loop puts the answers together. So a large photo or a slow client
keeps nobody else from being answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.datastructures import UploadFile

from geostream import __version__
from geostream.arrays import Float32, Int64
from geostream.errors import GeostreamError, StoreError, Unanswered
from geostream.locating.locate import Answer, Locator
from geostream.locating.photos import taken_at
from geostream.serving.answers import (
    HEAT_PLACES,
    Answers,
    Bounds,
    Info,
    LimitsInfo,
    MapInfo,
    MapPart,
    MapTile,
    PhotoAnswer,
    PhotoError,
    photo_answer,
    tile_url,
)
from geostream.serving.base_map import BaseMap
from geostream.serving.base_map import Bounds as View
from geostream.serving.batching import Batcher
from geostream.serving.tiles import Tiles
from geostream.serving.uploads import BadUpload, Limits, decode_photo, shown_name

logger = logging.getLogger(__name__)

SHOWN = 5  # candidates of an answer
BATCH = 8  # most photos that the network is given together
DECODERS = 2  # photos that are decoded at the same time
STORE_TIMEOUT = 3.0  # seconds that the store has to say that it is there
STORE_ASKED = 5.0  # seconds for which its answer holds


@dataclass(frozen=True)
class Question:
    """A photo that is to be answered.

    Attributes:
        photo: What it is called.
        view: The photo in the form that the model is given.
        truth: Latitude and longitude where it was taken; None: unknown.
    """

    photo: str
    view: Image.Image
    truth: tuple[float, float] | None


Found = tuple[Answer, Int64, Float32]  # the answer, and more places with their scores


class Service:
    """All that the page needs, opened once.

    Args:
        locator: The index with its model. Only this service may use it.
        limits: What requests may contain.

    Attributes:
        base_map: Where places lie on the map.
        tiles: Where their tiles lie on the store.
        limits: As given.
        under_way: Requests that are being answered.
    """

    def __init__(self, locator: Locator, limits: Limits) -> None:
        self._locator, self.limits = locator, limits
        self.layout = locator.layout
        self.base_map = BaseMap.of(locator.layout)
        self.tiles = Tiles.of(locator.layout)
        self._batcher: Batcher[Question, Found] = Batcher(self._find, BATCH)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self.under_way = 0
        self._asked_store = float("-inf")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the threads while the context is open."""
        async with self._batcher:
            yield
        await asyncio.to_thread(self._decoders.shutdown)

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Count a request while the context is open.

        Raises:
            BadUpload: There are as many requests as are answered at the same time.
        """
        if self.under_way >= self.limits.requests:
            raise BadUpload("many photos are being answered just now; try again in a second", 429)
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    async def locate(self, uploads: Sequence[UploadFile]) -> Answers:
        """Answer the photos of a request.

        Args:
            uploads: The photos.

        Raises:
            BadUpload: None of them can be answered; the first one's reason.
            StoreError: What an answer consists of cannot be read.
        """
        outcomes = await asyncio.gather(*map(self._locate_one, uploads), return_exceptions=True)
        answers, errors, first = [], [], None
        for upload, outcome in zip(uploads, outcomes, strict=True):
            if isinstance(outcome, BadUpload):
                errors.append(PhotoError(photo=shown_name(upload.filename), error=str(outcome)))
                first = first or outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                answers.append(outcome)
        if first is not None and not answers:
            raise first
        return Answers(answers=answers, errors=errors)

    async def _locate_one(self, upload: UploadFile) -> PhotoAnswer:
        loop = asyncio.get_running_loop()
        question = await loop.run_in_executor(self._decoders, self._read, upload)
        answer, places, scores = await self._batcher.submit(question)
        return photo_answer(answer, places, scores, self.base_map, self.layout.id)

    def _read(self, upload: UploadFile) -> Question:
        """Decode a photo; runs in a decoding thread."""
        image = decode_photo(upload, self.limits)
        return Question(shown_name(upload.filename), self._locator.prepare(image), taken_at(image))

    def _find(self, questions: Sequence[Question]) -> list[Found]:
        """Answer a batch of photos; runs in the batcher's thread."""
        vectors = self._locator.embed([question.view for question in questions])
        places, scores = self._locator.search(vectors, HEAT_PLACES)
        photos, truths = [one.photo for one in questions], [one.truth for one in questions]
        answers = self._locator.explain(places, scores, photos, SHOWN, truths)
        return list(zip(answers, places, scores, strict=True))

    def map_part(self, view: View) -> MapPart:
        """Return what a part of the map shows.

        Args:
            view: The part, in degrees of the map.
        """
        chosen = self.base_map.tiles(view)
        if chosen is None:
            cells = self.base_map.cells(view)
            rows = zip(cells.centre.tolist(), cells.places.tolist(), strict=True)
            return MapPart(tiles=[], cells=[(longitude, latitude, count) for (longitude, latitude), count in rows])
        edges = self.base_map.corners(chosen).tolist()
        tiles = [
            MapTile(place=place, url=tile_url(place, self.layout.id), bounds=(west, south, east, north))
            for place, (west, south, east, north) in zip(chosen.tolist(), edges, strict=True)
        ]
        return MapPart(tiles=tiles, cells=[])

    async def check_store(self) -> None:
        """Check that the store can be read; its answer holds for some seconds.

        Raises:
            StoreError: It cannot.
        """
        if time.monotonic() - self._asked_store < STORE_ASKED:
            return
        try:
            async with asyncio.timeout(STORE_TIMEOUT):
                async for _ in self.layout.store.stream_range("layout.json", 0, 1):
                    pass
        except TimeoutError as error:
            raise Unanswered(f"{self.layout.store.url}: no answer within {STORE_TIMEOUT:.0f} s", "stalled") from error
        self._asked_store = time.monotonic()

    def info(self) -> Info:
        """Return what this page answers from."""
        index, bounds = self._locator.info, self.base_map.bounds
        limits = self.limits
        return Info(
            dataset=self.layout.dataset,
            layout=self.layout.name,
            places=int(index["tiles"]),
            model=model_name(index["model"]),
            attribution=attribution(self.layout.source),
            map=MapInfo(
                kind=self.base_map.kind,
                bounds=Bounds(**bounds._asdict()) if bounds else None,
                tile_metres=self.base_map.tile_metres,
                tile_metres_estimated=self.base_map.is_estimated,
            ),
            limits=LimitsInfo(
                file_bytes=limits.file_bytes,
                request_bytes=limits.request_bytes,
                files=limits.files,
                pixels=limits.pixels,
            ),
            version=__version__,
        )


def model_name(model: dict[str, object]) -> str:
    """Return how an index's model is called: by its number, or by run and checkpoint.

    Args:
        model: The entry "model" of ``index.json``.
    """
    return f"{model['run']} {model['checkpoint']}" if model["number"] is None else str(model["number"])


def attribution(source: dict[str, Any] | None) -> str | None:
    """Return the line that has to be shown with the imagery; None where the layout names no source of it.

    Args:
        source: Where the tiles come from (:attr:`geostream.layout.Layout.source`).
    """
    parts = [source["attribution"] or source["name"], source["licence"]] if source else []
    return ", ".join(str(part) for part in parts if part) or None


def line_of(error: GeostreamError) -> tuple[int, str]:
    """Return HTTP status and line for an error; those of the store say nothing of where it is.

    Args:
        error: Any of our errors.
    """
    if isinstance(error, BadUpload):
        return error.status, str(error)
    logger.warning("%s", error)
    if isinstance(error, StoreError):
        return 503, "the store cannot be read just now; try again in a while (the server's log says more)"
    return 500, "the server failed; its log says more"

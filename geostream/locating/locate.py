"""Answer where photos were taken: embed them, search the index, and say how sure the answer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image

from geostream.arrays import Float32, Int64
from geostream.evaluation.embed import Trained
from geostream.layout import Layout
from geostream.locating.index import Index, open_index, tile_points
from geostream.locating.search import TileSearch
from geostream.locating.threshold import SEEN, confidence, elsewhere
from geostream.locating.view import as_view
from geostream.mining.gps import points_in_metres
from geostream.store import Store


@dataclass(frozen=True)
class Candidate:
    """A place where a photo may have been taken.

    Attributes:
        place: Its id.
        key: Its key.
        score: Similarity of its tile and the photo, -1 to 1.
        latitude: Of the tile's centre, in degrees; None where the layout has none.
        longitude: Likewise.
    """

    place: int
    key: str
    score: float
    latitude: float | None
    longitude: float | None


@dataclass(frozen=True)
class Answer:
    """The answer for one photo.

    Attributes:
        photo: What the photo is called.
        candidates: The most likely places, best first.
        sure: Whether the best one is right with the precision that the index was calibrated for.
        truth: Latitude and longitude where it was taken, if known.
        error_metres: Distance from there to the best candidate's centre; None if one of them is unknown.
    """

    photo: str
    candidates: tuple[Candidate, ...]
    sure: bool
    truth: tuple[float, float] | None
    error_metres: float | None


class Locator:
    """An index with its model, opened to answer photos. Threads must not share it.

    Args:
        index: The opened index.
        trained: The encoder that the index was made with.
        search: The vectors of its tiles.

    Attributes:
        layout: The layout of the tiles.
        info: ``index.json``.
        tta: Whether similarities are averaged over flips and turns, as the index was made.
    """

    def __init__(self, index: Index, trained: Trained, search: TileSearch) -> None:
        self.layout: Layout = index.layout
        self.info: dict[str, Any] = index.info
        self.tta = trained.tta
        self._trained, self._search = trained, search
        self._points = tile_points(self.layout)

    @classmethod
    def open(
        cls, store: Store, *, dataset: str | None = None, index: str | None = None, threads: int | None = None
    ) -> Locator:
        """Open an index, and load its model and vectors into memory.

        Args:
            store: The root of the store.
            dataset: The data set's name; None for the only one in the store.
            index: The index's name; None for the only one of the data set.
            threads: CPU threads of the network and of the search; None leaves them as they are.

        Raises:
            BadInput: There is no such index, or it is not clear which one is meant.
            StaleArtefact: The layout of its tiles, or its model, is gone or another one by now.
            StoreError: The store cannot be read, or what lies there is damaged.
        """
        if threads is not None:
            torch.set_num_threads(threads)
            faiss.omp_set_num_threads(threads)
        opened = open_index(store, dataset, index)
        return cls(opened, opened.load_model(), opened.load_search())

    def prepare(self, image: Image.Image) -> Image.Image:
        """Bring a photo to the form that the model is given, so that :meth:`embed` has only the network to run.

        Other than the methods that use the model or the vectors, this may be called in several threads.

        Args:
            image: A photo.
        """
        return Image.fromarray(as_view(image, self._trained.settings))

    def embed(self, images: Sequence[Image.Image]) -> Float32:
        """Embed photos.

        Args:
            images: Pictures of any size and kind. One whose EXIF data tell its focal length is embedded at its scale,
                a panorama or another picture as it is.

        Returns:
            (n, D) vectors of length 1.
        """
        settings, step = self._trained.settings, self._trained.settings.optim.batch_size
        vectors = np.empty((len(images), self._trained.dim), dtype=np.float32)
        for start in range(0, len(images), step):
            views = np.stack([as_view(image, settings) for image in images[start : start + step]])
            pixels = torch.from_numpy(views).permute(0, 3, 1, 2)
            vectors[start : start + step] = self._trained.embed("view", pixels).numpy()
        return vectors

    def search(self, vectors: Float32, k: int) -> tuple[Int64, Float32]:
        """Find the places whose tiles are most similar.

        Args:
            vectors: (n, D) vectors of length 1.
            k: How many to find for each.

        Returns:
            (n, k) place ids and similarities, best first; fewer where the index has fewer tiles.
        """
        return self._search.nearest(vectors, k)

    def answer(
        self,
        images: Sequence[Image.Image],
        photos: Sequence[str],
        k: int = 5,
        truths: Sequence[tuple[float, float] | None] | None = None,
    ) -> list[Answer]:
        """Answer where photos were taken.

        Args:
            images: The photos.
            photos: What each is called.
            k: How many candidates an answer has.
            truths: Latitude and longitude of each, where known.
        """
        if not images:
            return []
        places, scores = self.search(self.embed(images), max(k, SEEN))
        return self.explain(places, scores, photos, k, truths)

    def explain(
        self,
        places: Int64,
        scores: Float32,
        photos: Sequence[str],
        k: int = 5,
        truths: Sequence[tuple[float, float] | None] | None = None,
    ) -> list[Answer]:
        """Say what the finds of :meth:`search` mean. The best ``SEEN`` of each photo decide whether it is sure.

        Args:
            places: (n, m) places, best first.
            scores: (n, m) their similarities.
            photos: What each photo is called.
            k: How many candidates an answer has.
            truths: Latitude and longitude of each, where known.
        """
        places, scores = places[:, : max(k, SEEN)], scores[:, : max(k, SEEN)]
        gaps = confidence(scores, elsewhere(self._points, places))
        threshold = self.info["calibration"]["threshold"]
        known = truths or [None] * len(photos)
        answers = []
        for row, (photo, truth) in enumerate(zip(photos, known, strict=True)):
            candidates = tuple(self._candidate(*one) for one in zip(places[row, :k], scores[row, :k], strict=True))
            sure = threshold is not None and bool(gaps[row] >= threshold)
            answers.append(Answer(photo, candidates, sure, truth, self._error(candidates[0], truth)))
        return answers

    def _candidate(self, place: np.int64, score: np.float32) -> Candidate:
        latitude, longitude = self.layout.position[place].tolist()
        known = self.layout.coordinates == "latlon" and np.isfinite([latitude, longitude]).all()
        degrees = (latitude, longitude) if known else (None, None)
        return Candidate(int(place), self.layout.key(int(place)), float(score), *degrees)

    def _error(self, best: Candidate, truth: tuple[float, float] | None) -> float | None:
        if truth is None or best.latitude is None or best.longitude is None:
            return None
        ends = np.array([truth, (best.latitude, best.longitude)])
        one, other = points_in_metres(ends, "latlon")
        return float(np.linalg.norm(one - other))


def as_geojson(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return answers as a GeoJSON FeatureCollection (RFC 7946).

    Each candidate is a feature, a point at its tile's centre, or without a geometry where that is unknown. Where the
    truth is known, another feature of the kind "truth" marks it.

    Args:
        answers: The answers, in order.
    """
    features = []
    for answer in answers:
        common = {"photo": answer.photo, "sure": answer.sure, "error_metres": answer.error_metres}
        for rank, one in enumerate(answer.candidates, 1):
            facts = {"kind": "candidate", "rank": rank, "score": one.score, "place": one.place, "key": one.key}
            features.append(_feature(one.latitude, one.longitude, common | facts))
        if answer.truth is not None:
            features.append(_feature(*answer.truth, common | {"kind": "truth"}))
    return {"type": "FeatureCollection", "features": features}


def _feature(latitude: float | None, longitude: float | None, properties: dict[str, Any]) -> dict[str, Any]:
    point = None if latitude is None else {"type": "Point", "coordinates": [longitude, latitude]}
    return {"type": "Feature", "geometry": point, "properties": properties}

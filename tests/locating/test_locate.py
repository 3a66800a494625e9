"""Photos are answered from an index on a real store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geostream.locating.locate import Locator
from geostream.store import Store
from tests.locating.indexes import photos_of, small_index


def test_an_index_answers_photos(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    index, places = small_index(store)
    locator = Locator.open(store)
    images = photos_of(places)
    vectors = locator.embed(images)
    assert vectors.shape == (16, index.info["dim"]) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    found, scores = locator.search(vectors, 3)
    assert found.shape == scores.shape == (16, 3) and (np.diff(scores, axis=1) <= 0).all()
    truth = (40.0 + 5 * 0.00045, -74.0)
    [answer] = locator.answer(images[5:6], ["five"], 5, [truth])
    assert answer.photo == "five" and len(answer.candidates) == 5 and not answer.sure
    assert [one.place for one in answer.candidates][:3] == found[5].tolist()
    best = answer.candidates[0]
    assert best.key == places[best.place].key and (best.latitude, best.longitude) == places[best.place].position
    assert answer.error_metres == pytest.approx(abs(best.place - 5) * 0.00045 * 111_195, abs=0.1)

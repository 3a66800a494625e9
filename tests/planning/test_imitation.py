"""Sample4Geo's batches, imitated from some places' neighbours, are about as hard as the real ones."""

from __future__ import annotations

import numpy as np
import pytest

from geostream.planning import hardness
from geostream.planning.batches import assemble
from geostream.planning.imitation import imitated
from tests.planning.test_patchwork import places


def test_as_hard_as_sample4geo() -> None:
    n, size = 4800, 32
    problem, vectors = places(n, 48, 1, 30)
    rows = np.arange(n, dtype=np.int32)
    similarity = hardness.cosine(vectors, vectors, rows, rows)
    ends = [
        assemble(problem, strategy=name, resident=10**6, batch_size=size, seed=0, epoch=0).batches
        for name in ("sample4geo", "random")
    ]
    real, random = (hardness.batch_hardness(batches, similarity) for batches in ends)
    seeds = np.random.default_rng(0).choice(n, 1000, replace=False).astype(np.int32)
    views = np.ones(n, dtype=np.int64)
    made = imitated(seeds, problem.neighbours[seeds], views, (150, size), np.random.default_rng(1))
    score, _ = hardness.hardness_score(hardness.batch_hardness(made, similarity), real, random)
    assert score == pytest.approx(1, abs=0.1)

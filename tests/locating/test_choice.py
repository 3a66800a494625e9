"""Which index a promoted model answers from."""

from __future__ import annotations

from pathlib import Path

import pytest

from geostream.errors import BadInput
from geostream.locating.choice import index_of_model
from geostream.locating.make import make_index
from geostream.runs.models import promote
from geostream.store import Store
from tests.helpers import tiny_layout
from tests.runs.small_runs import run_with_checkpoint


def test_the_current_models_own_index_is_served(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    layout = tiny_layout(store)
    runs = [run_with_checkpoint(store, layout, name, seed=seed) for seed, name in enumerate(("old", "new"))]
    for number, (run, checkpoint) in enumerate(runs):
        make_index(run, checkpoint, layout, f"of-{run.name}")  # before its model is promoted
        promote(run, checkpoint, {"r1": 0.5}, over=number or None, by="run")
    assert index_of_model(store, None, "current", None) == "of-new"
    assert index_of_model(store, "tiny", "1", None) == "of-old"
    with pytest.raises(BadInput, match="model 2 has not made the index of-old"):
        index_of_model(store, None, "current", "of-old")
    make_index(*runs[1], layout, "again")
    with pytest.raises(BadInput, match="again, of-new"):
        index_of_model(store, None, "current", None)
    assert index_of_model(store, None, "current", "again") == "again"


def test_a_model_without_an_index_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    run, checkpoint = run_with_checkpoint(store, tiny_layout(store), "run")
    promote(run, checkpoint, {"r1": 0.5}, over=None, by="run")
    with pytest.raises(BadInput, match="model 1 has no index; make one: geostream index"):
        index_of_model(store, None, "current", None)

"""Train cross-view retrieval models on mined hard negatives, streamed from object storage.

The names below are the public API. Each is imported from its module when it is first used, so that ``import
geostream`` itself takes milliseconds and imports no torch. A first loop over a layout's batches::

    import geostream

    store = geostream.Store.open("s3://bucket/geo")
    layout = geostream.open_layout(store)
    settings = geostream.default_settings(layout.dataset).changed(strategy="random", batch_size=64)
    plan = geostream.make_plan(layout, None, settings, epoch=1, seed=0)
    dataset = geostream.plan_dataset(layout, plan, geostream.ImageSizes.of(settings))
    with geostream.Loader(dataset) as loader:
        for batch in loader:
            tiles, views = batch.tensors["tile"], batch.tensors["view"]  # uint8, (B, 3, H, W)

Store and layout:
    Store, Layout, open_layout, list_datasets, list_layouts
Settings:
    TrainSettings, default_settings, parse_settings
Mining, from embeddings to a neighbour graph:
    Embeddings, create_embeddings, open_embeddings, NeighbourGraph, build_visual_graph, build_gps_graph, open_graph
Planning, from a graph to the batches of an epoch:
    EpochPlan, make_plan, save_plan, load_plan
Streaming, from a plan to batches of tensors:
    Loader, Batch, ImageSizes, ReadOptions, plan_dataset, scan_dataset
Training and evaluation:
    train, Run, RunResult, evaluate_embeddings, Evaluation
Locating photos:
    Locator, Answer, as_geojson
Errors:
    GeostreamError, of which every error that is meant for a person is a kind

``examples/`` in the repository shows them at work; ``geostream --help`` lists the commands.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# Read by OpenMP when torch is first imported. Without it, OpenMP's threads spin while they wait, and take the cores
# from loader threads and from a local server.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:  # for editors and type checkers; at run time, __getattr__ imports the names
    from geostream.errors import GeostreamError
    from geostream.evaluation.evaluate import Evaluation, evaluate_embeddings
    from geostream.layout import Layout, list_datasets, list_layouts, open_layout
    from geostream.locating.locate import Answer, Locator, as_geojson
    from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings
    from geostream.mining.gps import build_gps_graph
    from geostream.mining.graph import NeighbourGraph, open_graph
    from geostream.mining.visual import build_visual_graph
    from geostream.planning.make_plan import make_plan
    from geostream.planning.plan import EpochPlan, load_plan, save_plan
    from geostream.runs.log import RunResult
    from geostream.runs.loop import train
    from geostream.runs.run import Run
    from geostream.settings import TrainSettings, default_settings, parse_settings
    from geostream.store import Store
    from geostream.streaming.dataset import plan_dataset, scan_dataset
    from geostream.streaming.loader import Loader
    from geostream.streaming.options import ReadOptions
    from geostream.streaming.pipeline import Batch, ImageSizes

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Batch",
    "Embeddings",
    "EpochPlan",
    "Evaluation",
    "GeostreamError",
    "ImageSizes",
    "Layout",
    "Loader",
    "Locator",
    "NeighbourGraph",
    "ReadOptions",
    "Run",
    "RunResult",
    "Store",
    "TrainSettings",
    "as_geojson",
    "build_gps_graph",
    "build_visual_graph",
    "create_embeddings",
    "default_settings",
    "evaluate_embeddings",
    "list_datasets",
    "list_layouts",
    "load_plan",
    "make_plan",
    "open_embeddings",
    "open_graph",
    "open_layout",
    "parse_settings",
    "plan_dataset",
    "save_plan",
    "scan_dataset",
    "train",
]

_NAMES = {
    "errors": ("GeostreamError",),
    "evaluation.evaluate": ("Evaluation", "evaluate_embeddings"),
    "layout": ("Layout", "list_datasets", "list_layouts", "open_layout"),
    "locating.locate": ("Answer", "Locator", "as_geojson"),
    "mining.embeddings": ("Embeddings", "create_embeddings", "open_embeddings"),
    "mining.gps": ("build_gps_graph",),
    "mining.graph": ("NeighbourGraph", "open_graph"),
    "mining.visual": ("build_visual_graph",),
    "planning.make_plan": ("make_plan",),
    "planning.plan": ("EpochPlan", "load_plan", "save_plan"),
    "runs.log": ("RunResult",),
    "runs.loop": ("train",),
    "runs.run": ("Run",),
    "settings": ("TrainSettings", "default_settings", "parse_settings"),
    "store": ("Store",),
    "streaming.dataset": ("plan_dataset", "scan_dataset"),
    "streaming.loader": ("Loader",),
    "streaming.options": ("ReadOptions",),
    "streaming.pipeline": ("Batch", "ImageSizes"),
}
_MODULES = {name: f"geostream.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name from its module, once."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Know a training run: where it lies on the store, its settings, its log, and the layout that it reads.

A run is the folder ``<store>/<dataset>/runs/<name>``. This module is the only one that spells the names of what lies
in it; everything else asks a :class:`Run`. Opening one costs one small object.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

from geostream.errors import BadInput, LayoutNotCommitted, NotFound, StaleArtefact, StoreError
from geostream.layout import Layout, layout_infos, open_layout
from geostream.mining.embeddings import Embeddings, open_embeddings
from geostream.mining.graph import NeighbourGraph, open_graph
from geostream.planning.plan import EpochPlan, load_plan
from geostream.runs.lease import Lease
from geostream.runs.log import Record, RunLog
from geostream.settings import TrainSettings, default_settings, make_settings
from geostream.store import Store, check_name
from geostream.training.checkpoint import checkpoint_name, list_checkpoints

SETTINGS = "settings.json"
LAYOUT = "layout.json"  # the generation that the run reads
LOG = "metrics.jsonl"
BEST = "best.json"  # the checkpoint of the evaluation with the highest R@1
EVALUATIONS = "evaluation.json"
REPORT = "report.html"
GPS_GRAPH = "neighbours/gps.zarr"


def run_folder(store: Store, dataset: str, name: str) -> Store:
    """Return the folder of a run in the store that holds the data set."""
    return store.child(check_name("dataset", dataset), "runs", check_name("run", name))


def needed_layouts(folder: Store) -> set[str] | None:
    """Return the ids of the layouts that the run in ``folder`` needs; None: it does not say, so it may need any.

    These are the layouts of its checkpoints, of the plan of its newest epoch, and the one that it reads.
    """
    needed = set()
    try:
        for checkpoint in folder.folders("checkpoints"):
            with suppress(NotFound):  # not whole, or removed just now
                needed.add(str(folder.read_json(f"checkpoints/{checkpoint}/state.json")["position"]["layout_id"]))
        plans = [info.path for info in folder.list("plans") if info.path.endswith(".json")]
        if plans:
            needed.add(str(folder.read_json(max(plans))["layout_id"]))
        if folder.exists(LAYOUT):
            needed.add(str(folder.read_json(LAYOUT)["id"]))
    except (StoreError, KeyError, TypeError):  # damaged, of another form, or just being written
        return None
    return needed or None


class Run:
    """A training run on the store.

    Attributes:
        store: Where the data set is.
        name: The run's name.
        folder: The run's folder.
        layout: The generation of the layout that the run reads.
        cluster: URL of a Dask scheduler for the run's jobs; None: threads of this process.
    """

    def __init__(self, store: Store, layout: Layout, name: str, cluster: str | None = None) -> None:
        """Take ``layout`` as the generation that is read, whatever the run has read before."""
        self.store, self.layout, self.name, self.cluster = store, layout, name, cluster
        self.folder = run_folder(store, layout.dataset, name)
        self._lease: Lease | None = None

    @classmethod
    def open(cls, store: Store, layout: Layout, name: str, cluster: str | None = None) -> Run:
        """Return the run on the generation that it reads: its own where it has reclustered, else ``layout``.

        Raises:
            StaleArtefact: The run was begun on other places than those of ``layout``.
            LayoutNotCommitted: Its generation is gone.
        """
        run = cls(store, layout, name, cluster)
        run.layout = run.current_layout()
        return run

    @property
    def url(self) -> str:
        """The URL of the run's folder."""
        return self.folder.url

    # layout

    def current_layout(self) -> Layout:
        """Return the generation that the run has written down as its own; where there is none, the one at hand."""
        try:
            own_id, name = (str(self.folder.read_json(LAYOUT)[fact]) for fact in ("id", "layout"))
        except NotFound:
            return self.layout
        if own_id == self.layout.id:
            return self.layout
        own = open_layout(self.store, self.layout.dataset, name)
        if own.id != own_id or own.places_id != self.layout.places_id:
            raise StaleArtefact(
                f"{self.url}: begun on layout {name}, other places than {self.layout.name}'s; start another run"
            )
        return own

    def pin_layout(self, layout: Layout) -> None:
        """Write down that from now on the run reads this layout."""
        self.folder.write_json(LAYOUT, {"layout": layout.name, "id": layout.id})
        self.layout = layout

    def go_back_to(self, layout_id: str) -> None:
        """Read the generation with this id again.

        Raises:
            LayoutNotCommitted: It is gone.
        """
        for name, info in layout_infos(self.store, self.layout.dataset).items():
            if info["id"] == layout_id:
                self.layout = open_layout(self.store, self.layout.dataset, name)
                return
        raise LayoutNotCommitted(
            f"{self.store.url}/{self.layout.dataset}: generation {layout_id[:12]}, which a plan is of, is gone; "
            "start another run"
        )

    # settings and log

    @cached_property
    def settings(self) -> TrainSettings:
        """The settings that the run was begun with.

        Raises:
            BadInput: There is no such run.
        """
        try:
            return make_settings(self.folder.read_json(SETTINGS))
        except NotFound as error:
            raise BadInput(f"{self.url}: no such run; begin it with: geostream train") from error

    @property
    def exists(self) -> bool:
        """Whether the run was begun."""
        return self.folder.exists(SETTINGS)

    def settings_or_recipe(self) -> TrainSettings:
        """Return the run's settings; where it was not begun, those to begin with on its data set."""
        return self.settings if self.exists else default_settings(self.layout.dataset)

    def store_settings(self, settings: TrainSettings) -> None:
        """Write the settings of a new run.

        Raises:
            AlreadyExists: The run was begun before.
        """
        self.folder.write_json(SETTINGS, settings.model_dump(), if_absent=True)

    @cached_property
    def log(self) -> RunLog:
        """What the run has done so far."""
        return RunLog(self.folder, LOG)

    def best(self) -> dict[str, Any] | None:
        """Return checkpoint, epoch and R@1 of the best evaluation, the newer of equals; None where there is none."""
        step = {record["epoch"]: record["step"] for record in self.log.of("train")}
        evaluated = [record for record in self.log.of("evaluate") if record["epoch"] in step]
        if not evaluated:
            return None
        best = max(evaluated, key=lambda record: (record["r1"], record["epoch"]))
        return {"checkpoint": checkpoint_name(step[best["epoch"]]), "epoch": best["epoch"], "r1": best["r1"]}

    def write_best(self) -> None:
        """Name the checkpoint of the best evaluation, for readers."""
        self.folder.write_json(BEST, self.best())

    def read_best(self) -> str:
        """Return the name of the checkpoint of the best evaluation.

        Raises:
            BadInput: No epoch was evaluated yet.
        """
        try:
            return str(self.folder.read_json(BEST)["checkpoint"])
        except NotFound as error:
            raise BadInput(
                f"{self.url}: no epoch was evaluated yet; name a checkpoint, or none for the newest"
            ) from error

    def write_evaluations(self, records: list[Record]) -> None:
        """Write the records of all evaluations, for readers."""
        self.folder.write_json(EVALUATIONS, records)

    def write_report(self, page: str) -> None:
        """Write the report's page."""
        self.folder.write(REPORT, page.encode())

    # what the stages leave

    def checkpoints(self) -> list[str]:
        """Return the names of the whole checkpoints, oldest first."""
        return list_checkpoints(self.folder)

    def plan(self, epoch: int, layout: Layout | None) -> EpochPlan:
        """Return the stored plan of an epoch; raises as :func:`load_plan` does. ``layout`` None: of any generation."""
        return load_plan(self.plans, epoch, layout)

    @property
    def plans(self) -> Store:
        """The folder of the plans."""
        return self.folder.child("plans")

    @staticmethod
    def embeddings_name(split: str, epoch: int) -> str:
        """Return where within the run the embeddings of a split after an epoch lie."""
        return f"embeddings/{'' if split == 'train' else f'{split}-'}epoch-{epoch:04d}.zarr"

    def embeddings(self, split: str, epoch: int) -> Embeddings:
        """Return the embeddings of a split after an epoch; raises as :func:`open_embeddings` does."""
        return open_embeddings(self.folder, self.embeddings_name(split, epoch), self.layout)

    def newest_embeddings(self) -> int:
        """Return the last epoch whose training set was embedded.

        Raises:
            BadInput: None was.
        """
        epochs = [name.removeprefix("epoch-").removesuffix(".zarr") for name in self.folder.folders("embeddings")]
        numbers = [int(text) for text in epochs if text.isdigit()]
        if not numbers:
            raise BadInput(f"{self.url}: the training set was not embedded yet; run: geostream embed")
        return max(numbers)

    @staticmethod
    def graph_name(epoch: int) -> str:
        """Return where within the run the graph of an epoch's embeddings lies; epoch 0: the geographic graph."""
        return f"neighbours/visual-epoch-{epoch:04d}.zarr" if epoch else GPS_GRAPH

    def graph(self, epoch: int) -> NeighbourGraph:
        """Return the graph of an epoch's embeddings, 0: the geographic one; raises as :func:`open_graph` does."""
        return open_graph(self.folder, self.graph_name(epoch), self.layout)

    @staticmethod
    def evaluation_name(split: str, epoch: int) -> str:
        """Return where within the run an evaluation's files lie, without their endings."""
        return f"evaluation-{split}-epoch-{epoch:04d}"

    # who may write

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the run while this process writes into it.

        Raises:
            RunHeld: Another process holds it.
        """
        with Lease(self.folder) as self._lease:
            try:
                yield
            finally:
                self._lease = None

    def check_held(self) -> None:
        """Raise RunHeld where another process has taken the run over. Called before anything is written."""
        if self._lease is not None:
            self._lease.check()

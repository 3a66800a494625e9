"""Open a training run on the store: its settings, its log, its files, and the layout that it reads.

A run is the folder ``<store>/<dataset>/runs/<name>``. Only this module spells the names of the files in it; everything
else asks a :class:`Run`. Opening a run reads one small object.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property
from typing import Any

from geostream.errors import BadInput, LayoutNotCommitted, NotFound, StaleArtefact, StoreError
from geostream.layout import Current, Layout, layout_infos, open_layout
from geostream.layout.listing import the_dataset
from geostream.mining.embeddings import Embeddings, open_embeddings
from geostream.mining.graph import NeighbourGraph, open_graph
from geostream.planning.plan import EpochPlan, load_plan
from geostream.runs.lease import Holding, Lease, is_held
from geostream.runs.log import Record, RunLog
from geostream.settings import TrainSettings, default_settings, make_settings
from geostream.store import Store, check_name
from geostream.training.checkpoint_files import checkpoint_name, list_checkpoints
from geostream.training.field_of_view import WHOLE

SETTINGS = "settings.json"
LAYOUT = "layout.json"  # names the layout that the run reads
LOG = "metrics.jsonl"
COMPARISON = "comparison.json"  # with the model that was current then
BEST = "best.json"  # the checkpoint of the evaluation with the highest R@1
EVALUATIONS = "evaluation.json"
REPORT = "report.html"
LONG_HELD = 600.0  # seconds since a holder's last sign of life, for which nothing that its run needs is removed
GPS_GRAPH = "neighbours/gps.zarr"


def run_folder(store: Store, dataset: str, name: str) -> Store:
    """Return the folder of a run in the store that holds the dataset."""
    return store.child(check_name("dataset", dataset), "runs", check_name("run", name))


def needed_layouts(folder: Store) -> set[str] | None:
    """Return the ids of the layouts that the run in ``folder`` needs, or None if its files do not say.

    A run needs the layouts of its checkpoints, the layout of its newest plan, and the one that it reads. A run without
    a whole checkpoint has nothing to go on from and needs none, unless a process holds it now. A run for which this
    returns None may need any layout.
    """
    needed = set()
    try:
        for checkpoint in folder.folders("checkpoints"):
            with suppress(NotFound):  # not whole, or removed just now
                needed.add(str(folder.read_json(f"checkpoints/{checkpoint}/state.json")["position"]["layout_id"]))
        if not needed and not is_held(folder, within=LONG_HELD):
            return set()
        plans = [info.path for info in folder.list("plans") if info.path.endswith(".json")]
        if plans:
            needed.add(str(folder.read_json(max(plans))["layout_id"]))
        if folder.exists(LAYOUT):
            needed.add(str(folder.read_json(LAYOUT)["id"]))
    except (StoreError, KeyError, TypeError):  # damaged, in an unknown form, or just being written
        return None
    return needed or None


def _recorded(folder: Store) -> Current | None:
    """Return which layout the run in ``folder`` reads; None if it has not recorded that yet."""
    try:
        said = folder.read_json(LAYOUT)
        return Current(check_name("layout", str(said["layout"])), str(said["id"]))
    except NotFound:
        return None
    except (KeyError, TypeError) as error:
        raise StoreError(f"{folder.url}/{LAYOUT}: damaged; it names no layout") from error


def _open_own(store: Store, dataset: str, own: Current) -> Layout:
    """Open the layout that a run has recorded; raise LayoutNotCommitted if it is gone."""
    layout = open_layout(store, dataset, own.layout)
    if layout.id != own.id:
        raise LayoutNotCommitted(
            f"{layout.store.url}: another layout than when the run was begun; start another run, or restore it"
        )
    return layout


def named_by_look(split: str, fov: float, tta: bool) -> str:
    """Return how what is made of a split is called: ``test``, ``test_fov90``, ``test_tta``, ``test_fov90_tta``."""
    look = f"{'' if fov == WHOLE else f'_fov{fov:g}'}{'_tta' if tta else ''}"
    return f"{split}{look}".replace(".", "_")


class Run:
    """A training run on the store.

    Made directly, a run reads ``layout``, whatever it has read before; :meth:`open` looks up the run's own.

    Args:
        store: The store that holds the dataset.
        layout: The layout to read.
        name: The run's name.
        cluster: URL of a Dask scheduler for the run's jobs; None uses threads of this process.

    Attributes:
        folder: The run's folder on the store.
        dataset: The data set that it belongs to.
        layout: The generation of the layout that the run reads.
        predates_lag: Whether the run was begun before there was the setting ``mining_lag``; it goes on without a lag.

    Raises:
        BadInput: ``name`` is not a valid name for a run.
    """

    def __init__(self, store: Store, layout: Layout, name: str, cluster: str | None = None) -> None:
        self.store, self.layout, self.name, self.cluster = store, layout, name, cluster
        self.dataset = layout.dataset
        self.folder = run_folder(store, layout.dataset, name)
        self.predates_lag = False
        self._holding: Holding | None = None

    @classmethod
    def open(cls, store: Store, layout: Layout, name: str, cluster: str | None = None) -> Run:
        """Open a run on the layout that it reads.

        Args:
            store: The store that holds the dataset.
            layout: The layout to read, unless the run has recorded another generation of it.
            name: The run's name.
            cluster: URL of a Dask scheduler for the run's jobs; None uses threads of this process.

        Raises:
            BadInput: ``name`` is not a valid name for a run.
            StaleArtefact: The run was begun on other places than those of ``layout``.
            LayoutNotCommitted: The run's layout is gone.
        """
        run = cls(store, layout, name, cluster)
        run.layout = run.own_layout()
        return run

    @classmethod
    def find(cls, store: Store, dataset: str | None, layout: str | None, name: str, cluster: str | None = None) -> Run:
        """Open a run by names: on the layout that it reads, whichever is the dataset's current one by now.

        Args:
            store: The store that holds the dataset.
            dataset: The dataset's name; None for the only one in the store.
            layout: Name or tag of a layout to read instead; None for the run's own, or the current one for a new run.
            name: The run's name.
            cluster: URL of a Dask scheduler for the run's jobs; None uses threads of this process.

        Raises:
            BadInput: A name is not valid, or the dataset or layout that is meant is not clear.
            StaleArtefact: The run was begun on other places than those of ``layout``.
            LayoutNotCommitted: The layout is gone.
        """
        dataset = the_dataset(store, dataset)
        if layout is None and (own := _recorded(run_folder(store, dataset, name))) is not None:
            return cls(store, _open_own(store, dataset, own), name, cluster)
        run = cls(store, open_layout(store, dataset, layout), name, cluster)
        with suppress(LayoutNotCommitted):  # then the run's checkpoints say whether they fit
            run.own_layout()
        return run

    @cached_property
    def trained_on(self) -> list[str]:
        """The data sets that it trains on: its own, or those that its layout joins."""
        return [one.dataset for one in self.layout.joined] or [self.dataset]

    @property
    def url(self) -> str:
        """URL of the run's folder."""
        return self.folder.url

    # layout

    def own_layout(self) -> Layout:
        """Return the layout that the run's ``layout.json`` names; without that file, the layout set on this object.

        Raises:
            StaleArtefact: The run was begun on other places than those of the layout set here.
            LayoutNotCommitted: The layout is gone.
        """
        recorded = _recorded(self.folder)
        if recorded is None or recorded.id == self.layout.id:
            return self.layout
        own = _open_own(self.store, self.layout.dataset, recorded)
        if own.places_id != self.layout.places_id:
            raise StaleArtefact(
                f"{self.url}: begun on layout {own.name}, other places than {self.layout.name}'s; start another run"
            )
        return own

    def pin_layout(self, layout: Layout) -> None:
        """Make the run read ``layout`` from now on, and record this in its folder."""
        self.folder.write_json(LAYOUT, {"layout": layout.name, "id": layout.id})
        self.layout = layout

    def on(self, layout: Layout) -> Run:
        """Return this run as it is on another layout; nothing is recorded.

        Args:
            layout: Another generation, or a layout of another data set, to test on. What is made there is named by it.
        """
        _ = self.trained_on  # is kept, and so copied
        other = copy(self)
        other.layout = layout
        return other

    def move_to(self, layout_id: str) -> None:
        """Make the run read another generation from now on, and record this in its folder.

        Args:
            layout_id: Id of the layout.

        Raises:
            LayoutNotCommitted: That generation is gone.
        """
        if layout_id == self.layout.id:
            return
        for name, info in layout_infos(self.store, self.layout.dataset).items():
            if info["id"] == layout_id:
                self.pin_layout(open_layout(self.store, self.layout.dataset, name))
                return
        raise LayoutNotCommitted(
            f"{self.store.url}/{self.layout.dataset}: generation {layout_id[:12]}, which a plan is of, is gone; "
            "start another run"
        )

    # settings and log

    @cached_property
    def settings(self) -> TrainSettings:
        """Settings that the run was begun with.

        Raises:
            BadInput: There is no such run.
        """
        try:
            settings = make_settings(self.folder.read_json(SETTINGS))
        except NotFound as error:
            raise BadInput(f"{self.url}: no such run; begin it with: geostream train") from error
        self.predates_lag = "mining_lag" not in settings.plan.model_fields_set
        return settings.changed(mining_lag=0) if self.predates_lag else settings

    @property
    def exists(self) -> bool:
        """Whether the run was begun, that is, has settings."""
        return self.folder.exists(SETTINGS)

    def settings_or_recipe(self) -> TrainSettings:
        """Return the run's settings, or the default settings of its dataset if the run was not begun."""
        return self.settings if self.exists else default_settings(self.layout.dataset)

    def store_settings(self, settings: TrainSettings) -> None:
        """Write the settings of a new run.

        Raises:
            AlreadyExists: The run was begun before.
        """
        self.folder.write_json(SETTINGS, settings.model_dump(), if_absent=True)

    def replace_settings(self, settings: TrainSettings) -> None:
        """Write other settings for a run that was begun before; :mod:`geostream.runs.begin` says which may change."""
        self.folder.write_json(SETTINGS, settings.model_dump())

    @cached_property
    def log(self) -> RunLog:
        """Log of what the run has done so far."""
        return RunLog(self.folder, LOG)

    def preparation_log(self, epoch: int) -> RunLog:
        """Read what was done so far to prepare an epoch (:mod:`geostream.runs.preparation`)."""
        return RunLog(self.folder, f"prepared/epoch-{epoch:04d}.jsonl")

    def best(self) -> dict[str, Any] | None:
        """Find the evaluation with the highest R@1; of equals, the newest.

        Returns:
            A dict of ``checkpoint`` (name), ``epoch`` and ``r1``, or None if no epoch was evaluated.
        """
        step = {record["epoch"]: record["step"] for record in self.log.of("train")}
        evaluated = [record for record in self.log.of("evaluate") if record["epoch"] in step]
        if not evaluated:
            return None
        best = max(evaluated, key=lambda record: (record["r1"], record["epoch"]))
        return {"checkpoint": checkpoint_name(step[best["epoch"]]), "epoch": best["epoch"], "r1": best["r1"]}

    def write_best(self) -> None:
        """Write the name of the best evaluation's checkpoint into the run's folder."""
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
        """Write the log's records of all evaluations as one file, for other programs to read."""
        self.folder.write_json(EVALUATIONS, records)

    def write_comparison(self, record: Record) -> None:
        """Write how a checkpoint of the run compares with the current model (:mod:`geostream.runs.promotion`)."""
        self.folder.write_json(COMPARISON, record)

    def read_comparison(self) -> Record | None:
        """Return the last comparison with a model that was current then; None if there was none."""
        try:
            return dict(self.folder.read_json(COMPARISON))
        except NotFound:
            return None

    def write_report(self, page: str) -> None:
        """Write the report.

        Args:
            page: The report as HTML.
        """
        self.folder.write(REPORT, page.encode())

    # what the stages leave

    def checkpoints(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        return list_checkpoints(self.folder)

    def plan(self, epoch: int, layout: Layout | None) -> EpochPlan:
        """Return the stored plan of an epoch.

        Args:
            epoch: Number of the epoch, from 1.
            layout: The layout that the plan must be for; None allows any.

        Raises:
            NotFound: The epoch has no plan.
            StaleArtefact: The plan is for another layout.
            GeostreamError: The plan was changed or damaged.
        """
        return load_plan(self.plans, epoch, layout)

    @property
    def plans(self) -> Store:
        """Folder of the plans."""
        return self.folder.child("plans")

    def named_by_dataset(self, split: str) -> str:
        """Return how what is made of a split is called: by the data set, too, where that is not the run's own."""
        return split if self.layout.dataset == self.dataset else f"{split}_{self.layout.dataset}"

    @staticmethod
    def embeddings_name(split: str, epoch: int, fov: float = WHOLE, tta: bool = False) -> str:
        """Return the path, within the run's folder, of a split's embeddings after an epoch.

        Args:
            split: "train" or "test".
            epoch: Number of the epoch.
            fov: Degrees that the views were narrowed to.
            tta: Whether images were embedded flipped and turned, too.
        """
        name = named_by_look(split, fov, tta)
        return f"embeddings/{'' if name == 'train' else f'{name}-'}epoch-{epoch:04d}.zarr"

    def embeddings(self, split: str, epoch: int, fov: float = WHOLE, tta: bool = False) -> Embeddings:
        """Open a split's embeddings after an epoch.

        Args:
            split: "train" or "test".
            epoch: Number of the epoch.
            fov: Degrees that the views were narrowed to.
            tta: Whether images were embedded flipped and turned, too.

        Raises:
            NotFound: There are none, or they were never finished.
            StaleArtefact: They are of other places than those of the run's layout.
        """
        name = self.embeddings_name(self.named_by_dataset(split), epoch, fov, tta)
        return open_embeddings(self.folder, name, self.layout)

    def embedded_epochs(self) -> list[int]:
        """Return the epochs after which the training set was embedded, in order."""
        epochs = [name.removeprefix("epoch-").removesuffix(".zarr") for name in self.folder.folders("embeddings")]
        return sorted(int(text) for text in epochs if text.isdigit())

    def newest_embeddings(self) -> int:
        """Return the last epoch whose training set was embedded.

        Raises:
            BadInput: It was never embedded.
        """
        epochs = self.embedded_epochs()
        if not epochs:
            raise BadInput(f"{self.url}: the training set was not embedded yet; run: geostream embed")
        return epochs[-1]

    @staticmethod
    def graph_name(epoch: int) -> str:
        """Return the path, within the run's folder, of the graph of an epoch's embeddings (0: the geographic graph)."""
        return f"neighbours/visual-epoch-{epoch:04d}.zarr" if epoch else GPS_GRAPH

    def graph(self, epoch: int) -> NeighbourGraph:
        """Open the neighbour graph of an epoch's embeddings.

        Args:
            epoch: Number of the epoch; 0 for the geographic graph.

        Raises:
            NotFound: There is none, or it was never finished.
            StaleArtefact: It is of other places than those of the run's layout.
        """
        return open_graph(self.folder, self.graph_name(epoch), self.layout)

    @staticmethod
    def evaluation_name(split: str, epoch: int, fov: float = WHOLE, tta: bool = False) -> str:
        """Return the path, within the run's folder, of an evaluation's files, without the file extension."""
        return f"evaluation-{named_by_look(split, fov, tta)}-epoch-{epoch:04d}"

    # who may write

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the run's lease while the context is open, so that only this process writes into the run.

        Raises:
            RunHeld: Another process holds it.
        """
        with Lease(self.folder) as self._holding:
            try:
                yield
            finally:
                self._holding = None

    def hold_by(self, lease: int) -> None:
        """Write into the run for the process that holds it, as long as it does.

        Args:
            lease: Number of the lease that process has.
        """
        self._holding = Holding(self.folder, lease)

    @property
    def lease(self) -> int:
        """Number of the lease by which the run is held; 0 outside :meth:`hold`."""
        return 0 if self._holding is None else self._holding.number

    def check_held(self) -> None:
        """Check that the run is still this process's; to be called before anything is written into it.

        Without a lease (outside :meth:`hold`) this does nothing.

        Raises:
            RunHeld: Another process has taken the run over.
        """
        if self._holding is not None:
            self._holding.check()

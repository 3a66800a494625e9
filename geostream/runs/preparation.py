"""Prepare an epoch: embed, mine, plan and recluster, as far as that is due and not done yet.

All of it follows from what the run has stored before: a checkpoint, embeddings, earlier plans. So it does not matter
which process prepares an epoch, or when. What is done is noted in ``prepared/epoch-0005.jsonl`` of the run, stage by
stage, so that a preparation that was cut off goes on where it stood. The trainer copies these records into the run's
log when it begins the epoch.
"""

from __future__ import annotations

import logging
import time

from geostream.errors import NotFound, StaleArtefact
from geostream.mining.false_negatives import LOST
from geostream.planning.plan import EpochPlan
from geostream.runs import stages
from geostream.runs.log import Record, RunLog
from geostream.runs.run import Run
from geostream.settings import TrainSettings
from geostream.training.checkpoint_files import checkpoint_name

MANY_EMPTY = 0.1  # share of the places without neighbours that is worth a warning

logger = logging.getLogger(__name__)


def prepared(run: Run, epoch: int) -> list[Record] | None:
    """Return the records of an epoch's preparation, or None if it is not finished."""
    log = run.preparation_log(epoch)
    return log.records if log.has("plan", epoch) else None


def prepare(run: Run, epoch: int, *, beside: bool = False) -> None:
    """Make the plan of an epoch, and first whatever it needs that is not there.

    Args:
        run: The run, on the layout that the epoch before reads.
        epoch: Number of the epoch, from 1.
        beside: Whether this happens beside the training, for the records.

    Raises:
        NotFound: A checkpoint, embeddings or a graph that should be there is gone.
        StoreError: The store fails.
        RunHeld: Another process has taken the run over.
    """
    log, settings = run.preparation_log(epoch), run.settings
    mining = stages.mining_for(epoch, settings)
    if stages.mining_due(mining, settings) and stages.first_planned_from(mining, settings) == epoch:
        _mine(run, mining, log, beside)
    run.check_held()
    started = time.perf_counter()
    plan = _stored_plan(run, epoch) or stages.plan_epoch(run, epoch)
    if stages.recluster_due(plan, settings) and plan.layout_id == run.layout.id:
        plan = _reclustered(run, plan, mining, log, beside)
    seconds = time.perf_counter() - started - sum(record["seconds"] for record in log.of("recluster"))
    run.check_held()
    log.append("plan", epoch, max(seconds, 0.0), source=plan.source, hash=plan.hash, **plan.quality, beside=beside)


def checkpoints_to_embed(run: Run) -> set[str]:
    """Return the names of the checkpoints that the training set is still to be embedded with."""
    settings = run.settings
    return {
        checkpoint_name(record["step"])
        for record in run.log.of("train")
        if stages.mining_due(record["epoch"], settings) and not _embedded(run, record["epoch"], settings)
    }


def _embedded(run: Run, epoch: int, settings: TrainSettings) -> bool:
    """Return whether the training set was embedded after ``epoch``, by the trainer or by the preparation it is for."""
    return run.log.has("embed", epoch) or run.preparation_log(stages.first_planned_from(epoch, settings)).has(
        "embed", epoch
    )


def _mine(run: Run, epoch: int, log: RunLog, beside: bool) -> None:
    """Embed the training set with the checkpoint of ``epoch`` unless the trainer has done it, and mine."""
    if not log.has("embed", epoch) and not run.log.has("embed", epoch):
        run.check_held()
        started = time.perf_counter()
        step = next(record["step"] for record in run.log.of("train") if record["epoch"] == epoch)
        embeddings = stages.embed_split(run, stages.load_trained(run, checkpoint_name(step)), "train")
        counts = {"queries": len(embeddings.pairs), "references": len(embeddings.reference_place)}
        log.append("embed", epoch, time.perf_counter() - started, **counts, beside=beside)
    if not log.has("mine", epoch):
        run.check_held()
        started = time.perf_counter()
        graph = stages.mine(run, epoch)
        facts = {"places": len(graph.places), "k": graph.k, "search": graph.search}
        facts |= {name: graph.search[name] for name in LOST if name in graph.search}  # in the log's line, too
        empty = int(graph.search.get("empty", 0))
        if empty > MANY_EMPTY * len(graph.places):
            logger.warning(
                "%s: positive_margin=%g left %d of %d places without neighbours, so their batches are random; this is "
                "early in the training, or the margin is too low",
                run.url,
                run.settings.plan.positive_margin,
                empty,
                len(graph.places),
            )
        log.append("mine", epoch, time.perf_counter() - started, **facts, beside=beside)


def _reclustered(run: Run, easy: EpochPlan, mining: int, log: RunLog, beside: bool) -> EpochPlan:
    """Rewrite the shards in the order of similarity, and return the epoch's plan for the new generation."""
    run.check_held()
    started, score = time.perf_counter(), easy.quality.get("reachable_score")
    layout = stages.recluster(run, mining)
    facts = {"layout": layout.name, "generation": layout.generation, "score_before": score}
    log.append("recluster", easy.epoch, time.perf_counter() - started, **facts, beside=beside)
    return easy if layout.id == run.layout.id else stages.plan_epoch(run.on(layout), easy.epoch)


def _stored_plan(run: Run, epoch: int) -> EpochPlan | None:
    """Return the stored plan of an epoch, of any generation, or None if there is none."""
    try:
        return run.plan(epoch, None)
    except (NotFound, StaleArtefact):
        return None

"""Show what a training would take: the part of ``geostream train`` behind ``--dry-run``."""

from __future__ import annotations

from contextlib import suppress

from geostream.cli.options import print_table
from geostream.errors import BadInput
from geostream.layout import Layout
from geostream.report.cost import HOUR, Coefficients
from geostream.runs.begin import check_coordinates, check_ranks, resolve
from geostream.runs.stages import mining_due
from geostream.settings import TrainSettings
from geostream.training.memory import GPUS, USABLE, Memory, measure

GIB = 2**30


def foresee(layout: Layout, settings: TrainSettings, ranks: int, rate: float | None) -> None:
    """Print steps, parameters, memory by part, the micro-batches that fit usual GPUs, and hours.

    Args:
        layout: The layout to train on.
        settings: The settings to train with.
        ranks: Number of processes that train together.
        rate: Pairs a second that all of them train; None: hours are left out.

    Raises:
        BadInput: The settings do not fit the model, the ranks, or the layout.
    """
    settings = resolve(settings, ranks)
    check_ranks(settings, ranks)
    check_coordinates(settings, layout)
    optim, pairs = settings.optim, len(layout.pairs("train"))
    of_step = optim.batch_size * optim.step_batches
    steps = pairs // of_step
    if not steps:
        raise BadInput(f"layout {layout.name}: {pairs} training pairs do not fill a step of {of_step}; set batch_size")
    found = measure(settings, ranks)
    print(f"{layout.dataset}, layout {layout.name}: {pairs:,} training pairs, {ranks} processes; nothing was trained")
    print(f"steps: up to {steps:,} an epoch, {steps * optim.epochs:,} in {optim.epochs} epochs, {of_step} pairs each")
    print(f"parameters: {found.parameters:,}, of which {found.trainable:,} are trained")
    _print_memory(found)
    _print_fitting(found, settings, ranks)
    if rate is None:
        print("hours: add --rate PAIRS_A_SECOND, which geostream train shows")
        return
    train = optim.epochs * steps * of_step / rate / HOUR
    minings = sum(mining_due(epoch, settings) for epoch in range(1, optim.epochs + 1))
    evaluations = -(-optim.epochs // settings.evaluate_every)
    embedded = minings * pairs + evaluations * len(layout.pairs("test"))
    embed = embedded * Coefficients.embed_share / rate / HOUR
    print(
        f"hours at {rate:g} pairs a second: {train + embed:.3g}: {train:.3g} to train, {embed:.3g} to embed for "
        f"{minings} minings and {evaluations} evaluations"
    )


def _print_memory(found: Memory) -> None:
    parts = {
        "weights": found.weights,
        "gradients": found.gradients,
        "moments of AdamW": found.moments,
        "EMA": found.ema,
        f"activations of {found.pairs} pairs": found.activations(found.pairs),
        "or embedding a batch of views": found.embedding,
        "at the most": found.total(found.pairs),
    }
    print_table("memory of one GPU", [{"part": name, "GiB": f"{size / GIB:,.2f}"} for name, size in parts.items()])


def _print_fitting(found: Memory, settings: TrainSettings, ranks: int) -> None:
    """Print the largest micro-batches, by the settings and with gradient checkpointing where the model has it."""
    ways = {"micro_batch": found}
    if not settings.model.gradient_checkpointing:
        with suppress(BadInput):
            ways["with gradient_checkpointing"] = measure(settings.changed(gradient_checkpointing=True), ranks)
    whole = settings.optim.batch_size * settings.optim.step_batches // ranks
    rows = [
        {"GPU": f"{gpu} GB"} | {way: _said(one.most_pairs(USABLE * gpu * GIB), whole) for way, one in ways.items()}
        for gpu in GPUS
    ]
    print_table(f"largest micro_batch in {USABLE:.0%} of a GPU's memory", rows)


def _said(pairs: int, whole: int) -> str:
    return f"none is needed ({pairs} pairs fit)" if pairs >= whole else str(pairs) if pairs else "does not fit"

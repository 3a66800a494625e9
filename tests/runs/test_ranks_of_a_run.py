"""Two ranks train as one does, go on as another number of them, and end together."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch

from geostream.errors import BadInput
from geostream.layout import open_layout
from geostream.mining.embeddings import open_embeddings, read_rows
from geostream.runs.begin import begin, resolve
from geostream.runs.log import RunLog
from geostream.runs.loop import train
from geostream.runs.run import LOG, Run, run_folder
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints, read_position
from tests.helpers import tiny_layout
from tests.training.ranks import RUN_PROGRAM, TOLD, TORCHRUN, ended, environment, start_ranks, torchrun, wait_for
from tests.training.settings import TINY

SETTINGS = TINY.changed(
    epochs=3,
    batch_size=4,
    checkpoint_every=2,
    step_batches=2,
    ema_decay=0.5,
    model_options={"drop_path_rate": 0.3},
    recluster_below=100.0,
    hardness=100.0,
)
PIPE: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
STEPS = 6  # of an epoch: 48 pairs, 4 in a batch, 2 batches in a step


def store_in(folder: Path) -> Store:
    store = Store.open(folder)
    tiny_layout(store, places=24, test_places=8, views=2, view_size=(32, 64))
    return store


def run_of(store: Store) -> Store:
    return run_folder(store, "tiny", "one")


def program(store: Store, settings: TrainSettings, hold: int = 1000, go: Path = Path("never")) -> list[str]:
    return [RUN_PROGRAM, store.url, settings.model_dump_json(), str(hold), str(go)]


def assert_same_run(store: Store, other: Store, embedded: tuple[str, ...]) -> None:
    """The same checkpoints, weights and optimizer up to rounding, the same plans, losses, embeddings and recalls."""
    run, expected = run_of(store), run_of(other)
    assert list_checkpoints(run) == list_checkpoints(expected)
    newest = list_checkpoints(run)[-1]
    for path in ("model.safetensors", "optimizer.safetensors"):
        found, wanted = (safetensors.torch.load(one.read(f"checkpoints/{newest}/{path}")) for one in (run, expected))
        assert found.keys() == wanted.keys()
        for name in found:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=2e-5, err_msg=name)
    for name in embedded:
        one, two = (open_embeddings(folder, name, None) for folder in (run, expected))
        for kind in ("query", "reference"):
            np.testing.assert_allclose(read_rows(getattr(one, kind)), read_rows(getattr(two, kind)), atol=1e-4)
    for stage, facts in (("train", ("epoch", "step", "loss", "pairs")), ("evaluate", ("epoch", "r1", "r5"))):
        told, wanted_rows = (RunLog(one, LOG).of(stage) for one in (run, expected))
        for row, wanted_row in zip(told, wanted_rows, strict=True):
            assert [row[fact] for fact in facts] == pytest.approx([wanted_row[fact] for fact in facts], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    """Without torchrun and without mining, because it is the quick test of all this."""
    settings = SETTINGS.changed(epochs=1, strategy="random")
    two, one = (store_in(tmp_path / name) for name in ("two", "one"))
    codes, output = ended(start_ranks(program(two, settings)))
    assert codes == [0, 0], output
    result = train(one, open_layout(one), "one", settings)
    assert_same_run(two, one, ("embeddings/test-epoch-0001.zarr",))
    [row] = [row for row in map(json.loads, run_of(two).read("metrics.jsonl").splitlines()) if row["stage"] == "train"]
    assert row["stream"]["bytes_used"] == result.stream["bytes_used"]  # of both ranks, which share no shard


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of a run that one process trained without a break."""
    store = store_in(tmp_path_factory.mktemp("alone"))
    train(store, open_layout(store), "one", SETTINGS)
    return store


EMBEDDED = ("embeddings/epoch-0001.zarr", "embeddings/test-epoch-0002.zarr", "embeddings/test-epoch-0003.zarr")


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path, alone: Store) -> None:
    """From the first plan over mining and reclustering to the report; and nothing is left to do then.

    Without the ``--`` torchrun takes ``--run`` for the beginning of an option of its own.
    """
    store = store_in(tmp_path)
    plain = TrainSettings().flat()
    changed = {name: value for name, value in SETTINGS.flat().items() if value != plain[name]}
    changed["step_batches"] = 0  # as many as there are ranks
    overrides = [word for name, value in changed.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    command = ["-m", "--", "geostream", "train", store.url, "--run", "one", *overrides]
    done = torchrun(*command)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("recall on the test gallery") == 1 and done.stdout.count("trained; report: ") == 1
    assert_same_run(store, alone, EMBEDDED)
    assert ((found := Run.open(store, open_layout(store), "one").settings).optim.step_batches, found.plan.lanes) == (
        2,
        2,
    )
    assert run_of(store).exists("report.html")
    script = str(Path(sys.executable).with_name("geostream"))
    again = torchrun("--", script, *command[3:])
    assert again.returncode == 0 and again.stdout.count("was finished before") == 1, again.stdout


def stopped_behind(launch: list[str], store: Store, folder: Path, step: int, taken: int) -> int:
    """Start the run, which holds after ``taken`` steps, behind the checkpoint at ``step``; stop it; the step then."""
    run, go = run_of(store), folder / f"go-{step}"
    process = subprocess.Popen([*launch, *program(store, SETTINGS, taken, go)], env=environment(), **PIPE)
    try:
        wait_for(lambda: run.exists(f"checkpoints/step-{step:08d}/state.json"), process)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)  # torchrun passes it on
        go.touch()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (1 if launch is TORCHRUN else 143), output
    position = read_position(run, list_checkpoints(run)[-1])
    where = f"(saved: epoch {position.epoch}, batch {position.cursor})"
    [line] = [line for line in output.splitlines() if "stopped by SIGTERM" in line]
    assert line.endswith(where), output
    assert position.step > step and not position.finished and position.cursor == 2 * (position.step % STEPS)
    return position.step


@pytest.mark.slow
def test_two_go_on_as_one_and_one_as_two(tmp_path: Path, alone: Store) -> None:
    """Stopped by SIGTERM in the first epoch with two ranks, in the second with one, and finished with two."""
    store = store_in(tmp_path / "store")
    step = stopped_behind(TORCHRUN, store, tmp_path, 2, 2)
    stopped_behind([sys.executable], store, tmp_path, STEPS + 2, STEPS + 2 - step)
    done = torchrun(*program(store, SETTINGS))
    assert done.returncode == 0, done.stdout
    assert_same_run(store, alone, EMBEDDED)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(tmp_path: Path, alone: Store, rank: int) -> None:
    store = store_in(tmp_path / "store")
    command = [*TORCHRUN, *program(store, SETTINGS, 3, tmp_path / "never")]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as agent:
        wait_for(lambda: run_of(store).exists("checkpoints/step-00000002/state.json"), agent)
        ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(agent.pid).children()}
        ranks[rank].kill()
        (tmp_path / "never").touch()
        output, _ = agent.communicate(timeout=100)
    assert agent.returncode == 1 and not any(child.is_running() for child in ranks.values()), output
    assert read_position(run_of(store), list_checkpoints(run_of(store))[-1]).step <= 4
    done = torchrun(*program(store, SETTINGS))
    assert done.returncode == 0, done.stdout
    assert_same_run(store, alone, EMBEDDED)


@pytest.mark.slow
def test_what_one_rank_cannot_read_ends_all_with_one_line(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    layout = open_layout(store)
    shard = layout.shard_names[int(layout.shard_of_place[layout.pairs("train").place[-1]])]  # of the other rank's lane
    layout.store.write(shard, bytes(layout.store.size(shard)))
    done = torchrun(*program(store, SETTINGS.changed(strategy="random")))
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if TOLD in line]
    assert shard in line, done.stdout
    assert "Traceback" not in done.stdout.split("torch/distributed/elastic")[0]


@pytest.mark.slow
def test_what_the_first_rank_refuses_is_told_once(tmp_path: Path) -> None:
    done = torchrun("-m", "geostream", "train", str(tmp_path / "nothing"))
    assert done.returncode == 1 and done.stdout.count(TOLD) == 1 and "no such folder" in done.stdout
    store = store_in(tmp_path)
    done = torchrun(*program(store, SETTINGS.changed(step_batches=3)))
    assert done.returncode == 1 and done.stdout.count("2 ranks cannot share the 3 batches of a step") == 1, done.stdout
    assert not run_of(store).exists("settings.json")


def new_run(folder: Path) -> Run:
    store = Store.open(folder)
    layout = open_layout(store) if store.folders() else tiny_layout(store)
    return Run(store, layout, "one")


@pytest.mark.parametrize(
    ("lanes", "step_batches", "workers", "ranks", "made"),
    [
        (1, 0, 0, 1, (1, 1)),
        (1, 0, 0, 4, (4, 4)),
        (1, 0, 3, 4, (4, 12)),
        (6, 0, 0, 4, (4, 12)),
        (8, 4, 2, 2, (4, 8)),
        (3, 2, 0, 1, (2, 6)),
    ],
)
def test_steps_and_lanes_are_made_whole(
    tmp_path: Path, lanes: int, step_batches: int, workers: int, ranks: int, made: tuple[int, int]
) -> None:
    asked = TINY.changed(lanes=lanes, step_batches=step_batches, workers=workers)
    run = new_run(tmp_path)
    found = begin(run, asked, ranks)
    assert (found.optim.step_batches, found.plan.lanes) == made and found == resolve(asked, ranks) == new_run(
        tmp_path
    ).settings
    # What was asked for, and what was made of it, both go on, on every number of ranks that divides a step.
    for other in (one for one in range(1, made[0] + 1) if made[0] % one == 0):
        for words in (asked, found):
            again = begin(run, words.changed(workers=0, keep_checkpoints=9), other)
            assert (again.optim.step_batches, again.plan.lanes, again.keep_checkpoints) == (*made, 9)
    assert new_run(tmp_path).settings == found


def test_ranks_that_do_not_fit_are_told_which_would(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    asked = TINY.changed(step_batches=4, lanes=4)
    with pytest.raises(BadInput, match="3 ranks .*4 batches .* 1, 2 or 4 "):
        begin(run, asked, 3)
    assert not run.exists
    begin(run, asked, 2)
    with pytest.raises(BadInput, match="8 ranks .*4 batches"):
        begin(run, asked, 8)
    with pytest.raises(BadInput, match="2 ranks .*3 loader workers .*4 lanes .* workers=1 or 2"):
        begin(run, asked.changed(workers=3), 2)
    for name, value in (("step_batches", 2), ("lanes", 3)):
        with pytest.raises(BadInput, match=rf"\({name} 4 → {value}\)"):
            begin(run, asked.changed(**{name: value}), 2)


def test_a_run_may_get_more_epochs_where_that_changes_nothing_before(tmp_path: Path) -> None:
    steady = TINY.changed(schedule="constant", warmup_epochs=1, epochs=4, first_mining=2, mine_every=2, mining_lag=1)
    begin(new_run(tmp_path), steady, 1)
    assert begin(new_run(tmp_path), steady.changed(epochs=6), 1).optim.epochs == 6
    assert new_run(tmp_path).settings.optim.epochs == 6
    with pytest.raises(BadInput, match=r"epochs 6 → 4"):
        begin(new_run(tmp_path), steady, 1)
    with pytest.raises(BadInput, match=r"epochs 6 → 8.*seed"):
        begin(new_run(tmp_path), steady.changed(epochs=8, seed=7), 1)
    # Nothing was to be planned from a mining after epoch 6, so the last one was after epoch 4.
    begin(new_run(tmp_path), steady.changed(epochs=7), 1)
    with pytest.raises(BadInput, match=r"epochs 7 → 9.*graph of epoch 6"):
        begin(new_run(tmp_path), steady.changed(epochs=9), 1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one-cycle"])
def test_a_run_whose_learning_rate_has_fallen_gets_no_more_epochs(tmp_path: Path, schedule: str) -> None:
    asked = TINY.changed(schedule=schedule, epochs=4)
    begin(new_run(tmp_path), asked, 1)
    with pytest.raises(BadInput, match=rf"epochs 4 → 8.*{schedule}.*weights"):
        begin(new_run(tmp_path), asked.changed(epochs=8), 1)
    assert new_run(tmp_path).settings.optim.epochs == 4

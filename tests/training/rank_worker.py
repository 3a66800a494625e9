"""The ranks of tests/training/test_step_ranks.py: ``python -m tests.training.rank_worker FOLDER`` with torchrun's
variables but RANK trains every case on each rank, and writes its losses and weights.

One process imports torch and forks the ranks: imports would take longer than all that is tested.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from geostream.training.distributed import ProcessGroup
from tests.training.steps import do_steps, new_train_step, plain_settings

STEPS = 3
DROPPING = {"ls_init_value": 1.0, "drop_path_rate": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "all": {"negatives": "all"},
    "own": {"negatives": "own"},
    "all-in-chunks": {"negatives": "all", "micro_batch": 4},
    "own-in-chunks-of-four-batches": {
        "negatives": "own",
        "micro_batch": 4,
        "step_batches": 4,
        "model_options": DROPPING,
    },
    "all-of-the-loss": {"negatives": "all", "decoupled": True, "negative_radius": 40.0, "soft_targets": 50.0},
    "near-ones-in-chunks": {"negatives": "all", "negative_radius": 40.0, "micro_batch": 4},
    "soft-own-of-four-batches": {"negatives": "own", "soft_targets": 50.0, "micro_batch": 4, "step_batches": 4},
    "all-of-four-batches": {"negatives": "all", "step_batches": 4, "ema_decay": 0.5, "gradient_checkpointing": True},
    "frozen-and-by-layer": {"micro_batch": 4, "frozen_stages": 2, "layer_decay": 0.7, "ema_decay": 0.5},
    "seen-from-above-in-chunks": {"birds_eye": 20.0, "vertical_degrees": 180, "micro_batch": 4, "ema_decay": 0.5},
}


def train_case(
    changes: dict[str, Any], group: ProcessGroup | None = None, steps: int = STEPS
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps and the weights after them; a small rate and a large epsilon keep rounding from growing."""
    train_step = new_train_step(plain_settings(**({"step_batches": 2} | changes)), group)
    for parameters in train_step.optimizer.param_groups:
        parameters["eps"] = 1e-2  # with AdamW's own, the sign of a gradient near 0 decides its first steps
    losses = do_steps(train_step, range(steps))
    return losses, {name: tensor.clone() for name, tensor in train_step.ema_encoder.state_dict().items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with ProcessGroup.current() as group:
        for name, changes in CASES.items():
            losses, weights = train_case(changes, group)
            (folder / f"{name}-{group.rank}.json").write_text(json.dumps(losses))
            save_file(weights, folder / f"{name}-{group.rank}.safetensors")


def fork_ranks(folder: Path) -> bool:
    """Run :func:`main` on every rank; whether all went well."""
    ranks = []
    for rank in range(int(os.environ["WORLD_SIZE"])):
        if pid := os.fork():
            ranks.append(pid)
            continue
        os.environ["RANK"] = str(rank)
        code = 1
        try:
            main(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return [os.waitpid(pid, 0)[1] for pid in ranks] == [0] * len(ranks)


if __name__ == "__main__":
    sys.exit(0 if fork_ranks(Path(sys.argv[1])) else 1)

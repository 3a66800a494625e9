"""The memory that a step takes, as it was computed beforehand, and as torch's allocator has it in a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from geostream.errors import BadInput
from geostream.settings import TrainSettings
from geostream.training import memory
from geostream.training.memory import measure
from geostream.training.model import Encoder
from geostream.training.step import TrainStep
from tests.training.steps import new_train_step, plain_settings


def small(**changes: Any) -> TrainSettings:
    """Settings for images that are large enough for activations to outweigh all else."""
    return plain_settings(
        **{"tile_size": 64, "view_height": 64, "view_width": 128, "batch_size": 16, "micro_batch": 8, "step_batches": 1}
        | {"model_options": {}}
        | changes
    )


def take_step(train_step: TrainStep, settings: TrainSettings) -> None:
    sizes = {
        "view": (settings.model.view_height, settings.model.view_width),
        "tile": (settings.model.tile_size, settings.model.tile_size),
    }
    number = settings.optim.batch_size
    images = {name: torch.zeros(number, 3, *size, dtype=torch.uint8) for name, size in sizes.items()}
    train_step.step([images | {"pair": torch.arange(number)}], 1e-3)


def most_allocated(settings: TrainSettings) -> int:
    """The most bytes that torch's allocator has given out at a time, from the first weight to the second step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train_step = new_train_step(settings)
        for _ in range(2):  # in the second, gradients and moments are there
            take_step(train_step, settings)
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "test_convnext", "gradient_checkpointing": True, "ema_decay": 0.9},
        {"model": "test_efficientnet", "frozen_stages": 2},
        pytest.param({"model": "test_convnext"}, marks=pytest.mark.slow),
        pytest.param({"model": "test_convnext", "micro_batch": None}, marks=pytest.mark.slow),
        pytest.param({"model": "test_convnext", "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"model": "test_vit"}, marks=pytest.mark.slow),
        pytest.param({"model": "test_vit", "gradient_checkpointing": True, "frozen_stages": 3}, marks=pytest.mark.slow),
        pytest.param({"model": "test_vit3", "precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_real_step_takes_what_was_computed(changes: dict[str, Any]) -> None:
    """Some lies within operations, which the computation does not see: copies that convolutions on a CPU make."""
    settings = small(**changes)
    computed, real = measure(settings, on_gpu=False), most_allocated(settings)
    copies = 0.25 if changes == {"model": "test_convnext", "precision": "bf16"} else 0.13
    assert computed.activations(computed.pairs) == pytest.approx(real - computed.kept, rel=copies)


def test_what_is_computed_for_some_pairs_holds_for_others() -> None:
    few, more = (measure(small(batch_size=32, micro_batch=size)) for size in (2, 16))
    assert (few.pairs, more.pairs) == (2, 16)
    assert few.activations(16) == pytest.approx(more.activations(16), rel=0.02)
    limit = more.total(11) + 1
    assert more.most_pairs(limit) == 11 and more.total(12) > limit
    assert more.most_pairs(more.kept) == 0


def test_what_each_setting_saves() -> None:
    plain = measure(small())
    assert plain.trainable == plain.parameters and plain.moments == 8 * plain.parameters and not plain.ema
    assert measure(small(ema_decay=0.9)).ema == 4 * plain.parameters
    assert measure(small(step_batches=2), ranks=2).gradients == 2 * plain.gradients
    assert measure(small(gradient_checkpointing=True)).per_pair < 0.6 * plain.per_pair
    frozen = measure(small(frozen_stages=2))
    assert frozen.per_pair < 0.7 * plain.per_pair and frozen.weights == plain.weights
    assert frozen.moments == 8 * frozen.trainable < plain.moments
    assert measure(small(precision="float32")).per_pair > 1.3 * plain.per_pair
    assert measure(small(micro_batch=None, step_batches=2)).pairs == 32


@pytest.mark.parametrize("model", ["test_convnext", "test_efficientnet"])
def test_a_cpu_keeps_for_the_backward_pass_what_a_gpu_would(model: str) -> None:
    """By torch's own rules for a GPU, which fake tensors follow; without attention, which a GPU computes otherwise."""
    kept = {}
    for device in ("cpu", "cuda"):
        settings = small(model=model)
        with torch.device("meta"):
            encoder = Encoder.of(settings)
        if device == "cpu":
            memory._precision(encoder, settings, on_gpu=True)
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            return tensor

        with FakeTensorMode(allow_non_fake_inputs=True):
            encoder.to_empty(device=torch.device(device))
            own = {id(one.untyped_storage()) for one in [*encoder.parameters(), *encoder.buffers()]}
            views, tiles = (torch.zeros(2, 3, 64, width, device=device) for width in (128, 64))
            # torch.autocast switches itself off where there is no GPU.
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            try:
                with saved_tensors_hooks(note, lambda tensor: tensor):
                    vectors = encoder(views, tiles)
            finally:
                torch.set_autocast_enabled(device, False)
                torch.clear_autocast_cache()
        kept[device] = sum(size for number, size in sizes.items() if number not in own)
        assert len(vectors) == 2
    assert kept["cpu"] == pytest.approx(kept["cuda"], rel=0.01)


def test_images_that_do_not_fit_the_network_are_refused() -> None:
    with pytest.raises(BadInput, match="16×64"):
        measure(small(tile_size=32, view_height=16, view_width=64))
    with pytest.raises(BadInput, match="'convnext_bass'"):
        measure(plain_settings(model="convnext_bass", step_batches=1, model_options={}))

"""One step, in all the ways to carry it out: they mean the same, and a stored one goes on as if never stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from geostream.errors import BadInput, StaleArtefact
from geostream.training.distributed import ProcessGroup
from geostream.training.step import TrainStep
from tests.training.steps import do_steps, new_train_step, noise_batch, plain_settings

BY_DISTANCE = {"negative_radius": 40.0, "soft_targets": 50.0}
DROPPING = {"ls_init_value": 1.0, "drop_path_rate": 0.5}


def gradients(**changes: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first step."""
    train_step = new_train_step(plain_settings(**changes))
    loss = do_steps(train_step, range(1))[0]
    return loss, {name: p.grad for name, p in train_step.encoder.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-3) -> None:
    """Equal up to rounding, of each tensor's largest value."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=rtol * float(other[name].abs().max()))


@pytest.mark.parametrize("negatives", ["own", "all"])
@pytest.mark.parametrize("micro_batch", [4, 6])
def test_chunks_leave_the_loss_as_it_is(negatives: str, micro_batch: int) -> None:
    wanted_loss, wanted = gradients(negatives=negatives, step_batches=2)
    loss, made = gradients(negatives=negatives, step_batches=2, micro_batch=micro_batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert "logit_scale" in made and len(made) > 50
    assert_same(made, wanted)


@pytest.mark.parametrize(
    "loss", [{"decoupled": True}, {"negative_radius": 40.0}, {"soft_targets": 50.0}, {"decoupled": True, **BY_DISTANCE}]
)
@pytest.mark.parametrize("negatives", ["own", "all"])
def test_chunks_leave_every_loss_as_it_is(negatives: str, loss: dict[str, Any]) -> None:
    wanted_loss, wanted = gradients(negatives=negatives, step_batches=2, **loss)
    made_loss, made = gradients(negatives=negatives, step_batches=2, micro_batch=4, **loss)
    assert made_loss == pytest.approx(wanted_loss, rel=1e-5)
    assert made_loss != pytest.approx(gradients(negatives=negatives, step_batches=2)[0], rel=3e-5)
    assert ("logit_scale" in made) is ("decoupled" not in loss)
    assert_same(made, wanted)


def test_decoupled_the_temperature_stays_and_a_checkpoint_goes_on() -> None:
    settings = plain_settings(decoupled=True, weight_decay=0.5)
    whole = new_train_step(settings)
    before = whole.encoder.logit_scale.detach().clone()
    losses = do_steps(whole, range(4))
    assert torch.equal(whole.encoder.logit_scale, before) and losses[3] < losses[0]
    part = new_train_step(settings)
    do_steps(part, range(2))
    later = new_train_step(settings)
    later.encoder.load_state_dict(part.encoder.state_dict())
    later.load_tensors(load(save(part.tensors())))
    assert do_steps(later, range(2, 4)) == losses[2:]


def test_own_negatives_are_another_loss_than_all() -> None:
    own, shared = (gradients(negatives=negatives, step_batches=2)[0] for negatives in ("own", "all"))
    alone, _ = gradients(negatives="all", step_batches=1)
    assert shared > own + 0.3, "twice the negatives cost about log 2 more"
    assert own != alone


def test_both_passes_drop_the_same_paths() -> None:
    dropping = {"model_options": DROPPING, "step_batches": 2}
    wanted_loss, wanted = gradients(**dropping)
    loss, made = gradients(**dropping, micro_batch=6)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_same(made, wanted)
    other, _ = gradients(**dropping | {"model_options": DROPPING | {"drop_path_rate": 0.0}})
    assert other != pytest.approx(wanted_loss, rel=1e-3), "nothing was dropped"


def test_both_passes_see_the_same_views_from_above() -> None:
    wanted_loss, wanted = gradients(birds_eye=20.0, step_batches=2)
    loss, made = gradients(birds_eye=20.0, step_batches=2, micro_batch=6)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_same(made, wanted)
    assert gradients(birds_eye=5.0, step_batches=2)[0] != pytest.approx(wanted_loss, rel=1e-3)


def test_dropped_paths_are_the_steps_own() -> None:
    train_step = new_train_step(plain_settings(model_options=DROPPING))
    torch.manual_seed(5)
    losses = [float(train_step.step([noise_batch(0, 0)], 0.0)) for _ in range(2)]
    assert losses[0] != losses[1], "the same paths were dropped in both steps"
    again = new_train_step(plain_settings(model_options=DROPPING))
    torch.manual_seed(6)
    assert [float(again.step([noise_batch(0, 0)], 0.0)) for _ in range(2)] == losses


def test_two_passes_count_batch_norms_statistics_once() -> None:
    options: dict[str, Any] = {"model": "test_efficientnet", "model_options": {}, "step_batches": 2}
    one, two = (new_train_step(plain_settings(**options, micro_batch=size)) for size in (None, 6))
    for train_step in (one, two):
        do_steps(train_step, range(1))
    buffers = dict(two.encoder.named_buffers())
    for name, wanted in one.encoder.named_buffers():
        torch.testing.assert_close(buffers[name], wanted, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_and_channels_last_change_nothing() -> None:
    loss, wanted = gradients()
    for changes in ({"gradient_checkpointing": True}, {"channels_last": True}):
        other, made = gradients(**changes)
        assert other == pytest.approx(loss, rel=1e-5)
        assert_same(made, wanted)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near(precision: str) -> None:
    loss, wanted = gradients()
    other, made = gradients(precision=precision)
    assert other != loss and other == pytest.approx(loss, rel=0.02)
    for name in wanted:
        assert torch.cosine_similarity(made[name].flatten(), wanted[name].flatten(), 0) > 0.9, name


def test_an_overflow_of_fp16_skips_the_step_and_lowers_the_scale() -> None:
    train_step = new_train_step(plain_settings(precision="fp16"))
    train_step.load_tensors(train_step.tensors() | {"scaler/scale": torch.tensor(2.0**40, dtype=torch.float64)})
    before = {name: tensor.clone() for name, tensor in train_step.encoder.state_dict().items()}
    do_steps(train_step, range(1))
    assert train_step.gradient_scale() == [2.0**39]
    assert all(torch.equal(tensor, before[name]) for name, tensor in train_step.encoder.state_dict().items())
    train_step.load_tensors(train_step.tensors() | {"scaler/scale": torch.tensor(2.0**10, dtype=torch.float64)})
    do_steps(train_step, range(1))
    assert not torch.equal(train_step.encoder.logit_scale, before["logit_scale"])


def test_the_ema_of_the_weights() -> None:
    train_step = new_train_step(plain_settings(ema_decay=0.15))  # above the warm-up's 2/11, but not its 3/12
    wanted = {name: tensor.clone() for name, tensor in train_step.encoder.state_dict().items()}
    for step in range(2):
        do_steps(train_step, range(step, step + 1))
        decay = min(0.15, (2 + step) / (11 + step))
        for name, tensor in train_step.encoder.state_dict().items():
            wanted[name] = decay * wanted[name] + (1 - decay) * tensor
    for name, tensor in train_step.ema_encoder.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(train_step.encoder.logit_scale, train_step.ema_encoder.logit_scale)


def test_without_an_ema_the_weights_to_use_are_the_trained_ones() -> None:
    train_step = new_train_step(plain_settings())
    assert train_step.ema_encoder is train_step.encoder
    assert not any(name.startswith(("ema/", "scaler/")) for name in train_step.tensors())


def test_a_stored_learner_goes_on_as_if_never_stopped() -> None:
    settings = plain_settings(precision="fp16", ema_decay=0.9, decay_all=False, model_options=DROPPING)
    whole = new_train_step(settings)
    losses = do_steps(whole, range(4))
    part = new_train_step(settings)
    do_steps(part, range(2))
    stored = save({name: tensor.clone() for name, tensor in part.tensors().items()})
    weights = part.encoder.state_dict()
    later = new_train_step(settings.changed(seed=settings.seed))
    later.encoder.load_state_dict(weights)
    later.load_tensors(load(stored))
    assert later.steps == 2
    assert do_steps(later, range(2, 4)) == losses[2:]
    for one, other in ((later.encoder.state_dict(), whole.encoder.state_dict()), (later.tensors(), whole.tensors())):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_models_state_is_refused() -> None:
    stored = new_train_step(plain_settings())
    do_steps(stored, range(1))
    other = new_train_step(plain_settings(model="test_vit", model_options={}))
    with pytest.raises(StaleArtefact, match="not of test_vit "):
        other.load_tensors(stored.tensors())
    with pytest.raises(StaleArtefact, match="not of test_convnext "):
        new_train_step(plain_settings(ema_decay=0.9)).load_tensors(stored.tensors())


def test_ranks_that_cannot_share_a_step() -> None:
    with pytest.raises(BadInput, match="step_batches=3: 2 ranks"):
        TrainStep(new_train_step(plain_settings()).encoder, plain_settings(step_batches=3), ProcessGroup(0, 2))


@pytest.mark.slow
@pytest.mark.timeout(900)  # needs a C++ compiler, and minutes where cores are few
def test_a_compiled_network_learns_the_same() -> None:
    small = {"model_options": {"ls_init_value": 1.0, "depths": (1, 1, 1, 1)}}
    losses = do_steps(new_train_step(plain_settings(**small)), range(2))
    compiled = new_train_step(plain_settings(**small, compile=True))
    assert do_steps(compiled, range(2)) == pytest.approx(losses, rel=1e-3)
    assert not any("_orig_mod" in name for name in compiled.encoder.state_dict())

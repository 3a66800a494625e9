"""Rates by layer and frozen stages: timm's groups, what they change in a step, and that all else stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from geostream.errors import BadInput
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.checkpoint import restore, save_checkpoint
from geostream.training.checkpoint_files import Position
from geostream.training.export import export_encoder
from geostream.training.freezing import freeze_stages
from geostream.training.model import Encoder
from geostream.training.optimizer import make_optimizer
from tests.training.steps import do_steps, new_train_step, plain_settings

NORMS: dict[str, Any] = {"model": "test_efficientnet", "model_options": {"drop_path_rate": 0.4}}


def weights(encoder: Encoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def rates(encoder: Encoder, settings: TrainSettings) -> dict[str, float]:
    """The scale of the learning rate of each parameter."""
    groups = make_optimizer(encoder, settings).param_groups
    scales = {id(one): group.get("lr_scale", 1.0) for group in groups for one in group["params"]}
    assert len(scales) == sum(len(group["params"]) for group in groups), "a parameter is in two groups"
    return {name: scales[id(one)] for name, one in encoder.named_parameters() if one.requires_grad}


def decays(encoder: Encoder, settings: TrainSettings) -> dict[str, float]:
    groups = make_optimizer(encoder, settings).param_groups
    of = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    return {name: of[id(one)] for name, one in encoder.named_parameters() if one.requires_grad}


@pytest.mark.parametrize(("model", "layers"), [("test_vit", 6), ("test_convnext", 10)])
def test_each_layer_learns_at_its_share_of_the_rate(model: str, layers: int) -> None:
    settings = plain_settings(model=model, model_options={}, layer_decay=0.5)
    encoder = Encoder.of(settings)
    found = rates(encoder, settings)
    assert set(found) == {name for name, _ in encoder.named_parameters()}
    assert found["logit_scale"] == 1.0, "the temperature is scaled"
    stem = "network.patch_embed.proj.weight" if model == "test_vit" else "network.stem.0.weight"
    assert found[stem] == 0.5**layers and max(found.values()) == 1.0
    assert set(found.values()) == {0.5**above for above in range(layers + 1)}
    assert set(rates(encoder, settings.changed(layer_decay=1.0)).values()) == {1.0}


@pytest.mark.parametrize("decay_all", [True, False])
def test_what_decays_does_not_depend_on_the_layers_rates(decay_all: bool) -> None:
    for changes in ({"model": "test_vit", "model_options": {}}, {}):
        settings = plain_settings(**changes, decay_all=decay_all, weight_decay=0.3)
        encoder = Encoder.of(settings)
        wanted = decays(encoder, settings)
        assert decays(encoder, settings.changed(layer_decay=0.9)) == wanted
        assert set(wanted.values()) == ({0.3} if decay_all else {0.0, 0.3})
        frozen = settings.changed(frozen_stages=2, layer_decay=0.9)
        some = decays(Encoder.of(frozen), frozen)
        assert some == {name: wanted[name] for name in some} and 1 < len(some) < len(wanted)


def test_a_step_moves_each_layer_at_its_rate() -> None:
    """AdamW's first step moves a weight by its rate, whatever its gradient is."""
    settings = plain_settings(layer_decay=0.5, weight_decay=0.0, decay_all=False)
    train_step = new_train_step(settings)
    before, scales = weights(train_step.encoder), rates(train_step.encoder, settings)
    do_steps(train_step, range(1), rate=0.1)
    for name, tensor in train_step.encoder.named_parameters():
        moved = float((tensor.detach() - before[name]).abs().max())
        assert moved == pytest.approx(0.1 * scales[name], rel=0.05), name


@pytest.mark.parametrize(
    ("model", "count", "frozen", "free"),
    [
        ("test_convnext", 2, ("stem.", "stages.0."), ("stages.1.", "stages.2.", "stages.3.", "head.")),
        ("test_vit", 3, ("cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1."), ("blocks.2.", "norm.")),
        ("resnet18", 2, ("conv1.", "bn1.", "layer1."), ("layer2.", "layer4.")),
    ],
)
def test_stages_are_counted_from_the_images(
    model: str, count: int, frozen: tuple[str, ...], free: tuple[str, ...]
) -> None:
    network = timm.create_model(model, num_classes=0)
    modules = freeze_stages(network, count, model)
    assert modules
    still = {name for name, one in network.named_parameters() if not one.requires_grad}
    assert all(any(name.startswith(prefix) for name in still) for prefix in frozen)
    assert all(name.startswith(frozen) for name in still)
    assert not any(name.startswith(free) for name in still)


def test_too_many_stages_and_networks_without_any_are_refused() -> None:
    network = timm.create_model("test_convnext", num_classes=0)
    with pytest.raises(BadInput, match="frozen_stages=6: model test_convnext .*at most 5"):
        freeze_stages(network, 6, "test_convnext")
    assert all(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(BadInput, match="nameless"):
        freeze_stages(torch.nn.Linear(2, 2), 1, "nameless")


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 4}, {"gradient_checkpointing": True}, {"ema_decay": 0.5}])
def test_frozen_stages_keep_every_bit_and_the_others_learn(changes: dict[str, Any]) -> None:
    train_step = new_train_step(plain_settings(**NORMS, frozen_stages=3, **changes))
    before = weights(train_step.encoder)
    do_steps(train_step, range(2))
    kept = ("network.conv_stem.", "network.bn1.", "network.blocks.0.", "network.blocks.1.")
    for encoder in (train_step.encoder, train_step.ema_encoder):
        for name, tensor in encoder.state_dict().items():
            if name.startswith(kept):
                assert torch.equal(tensor, before[name]), name
            elif tensor.is_floating_point():
                assert not torch.equal(tensor, before[name]), name
    state = {name for name in train_step.tensors() if name.startswith("optimizer/")}
    assert state and not any(name.startswith(tuple(f"optimizer/{one}" for one in kept)) for name in state)
    assert all(one.grad is None for one in train_step.encoder.parameters() if not one.requires_grad)


def test_frozen_stages_stay_in_eval_mode() -> None:
    encoder = Encoder.of(plain_settings(**NORMS, frozen_stages=3))
    for _ in range(2):
        encoder.eval()
        encoder.train()
    network = encoder.network
    assert not network.bn1.training and not any(one.training for one in network.blocks[1].modules())
    assert network.blocks[2].training and all(one.training for one in network.blocks[3].modules())
    assert not any(name.startswith("frozen") for name in encoder.state_dict())


def test_frozen_stages_give_the_gradients_that_the_whole_network_has() -> None:
    """Without batch norm and dropping, freezing changes nothing above the frozen stages."""
    found = []
    for frozen in (0, 3):
        train_step = new_train_step(plain_settings(frozen_stages=frozen))
        do_steps(train_step, range(1), rate=0.0)
        found.append({n: p.grad for n, p in train_step.encoder.named_parameters() if p.grad is not None})
    whole, part = found
    assert 5 < len(part) < len(whole)
    for name, gradient in part.items():
        torch.testing.assert_close(gradient, whole[name])


def test_a_stored_run_with_both_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    settings = plain_settings(**NORMS, frozen_stages=2, layer_decay=0.7, decay_all=False, ema_decay=0.9, micro_batch=4)
    whole = new_train_step(settings)
    do_steps(whole, range(4))
    part = new_train_step(settings)
    do_steps(part, range(2))
    run, position = (
        Store.open(tmp_path),
        Position("layout", "places", epoch=1, plan="h", cursor=2, step=2, finished=True),
    )
    name = save_checkpoint(run, part, position)
    later = new_train_step(settings.changed(seed=9))
    later.settings = settings
    assert restore(run, name, later, "places") == position
    do_steps(later, range(2, 4))
    for one, other in ((weights(whole.encoder), weights(later.encoder)), (whole.tensors(), later.tensors())):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_of_before_the_settings_goes_on(tmp_path: Path) -> None:
    """Its settings lack both, and its optimizer had one group."""
    settings = plain_settings()
    stored = settings.model_dump()
    del stored["optim"]["layer_decay"], stored["optim"]["frozen_stages"]
    old = TrainSettings.model_validate(stored)
    assert old == settings and (old.optim.layer_decay, old.optim.frozen_stages) == (1.0, 0)
    groups = make_optimizer(Encoder.of(old), old).param_groups
    assert [len(group["params"]) for group in groups] == [len(list(Encoder.of(old).parameters()))]


@pytest.mark.slow  # torch's exporter takes seconds
def test_an_encoder_with_frozen_stages_is_exported_whole(tmp_path: Path) -> None:
    settings = plain_settings(**NORMS, frozen_stages=3)
    images = {kind: torch.zeros(0, 3, 8, 8, dtype=torch.uint8) for kind in ("tile", "view")}
    encoder = Encoder.of(settings)
    differences = export_encoder(encoder, settings, tmp_path / "made", {}, images)
    assert max(differences.values()) < 1e-4 and (tmp_path / "made" / "view.onnx").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # needs a C++ compiler, and minutes where cores are few
def test_a_compiled_network_freezes_the_same() -> None:
    small = {"model_options": {"ls_init_value": 1.0, "depths": (1, 1, 1, 1)}, "frozen_stages": 2, "layer_decay": 0.5}
    losses = do_steps(new_train_step(plain_settings(**small)), range(2))
    compiled = new_train_step(plain_settings(**small, compile=True))
    before = weights(compiled.encoder)
    assert do_steps(compiled, range(2)) == pytest.approx(losses, rel=1e-3)
    moved = {name for name, tensor in compiled.encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "network.stem.0.weight" not in moved and "network.stages.3.blocks.0.conv_dw.weight" in moved

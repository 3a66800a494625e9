"""The encoder: unit vectors, its own normalisation, the same weights from the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from geostream.errors import BadInput
from geostream.runs.stages import new_encoder
from geostream.settings import TrainSettings
from geostream.training.model import Encoder, autocast
from tests.training.settings import TINY


def test_embeddings_are_unit_vectors_and_bytes_are_floats_times_255() -> None:
    encoder = Encoder("test_convnext").eval()
    images = torch.randint(0, 256, (3, 3, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vectors = encoder.encode(images)
        queries, references = encoder(images, images)
        assert vectors.shape == (3, encoder.dim)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(encoder.encode(images.float() / 255), vectors)
        assert torch.equal(queries, vectors) and torch.equal(references, vectors), "both views share the network"


def test_normalisation_is_the_networks_own() -> None:
    encoder = Encoder("test_convnext")
    assert encoder.mean.flatten().tolist() == [0.5] * 3
    assert "mean" not in encoder.state_dict()


def test_the_temperature_is_learnt_from_where_it_is_set() -> None:
    encoder = Encoder("test_convnext", temperature=0.07)
    assert float(encoder.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07))
    assert encoder.logit_scale.requires_grad


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (new_encoder(TINY.changed(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_an_unknown_model_is_one_line() -> None:
    with pytest.raises(BadInput, match="model 'convnext_bass'"):
        Encoder("convnext_bass")
    with pytest.raises(BadInput, match="model 'convnext_base.no_such_tag'"):
        Encoder("convnext_base.no_such_tag")
    with pytest.raises(BadInput, match="model 'hf-hub:nobody/nothing'.*HF_HUB_OFFLINE=0"):
        Encoder.of(TrainSettings().changed(model="hf-hub:nobody/nothing"))


def test_options_reach_timm() -> None:
    encoder = Encoder("test_convnext", options={"ls_init_value": 1.0})
    assert encoder.network.stages[0].blocks[0].gamma.min() == 1.0
    with pytest.raises(BadInput, match="model_options"):
        Encoder("test_convnext", options={"no_such_option": 1})


def test_images_too_small_for_the_network() -> None:
    with pytest.raises(BadInput, match="16×64"):
        new_encoder(TrainSettings().changed(model="test_convnext", tile_size=32, view_height=16, view_width=64))


@pytest.mark.parametrize(
    ("model", "width", "options"),
    [
        ("test_vit", 64, {"img_size": (64, 64)}),
        ("test_vit", 128, {"img_size": (64, 64), "dynamic_img_size": True}),
        ("xcit_nano_12_p16_224", 128, {"img_size": (64, 64)}),  # takes any size without being told
        ("test_efficientnet", 128, {}),
    ],
)
def test_networks_of_a_fixed_size_get_the_settings_size(model: str, width: int, options: dict[str, object]) -> None:
    encoder = Encoder.of(TrainSettings().changed(model=model, tile_size=64, view_height=64, view_width=width)).eval()
    assert options is None or encoder.options == options
    with torch.no_grad():
        queries, references = encoder(torch.zeros(1, 3, 64, width), torch.zeros(1, 3, 64, 64))
    assert queries.shape == references.shape == (1, encoder.dim)


def test_a_size_given_by_hand_stays() -> None:
    settings = TrainSettings().changed(
        model="test_vit", tile_size=64, view_height=64, view_width=64, model_options={"img_size": 96}
    )
    assert Encoder.of(settings).options == {"img_size": 96}


def test_a_network_that_takes_one_size_only() -> None:
    with pytest.raises(BadInput, match="64×128"):
        new_encoder(TrainSettings().changed(model="mixer_s32_224", tile_size=64, view_height=64, view_width=128))
    new_encoder(TrainSettings().changed(model="mixer_s32_224", tile_size=64, view_height=64, view_width=64))


def test_a_network_without_gradient_checkpointing() -> None:
    with pytest.raises(BadInput, match="selecsls42b.*gradient_checkpointing=false"):
        Encoder.of(TrainSettings().changed(model="selecsls42b", gradient_checkpointing=True))


def test_channels_last() -> None:
    encoder = Encoder.of(TrainSettings().changed(model="test_convnext", channels_last=True))
    weight = encoder.network.stem[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        ("cpu", "auto", None),
        ("cuda", "auto", torch.bfloat16),
        ("cpu", "bf16", torch.bfloat16),
        ("cpu", "fp16", torch.float16),
        ("cpu", "float32", None),
    ],
)
def test_precision(device: str, precision: str, dtype: torch.dtype | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with autocast(torch.device(device), precision):
        product = torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    assert product.dtype == (dtype or torch.float32)

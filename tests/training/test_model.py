"""The encoder: unit vectors, its own normalisation, the same weights from the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from geostream.errors import BadInput
from geostream.settings import TrainSettings
from geostream.training.model import Encoder
from geostream.training.stages import new_encoder
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
    one, same, other = (new_encoder(TINY.model_copy(update={"seed": seed})).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_an_unknown_model_is_one_line() -> None:
    with pytest.raises(BadInput, match="model 'convnext_bass'"):
        Encoder("convnext_bass")


def test_options_reach_timm() -> None:
    encoder = Encoder("test_convnext", options={"ls_init_value": 1.0})
    assert encoder.network.stages[0].blocks[0].gamma.min() == 1.0
    with pytest.raises(BadInput, match="model_options"):
        Encoder("test_convnext", options={"no_such_option": 1})


def test_images_too_small_for_the_network() -> None:
    with pytest.raises(BadInput, match="cannot take images of 16×64"):
        new_encoder(TrainSettings(model="test_convnext", tile_size=32, view_height=16, view_width=64))

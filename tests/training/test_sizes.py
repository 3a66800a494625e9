"""Sizes of images that vision transformers take: those that their patches fill, tiles and views of different shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from geostream.errors import BadInput
from geostream.runs.stages import new_encoder
from geostream.settings import TrainSettings
from geostream.training.model import Encoder

DINOV2, DINOV3 = "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"
TINY: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "init_values": 1.0}


def sized(model: str, tile: int, height: int, width: int, **options: Any) -> TrainSettings:
    values = {"model": model, "tile_size": tile, "view_height": height, "view_width": width}
    return TrainSettings().changed(**values, model_options=TINY | options)


@pytest.mark.parametrize(("model", "unit"), [(DINOV2, 14), (DINOV3, 16)])
def test_tiles_and_views_of_whole_patches_are_embedded(model: str, unit: int) -> None:
    """Every pixel counts, also the last row and column: nothing is cut off."""
    encoder = new_encoder(sized(model, 3 * unit, 3 * unit, 6 * unit)).eval()
    for height, width in ((3 * unit, 3 * unit), (3 * unit, 6 * unit)):
        images = torch.rand(2, 3, height, width)
        images[1] = images[0]
        images[1, :, -1, -1] += 0.5
        with torch.no_grad():
            vectors = encoder.encode(images)
        assert vectors.shape == (2, encoder.dim) and not torch.equal(vectors[0], vectors[1])


def test_the_size_of_vigor_fits_dinov3() -> None:
    encoder = Encoder.of(sized(DINOV3, 384, 384, 768)).eval()
    with torch.no_grad():
        assert encoder.encode(torch.rand(1, 3, 384, 768)).shape == encoder.encode(torch.rand(1, 3, 384, 384)).shape


@pytest.mark.parametrize("width", [384, 768])
def test_sizes_that_patches_do_not_fill_are_refused_with_those_that_fit(width: int) -> None:
    with pytest.raises(BadInput) as told:
        Encoder.of(sized(DINOV2, 384, 384, width))
    text = str(told.value)
    assert all(word in text for word in (DINOV2, "14×14", "tile_size=384 (choose 378 or 392)", "view_height=384"))
    assert ("view_width=768 (choose 756 or 770)" if width == 768 else "view_width=384") in text
    assert "dynamic_img_pad" in text and "\n" not in text


def test_only_the_sizes_that_are_wrong_are_named() -> None:
    with pytest.raises(BadInput) as told:
        Encoder.of(sized(DINOV3, 384, 140, 768))  # CVUSA's panorama
    assert "view_height=140 (choose 128 or 144)" in str(told.value)
    assert not any(word in str(told.value) for word in ("tile_size=", "view_width="))
    with pytest.raises(BadInput, match=r"tile_size=10 \(choose 16\)"):
        Encoder.of(sized(DINOV3, 10, 16, 16))


@pytest.mark.parametrize(("model", "height", "width"), [(DINOV2, 40, 40), (DINOV2, 40, 80), (DINOV3, 40, 90)])
def test_padding_takes_any_size_and_cuts_nothing_off(model: str, height: int, width: int) -> None:
    encoder = new_encoder(sized(model, 40, height, width, dynamic_img_pad=True)).eval()
    images = torch.rand(2, 3, height, width)
    images[1] = images[0]
    images[1, :, -1, -1] += 0.5
    with torch.no_grad():
        vectors = encoder.encode(images)
    assert not torch.equal(vectors[0], vectors[1])


def test_both_shapes_learn() -> None:
    encoder = new_encoder(sized(DINOV3, 32, 32, 64)).train()
    queries, references = encoder(torch.rand(2, 3, 32, 64), torch.rand(2, 3, 32, 32))
    (queries * references).sum().backward()
    assert all(one.grad is not None for name, one in encoder.named_parameters() if name != "logit_scale")

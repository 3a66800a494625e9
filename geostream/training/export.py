"""Export an encoder for programs without geostream: safetensors and a JSON config for timm, and ONNX.

The folder holds

- ``model.safetensors`` and ``config.json``: the weights under timm's names, and all that is needed to embed with them;
- ``tile.onnx`` and ``view.onnx``: the whole encoder, from uint8 images (B, 3, H, W) to unit vectors (B, D), for any B.
  There are two, because some networks are built for one image size, and because a view may also be seen from above.

ONNX is checked before it is left there: random and real images must give the vectors of torch, up to ``TOLERANCE``.
Files are written beside their place and moved there at the end, so the folder never holds half an export.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from geostream.errors import BadInput
from geostream.layout import Layout
from geostream.layout.members import read_image
from geostream.settings import TrainSettings
from geostream.streaming.decode import decode_image
from geostream.streaming.pipeline import ImageSizes
from geostream.training.model import Encoder

TOLERANCE = 1e-4  # largest difference of a component of the unit vectors
BATCHES = (1, 3)  # sizes of the random batches, to see that any will do
KINDS = ("tile", "view")
FILES = ("model.safetensors", "config.json", *(f"{kind}.onnx" for kind in KINDS))


def export_encoder(
    encoder: Encoder,
    settings: TrainSettings,
    folder: Path,
    source: Mapping[str, Any],
    images: Mapping[str, Tensor],
) -> dict[str, float]:
    """Write an encoder as safetensors and ONNX, and check the ONNX files against it.

    Args:
        encoder: The encoder; it is left in eval mode on the CPU.
        settings: Image sizes.
        folder: Where the files go. It is made if need be; it must not hold any of them.
        source: What the weights are from, for ``config.json``.
        images: Real images for the check, uint8 (n, 3, H, W), by kind ("tile", "view"); n may be 0.

    Returns:
        The largest difference of ONNX and torch by kind.

    Raises:
        BadInput: A package for ONNX is missing, the network cannot be exported, the export differs from torch, or the
            folder holds a file of that name.
    """
    _check_free(folder)
    encoder = encoder.cpu().eval()
    sizes = {
        "tile": (settings.model.tile_size, settings.model.tile_size),
        "view": (settings.model.view_height, settings.model.view_width),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".geostream-export-") as private:
        made = Path(private)
        differences = {}
        for kind, size in sizes.items():
            module = _Encode(encoder, kind).eval()
            _write_onnx(module, size, made / f"{kind}.onnx")
            difference = _difference(module, made / f"{kind}.onnx", _trials(size, images[kind]))
            if not difference <= TOLERANCE:  # also for NaN
                raise BadInput(
                    f"{encoder.name}: {kind}.onnx differs from torch by up to {difference:.2g}, more than "
                    f"{TOLERANCE:g}; nothing was written"
                )
            differences[kind] = difference
        weights = {name: tensor.contiguous() for name, tensor in encoder.network.state_dict().items()}
        (made / "model.safetensors").write_bytes(safetensors.torch.save(weights))
        config = _config(encoder, sizes) | {"source": dict(source), "onnx_difference": differences}
        (made / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        _check_free(folder)
        for name in FILES:
            shutil.move(made / name, folder / name)
    return differences


def first_images(layout: Layout, settings: TrainSettings, count: int) -> dict[str, Tensor]:
    """Return the first tiles and views of a layout's test split, of its training split where it has none.

    Args:
        layout: Where they are read from.
        settings: Their sizes.
        count: How many of each; fewer where there are not as many.

    Returns:
        uint8 (n, 3, H, W) by kind.

    Raises:
        StoreError: A shard cannot be read.
        BadInput: An image is damaged.
    """
    split = "test" if len(layout.pairs("test")) else "train"
    places, pairs, sizes = layout.references(split)[:count], layout.pairs(split), ImageSizes.of(settings)
    tiles = [read_image(layout, int(place)) for place in places]
    views = [
        read_image(layout, int(place), int(view))
        for place, view in zip(pairs.place[:count], pairs.view[:count], strict=True)
    ]
    return {"tile": _decoded(tiles, sizes.tile), "view": _decoded(views, sizes.view)}


def _decoded(images: list[bytes], size: tuple[int, int]) -> Tensor:
    pixels = np.zeros((len(images), *size, 3), dtype=np.uint8)
    for data, into in zip(images, pixels, strict=True):
        decode_image(data, into)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: a file; name a folder for the export")
    if there := [name for name in FILES if (folder / name).exists()]:
        raise BadInput(f"{folder}/{there[0]}: is there already; name another folder")


def _config(encoder: Encoder, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Return what is needed to embed with the weights: the network, and how images become its input."""
    seen = encoder.birds_eye.settings if encoder.birds_eye is not None else None
    return {
        "format": 1,
        "model": encoder.name,
        "options": encoder.options,
        "library": f"timm {version('timm')}",
        "dim": encoder.dim,
        "input": {
            "sizes": {kind: {"height": height, "width": width} for kind, (height, width) in sizes.items()},
            "onnx": "images: uint8 RGB (batch, 3, height, width); scaled and normalised within",
            "mean": encoder.mean.flatten().tolist(),
            "std": encoder.std.flatten().tolist(),
            # A view's vector is then the normalised sum of two, of itself and of the ground that it is projected to.
            "birds_eye": seen
            and {
                "metres": seen.birds_eye,
                "camera_height": seen.camera_height,
                "vertical_degrees": seen.degrees_high,
            },
        },
        "output": "vectors: float32 (batch, dim), of length 1; similarity is their dot product",
        "temperature": float((-encoder.logit_scale.detach()).exp()),
    }


class _Encode(nn.Module):
    """The encoder as a module whose forward pass is to embed images of one kind."""

    def __init__(self, encoder: Encoder, kind: str) -> None:
        super().__init__()
        self.encoder, self.kind = encoder, kind

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images) if self.kind == "tile" else self.encoder.encode_views(images)


def _write_onnx(module: _Encode, size: tuple[int, int], path: Path) -> None:
    """Write one ONNX file for images of a size, in the newest opset that torch's exporter writes."""
    example = torch.zeros(2, 3, *size, dtype=torch.uint8)
    try:
        torch.onnx.export(
            module,
            (example,),
            path,
            input_names=["images"],
            output_names=["vectors"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except ImportError as error:
        raise BadInput(f"ONNX needs a package that is not there ({error}); pip install geostream[export]") from error
    except Exception as error:  # the exporter raises whatever its passes raise
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"model {module.encoder.name}: cannot be exported to ONNX ({reason})") from error


def _trials(size: tuple[int, int], real: Tensor) -> list[Tensor]:
    """Return batches to compare: random ones of several sizes, and the real images."""
    generator = torch.Generator().manual_seed(0)
    random = [torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=generator) for n in BATCHES]
    return [*random, real] if len(real) else random


@torch.inference_mode()
def _difference(module: _Encode, path: Path, batches: list[Tensor]) -> float:
    """Return the largest difference of a component between ONNX and torch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for images in batches:
        [found] = session.run(["vectors"], {"images": images.numpy()})
        differences.append(float(np.abs(found - module(images).numpy()).max()))
    return max(differences)

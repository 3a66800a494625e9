"""Every number that shapes a training run, in one frozen object that is stored whole with the run.

The defaults are Sample4Geo's (Deuser et al., ICCV 2023, section 4, and the authors' code), but that weights begin from
scratch: nothing here needs a download. What a dataset is trained with stands in the recipe of its name, and anything
is overridden by name: ``--set batch_size=32`` on the command line, ``settings`` in a flow's parameters.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from geostream.errors import BadInput


class TrainSettings(BaseModel):
    """Settings of one training run. Sizes in pixels, rates per step, times in epochs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # encoder, shared by both views
    model: str = Field("convnext_base.fb_in22k_ft_in1k_384", description="any timm model")
    weights: str = Field(
        "scratch",
        description="to begin with: scratch, timm (of the model's name, from its hub), or a local "
        ".safetensors, .pth, .pt or .bin file",
    )
    model_options: dict[str, bool | int | float | str] = Field({}, description="keyword arguments of timm's model")
    tile_size: int = Field(384, ge=8, description="side of the tile given to the model")
    view_height: int = Field(384, ge=8)
    view_width: int = Field(768, ge=8)

    # optimisation
    epochs: int = Field(40, ge=1)
    batch_size: int = Field(128, ge=2, description="pairs in a batch")
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "linear", "one-cycle", "constant"] = "cosine"
    warmup_epochs: float = Field(1.0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    decay_all: bool = Field(True, description="decay norms, biases and the temperature, too")
    clip_value: float = Field(100.0, gt=0, description="gradient values are clipped here")
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    initial_temperature: float = Field(0.07, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1, description="evaluate and mine with averaged weights; 0: with the last")
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU, else float32"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="pairs that go through the network at once; the loss is of the whole batch all the same"
    )
    gradient_checkpointing: bool = Field(False, description="a third more time, far less memory")
    channels_last: bool = Field(False, description="the memory format that convolutions on a GPU like best")
    compile: bool = Field(False, description="torch.compile the network")

    # several GPUs
    step_batches: int = Field(
        0, ge=0, description="batches, each of another lane, that make one step; ranks must divide it; 0: one a rank"
    )
    negatives: Literal["own", "all"] = Field("all", description="within each batch, or within all batches of a step")

    # augmentation
    flip_probability: float = Field(0.5, ge=0, le=1)
    rotate_probability: float = Field(0.75, ge=0, le=1, description="turn the tile and roll the view by the same angle")
    view_kind: Literal["panorama", "picture"] = Field(
        "panorama", description="a panorama is rolled as its tile turns; a picture (drone, street) stays as it is"
    )
    color_probability: float = Field(0.5, ge=0, le=1, description="change the colour of a view, or of a tile")
    color_jitter: float = Field(0.15, ge=0, description="brightness, contrast, saturation then; 0: no colour changes")
    hue_jitter: float = Field(0.15, ge=0, le=0.5, description="share of a whole turn of the hue then; 0 is far cheaper")
    jpeg_probability: float = Field(0.5, ge=0, le=1, description="compress again, at quality 90 to 100")
    blur_probability: float = Field(0.3, ge=0, le=1, description="blur or sharpen")
    dropout_probability: float = Field(0.3, ge=0, le=1, description="black out a grid, or some rectangles")

    # plan
    strategy: Literal["patchwork", "sample4geo", "random"] = "patchwork"
    neighbours: int = Field(128, ge=1, description="K of the neighbour graphs")
    first_mining: int = Field(4, ge=1, description="epochs on GPS neighbours before the first mining")
    mine_every: int = Field(4, ge=1, description="epochs between minings")
    lanes: int = Field(
        1,
        ge=1,
        description="independent streams of batches, at least; a run raises it to a multiple of ranks times workers",
    )
    resident_shards: int = Field(8, ge=1, description="W: shards of a lane held at once")
    hardness: float = Field(
        1.0, ge=0, description="score that plans reach where they can (1: random access); beyond, they rather vary"
    )
    recluster_below: float = Field(
        0.95,
        ge=0,
        description="shards are rewritten by similarity where plans that mix all of them score less; 0: never",
    )

    # running
    evaluate_every: int = Field(4, ge=1)
    checkpoint_every: int = Field(250, ge=1, description="steps between checkpoints within an epoch")
    keep_checkpoints: int = Field(3, ge=1, description="newest ones kept, beside the best")
    workers: int = Field(0, ge=0, description="loader processes; 0 loads in the trainer's own")
    decode_threads: int | None = Field(None, ge=1, description="of each loader process; None: as there are cores")
    look_ahead: int = Field(128, ge=0, description="batches of a lane whose needs are merged into one read")
    prefetch: int = Field(8, ge=0, description="batches that a read may start before its need")
    buffer_mib: int = Field(2048, ge=1, description="most MiB of shards held at once, by each rank")
    gap_kib: int = Field(1024, ge=0, description="unneeded KiB read through rather than skipped by another request")
    replaced_limit: float = Field(0.01, ge=0, le=1, description="share of an epoch's pairs that may be replaced")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; None: torch's own choice")
    seed: int = Field(0, ge=0)


def default_settings(dataset: str) -> TrainSettings:
    """The settings to begin with on a dataset: its recipe (``recipes/<dataset>.toml``) where there is one."""
    recipe = files("geostream").joinpath("recipes", f"{dataset}.toml")
    return make_settings(tomllib.loads(recipe.read_text())) if recipe.is_file() else TrainSettings()


def parse_settings(overrides: list[str], base: TrainSettings) -> TrainSettings:
    """Settings from ``name=value`` texts on top of ``base``. Raises BadInput by name."""
    values = base.model_dump()
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--set {text}: write name=value, for example --set batch_size=64")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return make_settings(values)


def make_settings(values: Mapping[str, object]) -> TrainSettings:
    """Settings from a mapping. Raises BadInput with one line naming each wrong setting."""
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        known = ", ".join(TrainSettings.model_fields)
        raise BadInput(f"settings: {wrong}. Known settings: {known}") from error

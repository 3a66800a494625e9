"""Define all settings of a training run, in groups, as one frozen object that is stored with the run.

The defaults are Sample4Geo's (Deuser et al., ICCV 2023, section 4, and the authors' code), except that training begins
from random weights, so that no download is needed. The recipe with a data set's name (``geostream/recipes``) has the
settings for that data set; another recipe can be chosen by its name. Any setting can be given by its own name:
``--set batch_size=32`` on the command line, or ``settings`` in a flow's parameters. ``geostream settings`` lists them
all.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from geostream.errors import BadInput

WARM_EPOCHS, WARM_RATE = 0.4, 0.5  # of a run from scratch: docs/notes/training.md
FROZEN = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(BaseModel):
    """The network that tiles and views share, and how it computes."""

    model_config = FROZEN

    name: str = Field("convnext_base.fb_in22k_ft_in1k_384", description="name of a timm model")
    weights: str = Field(
        "scratch",
        description="initial weights: scratch, timm (the model's own, from its hub), model:current or model:NUMBER, "
        "run:NAME (its best checkpoint) or run:NAME/CHECKPOINT, or a .safetensors, .pth, .pt or .bin file, local or "
        "at a store's URL",
    )
    options: dict[str, bool | int | float | str | list[int | float | str]] = Field(
        {}, description="keyword arguments for timm's model"
    )
    tile_size: int = Field(384, ge=8, description="pixels; side of the tiles given to the model")
    view_height: int = Field(384, ge=8, description="pixels; height of the views given to the model")
    view_width: int = Field(768, ge=8, description="pixels; width of the views given to the model")
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto", description="number format of the network; auto: bf16 on a GPU, else float32"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice: a third slower, less memory")
    channels_last: bool = Field(False, description="memory format that convolutions on a GPU are fastest with")
    compile: bool = Field(False, description="compile the network with torch.compile")
    birds_eye: float = Field(
        0.0,
        ge=0,
        description="metres to a side of the ground that panoramas are projected to, as a second picture of each view, "
        "seen from above; EP-BEV's 30.72; 0: none",
    )
    camera_height: float = Field(1.5, gt=0, description="metres that panoramas' cameras are above the ground; EP-BEV's")
    vertical_degrees: float | None = Field(
        None,
        gt=0,
        le=180,
        description="degrees from a panorama's lowest row to its highest, the horizon in the middle; none: its pixels "
        "are as high as wide",
    )

    @property
    def degrees_high(self) -> float:
        """Degrees from a panorama's lowest row to its highest; more than 180 where its pixels cannot be square."""
        return self.vertical_degrees or 360 * self.view_height / self.view_width


class OptimSettings(BaseModel):
    """The optimization: steps, loss, learning rate."""

    model_config = FROZEN

    epochs: int = Field(40, ge=1, description="epochs to train")
    batch_size: int = Field(128, ge=2, description="pairs in a batch")
    micro_batch: int | None = Field(
        None, ge=1, description="pairs that go through the network at once; the loss stays that of the whole batch"
    )
    step_batches: int = Field(
        0, ge=0, description="batches of one optimizer step, each from another lane; 0: as many as there are ranks"
    )
    negatives: Literal["own", "all"] = Field(
        "all", description="where a pair's negatives come from: its own batch, or all batches of the step"
    )
    learning_rate: float = Field(1e-3, gt=0, description="per step; the highest of the schedule")
    schedule: Literal["cosine", "linear", "one-cycle", "constant"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_epochs: float = Field(1.0, ge=0, description="epochs over which the learning rate rises")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of a layer as a share of the layer's above it; 1: the same for all",
    )
    frozen_stages: int = Field(
        0, ge=0, description="stages that keep their first weights: the stem, then stages (ConvNeXt) or blocks (ViT)"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, per step, times the learning rate")
    decay_all: bool = Field(True, description="decay norms, biases and the temperature as well")
    clip_value: float = Field(100.0, gt=0, description="largest absolute value of a gradient's elements")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over the negatives")
    initial_temperature: float = Field(0.07, gt=0, description="temperature of the InfoNCE loss, learned from there")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay per step of the EMA weights used to evaluate and mine; 0: no EMA"
    )


class LossSettings(BaseModel):
    """Which of the other pairs are negatives, and what the loss aims at beside the positive."""

    model_config = FROZEN

    decoupled: bool = Field(
        False,
        description="leave a pair out of its own denominator (Yeh et al., ECCV 2022, section 3); the temperature is "
        "then not learned: it stays at initial_temperature, or as the initial weights have it",
    )
    negative_radius: float = Field(
        0.0,
        ge=0,
        description="metres within which two places are no negatives of each other, and neither are semi-positives "
        "(Fervers et al., ECCV 2024: 30); 0: all other pairs are negatives",
    )
    soft_targets: float = Field(
        0.0,
        ge=0,
        description="metres over which label_smoothing's share falls to 1/e: near places get more of it than far ones "
        "(as in PIGEON, Haas et al., CVPR 2024); 0: all get the same",
    )

    @property
    def by_distance(self) -> bool:
        """Whether the loss needs the places' coordinates."""
        return self.negative_radius > 0 or self.soft_targets > 0


class AugmentSettings(BaseModel):
    """How often, and how much, images are changed in training."""

    model_config = FROZEN

    flip_probability: float = Field(0.5, ge=0, le=1, description="share of pairs whose tile and view are mirrored")
    rotate_probability: float = Field(
        0.75, ge=0, le=1, description="share of pairs whose tile is turned by 90, 180 or 270 degrees, and view with it"
    )
    view_kind: Literal["panorama", "picture"] = Field(
        "panorama", description="a panorama is rolled as its tile turns; a picture (drone, street) stays as it is"
    )
    fov: tuple[float, float] = Field(
        (360.0, 360.0),
        description="least and most degrees that a panorama is narrowed to in training, with a random heading, so that "
        "the model answers ordinary photos, too; one number for both; 360: whole, north in the middle",
    )
    color_probability: float = Field(0.5, ge=0, le=1, description="share of images whose colors change")
    color_jitter: float = Field(0.15, ge=0, description="largest change of brightness, contrast, saturation; 0: none")
    hue_jitter: float = Field(0.15, ge=0, le=0.5, description="largest change of hue, in turns; 0: none, far cheaper")
    jpeg_probability: float = Field(0.5, ge=0, le=1, description="share of images compressed again, quality 90 to 100")
    blur_probability: float = Field(0.3, ge=0, le=1, description="share of images blurred or sharpened")
    dropout_probability: float = Field(0.3, ge=0, le=1, description="share of images with a grid or rectangles blacked")

    @field_validator("fov", mode="before")
    @classmethod
    def _one_for_both(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _check_fov(self) -> AugmentSettings:
        least, most = self.fov
        if not 0 < least <= most <= 360:
            raise ValueError(f"fov {least:g} to {most:g}: choose degrees above 0 and up to 360, the smaller first")
        if self.narrows and self.view_kind != "panorama":
            raise ValueError("fov: only panoramas can be narrowed, and view_kind is picture; leave it at 360")
        return self

    @property
    def narrows(self) -> bool:
        """Whether panoramas are narrowed."""
        return self.fov != (360.0, 360.0)


class PlanSettings(BaseModel):
    """Which pairs share a batch: the strategy, the neighbour graphs, the order of the shards."""

    model_config = FROZEN

    strategy: Literal["patchwork", "sample4geo", "random"] = Field(
        "patchwork", description="patchwork: hard batches from few shards at a time; sample4geo: the authors' way"
    )
    neighbours: int = Field(128, ge=1, description="K, neighbours of each place in the graphs")
    positive_margin: float = Field(
        0.0,
        ge=0,
        le=1,
        description="drop mined candidates whose similarity is above this share of the place's similarity to its own "
        "tile, as likely false negatives (NV-Retriever, Moreira et al. 2024, section 3: 0.95); 0: keep all",
    )
    first_mining: int = Field(
        4, ge=1, description="epoch after which the training set is first mined; before, geographic neighbours plan"
    )
    mine_every: int = Field(4, ge=1, description="epochs between two minings")
    mining_lag: int = Field(
        1,
        ge=0,
        le=1,
        description="epochs that train while a background process mines and plans for the one after; 0: the trainer "
        "prepares each epoch itself, between two epochs",
    )
    mix: Literal["mixed", "own"] = Field(
        "mixed",
        description="on a layout that joins several data sets: batches of all of them, or each of one data set of its "
        "own, without neighbours of another",
    )
    lanes: int = Field(
        1, ge=1, description="independent streams of batches; raised to a multiple of ranks times workers"
    )
    resident_shards: int = Field(8, ge=1, description="W, shards of a lane that are held at once")
    hardness: float = Field(
        1.0,
        ge=0,
        description="target hardness of a plan: 0 is random batches, 1 is Sample4Geo with random access; among "
        "strategies that reach it, the most varied is used",
    )
    recluster_below: float = Field(
        0.95, ge=0, description="hardness below which the shards are rewritten in the order of similarity; 0: never"
    )


class ReadSettings(BaseModel):
    """What reading may cost. These settings do not change what is trained."""

    model_config = FROZEN

    workers: int = Field(0, ge=0, description="loader processes; 0: load in the trainer's own")
    decode_threads: int | None = Field(None, ge=1, description="threads of each loader process; none: by its cores")
    look_ahead: int = Field(128, ge=0, description="batches of a lane whose needs are merged into one read")
    prefetch: int = Field(8, ge=0, description="batches of its lane that a read may start before its need")
    buffer_mib: int = Field(2048, ge=1, description="MiB of shards that each rank holds at most, each lane equally")
    gap_kib: int = Field(1024, ge=0, description="KiB not needed that are read through, rather than skipped")
    replaced_limit: float = Field(
        0.01, ge=0, le=1, description="share of an epoch's pairs that may be replaced because they cannot be read"
    )


class TrainSettings(BaseModel):
    """All settings of a training run. They can be given by their own names, without the group: ``batch_size=64``."""

    model_config = FROZEN

    model: ModelSettings = ModelSettings()
    optim: OptimSettings = OptimSettings()
    loss: LossSettings = LossSettings()
    augment: AugmentSettings = AugmentSettings()
    plan: PlanSettings = PlanSettings()
    read: ReadSettings = ReadSettings()
    evaluate_every: int = Field(4, ge=1, description="epochs between two evaluations")
    test_on: list[str] = Field(
        [], description="other data sets of the store, on whose test splits the best checkpoint is tested at the end"
    )
    checkpoint_every: int = Field(250, ge=1, description="steps between two checkpoints within an epoch")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints that are kept, beside the best")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; none: torch's own choice")
    seed: int = Field(0, ge=0, description="seed of everything random")

    @field_validator("test_on", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _into_groups(cls, values: Any) -> Any:
        """Put settings that are given by their own names into their groups; runs before version 2 stored them so."""
        if not isinstance(values, Mapping):
            return values
        found: dict[str, Any] = {}
        for name, value in values.items():
            group, field = SETTINGS.get(name, ("", name))
            if isinstance(value, Mapping) and name in GROUPS:
                found[name] = {**found.get(name, {}), **value}
            elif group:
                found[group] = {**found.get(group, {}), field: value}
            else:
                found[name] = value
        return found

    @model_validator(mode="after")
    def _check_targets(self) -> TrainSettings:
        if self.loss.soft_targets and not self.optim.label_smoothing:
            raise ValueError("soft_targets: it spreads label_smoothing's share, which is 0; set label_smoothing")
        return self

    @model_validator(mode="after")
    def _check_birds_eye(self) -> TrainSettings:
        model = self.model
        if model.birds_eye and self.augment.view_kind != "panorama":
            raise ValueError("birds_eye: only panoramas can be projected, and view_kind is picture; leave it at 0")
        if model.birds_eye and model.degrees_high > 180:
            raise ValueError(
                f"birds_eye: views of {model.view_height}×{model.view_width} cannot be panoramas with square pixels; "
                "set vertical_degrees, 180 for a sphere that was squeezed, or leave birds_eye at 0"
            )
        return self

    def flat(self) -> dict[str, Any]:
        """Return the value of each setting by its own name, without groups, as JSON has it."""
        values = self.model_dump(mode="json")
        return {name: values[group][field] if group else values[field] for name, (group, field) in SETTINGS.items()}

    def changed(self, **values: Any) -> TrainSettings:
        """Return a copy with some settings changed.

        Args:
            **values: New values by the settings' own names.

        Raises:
            BadInput: A setting is unknown, or its value is not allowed.
        """
        return make_settings(self.flat() | values)


GROUPS: dict[str, type[BaseModel]] = {
    "model": ModelSettings,
    "optim": OptimSettings,
    "loss": LossSettings,
    "augment": AugmentSettings,
    "plan": PlanSettings,
    "read": ReadSettings,
}
#: (group, field) of each setting by its own name; the group is "" for settings outside the groups. All fields but two
#: have their setting's name.
SETTINGS: dict[str, tuple[str, str]] = {
    {"name": "model", "options": "model_options"}.get(field, field): (group, field)
    for group, kind in GROUPS.items()
    for field in kind.model_fields
} | {name: ("", name) for name in TrainSettings.model_fields if name not in GROUPS}


def default_settings(dataset: str, recipe: str | None = None) -> TrainSettings:
    """Return the settings of a data set's recipe; Sample4Geo's where it has no recipe.

    Args:
        dataset: The data set's name.
        recipe: Name of a recipe to take instead of the data set's own; None: its own.

    Raises:
        BadInput: There is no recipe of that name.
    """
    return make_settings({name: value for name, value in _chosen(dataset, recipe).items() if name != "warm"})


def warm_settings(settings: TrainSettings, dataset: str, recipe: str | None = None) -> TrainSettings:
    """Return the settings of a run that begins from the data set's current model, with a shorter schedule.

    The epochs and those of the learning rate's warm-up are WARM_EPOCHS of the others, rounded down. The learning rate
    is WARM_RATE of the other: the model knows most already, and high rates would undo that. The training set is mined
    after the first epoch, because the model's embeddings are good from the start. A table ``[warm]`` in the recipe has
    precedence.

    Args:
        settings: The settings for a run from scratch.
        dataset: The data set's name.
        recipe: Name of a recipe that was taken instead of the data set's own; None: its own.

    Raises:
        BadInput: There is no such recipe; or its table has an unknown setting, or one with a value that is not allowed.
    """
    shorter = {
        "weights": "model:current",
        "epochs": max(1, int(settings.optim.epochs * WARM_EPOCHS)),
        "warmup_epochs": settings.optim.warmup_epochs * WARM_EPOCHS,
        "learning_rate": settings.optim.learning_rate * WARM_RATE,
        "first_mining": 1,
    }
    return settings.changed(**shorter | _chosen(dataset, recipe).get("warm", {}))


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with geostream, sorted."""
    names = [path.name for path in files("geostream").joinpath("recipes").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def _chosen(dataset: str, recipe: str | None) -> dict[str, Any]:
    """Return the content of a recipe chosen by name, else that of the data set's own; nothing where it has none."""
    names = recipe_names()
    if recipe is not None and recipe not in names:
        raise BadInput(f"recipe {recipe}: there is none of that name; there are {', '.join(names)}")
    name = recipe or dataset
    return _recipe(name) if name in names else {}


def _recipe(name: str) -> dict[str, Any]:
    """Return the content of a recipe. One with a ``base`` says only what differs from that recipe."""
    content = tomllib.loads(files("geostream").joinpath("recipes", f"{name}.toml").read_text())
    if "base" not in content:
        return content
    base = _recipe(content.pop("base"))
    return base | content | {"warm": base.get("warm", {}) | content.get("warm", {})}


def parse_settings(overrides: list[str], base: TrainSettings) -> TrainSettings:
    """Return settings that are changed by texts ``name=value``.

    Args:
        overrides: The texts, such as "batch_size=64". Values are JSON, or else plain text.
        base: The settings to change.

    Raises:
        BadInput: A text is no ``name=value``, a setting is unknown, or its value is not allowed.
    """
    values = base.flat()
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
    """Make settings from their values.

    Args:
        values: Values by the settings' own names, or groups of them.

    Raises:
        BadInput: A setting is unknown, or its value is not allowed; the message names each of them.
    """
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadInput(f"settings: {wrong}. Known settings: {', '.join(SETTINGS)}") from error

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from geostream import settings as settings_module
from geostream.errors import BadInput
from geostream.settings import (
    GROUPS,
    SETTINGS,
    TrainSettings,
    default_settings,
    make_settings,
    parse_settings,
    recipe_names,
    warm_settings,
)

# Read in the authors' train_vigor.py, train_cvusa.py, train_cvact.py, train_university.py and transforms.py.
SAMPLE4GEO: dict[str, Any] = {
    "model": "convnext_base.fb_in22k_ft_in1k_384",
    "weights": "timm",
    "tile_size": 384,
    "view_height": 384,
    "view_width": 768,
    "epochs": 40,
    "batch_size": 128,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "weight_decay": 0.01,
    "decay_all": True,
    "clip_value": 100.0,
    "label_smoothing": 0.1,
    "initial_temperature": 0.07,
    "flip_probability": 0.5,
    "rotate_probability": 0.75,
    "view_kind": "panorama",
    "color_jitter": 0.15,
    "jpeg_probability": 0.5,
    "blur_probability": 0.3,
    "dropout_probability": 0.3,
    "neighbours": 128,
    "first_mining": 4,
    "mine_every": 4,
    "evaluate_every": 4,
}
OF_DATASET: dict[str, dict[str, Any]] = {
    "vigor": {},
    "cvusa": {"view_height": 140},  # 768 · 224 / 1232
    "cvact": {"view_height": 140},
    "university1652": {
        "view_width": 384,
        "epochs": 1,
        "warmup_epochs": 0.1,
        "view_kind": "picture",
        "strategy": "random",
        "evaluate_every": 1,
    },
}


@pytest.mark.parametrize("dataset", OF_DATASET)
def test_recipes_are_sample4geos(dataset: str) -> None:
    settings = default_settings(dataset).flat()
    wanted = SAMPLE4GEO | OF_DATASET[dataset]
    assert {name: settings[name] for name in wanted} == wanted


@pytest.mark.parametrize("dataset", OF_DATASET)
def test_recipes_say_what_the_numbers_are_for(dataset: str) -> None:
    text = files("geostream").joinpath("recipes", f"{dataset}.toml").read_text()
    assert len(tomllib.loads(text)) > 20 and text.count("#") > 10
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("dataset", OF_DATASET)
def test_a_recipe_of_dinov3_differs_in_the_encoder_and_its_rates_alone(dataset: str) -> None:
    paper, chosen = default_settings(dataset).flat(), default_settings("own", f"{dataset}-dinov3").flat()
    changed = {name: value for name, value in chosen.items() if value != paper[name]}
    assert changed == {"model": "convnext_base.dinov3_lvd1689m", "learning_rate": 1e-4, "layer_decay": 0.93}


def test_every_recipe_loads_and_an_unknown_one_is_refused_with_those_there_are() -> None:
    assert {"vigor", "vigor-dinov3", "simcity"} <= set(recipe_names())
    for name in recipe_names():
        assert default_settings("own", name) == default_settings(name)
        assert warm_settings(default_settings(name), "own", name).model.weights == "model:current"
    with pytest.raises(BadInput) as told:
        default_settings("vigor", "vigr")
    assert "vigr" in str(told.value) and all(name in str(told.value) for name in recipe_names())
    with pytest.raises(BadInput, match="vigr"):
        warm_settings(TrainSettings(), "vigor", "vigr")


def test_a_recipe_with_a_base_says_only_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    for name, text in {
        "one": "epochs = 20\nbatch_size = 8\n[warm]\nepochs = 3\nmine_every = 2\n",
        "two": 'base = "one"\nbatch_size = 16\n[warm]\nepochs = 4\n',
        "three": 'base = "two"\nseed = 7\n',
    }.items():
        (tmp_path / "recipes" / f"{name}.toml").write_text(text)
    monkeypatch.setattr(settings_module, "files", lambda _: tmp_path)
    assert default_settings("any", "two") == TrainSettings().changed(epochs=20, batch_size=16)
    assert default_settings("three") == TrainSettings().changed(epochs=20, batch_size=16, seed=7)
    warm = warm_settings(TrainSettings(), "any", "three")
    assert (warm.optim.epochs, warm.plan.mine_every) == (4, 2)


def test_defaults_differ_from_vigors_recipe_in_the_weights_alone() -> None:
    assert default_settings("vigor").changed(weights="scratch") == TrainSettings()
    assert default_settings("a-dataset-of-ones-own") == TrainSettings()


def test_recipe_of_the_rendered_cities() -> None:
    assert default_settings("simcity").model.name == "test_convnext"


def test_overrides_by_name() -> None:
    texts = ["batch_size=64", "model=resnet18", "threads=null", "seed=3", 'model_options={"drop_path_rate": 0.1}']
    settings = parse_settings(texts, TrainSettings())
    assert (settings.optim.batch_size, settings.model.name, settings.threads, settings.seed) == (
        64,
        "resnet18",
        None,
        3,
    )
    assert settings.model.options == {"drop_path_rate": 0.1}


@pytest.mark.parametrize("dataset", OF_DATASET)
def test_every_value_of_a_recipe_can_be_overridden(dataset: str) -> None:
    settings = default_settings(dataset)
    plain = TrainSettings().changed(model="test_convnext", seed=7)
    texts = [f"{name}={json.dumps(value)}" for name, value in plain.flat().items()]
    assert parse_settings(texts, settings) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size", "name=value"),
        ("batchsize=3", "batchsize: .*Known settings: model, "),
        ("batch_size=one", "batch_size: .*integer"),
        ("epochs=0", "epochs: .*greater"),
        ("schedule=step", "schedule: .*'cosine'"),
        ("precision=fp8", "precision: .*'auto'"),
        ("micro_batch=0", "micro_batch: .*greater"),
    ],
)
def test_wrong_settings_are_named(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_settings([text], TrainSettings())


def test_stored_settings_come_back() -> None:
    settings = TrainSettings().changed(seed=5, lanes=4)
    assert make_settings(settings.model_dump()) == settings


def test_what_runs_stored_before_the_groups_loads() -> None:
    settings = TrainSettings().changed(model="resnet18", model_options={"drop_path_rate": 0.1}, batch_size=64, seed=5)
    assert make_settings(json.loads(json.dumps(settings.flat()))) == settings
    assert make_settings({"model": {"name": "resnet18"}, "batch_size": 64}).optim.batch_size == 64


def test_every_setting_says_what_it_means() -> None:
    for name, (group, field) in SETTINGS.items():
        assert (GROUPS[group] if group else TrainSettings).model_fields[field].description, name


def test_a_warm_start_is_shorter_and_begins_from_the_current_model() -> None:
    settings = TrainSettings().changed(epochs=9, batch_size=7)
    warm = warm_settings(settings, "a-dataset-of-ones-own")
    assert (warm.model.weights, warm.optim.epochs, warm.plan.first_mining) == ("model:current", 3, 1)
    assert warm.optim.learning_rate < settings.optim.learning_rate
    changed = {name for name, value in warm.flat().items() if value != settings.flat()[name]}
    assert changed == {"weights", "epochs", "warmup_epochs", "learning_rate", "first_mining"}
    assert warm_settings(settings.changed(epochs=1), "cvusa").optim.epochs == 1


def test_a_recipe_has_the_last_word_on_its_warm_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "own.toml"
    recipe.write_text("epochs = 20\n[warm]\nepochs = 3\nmine_every = 2\n")
    monkeypatch.setattr(settings_module, "files", lambda _: tmp_path)
    settings = default_settings("own")
    assert settings == TrainSettings().changed(epochs=20)
    warm = warm_settings(settings, "own")
    assert (warm.optim.epochs, warm.plan.mine_every, warm.model.weights) == (3, 2, "model:current")
    recipe.write_text("[warm]\nepoch = 3\n")
    with pytest.raises(BadInput, match="epoch: "):
        warm_settings(settings, "own")

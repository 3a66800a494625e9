from __future__ import annotations

import pytest

from geostream.errors import BadInput
from geostream.settings import TrainSettings, default_settings, make_settings, parse_settings


def test_defaults_are_sample4geos() -> None:
    settings = default_settings("vigor")
    assert settings == TrainSettings()
    assert (settings.batch_size, settings.learning_rate, settings.label_smoothing) == (128, 1e-3, 0.1)


def test_recipe_of_a_dataset() -> None:
    assert default_settings("simcity").model == "test_convnext"


def test_overrides_by_name() -> None:
    settings = parse_settings(["batch_size=64", "model=resnet18", "threads=null", "seed=3"], TrainSettings())
    assert (settings.batch_size, settings.model, settings.threads, settings.seed) == (64, "resnet18", None, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size", "write name=value"),
        ("batchsize=3", "batchsize: Extra inputs are not permitted.*Known settings: model, "),
        ("batch_size=one", "batch_size: Input should be a valid integer"),
        ("epochs=0", "epochs: Input should be greater"),
        ("schedule=step", "schedule: Input should be 'cosine'"),
    ],
)
def test_wrong_settings_are_named(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_settings([text], TrainSettings())


def test_stored_settings_come_back() -> None:
    settings = TrainSettings(seed=5, lanes=4)
    assert make_settings(settings.model_dump()) == settings

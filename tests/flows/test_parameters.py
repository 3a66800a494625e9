"""The schema by which Prefect's server checks parameters knows every option, its choices and bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows.parameters import AdapterOptions, Settings, ShardingOptions, given, narrowed
from flows.recluster import recluster
from flows.retrain import choose_settings, limit_name, retrain
from flows.shard import shard
from geostream.errors import BadInput
from geostream.settings import SETTINGS, TrainSettings, default_settings
from geostream.store import Store
from sharding import ADAPTERS, ShardOptions
from tests.helpers import tiny_layout

SCHEMAS = {flow.name: parameter_schema(flow).model_dump() for flow in (shard, retrain, recluster)}


@pytest.mark.parametrize(
    ("flow", "wrong", "named"),
    [
        ("shard", {"adapter": "vigr"}, "vigr"),
        ("shard", {"city": "huge"}, "huge"),
        ("shard", {"options": {"qualty": 90}}, "qualty"),
        ("shard", {"options": {"quality": 0}}, "quality"),
        ("shard", {"adapter_options": {"protocol": "x"}}, "adapter_options"),
        ("shard", {"adapter_options": {"protcol": "val"}}, "adapter_options"),
        ("shard", {"workers": 0}, "workers"),
        ("retrain", {"settings": {"batch_sze": 8}}, "batch_sze"),
        ("retrain", {"settings": {"batch_size": 1}}, "batch_size"),
        ("retrain", {"settings": {"strategy": "hard"}}, "hard"),
        ("retrain", {"nodes": 0}, "nodes"),
        ("recluster", {"epoch": 0}, "epoch"),
    ],
)
def test_what_is_wrong_is_refused_and_named(flow: str, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        validate(wrong, SCHEMAS[flow], raise_on_error=True)


@pytest.mark.parametrize(
    ("flow", "right"),
    [
        ("shard", {"adapter": "cvact", "adapter_options": {"protocol": "test"}, "options": {"tile_size": [64, 64]}}),
        ("shard", {"adapter": "vigor", "adapter_options": {"train_cities": ["Seattle"]}, "raw": None}),
        ("retrain", {"settings": TrainSettings().flat(), "layout": None, "processes": 2}),
        ("recluster", {"run": None}),
    ],
)
def test_what_is_right_is_taken(flow: str, right: dict[str, Any]) -> None:
    validate(right, SCHEMAS[flow], raise_on_error=True)


@pytest.mark.parametrize(
    ("adapter", "wrong", "named"),
    [
        ("vigor", {"adaptr": "vigor"}, "adaptr"),
        ("vigor", {"adapter_options": {"views": "drone"}}, "views"),
        ("university1652", {"adapter_options": {"train_cities": ["Seattle"]}}, "train_cities"),
        ("cvact", {"adapter_options": {"protocol": "cross-area"}}, "cross-area"),
        ("cvusa", {"adapter": "vigor"}, "vigor"),
    ],
)
def test_a_deployment_takes_its_own_adapters_options_alone(adapter: str, wrong: dict[str, Any], named: str) -> None:
    schema = narrowed(SCHEMAS["shard"], {"adapter": adapter})
    parameters: dict[str, Any] = {"adapter": adapter, "adapter_options": {}, "raw": None}
    validate(parameters, schema, raise_on_error=True)
    validate(parameters | {"adapter_options": None}, schema, raise_on_error=True)
    with pytest.raises(ValidationError, match=named):
        validate(parameters | wrong, schema, raise_on_error=True)


def test_every_option_of_the_adapter_stays_in_its_deployment() -> None:
    right = {"adapter": "university1652", "adapter_options": {"views": "drone"}, "options": {"quality": 80}}
    validate(right, narrowed(SCHEMAS["shard"], {"adapter": "university1652"}), raise_on_error=True)


@pytest.mark.parametrize("flow", ["retrain", "recluster"])
def test_no_deployment_takes_a_parameter_of_another_name(flow: str) -> None:
    schema = narrowed(SCHEMAS[flow], {})
    validate({"store": None, "dataset": "tiny"}, schema, raise_on_error=True)
    with pytest.raises(ValidationError, match="datset"):
        validate({"datset": "tiny"}, schema, raise_on_error=True)


def test_every_option_is_there_and_only_what_is_given_counts() -> None:
    assert set(Settings.model_fields) == set(SETTINGS)
    assert set(ShardingOptions.model_fields) == set(ShardOptions.__dataclass_fields__)
    assert len(get_args(AdapterOptions)) == len(ADAPTERS)
    some = {"batch_size": 8, "micro_batch": None}
    assert given(Settings.model_validate(some)) == some
    assert given(None) == {} == given(Settings())
    fields = [*Settings.model_fields.items(), *ShardingOptions.model_fields.items()]
    assert not [name for name, field in fields if not field.description]


def test_a_new_run_is_trained_by_the_recipe_that_is_named(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path))
    store = Store.open(tmp_path)

    def chosen(recipe: str | None, **given: Any) -> TrainSettings:
        return choose_settings(store, layout, "new", given, recipe, warm_start=True)

    assert chosen("vigor-dinov3", seed=3) == default_settings("vigor", "vigor-dinov3").changed(seed=3)
    assert chosen(None) == default_settings(layout.dataset)
    with pytest.raises(BadInput, match="vigr.*vigor-dinov3"):
        chosen("vigr")


def test_each_data_set_has_a_concurrency_limit_of_its_own() -> None:
    """Prefect refuses some characters in its name; data sets that differ in these alone must not share one."""
    names = {limit_name(f"s3://bucket/{folder}/vigor") for folder in ("ä", "ö", "a b", "a_b", "a-b")}
    assert len(names) == 5
    assert all(set("/%&>< ").isdisjoint(name) for name in names)

"""Describe the parameters of flows, so that wrong ones are refused when a flow run is created, not minutes later.

Prefect makes a JSON schema from a flow's signature. Its server checks parameters by it, and its form shows it. So
choices are literals here, and groups of options are models that allow no other names. The models are made from what the
library itself declares (:class:`~geostream.settings.TrainSettings`, :class:`~sharding.ShardOptions`, the adapters'
``read_places``), so that there is one declaration of each option.

The schema that Prefect makes takes parameters of any other name, and any adapter's options. :func:`narrowed` closes it
when a deployment is made (:mod:`flows.deploying`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from geostream.settings import GROUPS, SETTINGS, TrainSettings
from sharding import ADAPTERS, ShardOptions

City = Literal["small", "demo"]
StoreURL = Annotated[
    str | None, Field(description="s3://bucket/prefix or a folder; none: $GEOSTREAM_STORE of the worker")
]
Dataset = Annotated[str | None, Field(description="name in the store; none: the only one there")]
LayoutName = Annotated[str | None, Field(description="none: the current one")]
Cluster = Annotated[
    str | None,
    Field(description="tcp://… of a Dask scheduler; none: $DASK_SCHEDULER_ADDRESS of the worker; empty: no cluster"),
]

CHOICES: dict[str, Any] = {  # of the adapters' options, whose own annotations are plain texts
    "vigor.protocol": Literal["cross-area", "same-area"],
    "cvact.protocol": Literal["val", "test"],
    "university1652.views": Literal["drone", "street"],
    "university1652.join_alike": float,
    "gta-uav.protocol": Literal["cross-area", "same-area"],
    "cv-cities.train_cities": list[str],
    "cv-cities.test_cities": list[str],
    "photos.metres": float,
    "photos.overlap": float,
    "photos.test_share": float,
    "photos.block_metres": float,
    "vigor.train_cities": list[str],
    "vigor.test_cities": list[str],
}
#: Of the options of sharding, as ShardOptions checks them.
BOUNDS: dict[str, dict[str, Any]] = {
    "quality": {"ge": 1, "le": 100},
    "max_broken": {"ge": 0, "le": 1},
    "shard_bytes": {"ge": 1},
}


class Options(BaseModel):
    """Hold options by their names, and allow no others."""

    model_config = ConfigDict(extra="forbid")

    def given(self) -> dict[str, Any]:
        """Return those that were given, by name; those left out are not in it."""
        return self.model_dump(exclude_unset=True)


def given(options: Options | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return options as a dictionary of what was given: {} for None."""
    if options is None:
        return {}
    return options.given() if isinstance(options, Options) else dict(options)


def narrowed(schema: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flow's schema as a deployment has it: without other parameters, and without other adapters' options.

    Args:
        schema: as Prefect makes it of the flow's signature.
        parameters: of the deployment. Where they name an adapter, that one alone is allowed.
    """
    found = {**schema, "additionalProperties": False}
    adapter = parameters.get("adapter")
    if adapter not in ADAPTERS:
        return found
    properties = dict(schema["properties"])
    properties["adapter"] = {**properties["adapter"], "default": adapter, "enum": [adapter]}
    options = [{"$ref": f"#/definitions/{_options_name(adapter)}"}, {"type": "null"}]
    properties["adapter_options"] = {**properties["adapter_options"], "anyOf": options}
    others = {_options_name(other) for other in ADAPTERS if other != adapter}
    definitions = {name: one for name, one in schema["definitions"].items() if name not in others}
    return {**found, "properties": properties, "definitions": definitions}


def _options_name(adapter: str) -> str:
    """Return the name of the model of an adapter's options."""
    return f"{adapter.title().replace('-', '')}Options"


def _settings() -> type[Options]:
    """Return a model with each training setting by its own name, all of them optional."""
    found: dict[str, Any] = {}
    for name, (group, field) in SETTINGS.items():
        info = (GROUPS[group] if group else TrainSettings).model_fields[field]
        kind: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        found[name] = (kind | None, Field(None, description=info.description))
    return create_model("Settings", __base__=Options, __doc__="What differs from the data set's recipe.", **found)


def _shard_options() -> type[Options]:
    """Return a model of the options of sharding."""
    hints: dict[str, Any] = get_type_hints(ShardOptions)
    found: dict[str, Any] = {}
    for field in fields(ShardOptions):
        bounds, about = BOUNDS.get(field.name, {}), _described(ShardOptions, field.name)
        found[field.name] = (hints[field.name], Field(field.default, description=about, **bounds))
    return create_model("ShardingOptions", __base__=Options, __doc__="Options of sharding.", **found)


def _adapter_options(adapter: str) -> type[Options]:
    """Return a model of an adapter's options."""
    read = ADAPTERS[adapter].read
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(read).parameters.items():
        if name != "raw":
            kind = CHOICES.get(f"{adapter}.{name}", str) | None
            found[name] = (kind, Field(parameter.default, description=_described(read, name)))
    return create_model(_options_name(adapter), __base__=Options, __doc__=f"Options of the adapter {adapter}.", **found)


def _described(what: Any, name: str) -> str | None:
    """Return what a docstring says of an argument or attribute, in one line; None where it says nothing."""
    lines = (inspect.getdoc(what) or "").splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith(f"{name}: "):
            said = [line.strip().removeprefix(f"{name}: ")]
            for more in lines[number + 1 :]:
                if not more.startswith("        "):
                    break
                said.append(more.strip())
            return " ".join(said)
    return None


if TYPE_CHECKING:
    Adapter = str
    Settings = Options
    ShardingOptions = Options
    AdapterOptions = Options
else:
    Adapter = Literal[tuple(ADAPTERS)]
    Settings = _settings()
    ShardingOptions = _shard_options()
    AdapterOptions = Union[tuple(_adapter_options(name) for name in ADAPTERS)]  # noqa: UP007

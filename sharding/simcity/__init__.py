"""Render cities as the raw folders that data sets publish, for whoever has none of these at hand."""

from sharding.simcity.city import RenderSummary, main, render_cities
from sharding.simcity.plan import CitySpec

__all__ = ["CitySpec", "RenderSummary", "main", "render_cities"]

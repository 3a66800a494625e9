"""Prefect flows: thin. Each task calls one function of sharding or geostream, which runs as well without Prefect."""

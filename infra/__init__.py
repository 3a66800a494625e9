"""Run what geostream needs around it: a local S3, a local Prefect server and worker, containers, Kubernetes manifests.

Only the demo, the tests and ``make up`` import this; geostream and sharding do not.
"""

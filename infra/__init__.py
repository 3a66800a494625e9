"""What runs around geostream: a local S3, a local Prefect server and worker, containers and Kubernetes manifests.

Nothing in geostream or sharding imports this; only the demo, the tests and ``make up`` do.
"""

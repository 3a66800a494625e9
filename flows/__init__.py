"""Run sharding, training and reclustering as Prefect flows. Each task calls one function, which needs no Prefect."""

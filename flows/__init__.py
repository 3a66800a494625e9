"""Run sharding, training and reclustering as Prefect flows. Each task calls one function, which needs no Prefect."""

import logging
import os

# Prefect shows what these log on a flow run's page. Python's own default would keep back all that is below a warning.
for _name in filter(None, os.environ.get("PREFECT_LOGGING_EXTRA_LOGGERS", "").split(",")):
    logging.getLogger(_name.strip()).setLevel(logging.INFO)

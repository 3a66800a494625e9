"""Launch a run and wait for it, as the flow does: ``… STORE SETTINGS PROCESSES``. To be killed."""

from __future__ import annotations

import json
import sys

from geostream.layout import open_layout
from geostream.runs import launch
from geostream.runs.launch import Launch, Ranks
from geostream.settings import make_settings
from geostream.store import Store

if __name__ == "__main__":
    launch.MODULE = "tests.runs.launch_slowly"
    store = Store.open(sys.argv[1])
    settings = make_settings(json.loads(sys.argv[2]))
    ranks = Ranks(int(sys.argv[3]))

    def log(level: int, text: str, fields: object) -> None:
        print(text, flush=True)

    with Launch(store, open_layout(store), "one", settings, cluster=None, ranks=ranks, log=log, show=print) as launched:
        launched.wait()

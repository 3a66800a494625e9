"""Define the command ``serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from geostream.cli.options import Dataset, StoreUrl, open_store

LOOPBACK = "127.0.0.1"


def serve(
    store: StoreUrl,
    dataset: Dataset = None,
    index: Annotated[str | None, typer.Option(help="Name of the index; default: the only one.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The index that this promoted model has made: current, or its number.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in, and asks nobody who he is.")
    ] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8080,
) -> None:
    """Serve a page that shows on a map where photos were taken. It needs an index: geostream index."""
    from geostream.locating.choice import index_of_model
    from geostream.locating.locate import Locator
    from geostream.serving.app import make_app
    from geostream.serving.server import listen
    from geostream.serving.server import serve as run
    from geostream.serving.service import Service
    from geostream.serving.uploads import Limits

    listening = listen(host, port)  # first: it fails at once
    opened = open_store(store, write=False)
    if model is not None:
        index = index_of_model(opened, dataset, model, index)
    app = make_app(Service(Locator.open(opened, dataset=dataset, index=index), Limits()))
    address, number = listening.getsockname()[:2]
    url = f"http://[{address}]:{number}" if ":" in address else f"http://{address}:{number}"
    run(app, listening, lambda: print(f"{url} answers; Ctrl-C ends it", flush=True))

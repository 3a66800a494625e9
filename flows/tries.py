"""Count the tries of a training that brought nothing, so that one which never gets anywhere is given up.

A training that is cut off may be started again as often as it takes, as long as each try leaves a newer checkpoint than
the one before. The count lies in the run's folder on the store, ``tries.json``, so that it also counts tries whose
process, worker or machine was killed.
"""

from __future__ import annotations

from geostream.errors import GeostreamError, NotFound
from geostream.store import Store

FILE = "tries.json"
MOST = 4  # tries from one checkpoint


class GivenUp(GeostreamError):
    """A training was started again and again without a new checkpoint."""


def begin_try(run: Store) -> int:
    """Note that a try begins, and return how many have begun from the newest checkpoint, this one included.

    Args:
        run: the run's folder.

    Raises:
        GivenUp: there have been ``MOST`` already. The count begins anew, so a person can have it tried again.
        StoreError: the store cannot be read or written.
    """
    # As list_checkpoints, whose module takes seconds to import.
    whole = [name for name in run.folders("checkpoints") if run.exists(f"checkpoints/{name}/state.json")]
    newest = max(whole, default="")
    try:
        before = run.read_json(FILE)
    except NotFound:
        before = {}
    number = int(before.get("tries", 0)) + 1 if before.get("checkpoint") == newest else 1
    if number > MOST:
        run.delete(FILE)
        where = f"the checkpoint {newest}" if newest else "the start, before any checkpoint"
        raise GivenUp(
            f"{run.url}: given up after {MOST} tries from {where}; the log says what ended each. Once that is mended, "
            "retry the flow run"
        )
    run.write_json(FILE, {"checkpoint": newest, "tries": number})
    return number

"""Notice a forked child of a process that talks to object storage.

obstore's requests run on threads of its own, and threads do not survive a fork: in the child every request would wait
for ever. A child that was spawned, or comes from a fork server, begins anew and is fine.
"""

from __future__ import annotations

import os

from geostream.errors import ForkedProcess

_user: int | None = None  # id of the process that first used obstore, as the fork has copied it


def check_process(url: str) -> None:
    """Raise ForkedProcess where this process is a forked child of one that has used obstore."""
    global _user
    process = os.getpid()
    if _user is None:
        _user = process
    if _user != process:
        raise ForkedProcess(
            f"{url}: this process was forked from one that uses object storage, and cannot; start it with "
            "multiprocessing_context='forkserver' (DataLoader), or use geostream's Loader"
        )

"""Refuse to use object storage in a forked child of a process that has used it.

The library obstore runs requests on its own threads, and threads do not survive a fork: in the child every request
would wait for ever. A child that was spawned, or comes from a fork server, has no such problem.
"""

from __future__ import annotations

import os

from geostream.errors import ForkedProcess

_user: int | None = None  # id of the process that first used obstore; a forked child has its parent's


def check_process(url: str) -> None:
    """Check that this process may use object storage.

    Args:
        url: The store's URL, for the error.

    Raises:
        ForkedProcess: This process is a forked child of one that has used object storage.
    """
    global _user
    process = os.getpid()
    if _user is None:
        _user = process
    if _user != process:
        raise ForkedProcess(
            f"{url}: this process was forked from one that uses object storage, and cannot; start it with "
            "multiprocessing_context='forkserver' (DataLoader), or use geostream's Loader"
        )

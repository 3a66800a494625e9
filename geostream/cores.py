"""Count the processor's cores that this process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return how many cores this process may run on, at least 1.

    A container or a scheduler may have given it fewer than the machine has. Only Linux says so.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1

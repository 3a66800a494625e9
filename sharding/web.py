"""Ask web servers for files, patiently.

A request is repeated on dropped connections, 429 and 5xx, with growing pauses, or as long ones as the server says. A
server that still does not answer is an error, so that an outage never costs images.
"""

from __future__ import annotations

import os
from functools import lru_cache

import urllib3

from geostream.errors import Unanswered

TIMEOUT = urllib3.Timeout(connect=10.0, read=30.0)  # seconds without a byte
BUSY = (429, 500, 502, 503, 504)
RETRIES = urllib3.Retry(
    total=6, backoff_factor=0.25, backoff_max=8.0, backoff_jitter=0.25, status_forcelist=BUSY, raise_on_status=False
)
AGENT = "geostream (cross-view geo-localisation)"


def ask(method: str, url: str, shown: str, connections: int) -> urllib3.BaseHTTPResponse:
    """Send a request, and return the answer, whose status may say that there is no such file or no permission.

    Args:
        method: "GET" or "HEAD".
        url: where to.
        shown: the URL without secrets, for errors.
        connections: how many this process has to one server at most.

    Raises:
        Unanswered: no answer comes, or only that the server cannot answer now.
    """
    again = "what is finished is kept, run again to go on"
    try:
        answer = _connections(os.getpid(), connections).request(method, url)
    except urllib3.exceptions.HTTPError as error:
        # Other errors than that of the last try may quote the URL.
        said = " ".join(str(getattr(error, "reason", None) or type(error).__name__).split())
        raise Unanswered(f"{shown}: no answer ({said[:200]}); {again} when the server is up") from error
    if answer.status == 429 or answer.status >= 500:
        raise Unanswered(f"{shown}: {answer.status} {answer.reason}: the server is busy; {again}", "busy")
    return answer


@lru_cache(maxsize=2)
def _connections(process: int, at_most: int) -> urllib3.PoolManager:
    """Return this process's connections; a forked child makes its own."""
    agent = {"User-Agent": AGENT}
    return urllib3.PoolManager(16, agent, maxsize=at_most, block=True, timeout=TIMEOUT, retries=RETRIES)

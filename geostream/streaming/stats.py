"""Count what streaming costs: bytes, requests, waiting, and pairs replaced.

The fetcher and the loader count; the progress bar, the run's log and its report show the numbers. Counts of several
readers are added up, because each holds its own bytes and makes its own requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LISTED = 100  # replaced members that are listed one by one; all are counted


@dataclass(frozen=True)
class Replaced:
    """A pair that was replaced because one of its images is damaged, and its substitute."""

    step: int
    pair: str  # key of the place, and view
    member: str  # the damaged one, with its shard
    reason: str
    stand_in: str  # key of the place, and view


@dataclass
class StreamStats:
    """The counts since the epoch began or was resumed."""

    bytes_fetched: int = 0  # of all answers, repeated ones included
    bytes_used: int = 0  # of the members that batches need, each counted once
    requests: int = 0
    resident_bytes: int = 0  # held now, including reads under way
    peak_resident_bytes: int = 0
    budget_bytes: int = 0
    fetch_wait_seconds: float = 0.0  # that batches waited for bytes
    stall_seconds: float = 0.0  # that the training loop waited for batches
    retries: Counter[str] = field(default_factory=Counter)  # number of repeated reads by reason
    replaced_pairs: int = 0
    replaced: list[Replaced] = field(default_factory=list)  # the first LISTED of them

    @property
    def merged_read_bytes(self) -> float:
        """The mean number of bytes of a request."""
        return self.bytes_fetched / self.requests if self.requests else 0.0

    def count_replaced(self, one: Replaced) -> None:
        """Count a replaced pair, and list it if it is one of the first ``LISTED``."""
        self.replaced_pairs += 1
        if len(self.replaced) < LISTED:
            self.replaced.append(one)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as values for JSON, also while the fetcher's thread is counting."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        lists = {"retries": dict(self.retries), "replaced": [asdict(one) for one in self.replaced]}
        return values | lists | {"merged_read_bytes": round(self.merged_read_bytes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamStats:
        """Make counts from what :meth:`as_dict` returned."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        known |= {"retries": Counter(values["retries"]), "replaced": [Replaced(**one) for one in values["replaced"]]}
        return cls(**known)

    def copy(self) -> StreamStats:
        """Return a copy that no longer changes."""
        return StreamStats.total([self])

    @classmethod
    def total(cls, parts: Iterable[StreamStats]) -> StreamStats:
        """Add up the counts of several readers. Each holds its own bytes, so the peaks are added, too."""
        whole = cls()
        for part in parts:
            for name in cls.__dataclass_fields__:
                value = getattr(part, name)
                # Copied in one step, because the fetcher's thread may be counting.
                counts = Counter(dict(value)) if isinstance(value, Counter) else value
                setattr(whole, name, getattr(whole, name) + counts)
        whole.replaced = whole.replaced[:LISTED]
        return whole

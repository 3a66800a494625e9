"""What streaming cost so far, in numbers that a progress bar, a run's log and its report show.

Decides nothing; the fetcher and the loader count into it. Counts of several readers are added up, because each holds
bytes and makes requests of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LISTED = 100  # replaced members that are listed one by one; all are counted


@dataclass(frozen=True)
class Replaced:
    """A pair that was trained in another's place, because an image of that other one stayed bad."""

    step: int
    pair: str  # key of the place, and view
    member: str  # the bad one, with its shard
    reason: str
    stand_in: str  # key of the place, and view


@dataclass
class StreamStats:
    """Counts since the epoch's start, or since it was resumed. ``bytes_used`` counts a member once."""

    bytes_fetched: int = 0  # of all answers, also of those asked for again
    bytes_used: int = 0
    requests: int = 0
    resident_bytes: int = 0  # held now, reads under way included
    peak_resident_bytes: int = 0
    budget_bytes: int = 0
    fetch_wait_seconds: float = 0.0  # batches waited for bytes
    stall_seconds: float = 0.0  # whoever takes the batches waited for them
    retries: Counter[str] = field(default_factory=Counter)  # by reason
    replaced_pairs: int = 0
    replaced: list[Replaced] = field(default_factory=list)  # the first LISTED of them

    @property
    def merged_read_bytes(self) -> float:
        """Mean bytes of a request."""
        return self.bytes_fetched / self.requests if self.requests else 0.0

    def count_replaced(self, one: Replaced) -> None:
        self.replaced_pairs += 1
        if len(self.replaced) < LISTED:
            self.replaced.append(one)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. The fetcher's thread may be counting meanwhile."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        lists = {"retries": dict(self.retries), "replaced": [asdict(one) for one in self.replaced]}
        return values | lists | {"merged_read_bytes": round(self.merged_read_bytes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamStats:
        """What :meth:`as_dict` made."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        known |= {"retries": Counter(values["retries"]), "replaced": [Replaced(**one) for one in values["replaced"]]}
        return cls(**known)

    def copy(self) -> StreamStats:
        """As it stands now."""
        return StreamStats.total([self])

    @classmethod
    def total(cls, parts: Iterable[StreamStats]) -> StreamStats:
        """Of several readers together. Each holds its own bytes, so that peaks add up, too."""
        whole = cls()
        for part in parts:
            for name in cls.__dataclass_fields__:
                value = getattr(part, name)
                # Copied at one stroke, because the fetcher's thread may be counting meanwhile.
                counts = Counter(dict(value)) if isinstance(value, Counter) else value
                setattr(whole, name, getattr(whole, name) + counts)
        whole.replaced = whole.replaced[:LISTED]
        return whole

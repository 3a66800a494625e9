"""Share a plan with loader processes through files, of which each reads the rows that it needs.

A pickle would put the whole plan into every process, and twice into the trainer while it starts one. Files are written
to the temporary folder when a first process is started. They never have a name there, so nothing is left of them when
the last process that has them open has ended, however it ended. They are read and not mapped, because mapped pages
count as memory of the process. Shared memory would not do: Docker gives a container 64 MB of it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from tempfile import TemporaryFile
from typing import IO, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from geostream.arrays import Int16, Int32, Int64, Pairs, pair_codes
from geostream.errors import GeostreamError
from geostream.planning.plan import EpochPlan

WRITTEN = 2**16  # rows that are written at once
FOUND = 2**10  # batches whose pair ids are looked up at once
Number = TypeVar("Number", bound=np.integer[Any])


class SharedRows(Generic[Number]):
    """An array of n rows, which are read when they are asked for.

    The process that made it holds the array. A process that was started with it holds an open file. Sent in any other
    way, it takes the array along.

    Args:
        array: (n, ...) the array.
    """

    def __init__(self, array: npt.NDArray[Number]) -> None:
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Number] = array.dtype
        self._array: npt.NDArray[Number] | None = array
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> npt.NDArray[Number]:
        """Return one row."""
        one: npt.NDArray[Number] = self.take(range(row, row + 1))[0]
        return one

    def take(self, rows: range) -> npt.NDArray[Number]:
        """Return some rows, as an array that must not be written to."""
        if self._array is not None:
            return self._array[rows.start : rows.stop : rows.step]
        assert self._file is not None
        size = self.dtype.itemsize * math.prod(self.shape[1:])
        together = 1 if rows.step > 1 else max(len(rows), 1)  # rows that lie one after the other
        # pread, because several threads and processes have the file open at one position.
        parts = [os.pread(self._file.fileno(), together * size, row * size) for row in rows[::together]]
        taken: npt.NDArray[Number] = np.frombuffer(b"".join(parts), dtype=self.dtype)
        return taken.reshape(len(rows), *self.shape[1:])

    def __getstate__(self) -> dict[str, Any]:
        state = {"shape": self.shape, "dtype": self.dtype}
        if get_spawning_popen() is None:
            return state | {"array": self.take(range(len(self)))}
        if self._file is None:
            self._file = self._written()
        return state | {"file": reduction.DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shape, self.dtype, self._array = state["shape"], state["dtype"], state.get("array")
        self._file = None if "file" not in state else os.fdopen(state["file"].detach(), "rb", buffering=0)

    def _written(self) -> IO[bytes]:
        try:
            file = TemporaryFile(prefix="geostream-", buffering=0)  # noqa: SIM115  # closed with the last of its users
            for start in range(0, len(self), WRITTEN):
                rows = self.take(range(start, min(start + WRITTEN, len(self))))
                left = np.ascontiguousarray(rows).data.cast("B")
                while left:
                    left = left[file.write(left) :]
        except OSError as error:
            raise GeostreamError(
                f"cannot keep the plan for loader processes in a temporary file ({error.strerror or error}); "
                "name a folder with more room: TMPDIR=FOLDER"
            ) from error
        return file


@dataclass(frozen=True)
class PlanBatches:
    """The pairs of a plan: 10 bytes each where it was made, a file in loader processes."""

    place: SharedRows[np.int32]  # (B, batch size) place ids
    view: SharedRows[np.int16]  # (B, batch size) numbers of the views within their places
    pair: SharedRows[np.int32]  # (B, batch size) pair ids
    left_out_place: SharedRows[np.int32]  # the same of the L pairs that no batch holds
    left_out_view: SharedRows[np.int16]
    left_out_pair: SharedRows[np.int32]

    @classmethod
    def of(cls, plan: EpochPlan, pairs: Pairs) -> PlanBatches:
        """Look up the ids of a plan's pairs, all of which are in ``pairs``."""
        codes, pair = pair_codes(*pairs), np.empty(plan.place.shape, np.int32)
        for start in range(0, len(pair), FOUND):
            some = slice(start, start + FOUND)
            pair[some] = _ids(codes, plan.place[some], plan.view[some])
        left_out = _ids(codes, plan.left_out_place, plan.left_out_view)
        return cls(
            SharedRows(plan.place),
            SharedRows(plan.view),
            SharedRows(pair),
            SharedRows(plan.left_out_place),
            SharedRows(plan.left_out_view),
            SharedRows(left_out),
        )

    def __len__(self) -> int:
        return len(self.pair)


def _ids(codes: Int64, place: Int32, view: Int16) -> Int32:
    sought = pair_codes(place, view)
    order = np.argsort(sought, axis=None)  # looking up sorted codes takes a third of the time
    ids = np.empty(sought.shape, dtype=np.int32)
    ids.ravel()[order] = np.searchsorted(codes, sought.ravel()[order])
    return ids

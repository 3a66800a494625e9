"""Connect the ranks of a run: the processes that train one model together, one on each GPU, started by ``torchrun``.

Tensors go through torch's process group (NCCL between GPUs, gloo between CPUs). Everything else goes through the
key-value store that torchrun keeps anyway. This matters most while the others wait for the main rank, which may plan or
mine for hours: a waiting rank sleeps, receives signals, and has no timeout. A rank that ends with an error notes so in
the key-value store; the others then end too, and the error is shown once. A single rank needs none of this: its methods
return what they are given.

A rank whose machine or network is gone cannot note anything. So each rank increments a number of its own in the
key-value store every five seconds, and if one stands still for five minutes, the other ranks end.

The cost: waiting ranks look five times a second, so a stage that only the main rank does ends up to 0.2 s later for
them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from geostream.errors import BadInput, Stalled

COLLECTIVE_TIMEOUT = timedelta(hours=1)  # how long a rank waits for the others' tensors
MAX_POLL_INTERVAL = 0.2  # seconds between two looks at the key-value store while waiting
WATCH_INTERVAL = 1.0  # seconds between two looks of the watching threads
HEARTBEAT_INTERVAL = 5.0  # seconds between two heartbeats of a rank
HEARTBEAT_TIMEOUT = 300.0  # seconds without a heartbeat, after which a rank counts as lost
SHUTDOWN_TIMEOUT = 20.0  # seconds that a rank has to end by itself once another has ended
ENDED = "ended"  # key that counts the ranks that ended before the run did

logger = logging.getLogger(__name__)


class RankLost(Stalled):
    """Another rank ended before the run did; it reports the reason itself, if it can."""


class ProcessGroup:
    """Connect the ranks while the context is open; :meth:`current` makes the group for this process.

    All ranks must call the methods that exchange something together and in the same order.

    Args:
        rank: Number of this rank, from 0.
        ranks: Number of all ranks.
        local_rank: Number of this rank among those on this machine, from 0.
        local_ranks: Number of ranks on this machine.

    Raises:
        BadInput: There are more ranks on this machine than GPUs (on entry).
        RankLost: A rank ended without reporting a reason (on exit, or while waiting for it).
    """

    def __init__(self, rank: int = 0, ranks: int = 1, local_rank: int = 0, local_ranks: int = 1) -> None:
        self.rank, self.ranks, self.local_rank, self.local_ranks = rank, ranks, local_rank, local_ranks
        self._store: Store | None = None
        self._meetings = 0  # exchanges through the key-value store so far; the same on every rank
        self._shown: bool | None = None  # whether this rank was the first to end; None: it has not ended
        self._left = threading.Event()

    @classmethod
    def current(cls) -> ProcessGroup:
        """Return the group that torchrun's environment variables describe; without them, a single rank."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
            return cls()
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)))

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that plans, mines, evaluates and writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU if there is none."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def __enter__(self) -> ProcessGroup:
        if self.ranks == 1:
            return self
        made, *_ = next(rendezvous("env://", self.rank, self.ranks, timeout=COLLECTIVE_TIMEOUT))
        self._store = PrefixStore("geostream", made)
        try:
            backend = "gloo"
            if torch.cuda.is_available():
                backend = "cpu:gloo,cuda:nccl"
                if self.local_ranks > torch.cuda.device_count():
                    raise BadInput(
                        f"{self.local_ranks} ranks on a machine of {torch.cuda.device_count()} GPUs; start one for "
                        "each GPU, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
                    )
                torch.cuda.set_device(self.device)
            tensors = PrefixStore("tensors", made)
            dist.init_process_group(
                backend, store=tensors, rank=self.rank, world_size=self.ranks, timeout=COLLECTIVE_TIMEOUT
            )
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        heartbeats = _Heartbeats(PrefixStore("geostream", made), self.rank, self.ranks)
        threading.Thread(target=self._watch, args=(heartbeats,), name="geostream-ranks", daemon=True).start()
        threading.Thread(target=self._guard, args=(heartbeats,), name="geostream-ranks-guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave together; after an error, make all ranks end and one of them report it."""
        if self._store is None:
            return
        if error is None:
            self.barrier()
            self._left.set()
            # The key-value store may live in the main rank, so that one leaves last.
            self._store.set(f"left/{self.rank}", "")
            if self.is_main:
                self._wait([f"left/{rank}" for rank in range(self.ranks)])
            dist.destroy_process_group()
        elif not isinstance(error, SystemExit):
            if not self.ends_first():
                raise SystemExit(1) from error
            if is_loss(error):
                raise RankLost(
                    "a rank of this run ended without a word; start the same command again to go on from the newest "
                    "checkpoint"
                ) from error
        else:
            self.ends_first()

    def ends_first(self) -> bool:
        """Note that this rank ends before the run does; return whether it is the first, which reports the reason."""
        if self._shown is None:
            try:
                self._shown = self._store is None or self._store.add(ENDED, 1) == 1
            except RuntimeError:  # the key-value store is gone, with the process that kept it
                self._shown = False
        return self._shown

    # tensors

    def gather(self, tensor: Tensor) -> Tensor:
        """Collect the rows of all ranks on each rank.

        Args:
            tensor: (n, …), of the same shape on each rank.

        Returns:
            (ranks · n, …), in the order of the ranks, without gradient.
        """
        if self.ranks == 1:
            return tensor.detach()
        rows = tensor.new_empty((self.ranks * len(tensor), *tensor.shape[1:]))
        dist.all_gather_into_tensor(rows, tensor.detach().contiguous())
        return rows

    def collect(self, tensor: Tensor) -> Tensor | None:
        """Collect the rows of all ranks on the main rank.

        Args:
            tensor: (n, …), of the same shape on each rank.

        Returns:
            (ranks · n, …) in the order of the ranks on the main rank, None on the others.
        """
        if self.ranks == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.ranks)] if self.is_main else None
        dist.gather(tensor.contiguous(), parts)
        return None if parts is None else torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of all ranks, in place on each rank."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Take the mean of the tensors of all ranks, in place on each rank."""
        return self.sum(tensor).div_(self.ranks) if self.ranks > 1 else tensor

    def most(self, number: int) -> int:
        """Return the largest of the ranks' numbers; the exchange runs on the CPU and does not wait for a GPU."""
        if self.ranks == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    # all else

    def broadcast_object(self, value: Any) -> Any:
        """Send a value of the main rank to all ranks, which wait for it as long as it takes.

        Args:
            value: What JSON can hold; ignored on the other ranks.

        Returns:
            The main rank's value.

        Raises:
            RankLost: Another rank has ended.
        """
        if self._store is None:
            return value
        key = self._meeting()
        if self.is_main:
            self._store.set(key, json.dumps(value))
            return value
        self._wait([key])
        return json.loads(self._store.get(key))

    def collect_objects(self, value: Any) -> list[Any]:
        """Collect a value of each rank on the main rank.

        Args:
            value: What JSON can hold.

        Returns:
            The values in the order of the ranks on the main rank, an empty list on the others.

        Raises:
            RankLost: Another rank has ended.
        """
        if self._store is None:
            return [value]
        key = self._meeting()
        if not self.is_main:
            self._store.set(f"{key}/{self.rank}", json.dumps(value))
            return []
        others = [f"{key}/{rank}" for rank in range(1, self.ranks)]
        self._wait(others)
        values = [value, *(json.loads(self._store.get(other)) for other in others)]
        for other in others:
            self._store.delete_key(other)
        return values

    def barrier(self) -> None:
        """Wait until every rank has called this, as long as it takes.

        Raises:
            RankLost: Another rank has ended.
        """
        if self._store is not None:
            key = self._meeting()
            if self._store.add(f"{key}/here", 1) == self.ranks:
                self._store.set(key, "")
            self._wait([key])

    def _meeting(self) -> str:
        self._meetings += 1
        return f"meeting/{self._meetings}"

    def _wait(self, keys: list[str]) -> None:
        """Wait until all of the keys are in the key-value store; raise RankLost if another rank has ended."""
        store, pause = cast(Store, self._store), 0.001
        while not store.check(keys):
            if store.check([ENDED]):
                raise RankLost("another rank of this run ended")
            time.sleep(pause)
            pause = min(2 * pause, MAX_POLL_INTERVAL)

    def _watch(self, heartbeats: _Heartbeats) -> None:
        """End this process if another rank has ended and this one, waiting for its tensors, cannot notice."""
        store = cast(Store, self._store)
        try:
            while not store.check([ENDED]):
                if self._left.wait(WATCH_INTERVAL):
                    return
                if silent := heartbeats.after(WATCH_INTERVAL):
                    logger.error(
                        "no sign of life from rank %s for %.0f s", ", ".join(map(str, silent)), HEARTBEAT_TIMEOUT
                    )
                    self.ends_first()
        except RuntimeError:  # the key-value store is gone, with the process that kept it
            pass
        if not self._left.wait(SHUTDOWN_TIMEOUT):
            os._exit(1)

    def _guard(self, heartbeats: _Heartbeats) -> None:
        """End this process if the key-value store does not answer, because its machine or the network is gone."""
        seen, quiet = -1, 0.0
        while quiet <= HEARTBEAT_TIMEOUT:
            if self._left.wait(WATCH_INTERVAL):
                return
            seen, quiet = (seen, quiet + WATCH_INTERVAL) if heartbeats.given == seen else (heartbeats.given, 0.0)
        logger.error("no answer for %.0f s from %s, where the ranks meet", HEARTBEAT_TIMEOUT, os.environ["MASTER_ADDR"])
        os._exit(1)


class _Heartbeats:
    """The heartbeats of all ranks, as one of them sees them.

    What counts are seconds of watching, not the clock, so a rank that was suspended itself does not blame the others.
    """

    def __init__(self, store: Store, rank: int, ranks: int) -> None:
        self.given = 0  # heartbeats of this rank so far
        self._store, self._rank = store, rank
        self._seen = dict.fromkeys((other for other in range(ranks) if other != rank), 0)
        self._quiet = dict.fromkeys(self._seen, 0.0)
        self._since = HEARTBEAT_INTERVAL

    def after(self, seconds: float) -> list[int]:
        """Give a heartbeat and look for those of the others, every HEARTBEAT_INTERVAL seconds.

        Args:
            seconds: Time since the last call.

        Returns:
            Numbers of the ranks that count as lost.
        """
        self._since += seconds
        if self._since < HEARTBEAT_INTERVAL:
            return []
        waited, self._since = self._since, 0.0
        self._store.add(f"beat/{self._rank}", 1)
        for other, seen in self._seen.items():
            self._seen[other] = self._store.add(f"beat/{other}", 0)
            # A rank that has left a finished run gives no heartbeats.
            alive = self._seen[other] != seen or self._store.check([f"left/{other}"])
            self._quiet[other] = 0.0 if alive else self._quiet[other] + waited
        self.given += 1
        return [other for other, quiet in self._quiet.items() if quiet > HEARTBEAT_TIMEOUT]


def is_loss(error: BaseException) -> bool:
    """Return whether an error is one that a lost rank causes on the others."""
    return isinstance(error, RankLost | dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))

"""The stream on a store's bad days: whatever the faults, the epoch is the plan's, and the counters tell of them."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import pytest

from geostream.errors import GeostreamError, StoreError
from geostream.layout import Layout, open_layout
from geostream.planning.plan import EpochPlan
from geostream.store import Store
from geostream.streaming import transport
from geostream.streaming.dataset import plan_dataset
from geostream.streaming.loader import Loader
from geostream.streaming.options import ReadOptions
from geostream.streaming.pipeline import Batch
from geostream.streaming.stats import StreamStats
from infra.s3 import DEFAULT_PORTS, S3Server, start_s3, weed_binary
from tests.fault_proxy import FaultProxy, fault_proxy
from tests.helpers import tiny_layout
from tests.streaming.plans import SIZES, assert_as_planned, assert_same, hand_made_plan

BIT_BY_BIT = ReadOptions(look_ahead=2, prefetch=2)  # reads go on for as long as the epoch does
MEMBER_BY_MEMBER = ReadOptions(look_ahead=2, prefetch=2, gap_bytes=0)  # every byte read is one of an image
SEEN_AS = {
    "drop": "dropped",
    "cut": "dropped",
    "short": "short",
    "status": "busy",
    "flip": "checksum",
    "stall": "stalled",
}


@dataclass(frozen=True)
class Epoch:
    """A layout on the S3 server, a plan of it, and the batches that it should come to."""

    layout: Layout
    plan: EpochPlan
    undisturbed: list[Batch]

    @classmethod
    def write(cls, store: Store, places: int = 36) -> Epoch:
        layout = tiny_layout(store, places=places, places_per_shard=3)
        plan = hand_made_plan(layout, lanes=2)
        with Loader(plan_dataset(layout, plan, SIZES)) as loader:
            undisturbed = list(loader)
        assert_as_planned(undisturbed, plan, layout)
        return cls(layout, plan, undisturbed)

    def reopened(self) -> Layout:
        """The layout by a client that goes by the environment of now."""
        return open_layout(Store.open(self.layout.store.url.removesuffix("/tiny/layouts/g0")), "tiny", "g0")

    def loader(self, options: ReadOptions = BIT_BY_BIT, workers: int = 0) -> Loader:
        return Loader(plan_dataset(self.reopened(), self.plan, SIZES, options=options), workers=workers)

    def check(self, batches: list[Batch]) -> None:
        assert_as_planned(batches, self.plan, self.layout)
        assert_same(batches, self.undisturbed)

    def read(self, options: ReadOptions = BIT_BY_BIT, workers: int = 0) -> StreamStats:
        """Read it all and find it whole; what it cost."""
        with self.loader(options, workers) as loader:
            self.check(list(loader))
            assert loader.stats.replaced_pairs == 0
            assert loader.stats.bytes_used == self.undisturbed[-1].stats.bytes_used
            return loader.stats


@pytest.fixture(scope="module")
def epoch(s3: S3Server) -> Epoch:
    return Epoch.write(Store.open(f"{s3.url}/{uuid.uuid4().hex}"))


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between the server and all who go by the environment."""
    with fault_proxy(s3.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("geostream")]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that of an answer that breaks off something came."""
    monkeypatch.setattr("geostream.store.store.CHUNK", 256)


def shard_requests(proxy: FaultProxy) -> int:
    return sum(".tar" in request.path for request in proxy.requests)


def expected_retries(proxy: FaultProxy) -> dict[str, int]:
    """What a reader must have counted of the faults that befell it."""
    retries: dict[str, int] = {}
    for kind, number in proxy.met.items():
        if kind in SEEN_AS:
            retries[SEEN_AS[kind]] = retries.get(SEEN_AS[kind], 0) + number
    return retries


def one_line(error: pytest.ExceptionInfo[GeostreamError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


FAULTS: list[tuple[Any, dict[str, Any]]] = [
    ("drop", {}),
    ("drop", {"reset": True}),
    ("cut", {"part": 0.7}),
    ("cut", {"part": 0.3, "reset": True}),
    ("short", {}),
    ("status", {}),
    ("status", {"status": 429, "code": "TooManyRequests"}),
    ("status", {"status": 500, "code": "InternalError"}),
]


@pytest.mark.parametrize(
    ("kind", "parameters"), FAULTS, ids=["-".join(map(str, [kind, *more.values()])) for kind, more in FAULTS]
)
@pytest.mark.usefixtures("small_chunks")
def test_a_third_of_the_answers_fail(epoch: Epoch, proxy: FaultProxy, kind: Any, parameters: dict[str, Any]) -> None:
    proxy.inject(kind, share=0.3, seed=3, **parameters)
    stats = epoch.read()
    assert proxy.met[kind] > 3
    assert stats.retries == expected_retries(proxy)
    assert stats.requests == shard_requests(proxy)


def test_flipped_bytes_are_read_again(epoch: Epoch, proxy: FaultProxy) -> None:
    proxy.inject("flip", times=20, once=True)  # a member that stays bad is another matter
    stats = epoch.read(MEMBER_BY_MEMBER)
    assert stats.retries == {"checksum": proxy.met["flip"]} == {"checksum": 20}
    assert stats.requests == shard_requests(proxy)


def test_late_answers_are_waited_for(epoch: Epoch, proxy: FaultProxy) -> None:
    proxy.inject("delay", times=3, seconds=1.5)
    stats = epoch.read()
    assert stats.retries == {} and proxy.met == {"delay": 3}
    assert 1.2 < stats.fetch_wait_seconds <= stats.stall_seconds + 0.3


def test_silence_within_an_answer(epoch: Epoch, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geostream.store.s3.READ_TIMEOUT", timedelta(seconds=1))
    proxy.inject("stall", times=3)
    assert epoch.read().retries == {"stalled": 3} == expected_retries(proxy)


def test_an_answer_beyond_its_deadline(epoch: Epoch, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "REQUEST_TIMEOUT", 0.5)
    proxy.inject("delay", times=2, seconds=30)
    stats = epoch.read()
    assert stats.retries == {"stalled": 2}
    assert stats.fetch_wait_seconds < 5


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [0, 2])
def test_everything_at_once(epoch: Epoch, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    if not workers:
        monkeypatch.setattr("geostream.store.s3.READ_TIMEOUT", timedelta(seconds=1))
        proxy.inject("stall", times=2)
    proxy.inject("delay", times=2, seconds=0.5)
    for seed, (kind, parameters) in enumerate(FAULTS):
        proxy.inject(kind, share=0.04, seed=seed, **parameters)
    proxy.inject("flip", times=4, once=True)
    stats = epoch.read(MEMBER_BY_MEMBER, workers)
    assert len(proxy.met) == 7 - bool(workers)
    assert stats.retries == expected_retries(proxy)
    assert stats.requests == shard_requests(proxy)


def test_workers_go_by_the_environment_of_now(epoch: Epoch, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that they are forked from has been there since the first of them, and keeps what it was given."""
    epoch.read(workers=1)
    with fault_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        stats = epoch.read(workers=1)
        assert shard_requests(proxy) == stats.requests


def test_counters_may_be_read_while_they_count() -> None:
    """A reason that is met for the first time, while the loader's thread looks at what was met so far."""
    stats, done = StreamStats(), threading.Event()

    def count() -> None:
        while not done.is_set():
            for number in range(10):
                stats.retries[str(number)] += 1
            stats.retries.clear()

    switch = sys.getswitchinterval()
    counting = threading.Thread(target=count)
    counting.start()
    try:
        sys.setswitchinterval(1e-6)
        for _ in range(20_000):
            stats.copy()
            stats.as_dict()
    finally:
        sys.setswitchinterval(switch)
        done.set()
        counting.join()


class Server:
    """A server of a test's own that can be killed, and comes back where it was."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.running = folder, start_s3(folder)
        self._comeback: threading.Timer | None = None
        for name, value in self.running.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("infra.s3.choose_ports", lambda *_, **__: self.running.ports)

    def kill(self, away: float) -> None:
        """Without a warning. It is started again after so many seconds."""
        for process in self.running.child.family():
            process.kill()
        self._comeback = threading.Timer(away, self._start)
        self._comeback.start()

    def _start(self) -> None:
        self.running = start_s3(self.folder, credentials=self.running.credentials)

    def stop(self) -> None:
        if self._comeback:
            self._comeback.join()
        self.running.stop()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    own = Server(tmp_path, monkeypatch)
    yield own
    own.stop()


def test_the_server_is_killed_and_comes_back(server: Server) -> None:
    """Nothing is between it and the reader, who sees whatever a server says while it starts."""
    epoch = Epoch.write(Store.open(server.running.url))
    killed = server.running.child
    with epoch.loader(MEMBER_BY_MEMBER) as loader:
        batches = []
        for batch in loader:
            batches.append(batch)
            if batch.step == 2:
                server.kill(away=2)
        epoch.check(batches)
    assert not killed.running()
    assert loader.stats.retries["dropped"] > 3 and loader.stats.replaced_pairs == 0
    assert loader.stats.stall_seconds > 2


def test_a_store_that_is_gone_for_good(epoch: Epoch, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RETRY_DEADLINE", 2.0)
    taken = []
    with epoch.loader() as loader, pytest.raises(StoreError, match=r"after 2 s and \d+ tries$") as error:
        for batch in loader:
            taken.append(batch)
            proxy.upstream = "http://127.0.0.1:1"
            gone = time.monotonic()
    assert time.monotonic() - gone < 4
    assert re.match(rf"{re.escape(epoch.layout.store.url)}/shard-\d+\.tar: ", one_line(error))
    assert_same(taken, epoch.undisturbed[: len(taken)])
    assert loader.state_dict()["cursor"] == len(taken) > 0


def test_leaving_while_the_store_is_silent(epoch: Epoch, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RETRY_DEADLINE", 15.0)  # 120 s would do, and take long to fail
    with epoch.loader(ReadOptions(look_ahead=0, prefetch=0)) as loader:
        batches = iter(loader)
        next(batches)
        time.sleep(0.5)  # so many batches are made that no more are wanted
        proxy.inject("stall")
        next(batches)
        while not proxy.met["stall"]:  # the bytes of another are waited for
            time.sleep(0.01)
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 5


# who we are


class Identity(NamedTuple):
    """A user of the S3 server who may read."""

    key: str
    secret: str


@pytest.fixture(scope="module")
def users(s3: S3Server) -> Iterator[UserAdministration]:
    administration = UserAdministration(s3)
    yield administration
    administration.remove()


class UserAdministration:
    """Adds and removes keys on the real server, by SeaweedFS's own shell."""

    def __init__(self, s3: S3Server) -> None:
        self.s3, self.known = s3, list[Identity]()

    def add(self, number: int) -> list[Identity]:
        new = [Identity(secrets.token_hex(10).upper(), secrets.token_hex(20)) for _ in range(number)]
        self._tell(f"-user {one.key} -access_key {one.key} -secret_key {one.secret} -actions Read,List" for one in new)
        self.known += new
        return new

    def remove(self, *those: Identity) -> None:
        """Some of them; all when none is named."""
        gone = list(those or self.known)
        self._tell(f"-user {one.key} -delete" for one in gone)
        self.known = [one for one in self.known if one not in gone]

    def _tell(self, changes: Iterable[str]) -> None:
        ports = dict(zip(DEFAULT_PORTS, self.s3.ports, strict=True))
        at = [f"-{name}=127.0.0.1:{ports[f'{name}.port']}.{ports[f'{name}.port.grpc']}" for name in ("master", "filer")]
        told = subprocess.run(
            [weed_binary(), "shell", *at],
            input="".join(f"s3.configure {change} -apply\n" for change in changes),
            text=True,
            capture_output=True,
            timeout=30,
            check=True,
        )
        assert not told.stderr and "error" not in told.stdout, told


class CredentialProcess:
    """An AWS profile whose credentials a program hands out, which counts how often it was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._answer, self._asked = folder / "answer.json", folder / "asked"
        program = folder / "program.py"
        program.write_text(
            "import sys\n"
            f"open({str(self._asked)!r}, 'a').write('x')\n"
            f"sys.exit(1) if not (text := open({str(self._answer)!r}).read()) else print(text)\n"
        )
        config = folder / "config"
        config.write_text(f"[profile rotating]\ncredential_process = {sys.executable} -S -E {program}\n")
        use_profile(monkeypatch, AWS_CONFIG_FILE=config, AWS_SHARED_CREDENTIALS_FILE=folder / "none")

    @property
    def asked(self) -> int:
        return self._asked.stat().st_size if self._asked.exists() else 0

    def hand_out(self, identity: Identity, seconds: float) -> None:
        """From now on, and good for so many seconds from now."""
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        names = {"Version": 1, "AccessKeyId": identity.key, "SecretAccessKey": identity.secret}
        write_whole(self._answer, json.dumps(names | {"Expiration": until.isoformat()}))

    def fail(self) -> None:
        write_whole(self._answer, "")


def use_profile(monkeypatch: pytest.MonkeyPatch, **files: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, file in files.items():
        monkeypatch.setenv(name, str(file))
    monkeypatch.setenv("AWS_PROFILE", "rotating")


def write_whole(path: Path, text: str) -> None:
    """So that no reader finds half of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def keys_of_shard_requests(proxy: FaultProxy) -> list[str | None]:
    return [request.access_key for request in proxy.requests if ".tar" in request.path]


@pytest.mark.slow  # its seconds are too few for a machine that does something else, too
def test_credentials_are_renewed_before_they_expire(
    epoch: Epoch, proxy: FaultProxy, users: UserAdministration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = users.add(2)
    process = CredentialProcess(tmp_path, monkeypatch)
    process.hand_out(first, seconds=3)
    expired = time.monotonic() + 3
    with epoch.loader() as loader:
        batches = []
        for batch in loader:
            batches.append(batch)
            if batch.step == 1:
                process.hand_out(second, seconds=3600)
                time.sleep(max(expired - time.monotonic(), 0))
                proxy.refuse_key(first.key)
                asked = process.asked
        epoch.check(batches)
    keys = keys_of_shard_requests(proxy)
    assert keys == sorted(keys, key=lambda key: key == second.key) and set(keys) == {first.key, second.key}
    assert loader.stats.retries == {} and proxy.met == {}
    assert process.asked == asked + 1  # those of the second are good for an hour


def test_credentials_that_are_revoked_are_asked_for_anew(
    epoch: Epoch, proxy: FaultProxy, users: UserAdministration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = users.add(2)
    process = CredentialProcess(tmp_path, monkeypatch)
    process.hand_out(first, seconds=3600)
    with epoch.loader() as loader:
        batches = []
        for batch in loader:
            batches.append(batch)
            if batch.step == 1:
                asked = process.asked
                process.hand_out(second, seconds=3600)
                users.remove(first)
        epoch.check(batches)
    assert process.asked > asked
    assert set(keys_of_shard_requests(proxy)) == {first.key, second.key}
    assert loader.stats.retries.keys() == {"refused"}


def test_a_credential_process_that_fails_for_a_moment(
    epoch: Epoch, proxy: FaultProxy, users: UserAdministration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = users.add(2)
    process = CredentialProcess(tmp_path, monkeypatch)
    process.hand_out(first, seconds=3600)
    with epoch.loader() as loader:
        batches = []
        for batch in loader:
            batches.append(batch)
            if batch.step == 1:
                process.fail()
                proxy.refuse_key(first.key)
                Timer(0.4, process.hand_out, [second, 3600]).start()
        epoch.check(batches)
    assert loader.stats.retries["refused"] > 0


@pytest.mark.parametrize("status", [400, 403])
def test_a_credentials_file_that_another_process_writes_anew(
    epoch: Epoch,
    proxy: FaultProxy,
    users: UserAdministration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    """It says nothing of when its credentials expire: only the refusal does."""
    first, second = users.add(2)
    file = tmp_path / "credentials"

    def write(one: Identity) -> None:
        write_whole(file, f"[rotating]\naws_access_key_id = {one.key}\naws_secret_access_key = {one.secret}\n")

    write(first)
    use_profile(monkeypatch, AWS_SHARED_CREDENTIALS_FILE=file, AWS_CONFIG_FILE=tmp_path / "none")
    with epoch.loader() as loader:
        batches = []
        for batch in loader:
            batches.append(batch)
            if batch.step == 1:
                proxy.refuse_key(first.key, status)
                Timer(0.3, write, [second]).start()
        epoch.check(batches)
    assert loader.stats.retries == {"refused": proxy.met["refused"]}
    assert keys_of_shard_requests(proxy)[-1] == second.key


def test_credentials_that_stay_refused(epoch: Epoch, proxy: FaultProxy, s3: S3Server) -> None:
    with epoch.loader() as loader, pytest.raises(StoreError, match="ExpiredToken") as error:
        for _ in loader:
            proxy.refuse_key(s3.credentials.key)
    assert one_line(error).startswith(f"{epoch.layout.store.url}/shard-")


# what is stored is not what was committed


@pytest.mark.parametrize("change", [-600, -20_000, 512])
def test_a_shard_of_another_length_ends_the_epoch(s3_store: Store, change: int) -> None:
    epoch = Epoch.write(s3_store, places=12)
    shard = epoch.layout.store.read("shard-00002.tar")
    epoch.layout.store.write("shard-00002.tar", shard[:change] if change < 0 else shard + bytes(change))
    with epoch.loader() as loader, pytest.raises(StoreError) as error:
        list(loader)
    found = re.escape(f"{epoch.layout.store.url}/shard-00002.tar: {len(shard) + change} bytes ")
    assert re.match(rf"{found}.* {len(shard)}; ", one_line(error))


def test_a_shard_that_is_gone_ends_the_epoch(s3_store: Store) -> None:
    epoch = Epoch.write(s3_store, places=12)
    epoch.layout.store.delete("shard-00002.tar")
    with epoch.loader() as loader, pytest.raises(StoreError) as error:
        list(loader)
    assert one_line(error).startswith(f"{epoch.layout.store.url}/shard-00002.tar: ")


@pytest.mark.parametrize("limit", [0.01, 0.25])
def test_a_shard_that_became_another_of_its_length(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """Each of its three pairs is replaced, where so many may be."""
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.01)
    epoch = Epoch.write(s3_store, places=12)
    url = f"{epoch.layout.store.url}/shard-00002.tar"
    epoch.layout.store.write("shard-00002.tar", bytes(int(epoch.layout.shard_sizes[2])))
    with epoch.loader(ReadOptions(replaced_limit=limit)) as loader:
        if limit == 0.01:
            with pytest.raises(StoreError, match="2 pairs ") as error:
                list(loader)
            assert re.search(rf"alpha-000[678] in {re.escape(url)}: .*checksum", one_line(error))
            return
        batches = list(loader)
    stats = loader.stats
    assert [batch.tensors["pair"].shape for batch in batches] == [(3,)] * epoch.plan.n_batches
    assert stats.replaced_pairs == len(stats.replaced) == 3
    assert {one.pair.split()[0] for one in stats.replaced} == {"alpha-0006", "alpha-0007", "alpha-0008"}
    assert all(url in one.member for one in stats.replaced)
    assert stats.retries["checksum"] >= 3 * 3 * 2  # two images of three pairs, three times each
    bad = {(one.step, one.pair.split()[0]) for one in stats.replaced}
    keys = epoch.layout.keys
    for batch, planned, whole in zip(batches, epoch.plan.place, epoch.undisturbed, strict=True):
        for row, place in enumerate(planned.tolist()):
            stayed = batch.tensors["pair"][row] == whole.tensors["pair"][row]
            assert bool(stayed) is ((batch.step, keys[place]) not in bad)

"""Ranks reach each other, and where one ends all end, with one word."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from geostream.training.distributed import ProcessGroup
from tests.training.ranks import TOLD, ended, start_ranks

PROGRAM = str(Path(__file__).with_name("group_program.py"))


def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    codes, output = ended(start_ranks([PROGRAM, str(tmp_path), "tell"]))
    assert codes == [0, 0], output
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("waited") >= 0.4 > other.pop("waited")
    assert first == {
        "gather": [[0, 0, 1, 1], [4, 3], False],
        "collect": [0, 1],
        "sum": [2, 1],
        "mean": [1, 0.5],
        "most": 10,
        "broadcast": {"rank": 0, "none": None},
        "collect_objects": [[0], [1]],
        "device": "cpu",
    }
    assert other == first | {"collect": None, "collect_objects": []}


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("the first, waited for", "all")]


@pytest.mark.parametrize("how", ["the other, in a step", *SLOW])
def test_an_error_ends_all_and_is_told_once(tmp_path: Path, how: str) -> None:
    codes, output = ended(start_ranks([PROGRAM, str(tmp_path), how]))
    assert codes == [1, 1], output
    assert "".join(output) == f"{TOLD}the disk is on fire\n"


@pytest.mark.slow
def test_a_rank_that_ends_without_a_word_ends_all(tmp_path: Path) -> None:
    codes, output = ended(start_ranks([PROGRAM, str(tmp_path), "killed"]))
    assert codes == [1, -9], output
    assert output[0].startswith(f"{TOLD}a rank of this run ended without a word; start the same command again")


@pytest.mark.slow
@pytest.mark.parametrize(("silent", "who"), [("the first", "rank 0|where the ranks meet"), ("the other", "rank 1")])
def test_a_rank_that_falls_silent_ends_the_others(tmp_path: Path, silent: str, who: str) -> None:
    first, other = start_ranks([PROGRAM, str(tmp_path), f"silent, {silent}"])
    stopped, left = (first, other) if silent == "the first" else (other, first)
    try:
        output, _ = left.communicate(timeout=100)
    finally:
        stopped.kill()
        stopped.communicate()
    assert left.returncode == 1 and re.search(f"no .*({who})", output), output


def test_one_rank_is_given_back_what_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with ProcessGroup.current() as group:
        rows = torch.ones(2, 3, requires_grad=True)
        assert (group.rank, group.ranks, group.is_main) == (0, 1, True)
        assert torch.equal(group.gather(rows), rows) and not group.gather(rows).requires_grad
        assert group.collect(rows) is rows and group.sum(rows) is rows and group.mean(rows) is rows
        assert group.most(7) == 7 and group.broadcast_object("x") == "x" and group.collect_objects(3) == [3]
        group.barrier()
    with pytest.raises(ZeroDivisionError), ProcessGroup.current():
        raise ZeroDivisionError

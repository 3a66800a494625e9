"""``make week``: three weeks of operation by deployments alone, with a kill, a rejected model and a way back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.week import own_folder
from geostream.errors import BadInput
from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_three_weeks(tmp_path: Path) -> None:
    out = tmp_path / "week"
    command = [sys.executable, "-m", "flows.week", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((out / "summary.json").read_text())
    assert found["models"] == {"week 1": 1, "week 2": 2, "week 3": 2, "rolled back": 1}
    assert found["read_to_new"] <= 1.1 and found["written_to_new"] <= 1.1
    assert found["warm_to_scratch_seconds"] <= 0.4
    decisions = [row["decision"] for row in found["rows"] if "decision" in row]
    assert decisions == ["promoted", "promoted", "not compared", "rejected"]


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match=re.escape(str(tmp_path))):
        own_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

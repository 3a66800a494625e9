"""The product of int8 that torch's library gives, against NumPy's."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.mining import int8

product = int8.load()
needs_product = pytest.mark.skipif(product is None, reason="this processor has no fast int8 product")


@needs_product
@settings(deadline=None)
@given(seed=st.integers(0, 2**32), m=st.integers(1, 70), n=st.integers(1, 70), k=st.integers(1, 600))
def test_it_is_the_product(seed: int, m: int, n: int, k: int) -> None:
    assert product is not None
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-128, 128, (m, k), dtype=np.int8), rng.integers(-128, 128, (n, k), dtype=np.int8)
    out = np.empty((m, n), dtype=np.int32)
    product(a, b, out)
    assert np.array_equal(out, a.astype(np.int64) @ b.T.astype(np.int64))


@needs_product
def test_other_arrays_are_refused() -> None:
    """Their memory would be read, or written, beyond its end."""
    assert product is not None
    a, out = np.zeros((4, 8), dtype=np.int8), np.zeros((4, 4), dtype=np.int32)
    for wrong in ((a, a[:, :7], out), (a, a, out[:3]), (a, a[::2], out), (a[:, ::2], a[:, ::2], out)):
        with pytest.raises(ValueError, match="cannot write|C-contiguous"):
            product(*wrong)
    with pytest.raises(ValueError, match="wanted C-contiguous int32, got int64"):
        product(a, a, out.astype(np.int64))  # type: ignore[arg-type]


@pytest.mark.slow
@needs_product
def test_it_needs_no_torch_and_does_not_disturb_it() -> None:
    """In a process of its own: torch is not imported for it, works when it is, and keeps its threads."""
    code = """
import sys
from geostream.mining import int8
import numpy as np
a, out = np.ones((4, 8), np.int8), np.zeros((4, 4), np.int32)
int8.load()(a, a, out)
assert "torch" not in sys.modules and out.tolist() == [[8] * 4] * 4
import torch
torch.set_num_threads(2)
int8.load()(a, a, out)
assert torch.get_num_threads() == 2
assert (torch.ones(3, 3) @ torch.ones(3, 3)).tolist() == [[3.0] * 3] * 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (None, ModuleSpec("torch", None, origin="/nowhere/torch/__init__.py")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert int8.load.__wrapped__() is None

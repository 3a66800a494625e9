"""The product of int8 matrices, four times as fast as that of float32 where the processor has the instructions for it.

torch has such a product, but importing torch takes 340 MB, as much as a whole search; its library alone takes 70 MB and
is called through the C interface that it keeps stable for compiled models (torch/csrc/inductor/aoti_torch/c/shim.h).
Where processor or library are others there is no product, and the search does without. NumKong's product, which needs
no torch, reached 230 of the 390 giga-operations a second of a core here (float32: 97), too few to gain by.
"""

from __future__ import annotations

import ctypes
import importlib.util
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from geostream.arrays import Int32

Int8 = npt.NDArray[np.int8]

INSTRUCTIONS = {"avx512_vnni", "avx_vnni"}  # without them the product is right, but slow


class Product:
    """``product(a, b, out)`` writes a · bᵀ to ``out``: (M, K) and (N, K) int8, (M, N) int32. On one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._tensor = library.aoti_torch_create_tensor_from_blob
        self._tensor.argtypes = [
            ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64),
            ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p),
        ]  # fmt: skip
        self._delete = library.aoti_torch_delete_tensor_object
        self._delete.argtypes = [ctypes.c_void_p]
        self._multiply = library.aoti_torch_cpu__int_mm_out
        self._multiply.argtypes = [ctypes.c_void_p] * 3
        self._threads, self._set_threads = library.omp_get_max_threads, library.omp_set_num_threads
        self._cpu = int(library.aoti_torch_device_type_cpu())
        self._dtype = {
            np.dtype(np.int8): int(library.aoti_torch_dtype_int8()),
            np.dtype(np.int32): int(library.aoti_torch_dtype_int32()),
        }

    def __call__(self, a: Int8, b: Int8, out: Int32) -> None:
        """All C-contiguous. Raises ValueError for other arrays."""
        if (len(a), len(b), a.shape[1]) != (*out.shape, b.shape[1]):
            raise ValueError(f"cannot write {a.shape} · {b.shape}ᵀ to {out.shape}")
        for array, dtype in ((a, np.int8), (b, np.int8), (out, np.int32)):
            if array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(f"wanted C-contiguous {np.dtype(dtype)}, got {array.dtype}")
        tensors: list[ctypes.c_void_p] = []
        threads = self._threads()
        self._set_threads(1)  # of this thread: Dask has as many task threads as cores
        try:
            for array in (out, a, b.T):
                tensors.append(self._view(array))
            self._checked(self._multiply(*tensors))
        finally:
            self._set_threads(threads)
            for tensor in tensors:
                self._delete(tensor)

    def _view(self, array: npt.NDArray[np.integer]) -> ctypes.c_void_p:
        """A tensor of the array's memory, which must outlive it."""
        tensor = ctypes.c_void_p()
        numbers = ctypes.c_int64 * array.ndim
        strides = numbers(*(stride // array.itemsize for stride in array.strides))
        self._checked(
            self._tensor(
                array.ctypes.data, array.ndim, numbers(*array.shape), strides, 0, self._dtype[array.dtype],
                self._cpu, 0, ctypes.byref(tensor),
            )
        )  # fmt: skip
        return tensor

    @staticmethod
    def _checked(code: int) -> None:
        if code:
            raise RuntimeError("torch's library refused an int8 product")


@cache
def load() -> Product | None:
    """The product, where there is one and it multiplies rightly."""
    with suppress(OSError, AttributeError, RuntimeError, ValueError):  # no such file, library, function, package
        flags = Path("/proc/cpuinfo").read_text().split()
        torch = importlib.util.find_spec("torch")
        if INSTRUCTIONS.isdisjoint(flags) or torch is None or torch.origin is None:
            return None
        product = Product(ctypes.CDLL(str(Path(torch.origin).parent / "lib" / "libtorch_cpu.so")))
        rng = np.random.default_rng(0)
        a, b = (rng.integers(-128, 128, (n, 70), dtype=np.int8) for n in (30, 50))
        out = np.empty((30, 50), dtype=np.int32)
        product(a, b, out)
        return product if np.array_equal(out, a.astype(np.int32) @ b.T.astype(np.int32)) else None
    return None

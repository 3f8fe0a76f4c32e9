"""Large result buffers on huge pages: the first touch of fresh memory costs more than the arithmetic that fills it."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21
# Two of them: a smaller buffer may hold no whole one.
_LEAST_BYTES = 2 * _HUGE_PAGE


def empty_like(like: Tensor) -> Tensor:
    """`torch.empty_like`, contiguous, with its memory advised to be huge pages where the system has them.

    Only a hint about our own fresh buffer: where the kernel does not take it, nothing changes.
    """
    fresh = torch.empty_like(like, memory_format=torch.contiguous_format)
    advise = _madvise()
    if advise is not None and fresh.nbytes >= _LEAST_BYTES:
        start = -(-fresh.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        whole = (fresh.data_ptr() + fresh.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
        advise(start, whole, mmap.MADV_HUGEPAGE)
    return fresh


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone has it
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function

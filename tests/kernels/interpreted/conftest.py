"""What every interpreted check gets: outputs poisoned and fenced with NaN, launches counted, traffic counted by tensor.

The files here are run by `tests/kernels/test_triton_interpreter.py` in a process of their own, since TRITON_INTERPRET
is read when a kernel is decorated. Their names keep a plain `pytest` from collecting them.
"""

import os
from collections import Counter

import numpy as np
import pytest
import torch

FENCE = 64
_launches: Counter[str] = Counter()


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("these checks need TRITON_INTERPRET=1")
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        _launches[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counted


def pytest_terminal_summary(terminalreporter):
    for name, count in sorted(_launches.items()):
        terminalreporter.write_line(f"launched {name} {count}")


@pytest.fixture(autouse=True)
def _fenced_outputs(monkeypatch):
    """torch.empty and its kin give NaN (or a huge integer) between two fences; nobody may write the fences."""
    fences = []
    real_empty = torch.empty

    def poisoned(*shape, dtype=None, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = dtype or torch.get_default_dtype()
        n = int(np.prod(shape))
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        buffer = real_empty(n + 2 * FENCE, dtype=dtype, device=device).fill_(poison)
        fences.append((buffer[:FENCE], buffer[FENCE + n :]))
        return buffer[FENCE : FENCE + n].view(tuple(shape))

    real_new_empty = torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, **for_the_interpreter):
        if for_the_interpreter:
            return real_new_empty(self, *shape, dtype=dtype, **for_the_interpreter)
        return poisoned(*shape, dtype=dtype or self.dtype, device=self.device)

    def empty_like(tensor, **_):
        return poisoned(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for pair in fences:
        for fence in pair:
            poison = fence.isnan() if fence.dtype.is_floating_point else fence == torch.iinfo(fence.dtype).max
            assert poison.all(), "a kernel wrote outside its output"


def _fenced(tensor, strided=False):
    """The same values amid NaN that only a read outside the tensor would see; strided: NaN between the rows too."""
    if not strided:
        poison = float("nan") if tensor.dtype.is_floating_point else 0
        buffer = torch.full((tensor.numel() + 2 * FENCE,), poison, dtype=tensor.dtype)
        view = buffer[FENCE : FENCE + tensor.numel()].view(tensor.shape)
    else:
        buffer = torch.full([size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
        view = buffer[tuple(slice(1, size + 1) for size in tensor.shape)]
    view.copy_(tensor)
    return view


@pytest.fixture
def fenced():
    return _fenced


class Traffic:
    """Bytes that kernels moved from and to global memory."""

    def __init__(self):
        self.loads = []
        self.stores = []

    @staticmethod
    def _bytes(accesses, tensor):
        if tensor is None:
            return sum(addresses.size * size for addresses, size in accesses)
        low = tensor.untyped_storage().data_ptr()
        high = low + tensor.untyped_storage().nbytes()
        return sum(int(((a >= low) & (a < high)).sum()) * size for a, size in accesses)

    def loaded(self, tensor=None):
        return self._bytes(self.loads, tensor)

    def stored(self, tensor=None):
        return self._bytes(self.stores, tensor)


@pytest.fixture
def traffic(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    counted = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def live(pointers, mask):
        return np.atleast_1d(pointers.data)[
            np.broadcast_to(np.atleast_1d(mask.data), np.atleast_1d(pointers.data).shape)
        ]

    def counted_load(self, pointers, mask, *rest):
        counted.loads.append((live(pointers, mask), pointers.get_element_ty().primitive_bitwidth // 8))
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        counted.stores.append((live(pointers, mask), pointers.get_element_ty().primitive_bitwidth // 8))
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return counted

"""Which backend a call takes: one pure function, decided before autograd by device and dtype, never by values."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "cpu", "triton"]
BACKENDS = ("auto", "reference", "cpu", "triton")

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """A backend's name and, in one line, why it was chosen."""

    backend: str
    reason: str


def resolve(
    requested: str, device: str, dtype: torch.dtype, triton: str | None, *, linear: bool = False, native: bool = False
) -> Choice:
    """The backend of a call, by a pure function of its arguments.

    Args:
        requested: one of `BACKENDS`.
        device: the logits' device type, ``cpu``, ``cuda`` (ROCm too) or another.
        dtype: the logits' dtype.
        triton: ``None`` where Triton is not installed, ``interpreter`` under ``TRITON_INTERPRET=1``, else ``compiler``.
        linear: whether the call is `linear_softmax_confidence`, whose kernels have no float64.
        native: whether the CPU's own kernels, which take float32, could be compiled.

    Raises:
        ValueError: the requested backend is unknown, or cannot serve this device and dtype.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {requested!r}")
    unmet = {
        "cpu": _unmet_cpu(device, dtype),
        "triton": _unmet_triton(device, dtype, triton, linear),
        "reference": None,
    }
    if requested != "auto":
        reason = unmet[requested]
        if reason is not None:
            available = ", ".join(repr(name) for name, why_not in unmet.items() if why_not is None)
            raise ValueError(f"backend {requested!r} cannot serve this call: {reason}; available: {available}")
        return Choice(requested, "asked for")
    if unmet["cpu"] is None:
        compiled = native and dtype == torch.float32 and not linear
        how = "compiled kernels" if compiled else "chunked passes with the analytic gradient"
        return Choice("cpu", f"{_name(dtype)} logits on a CPU: {how}")
    if unmet["triton"] is None and device == "cuda":
        return Choice("triton", f"{_name(dtype)} logits on a GPU: fused Triton kernels")
    return Choice("reference", f"plain PyTorch, because {unmet['triton'] if device == 'cuda' else unmet['cpu']}")


def choose(requested: str, logits: Tensor, *, linear: bool = False, native: bool = False) -> Choice:
    """`resolve` for these logits (or embeddings) on this machine."""
    recorded = _recorded()
    if recorded is not None:
        if requested not in ("auto", "reference"):
            raise ValueError(f"backend {requested!r} cannot serve {recorded}: leave it 'auto'")
        return Choice("reference", f"plain PyTorch, because no operator of ours survives {recorded}")
    return resolve(requested, logits.device.type, logits.dtype, triton_state(), linear=linear, native=native)


@functools.cache
def triton_state() -> str | None:
    """None where Triton is not installed, else ``interpreter`` or ``compiler``; does not import it."""
    if importlib.util.find_spec("triton") is None:
        return None
    return "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "compiler"


def _recorded() -> str | None:
    """What records this call and can only repeat PyTorch's own operations, if anything does."""
    if torch.compiler.is_compiling():
        return "torch.func inside torch.compile" if torch._C._are_functorch_transforms_active() else None
    return "torch.jit.trace" if torch._C._is_tracing() else None


def _unmet_cpu(device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return f"the logits are on {device!r}, not on 'cpu'"
    return None if dtype in _DTYPES else f"it has no {_name(dtype)}"


def _unmet_triton(device: str, dtype: torch.dtype, triton: str | None, linear: bool) -> str | None:
    if triton is None:
        return "Triton is not installed"
    if device != "cuda" and triton != "interpreter":
        return f"the logits are on {device!r}, and Triton needs a GPU (or TRITON_INTERPRET=1)"
    missing = dtype not in _DTYPES or (linear and dtype == torch.float64)
    return f"it has no {_name(dtype)}" if missing else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

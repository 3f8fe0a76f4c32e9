"""How a Triton kernel is launched: a pure function of shape, dtype and chip, so that no first call ever autotunes.

Every threshold below is unmeasured on a GPU unless its comment names a measurement: it comes from the offline
compile report (registers, spills, shared memory; `benchmarks/static_report.py`).
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]

INTERPRETER = "interpreter"
MAX_ROWS = 2**31 - 2**12  # row numbers are int32 inside the kernels; offsets into memory are int64


@dataclass(frozen=True)
class LaunchConfig:
    """The tile of one program and the warps that work on it."""

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int = 1
    block_inner: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """What the compiler is told. Multiply-add fusion is asked for by name: its default is changing in Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def next_power_of_2(value: int) -> int:
    """The least power of two that is at least value (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def rows_config(n_cols: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    """Tiles of the row kernels: whole rows while they fit, then a loop over tiles of one row."""
    # 16 elements a thread: four 128-bit loads in flight in float32, two in half precision. Unmeasured.
    widest = 8192 if dtype.itemsize == 2 else 4096
    block_cols = min(next_power_of_2(n_cols), widest)
    elements = max(2048, block_cols)
    threads = elements // 16
    return LaunchConfig(
        block_rows=elements // block_cols,
        block_cols=block_cols,
        num_warps=max(1, threads // _warp_size(arch)),
    )


@functools.lru_cache(maxsize=64)
def arch_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ...; ``interpreter`` for CPU tensors, which only Triton's interpreter takes."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, which is where Triton launches; nothing to do for CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def is_amd(arch: str) -> bool:
    """Whether the chip is AMD's."""
    return arch.startswith("gfx")


def _warp_size(arch: str) -> int:
    return 64 if is_amd(arch) else 32

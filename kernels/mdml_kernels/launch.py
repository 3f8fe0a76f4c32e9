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
    """The tile of one program and the warps that work on it.

    tiles is how many of them, side by side, a row kernel holds at once; block_inner the depth of a product's tiles;
    block_out, in a backward kernel, the features of its result.
    """

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int = 1
    block_inner: int = 0
    block_out: int = 0
    tiles: int = 1

    @property
    def options(self) -> dict[str, int | bool]:
        """What the compiler is told. Multiply-add fusion is asked for by name: its default is changing in Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def next_power_of_2(value: int) -> int:
    """The least power of two that is at least value (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def rows_config(n_cols: int, dtype: torch.dtype, arch: str, per_thread: int, num_warps: int = 4) -> LaunchConfig:
    """Tiles of the row kernels: a few threads a row, with up to per_thread of its logits each.

    The fewer threads share a row, the less often a row's reductions and what follows from them are worked out. A row
    of more than 32 threads meets in shared memory; one of more than a program's, part by part. A thread loads 128 bits
    at once, where rows are contiguous and begin at a multiple of that.
    """
    threads, vector = num_warps * _warp_size(arch), 16 // dtype.itemsize
    if arch == INTERPRETER:  # it takes as long for a wide tile as for a narrow one
        vector, per_thread = 4 * vector, 4 * per_thread
    if dtype.itemsize == 8:
        per_thread //= 4
    if is_amd(arch):  # where twice the threads share a row's work, half as much each keeps registers below 128
        per_thread = max(vector, per_thread // 2)
    # Eight threads read 128 bytes, a line of the cache; but each should have sixteen logits of a row.
    of_row = max(next_power_of_2(-(-n_cols // per_thread)), min(next_power_of_2(n_cols) // 16, 8), 1)
    of_row = min(of_row, threads)
    block_cols = min(of_row * vector, next_power_of_2(n_cols))
    tiles = min(-(-n_cols // block_cols), per_thread // vector)
    # And sixteen in all, if its rows are short.
    rows = max(threads // of_row, 16 * threads // next_power_of_2(tiles * block_cols))
    return LaunchConfig(block_rows=rows, block_cols=block_cols, tiles=tiles, num_warps=num_warps)


def hinge_config(n_rows: int, arch: str) -> LaunchConfig:
    """Tiles of the hinge kernels over an episode's rows: 16 a thread, which are one load of 128 bits in bool."""
    of_warp = 16 * _warp_size(arch)
    rows = min(max(next_power_of_2(n_rows), of_warp), 2048)
    return LaunchConfig(block_rows=rows, block_cols=1, num_warps=rows // of_warp)


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


def layer_config(arch: str) -> LaunchConfig:
    """Tiles of the layer kernels: 64 x 64, 32 deep, which spill nowhere in any precision."""
    edge = 32 if arch == INTERPRETER else 64
    return LaunchConfig(block_rows=edge, block_cols=edge, block_inner=32, num_warps=8)


def inner_loop_config(
    n_rows: int, n_features: int, n_out: int, n_classes: int, precision: Precision, arch: str
) -> LaunchConfig | None:
    """Tiles of the whole inner loop (block_inner is the tile of hidden units), or None where they would not fit.

    Spills of each choice stand in the offline report: none, but 8 bytes a thread for float32 on sm_80.
    """
    block_rows = max(16, next_power_of_2(n_rows))
    most_rows = 64 if has_tensor_memory(arch) else 128
    if block_rows > most_rows or max(n_features, n_out, n_classes) > 64:
        return None
    wide = has_tensor_memory(arch) or (block_rows > 64 and not is_amd(arch))
    return LaunchConfig(
        block_rows=block_rows,
        block_cols=max(16, next_power_of_2(n_classes)),
        block_inner=32 if precision == "bfloat16" and not is_amd(arch) else 16,
        num_warps=8 if wide else 4,
    )


def linear_forward_config(precision: Precision, arch: str) -> LaunchConfig:
    """Tiles of the fused head's forward kernel."""
    if arch == INTERPRETER:
        return LaunchConfig(block_rows=32, block_cols=32, block_inner=32, num_warps=4)
    edge = 64 if precision == "float32" else 128  # of the logits tile; float32 keeps the parts of its operands too
    return LaunchConfig(edge, edge, num_warps=8, num_stages=2, block_inner=_depth(precision))


def linear_backward_config(n_features: int, precision: Precision, arch: str) -> LaunchConfig:
    """Tiles of the fused head's backward kernels; a result wider than block_out makes its logits again."""
    if arch == INTERPRETER:
        return LaunchConfig(block_rows=32, block_cols=32, block_inner=32, num_warps=4, block_out=32)
    widest = 128 if precision == "float32" or is_amd(arch) else 256
    return LaunchConfig(
        block_rows=32 if precision == "float32" and not has_wgmma(arch) and not is_amd(arch) else 64,
        block_cols=64,
        block_inner=_depth(precision),
        num_warps=8,
        num_stages=2,
        block_out=min(max(16, next_power_of_2(n_features)), widest),
    )


def _depth(precision: Precision) -> int:
    return 64 if precision == "bfloat16" else 32  # 128 bytes, so that every load is one of 128 bits


def dot_precision(precision: Precision, arch: str) -> str:
    """Triton's word for it. float32 on NVIDIA's tensor cores is three products of parts; ``ieee`` would use none."""
    if precision == "bfloat16":
        return "bf16"
    if arch == INTERPRETER:
        return "ieee"
    if precision == "tf32" and (not is_amd(arch) or arch == "gfx942"):  # the one AMD chip that has it
        return "tf32"
    return "ieee" if is_amd(arch) else "tf32x3"  # AMD's matrix cores multiply float32 as it is


def inner_loop_precision(precision: Precision, arch: str) -> str:
    """As `dot_precision`, but six products of bfloat16 parts where three of tf32 would not leave enough registers."""
    word = dot_precision(precision, arch)
    return "bf16x6" if word == "tf32x3" and not has_tensor_memory(arch) else word


def has_wgmma(arch: str) -> bool:
    """Whether products read their operands from shared memory (Hopper's wgmma, tcgen05)."""
    return arch == "sm_90" or has_tensor_memory(arch)


def has_tensor_memory(arch: str) -> bool:
    """Whether products accumulate in tensor memory (tcgen05: sm_100 and its kin, not sm_120)."""
    return arch.startswith("sm_10") or arch.startswith("sm_11")

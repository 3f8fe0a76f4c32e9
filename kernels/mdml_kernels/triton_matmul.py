"""Matrix products on tensor cores, in the precision that was asked for; and masked loads of padded tiles."""

# mypy: ignore-errors
# Triton reads these bodies, not Python: types would be wrong.

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32. PRECISION: ieee, tf32, tf32x3 or bf16 (operands are rounded to it)."""
    if PRECISION == "bf16":
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
        if INTERPRETED:  # it would multiply the bit patterns of bfloat16 as integers
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_tile(start, rows, cols, stride_row, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile at rows [R, 1] x cols [1, C], zero outside ROWS x COLS."""
    keep = (rows < ROWS) & (cols < COLS)
    return tl.load(start + rows * stride_row + cols * stride_col, mask=keep, other=0.0)

"""The hinge loss of an episode from the log-odds of its rows: sums by chunk, the loss, and the slope of every row.

No atomics: a chunk's sums have a place of their own, and one program adds them in a fixed order. A program's rows are
those of one episode; ALIGN, a power of two that divides their number, is how the compiler knows that loads are aligned.
"""

# mypy: ignore-errors
# Triton reads these bodies, not Python: types would be wrong.

import triton
import triton.language as tl


@triton.jit
def episode_sums_kernel(
    odds,
    is_ood,
    sums,
    rows_per_episode,
    n_chunks,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(Σ_ID S, Σ_OOD S, ID count, OOD count) of one chunk of one episode's rows; a NaN poisons both sums."""
    acc = odds.dtype.element_ty
    n = rows_per_episode // ALIGN * ALIGN
    episode = tl.program_id(0) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    base = episode.to(tl.int64) * n
    id_sum = tl.zeros([BLOCK], acc)
    ood_sum = tl.zeros([BLOCK], acc)
    ood_count = tl.zeros([BLOCK], acc)
    for start in range(0, CHUNK, BLOCK):
        rows = chunk * CHUNK + start + tl.arange(0, BLOCK)
        live = rows < n
        s = tl.sigmoid(tl.load(odds + base + rows, mask=live, other=0.0))
        ood = tl.load(is_ood + base + rows, mask=live, other=0) != 0
        bad = s != s
        id_sum += tl.where((live & ~ood) | bad, s, 0.0)
        ood_sum += tl.where(ood | bad, s, 0.0)
        ood_count += tl.where(ood, 1.0, 0.0)
    out = sums + tl.program_id(0).to(tl.int64) * 4
    tl.store(out, tl.sum(id_sum, 0))
    tl.store(out + 1, tl.sum(ood_sum, 0))
    n_ood = tl.sum(ood_count, 0)
    tl.store(out + 2, tl.minimum(n - chunk * CHUNK, CHUNK) - n_ood)
    tl.store(out + 3, n_ood)


@triton.jit
def hinge_kernel(sums, loss, weights, margin, n_chunks):
    """An episode's relu(m - (mean_ID S - mean_OOD S)) and its ∂/∂S for ID and for OOD rows; 0 if a side is empty."""
    episode = tl.program_id(0).to(tl.int64)
    acc = loss.dtype.element_ty
    zero = tl.full([], 0.0, tl.float64)
    id_sum, ood_sum, id_count, ood_count = zero, zero, zero, zero
    for chunk in range(n_chunks):
        at = sums + (episode * n_chunks + chunk) * 4
        id_sum += tl.load(at)
        ood_sum += tl.load(at + 1)
        id_count += tl.load(at + 2)
        ood_count += tl.load(at + 3)
    gap = margin - id_sum / tl.maximum(id_count, 1.0) + ood_sum / tl.maximum(ood_count, 1.0)
    # A NaN is not met.
    met = (gap <= 0.0) | (id_count * ood_count == 0.0)
    tl.store(loss + episode, tl.where(met, 0.0, gap).to(acc))
    tl.store(weights + 2 * episode, tl.where(met, 0.0, -1.0 / id_count).to(acc))
    tl.store(weights + 2 * episode + 1, tl.where(met, 0.0, 1.0 / ood_count).to(acc))


@triton.jit
def hinge_slope_kernel(
    odds,
    is_ood,
    weights,
    grad,
    slope,
    rows_per_episode,
    n_tiles,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """∂loss/∂o of a tile of one episode's rows, times its grad: the side's weight times S (1 - S)."""
    n = rows_per_episode // ALIGN * ALIGN
    episode = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * BLOCK + tl.arange(0, BLOCK)
    live = rows < n
    base = episode * n
    g = tl.load(grad + episode)
    id_slope = g * tl.load(weights + 2 * episode)
    ood_slope = g * tl.load(weights + 2 * episode + 1)
    ood = tl.load(is_ood + base + rows, mask=live, other=0) != 0
    o = tl.load(odds + base + rows, mask=live, other=0.0)
    tl.store(slope + base + rows, tl.where(ood, ood_slope, id_slope) * tl.sigmoid(o) * tl.sigmoid(-o), mask=live)

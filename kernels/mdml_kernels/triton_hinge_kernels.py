"""The hinge loss of an episode from the log-odds of its rows: sums by chunk, the loss, and the slope of every row.

No atomics: a chunk's sums have a place of their own, and one program adds them in a fixed order.
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
):
    """(Σ_ID S, Σ_OOD S, ID count, OOD count) of one chunk of one episode's rows; a NaN poisons both sums."""
    acc = odds.dtype.element_ty
    episode = tl.program_id(0) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    base = episode.to(tl.int64) * rows_per_episode
    id_sum = tl.zeros([BLOCK], acc)
    ood_sum = tl.zeros([BLOCK], acc)
    id_count = tl.zeros([BLOCK], acc)
    ood_count = tl.zeros([BLOCK], acc)
    for start in range(0, CHUNK, BLOCK):
        rows = chunk * CHUNK + start + tl.arange(0, BLOCK)
        live = rows < rows_per_episode
        s = tl.sigmoid(tl.load(odds + base + rows, mask=live, other=0.0))
        ood = tl.load(is_ood + base + rows, mask=live, other=0) != 0
        bad = s != s
        id_sum += tl.where((live & ~ood) | bad, s, 0.0)
        ood_sum += tl.where(ood | bad, s, 0.0)
        id_count += tl.where(live & ~ood, 1.0, 0.0)
        ood_count += tl.where(ood, 1.0, 0.0)
    out = sums + tl.program_id(0).to(tl.int64) * 4
    tl.store(out, tl.sum(id_sum, 0))
    tl.store(out + 1, tl.sum(ood_sum, 0))
    tl.store(out + 2, tl.sum(id_count, 0))
    tl.store(out + 3, tl.sum(ood_count, 0))


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
def hinge_slope_kernel(odds, is_ood, weights, grad, slope, n_rows, rows_per_episode, BLOCK: tl.constexpr):
    """∂loss/∂o of each row, times its episode's grad: the side's weight times S (1 - S)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = rows < n_rows
    episodes = rows // rows_per_episode
    ood = tl.load(is_ood + rows, mask=live, other=0) != 0
    weight = tl.load(weights + 2 * episodes + ood.to(tl.int64), mask=live, other=0.0)
    o = tl.load(odds + rows, mask=live, other=0.0)
    g = tl.load(grad + episodes, mask=live, other=0.0)
    tl.store(slope + rows, g * weight * tl.sigmoid(o) * tl.sigmoid(-o), mask=live)

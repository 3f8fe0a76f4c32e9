"""What every kernel here shares: a row's statistics, gathered tile by tile, and the log-odds that follow from them.

A row is summed up by four numbers: its largest logit ``top``, that one's first index ``first``, the largest of all
others ``second``, and their ``mass``, the sum of exp((x - second) / T). Keeping the others apart is what makes
log(1 - S) exact where S rounds to 1; logits are subtracted before 1/T multiplies them, so that what all share costs no
digits. The log-odds L = log S - log(1 - S) of a row are log A - log B, of scaled logits x:

    max     A = {first}      B = the others and the background     dL/dx = 1[first] - q,  q = exp(x - log B)
    mass    A = all logits   B = {the background}                  dL/dx = q,             q = exp(x - log A)

What is summed over many logits, B for ``max`` and A for ``mass``, is a row's ``reference``: its softmax is q. As one
number, log B or log A, it is rounded at its own size, and that turns up in every q; a kernel that reads it from memory
takes it as an unscaled logit and the sum of exp relative to that one, the very sum that was taken.
"""

# mypy: ignore-errors
# Triton reads these bodies, not Python: types would be wrong.

import triton
import triton.language as tl

MINUS_INF = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)  # the chips' own exponential is that of base 2


@triton.jit
def exp_below(x, reference):
    """exp(x - reference), and 0 at x = -inf even where the reference is -inf too; NaN stays NaN."""
    return tl.where(x == MINUS_INF, 0.0, tl.exp(x - reference))


@triton.jit
def zero_at_minus_inf(reference):
    """The reference, but 0 where it is -inf: exp(x - it) is then 0 at x = -inf, and needs no look at each x."""
    return tl.where(reference == MINUS_INF, 0.0, reference)


@triton.jit
def rebased(mass, reference, other, unit):
    """A sum of 2^(unit (x - reference)) as one relative to another reference; nothing for -inf, and NaN stays NaN."""
    return tl.where(reference == MINUS_INF, 0.0 * mass, mass * tl.exp2((reference - other) * unit))


@triton.jit
def exp2_up_to_1(x):
    """min(2^x, 1); NaN stays NaN."""
    return tl.exp2(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1] to the last bits: 2 atanh(e / (2 + e)); tl.log(1 + e) loses small e."""
    terms: tl.constexpr = 18 if e.dtype == tl.float64 else 8
    t = e / (2.0 + e)
    series = t * 0.0
    for i in tl.static_range(terms):
        series = series * (t * t) + 1.0 / (2 * (terms - i) - 1)
    return 2.0 * t * series


@triton.jit
def tile_statistics(tiles, cols, unit, K: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr):
    """(top, first, second, mass) [R] of rows whose logits are a tuple of TILES tiles [R, BLOCK_K], -inf beyond K.

    cols [1, BLOCK_K] are the first tile's column numbers. 2^(unit (x - second)) is what is summed, for unit [R], not
    negative. What is done for every logit is done tile by tile, in the registers of its thread.
    """
    top = tiles[0].to(unit.dtype)
    first = tl.zeros(top.shape, tl.int32)
    second = tl.full(top.shape, MINUS_INF, unit.dtype)
    for tile in tl.static_range(1, TILES):
        x = tiles[tile].to(unit.dtype)
        first = tl.where(x > top, tile, first)
        second = tl.maximum(second, tl.minimum(top, x))
        top = tl.maximum(top, x)
    of_thread, at = top, first * BLOCK_K + cols
    top = tl.max(of_thread, 1)
    first = tl.min(tl.where(of_thread == top[:, None], at, K - 1), 1)
    second = tl.max(tl.where(at == first[:, None], second, of_thread), 1)

    # All but the largest are at most `second`: cut off there, it counts what is then known to the bit, and taken off.
    reference = zero_at_minus_inf(second)
    sums = tl.zeros(tiles[0].shape, unit.dtype)
    for tile in tl.static_range(TILES):
        sums += exp2_up_to_1((tiles[tile].to(unit.dtype) - reference[:, None]) * unit[:, None])
    mass = tl.sum(sums, 1) - exp2_up_to_1((top - reference) * unit)
    mass = tl.where(second == MINUS_INF, 0.0 * mass, mass)  # NaN stays NaN
    return top, first, second, mass


@triton.jit
def scaled_statistics(x, cols, K: tl.constexpr):
    """`tile_statistics` of a single tile x [R, C] of logits that 1/T has multiplied."""
    unit = tl.full([x.shape[0]], LOG2_E, tl.float32)
    return tile_statistics((x,), cols, unit, K, 1, x.shape[1])


@triton.jit
def merge_statistics(top, first, second, mass, tile_top, tile_first, tile_second, tile_mass, unit):
    """The statistics of what was seen before and a later tile; at a tie the earlier index stays first."""
    wins = tile_top > top
    loser = tl.where(wins, top, tile_top)
    new_second = tl.maximum(tl.maximum(second, tile_second), loser)
    new_mass = rebased(mass, second, new_second, unit) + rebased(tile_mass, tile_second, new_second, unit)
    new_mass += rebased(1.0, loser, new_second, unit)
    return tl.where(wins, tile_top, top), tl.where(wins, tile_first, first), new_second, new_mass


@triton.jit
def log_odds(top, second, mass, scale, log_background, MASS: tl.constexpr):
    """(L, reference); for ``max`` the background is already in (second, mass). NaN where a logit is NaN or +inf.

    The reference is the log-sum-exp of scaled logits; the scale, 1/T, is 1 where they were scaled before.
    """
    nothing = tl.where(top < float("inf"), 0.0, float("nan"))
    if MASS:
        more = rebased(mass, second, top, scale * LOG2_E)
        log_total = tl.where(more <= 1.0, log1p_unit(tl.minimum(more, 1.0)), tl.log(1.0 + more)) + nothing
        return (top * scale - log_background) + log_total, top * scale + log_total
    log_mass = tl.log(mass) + nothing
    alone = (second == MINUS_INF) & (top > MINUS_INF)  # whatever the scale: it may be 0
    gap = tl.where(alone, float("inf"), (top - second) * scale)
    return gap - log_mass, second * scale + log_mass


@triton.jit
def pulled_back(weights, cols, first, g, MASS: tl.constexpr):
    """g dL/dx [R, C] for g [R, 1], given g q [R, C] for the softmax q; first [R, 1]."""
    if MASS:
        return weights
    return tl.where(cols == first, g, -weights)


@triton.jit
def scaled_slope(x, cols, first, log_sum, g, MASS: tl.constexpr):
    """The odds' gradient g [R] pulled back to scaled logits x [R, C], given the log-sum-exp [R]; 0 at x = -inf."""
    share = tl.exp2((x - zero_at_minus_inf(log_sum)[:, None]) * LOG2_E)
    return pulled_back(g[:, None] * share, cols, first[:, None], g[:, None], MASS)

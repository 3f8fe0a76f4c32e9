"""What every kernel here shares: a row's statistics, gathered tile by tile, and the log-odds that follow from them.

A row is summed up by four numbers: its largest scaled logit ``top``, that one's first index ``first``, and the
log-sum-exp of all others as ``second + log(mass)`` with its own reference ``second``. Keeping the others apart is what
makes log(1 - S) exact where S rounds to 1. The log-odds L = log S - log(1 - S) of a row are log A - log B:

    max     A = {first}      B = the others and the background     dL/dx = 1[first] - q,  q = exp(x - log B)
    mass    A = all logits   B = {the background}                  dL/dx = q,             q = exp(x - log A)

What is summed over many logits, B for ``max`` and A for ``mass``, is a row's ``reference``: its softmax is q. As one
number, log B or log A, it is rounded at its own size, and that turns up in every q; a kernel that reads it from memory
takes it as a largest logit and a sum of exp relative to that one, which are not.
"""

# mypy: ignore-errors
# Triton reads these bodies, not Python: types would be wrong.

import triton
import triton.language as tl


@triton.jit
def exp_below(x, reference):
    """exp(x - reference), and 0 at x = -inf even where the reference is -inf too; NaN stays NaN."""
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - reference))


@triton.jit
def share_below(x, largest, inverse_sum):
    """exp(x - log-sum-exp), given as its largest and one over the sum relative to it; 0 at x = -inf as `exp_below`."""
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - largest) * inverse_sum)


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
def tile_statistics(x, cols, n_cols):
    """(top, first, second, mass) [R] of a tile x [R, C] whose padding is -inf; cols [1, C] are its column numbers."""
    top = tl.max(x, 1)
    first = tl.min(tl.where(x == top[:, None], cols, n_cols - 1), 1)
    rest = tl.where(cols == first[:, None], float("-inf"), x)
    second = tl.max(rest, 1)
    mass = tl.sum(exp_below(rest, second[:, None]), 1)
    return top, first, second, mass


@triton.jit
def merge_statistics(top, first, second, mass, tile_top, tile_first, tile_second, tile_mass):
    """The statistics of what was seen before and a later tile; at a tie the earlier index stays first."""
    wins = tile_top > top
    loser = tl.where(wins, top, tile_top)
    new_second = tl.maximum(tl.maximum(second, tile_second), loser)
    new_mass = (
        mass * exp_below(second, new_second)
        + tile_mass * exp_below(tile_second, new_second)
        + exp_below(loser, new_second)
    )
    return tl.where(wins, tile_top, top), tl.where(wins, tile_first, first), new_second, new_mass


@triton.jit
def log_odds(top, second, mass, log_background, MASS: tl.constexpr):
    """(L, reference); for ``max`` the background is already in (second, mass). NaN where a logit is NaN or +inf."""
    reference = second + tl.log(mass) + tl.where(top < float("inf"), 0.0, float("nan"))
    if MASS:
        larger = tl.maximum(top, reference)
        gap = tl.where(top == reference, 0.0, tl.abs(top - reference))  # both may be -inf
        reference = larger + log1p_unit(tl.exp(-gap))
        return reference - log_background, reference
    return top - reference, reference


@triton.jit
def log_odds_gradient(share, cols, first, MASS: tl.constexpr):
    """dL/dx [R, C] for the softmax q [R, C] and first [R, 1]; 0 at logits of -inf, the usual way to forbid a class."""
    if MASS:
        return share
    return tl.where(cols == first, 1.0, -share)

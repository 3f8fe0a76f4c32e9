"""Mean distances to the nearest references by the compiled kernels: no matrix of distances is ever in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mdml_kernels.native.calls import call, whole

# Neighbours that the kernel has room for.
MOST = 64
# Numbers of short coordinates to choose from.
_WIDTHS = (16, 32, 64)
# Main directions are learned from so many references, in random order, and judged by rows held against others.
_SAMPLE, _JUDGED = 1024, 32
# Measuring a distance takes as long as so many products of its width.
_MEASURING = 30
# Fewer products than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 20
# Rows at once, so that memory does not grow with their number.
_ROWS = 1 << 16


class NeighbourSearch:
    """Mean distances to the nearest of n references [n, d], float32 on a CPU.

    Short coordinates are those along the references' main directions, and how far a row is from what these span:
    nothing is farther apart in them than it is. Only references that are near enough in them are measured, with
    squared distances summed in float64, so the nearest found are the nearest there are (the idea of principal axis
    trees: McNames, "A fast nearest-neighbor algorithm based on a principal axis search tree", 2001).

    Args:
        references: in random order.
    """

    def __init__(self, references: Tensor) -> None:
        self._references = references.contiguous()
        sample = self._references[: _SAMPLE + _JUDGED]
        sample = sample[sample.isfinite().all(1)]
        self._centre = sample.mean(0)
        self._directions = _directions(sample, self._centre)
        self._short = self._shortened(self._references)

    @property
    def width(self) -> int:
        """How many coordinates are compared before a distance is measured."""
        return self._short.shape[1]

    def distances(
        self, rows: Tensor, k: int, families: Tensor | None = None, reference_families: Tensor | None = None
    ) -> Tensor:
        """The mean Euclidean distance [N] of rows [N, d] to their k nearest references, `MOST` at most.

        NaN where there is none. A row is not compared with references of its own family (int [N] and [n]; None: with
        all).

        Raises:
            ValueError: k is larger, rows are not as wide as the references, or only the rows have families.
        """
        if k > MOST:
            raise ValueError(f"k must be {MOST} at most, got {k}")
        if rows.shape[1:] != self._references.shape[1:]:
            raise ValueError(f"rows must be as wide as the references, got {rows.shape[1]} and {len(self._centre)}")
        if families is not None and reference_families is None:
            raise ValueError("families need the reference_families")
        own, others = (
            None if families is None or codes is None else whole(codes.to(torch.int64))
            for codes in (families, reference_families)
        )
        out, sizes = rows.new_empty(len(rows)), (*self._references.shape, self.width, k)
        for start in range(0, len(rows), _ROWS):
            block = slice(start, start + _ROWS)
            some = rows[block].contiguous()
            call(
                *("mdml_neighbour_distances", len(some), self._short.numel(), _LEAST_PRODUCTS, *sizes),
                *(some, self._references, self._shortened(some), self._short),
                *(None if own is None else own[block], others, out[block]),
            )
        return out

    def _shortened(self, rows: Tensor) -> Tensor:
        """Short coordinates [N, m] of rows [N, d]; the rows themselves where fewer don't pay."""
        return rows if self._directions is None else _shortened(rows, self._centre, self._directions)


def _shortened(rows: Tensor, centre: Tensor, directions: Tensor) -> Tensor:
    out = rows.new_empty(len(rows), directions.shape[1])
    sizes = ("mdml_short_coordinates", len(rows), directions.numel(), _LEAST_PRODUCTS, *directions.shape)
    call(*sizes, rows, centre, directions, out)
    return out


def _directions(rows: Tensor, centre: Tensor) -> Tensor | None:
    """As many main directions of rows [n, d] as make the search cheapest, [d, m] with a column of zeros; or None."""
    n, d = rows.shape
    widths = [width for width in _WIDTHS if width < d and width <= n - _JUDGED]
    if not widths:
        return None
    judged, others = rows[:_JUDGED], rows[_JUDGED:]
    directions = _main_directions(others - centre, widths[-1] - 1)
    nearest = torch.cdist(judged, others).topk(8, largest=False).values[:, 7:]
    best: Tensor | None = None
    least = float(d)
    for width in widths:
        candidate = pad(directions[:, : width - 1], (0, 1)).contiguous()
        lower = torch.cdist(_shortened(judged, centre, candidate), _shortened(others, centre, candidate))
        cost = width + _MEASURING * d * float((lower < nearest).float().mean())
        if cost < least:
            best, least = candidate, cost
    return best


def _main_directions(rows: Tensor, n: int) -> Tensor:
    """About the first principal directions of rows [N, d], orthonormal [d, n]: a power iteration from some of them."""
    rows = rows / rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)  # their third powers would overflow
    directions: Tensor = torch.linalg.qr((rows.T @ (rows @ rows[:n].T)).double()).Q.to(rows.dtype)
    spread = (rows @ directions).square().sum(0)
    return directions[:, spread.argsort(descending=True)]

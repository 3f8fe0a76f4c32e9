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
# One pair of rows costs as much, for each of its coordinates, as so many do in a product.
_ONE_PAIR = 30
# Fewer products than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 20
# Rows at once, so that memory does not grow with their number.
_ROWS = 1 << 16


class NeighbourSearch:
    """Mean distances to the nearest of n references [n, d], float32 on a CPU.

    Short coordinates are those along the references' main directions, and how far a row is from what these span:
    nothing is farther apart in them than it is. A product of a few coarse ones rules most references out, finer ones
    most of the others, one by one. Only what is left is measured, with squared distances summed in float64, so the
    nearest found are the nearest there are (the idea of principal axis trees: McNames, "A fast nearest-neighbor
    algorithm based on a principal axis search tree", 2001).

    Args:
        references: in random order.

    Attributes:
        width: how many coordinates of all references are compared.
    """

    def __init__(self, references: Tensor) -> None:
        self._references = references.contiguous()
        sample = self._references[: _SAMPLE + _JUDGED]
        sample = sample[sample.isfinite().all(1)]
        self._centre = sample.mean(0)
        self._directions, self.width = _directions(sample, self._centre)
        self._coarse, self._fine = self._shortened(self._references)

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
        n_fine = 0 if self._fine is None else self._fine.shape[1]
        out, sizes = rows.new_empty(len(rows)), (*self._references.shape, self.width, n_fine, k)
        for start in range(0, len(rows), _ROWS):
            block = slice(start, start + _ROWS)
            some = rows[block].contiguous()
            coarse, fine = self._shortened(some)
            call(
                *("mdml_neighbour_distances", len(some), self._coarse.numel(), _LEAST_PRODUCTS, *sizes),
                *(some, self._references, coarse, self._coarse, fine, self._fine),
                *(None if own is None else own[block], others, out[block]),
            )
        return out

    def _shortened(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The coarse coordinates [N, c] of rows [N, d], themselves where fewer don't pay, and the fine ones, if any."""
        if self._directions is None:
            return rows, None
        return _shortened(rows, self._centre, self._directions, self.width)


def _shortened(rows: Tensor, centre: Tensor, directions: Tensor, n_coarse: int) -> tuple[Tensor, Tensor | None]:
    """Coarse coordinates [N, c] and fine ones [N, f] of rows [N, d]; where both would be the same, only the former."""
    d, n_fine = directions.shape
    fine = rows.new_empty(len(rows), n_fine)
    coarse = None if n_coarse == n_fine else rows.new_empty(len(rows), n_coarse)
    sizes = ("mdml_short_coordinates", len(rows), directions.numel(), _LEAST_PRODUCTS, d, n_fine, n_coarse)
    call(*sizes, rows, centre, directions, fine, coarse)
    return (fine, None) if coarse is None else (coarse, fine)


def _directions(rows: Tensor, centre: Tensor) -> tuple[Tensor | None, int]:
    """Main directions of rows [n, d] as columns, the last of them zero [d, f], and the number c of coarse coordinates.

    As many as make the search cheapest; none where it is cheapest to compare the rows as they are.
    """
    n, d = rows.shape
    widths = [width for width in _WIDTHS if width < d and width <= n - _JUDGED]
    if not widths:
        return None, d
    judged, others = rows[:_JUDGED], rows[_JUDGED:]
    directions = _main_directions(others - centre, widths[-1] - 1)
    first = {width: pad(directions[:, : width - 1], (0, 1)).contiguous() for width in widths}
    distances = torch.cdist(judged, others)
    nearest = distances.topk(8, largest=False).values[:, 7:]
    # The share of references that are farther away than the nearest, and can't be told from them.
    left = {}
    for width in widths:
        near, far = (_shortened(some, centre, first[width], width)[0] for some in (judged, others))
        left[width] = float(((torch.cdist(near, far) < nearest) & (distances > nearest)).float().mean())
    costs = {
        (coarse, fine): coarse + _ONE_PAIR * (left[coarse] * (fine if fine > coarse else 0) + left[fine] * d)
        for coarse in widths
        for fine in widths
        if fine >= coarse
    }
    (coarse, fine), cost = min(costs.items(), key=lambda item: item[1])
    return (first[fine], coarse) if cost < d else (None, d)


def _main_directions(rows: Tensor, n: int) -> Tensor:
    """About the first principal directions of rows [N, d], orthonormal [d, n]: a power iteration from some of them."""
    rows = rows / rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)  # their third powers would overflow
    directions: Tensor = torch.linalg.qr((rows.T @ (rows @ rows[:n].T)).double()).Q.to(rows.dtype)
    spread = (rows @ directions).square().sum(0)
    return directions[:, spread.argsort(descending=True)]

"""Mean distances to the nearest references by the compiled kernels: no matrix of all distances is ever in memory."""

from __future__ import annotations

from ctypes import c_float

import torch
from torch import Tensor
from torch.nn.functional import pad

from mdml_kernels.native.calls import call, check
from mdml_kernels.native.loader import multiplies_bfloat16

# Neighbours that the kernel has room for.
MOST = 64
# References in a ball.
_BALL = 16
# Squared lengths from here on are as good as infinite: sums of them would be.
_LONG = 1e37
# Coordinates beyond this are not told apart where rows are put in order.
_FAR = 1e12
# Numbers of short coordinates to choose from. Fewer would let through what takes longer than products of these; where
# products are of float32 they take longer.
_WIDTHS = (32, 64)
_WIDTHS_OF_FLOAT32 = (16, *_WIDTHS)
# Main directions are learned from so many references, and judged by rows held against others.
_SAMPLE, _JUDGED = 1024, 32
# One pair of rows costs as much, for each of its coordinates, as so many do in a product. (Balls save products, how
# many is not known yet; so widths are chosen as if there were none.)
_ONE_PAIR = 50
# Fewer products than this are not worth a thread of their own.
_LEAST_PRODUCTS = 1 << 20
# Rows at once, so that memory does not grow with their number.
_ROWS = 1 << 16


class NeighbourSearch:
    """Mean distances to the nearest of n references [n, d], float32 on a CPU.

    Short coordinates are those along the references' main directions, and how far a row is from what these span:
    nothing is farther apart in them than it is (the idea of principal axis trees: McNames, "A fast nearest-neighbor
    algorithm based on a principal axis search tree", 2001). References that are close together in a few coarse ones
    share a ball, and whole balls are too far away. In the others a product of coarse coordinates rules most references
    out, finer ones most of what is left, one by one. Only then anything is measured, with squared distances summed in
    float64, so the nearest found are the nearest there are. References whose squared length is 1e37 or more, or no
    number, are nobody's neighbours.

    Attributes:
        width: how many coarse coordinates are compared.

    Raises:
        ValueError: references are not float32 [n, d] on a CPU.
    """

    def __init__(self, references: Tensor) -> None:
        check("references", references, len(references), references.shape[-1])
        chosen = torch.randperm(len(references), generator=torch.Generator().manual_seed(0))[: _SAMPLE + _JUDGED]
        sample = references[chosen]
        sample = sample[sample.square().sum(1) < _LONG]
        self._n_features = references.shape[1]
        self._centre = sample.mean(0) if len(sample) else references.new_zeros(self._n_features)
        self._directions, self.width = _directions(sample, self._centre)
        coarse, fine = self._shortened(references.contiguous())
        # What can't be measured is nobody's neighbour.
        finite = (coarse.square().sum(1) < _LONG).nonzero().squeeze(1)
        self._order = finite[_gathered(coarse.index_select(0, finite))]
        self._references = references.index_select(0, self._order)
        self._fine = None if fine is None else fine.index_select(0, self._order)
        widest = max(coarse.shape[1], 0 if fine is None else fine.shape[1]) + self._n_features
        self._left_out = c_float(widest * torch.finfo(torch.float32).eps)
        self._balls = _balls(coarse.index_select(0, self._order), self._left_out)

    def distances(
        self, rows: Tensor, k: int, families: Tensor | None = None, reference_families: Tensor | None = None
    ) -> Tensor:
        """The mean Euclidean distance [N] of rows [N, d] to their k nearest references, `MOST` at most.

        NaN where there is none. A row is not compared with references of its own family (int [N] and [n]; None: with
        all).

        Raises:
            ValueError: k is larger, rows are not float32 or not as wide as the references, or families are missing.
        """
        if not 1 <= k <= MOST:
            raise ValueError(f"k must be 1 at least and {MOST} at most, got {k}")
        if families is None:
            return self._search(rows, k)[0]
        if reference_families is None:
            raise ValueError("families need the reference_families")
        if len(families) != len(rows):
            raise ValueError(f"{len(rows)} rows need as many families, got {len(families)}")
        own, others = families.to(torch.int64).contiguous(), reference_families.to(torch.int64)[self._order]
        return self._search(rows, k, own, others)[0]

    def nearest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which reference is the nearest to each of the rows [N, d], int64 [N], and its distance [N].

        -1 and NaN where there is none.

        Raises:
            ValueError: rows are not float32, or not as wide as the references.
        """
        distances, places = self._search(rows, 1)
        found = places >= 0
        places[found] = self._order[places[found]]
        return places, distances

    def order(self, rows: Tensor) -> Tensor:
        """Positions of rows [N, d], float32, such that those which follow one another are near each other, int64 [N].

        Searched in this order, rows look at the same references, which are then still in the cache.

        Raises:
            ValueError: rows are not float32, or not as wide as the references.
        """
        self._check(rows)
        coarse = self._shortened(rows.contiguous())[0]
        # What can't be compared is put anywhere.
        return _gathered(coarse.nan_to_num(0.0).clamp(-_FAR, _FAR))

    def _search(
        self, rows: Tensor, k: int, families: Tensor | None = None, reference_families: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mean distances [N], and the place of the nearest among the references as they are kept [N]."""
        self._check(rows)
        n_fine = 0 if self._fine is None else self._fine.shape[1]
        distances, places = rows.new_empty(len(rows)), torch.empty(len(rows), dtype=torch.int64)
        for start in range(0, len(rows), _ROWS):
            block = slice(start, start + _ROWS)
            some = rows[block].contiguous()
            coarse, fine = self._shortened(some)
            sizes = (len(self._balls[0]), self._n_features, coarse.shape[1], n_fine, k)
            call(
                *("mdml_neighbour_distances", len(some), self._balls[2].numel(), _LEAST_PRODUCTS, *sizes),
                *(*self._balls, self._fine, self._references, reference_families, coarse, fine, some),
                *(None if families is None else families[block], self._left_out, distances[block], places[block]),
            )
        return distances, places

    def _check(self, rows: Tensor) -> None:
        if rows.dtype != torch.float32:
            raise ValueError(f"rows must be float32, got {rows.dtype}")
        if rows.shape[1:] != (self._n_features,):
            raise ValueError(f"rows must be as wide as the references, {self._n_features}, got {list(rows.shape)}")

    def _shortened(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The coarse coordinates [N, c] of rows [N, d], all of them where fewer don't pay, and the fine ones, if any.

        They are from the centre, where rounding takes least; c is even.
        """
        if self._directions is None:
            centred = rows - self._centre
            return (pad(centred, (0, 1)) if self._n_features % 2 else centred), None
        return _shortened(rows, self._centre, self._directions, self.width)


def _gathered(rows: Tensor) -> Tensor:
    """An order of rows [n, c] in which each `_BALL` of them that follow one another are close together [n]."""
    order = torch.empty(len(rows), dtype=torch.int64)
    call("mdml_gather", 1, 1, 1, *rows.shape, rows, order)
    return order


def _balls(rows: Tensor, left_out: c_float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of references with coarse coordinates [n, c] in order: the balls, their centres, columns and squares.

    See mdml_balls; coordinates are kept as its `Coarse` keeps them.
    """
    n_balls, width = -(-len(rows) // _BALL), rows.shape[1]
    kept = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    balls = torch.empty(n_balls, 3, dtype=torch.float32)
    centres = torch.empty(n_balls, width, dtype=kept)
    columns = torch.empty(n_balls, width, _BALL, dtype=kept)
    squares = torch.empty(n_balls, _BALL, dtype=torch.float32)
    call(
        *("mdml_balls", n_balls, _BALL * width, _LEAST_PRODUCTS, *rows.shape),
        *(rows, columns, squares, centres, balls, left_out),
    )
    return balls, centres, columns, squares


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
    possible = _WIDTHS if multiplies_bfloat16() else _WIDTHS_OF_FLOAT32
    widths = [width for width in possible if width < d and width <= n - _JUDGED]
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

"""Views: transformations of the encoded features, each of which shows other anomalies to a distance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from mdml_kernels.native import loader
from mdml_kernels.native import views as native
from sklearn.covariance import ledoit_wolf_shrinkage
from threadpoolctl import threadpool_limits
from torch import Tensor

from mdml_fast.data.encoding import Floats, Rows

VIEWS = ("clipped", "cdf", "quantile", "whitened")

# Beyond so many deviations a value is strange, and how strange matters only on a log scale.
CLIP = 3.0
# Knots of the empirical cdf of a feature: its resolution is 1 / KNOTS.
KNOTS = 512
# Directions of less than this share of the largest variance are noise: whitening must not blow them up.
EIGENVALUE_FLOOR = 1e-3


class Views:
    """Four views of rows, fitted on normals; each has mean variance 1 over them, so that distances are comparable.

    - clipped: values within ±3 deviations as they are, what lies beyond on a log scale.
    - cdf: the empirical cdf of each feature, beyond the normals' range on a log scale.
    - quantile: the normal quantiles of that cdf.
    - whitened: the clipped rows times Σ^-½, Σ their Ledoit-Wolf covariance ("A well-conditioned estimator for
      large-dimensional covariance matrices", 2004).

    Args:
        tensors: `knots` and `levels` of the cdf [d, K]; `mean` [d] and `whitening` [d, d] of the clipped rows;
            `scales` [4], the factor of each view.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def fit(cls, normals: Rows) -> Self:
        """Learn from normals, float32 [n, d]."""
        knots, levels = _cdf(np.sort(normals.T, axis=1))
        clipped = _clip(torch.as_tensor(normals)).double().numpy()
        tensors = {
            "knots": torch.as_tensor(knots),
            "levels": torch.as_tensor(levels, dtype=torch.float32),
            "mean": torch.as_tensor(clipped.mean(axis=0), dtype=torch.float32),
            "whitening": torch.as_tensor(_whitening(clipped), dtype=torch.float32),
            "scales": torch.ones(len(VIEWS)),
        }
        rows = cls(tensors).transform(torch.as_tensor(normals))
        variance = rows.var(dim=1, correction=0).mean(dim=1)
        return cls(tensors | {"scales": variance.clamp(min=1e-12).rsqrt()})

    def transform(self, rows: Tensor) -> Tensor:
        """Rows, float32 [N, d], in each view [4, N, d], on the device of both; computed in float64 and rounded once."""
        if loader.serves(rows, *self.tensors.values()):
            return native.views(rows, **self.tensors, clip=CLIP)
        t = {name: tensor.double() for name, tensor in self.tensors.items()}
        clipped = _clip(rows.double())
        level, beyond = self._levels(rows)
        # A uniform variable times √12 has variance 1.
        cdf = math.sqrt(12.0) * (level - 0.5) + beyond
        quantile = torch.special.ndtri(level) + beyond
        whitened = (clipped - t["mean"]) @ t["whitening"]
        views = torch.stack([clipped - t["mean"], cdf, quantile, whitened])
        return (views * t["scales"][:, None, None]).to(rows.dtype)

    def by_feature(self, view: str, steps: Tensor, weights: Tensor) -> Tensor:
        """The product of a step between two rows, in a view, with weights in that view [N, d]: its part by feature.

        Args:
            view: one of `VIEWS`.
            steps: the steps in each view [4, N, d].
            weights: [N, d]; the parts sum to the product of these with the view's steps.
        """
        if view != "whitened":
            return steps[VIEWS.index(view)] * weights
        # Only whitening mixes the features, and it is linear in the clipped ones.
        clipped, scale = VIEWS.index("clipped"), self.tensors["scales"]
        factor = scale[VIEWS.index(view)] / scale[clipped]
        return steps[clipped] * (weights @ self.tensors["whitening"].T) * factor

    def to(self, device: torch.device) -> Views:
        """The same views on a device."""
        return Views({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def _levels(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The empirical cdf of rows [N, d], and how far they lie beyond the normals' range: signed, on a log scale.

        Both in float64.
        """
        knots, levels = self.tensors["knots"], self.tensors["levels"]
        columns = rows.T.contiguous()
        upper = torch.searchsorted(knots, columns).clamp(1, knots.shape[1] - 1)
        knots, levels, columns = knots.double(), levels.double(), columns.double()
        left, right = knots.gather(1, upper - 1), knots.gather(1, upper)
        share = ((columns - left) / (right - left).clamp(min=1e-12)).clamp(0, 1)
        level = torch.lerp(levels.gather(1, upper - 1), levels.gather(1, upper), share)
        beyond = (columns - knots[:, -1:]).relu().log1p() - (knots[:, :1] - columns).relu().log1p()
        return level.T, beyond.T


def _clip(rows: Tensor) -> Tensor:
    size = rows.abs()
    return rows.sign() * (size.clamp(max=CLIP) + (size - CLIP).relu().log1p())


def _cdf(columns: Rows) -> tuple[Rows, Floats]:
    """Knots of sorted columns [d, n], and the mid-ranks there, both [d, KNOTS]; equal values give equal knots."""
    n = columns.shape[1]
    knots = columns.take(np.linspace(0, n - 1, KNOTS).round().astype(int), axis=1)
    each = list(zip(columns, knots, strict=True))
    left, right = ([column.searchsorted(own, side) for column, own in each] for side in ("left", "right"))
    return knots, np.add(left, right) / (2.0 * n)


def _whitening(clipped: Floats) -> Floats:
    """Σ^-½ [d, d] with its small eigenvalues raised; Σ = (1 - δ) S + δ μ I, S the covariance, μ its mean eigenvalue."""
    n, d = clipped.shape
    centred = clipped - clipped.mean(axis=0)
    # One thread: LAPACK's singular vectors depend on the number of threads in the last bits.
    with threadpool_limits(1):
        _, singular, vectors = np.linalg.svd(np.linalg.qr(centred, mode="r"), full_matrices=False)
        variances = singular**2 / n
        shrinkage = ledoit_wolf_shrinkage(centred, assume_centered=True)
        ridge = shrinkage * variances.sum() / d
        values = (1 - shrinkage) * variances + ridge
        floor = max(EIGENVALUE_FLOOR * values[0], 1e-12)
        # Fewer rows than features leave directions of no variance but the ridge.
        rest = max(ridge, floor) ** -0.5
        factors = np.maximum(values, floor) ** -0.5
        whitening: Floats = (vectors.T * (factors - rest)) @ vectors + rest * np.eye(d)
    return whitening

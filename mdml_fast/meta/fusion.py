"""How the scores of views and anchors become one: weights learned on the seen families, tied to the anchor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import softplus

from mdml_fast.data.encoding import Floats
from mdml_fast.data.labelled import Names
from mdml_fast.meta.adam import Adam


@dataclass(frozen=True)
class FusionConfig:
    """How the weights are learned."""

    # A labelled row should lie above these quantiles of the normals: near all of them, and above the tail most of all.
    quantiles: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.99)
    # The anchor's share before anything is learned; the others share the rest evenly.
    anchor: float = 0.6
    # Fewer normals than about this many don't tell what a view is worth: the anchor's share grows towards 1.
    few_normals: int = 100
    # The exponent of the mean of the scores: 1 is the plain one, above it a row that one of them finds very strange
    # counts for more. Classes that only the anchor sees are not lost among views that are blind to them.
    power: float = 2.0
    # The weight of the divergence from these shares; it falls with the number of seen families, which are what the
    # weights are learned from (rows of one family tell the same thing).
    pull: float = 0.3
    steps: int = 100
    rate: float = 0.05


def prior_weights(n_scores: int, n_normals: int, config: FusionConfig) -> Tensor:
    """The weights [C] before anything is learned; the anchor is first."""
    trust = n_normals / (n_normals + config.few_normals)
    others = (1 - config.anchor) * trust / (n_scores - 1)
    return torch.tensor([1 - others * (n_scores - 1), *[others] * (n_scores - 1)])


def fuse(weights: Tensor, scores: Tensor, config: FusionConfig) -> Tensor:
    """The weighted power mean [N] of scores ≥ 0 [C, N]."""
    return (weights @ scores.pow(config.power)).pow(1 / config.power)


def learn_weights(normals: Tensor, anomalies: Tensor, labels: Names, prior: Tensor, config: FusionConfig) -> Tensor:
    """Weights [C], positive with sum 1, that lift labelled anomalies above the normals.

    They minimise, by Adam, the mean over families, their rows and the quantiles q of
    softplus(q of the normals' fused scores - the row's fused score), plus pull / families times the
    Kullback-Leibler divergence from the prior.

    Args:
        normals: scores of normals that were left out of their own references, float [C, n].
        anomalies: scores of labelled anomalies by directions that did not train on their family, float [C, M].
        labels: their families [M]; none at all gives the prior.
        prior: weights [C].
        config: the constants.
    """
    families = np.unique(labels.astype(str))
    if not len(families):
        return prior
    share = torch.as_tensor(_even_shares(labels, families), dtype=normals.dtype, device=normals.device)
    prior = prior.to(normals)
    quantiles = torch.tensor(config.quantiles, dtype=normals.dtype, device=normals.device)
    logits = prior.log().requires_grad_()
    optimizer = Adam({"logits": logits}, {"logits": config.rate})
    for _ in range(config.steps):
        weights = logits.softmax(0)
        thresholds = fuse(weights, normals, config).quantile(quantiles)
        missed = softplus(thresholds.unsqueeze(1) - fuse(weights, anomalies, config)).mean(0) @ share
        divergence = weights @ (weights / prior).log()
        (grad,) = torch.autograd.grad(missed + config.pull / len(families) * divergence, logits)
        optimizer.step({"logits": grad})
    return logits.detach().softmax(0)


def _even_shares(labels: Names, families: npt.NDArray[np.str_]) -> Floats:
    """The share of each row [M] in a mean over families."""
    shares: Floats = sum((labels == name) / np.sum(labels == name) for name in families) / len(families)
    return shares

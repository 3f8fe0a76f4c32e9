"""How the scores of views and anchors become one: weights learned on the seen families, tied to the anchor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit
from torch import Tensor

from mdml_fast.data.encoding import Floats
from mdml_fast.data.labelled import Names
from mdml_fast.meta.adam import Adam
from mdml_fast.threads import side_by_side


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
    # The head's weight beside all others: the rows that it learned from can't tell what it is worth on other classes.
    # More finds the seen classes better, and disturbs the order of the unseen ones.
    head: float = 0.4
    # But it is doubled, and doubled again, where that lifts rows of the seen classes that the trees did not learn from:
    # at most so often, and once for each class beyond the first, as one class tells nothing of others.
    most_doublings: int = 2
    # The weight of discriminants that tell all, beside all others, which have sum 1. With fixed weights of 0.1 to 0.5
    # unseen classes are found better than without, on each of ten tables whose normals are of several classes.
    discriminants: float = 0.25
    # Whether the anchor alone, or the prior, is the answer where it ranks the seen families as high; by less than this
    # AUROC, one normal in two thousand, none ranks them higher.
    fallback: bool = True
    least_gain: float = 0.0005
    steps: int = 100
    rate: float = 0.05


def prior_weights(n_scores: int, n_normals: int, config: FusionConfig) -> Tensor:
    """The weights [C] before anything is learned; the anchor is first."""
    trust = n_normals / (n_normals + config.few_normals)
    others = (1 - config.anchor) * trust / (n_scores - 1)
    return torch.tensor([1 - others * (n_scores - 1), *[others] * (n_scores - 1)])


def fuse(weights: Tensor, scores: Tensor, config: FusionConfig) -> Tensor:
    """The weighted power mean [N] of scores ≥ 0 [C, N]: (Σ w s^p)^(1/p), whatever the weights sum to."""
    return (weights @ scores.pow(config.power)).pow(1 / config.power)


def learn_weights(normals: Tensor, anomalies: Tensor, labels: Names, prior: Tensor, config: FusionConfig) -> Tensor:
    """Weights [C], positive with sum 1, that lift labelled anomalies above the normals.

    They minimise, by Adam, the mean over families, their rows and the quantiles q of
    softplus(q of the normals' fused scores - the row's fused score), plus pull / families times the
    Kullback-Leibler divergence from the prior. The gradient is written out, which takes a third of the time.

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
    # NumPy: a step is some twenty operations on a few thousand numbers, which torch takes three times as long for.
    share, pull, power = even_shares(labels) / len(config.quantiles), config.pull / len(families), config.power
    powers, caught_powers = (scores.double().cpu().numpy() ** power for scores in (normals, anomalies))
    # Of n ordered scores a quantile lies between two.
    places = np.array(config.quantiles) * (powers.shape[1] - 1)
    low = places.astype(np.intp)
    high, way = np.minimum(low + 1, powers.shape[1] - 1), places - low
    ends = np.union1d(low, high)
    start = prior.double().cpu()
    logits = start.log()
    optimizer = Adam({"logits": logits}, {"logits": config.rate})
    for _ in range(config.steps):
        weights = logits.softmax(0).numpy()
        fused, caught = (weights @ powers) ** (1 / power), (weights @ caught_powers) ** (1 / power)
        order = fused.argpartition(ends)
        below, above = order[low], order[high]
        thresholds = fused[below] * (1 - way) + fused[above] * way
        # softplus(q - a) falls by this with a, and rises with q.
        slopes = expit(thresholds[:, None] - caught) * share
        by_threshold = slopes.sum(1)
        chosen = np.concatenate([below, above])
        by_chosen = np.concatenate([by_threshold * (1 - way), by_threshold * way])
        by_powers = powers[:, chosen] @ (by_chosen * fused[chosen] ** (1 - power))
        by_powers -= caught_powers @ (slopes.sum(0) * caught ** (1 - power))
        by_weights = by_powers / power + pull * np.log(weights / start.numpy())
        optimizer.step({"logits": torch.from_numpy(weights * (by_weights - weights @ by_weights))})
    return logits.softmax(0).to(prior)


def choose_weights(normals: Tensor, anomalies: Tensor, labels: Names, prior: Tensor, config: FusionConfig) -> Tensor:
    """The anchor alone, the prior, or learned weights [C]: whichever rank the labelled anomalies highest.

    By the mean over families of the AUROC against the normals; where two are as good as equal, the more anchored ones.
    Views that are blind to what the anchor sees lose here before they lose on unseen classes.

    Args:
        normals: as in `learn_weights`.
        anomalies: likewise.
        labels: likewise; none at all gives the prior.
        prior: likewise; the anchor is first.
        config: likewise.
    """
    if not len(labels):
        return prior
    prior, learned = prior.to(normals), learn_weights(normals, anomalies, labels, prior, config)
    if not config.fallback:
        return learned
    best, least = prior, math.inf
    for weights in (_anchor_alone(prior), prior, learned):
        by_these = missed(weights, normals, anomalies, labels, config)
        if by_these < least - config.least_gain:
            best, least = weights, by_these
    return best


def missed(weights: Tensor, normals: Tensor, anomalies: Tensor, labels: Names, config: FusionConfig) -> float:
    """The mean of `missed_shares` by these weights over families, of at least one, and their rows; see above."""
    scores = [fuse(weights, rows, config) for rows in (normals, anomalies)]
    return float(missed_shares(*scores) @ even_shares(labels))


class JudgedHalf(NamedTuple):
    """Labelled rows, and what the head makes of them by trees that did not learn from them.

    Attributes:
        rows: which ones, bool [M].
        anomalies: their scores, float [rows.sum()].
        normals: scores of the held-out normals by the same trees [n].
    """

    rows: npt.NDArray[np.bool_]
    anomalies: Tensor
    normals: Tensor


def head_weights(labels: Names, config: FusionConfig) -> list[float]:
    """What the head's weight may be with labelled rows of these families [M], the least first."""
    n_families = len(np.unique(labels.astype(str)))
    return [config.head * 2**doublings for doublings in range(min(n_families, 1 + config.most_doublings))]


def head_weight(
    normals: Tensor, anomalies: Tensor, labels: Names, halves: Callable[[], list[JudgedHalf]], config: FusionConfig
) -> float:
    """The head's weight beside those of the distances, which have sum 1: doubled where rows are found better by that.

    The trees have to show that they find rows which they did not learn from: by two standard errors better than chance.

    Args:
        normals: fused scores of held-out normals by the distances [n].
        anomalies: those of labelled anomalies [M], by directions that did not train on their family.
        labels: their families [M].
        halves: gives the head's scores of both, each row in one of them; asked where there is a choice.
        config: as in `learn_weights`.
    """
    weights = head_weights(labels, config)
    if len(weights) < 2:
        return config.head
    judged, of_families = halves(), even_shares(labels)

    def missed_by(of_distances: float, of_head: float) -> Floats:
        """The `missed_shares` of the rows [M] by both with these weights."""
        both, shares = normals.new_tensor([of_distances, of_head]), np.empty(len(labels))
        for half in judged:
            own = anomalies[torch.as_tensor(half.rows, device=anomalies.device)]
            pairs = (normals, half.normals), (own, half.anomalies)
            shares[half.rows] = missed_shares(*(fuse(both, torch.stack(pair), config) for pair in pairs))
        return shares

    by_head = missed_by(0.0, 1.0)
    mean = of_families @ by_head
    if mean + 2 * np.sqrt(of_families**2 @ (by_head - mean) ** 2) >= 0.5:
        return config.head
    best, least = config.head, math.inf
    for weight in weights:
        by_both = float(of_families @ missed_by(1.0, weight))
        if by_both < least - config.least_gain:
            best, least = weight, by_both
    return best


def choose_and_hold_out(
    normals: Tensor, families: Tensor, anomalies: Tensor, labels: Names, prior: Tensor, config: FusionConfig
) -> tuple[Tensor, Tensor]:
    """The weights of `choose_weights` [C], and the fused scores [n] that new rows at these normals' places would have.

    The weights make the normals that they are chosen by look less strange than new rows. Weights that were chosen
    without a normal's family, by half as many, make it look stranger. So: the mean of both, as for tails.

    Args:
        normals: scores [C, n].
        families: a number from 0 on for each [n].
        anomalies: see `choose_weights`.
        labels: likewise.
        prior: likewise.
        config: likewise.
    """
    own = [half for half in (families % 2 == 0, families % 2 == 1) if half.any() and not half.all()]
    judges = [normals, *(normals[:, ~half] for half in own)]
    jobs = [partial(choose_weights, part, anomalies, labels, prior, config) for part in judges]
    weights, *chosen_by_others = side_by_side(jobs)
    fused = fuse(weights, normals, config)
    by_others = fused.clone()
    for half, chosen in zip(own, chosen_by_others, strict=True):
        by_others[half] = fuse(chosen, normals[:, half], config)
    return weights, (fused + by_others) / 2


def weigh(
    normals: Tensor,
    by_head: Tensor,
    families: Tensor,
    n_normals: int,
    anomalies: Tensor,
    labels: Names,
    halves: Callable[[], list[JudgedHalf]],
    config: FusionConfig,
) -> tuple[Tensor, Tensor]:
    """The weights of distances' scores and the head's, and the fused scores that new rows at the normals' places have.

    Args:
        normals: scores of normals that were held out, by distances [C, n], the anchor first.
        by_head: the same normals' scores by the head [1, n]; [0, n] where there is none.
        families: a number from 0 on for each of them [n].
        n_normals: how many there are in all.
        anomalies: see `learn_weights`.
        labels: likewise.
        halves: see `head_weight`.
        config: likewise.

    Returns:
        Weights [C], or [C + 1] with the head's last, of sum 1; scores [n].
    """
    prior = prior_weights(len(normals), n_normals, config).to(normals.device)
    weights, fused = choose_and_hold_out(normals, families, anomalies, labels, prior, config)
    if not len(by_head):
        return weights, fused
    by_distances = fuse(weights, normals, config), fuse(weights, anomalies, config)
    of_head = head_weight(*by_distances, labels, halves, config)
    shares = weights.new_tensor([1.0, of_head]) / (1 + of_head)
    return torch.cat([weights * shares[0], shares[1:]]), fuse(shares, torch.cat([fused[None], by_head]), config)


def missed_shares(normals: Tensor, anomalies: Tensor) -> Floats:
    """The share of normals' scores [n] that lie above each labelled row's [M], equal ones by half: float64 [M]."""
    ordered = normals.sort().values
    below = torch.searchsorted(ordered, anomalies) + torch.searchsorted(ordered, anomalies, right=True)
    shares: Floats = 1 - below.double().cpu().numpy() / (2 * len(ordered))
    return shares


def _anchor_alone(prior: Tensor) -> Tensor:
    alone = torch.zeros_like(prior)
    alone[0] = 1.0
    return alone


def even_shares(labels: Names) -> Floats:
    """The share of each row in a mean over families, of at least one [M]."""
    families = np.unique(labels.astype(str))
    shares: Floats = sum((labels == name) / np.sum(labels == name) for name in families) / len(families)
    return shares

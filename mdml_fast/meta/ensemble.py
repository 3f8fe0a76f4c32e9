"""The ensemble of directions: for each view and half of the families an encoder of its own, all trained together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from mdml_kernels import SoftmaxMarginLoss
from torch import Tensor

from mdml_fast.data.labelled import Names
from mdml_fast.data.views import VIEWS
from mdml_fast.episodes import Direction, EpisodeSampler, Families, synthetic_rows
from mdml_fast.meta.adam import Adam
from mdml_fast.meta.checkpoint import Checkpoint
from mdml_fast.meta.encoders import Encoders, ResidualEncoder
from mdml_fast.meta.engine import MetaEngine
from mdml_fast.meta.heads import PrototypeHead
from mdml_fast.meta.history import History
from mdml_fast.meta.training import Progress, train
from mdml_fast.threads import single_thread

# In each view the directions take complementary halves of the seen families.
HALVES = 2


@dataclass(frozen=True)
class EnsembleConfig:
    """How the directions are trained."""

    hidden: int = 64
    # Prototypes and normal queries of an episode. Twice as many gain 0.0005 AUROC and take three times as long.
    n_prototypes: int = 256
    n_queries: int = 128
    # Labelled and synthetic anomalies of an episode, on average as many: the seen families tell where anomalies are,
    # the synthetic ones that they may be anywhere. Two labelled to one cost digits and letters up to 0.008 AUROC on
    # classes that were not seen, and gained nothing on those that were.
    n_anomalies: int = 192
    # Whether they see the ones and the others at all; without both of them there is nothing to train on.
    labelled: bool = True
    synthetic: bool = True
    # The synthetic anomalies are drawn once for each view; episodes pick from so many.
    n_synthetic: int = 4096
    # The encoder starts as the identity, that is, at the neighbour distances of its view; so many steps move it away
    # from them slowly. A network rate of 3e-3 tears low-dimensional tables apart. A hundred steps at rates of 1e-2 and
    # 1e-3 find letters better by 0.002 AUROC and no other table, and take a sixth more time in all.
    steps: int = 70
    # Steps on further rows, from the weights that there are.
    further_steps: int = 18
    scale_rate: float = 1.4e-2
    network_rate: float = 1.4e-3
    # Pulls the encoder back to the identity: this times mean(s²) + sum(B²).
    shrinkage: float = 0.01
    # Where an episode's normals are told apart from anything else at the start: this share of them is outside.
    background_quantile: float = 0.05


class Ensemble(NamedTuple):
    """Trained directions: those of one half of the seen families, view by view, then those of the other.

    Attributes:
        encoders: of the directions.
        trained_on: the seen families that each direction was trained on [D].
    """

    encoders: Encoders
    trained_on: Sequence[Sequence[str]]

    def never_saw(self, labels: Names) -> Tensor:
        """Whether each direction was not trained on the family of each row [M], bool [D, M]."""
        return torch.tensor([[name not in names for name in labels] for names in self.trained_on], dtype=torch.bool)


def train_ensemble(
    normals: Tensor,
    anomalies: Tensor,
    labels: Names,
    config: EnsembleConfig,
    *,
    seed: int,
    previous: Ensemble | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Ensemble, History]:
    """Train one encoder for each view and each of two halves of the families, all in one batched computation.

    For every labelled row there is thus a direction in each view that never saw its family, which is what the weights
    are learned from.

    Args:
        normals: in each view, float [4, n, d].
        anomalies: labelled anomalies in each view, float [4, M, d]; M may be 0, then synthetic ones stand in.
        labels: their classes [M].
        config: the constants.
        seed: of the halves, the episodes, the synthetic anomalies and the initial weights.
        previous: go on from this ensemble, for few steps: its directions keep their families, and take new ones too.
        dtype: of the encoders' computation; None is float32.
        progress: told after each outer step.
        checkpoint: where the state of the run is kept.

    Returns:
        The directions, and the losses of the steps.
    """
    rng = np.random.default_rng(seed)
    names = np.unique(labels.astype(str)).tolist() if config.labelled else []
    halves = _halves(names, rng, previous)
    with single_thread():  # what else runs meanwhile shall not wait for torch's threads, which spin on for a while
        sampler = _sampler(normals, anomalies, labels, halves, config, rng, seed)
        engine = _engine(anomalies.shape[-1], len(halves), config, seed, dtype, anomalies.device)
        if previous:
            for name, weight in previous.encoders.weights.items():
                engine.parameters()[f"encoder.{name}"].data.copy_(weight)
        _start_at_the_data(engine, sampler, config)
    rates = dict.fromkeys(engine.parameters(), config.network_rate)
    rates |= {"encoder.log_scale": config.scale_rate, "loss.background": config.scale_rate}
    # w·p is the gradient of w/2·p².
    decay = {
        "encoder.log_scale": 2 * config.shrinkage / anomalies.shape[-1],
        "encoder.outer.weight": 2 * config.shrinkage,
    }
    history = train(
        engine,
        sampler,
        Adam(engine.parameters(), rates, decay),
        n_steps=config.further_steps if previous else config.steps,
        episodes_per_step=len(halves),
        progress=progress,
        checkpoint=checkpoint,
    )
    weights = {
        name.removeprefix("encoder."): param.detach()
        for name, param in engine.parameters().items()
        if name.startswith("encoder.")
    }
    return Ensemble(Encoders(weights), halves), history


def _halves(names: Sequence[str], rng: np.random.Generator, previous: Ensemble | None) -> list[list[str]]:
    """The seen families that each direction is trained on; none where there are fewer than two halves."""
    if previous is None:
        orders = [rng.permutation(names).tolist() for _ in VIEWS]
        cut = len(names) // 2
        return [order[:cut] for order in orders] + [order[cut:] for order in orders]
    halves = [list(own) for own in previous.trained_on]
    known = {name for own in halves for name in own}
    for pair in zip(halves[: len(VIEWS)], halves[len(VIEWS) :], strict=True):
        for name in rng.permutation([name for name in names if name not in known]).tolist():
            min(pair, key=len).append(name)
    return halves


def _sampler(
    normals: Tensor,
    anomalies: Tensor,
    labels: Names,
    halves: Sequence[Sequence[str]],
    config: EnsembleConfig,
    rng: np.random.Generator,
    seed: int,
) -> EpisodeSampler:
    """Episodes over one matrix: view by view the normals, the synthetic, then the labelled anomalies."""
    names = np.unique(labels.astype(str)).tolist()
    within = [np.arange(config.n_synthetic)]
    within += [np.flatnonzero(labels == name) + config.n_synthetic for name in names]
    rows: list[Tensor] = []
    id_rows, ood_rows = [], []
    start = 0
    for own, labelled in zip(normals, anomalies, strict=True):
        synthetic = torch.as_tensor(synthetic_rows(own.cpu().numpy(), config.n_synthetic, rng), device=own.device)
        rows += [own, synthetic, labelled]
        id_rows.append(start + np.arange(len(own)))
        ood_rows += [start + len(own) + positions for positions in within]
        start += len(own) + len(synthetic) + len(labelled)
    directions = []
    for place, half in enumerate(halves):
        # Families are drawn evenly: a labelled row to a synthetic one.
        view = place % len(VIEWS)
        first = view * len(within)
        families = [first + 1 + names.index(name) for name in half]
        made_up = [first] * max(len(families), 1) if config.synthetic or not families else []
        directions.append(Direction((view,), (*families, *made_up)))
    return EpisodeSampler(
        torch.cat(rows),
        Families(VIEWS, tuple(id_rows)),
        Families(("synthetic", *names) * len(VIEWS), tuple(ood_rows)),
        directions,
        n_support=config.n_prototypes,
        n_query_id=config.n_queries,
        n_query_ood=config.n_anomalies,
        seed=seed,
    )


def _engine(
    n_features: int,
    n_directions: int,
    config: EnsembleConfig,
    seed: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> MetaEngine:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = SoftmaxMarginLoss(confidence="mass", form="bce", background=0.0, learn_background=True)
        encoder = ResidualEncoder(n_features, config.hidden)
        engine = MetaEngine(encoder, PrototypeHead(), inner_steps=0, loss=loss, dtype=dtype, n_directions=n_directions)
        inner = engine.parameters()["encoder.inner.weight"].data
        inner.copy_(torch.randn(inner.shape) * n_features**-0.5)
    engine.modules.to(device)
    return engine


def _start_at_the_data(engine: MetaEngine, sampler: EpisodeSampler, config: EnsembleConfig) -> None:
    """Set each direction's kernel width and background by the normals of its first episode."""
    assert engine.n_directions is not None
    episodes = sampler.batch(0, engine.n_directions)
    queries = episodes.query[:, : config.n_queries]
    # With variance 1 the logits are -½ the squared distances.
    logits = engine.logits(engine.adapt(episodes.support), queries, episodes.support).float()
    nearest = -2 * logits.amax(-1)
    # Where most queries equal a prototype, the median is zero but not the mean.
    variance = torch.maximum(nearest.median(1).values, 0.1 * nearest.mean(1)).clamp(min=1e-6)
    mass = (logits / variance[:, None, None]).logsumexp(-1)
    engine.buffers()["head.variance"].copy_(variance)
    engine.parameters()["loss.background"].data.copy_(mass.quantile(config.background_quantile, dim=1))

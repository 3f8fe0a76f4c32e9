"""The ensemble of directions: for each view of each fold of the normals an encoder of its own, trained together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mdml_kernels import SoftmaxMarginLoss
from torch import Tensor
from torch.func import functional_call, vmap

from mdml_fast.data.labelled import Names
from mdml_fast.episodes import Direction, EpisodeSampler, Families, synthetic_rows
from mdml_fast.meta.checkpoint import Checkpoint
from mdml_fast.meta.encoders import ResidualEncoder
from mdml_fast.meta.engine import MetaEngine
from mdml_fast.meta.heads import PrototypeHead
from mdml_fast.meta.training import Progress, train


@dataclass(frozen=True)
class EnsembleConfig:
    """How the directions are trained."""

    hidden: int = 64
    # Prototypes and normal queries of an episode. Twice as many gain 0.0005 AUROC and take three times as long.
    n_prototypes: int = 256
    n_queries: int = 128
    # Labelled and synthetic anomalies of an episode, on average two to one: the seen families tell where anomalies
    # are, the synthetic ones that they may be anywhere.
    n_anomalies: int = 192
    # Whether they see the ones and the others at all; without both of them there is nothing to train on.
    labelled: bool = True
    synthetic: bool = True
    # The synthetic anomalies are drawn once for each view; episodes pick from so many.
    n_synthetic: int = 4096
    # The encoder starts as the identity, that is, at the neighbour distances of its view; so many steps move it away
    # from them slowly. A network rate of 3e-3 tears low-dimensional tables apart.
    steps: int = 100
    scale_rate: float = 1e-2
    network_rate: float = 1e-3
    # Pulls the encoder back to the identity: this times mean(s²) + sum(B²).
    shrinkage: float = 0.01
    # Where an episode's normals are told apart from anything else at the start: this share of them is outside.
    background_quantile: float = 0.05


class Ensemble:
    """D trained encoders, each of one view.

    Args:
        weights: of the encoders, by parameter name, each [D, …].
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        hidden, n_features = self.weights["inner.weight"].shape[1:]
        self._encoder = ResidualEncoder(n_features, hidden)

    def embed(self, rows: Tensor) -> Tensor:
        """Embeddings [D, N, d] of rows in each direction's view [D, N, d]."""
        encode: Callable[[dict[str, Tensor], Tensor], Tensor] = vmap(
            lambda weights, x: functional_call(self._encoder, weights, (x,))
        )
        return encode(self.weights, rows)


def train_ensemble(
    normals: Sequence[Tensor],
    anomalies: Tensor,
    labels: Names,
    config: EnsembleConfig,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Ensemble, list[frozenset[str]], list[float]]:
    """Train one encoder for each view of each of two folds, all in one batched computation.

    Fold by fold a view's directions learn from complementary halves of the seen families, too, so that there is one
    that never saw a row's family, which is what the weights are learned from.

    Args:
        normals: V matrices [n, d]: in each view of the first fold that fold's normals, then the second fold's.
        anomalies: labelled anomalies in each view, float [V, M, d]; M may be 0, then synthetic ones stand in.
        labels: their classes [M].
        config: the constants.
        seed: of the halves, the episodes, the synthetic anomalies and the initial weights.
        dtype: of the encoders' computation; None is float32.
        progress: told after each outer step.
        checkpoint: where the state of the run is kept.

    Returns:
        The encoders, the families that each direction was trained on, and the mean outer loss of each step.
    """
    rng = np.random.default_rng(seed)
    names = np.unique(labels.astype(str)).tolist() if config.labelled else []
    halves = _halves(len(normals), names, rng)
    sampler = _sampler(normals, anomalies, labels, halves, config, rng, seed)
    engine = _engine(anomalies.shape[-1], len(halves), config, seed, dtype, anomalies.device)
    _start_at_the_data(engine, sampler, config)
    rates = {"encoder.log_scale": config.scale_rate, "loss.background": config.scale_rate}
    # Adam's weight decay w adds w·p to the gradient of p: that of w/2·p².
    decay = {
        "encoder.log_scale": 2 * config.shrinkage / anomalies.shape[-1],
        "encoder.outer.weight": 2 * config.shrinkage,
    }
    optimizer = torch.optim.Adam(
        [
            {"params": [param], "lr": rates.get(name, config.network_rate), "weight_decay": decay.get(name, 0.0)}
            for name, param in engine.parameters().items()
        ]
    )
    losses = train(
        engine,
        sampler,
        optimizer,
        n_steps=config.steps,
        episodes_per_step=len(halves),
        progress=progress,
        checkpoint=checkpoint,
    )
    weights = {
        name.removeprefix("encoder."): param.detach()
        for name, param in engine.parameters().items()
        if name.startswith("encoder.")
    }
    return Ensemble(weights), [frozenset(half) for half in halves], losses


def _halves(n_views: int, names: Sequence[str], rng: np.random.Generator) -> list[list[str]]:
    """The seen families of each direction: of each kind of view a half for the first fold, the other for the second."""
    orders = [rng.permutation(names).tolist() for _ in range(n_views // 2)]
    cut = len(names) // 2
    return [order[:cut] for order in orders] + [order[cut:] for order in orders]


def _sampler(
    normals: Sequence[Tensor],
    anomalies: Tensor,
    labels: Names,
    halves: Sequence[Sequence[str]],
    config: EnsembleConfig,
    rng: np.random.Generator,
    seed: int,
) -> EpisodeSampler:
    """Episodes over one matrix: view by view the normals, then the synthetic, then the labelled anomalies."""
    names = np.unique(labels.astype(str)).tolist()
    matrices, id_rows, ood_rows, directions = [], [], [], []
    first = 0
    for view, (own, labelled, half) in enumerate(zip(normals, anomalies, halves, strict=True)):
        synthetic = synthetic_rows(own.cpu().numpy(), config.n_synthetic, rng)
        matrices += [own, torch.as_tensor(synthetic, device=own.device), labelled]
        n_before = first + len(own)
        id_rows.append(np.arange(first, n_before))
        ood_rows.append(np.arange(n_before, n_before + len(synthetic)))
        ood_rows += [np.flatnonzero(labels == name) + n_before + len(synthetic) for name in names]
        first = n_before + len(synthetic) + len(labelled)
        # Families are drawn evenly: two labelled rows to a synthetic one.
        place = view * (1 + len(names))
        families = [place + 1 + names.index(name) for name in half]
        made_up = [place] * max(len(families), 1) if config.synthetic or not families else []
        directions.append(Direction((view,), (*families, *families, *made_up)))
    id_names = tuple(f"view {view}" for view in range(len(normals)))
    ood_names = tuple(f"{view}: {name}" for view in id_names for name in ("synthetic", *names))
    return EpisodeSampler(
        torch.cat(matrices),
        Families(id_names, tuple(id_rows)),
        Families(ood_names, tuple(ood_rows)),
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

"""preset="default": views, an ensemble of directions, neighbours in their embeddings, anchored weights, a tree head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.data.labelled import Names
from mdml_fast.data.views import VIEWS, LearnerViews, Views
from mdml_fast.meta.checkpoint import Checkpoint
from mdml_fast.meta.ensemble import Ensemble, EnsembleConfig, train_ensemble
from mdml_fast.meta.fusion import FusionConfig, fuse, learn_weights, prior_weights
from mdml_fast.meta.history import History
from mdml_fast.meta.left_out import FIRST, NEITHER, SECOND, LeftOut, judged_by, left_out_in_turn
from mdml_fast.meta.model import HeldOut, TrainingRows, fingerprint, tensors_under
from mdml_fast.meta.neighbourhood import SCORES, Neighbourhood, NeighbourhoodConfig
from mdml_fast.meta.scoring import NormalFamily, Scorer
from mdml_fast.meta.tails import Tails
from mdml_fast.meta.training import Progress
from mdml_fast.meta.trees import TreeHead, excess

LEARNERS = (FIRST, SECOND)
# Rows that are scored at once, so that memory does not grow with the table.
SCORING_ROWS = 4096
# Shares of distances held at once where scores are explained: 16 MiB.
EXPLAINED_VALUES = 2**22


@dataclass(frozen=True)
class DefaultConfig:
    """The constants of the default algorithm: one set for all data."""

    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    neighbourhood: NeighbourhoodConfig = field(default_factory=NeighbourhoodConfig)
    # Normals that the views, the encoders and the trees learn from.
    training_normals: int = 20_000
    tree_normals: int = 10_000
    # The share of the normals that each of two learners leaves out: those are judged by it, which gives the tails, the
    # weights and the calibration. Groups are few, and a rate found on few groups is not that of another.
    left_out: float = 0.25
    left_out_groups: float = 0.5
    # More judged normals than this only cost time: a rate of 1 % is known to 0.16 %.
    judged_normals: int = 4_000
    # Labelled anomalies of each family that are learned from.
    family_anomalies: int = 1_000
    # Trees average; more of them change nothing but the time. 0 leaves the head out.
    n_trees: int = 200
    # The head speaks only where a row looks more anomalous than this share of the normals, so that it can't disturb
    # the order of the others.
    head_quantile: float = 0.98

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> DefaultConfig:
        """The inverse of `dataclasses.asdict`, also after a way through JSON.

        Raises:
            TypeError: it names other constants.
        """
        parts = dict(document)
        ensemble = EnsembleConfig(**parts.pop("ensemble"))  # type: ignore[arg-type]
        fusion = FusionConfig(**parts.pop("fusion"))  # type: ignore[arg-type]
        neighbourhood = NeighbourhoodConfig(**parts.pop("neighbourhood"))  # type: ignore[arg-type]
        return cls(ensemble, replace(fusion, quantiles=tuple(fusion.quantiles)), neighbourhood, **parts)  # type: ignore[arg-type]


class DefaultModel:
    """The default algorithm, trained.

    Views, encoders and trees are those of two learners, each of which leaves some normals out, groups whole. A normal
    to calibrate on is judged by the learner that left it out, a new row by both: no normal is wasted.

    Args:
        config: the constants.
        families: the training normals, then those that it was adapted to; a row is as normal as the nearest finds it.
        weights: of `SCORES`, positive with sum 1 [6].
        head: the trees; None where there were no labelled anomalies.
        head_gain: what the head adds to the score of a row that it is sure of, a scalar.
        history: of the training.
        held_out: the normals to calibrate on; None in a model that was loaded.
    """

    def __init__(
        self,
        config: DefaultConfig,
        families: list[NormalFamily],
        weights: Tensor,
        head: TreeHead | None,
        head_gain: Tensor,
        history: History,
        held_out: HeldOut | None = None,
    ) -> None:
        self.config, self.history, self.held_out = config, history, held_out
        self._families, self._weights = families, weights
        self._head, self._head_gain = head, head_gain

    @classmethod
    def divide(cls, config: DefaultConfig, n_normals: int, rate: float, groups: Names | None, seed: int) -> LeftOut:  # noqa: ARG003 - half of the normals is judged, at any rate
        """See `Model`."""
        share = config.left_out if groups is None else config.left_out_groups
        return left_out_in_turn(n_normals, groups, share, seed)

    @classmethod
    def fit(
        cls,
        rows: TrainingRows,
        config: DefaultConfig,
        *,
        seed: int,
        device: torch.device,
        previous: DefaultModel | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
        resume: bool = False,
    ) -> DefaultModel:
        """Learn from normals and labelled anomalies; without anomalies synthetic ones stand in.

        Args:
            rows: the training rows.
            config: the constants.
            seed: of every random choice.
            device: where to compute.
            previous: a model of rows like these, whose views stay and whose encoders are trained a little further.
            dtype: of the encoders' computation in training; None is float32.
            progress: told after each outer step.
            checkpoint: a file for the state of the run; it stays when the run is cut off.
            resume: go on from that file.
        """
        # A random order, so that "the first so many" is a fair sample wherever there is a bound: another than that by
        # which the learners left some out.
        order = np.random.default_rng([seed, 3]).permutation(len(rows.normals))
        normals, left_out = torch.as_tensor(rows.normals[order], device=device), rows.left_out[order]
        families = torch.as_tensor(family_codes(rows.groups, len(order))[order], device=device)
        labelled = _at_most_of_each(rows.anomaly_labels, config.family_anomalies, seed)
        anomalies = torch.as_tensor(rows.anomalies[labelled], device=device)
        labels = rows.anomaly_labels[labelled]

        learned = [np.flatnonzero(~judged_by(learner, left_out[: config.training_normals])) for learner in LEARNERS]
        known_space = previous._families[0].neighbourhood if previous else None
        if known_space:
            views = known_space.views.to(device)
        else:
            views = LearnerViews(Views.fit(rows.normals[order[own]]) for own in learned).to(device)
        own_rows = [own.transform(normals[chosen]) for own, chosen in zip(views.learners, learned, strict=True)]
        ensemble, history = train_ensemble(
            [view for learner in own_rows for view in learner],
            views.transform(anomalies),
            labels,
            config.ensemble,
            seed=seed,
            previous=known_space.ensemble if known_space else None,
            dtype=dtype,
            progress=progress,
            checkpoint=Checkpoint(checkpoint, fingerprint(rows, config, seed, dtype), resume) if checkpoint else None,
        )
        centres = torch.zeros((len(LEARNERS), normals.shape[1]), device=device)
        neighbourhood = Neighbourhood(config.neighbourhood, views, ensemble, normals, families, centres)

        judged = np.flatnonzero(left_out[: config.tree_normals] != NEITHER)[: config.judged_normals]
        judges = np.repeat([judged_by(learner, left_out[judged]) for learner in LEARNERS], len(VIEWS), axis=0)
        distances = neighbourhood.distances(normals[judged], families[judged], torch.as_tensor(judges, device=device))
        head, probability = None, distances.new_zeros(len(judged))
        if len(anomalies) and config.n_trees:
            sample = slice(config.tree_normals)
            head, probability = TreeHead.fit(
                rows.normals[order[sample]], left_out[sample], rows.anomalies[labelled], config.n_trees, seed, device
            )
            probability = probability[judged]
        gate = probability.quantile(config.head_quantile)
        known = NormalFamily(neighbourhood, Tails.fit(distances), gate)

        normal_scores = known.tails.score(distances)
        never_saw = _not_in(labels, ensemble.trained_on).to(device)
        anomaly_scores = known.tails.score(neighbourhood.distances(anomalies, counted=never_saw))
        prior = prior_weights(len(SCORES), len(normals), config.fusion).to(device)
        weights = learn_weights(normal_scores, anomaly_scores, labels, prior, config.fusion)
        fused = fuse(weights, normal_scores, config.fusion)
        low, high = fused.quantile(weights.new_tensor([0.5, 0.999]))
        anomaly = fused + (high - low) * excess(probability, gate)
        held_out = HeldOut(order[judged], -anomaly.double().cpu().numpy())
        if previous:
            history = previous.history.followed_by(history)
        return cls(config, [known], weights, head, high - low, history, held_out)

    def score(self, rows: Rows) -> Floats:
        """Minus the anomaly score of each row [N, d] -> [N]: higher is more normal."""
        scores = [np.empty(0)]
        with torch.inference_mode():
            for start in range(0, len(rows), SCORING_ROWS):
                block = torch.as_tensor(rows[start : start + SCORING_ROWS], device=self._weights.device)
                scores.append(-self.scorer.anomaly(block).double().cpu().numpy())
        return np.concatenate(scores)

    def explain(self, rows: Rows, nearest: Rows) -> tuple[Floats, Floats]:
        """The score of each row [N], and what each feature adds to it compared with a normal, both [N, d]."""
        scorer, n_features = self.scorer, rows.shape[1]
        step = max(1, min(SCORING_ROWS, EXPLAINED_VALUES // (len(self._families[0].tails.distances) * n_features)))
        scores, contributions = [np.empty(0)], [np.empty((0, n_features))]
        with torch.inference_mode():
            for start in range(0, len(rows), step):
                block, normals = (
                    torch.as_tensor(matrix[start : start + step], device=self._weights.device)
                    for matrix in (rows, nearest)
                )
                anomaly, parts = scorer.explain(block, normals)
                scores.append(-anomaly.double().cpu().numpy())
                contributions.append(-parts.double().cpu().numpy())
        return np.concatenate(scores), np.concatenate(contributions)

    def adapt(self, normals: Rows) -> None:
        """Take normals [n, d] of a new family as normal; nothing else changes.

        The family keeps its own tails: its distances, each row left out, are what its other rows are held against, so
        that a few rows do as well as many. To the head it may look anomalous: for rows nearest to it, only what looks
        more so than all of these is heard.
        """
        base, gate = self._families[0].neighbourhood, self._families[0].gate
        rows = torch.as_tensor(normals, device=self._weights.device)
        families = torch.arange(len(rows), device=rows.device)
        centres = base.views.whitened(base.views.transform(rows)).mean(1)
        own = Neighbourhood(base.config, base.views, base.ensemble, rows, families, centres)
        if self._head:
            gate = torch.maximum(gate, self._head.probability(rows).max())
        self._families.append(NormalFamily(own, Tails.fit(own.distances(rows, families)), gate))

    @property
    def scorer(self) -> Scorer:
        """What scores are made of."""
        return Scorer(self._families, self._weights, self.config.fusion, self._head, self._head_gain)

    def to_tensors(self) -> dict[str, Tensor]:
        """All that was learned, by name, on the CPU."""
        views, ensemble = self._families[0].neighbourhood.views, self._families[0].neighbourhood.ensemble
        parts = {
            "views": views.tensors,
            "encoders": ensemble.weights,
            "fusion": {"weights": self._weights, "head_gain": self._head_gain},
            "trees": self._head.tensors if self._head else {},
        }
        for place, family in enumerate(self._families):
            parts[f"normals{place}"] = {
                "rows": family.neighbourhood.normals,
                "families": family.neighbourhood.families,
                "centres": family.neighbourhood.centres,
                "distances": family.tails.distances,
                "gate": family.gate.clone(),
            }
        return {f"{part}.{name}": value.cpu() for part, tensors in parts.items() for name, value in tensors.items()}

    def to_json(self) -> dict[str, Any]:
        """What was learned beside the tensors, as plain JSON values."""
        trained_on = self._families[0].neighbourhood.ensemble.trained_on
        return {"history": self.history._asdict(), "trained_on": [list(names) for names in trained_on]}

    @classmethod
    def from_tensors(
        cls,
        config: DefaultConfig,
        tensors: Mapping[str, Tensor],
        learned: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype | None,  # noqa: ARG003 - scoring is in float32
    ) -> DefaultModel:
        """The inverse of `to_tensors` and `to_json`.

        Raises:
            KeyError, TypeError, RuntimeError: they are not those of this algorithm.
        """
        tensors = {name: value.to(device) for name, value in tensors.items()}
        encoders, fusion, trees = (tensors_under(part, tensors) for part in ("encoders", "fusion", "trees"))
        views = LearnerViews.from_tensors(tensors_under("views", tensors))
        ensemble = Ensemble(encoders, learned["trained_on"])
        families: list[NormalFamily] = []
        while own := tensors_under(f"normals{len(families)}", tensors):
            neighbourhood = Neighbourhood(
                config.neighbourhood, views, ensemble, own["rows"], own["families"], own["centres"]
            )
            families.append(NormalFamily(neighbourhood, Tails(own["distances"]), own["gate"]))
        if not families:
            raise KeyError("normals0.rows")
        head = TreeHead(trees) if trees else None
        return cls(config, families, fusion["weights"], head, fusion["head_gain"], History(**learned["history"]))


def _at_most_of_each(labels: Names, most: int, seed: int) -> npt.NDArray[np.intp]:
    """Positions, increasing, of up to so many random rows of each class [N]."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == name))[:most] for name in np.unique(labels.astype(str))]
    return np.sort(np.concatenate([np.empty(0, dtype=np.intp), *chosen]))


def _not_in(labels: Names, trained_on: Sequence[Sequence[str]]) -> Tensor:
    """Whether each direction never saw the family of each row, bool [D, M]."""
    return torch.tensor([[name not in names for name in labels] for names in trained_on], dtype=torch.bool)


def family_codes(groups: Names | None, n_rows: int) -> npt.NDArray[np.int64]:
    """A number [N] for each row: the same for rows of one group; without groups, or with one only, all differ."""
    if groups is not None:
        names, codes = np.unique(groups.astype(str), return_inverse=True)
        if len(names) > 1:
            return codes
    return np.arange(n_rows)

"""preset="default": views, directions, neighbours in their embeddings, anchored weights, a tree head, discriminants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdml_fast.calibration import CALIBRATION_ROWS, Positions
from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.data.labelled import at_most_of_each, family_codes
from mdml_fast.data.views import VIEWS, Views
from mdml_fast.meta.checkpoint import Checkpoint
from mdml_fast.meta.discriminants import DiscriminantConfig, Discriminants
from mdml_fast.meta.distance_trees import DistanceTrees
from mdml_fast.meta.encoders import Encoders
from mdml_fast.meta.ensemble import Ensemble, EnsembleConfig, train_ensemble
from mdml_fast.meta.fusion import FusionConfig, JudgedHalf, fuse, head_weights, weigh
from mdml_fast.meta.history import History
from mdml_fast.meta.model import HeldOut, TrainingRows, fingerprint, tensors_under
from mdml_fast.meta.neighbourhood import SCORES, Neighbourhood, NeighbourhoodConfig
from mdml_fast.meta.scoring import (
    NormalFamily,
    Scorer,
    family_tails,
    head_odds,
    judged_by_halves,
    outer,
    scores_by_others,
    with_sides,
)
from mdml_fast.meta.tails import Tails
from mdml_fast.meta.training import Progress
from mdml_fast.meta.trees import TreeHead, Trees, grow
from mdml_fast.threads import beside

# Rows that are scored at once, so that memory does not grow with the table, and among which near ones are sought.
SCORING_ROWS, ORDERED_ROWS = 4096, 16_384
# Shares of distances held at once where scores are explained: 16 MiB.
EXPLAINED_VALUES = 2**22


@dataclass(frozen=True)
class DefaultConfig:
    """The constants of the default algorithm: one set for all data."""

    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    neighbourhood: NeighbourhoodConfig = field(default_factory=NeighbourhoodConfig)
    # Of normals of several classes, and of families that are adapted to.
    discriminants: DiscriminantConfig = field(default_factory=DiscriminantConfig)
    # Normals that the views, the encoders and the trees learn from.
    training_normals: int = 20_000
    tree_normals: int = 10_000
    # More normals to calibrate on only cost time; of groups any number of rows may be left out.
    judged_normals: int = CALIBRATION_ROWS
    # Labelled anomalies of each family that are learned from.
    family_anomalies: int = 1_000
    # Trees that ask features alone; more find the seen classes hardly better, and take longer. 0 leaves the head out.
    n_trees: int = 70
    # Those of the head that may ask distances too: they find other classes as well.
    distance_trees: DistanceTrees = field(default_factory=DistanceTrees)
    # Trees of each half that the head's weight is chosen by, and normals they learn from: more choose little better.
    weighing_trees: int = 20
    weighing_normals: int = 1_000

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
        discriminants = DiscriminantConfig(**parts.pop("discriminants"))  # type: ignore[arg-type]
        trees = DistanceTrees(**parts.pop("distance_trees"))  # type: ignore[arg-type]
        fusion = replace(fusion, quantiles=tuple(fusion.quantiles))
        return cls(ensemble, fusion, neighbourhood, discriminants, distance_trees=trees, **parts)  # type: ignore[arg-type]


class DefaultModel:
    """The default algorithm, trained.

    Views, encoders, trees and discriminants learn nothing from the normals that are held out. Those give the tails, the
    weights and the calibration, and are references like all others: a normal is compared with those of other families.

    Args:
        config: the constants.
        ensemble: the directions; rows are scored by the mean of their embeddings in each view.
        families: the training normals, then those that it was adapted to; a row is as normal as the nearest finds it.
        weights: of `SCORES`, and after them the head's, if there is one: not negative, with sum 1 [6 or 7]; that of
            discriminants comes on top.
        head: the trees; None where there were no labelled anomalies.
        history: of the training.
        held_out: the normals to calibrate on; None in a model that was loaded.
    """

    comparable = True  # logarithms of tail probabilities

    def __init__(
        self,
        config: DefaultConfig,
        ensemble: Ensemble,
        families: list[NormalFamily],
        weights: Tensor,
        head: TreeHead | None,
        history: History,
        held_out: HeldOut | None = None,
    ) -> None:
        self.config, self.history, self.held_out = config, history, held_out
        self._ensemble, self._families, self._weights, self._head = ensemble, families, weights, head

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
        # A random order, so that "the first so many" is a fair sample wherever there is a bound.
        order = np.random.default_rng([seed, 3]).permutation(len(rows.normals))
        normals, held_out = torch.as_tensor(rows.normals[order], device=device), rows.held_out[order]
        families = torch.as_tensor(family_codes(rows.groups, len(order))[order], device=device)
        labelled = at_most_of_each(rows.anomaly_labels, config.family_anomalies, seed)
        anomalies = torch.as_tensor(rows.anomalies[labelled], device=device)
        labels = rows.anomaly_labels[labelled]

        learned = np.flatnonzero(~held_out)[: config.training_normals]
        views = previous._families[0].neighbourhood.views if previous else Views.fit(rows.normals[order[learned]])
        views = views.to(device)
        has_head = bool(len(anomalies) and config.n_trees)
        examples = rows.normals[order[learned[: config.tree_normals]]], rows.anomalies[labelled]
        by_features: Callable[[], Trees] = partial(grow, *examples, config.n_trees, seed) if has_head else list
        judged = np.flatnonzero(held_out)[: config.judged_normals]
        to_judge = examples[0][: config.weighing_normals], examples[1], labels, normals[judged]
        has_choice = has_head and len(head_weights(labels, config.fusion)) > 1
        judge = partial(judged_by_halves, *to_judge, config.weighing_trees, seed)
        by_halves: Callable[[], list[JudgedHalf]] = judge if has_choice else list
        kept = Checkpoint(checkpoint, fingerprint(rows, config, seed, dtype), resume) if checkpoint else None
        # Training leaves a core idle now and then.
        with beside(by_features) as grown, beside(by_halves) as halves:
            seen = views.transform(normals[learned])
            ensemble, history = train_ensemble(
                seen,
                views.transform(anomalies),
                labels,
                config.ensemble,
                seed=seed,
                previous=previous._ensemble if previous else None,
                dtype=dtype,
                progress=progress,
                checkpoint=kept,
            )
            trees = grown()
        centre = torch.zeros(normals.shape[1], device=device)
        encoders = ensemble.encoders.averaged(len(VIEWS))
        neighbourhood = Neighbourhood(config.neighbourhood, views, encoders, normals, families, centre)

        # Trees and discriminants learn from no held-out normal, so that they judge these as they would judge new ones.
        to_grow = neighbourhood, normals[learned], anomalies, seed
        grow_more: Callable[[], Trees] = partial(config.distance_trees.grow, *to_grow) if trees else list
        with beside(grow_more) as grown:
            placed = neighbourhood.place(normals[judged])
            distances = neighbourhood.distances(placed, families[judged])
            anomaly_scores = distances.new_empty(len(SCORES), 0)
            if len(anomalies):
                judges = (neighbourhood, ensemble, placed, distances, families[judged])
                anomaly_scores = scores_by_others(*judges, anomalies, labels)
            trees = trees + grown()
        head = TreeHead.of(trees, device) if trees else None
        by_head = head_odds(head, placed.rows, Tails.fit(distances), distances)
        distances = torch.cat([distances, by_head])
        tails = family_tails(distances)
        # Numbers from 0 on: of rows, or of groups.
        units = torch.arange(len(judged), device=device)
        if rows.groups is not None:
            units = torch.unique(families[judged], return_inverse=True)[1]
        normal_scores, by_head = tails.held_out_scores(distances, units).tensor_split([len(SCORES)])
        by_normals = (normal_scores, by_head, units, len(normals))
        weights, anomaly = weigh(*by_normals, anomaly_scores, labels, halves, config.fusion)
        classes, discriminants = rows.normal_labels[order[learned]], None
        if found := Discriminants.of_classes(seen, classes, placed.views, config.discriminants):
            discriminants, sides = found
            both = torch.cat([anomaly.unsqueeze(0), discriminants.tails.held_out_scores(sides, units)])
            anomaly = fuse(with_sides(anomaly.new_ones(1), discriminants, config.fusion), both, config.fusion)
        if previous:
            history = previous.history.followed_by(history)
        to_calibrate_on = HeldOut(order[judged], -anomaly.double().cpu().numpy())
        known = NormalFamily(neighbourhood, tails, outer(anomaly), discriminants)
        return cls(config, ensemble, [known], weights, head, history, to_calibrate_on)

    def score(self, rows: Rows) -> Floats:
        """Minus the anomaly score of each row [N, d] -> [N]: higher is more normal."""
        scores = np.empty(len(rows))
        with torch.inference_mode():
            for places in self._parts(rows, SCORING_ROWS):
                block = torch.as_tensor(rows[places], device=self._weights.device)
                scores[places] = -self.scorer.anomaly(block).double().cpu().numpy()
        return scores

    def explain(self, rows: Rows, normals: Rows, nearest: Positions) -> tuple[Floats, Floats]:
        """The score of each row [N], and what each feature adds to it compared with its normal, both [N, d]."""
        device, n_features = self._weights.device, rows.shape[1]
        step = max(1, min(SCORING_ROWS, EXPLAINED_VALUES // (len(SCORES) * n_features)))
        scores, contributions = np.empty(len(rows)), np.empty(rows.shape)
        with torch.inference_mode():
            for places in self._parts(rows, step):
                used, which = np.unique(nearest[places], return_inverse=True)
                block, others = (torch.as_tensor(some, device=device) for some in (rows[places], normals[used]))
                anomaly, parts = self.scorer.explain(block, others, torch.as_tensor(which, device=device))
                scores[places] = -anomaly.double().cpu().numpy()
                contributions[places] = -parts.double().cpu().numpy()
        return scores, contributions

    def _parts(self, rows: Rows, most: int) -> Iterator[Positions]:
        """Positions of rows, so many at most at once; near ones together, which takes a sixth less time in all."""
        neighbourhood = self._families[0].neighbourhood
        for start in range(0, len(rows), ORDERED_ROWS):
            block = torch.as_tensor(rows[start : start + ORDERED_ROWS], device=self._weights.device)
            for part in torch.split(neighbourhood.order(block), most):
                yield start + part.cpu().numpy()

    def adapt(self, normals: Rows) -> None:
        """Take normals [n, d] of a new family as normal; nothing else changes.

        The family keeps its own tails: its distances, each row left out, and the head's odds of its rows are what its
        other rows are held against, so that a few rows do as well as many. Few rows are far apart, so that anomalies
        may be as near to one as its own are: a discriminant tells what sets the family apart from the normals that
        were trained on. Its stranger rows are as strange as those of these normals.
        """
        first = self._families[0]
        base = first.neighbourhood
        order = np.random.default_rng(0).permutation(len(normals))
        rows = torch.as_tensor(normals[order], device=self._weights.device)
        families = torch.arange(len(rows), device=rows.device)
        placed = base.place(rows)
        centre = placed.views[VIEWS.index("whitened")].mean(0)
        own = Neighbourhood(base.config.of_adapted(), base.views, base.encoders, rows, families, centre)
        by_head = head_odds(self._head, rows, first.tails, base.distances(placed))
        distances = torch.cat([own.distances(placed, families), by_head])
        tails = family_tails(distances, first.tails)
        how = self.config.discriminants
        known = base.views.transform(base.normals[: how.normals])
        discriminants, sides = Discriminants.of_family(placed.views, known, how)
        held_out = ((tails, distances), (discriminants.tails, sides))
        scores = torch.cat([own_tails.held_out_scores(values, families) for own_tails, values in held_out])
        fused = fuse(self.scorer.weights_of(discriminants), scores, self.config.fusion)
        self._families.append(NormalFamily(own, tails, outer(fused), discriminants))

    @property
    def scorer(self) -> Scorer:
        """What scores are made of."""
        return Scorer(self._families, self._weights, self.config.fusion, self._head)

    def to_tensors(self) -> dict[str, Tensor]:
        """All that was learned, by name, on the CPU."""
        parts = {
            "views": self._families[0].neighbourhood.views.tensors,
            "encoders": self._ensemble.encoders.weights,
            "fusion": {"weights": self._weights},
            "trees": self._head.tensors if self._head else {},
        }
        for place, family in enumerate(self._families):
            parts[f"normals{place}"] = {
                "rows": family.neighbourhood.normals,
                "families": family.neighbourhood.families,
                "centre": family.neighbourhood.centre,
                "distances": family.tails.distances,
                "outer": family.outer,
            }
            parts[f"discriminants{place}"] = family.discriminants.tensors if family.discriminants else {}
        return {f"{part}.{name}": value.cpu() for part, tensors in parts.items() for name, value in tensors.items()}

    def to_json(self) -> dict[str, Any]:
        """What was learned beside the tensors, as plain JSON values."""
        trained_on = [list(names) for names in self._ensemble.trained_on]
        return {"history": self.history._asdict(), "trained_on": trained_on}

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
        directions, fusion, trees = (tensors_under(part, tensors) for part in ("encoders", "fusion", "trees"))
        views = Views(tensors_under("views", tensors))
        ensemble = Ensemble(Encoders(directions), learned["trained_on"])
        encoders = ensemble.encoders.averaged(len(VIEWS))
        families: list[NormalFamily] = []
        while own := tensors_under(f"normals{len(families)}", tensors):
            how = config.neighbourhood.of_adapted() if families else config.neighbourhood
            neighbourhood = Neighbourhood(how, views, encoders, own["rows"], own["families"], own["centre"])
            tails = family_tails(own["distances"], families[0].tails if families else None)
            sides = tensors_under(f"discriminants{len(families)}", tensors)
            discriminants = Discriminants.from_tensors(sides) if sides else None
            families.append(NormalFamily(neighbourhood, tails, own["outer"], discriminants))
        if not families:
            raise KeyError("normals0.rows")
        head = TreeHead(trees) if trees else None
        return cls(config, ensemble, families, fusion["weights"], head, History(**learned["history"]))

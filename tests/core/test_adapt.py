"""A new family of normals without training: what its rows, and what anomalies, score from then on."""

import numpy as np
import pytest
import torch
from support import FAST, PAPER, normals

from mdml_fast import MDMLDetector
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.discriminants import Discriminants
from mdml_fast.meta.fusion import fuse
from mdml_fast.meta.paper import PaperConfig
from mdml_fast.meta.scoring import OUTER_QUANTILE
from mdml_fast.meta.tails import SHAPED_TAIL_ROWS, Tails


@pytest.mark.parametrize("config", [FAST, PAPER], ids=["default", "paper"])
def test_a_new_family_of_normals_is_adapted_to(config: DefaultConfig | PaperConfig) -> None:
    detector = MDMLDetector(config, false_alarm_rate=0.05, random_state=0).fit(normals(300))
    new = normals(450, seed=1, centre=6.0)
    before = detector.predict(new[50:]) == -1
    old = detector.score_samples(normals(50, seed=2))
    detector.adapt(new[:50])
    assert (detector.score_samples(normals(50, seed=2)) >= old - 1e-5).all()
    after = detector.predict(new[50:]) == -1
    if config is FAST:
        assert before.mean() > 0.95
        assert after.mean() < 0.12
        far = normals(50, seed=3, centre=-6.0)
        assert (detector.predict(far) == -1).mean() > 0.9


def test_the_head_does_not_flag_a_family_that_was_adapted_to() -> None:
    """The new normals share a feature with the labelled anomalies."""
    rng = np.random.default_rng(0)
    anomalies = rng.normal(loc=[6, 6, 0, 0], size=(40, 4))
    rows, labels = np.concatenate([normals(300), anomalies]), ["ok"] * 300 + ["odd"] * 40
    detector = MDMLDetector(FAST, false_alarm_rate=0.05, random_state=0).fit(rows, labels, normal=["ok"])
    new = rng.normal(loc=[6, -6, 0, 0], size=(450, 4))
    detector.adapt(new[:50])
    assert (detector.predict(new[50:]) == -1).mean() < 0.12
    assert (detector.predict(anomalies) == -1).mean() > 0.9


def test_the_stranger_rows_of_an_adapted_family_are_as_strange_as_those_trained_on() -> None:
    detector = MDMLDetector(FAST, random_state=0).fit(normals(300)).adapt(normals(50, seed=1, centre=6.0))
    scorer = detector.model_.scorer
    first, adapted = scorer.families
    assert scorer.scale(first) == 1
    strange = np.quantile(-detector.calibration_.scores, OUTER_QUANTILE)
    assert float(first.outer) == pytest.approx(strange, rel=1e-4)
    rows, own = adapted.neighbourhood.normals, torch.arange(50)
    placed, known = adapted.neighbourhood.place(rows), first.neighbourhood.views.transform(first.neighbourhood.normals)
    distances = adapted.neighbourhood.distances(placed, own)
    discriminants, sides = Discriminants.of_family(placed.views, known, DefaultConfig().discriminants)
    by_side = discriminants.tails.held_out_scores(sides, own)
    weights = torch.cat([scorer.weights, scorer.fusion.discriminants * discriminants.told[None]])
    held_out = torch.cat([adapted.tails.held_out_scores(distances, own), by_side])
    scores = scorer.scale(adapted) * fuse(weights, held_out, scorer.fusion)
    assert adapted.tails.n_tail == SHAPED_TAIL_ROWS
    assert (adapted.tails.index <= Tails.fit(distances).index).all()
    assert 0.5 < scorer.scale(adapted) < 2
    assert float(scores.quantile(OUTER_QUANTILE)) == pytest.approx(strange, rel=1e-4)
    # Sparse rows are compared with nearer ones: copies with themselves alone.
    assert adapted.neighbourhood.distances(adapted.neighbourhood.place(rows))[2:].max() == 0


@pytest.mark.parametrize("n_others", [0, 1, 2, 10, 25])
def test_a_family_of_copies_and_few_other_rows_hides_no_anomalies(n_others: int) -> None:
    detector = MDMLDetector(FAST, false_alarm_rate=0.05, random_state=0).fit(normals(300))
    anomalies = normals(100, seed=3, centre=-6.0)
    before = detector.predict(anomalies)
    copies = np.full((50, normals(1).shape[1]), 6.0)
    copies[:n_others] += np.random.default_rng(0).normal(size=copies[:n_others].shape)
    detector.adapt(copies)
    assert (before == -1).mean() > 0.9
    assert (detector.predict(anomalies) == -1).mean() > 0.9
    assert (detector.predict(copies[25:]) == 1).all()


def test_an_adapted_model_survives_saving(tmp_path) -> None:
    for config in (FAST, PAPER):
        detector = MDMLDetector(config, promise="fdr", random_state=0).fit(normals(100)).adapt(normals(30, 1, 5.0))
        detector.save(tmp_path / "model")
        loaded = MDMLDetector.load(tmp_path / "model")
        np.testing.assert_array_equal(loaded.score_samples(normals(40, 2)), detector.score_samples(normals(40, 2)))
        assert loaded.promise == "fdr"


def test_what_adapting_costs_of_the_labelled_anomalies_is_said_and_saved(tmp_path) -> None:
    anomalies = normals(60, seed=3, centre=4.0)
    rows, labels = np.concatenate([normals(300), anomalies]), ["ok"] * 300 + ["odd"] * 60
    detector = MDMLDetector(PAPER, false_alarm_rate=0.05, random_state=0).fit(rows, labels, normal=["ok"])
    assert not detector.remarks_
    found = int((detector.predict(anomalies) == -1).sum())
    detector.adapt(normals(40, seed=4, centre=4.0))
    still = int((detector.predict(anomalies) == -1).sum())
    assert still < found - 20
    (line,) = detector.remarks_
    assert line.startswith(f"of 60 labelled anomalies {found} were alarms before adapting to 40 rows, {still} after it")
    assert line in detector.notes_
    detector.save(tmp_path / "model")
    assert MDMLDetector.load(tmp_path / "model").notes_ == detector.notes_
    elsewhere = MDMLDetector(FAST, random_state=0).fit(rows, labels, normal=["ok"]).adapt(normals(40, 4, centre=-8.0))
    assert not elsewhere.remarks_

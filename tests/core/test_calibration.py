"""Alarms that hold their rate: each promise by simulation, then through the detector."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from support import FAST, PAPER, normals

from mdml_fast import InputError, MDMLDetector
from mdml_fast.calibration import (
    ConformalCalibration,
    Promise,
    benjamini_hochberg,
    calibration_rows,
    certified_rank,
    design_effect,
    needed_normals,
)
from mdml_fast.drift import DriftMonitor
from mdml_fast.meta.neighbours import innermost


def test_the_certificate_fails_in_a_share_of_delta() -> None:
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(2000):
        scores = rng.uniform(size=300)
        level = ConformalCalibration(scores).alarm_level(np.empty(0), 0.05, Promise.CERTIFICATE, 0.9)
        # With uniform scores the share of normals that p-values up to the level flag is the order statistic itself.
        rank = round(level * 301)
        failures += np.sort(scores)[rank - 1] > 0.05
    assert 0.05 < failures / 2000 < 0.12


def test_the_certificate_allows_for_groups_whose_rows_resemble_each_other() -> None:
    rng = np.random.default_rng(0)
    groups, rate = np.repeat(np.arange(20), 40), 0.1
    # A score is its group's part and its own, all normal: of new rows in new groups, it is N(0, 1).
    failures = {"told of groups": 0, "not told": 0}
    for _ in range(600):
        scores = 0.6 * rng.normal(size=20)[groups] + 0.8 * rng.normal(size=800)
        for name, given in (("told of groups", groups), ("not told", None)):
            calibration = ConformalCalibration(scores, given)
            level = calibration.alarm_level(np.empty(0), rate, Promise.CERTIFICATE, 0.9)
            failures[name] += norm.cdf(calibration.score_threshold(level)) > rate
    assert failures["told of groups"] < 0.15 * 600
    assert failures["not told"] > 0.25 * 600


@pytest.mark.parametrize(("n_groups", "rate"), [(10, 0.1), (40, 0.1), (60, 0.05), (90, 0.05)])
def test_the_certificate_of_few_groups_of_copies_is_that_of_so_many_rows(n_groups: int, rate: float) -> None:
    rng, failures = np.random.default_rng(0), 0
    for _ in range(400):
        calibration = ConformalCalibration(
            np.repeat(rng.uniform(size=n_groups), 10), np.repeat(np.arange(n_groups), 10)
        )
        level = calibration.alarm_level(np.empty(0), rate, Promise.CERTIFICATE, 0.95)
        failures += calibration.score_threshold(level) > rate
    assert failures <= 0.08 * 400  # a share of 0.05 may fail, within three standard deviations


def test_the_design_effect_is_the_size_of_groups_of_copies_and_one_for_none() -> None:
    rng = np.random.default_rng(0)
    flags = rng.random(4000) < 0.2
    assert design_effect(np.repeat(flags, 5), np.repeat(np.arange(4000), 5), 0.95) == pytest.approx(5, rel=0.01)
    assert design_effect(flags, rng.permutation(np.arange(4000) % 400), 0.95) == pytest.approx(1, abs=0.2)
    assert design_effect(flags, np.zeros(4000, dtype=np.intp), 0.95) == 1
    assert design_effect(np.repeat(flags, 5), np.repeat(np.arange(4000), 5), 0.5) == 1
    assert design_effect(np.zeros(40, dtype=bool), np.arange(40) % 4, 0.95) == 1


def test_certified_rank_is_the_largest_and_may_be_none() -> None:
    assert certified_rank(58, 0.05, 0.95) == 0
    assert certified_rank(59, 0.05, 0.95) == 1  # 0.95^59 = 0.0485
    calibration = ConformalCalibration(np.arange(58.0))
    assert calibration.alarm_level(np.empty(0), 0.05, Promise.CERTIFICATE, 0.95) == 0
    assert calibration.lowest_rate(Promise.CERTIFICATE, 0.95) == pytest.approx(1 - 0.05 ** (1 / 58))
    assert calibration.lowest_rate() == pytest.approx(1 / 59)


@pytest.mark.parametrize("n_groups", [3, 12, 60])
def test_the_lowest_rate_is_where_certificates_of_groups_begin(n_groups: int) -> None:
    rng = np.random.default_rng(n_groups)
    groups = np.arange(600) % n_groups
    calibration = ConformalCalibration(rng.normal(size=n_groups)[groups] + rng.normal(size=600), groups)
    lowest = calibration.lowest_rate(Promise.CERTIFICATE)
    assert lowest >= 1 - 0.05 ** (1 / 600)
    assert calibration.alarm_level(np.empty(0), lowest * 1.001, Promise.CERTIFICATE) > 0
    for rate in lowest * np.linspace(0.02, 0.999, 40):
        assert calibration.alarm_level(np.empty(0), rate, Promise.CERTIFICATE) == 0


def test_the_fdr_of_a_batch_is_held() -> None:
    rng = np.random.default_rng(0)
    false_shares, found = [], 0
    for _ in range(400):
        calibration = ConformalCalibration(rng.normal(size=500))
        scores = np.concatenate([rng.normal(size=90), rng.normal(-6, 1, size=10)])
        p_values = calibration.p_value(scores)
        alarms = p_values <= calibration.alarm_level(p_values, 0.2, Promise.FDR)
        false_shares.append(alarms[:90].sum() / max(alarms.sum(), 1))
        found += alarms[90:].sum()
    assert 0.12 < np.mean(false_shares) < 0.21
    assert found > 3800


def test_benjamini_hochberg_of_known_p_values() -> None:
    assert benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.9]), 0.05) == pytest.approx(0.01)
    assert benjamini_hochberg(np.array([0.01, 0.025, 0.03, 0.9]), 0.05) == pytest.approx(0.03)
    assert benjamini_hochberg(np.array([0.5, 0.9]), 0.05) == 0
    assert benjamini_hochberg(np.empty(0), 0.05) == 0
    counted = benjamini_hochberg(np.array([0.03, 0.01, 0.9]), 0.05, np.array([5, 1, 4]))
    assert counted == benjamini_hochberg(np.array([0.01, *[0.03] * 5, *[0.9] * 4]), 0.05) == 0.03


def test_calibration_takes_a_quarter_more_where_the_promise_needs_it_and_no_more_than_pays() -> None:
    for n, needed, expected in [
        (1000, 19, 250),
        (300, 99, 99),
        (100, 99, 50),
        (10**6, 99, 10_000),
        (10**6, 10**5, 10_000),
    ]:
        rows = calibration_rows(n, needed, seed=0)
        assert len(np.unique(rows)) == expected
        assert 0 <= rows.min() <= rows.max() < n


@pytest.mark.parametrize("promise", [Promise.MARGINAL, Promise.CERTIFICATE])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_so_many_normals_as_are_needed_are_enough_and_one_less_is_not(promise: Promise, rate: float) -> None:
    needed = needed_normals(rate, promise, 0.95)
    for n, attainable in ((needed, True), (needed - 1, False)):
        level = ConformalCalibration(np.arange(float(n))).alarm_level(np.empty(0), rate, promise)
        assert (level >= 1 / (n + 1) - 1e-12) == attainable


def test_groups_are_held_against_their_own_normals() -> None:
    groups = np.array(["quiet"] * 99 + ["loud"] * 99, dtype=object)
    scores = np.concatenate([np.linspace(0, 1, 99), np.linspace(-10, 0, 99)])
    calibration = ConformalCalibration(scores, groups)
    p_values = calibration.p_value(np.array([-0.5, -0.5, -0.5]), np.array(["quiet", "loud", "new"], dtype=object))
    assert p_values[0] == pytest.approx(0.01)
    assert p_values[1] > 0.9
    assert p_values[2] == calibration.p_value(np.array([-0.5]))[0]


def test_trimmed_calibration_leaves_out_the_lowest() -> None:
    calibration = ConformalCalibration(np.arange(100.0), trim=0.05)
    assert calibration.scores[0] == 5
    assert calibration.p_value(np.array([4.0]))[0] == pytest.approx(1 / 96)


def drift_row(calibration: np.ndarray, stream: np.ndarray) -> int | None:
    monitor = DriftMonitor(calibration)
    monitor.evidence(stream)
    return monitor.first_row


def test_drift_is_found_and_its_absence_is_not() -> None:
    rng = np.random.default_rng(0)
    quiet = [drift_row(rng.normal(size=100), rng.normal(size=150)) for _ in range(200)]
    assert sum(row is not None for row in quiet) <= 6  # at most 1 % is expected
    stream = np.concatenate([rng.normal(size=200), rng.normal(-1.5, 1, size=200)])
    row = drift_row(rng.normal(size=500), stream)
    assert row is not None
    assert 200 < row < 280


def test_drift_evidence_takes_ties_and_scores_beyond_float16() -> None:
    monitor = DriftMonitor(np.zeros(50))
    assert np.isfinite(monitor.evidence(np.array([0.0, -0.0] * 100))).all()
    assert monitor.first_row is None
    assert np.isfinite(monitor.evidence(np.full(20, -1e9))).all()
    assert 200 < monitor.first_row <= 210


def test_drift_evidence_is_that_of_a_plain_count_in_any_pieces() -> None:
    rng = np.random.default_rng(1)
    calibration, stream = (rng.normal(size=n).astype(np.float16).astype(float) for n in (30, 90))
    whole = DriftMonitor(calibration).evidence(stream)
    monitor = DriftMonitor(calibration)
    pieces = [monitor.evidence(part) for part in np.split(stream, [1, 1, 40])]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-12)
    ties, wealth = np.random.default_rng(0).random(90), np.ones(19)
    for row, score in enumerate(stream):
        past = np.concatenate([calibration, stream[:row]])
        p = ((past < score).sum() + (1 - ties[row]) * ((past == score).sum() + 1)) / (len(past) + 1)
        bets = np.arange(0.05, 1.0, 0.05)
        wealth *= bets * p ** (bets - 1)
        assert whole[row] == pytest.approx(np.log(wealth.mean()))


def test_false_alarms_are_held_on_average_over_fits() -> None:
    alarms = [
        (
            MDMLDetector(FAST, false_alarm_rate=0.1, random_state=i).fit(normals(100, i)).predict(normals(200, 99 + i))
            < 0
        )
        for i in range(12)
    ]
    # The spread is mostly that of 50 calibration normals in each fit.
    assert binomtest(int(np.sum(alarms)) // 4, 600, 0.1).pvalue > 0.01


def test_groups_too_small_for_the_rate_are_said() -> None:
    groups = np.repeat(np.arange(10), [30] * 8 + [150] * 2)
    detector = MDMLDetector(FAST, random_state=0).fit(normals(len(groups)), groups=groups)
    (note,) = (note for note in detector.notes_ if "own group" in note)
    sizes = np.array(detector.calibration_.group_sizes())
    small = sizes[sizes < 99]
    assert sizes.sum() == len(detector.calibration_.scores)
    assert 0 < len(small) < 10
    assert (
        f"rows of {len(small)} of the 10 groups can't be alarms at a rate of 0.01: these have {small.min()} to" in note
    )
    far = normals(40, centre=30.0)
    alarms = {name: (detector.predict(far, [name] * 40) == -1).any() for name in ("0", "9")}
    assert alarms == {"0": False, "9": True}
    assert not any("own group" in note for note in detector.set_params(false_alarm_rate=0.1).notes_)


def test_recalibration_takes_todays_normals() -> None:
    detector = MDMLDetector(FAST, false_alarm_rate=0.1, random_state=0).fit(normals(200))
    today = normals(800, seed=1) * 1.5
    assert (detector.predict(today[400:]) == -1).mean() > 0.2
    groups = ["a"] * 200 + ["b"] * 200
    detector.recalibrate(today[:400], groups)
    assert (detector.predict(today[400:]) == -1).mean() < 0.15
    assert set(detector.calibration_.groups) == {"a", "b"}


def test_with_groups_all_of_them_calibrate_and_new_groups_are_flagged_at_the_rate() -> None:
    rng, rates = np.random.default_rng(0), []
    for seed in range(8):
        groups = np.repeat(np.arange(20), 30)
        rows = rng.normal(size=(600, 4)) + rng.normal(size=(20, 4))[groups]
        detector = MDMLDetector(FAST, random_state=seed).fit(rows, groups=groups)
        assert set(detector.calibration_.groups) == set(map(str, range(20)))
        assert len(detector.calibration_.scores) == 600
        new = rng.normal(size=(600, 4)) + rng.normal(size=(20, 4))[groups]
        rates.append((detector.p_value(new) <= 0.1).mean())
    # Without the groups the same rows give 0.16.
    assert 0.05 < np.mean(rates) < 0.13


def test_grouped_calibration_survives_saving(tmp_path) -> None:
    groups = [f"g{i % 6}" for i in range(120)]
    detector = MDMLDetector(FAST, random_state=0).fit(normals(120), groups=groups)
    detector.save(tmp_path / "model")
    loaded = MDMLDetector.load(tmp_path / "model")
    rows, known = normals(40, 5), [detector.calibration_.groups[0]] * 40
    np.testing.assert_array_equal(loaded.p_value(rows, known), detector.p_value(rows, known))
    assert (loaded.p_value(rows, known) != loaded.p_value(rows)).any()


def test_outliers_among_the_normals_can_be_left_out() -> None:
    rows = np.concatenate([normals(190), normals(10, seed=1, centre=8.0)]).astype(np.float32)
    kept = innermost(rows, 0.05, seed=0)
    assert len(kept) == 190
    assert (kept < 190).all()
    plain = MDMLDetector(FAST, random_state=0).fit(rows)
    trimmed = MDMLDetector(FAST, random_state=0, contamination=0.05).fit(rows)
    hidden = normals(50, seed=2, centre=8.0)
    assert (trimmed.p_value(hidden) < 0.03).mean() > (plain.p_value(hidden) < 0.03).mean() + 0.5


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"promise": "surely"}, "promise must be one of marginal, certificate, fdr"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"contamination": 0.5}, "contamination must be at least 0 and below 0.5"),
    ],
)
def test_settings_of_alarms_that_cannot_be_used_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        MDMLDetector(FAST, **settings).fit(normals(30))


def test_too_few_normals_to_calibrate_on_or_adapt_to_are_refused() -> None:
    detector = MDMLDetector(FAST, random_state=0).fit(normals(40))
    with pytest.raises(InputError, match="only 19 normal rows to adapt to"):
        detector.adapt(normals(19))
    with pytest.raises(InputError, match="only 19 normal rows to calibrate on"):
        detector.recalibrate(normals(19))
    with pytest.raises(InputError, match="groups has 3 entries for 40 rows"):
        detector.p_value(normals(40), ["a"] * 3)


@pytest.mark.parametrize("sizes", [(60, 60), (200, 100, 3), (150, 8, 150, 8), (40, 1, 1)], ids=str)
@pytest.mark.parametrize("config", [FAST, PAPER], ids=["default", "paper"])
def test_few_or_unequal_groups_are_calibrated_on(config: object, sizes: tuple[int, ...]) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(3):
        detector = MDMLDetector(config, random_state=seed, false_alarm_rate=0.1).fit(
            normals(len(groups)), groups=groups
        )
        calibrated = set(detector.calibration_.groups)
        assert len(calibrated) == len(sizes) if config is FAST else 0 < len(calibrated) < len(sizes)
        p_values = detector.p_value(normals(50, seed=9), groups=np.arange(50) % len(sizes))
        assert ((p_values > 0) & (p_values <= 1)).all()


def test_contamination_that_takes_a_whole_side_of_groups_is_refused() -> None:
    rows = np.concatenate([normals(60), normals(30, centre=50)])
    detector = MDMLDetector(FAST, contamination=0.4, random_state=0)
    with pytest.raises(InputError, match=r"no normals are left to (learn from|calibrate on)"):
        detector.fit(rows, groups=np.repeat([0, 1], [60, 30]))


def test_the_fdr_holds_with_groups_of_few_calibration_normals() -> None:
    """P-values of groups have grids of their own: between their ranks the law says nothing."""
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(6), 9)
    detector = MDMLDetector(FAST, promise="fdr", false_alarm_rate=0.15)
    any_alarm = []
    for _ in range(1500):
        detector.calibration_ = ConformalCalibration(rng.random(54) ** 3, groups)
        any_alarm.append(detector.alarms_at(rng.random(1) ** 3, np.array([2])).is_alarm.any())
    assert np.mean(any_alarm) < 0.12  # one rank of ten

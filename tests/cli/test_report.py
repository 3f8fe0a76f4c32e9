"""The report, in a real browser where there is one."""

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mdml_fast import InputError, MDMLDetector
from mdml_fast.data import write_table
from mdml_fast.evaluation import class_metrics
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.ensemble import EnsembleConfig
from mdml_fast.report import write_report
from mdml_fast.report.content import report_content

FAST = DefaultConfig(
    ensemble=EnsembleConfig(hidden=8, n_prototypes=32, n_queries=32, n_anomalies=24, n_synthetic=64, steps=10),
    n_trees=20,
)
EVIL, WORSE = "<script>alert(1)</script>", "$\\frac$ & </svg>"


def table(seed: int) -> tuple[pa.Table, np.ndarray]:
    """Class and column names that would break a page which doesn't escape them."""
    rng = np.random.default_rng(seed)
    labels = np.array(["fine & <b>dandy</b>"] * 400 + [EVIL] * 30 + [WORSE] * 30, dtype=object)
    size, kind = rng.normal(size=len(labels)), rng.choice(["a", "<i>b</i>"], len(labels)).astype(object)
    size[labels == EVIL] += 6
    other = rng.normal(size=len(labels))
    other[labels == WORSE] -= 7
    return pa.table({"<img src=x onerror=alert(2)>": size, "kind": kind, "other": other}), labels


@pytest.fixture(scope="module")
def detector() -> MDMLDetector:
    rows, labels = table(0)
    seen = labels != WORSE
    return MDMLDetector(FAST, random_state=0).fit(rows.filter(pa.array(seen)), labels[seen], normal=[labels[0]])


@pytest.fixture(scope="module")
def page(detector: MDMLDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(detector, path, *table(1), title=EVIL)
    return path


def test_everything_is_there_in_one_small_file(page: Path) -> None:
    text = page.read_text()
    assert page.stat().st_size < 5e6
    for name in ("training", "scores", "roc", "precision_recall", "rates", "map"):
        assert f'id="figure-{name}"' in text
    assert text.count("<script") == 1
    assert EVIL not in text
    assert html.escape(EVIL) in text
    assert "<img" not in text
    assert "currentColor" in text
    assert "mathdefault" not in text


def test_training_is_shown_by_direction(detector: MDMLDetector, page: Path) -> None:
    text, history = page.read_text(), detector.model_.history
    assert len(history.directions) == 8
    for name in history.directions:
        assert html.escape(name.split(" against ")[0], quote=False) in text
    mean = np.mean(np.array(history.by_direction), axis=1)
    np.testing.assert_allclose(mean, history.losses, rtol=1e-5)
    # Eight curves and their mean, each with a point for every step.
    figure = text[text.index('id="figure-training"') :]
    figure = figure[: figure.index("</svg>")]
    curves = [part for part in figure.split("<path d=")[1:] if part.count("L ") == len(history.losses) - 1]
    assert len(curves) == 9


def test_numbers_are_those_of_evaluate(detector: MDMLDetector) -> None:
    rows, labels = table(1)
    content = report_content(detector, rows, labels)
    anomaly = -detector.score_samples(rows)
    by_name = {one.name: one for one in content.classes}
    for name, seen in ((EVIL, True), (WORSE, False)):
        expected = class_metrics(anomaly[labels == labels[0]], anomaly[labels == name])
        found = by_name[name]._asdict()
        assert {metric: found[metric] for metric in expected} == expected
        assert (by_name[name].seen, by_name[name].rows) == (seen, 30)
    assert content.rates is not None
    inside = (content.rates.low <= content.rates.realised) & (content.rates.realised <= content.rates.high)
    assert inside.mean() > 0.7
    assert len(content.alarms) == 20
    assert (
        content.alarms[0].score == content.groups["seen"].min() or content.alarms[0].score in content.groups["unseen"]
    )
    assert all(alarm.reasons for alarm in content.alarms)


def test_a_report_without_rows_or_labels_shows_what_there_is(detector: MDMLDetector, tmp_path: Path) -> None:
    write_report(detector, tmp_path / "model.html")
    assert 'id="figure-training"' in (tmp_path / "model.html").read_text()
    write_report(detector, tmp_path / "rows.html", table(1)[0])
    text = (tmp_path / "rows.html").read_text()
    assert 'id="alarms"' in text
    assert 'id="figure-roc"' not in text
    with pytest.raises(InputError, match="is it the right label"):
        write_report(detector, tmp_path / "x.html", table(1)[0], np.full(460, "other", dtype=object))
    with pytest.raises(InputError, match="no such folder"):
        write_report(detector, tmp_path / "nowhere" / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_browser_renders_sorts_and_asks_for_nothing(page: Path, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            tab = browser.new_page(color_scheme=scheme)
            said, asked = [], []
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.on("pageerror", lambda error, said=said: said.append(str(error)))
            tab.on("dialog", lambda dialog, said=said: (said.append(dialog.message), dialog.dismiss()))
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.goto(page.as_uri())
            assert said == []
            assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
            assert tab.title().startswith(EVIL)
            assert EVIL in tab.locator("#classes").inner_text()
            scores = "#alarms tbody td:nth-child(3)"
            for label in ("ascending", "descending"):
                tab.click("#alarms th:nth-child(3) button")
                assert tab.get_attribute("#alarms th:nth-child(3)", "aria-sort") == label
                values = [float(cell.get_attribute("data-value")) for cell in tab.locator(scores).all()]
                assert values == sorted(values, reverse=label == "descending")
            assert tab.locator("figure svg").count() == 6
            colours = tab.evaluate(
                "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
            )
            assert colours[0] != colours[1]
            picture = tab.screenshot(full_page=True, path=str(tmp_path / f"{scheme}.png"))
            assert len(set(picture[::97])) > 50
            assert len(picture) > 50_000
        browser.close()


def test_the_command_writes_it(mdml_fast, in_process, detector: MDMLDetector, tmp_path: Path) -> None:
    detector.save(tmp_path / "m")
    rows, labels = table(1)
    pa.parquet.write_table(rows.append_column("class", pa.array(labels)), tmp_path / "rows.parquet")
    done = mdml_fast("report", "m", "rows.parquet", "--label", "class", "--out", "r.html", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == (tmp_path / "r.html").stat().st_size
    gaps = pa.array([None, *rows["other"].to_pylist()[1:]])
    pa.parquet.write_table(rows.set_column(2, "other", gaps), tmp_path / "gaps.parquet")
    noted = mdml_fast("report", "m", "gaps.parquet", "--out", "gaps.html")
    assert noted.stderr.count("note: values are missing in column 'other'") == 1
    # CSV is read as for score, by the model's types: text that looks like a number here is text.
    write_table(rows.set_column(1, "kind", pa.array(["080"] * rows.num_rows)), tmp_path / "codes.csv")
    assert in_process("report", "m", "codes.csv", "--out", "codes.html").returncode == 0
    refused = in_process("report", "m", "rows.parquet", "--label", "nothing")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1

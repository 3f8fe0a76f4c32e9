"""The benchmark of the detector: tables by a protocol, paired differences, and what is left out."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mdml_fast import InputError
from mdml_fast.baselines import baseline
from mdml_fast.bench.detector import ABLATIONS, run, summary
from mdml_fast.data import write_table
from mdml_fast.data.open_sets import open_sets
from mdml_fast.meta.default import DefaultConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(120, 2)), rng.normal(4, 1, size=(60, 2))])
    classes = ["ok"] * 120 + ["a"] * 30 + ["b"] * 30
    table = pa.table({"u": rows[:, 0], "v": rows[:, 1], "run": [f"r{i % 8}" for i in range(180)], "class": classes})
    write_table(table, tmp_path / "small.parquet")
    spec = {"file": "small.parquet", "label": "class", "normal": ["ok"], "ignore": ["run"], "group": "run"}
    (tmp_path / "protocol.json").write_text(json.dumps({"small": spec}))
    return tmp_path


def test_open_sets_follow_their_protocol(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDML_DATA", str(folder))
    sets = open_sets()
    assert list(sets) == ["digits", "small"]
    table = sets["small"]()
    assert table.features.column_names == ["u", "v"]
    assert table.groups is not None
    assert len(sets["digits"]()) == 1797
    monkeypatch.delenv("MDML_DATA")
    assert list(open_sets()) == ["digits"]
    with pytest.raises(InputError, match="can't be read as a protocol"):
        open_sets(folder / "nowhere")


def test_differences_are_paired_and_summed_over_tables(folder: Path) -> None:
    tables = {name: load for name, load in open_sets(folder).items() if name == "small"}
    methods = {"mdml": baseline("knn"), "same": baseline("knn"), "forest": baseline("isolation-forest")}
    documents = run(tables, methods, 2, lambda *state: None)
    total = summary([documents["small"], documents["small"]])
    assert total["same"]["unseen"] == {"mean": 0, "low": 0, "high": 0, "losses": 0, "splits": 4}
    alone = documents["small"]["differences"]["forest"]["unseen"]["auroc"]
    both = total["forest"]["unseen"]
    assert both["mean"] == pytest.approx(alone["mean"])
    # Twice the same table halves the variance of the mean.
    assert both["high"] - both["mean"] == pytest.approx((alone["high"] - alone["mean"]) / 2**0.5)


def test_each_ablation_differs_from_the_default_in_its_part_alone() -> None:
    full = DefaultConfig()
    for name, config in ABLATIONS.items():
        changed = [part for part in vars(full) if getattr(config, part) != getattr(full, part)]
        # As many trees in all.
        of_trees = ["n_trees", "distance_trees"] if name == "no trees that ask distances" else changed[:1]
        assert changed == of_trees, name
        assert changed
    alone = ABLATIONS["no trees that ask distances"]
    assert alone.n_trees + alone.distance_trees.n == full.n_trees + full.distance_trees.n

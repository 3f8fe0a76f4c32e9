"""Exported models, run by others' runtimes, against our own scores."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.special import ndtri
from support import OPEN_SETS, open_table

from mdml_fast import InputError, MDMLDetector
from mdml_fast.alarms import Alarms
from mdml_fast.export import ExportFormat, export
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.ensemble import EnsembleConfig
from mdml_fast.meta.paper import PaperConfig

pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from mdml_fast.export.graph import DOUBLE, INT64, Graph  # noqa: E402
from mdml_fast.export.onnx_model import onnx_inputs, onnx_model  # noqa: E402

# Rows that miss some values are among those that are scored, by models that were trained without.
pytestmark = pytest.mark.filterwarnings("ignore::mdml_fast.errors.MissingValuesWarning")

FAST = DefaultConfig(
    ensemble=EnsembleConfig(hidden=8, n_prototypes=32, n_queries=32, n_anomalies=24, n_synthetic=64, steps=10),
    n_trees=20,
)
FAST_PAPER = PaperConfig(hidden=16, embedding=8, outer_steps=20, learn_temperature=True)


def session(content: bytes) -> "ort.InferenceSession":
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_onnx(detector: MDMLDetector, table: pa.Table) -> Alarms:
    run = session(onnx_model(detector).SerializeToString())
    return Alarms(*run.run(["score", "p_value", "is_anomaly"], onnx_inputs(detector.encoder_, table)))


def assert_agree(found: Alarms, detector: MDMLDetector, rows: pa.Table) -> None:
    expected = detector.alarms(rows)
    # The paper's log odds near 0 are differences of larger logits in float32.
    atol = 1e-6 if isinstance(detector.model_.config, PaperConfig) else 0.0
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=atol)
    slack = 1e-5 * np.abs(expected.scores) + atol
    low, high = (detector.calibration_.p_value(expected.scores + side * slack) for side in (-1, 1))
    assert (low - 1e-9 <= found.p_values).all()
    assert (found.p_values <= high + 1e-9).all()
    level = detector.fixed_level()
    clear = (low > level) | (high <= level)
    np.testing.assert_array_equal(found.is_alarm[clear], expected.is_alarm[clear])
    assert clear.mean() > 0.98
    assert (high - low < 1e-3).mean() > 0.9


def table(seed: int = 0) -> tuple[pa.Table, np.ndarray]:
    """Numbers with gaps, a heavy tail, text with gaps, a constant; two anomaly classes."""
    rng = np.random.default_rng(seed)
    labels = np.array(["ok"] * 300 + ["odd"] * 30 + ["long"] * 30, dtype=object)
    size, length = rng.normal(size=len(labels)), np.exp(rng.normal(5, 4, size=len(labels)))
    size[labels == "odd"] += 5
    length[labels == "long"] *= 1e9
    columns = {
        "size": pa.array(size, mask=rng.random(len(labels)) < 0.1),
        "colour": pa.array(rng.choice(["red", "green"], len(labels)), mask=rng.random(len(labels)) < 0.1),
        "length": pa.array(length),
        "count": pa.array(rng.integers(0, 5, len(labels))),
        "same": pa.array(np.ones(len(labels))),
    }
    return pa.table(columns), labels


def strange(rows: pa.Table) -> pa.Table:
    """The rows with unknown colours, gaps where there were none, and values far outside."""
    columns = rows.to_pydict()
    columns["colour"][::3] = ["ultraviolet"] * len(columns["colour"][::3])
    columns["length"][::5] = [None] * len(columns["length"][::5])
    columns["length"][1], columns["size"][2], columns["size"][4] = 1e250, -1e8, 1e-30
    return pa.table(columns)


@pytest.fixture(scope="module", params=[FAST, FAST_PAPER], ids=["default", "paper"])
def fitted(request: pytest.FixtureRequest) -> MDMLDetector:
    rows, labels = table()
    detector = MDMLDetector(request.param, random_state=0).fit(rows, labels, normal=["ok"])
    return detector.adapt(
        rows.slice(0, 60).set_column(0, "size", pa.array(np.random.default_rng(0).normal(30, size=60)))
    )


@pytest.mark.parametrize("promise", ["marginal", "certificate"])
def test_onnx_scores_as_we_do(fitted: MDMLDetector, promise: str) -> None:
    fitted.set_params(promise=promise, false_alarm_rate=0.1)
    rows = pa.concat_tables([table(seed=1)[0], table()[0], strange(table(seed=2)[0])])
    assert_agree(run_onnx(fitted, rows), fitted, rows)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_onnx_ranks_equal_rows_as_we_do(seed: int) -> None:
    """Few distinct rows, of both kinds: trees' leaves are mixed, and hundreds of normals share one score."""
    rng = np.random.default_rng(seed)
    kind, flag = rng.choice(4, 1000, p=rng.dirichlet(np.full(4, 0.5))), rng.integers(0, 2, 1000)
    labels = np.where(rng.random(1000) < 0.02 * (1 + kind), "bad", "ok").astype(object)
    rows = pa.table({"kind": [f"k{code}" for code in kind], "flag": flag.astype(float)})
    detector = MDMLDetector(random_state=0).fit(rows, labels, normal=["ok"])
    found = run_onnx(detector, rows)
    np.testing.assert_allclose(found.scores, detector.score_samples(rows), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.p_values, detector.p_value(rows), rtol=1e-5)
    np.testing.assert_array_equal(found.is_alarm, detector.predict(rows) == -1)


def test_a_single_row_can_be_scored_and_only_used_columns_are_inputs(fitted: MDMLDetector) -> None:
    rows = table(seed=1)[0].slice(0, 1)
    np.testing.assert_allclose(run_onnx(fitted, rows).scores, fitted.score_samples(rows), rtol=1e-5, atol=1e-6)
    run = session(onnx_model(fitted).SerializeToString())
    assert [value.name for value in run.get_inputs()] == ["size", "length", "count", "colour"]
    assert json.loads(run.get_modelmeta().custom_metadata_map["anomaly_classes"]) == ["long", "odd"]


def test_the_torch_program_scores_as_we_do(fitted: MDMLDetector, tmp_path: Path) -> None:
    from mdml_fast.export.torch_program import torch_inputs

    fitted.set_params(promise="marginal", false_alarm_rate=0.1)
    export(fitted, ExportFormat.TORCH, tmp_path / "model.pt2")
    files = {"columns.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    assert json.loads(files["columns.json"])["codes"] == {"colour": ["green", "red"]}
    for rows in (strange(table(seed=2)[0]), table(seed=1)[0].slice(0, 2)):
        found = Alarms(*(value.detach().numpy() for value in program(*torch_inputs(fitted.encoder_, rows))))
        assert_agree(found, fitted, rows)


@pytest.mark.filterwarnings("ignore")
def test_the_mlflow_model_scores_as_we_do(fitted: MDMLDetector, tmp_path: Path) -> None:
    pyfunc = pytest.importorskip("mlflow.pyfunc", reason="the extra 'mlflow' is not installed")
    rows = strange(table(seed=2)[0])
    for _ in range(2):  # the second replaces the first
        export(fitted, ExportFormat.MLFLOW, tmp_path / "model")
    model = pyfunc.load_model(str(tmp_path / "model"))
    assert model.metadata.signature.inputs.input_names() == ["size", "colour", "length", "count"]
    found = model.predict(rows.to_pandas())
    np.testing.assert_array_equal(found["score"], fitted.score_samples(rows))
    assert found["is_anomaly"].tolist() == fitted.alarms(rows).is_alarm.tolist()
    assert not list((tmp_path / "model").rglob("*.pkl"))
    with_categories = table()[0].to_pandas().astype({"colour": "category"})
    np.testing.assert_array_equal(model.predict(with_categories)["score"], fitted.score_samples(with_categories))


def test_onnx_tells_normals_apart_that_are_close_together() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, size=(600, 1)) * 100.0 + rng.normal(scale=1e-3, size=(600, 3))
    detector = MDMLDetector(FAST, random_state=0).fit(rows[:400])
    run = session(onnx_model(detector).SerializeToString())
    found = run.run(["score"], {f"x{place}": rows[400:, place] for place in range(3)})[0]
    ours = detector.score_samples(rows[400:])
    # A unit in the last place of a feature is a per mille of what is between two normals.
    np.testing.assert_allclose(found, ours, atol=0.05)
    assert ours.std() > 0.3


@pytest.mark.parametrize("name", OPEN_SETS)
def test_onnx_scores_open_sets_as_we_do(name: str) -> None:
    data = open_table(name)
    rng = np.random.default_rng(0)
    normals, others = rng.permutation(np.flatnonzero(data.is_normal)), rng.permutation(np.flatnonzero(~data.is_normal))
    train, test = (
        data.take(np.concatenate([normals[part], others[part]])) for part in (slice(0, 1000), slice(1000, 1400))
    )
    detector = MDMLDetector(FAST, random_state=0).fit(train.features, train.labels, normal=train.normal)
    # With gaps and unknown text, which there may be none of in training.
    broken = {
        column: [None if (row + place) % 7 == 0 else value for row, value in enumerate(values.to_pylist())]
        if not pa.types.is_string(values.type)
        else [f"{value}?" if (row + place) % 7 == 0 else value for row, value in enumerate(values.to_pylist())]
        for place, (column, values) in enumerate(zip(test.features.column_names, test.features.columns, strict=True))
    }
    for rows in (test.features, pa.table(broken)):
        assert_agree(run_onnx(detector, rows), detector, rows)


# --- the graph's functions, against numpy and scipy ---


def evaluated(write, value: np.ndarray, kind: int = DOUBLE) -> np.ndarray:
    graph = Graph()
    graph.output("y", write(graph, graph.input("x", DOUBLE)), kind)
    return session(graph.model("", {}).SerializeToString()).run(["y"], {"x": value})[0]


def test_functions_that_onnx_lacks() -> None:
    level = np.concatenate([np.geomspace(1e-6, 0.5, 50), 1 - np.geomspace(1e-6, 0.5, 50)])
    np.testing.assert_allclose(evaluated(Graph.ndtri, level), ndtri(level), rtol=1e-12, atol=1e-14)
    values = np.array([-1e300, -20.0, -1e-9, 0.0, 0.3, 5e4, 1e200])
    np.testing.assert_allclose(evaluated(Graph.asinh, values), np.arcsinh(values), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_counting_below_is_searchsorted(n: int, side: str) -> None:
    rng = np.random.default_rng(n)
    ordered = np.sort(rng.integers(0, 10, n)).astype(np.float64)
    values = np.concatenate([np.arange(-1, 12, 0.5), [np.inf, -1e300]])

    def write(graph: Graph, x: str) -> str:
        found = graph.count_below(ordered[None], graph.op("Unsqueeze", x, [0]), equal=side == "right")
        return graph.op("Squeeze", found, [0])

    np.testing.assert_array_equal(evaluated(write, values[:-2], INT64), np.searchsorted(ordered, values[:-2], side))


# --- refusals ---


@pytest.mark.parametrize("name", ["score", ""])
def test_columns_that_onnx_cannot_name_are_refused(name: str, tmp_path: Path) -> None:
    rows = pa.table({name: np.random.default_rng(0).normal(size=50), "other": np.arange(50.0)})
    detector = MDMLDetector(FAST, normal="all").fit(rows)
    with pytest.raises(InputError, match=f"a column named '{name}'"):
        export(detector, ExportFormat.ONNX, tmp_path / "m.onnx")


def test_what_cannot_be_exported_is_refused(fitted: MDMLDetector, tmp_path: Path, monkeypatch) -> None:
    fitted.set_params(promise="fdr")
    with pytest.raises(InputError, match="depends on all rows"):
        export(fitted, ExportFormat.ONNX, tmp_path / "m.onnx")
    fitted.set_params(promise="marginal")
    with pytest.raises(InputError, match="no such folder"):
        export(fitted, ExportFormat.ONNX, tmp_path / "nowhere" / "m.onnx")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is a folder"):
        export(fitted, ExportFormat.TORCH, tmp_path / "taken")
    monkeypatch.setattr("mdml_fast.export.find_spec", lambda name: None)
    for form in (ExportFormat.ONNX, ExportFormat.MLFLOW):
        with pytest.raises(InputError, match=rf"pip install 'mdml-fast\[{form}\]'"):
            export(fitted, form, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]

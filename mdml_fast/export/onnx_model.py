"""A detector as one ONNX graph, from raw columns to score, p-value and alarm."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mdml_fast.calibration import TIE, gaps
from mdml_fast.data.encoding import SOFT_CLIP, CategoricalColumn, FeatureEncoder, NumericColumn
from mdml_fast.data.views import CLIP, VIEWS, Views
from mdml_fast.detector import MDMLDetector
from mdml_fast.errors import InputError
from mdml_fast.export.graph import BOOL, DOUBLE, FLOAT, STRING, Graph
from mdml_fast.meta.default import DefaultModel
from mdml_fast.meta.discriminants import MOST_EXPONENT, Discriminants
from mdml_fast.meta.neighbourhood import SCORES
from mdml_fast.meta.neighbours import GROUP, SPARE
from mdml_fast.meta.paper import PaperModel
from mdml_fast.meta.scoring import NormalFamily, Scorer
from mdml_fast.meta.tails import Tails
from mdml_fast.meta.trees import VOTE, TreeHead

OUTPUTS = ("score", "p_value", "is_anomaly")


def onnx_model(detector: MDMLDetector) -> Any:
    """The detector as an `onnx.ModelProto`.

    Its inputs are the used columns by name, each [N]: numbers as float64, a missing one as NaN; text as strings, a
    missing one as any text that is no category (see `onnx_inputs`). Its outputs are `score` and `p_value`, float64
    [N], and `is_anomaly`, bool [N]. Memory grows with N: give it some hundred rows at once.

    Raises:
        InputError: a column has the name of an output, or none.
    """
    for column in detector.encoder_.columns:
        if column.name in ("", *OUTPUTS):
            raise InputError(
                f"ONNX can't take a column named {column.name!r} beside its outputs; rename it and train again"
            )
    graph = Graph()
    rows = _encode(graph, detector.encoder_)
    model = detector.model_
    if isinstance(model, DefaultModel):
        score = _default_score(graph, model, rows)
    else:
        assert isinstance(model, PaperModel)
        score = _paper_score(graph, model, rows)
    p_value = _p_value(graph, detector.calibration_.scores, score)
    is_anomaly = graph.op("LessOrEqual", p_value, np.float64(detector.fixed_level()))
    for name, value, kind in zip(OUTPUTS, (score, p_value, is_anomaly), (DOUBLE, DOUBLE, BOOL), strict=True):
        graph.output(name, value, kind)
    metadata = {"normal_classes": detector.normal_classes_, "anomaly_classes": detector.anomaly_classes_}
    return graph.model(
        "mdml-fast: score (higher is more normal), conformal p-value, alarm",
        {name: json.dumps(value) for name, value in metadata.items()},
    )


def _p_value(graph: Graph, calibration: np.ndarray, score: str) -> str:
    """`ConformalCalibration.p_value`, float64 [N]."""
    n = len(calibration)
    rank = graph.op("Squeeze", graph.count_below(calibration[None], graph.op("Unsqueeze", score, [0]), equal=True), [0])
    starts, widths = (graph.op("Gather", values, rank) for values in gaps(calibration))
    way = graph.op("Clip", graph.op("Div", graph.op("Sub", score, starts), widths), np.float64(TIE), np.float64(1.0))
    way = graph.op("Where", graph.op("IsInf", starts), np.float64(1.0), way)
    one, rank = np.float64(1.0), graph.cast(rank, DOUBLE)
    after = graph.op("Add", rank, one)
    share = graph.op("Div", graph.op("Max", rank, one), graph.op("Max", graph.op("Sub", after, way), one))
    return str(graph.op("Div", graph.op("Mul", after, share), np.float64(n + 1)))


def onnx_inputs(encoder: FeatureEncoder, table: pa.Table) -> dict[str, np.ndarray]:
    """The columns of a table as the graph takes them."""
    inputs = {}
    for column in encoder.columns:
        values = table[column.name]
        if isinstance(column, CategoricalColumn):
            missing = next(text for text in ("", "\0", "\0\0") if text not in column.categories)
            inputs[column.name] = np.array(values.cast(pa.string()).fill_null(missing).to_pylist(), dtype=object)
        else:
            inputs[column.name] = values.cast(pa.float64(), safe=False).fill_null(math.nan).to_numpy()
    return inputs


def _encode(graph: Graph, encoder: FeatureEncoder) -> str:
    """The rows, float32 [N, d], of the columns."""
    numeric = [column for column in encoder.columns if isinstance(column, NumericColumn)]
    parts: list[str] = []
    if numeric:
        inputs = [graph.op("Unsqueeze", graph.input(column.name, DOUBLE), [1]) for column in numeric]
        values = graph.op("Concat", *inputs, axis=1)

        def each(name: str) -> np.ndarray:
            return np.array([getattr(column, name) for column in numeric])

        scaled = graph.op("Div", graph.op("Sub", values, each("center")), each("scale"))
        scaled = graph.op("Where", each("heavy_tailed"), graph.asinh(scaled), scaled)
        standard = graph.op("Div", graph.op("Sub", scaled, each("mean")), each("deviation"))
        missing = graph.op("IsNaN", values)
        encoded = graph.op("Where", missing, np.float64(0.0), graph.clip_softly(standard, SOFT_CLIP))
        parts += [graph.cast(encoded, FLOAT), graph.cast(missing, FLOAT)]
    order: dict[tuple[str, int], int] = {}
    width = 2 * len(numeric)
    for place, number in enumerate(numeric):
        order[number.name, 0], order[number.name, 1] = place, len(numeric) + place
    for column in encoder.columns:
        if isinstance(column, CategoricalColumn):
            size = len(column.categories) + 1
            code = graph.op(
                "LabelEncoder",
                graph.input(column.name, STRING),
                domain="ai.onnx.ml",
                keys_strings=list(column.categories),
                values_int64s=list(range(size - 1)),
                default_int64=size - 1,
            )
            parts.append(graph.op("OneHot", code, np.int64(size), np.array([0, 1], np.float32), axis=1))
            order |= {(column.name, place): width + place for place in range(size)}
            width += size
    chosen = [order[column.name, place] for column in encoder.columns for place in range(len(column.feature_names))]
    return str(graph.op("Gather", graph.op("Concat", *parts, axis=1), np.array(chosen), axis=1))


def _default_score(graph: Graph, model: DefaultModel, rows: str) -> str:
    """The score, float64 [N]; each step is that of the library, and rounded to float32 where that is."""
    parts = model.scorer
    views = _views(graph, parts.families[0].neighbourhood.views, rows)
    embedded = _embed(graph, parts.families[0], views)
    first, *others = parts.families
    distances = _distances(graph, first, rows, views, embedded)
    odds = []
    if parts.head:
        asked = graph.op("Concat", rows, _outlyingness(graph, first.tails, distances), axis=1)
        odds = [_odds(graph, parts.head, asked)]
    anomaly = [_anomaly(graph, parts, first, views, distances, odds)]
    for family in others:
        own = _distances(graph, family, rows, views, embedded)
        anomaly.append(_anomaly(graph, parts, family, views, own, odds))
    score = graph.op("Min", *anomaly) if len(anomaly) > 1 else anomaly[0]
    return graph.cast(graph.op("Neg", score), DOUBLE)


def _views(graph: Graph, views: Views, rows: str) -> str:
    """`Views.transform`: float32 [4, N, d]."""
    t = {name: tensor.double().numpy() for name, tensor in views.tensors.items()}
    wide = graph.cast(rows, DOUBLE)
    clipped = graph.op("Sub", graph.clip_softly(wide, CLIP), t["mean"])

    columns = graph.op("Transpose", wide, perm=[1, 0])
    upper = graph.count_below(t["knots"], columns, equal=False)
    upper = graph.op("Clip", upper, np.int64(1), np.int64(t["knots"].shape[1] - 1))
    lower = graph.op("Sub", upper, np.int64(1))
    left, right, low, high = (
        graph.op("GatherElements", t[name], place, axis=1) for name in ("knots", "levels") for place in (lower, upper)
    )
    width = graph.op("Max", graph.op("Sub", right, left), np.float64(1e-12))
    share = graph.op("Div", graph.op("Sub", columns, left), width)
    share = graph.op("Min", graph.op("Max", share, np.float64(0.0)), np.float64(1.0))
    level = graph.op("Add", low, graph.op("Mul", share, graph.op("Sub", high, low)))
    above = graph.log1p(graph.op("Relu", graph.op("Sub", columns, t["knots"][:, -1:])))
    below = graph.log1p(graph.op("Relu", graph.op("Sub", t["knots"][:, :1], columns)))
    beyond = graph.op("Sub", above, below)
    spread = graph.op("Mul", graph.op("Sub", level, np.float64(0.5)), np.float64(math.sqrt(12.0)))
    cdf, quantile = (
        graph.op("Transpose", graph.op("Add", value, beyond), perm=[1, 0]) for value in (spread, graph.ndtri(level))
    )

    whitened = graph.op("MatMul", clipped, t["whitening"])
    stacked = [graph.op("Unsqueeze", view, [0]) for view in (clipped, cdf, quantile, whitened)]
    scaled = graph.op("Mul", graph.op("Concat", *stacked, axis=0), t["scales"][:, None, None])
    return graph.cast(scaled, FLOAT)


def _embed(graph: Graph, family: NormalFamily, views: str) -> str:
    """`Encoders.embed`: float32 [4, N, d]."""
    w = {name: weight.double().numpy() for name, weight in family.neighbourhood.encoders.weights.items()}
    x = graph.cast(views, DOUBLE)
    hidden = graph.op("Add", graph.op("MatMul", x, w["inner.weight"].swapaxes(1, 2)), w["inner.bias"][:, None])
    correction = graph.op("MatMul", graph.op("Relu", hidden), w["outer.weight"].swapaxes(1, 2))
    scaled = graph.op("Mul", x, np.exp(w["log_scale"])[:, None])
    return graph.cast(graph.op("Add", scaled, correction), FLOAT)


def _distances(graph: Graph, family: NormalFamily, rows: str, views: str, embedded: str) -> str:
    """`Neighbourhood.distances`: float32 [6, N]."""
    neighbourhood, config = family.neighbourhood, family.neighbourhood.config
    normals = neighbourhood.normals.numpy()[None]
    knn = _neighbours(graph, graph.op("Unsqueeze", rows, [0]), normals, config.anchor_neighbours)
    in_embeddings = _neighbours(graph, embedded, neighbourhood.embedded.numpy(), config.neighbours)
    whitened = graph.op("Gather", views, np.array([VIEWS.index("whitened")]), axis=0)
    difference = graph.cast(graph.op("Sub", whitened, neighbourhood.centre.numpy()), DOUBLE)
    squared = graph.op("ReduceSum", graph.op("Mul", difference, difference), [2], keepdims=0)
    mahalanobis = graph.cast(graph.op("Sqrt", squared), FLOAT)
    return str(graph.op("Concat", knn, mahalanobis, in_embeddings, axis=0))


def _anomaly(
    graph: Graph, scorer: Scorer, family: NormalFamily, views: str, distances: str, odds: Sequence[str]
) -> str:
    """How anomalous rows are for one family of normals, float32 [N]."""
    scores = [_tail_scores(graph, family.tails, graph.op("Concat", distances, *odds, axis=0))]
    if sides := family.discriminants:
        scores.append(_tail_scores(graph, sides.tails, _sides(graph, sides, views)))
    weights = scorer.weights_of(sides).numpy()
    powers = graph.op("Pow", graph.op("Concat", *scores, axis=0), np.float32(scorer.fusion.power))
    fused = graph.op("Pow", graph.op("MatMul", weights, powers), np.float32(1 / scorer.fusion.power))
    return str(graph.op("Mul", fused, scorer.scale(family).numpy()))


def _sides(graph: Graph, discriminants: Discriminants, views: str) -> str:
    """`Discriminants.distances`: float32 [1, N]."""
    clipped = graph.cast(graph.op("Gather", views, np.int64(VIEWS.index("clipped")), axis=0), DOUBLE)
    weights, offsets = discriminants.weights.numpy().T, discriminants.offsets.numpy()
    sums = graph.op("Add", graph.op("MatMul", clipped, weights), offsets)
    least = graph.op("ReduceMin", sums, [1], keepdims=0)
    distances = graph.cast(graph.op("Exp", graph.op("Min", least, np.float64(MOST_EXPONENT))), FLOAT)
    return str(graph.op("Unsqueeze", distances, np.array([0])))


def _neighbours(graph: Graph, rows: str, references: np.ndarray, k: int) -> str:
    """`References.distances`: float32 [D, N] of rows [D, N, d]."""
    n_embeddings, n_references, n_features = references.shape
    # |r|² - 2xr, in double: the nearest of normals that are close together differ in what float32 loses beside them.
    kept = graph.constant(np.ascontiguousarray(references))
    wide = graph.cast(kept, DOUBLE)
    size = graph.op("ReduceSum", graph.op("Mul", wide, wide), np.array([-1]), keepdims=0)
    columns = graph.op("Transpose", graph.op("Mul", wide, np.float64(-2.0)), perm=[0, 2, 1])
    product = graph.op("MatMul", graph.cast(rows, DOUBLE), columns)
    squared = graph.op("Add", product, graph.op("Unsqueeze", size, np.array([1])))
    candidates = _smallest(graph, squared, min(k + SPARE, n_references), n_references)
    first = np.arange(n_embeddings)[:, None, None] * n_references
    flat = graph.op("Reshape", kept, np.array([-1, n_features]))
    chosen = graph.op("Gather", flat, graph.op("Add", candidates, first), axis=0)
    steps = graph.op("Sub", graph.op("Unsqueeze", rows, [2]), chosen)
    exact = graph.op("ReduceSum", graph.cast(graph.op("Mul", steps, steps), DOUBLE), [-1], keepdims=0)
    nearest, _ = graph.op("TopK", exact, np.array([min(k, n_references)]), outputs=2, axis=-1, largest=0)
    return graph.cast(graph.op("ReduceMean", graph.op("Sqrt", nearest), [-1], keepdims=0), FLOAT)


def _smallest(graph: Graph, values: str, k: int, n: int) -> str:
    """Positions of the k smallest of n [D, N, n]: int64 [D, N, k]; by groups, see `neighbours._smallest`."""
    width = n // GROUP
    if width < GROUP * k:
        return str(graph.op("TopK", values, np.array([k]), outputs=2, axis=-1, largest=0)[1])
    whole = n == GROUP * width
    head = values if whole else graph.op("Slice", values, np.array([0]), np.array([GROUP * width]), np.array([2]))
    least = graph.op("ReduceMin", graph.op("Reshape", head, np.array([0, 0, GROUP, width])), [2], keepdims=0)
    _, groups = graph.op("TopK", least, np.array([k]), outputs=2, axis=-1, largest=0)
    places = graph.op("Add", graph.op("Unsqueeze", groups, [2]), (width * np.arange(GROUP))[:, None])
    members = graph.op("Reshape", places, np.array([0, 0, GROUP * k]))
    if not whole:
        sizes = graph.op("Concat", graph.op("Shape", groups, end=2), np.array([n - GROUP * width]), axis=0)
        rest = graph.op("Expand", np.arange(GROUP * width, n)[None, None], sizes)
        members = graph.op("Concat", members, rest, axis=2)
    found = graph.op("GatherElements", values, members, axis=2)
    _, nearest = graph.op("TopK", found, np.array([k]), outputs=2, axis=-1, largest=0)
    return str(graph.op("GatherElements", members, nearest, axis=2))


def _tail_scores(graph: Graph, tails: Tails, distances: str) -> str:
    """`Tails.score`: float32 [C, N]."""
    n = tails.distances.shape[1]
    below = graph.cast(graph.count_below(tails.distances.numpy(), distances, equal=False), FLOAT)
    shares = graph.op("Div", graph.op("Sub", np.float32(n + 0.5), below), np.float32(n + 1))
    body = graph.op("Neg", graph.op("Log", shares))
    threshold, least = tails.threshold.numpy(), tails.least.numpy()
    excess = graph.op("Sub", graph.op("Log", graph.op("Max", distances, least)), np.log(np.maximum(threshold, least)))
    start = np.log(np.float32((tails.n_tail + 0.5) / (n + 1)))
    tail = graph.op("Sub", graph.op("Div", excess, tails.index.numpy()), start)
    return str(graph.op("Where", graph.op("Greater", distances, threshold), tail, body))


def _outlyingness(graph: Graph, tails: Tails, distances: str) -> str:
    """`Tails.outlyingness`, transposed: float32 [N, 6]."""
    threshold = tails.threshold[: len(SCORES)].clamp(min=torch.finfo(torch.float32).tiny).numpy()
    far = graph.op("Div", distances, graph.op("Add", distances, threshold))
    return str(graph.op("Transpose", far, perm=[1, 0]))


def _odds(graph: Graph, head: TreeHead, rows: str) -> str:
    """`head_odds`: float32 [1, N]."""
    t = {name: tensor.numpy() for name, tensor in head.tensors.items()}
    nodes, n_nodes = np.arange(len(t["left"])), len(t["left"])
    is_leaf = t["left"] == nodes
    tree = np.searchsorted(t["roots"], nodes, side="right") - 1
    own = nodes - t["roots"][tree]
    # A target for each tree: their mean is then taken in double, as ours is. Many rows have the same, and the rank of
    # all of them hangs on its last bit.
    values = graph.op(
        "TreeEnsembleRegressor",
        rows,
        domain="ai.onnx.ml",
        n_targets=len(t["roots"]),
        nodes_treeids=tree.tolist(),
        nodes_nodeids=own.tolist(),
        nodes_featureids=t["feature"].tolist(),
        nodes_values=t["threshold"].tolist(),
        nodes_modes=np.where(is_leaf, "LEAF", "BRANCH_LEQ").tolist(),
        nodes_truenodeids=np.where(is_leaf, 0, t["left"] - t["roots"][tree]).tolist(),
        nodes_falsenodeids=np.where(is_leaf, 0, t["right"] - t["roots"][tree]).tolist(),
        nodes_hitrates=[1.0] * n_nodes,
        nodes_missing_value_tracks_true=[0] * n_nodes,
        target_treeids=tree[is_leaf].tolist(),
        target_nodeids=own[is_leaf].tolist(),
        target_ids=tree[is_leaf].tolist(),
        target_weights=t["anomaly"][is_leaf].tolist(),
    )
    mean = graph.op("ReduceMean", graph.cast(values, DOUBLE), [1], keepdims=0)
    probability, most = graph.op("Unsqueeze", graph.cast(mean, FLOAT), [0]), np.float32(1 + VOTE)
    return str(graph.op("Div", graph.op("Add", probability, np.float32(VOTE)), graph.op("Sub", most, probability)))


def _paper_score(graph: Graph, model: PaperModel, rows: str) -> str:
    """The paper's log odds, float64 [N]."""
    w = {name: tensor.double().numpy() for name, tensor in model.to_tensors().items()}
    value = graph.cast(rows, DOUBLE)
    for layer in ("adapted.encoder.0", "adapted.encoder.2"):
        value = graph.op("MatMul", value, w[f"{layer}.weight"].swapaxes(1, 2))
        value = graph.op("Add", value, w[f"{layer}.bias"][:, None])
        value = graph.op("Tanh", value) if layer.endswith("0") else value
    logits = graph.op("Add", graph.op("MatMul", value, w["head.weight"].T), w["head.bias"])
    logits = graph.op("Div", logits, np.float64(model.temperature))
    ordered, _ = graph.op("TopK", logits, np.array([model.config.n_logits]), outputs=2, axis=-1)
    largest, others = graph.op("Split", ordered, np.array([1, model.config.n_logits - 1]), outputs=2, axis=-1)
    odds = graph.op("Sub", largest, graph.op("ReduceLogSumExp", others, [-1]))
    return str(graph.op("Squeeze", graph.op("ReduceMax", odds, [0], keepdims=0), [1]))

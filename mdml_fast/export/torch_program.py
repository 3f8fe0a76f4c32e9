"""A detector as a `torch.export` program, from numbers and codes to score, p-value and alarm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mdml_fast.calibration import TIE, gaps
from mdml_fast.data.encoding import SOFT_CLIP, CategoricalColumn, FeatureEncoder, NumericColumn
from mdml_fast.detector import MDMLDetector
from mdml_fast.meta.default import DefaultModel
from mdml_fast.meta.paper import PaperModel

# Rows that the program is traced with; any number may be given to it.
TRACED_ROWS = 5


def torch_program(detector: MDMLDetector) -> ExportedProgram:
    """The detector as a program of (numbers, codes) -> (score, p_value, is_anomaly), each [N].

    `numbers`: the numeric columns, float64 [N, columns], NaN where missing. `codes`: of the text columns, int64
    [N, columns], the position in the column's categories, or their number for any other text (`torch_inputs`).
    """
    columns = detector.encoder_.columns
    n_codes = sum(isinstance(column, CategoricalColumn) for column in columns)
    example = (
        torch.zeros(TRACED_ROWS, len(columns) - n_codes, dtype=torch.float64),
        torch.zeros(TRACED_ROWS, n_codes, dtype=torch.int64),
    )
    rows = Dim("rows", min=1)
    with torch.no_grad():
        return torch.export.export(_Program(detector), example, dynamic_shapes=({0: rows}, {0: rows}))


def save_program(detector: MDMLDetector, path: Path) -> None:
    """Write the program, and with it `columns.json`: the columns of `numbers` and `codes`, with their categories."""
    with path.open("wb") as file:
        torch.export.save(torch_program(detector), file, extra_files={"columns.json": _columns(detector.encoder_)})


def _columns(encoder: FeatureEncoder) -> str:
    numeric = [column.name for column in encoder.columns if isinstance(column, NumericColumn)]
    text = {column.name: column.categories for column in encoder.columns if isinstance(column, CategoricalColumn)}
    return json.dumps({"numbers": numeric, "codes": text})


def torch_inputs(encoder: FeatureEncoder, table: pa.Table) -> tuple[Tensor, Tensor]:
    """The columns of a table as the program takes them."""
    numbers, codes = [np.empty((table.num_rows, 0))], [np.empty((table.num_rows, 0), dtype=np.int64)]
    for column in encoder.columns:
        values = table[column.name]
        if isinstance(column, NumericColumn):
            numbers.append(values.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy()[:, None])
        else:
            known = pa.array(column.categories, pa.string())
            found = pc.index_in(values.cast(pa.string()), value_set=known).fill_null(len(known))
            codes.append(found.to_numpy().astype(np.int64)[:, None])
    return torch.as_tensor(np.concatenate(numbers, axis=1)), torch.as_tensor(np.concatenate(codes, axis=1))


class _Program(nn.Module):
    """Encoding, score, p-value and alarm, as tensors; the model's own code where it is tensors."""

    calibration: Tensor
    starts: Tensor
    widths: Tensor

    def __init__(self, detector: MDMLDetector) -> None:
        super().__init__()
        model = detector.model_
        assert isinstance(model, DefaultModel | PaperModel)
        self._columns, self._model = detector.encoder_.columns, model
        self._level = detector.fixed_level()
        calibration = detector.calibration_.scores
        starts, widths = gaps(calibration)
        for name, values in {"calibration": calibration, "starts": starts, "widths": widths}.items():
            self.register_buffer(name, torch.from_numpy(values))

    def forward(self, numbers: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score, p-value and alarm."""
        score = self._score(self._encode(numbers, codes)).double()
        rank = torch.searchsorted(self.calibration, score, right=True)
        start = self.starts[rank]
        way = torch.where(start.isinf(), 1.0, ((score - start) / self.widths[rank]).clamp(TIE, 1.0))
        share = rank.clamp(min=1) / (rank + 1 - way).clamp(min=1)
        p_value = (rank + 1) * share / (len(self.calibration) + 1.0)
        return score, p_value, p_value <= self._level

    def _score(self, rows: Tensor) -> Tensor:
        """The scores [N] of rows [N, d]."""
        model = self._model
        return -model.scorer.anomaly(rows) if isinstance(model, DefaultModel) else model.traceable_scores(rows)

    def _encode(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """`FeatureEncoder.transform`."""
        features: list[Tensor] = []
        n_numbers = n_codes = 0
        for column in self._columns:
            if isinstance(column, CategoricalColumn):
                own = codes[:, n_codes : n_codes + 1]
                features.append((own == torch.arange(len(column.categories) + 1)).double())
                n_codes += 1
                continue
            value = numbers[:, n_numbers : n_numbers + 1]
            n_numbers += 1
            scaled = (value - column.center) / column.scale
            scaled = scaled.asinh() if column.heavy_tailed else scaled
            standard = (scaled - column.mean) / column.deviation
            size = standard.abs()
            clipped = standard.sign() * (size.clamp(max=SOFT_CLIP) + (size - SOFT_CLIP).clamp(min=0).log1p())
            features.append(torch.where(value.isnan(), 0.0, clipped))
            if column.has_missing:
                features.append(value.isnan().double())
        return torch.cat(features, dim=1).float()

"""A detector as an MLflow pyfunc model: the model's folder, and this module to load it; nothing is pickled."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pyarrow as pa
from mlflow.models import ModelSignature
from mlflow.types.schema import AnyType, ColSpec, Schema

from mdml_fast.data.encoding import FeatureEncoder
from mdml_fast.detector import MDMLDetector


def save_mlflow(detector: MDMLDetector, folder: Path) -> None:
    """Write an MLflow model to an empty folder."""
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        detector.save(model)
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=__name__,
            data_path=str(model),
            signature=_signature(detector.encoder_),
            pip_requirements=[f"mdml-fast=={version('mdml-fast')}", "pandas"],
        )


def _signature(encoder: FeatureEncoder) -> ModelSignature:
    # MLflow turns integers away from a column of doubles, and categories from one of text; the detector takes them.
    inputs = [ColSpec(AnyType(), column.name) for column in encoder.columns]
    outputs = [ColSpec("double", "score"), ColSpec("double", "p_value"), ColSpec("boolean", "is_anomaly")]
    return ModelSignature(Schema(inputs), Schema(outputs))


class _Pyfunc:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, detector: MDMLDetector) -> None:
        self._detector = detector

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002 - MLflow's interface
        """A data frame of score, p_value and is_anomaly for one of rows."""
        found = self._detector.alarms(data)
        columns = {"score": found.scores, "p_value": found.p_values, "is_anomaly": found.is_alarm}
        return pa.table(columns).to_pandas()


def _load_pyfunc(path: str) -> _Pyfunc:
    """MLflow's hook: the model in the folder that was given as `data_path`."""
    return _Pyfunc(MDMLDetector.load(path))

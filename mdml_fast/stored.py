"""A fitted detector on disk, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mdml_fast.artifact import load_artifact, save_artifact
from mdml_fast.calibration import ConformalCalibration
from mdml_fast.data.encoding import FeatureEncoder
from mdml_fast.errors import ArtifactError
from mdml_fast.inputs import resolve_device, resolve_dtype
from mdml_fast.kept import KeptRows
from mdml_fast.known import KnownRows
from mdml_fast.meta.model import tensors_under
from mdml_fast.presets import algorithm, config_from_json, model_class

if TYPE_CHECKING:
    from mdml_fast.detector import MDMLDetector

# Settings of the constructor that are kept as they are.
SETTINGS = ("false_alarm_rate", "promise", "confidence", "contamination", "dtype")


def save_detector(detector: MDMLDetector, path: Path, metrics: Mapping[str, Any]) -> None:
    """See `MDMLDetector.save`."""
    model, groups = detector.model_, detector.calibration_.groups
    document = {
        "preset": detector.preset if isinstance(detector.preset, str) else "custom",
        "algorithm": algorithm(model.config),
        "config": asdict(model.config),
        # NumPy's numbers, as a search over settings gives them, are no JSON.
        **{name: np.asarray(getattr(detector, name)).item() for name in SETTINGS},
        "normal": detector.normal if isinstance(detector.normal, str) else detector.normal_classes_,
        "random_state": int(detector.random_state) if isinstance(detector.random_state, Integral) else None,
        "normal_classes": detector.normal_classes_,
        "anomaly_classes": detector.anomaly_classes_,
        "remarks": detector.remarks_,
        "columns": detector.feature_names_in_.tolist(),
        "features": detector.encoder_.to_json(),
        "learned": model.to_json(),
        "calibration_groups": None if groups is None else groups.tolist(),
        "known_normals": detector.known_normals_.names.tolist(),
        "known_anomalies": detector.known_anomalies_.names.tolist(),
        "kept": detector.kept_.to_json(),
        "metrics": dict(metrics),
    }
    tensors = {
        "calibration.scores": torch.from_numpy(detector.calibration_.scores),
        "known.normals": torch.from_numpy(detector.known_normals_.rows),
        "known.anomalies": torch.from_numpy(detector.known_anomalies_.rows),
    }
    kept = {f"kept.{name}": values for name, values in detector.kept_.to_tensors().items()}
    save_artifact(path, document, model.to_tensors() | tensors | kept)


def load_detector(kind: type[MDMLDetector], path: Path, device: str) -> MDMLDetector:
    """See `MDMLDetector.load`."""
    document, tensors = load_artifact(path)
    target = resolve_device(device)
    try:
        config = config_from_json(document["algorithm"], document["config"])
        named = document["preset"] != "custom"
        detector = kind(
            document["preset"] if named else config,
            normal=document.get("normal", document["normal_classes"]),
            random_state=document.get("random_state"),
            device=device,
            **{name: document[name] for name in SETTINGS},
        )
        groups = document["calibration_groups"]
        detector.calibration_ = ConformalCalibration(
            tensors["calibration.scores"].numpy(), None if groups is None else np.array(groups, dtype=object)
        )
        detector.known_normals_, detector.known_anomalies_ = (
            KnownRows(tensors[f"known.{part}"].numpy(), np.array(document[f"known_{part}"], dtype=str))
            for part in ("normals", "anomalies")
        )
        detector.kept_ = KeptRows.from_tensors(tensors_under("kept", tensors), document["kept"])
        detector.model_ = model_class(config).from_tensors(
            config, tensors, document["learned"], target, resolve_dtype(document["dtype"])
        )
        detector.encoder_ = FeatureEncoder.from_json(document["features"])
        detector.normal_classes_ = document["normal_classes"]
        detector.anomaly_classes_ = document["anomaly_classes"]
        detector.remarks_ = document["remarks"]
        detector.feature_names_in_ = np.array(document["columns"], dtype=object)
        detector.n_features_in_ = len(document["columns"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged: its parts do not fit together ({error}); train it again") from error
    return detector

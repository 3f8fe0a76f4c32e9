"""Detect anomaly classes that nobody has labelled yet, by multidirectional meta-learning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdml_fast.detector import MDMLDetector
    from mdml_fast.errors import ArtifactError, InputError
    from mdml_fast.evaluation import evaluate
    from mdml_fast.meta.engine import MetaEngine
    from mdml_fast.meta.gradients import MetaGradients
    from mdml_fast.meta.scheduler import MetaScheduler

__all__ = ["ArtifactError", "InputError", "MDMLDetector", "MetaEngine", "MetaGradients", "MetaScheduler", "evaluate"]

_HOMES = {
    "ArtifactError": "mdml_fast.errors",
    "InputError": "mdml_fast.errors",
    "MDMLDetector": "mdml_fast.detector",
    "MetaEngine": "mdml_fast.meta.engine",
    "MetaGradients": "mdml_fast.meta.gradients",
    "MetaScheduler": "mdml_fast.meta.scheduler",
    "evaluate": "mdml_fast.evaluation",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and scikit-learn take seconds, which `mdml-fast --help` need not wait for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mdml_fast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

"""Where things are, for tests of several folders."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mdml_fast.data.labelled import LabelledTable
from mdml_fast.data.open_sets import open_sets
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.ensemble import EnsembleConfig
from mdml_fast.meta.paper import PaperConfig

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MDML_DATA", ROOT / ".." / "shared" / "data"))
COMMAND = Path(sys.executable).parent / "mdml-fast"

OPEN_SETS = ("letter", "nsl_kdd", "shuttle", "tennessee_eastman")

Run = Callable[..., subprocess.CompletedProcess[str]]


# Trainings of milliseconds, for what does not depend on how well they find anomalies.
FAST = DefaultConfig(
    ensemble=EnsembleConfig(hidden=8, n_prototypes=32, n_queries=32, n_anomalies=24, n_synthetic=64, steps=5),
    n_trees=10,
)
PAPER = PaperConfig(outer_steps=5, episodes_per_step=4)


def normals(n: int, seed: int = 0, centre: float = 0.0) -> np.ndarray:
    """Rows of four features around a centre."""
    return np.random.default_rng(seed).normal(centre, 1, size=(n, 4))


def protocol(name: str) -> dict[str, Any]:
    """What the protocol says of an open set; skips the test where there are none."""
    if not (DATA / "protocol.json").exists():
        pytest.skip(f"no open data sets in {DATA}; name their folder in MDML_DATA")
    found: dict[str, Any] = json.loads((DATA / "protocol.json").read_text())[name]
    return found


def open_table(name: str) -> LabelledTable:
    """An open set; skips the test where there are none."""
    protocol(name)
    return open_sets(DATA)[name]()


def normals_and_two_classes(seed: int = 0, n: int = 300, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Rows and classes: normals, "ok", around 0; "up" and "side" are anomaly classes."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n + 40, d))
    rows[n : n + 20, 0] += 6
    rows[n + 20 :, -1] -= 6
    return rows, np.array(["ok"] * n + ["up"] * 20 + ["side"] * 20)


def benchmark_script(name: str) -> ModuleType:
    """A script of `benchmarks/`, imported anew, as others there may import it from then on."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Where things are, for tests of several folders."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdml_fast.data.labelled import LabelledTable
from mdml_fast.data.open_sets import open_sets

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MDML_DATA", ROOT / ".." / "shared" / "data"))
COMMAND = Path(sys.executable).parent / "mdml-fast"

OPEN_SETS = ("letter", "nsl_kdd", "shuttle", "tennessee_eastman")

Run = Callable[..., subprocess.CompletedProcess[str]]


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

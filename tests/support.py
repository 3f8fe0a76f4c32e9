"""Where things are, for tests of several folders."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("MDML_DATA", ROOT / ".." / "shared" / "data"))
COMMAND = Path(sys.executable).parent / "mdml-fast"

Run = Callable[..., subprocess.CompletedProcess[str]]

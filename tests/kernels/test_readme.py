"""The code of kernels/README.md runs."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "kernels" / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"^# requires: (\w+)$", block, flags=re.MULTILINE):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        warnings.simplefilter("ignore")  # theirs, of their own parts
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})

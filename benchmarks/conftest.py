"""Collects the outcomes of the benchmarks; at the end prints the table and writes the JSON."""

import re
from pathlib import Path

import pytest
import torch
from mdml_kernels import benchmark

ROWS = pytest.StashKey[list]()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture
def rows(pytestconfig):
    """The outcomes so far, to be added to."""
    torch.set_num_threads(1)
    return pytestconfig.stash[ROWS]


@pytest.fixture
def device():
    return DEVICE


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if rows:
        name = re.sub(r"[^a-z0-9]+", "-", benchmark.environment(DEVICE)["device"].lower()).strip("-")
        default = Path(__file__).parent / "results" / f"kernels-{name}.json"
        path = config.getoption("--benchmark-out") or default
        benchmark.write(rows, DEVICE, path)
        terminalreporter.write_line(f"{benchmark.table(rows)}\nwritten to {path}")

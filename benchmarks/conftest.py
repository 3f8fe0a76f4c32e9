"""Collects the outcomes of the benchmarks; at the end prints the tables and writes JSON."""

import re
from pathlib import Path

import pytest
import torch
from mdml_kernels import benchmark as kernels

from mdml_fast.bench import engine

ROWS = pytest.StashKey[dict]()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = {kernels: "kernels", engine: "engine"}


def pytest_configure(config):
    config.stash[ROWS] = {module: [] for module in NAMES}


@pytest.fixture
def measure(pytestconfig, benchmark):
    """Run a case of a benchmark's module and keep the outcome; then pytest-benchmark times ours once more, alone."""

    def run(module, case):
        torch.set_num_threads(1)
        row = module.run(case, DEVICE)
        pytestconfig.stash[ROWS][module].append(row)
        benchmark.extra_info["times ours"] = row.ratios
        benchmark.pedantic(module.ours(case, DEVICE), rounds=case.rounds, warmup_rounds=1)

    return run


def pytest_terminal_summary(terminalreporter, config):
    machine = re.sub(r"[^a-z0-9]+", "-", kernels.environment(DEVICE)["device"].lower()).strip("-")
    folder = config.getoption("--benchmark-out") or Path(__file__).parent / "results"
    for module, rows in config.stash[ROWS].items():
        if rows:
            path = folder / f"{NAMES[module]}-{machine}.json"
            module.write(rows, DEVICE, path)
            terminalreporter.write_line(f"{module.table(rows)}\nwritten to {path}")

"""`pytest --benchmark` runs the benchmarks, and only them; a plain `pytest` runs none, and tests side by side."""

import os
from pathlib import Path

BENCHMARKS = Path(__file__).parent / "benchmarks"
# Each process imports torch.
MOST_PROCESSES = 4


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of this project")
    group.addoption("--benchmark", action="store_true", help="run benchmarks/, print ratios and write JSON")
    group.addoption("--benchmark-out", type=Path, help="folder for the JSON (benchmarks/results)")


def pytest_xdist_auto_num_workers(config):
    if config.getoption("--benchmark"):
        return 0
    # Threads of one process that wait for work by spinning would take the cores from another.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return min(os.cpu_count() or 1, MOST_PROCESSES)


def pytest_configure(config):
    if config.getoption("--benchmark") and not config.option.file_or_dir:
        config.args = [str(BENCHMARKS)]


def pytest_ignore_collect(collection_path, config):
    if BENCHMARKS in (collection_path, *collection_path.parents) and not config.getoption("--benchmark"):
        return True
    return None


def pytest_collection_modifyitems(config, items):
    if config.getoption("--benchmark"):
        kept = [item for item in items if BENCHMARKS in item.path.parents]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

"""What the scripts for a GPU share: the clock, the workload, other processes, and where findings are written."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from mdml_kernels import benchmark
from torch import Tensor

from mdml_fast.files import replace_file

RESULTS = Path(__file__).parent / "results"
EPISODES, SUPPORT, SIZES, CLASSES, STEPS, LR = 64, 64, (64, 128, 64), 16, 5, 0.1  # the engine's reference workload
# Each has a context on the GPU.
PROCESSES = min(len(os.sched_getaffinity(0)), 16) if hasattr(os, "sched_getaffinity") else 4

Item = TypeVar("Item")
Result = TypeVar("Result")


def median_ms(call: Callable[[], Any], repeats: int = 50) -> float:
    """Median milliseconds of a call on the GPU, on a cold L2 cache, launches ahead of it where they can be."""
    flush = torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        for _ in range(5):  # half a millisecond, in which the call is launched
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def mlp(device: str, episodes: int) -> dict[str, Any]:
    """Arguments of `adapt_mlp`: the engine's reference workload, weights shared by all episodes."""
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    pairs = list(zip(SIZES[1:], SIZES[:-1], strict=True))
    return {
        "support": randn(episodes, SUPPORT, SIZES[0]),
        "weights": [randn(1, o, i) / i**0.5 for o, i in pairs],
        "biases": [0.1 * randn(1, o) for o, _ in pairs],
        "head_weight": randn(1, CLASSES, SIZES[-1]) / SIZES[-1] ** 0.5,
    }


def in_processes(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> list[Result]:
    """What a function of this or an imported file gives for each item, in so many processes; 1 is this one."""
    if processes == 1:
        return list(map(function, items))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, items))


def environment() -> dict[str, Any]:
    """What the numbers were seen on."""
    import triton

    return benchmark.environment(torch.device("cuda")) | {"triton": triton.__version__}


def results_of_this_gpu(kind: str = "") -> Path:
    """The file of this GPU's findings."""
    slug = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().lower())
    return RESULTS / f"{kind}{slug}.json"


def write(findings: dict[str, Any], path: Path) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(findings, indent=2) + "\n")

"""How the kernels would do with other launches: python benchmarks/gpu_tiles.py

`mdml_kernels.launch` decides from what compilers report where no GPU was at hand to measure. This times what lies
around its choices: the row kernels with other numbers of logits a thread and of warps, the whole inner loop with other
warps, tiles of hidden units, and ways to multiply float32. Prints the median milliseconds of each, the fastest first
and the choice of today marked, and writes them to results/tiles-<gpu>.json; exits 3 without GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import gpu_runs
import torch
from mdml_kernels import launch, triton_mlp, triton_rows
from torch import Tensor

DEVICE = "cuda"
SHAPES = ((64, 1024, 512), (64, 80, 16), (16, 4096, 64), (4, 256, 32768))
EPISODES = (64, 1024)


class Variant(NamedTuple):
    """A kernel on one input, launched in one way; `choice` is what it would be launched by itself."""

    kernel: str
    shape: tuple[int, ...]
    dtype: str
    launched: tuple[Any, ...]
    choice: tuple[Any, ...]

    @property
    def case(self) -> str:
        """What its times are compared within."""
        return f"{self.kernel} {list(self.shape)} {self.dtype}"


def variants() -> Iterator[Variant]:
    """All there are: of rows (logits a thread, warps), of the inner loop (warps, hidden units of a tile, product)."""
    for shape, dtype, kernel in itertools.product(SHAPES, ("float32", "bfloat16"), ("forward", "backward")):
        for launched in itertools.product((16, 32, 64), (1, 2, 4, 8)):
            yield Variant(kernel, shape, dtype, launched, (triton_rows.PER_THREAD[kernel], 4))
    arch = launch.arch_of(torch.device(DEVICE))
    sizes = (gpu_runs.SUPPORT, gpu_runs.SIZES[0], gpu_runs.SIZES[2], gpu_runs.CLASSES)
    for episodes, precision in itertools.product(EPISODES, ("float32", "tf32", "bfloat16")):
        config = launch.inner_loop_config(*sizes, precision, arch)
        assert config is not None
        own = launch.inner_loop_precision(precision, arch)
        words = ("bf16x6", "tf32x3", "bf16x3") if precision == "float32" else (own,)
        for launched in itertools.product((4, 8), (16, 32), words):
            choice = (config.num_warps, config.block_inner, own)
            yield Variant("inner loop", (episodes,), precision, launched, choice)


@contextlib.contextmanager
def prepared(variant: Variant) -> Iterator[Callable[[], Any]]:
    """Gives what runs the variant on inputs that are there, while it is how things are launched."""
    if variant.kernel == "inner loop":
        run, launches = _inner_loop(variant)
    else:
        run, launches = _rows(variant)
    with contextlib.ExitStack() as stack:
        for module, name, decision in launches:
            stack.enter_context(patch.object(module, name, decision))
        yield run


def _rows(variant: Variant) -> tuple[Callable[[], Any], list[tuple[Any, str, Any]]]:
    logits, ones = _logits(variant.shape, variant.dtype), torch.ones(variant.shape[0], device=DEVICE)
    odds, *saved = triton_rows.odds_forward(logits, ones, None, "max")
    per_thread, num_warps = variant.launched

    def config(n_cols: int, dtype: torch.dtype, arch: str, _: int) -> launch.LaunchConfig:
        return launch.rows_config(n_cols, dtype, arch, per_thread, num_warps)

    def run() -> Any:
        if variant.kernel == "forward":
            return triton_rows.odds_forward(logits, ones, None, "max")
        return triton_rows.odds_backward(logits, ones, None, "max", *saved, odds)

    return run, [(triton_rows, "rows_config", config)]


@functools.lru_cache(maxsize=1)
def _logits(shape: tuple[int, ...], dtype: str) -> Tensor:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (3 * normal).to(DEVICE, getattr(torch, dtype))


def _inner_loop(variant: Variant) -> tuple[Callable[[], Any], list[tuple[Any, str, Any]]]:
    arguments = gpu_runs.mlp(DEVICE, variant.shape[0])
    num_warps, block_inner, word = variant.launched
    how = {"steps": gpu_runs.STEPS, "lr": gpu_runs.LR, "precision": variant.dtype, "whole": True}
    chosen = triton_mlp.whole_config

    def config(*given: Any) -> launch.LaunchConfig:
        own = chosen(*given)
        assert own is not None
        return launch.LaunchConfig(own.block_rows, own.block_cols, num_warps, block_inner=block_inner)

    decisions = [(triton_mlp, "whole_config", config), (triton_mlp, "inner_loop_precision", lambda *_: word)]
    return lambda: triton_mlp.adapt_mlp(**arguments, **how), decisions


def compiled(variant: Variant) -> str | None:
    """Run it once in a process of its own, which leaves the kernel in Triton's cache; what went wrong, if it did."""
    try:
        with prepared(variant) as run:
            run()
        torch.cuda.synchronize()
    except Exception as error:  # a launch that this GPU can't take is a finding
        return f"{type(error).__name__}: {error}"[:200]
    return None


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        print("gpu_tiles: PyTorch finds no GPU here, so there is nothing to measure")
        return 3
    everything = list(variants())
    outcomes = gpu_runs.in_processes(compiled, everything, gpu_runs.PROCESSES)
    failures = dict(zip(everything, outcomes, strict=True))
    found: dict[str, Any] = {"environment": gpu_runs.environment()}
    for case, group in itertools.groupby(everything, lambda variant: variant.case):
        rows = []
        for variant in group:
            failed = failures[variant]
            ms = None
            if not failed:
                with prepared(variant) as run:
                    ms = gpu_runs.median_ms(run, 20)
            is_choice = variant.launched == variant.choice
            rows.append({"launched": variant.launched, "ms": ms, "chosen": is_choice, "failed": failed})
        rows.sort(key=lambda row: (row["ms"] is None, row["ms"]))
        found[case] = rows
        print(case, *(_line(row) for row in rows), sep="\n  ", flush=True)
    gpu_runs.write(found, gpu_runs.results_of_this_gpu("tiles-"))
    return 0


def _line(row: dict[str, Any]) -> str:
    outcome = row["failed"] or f"{row['ms']:.4f} ms"
    return f"{', '.join(map(str, row['launched'])):20} {outcome}{'  <- chosen' if row['chosen'] else ''}"


if __name__ == "__main__":
    sys.exit(main())

"""All that a GPU alone can show of the Triton backend, in one go: python benchmarks/gpu_acceptance.py

Correctness against float64, bandwidth against a copy, speed against eager and `torch.compile`, determinism, CUDA-graph
capture, peak memory, the inner loop against the vmapped PyTorch path, and the engine against its peers. Prints the
findings, writes them to results/<gpu>.json, and exits 1 if something is wrong, 0 otherwise (goals missed are said, not
punished), 3 without GPU.
Times are medians over calls, each after the L2 cache was flushed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_runs
import mdml_kernels
import torch
import torch.nn.functional as F
from mdml_kernels import parity, reference
from torch import Tensor, nn

GOALS = {"of_copy": 0.85, "over_compile": 1.5, "over_vmap": 5.0}
AUROC_TOLERANCE = 0.005
LARGE = (64, 1024, 512)

Timer = Callable[[Callable[[], Any]], float]


def correctness(problems: int = 100, largest: int = 600, processes: int = 1) -> dict[str, Any]:
    """Every form, confidence and order of derivative, by `mdml_kernels.parity`, for each dtype; nothing may miss.

    Every problem has shapes of its own and kernels to be compiled, which is what takes the time: in many processes.
    """
    drawn = [
        list(parity.problems(problems, 0, dtype, largest)) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    parts = [some[first::processes] for some in drawn for first in range(processes)]
    worst = parity.worst_of(itertools.chain.from_iterable(gpu_runs.in_processes(_compared, parts, processes)))
    rows = [
        {
            "form": found.form,
            "confidence": found.confidence,
            "dtype": str(found.dtype),
            "ours": found.ours,
            "eager": found.eager,
            "missed": found.missed,
        }
        for found in worst
    ]
    return {
        "kinds": rows,
        "wrong": [row for row in rows if row["missed"]] or ([] if rows else ["nothing was compared"]),
    }


def _compared(problems: list[parity.Problem]) -> list[parity.Worst]:
    return parity.compare(problems, ["triton"])


def large_logits(device: str, shape: tuple[int, int, int] = LARGE) -> dict[str, Tensor]:
    """Rows that are partly confident, and a fifth of them anomalous, by dtype."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator)
    return {name: logits.to(device, getattr(torch, name)) for name in ("float32", "bfloat16")}


def bandwidth(device: str, timer: Timer, shape: tuple[int, int, int] = LARGE) -> dict[str, Any]:
    """Bytes a second of the row kernels, over those of a copy: logits read once; read once and a gradient written."""
    from mdml_kernels import triton_rows

    found = {}
    for dtype, logits in large_logits(device, shape).items():
        ones = torch.ones(shape[0], device=device)
        _, *saved = triton_rows.odds_forward(logits, ones, None, "max")
        grad, target = torch.ones_like(saved[0]), torch.empty_like(logits)
        copy = 2 * logits.nbytes / timer(lambda target=target, logits=logits: target.copy_(logits))

        def forward(logits: Tensor = logits, ones: Tensor = ones) -> Any:
            return triton_rows.odds_forward(logits, ones, None, "max")

        def backward(logits: Tensor = logits, ones: Tensor = ones, saved: Any = saved, grad: Tensor = grad) -> Any:
            return triton_rows.odds_backward(logits, ones, None, "max", *saved, grad)

        row = {
            "copy_gb_per_s": copy / 1e6,
            "forward_of_copy": logits.nbytes / timer(forward) / copy,
            "backward_of_copy": 2 * logits.nbytes / timer(backward) / copy,
        }
        found[dtype] = {**row, "goal_met": min(row["forward_of_copy"], row["backward_of_copy"]) >= GOALS["of_copy"]}
    return found


def speed(device: str, timer: Timer, shape: tuple[int, int, int] = LARGE, compiled: bool = True) -> dict[str, Any]:
    """Forward and backward of the loss, over eager PyTorch and over `torch.compile` of it."""
    found = {}
    is_ood = (torch.arange(shape[1], device=device) % 5 == 0).expand(shape[:2])
    for dtype, logits in large_logits(device, shape).items():
        leaf = logits.clone().requires_grad_()

        def both(loss: Callable[..., Tensor], backend: str, leaf: Tensor = leaf) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(loss(leaf, is_ood, backend=backend), leaf)

        ours = timer(both(mdml_kernels.softmax_margin_loss, "triton"))
        eager = timer(both(mdml_kernels.softmax_margin_loss, "reference"))
        row = {"ours_ms": ours, "eager_ms": eager, "over_eager": eager / ours}
        if compiled:
            row["compile_ms"] = timer(both(torch.compile(mdml_kernels.softmax_margin_loss), "reference"))
            row["over_compile"] = row["compile_ms"] / ours
            row["goal_met"] = row["over_compile"] >= GOALS["over_compile"]
        found[dtype] = row
    return found


def determinism(
    device: str, shape: tuple[int, int, int] = (8, 300, 100), episodes: int = gpu_runs.EPISODES
) -> dict[str, Any]:
    """Two runs of every kernel with a reduction give the same bits."""
    from mdml_kernels import triton_hinge, triton_linear, triton_mlp, triton_rows

    logits = large_logits(device, shape)["float32"]
    ones = torch.ones(shape[0], device=device)
    is_ood = (torch.arange(shape[1], device=device) % 5 == 0).expand(shape[:2]).contiguous()
    head = torch.randn(1, 40, shape[2], generator=torch.Generator().manual_seed(1)).to(device)
    rows = logits.reshape(1, -1, shape[2])
    row_ones = torch.ones(rows.shape[:2], device=device)

    def run() -> list[Tensor]:
        odds, *saved = triton_rows.odds_forward(logits, ones, None, "max")
        outs = [odds, *triton_rows.odds_backward(logits, ones, None, "max", *saved, odds)]
        loss, weights = triton_hinge.hinge(odds, is_ood, 0.9)
        outs += [loss, weights, triton_hinge.hinge_slope(odds, is_ood, weights, loss)]
        odds, *saved = triton_linear.linear_odds_forward(rows, head, None, row_ones, None, "max")
        outs += triton_linear.linear_odds_backward(rows, head, None, row_ones, None, "max", *saved, odds)
        adapted = triton_mlp.adapt_mlp(**gpu_runs.mlp(device, episodes), steps=gpu_runs.STEPS, lr=gpu_runs.LR)
        return [out for out in (*outs, *adapted[0], *adapted[1]) if isinstance(out, Tensor)]

    differ = sum(not torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    return {"wrong": [f"{differ} outputs differ between two runs"] if differ else []}


def cuda_graph() -> dict[str, Any]:
    """Forward and backward of the loss in a CUDA graph, replayed on other logits."""
    logits = large_logits("cuda", (8, 128, 64))["float32"].requires_grad_()
    is_ood = (torch.arange(128, device="cuda") % 5 == 0).expand(8, 128)

    def run() -> tuple[Tensor, Tensor]:
        loss = mdml_kernels.softmax_margin_loss(logits, is_ood, backend="triton")
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    same = all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
    return {"wrong": [] if same else ["a replayed graph does not give what the call gives"]}


def peak_memory(n: int = 16384, h: int = 256, k: int = 8192) -> dict[str, Any]:
    """Bytes at the peak of forward and backward, without the inputs, of the loss and of the fused linear head."""
    logits = large_logits("cuda")["float32"].requires_grad_()
    is_ood = (torch.arange(LARGE[1], device="cuda") % 5 == 0).expand(LARGE[:2])
    z, weight = (torch.randn(rows, h, device="cuda").requires_grad_() for rows in (n, k))

    def peak(call: Callable[[], Tensor], *leaves: Tensor) -> int:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(call(), leaves)
        return torch.cuda.max_memory_allocated() - before

    found = {}
    for backend in ("triton", "reference"):
        found[f"loss_{backend}"] = peak(
            lambda backend=backend: mdml_kernels.softmax_margin_loss(logits, is_ood, backend=backend), logits
        )
        found[f"linear_{backend}"] = peak(
            lambda backend=backend: mdml_kernels.linear_softmax_confidence(z, weight, backend=backend).mean(), z, weight
        )
    gradients, logits_of_head = 4 * (n * h + k * h), 4 * n * k
    too_much = found["linear_triton"] > gradients * 2 + logits_of_head // 8
    return {**found, "wrong": ["the fused head holds an eighth of its logits or more"] if too_much else []}


def vmapped(arguments: dict[str, Any]) -> Callable[[], list[Tensor]]:
    """The same inner loop as `vmap(grad(functional_call))` on a module, which is how PyTorch users write it."""
    first, second = (nn.Linear(i, o) for o, i in zip(gpu_runs.SIZES[1:], gpu_runs.SIZES[:-1], strict=True))
    model = nn.Sequential(first, nn.ReLU(), second).to(arguments["support"])
    head = arguments["head_weight"][0]
    start = {}
    for layer, name in ((0, "0"), (1, "2")):
        start[f"{name}.weight"] = arguments["weights"][layer][0]
        start[f"{name}.bias"] = arguments["biases"][layer][0]

    def loss(parameters: dict[str, Tensor], support: Tensor) -> Tensor:
        logits = F.linear(torch.func.functional_call(model, parameters, (support,)), head)
        return -reference.log_confidence(logits)[0].mean()

    def adapt(support: Tensor) -> dict[str, Tensor]:
        parameters = start
        for _ in range(gpu_runs.STEPS):
            grads = torch.func.grad(loss)(parameters, support)
            parameters = {name: parameters[name] - gpu_runs.LR * grads[name] for name in parameters}
        return parameters

    def run() -> list[Tensor]:
        adapted = torch.func.vmap(adapt)(arguments["support"])
        return [adapted[name] for name in ("0.weight", "2.weight", "0.bias", "2.bias")]

    return run


def inner_loop(device: str, timer: Timer, episodes: tuple[int, ...] = (gpu_runs.EPISODES, 1024)) -> dict[str, Any]:
    """`adapt_mlp` in every precision, right against float64 and timed over the vmapped PyTorch path."""
    from mdml_kernels import triton_mlp

    found: dict[str, Any] = {"wrong": []}
    # Of the size of the update; float32 is further held to the vmapped path's own error.
    bars = {"float32": 1e-5, "tf32": 3e-2, "bfloat16": 2e-1}
    for count in episodes:
        arguments = gpu_runs.mlp(device, count)
        path = vmapped(arguments)
        wide = {
            name: [v.double() for v in value] if isinstance(value, list) else value.double()
            for name, value in arguments.items()
        }
        exact, start = vmapped(wide)(), [*wide["weights"], *wide["biases"]]

        def error(values: list[Tensor], exact: list[Tensor] = exact, start: list[Tensor] = start) -> float:
            pairs = zip(values, exact, start, strict=True)
            return max(float((v.double() - e).abs().max() / (e - s).abs().max()) for v, e, s in pairs)

        torch_ms, of_vmap = timer(path), error(path())
        rows: dict[str, Any] = {"vmap_ms": torch_ms, "vmap_error": of_vmap}
        for precision, bar in bars.items():
            for whole in (True, False):

                def run(arguments: Any = arguments, precision: Any = precision, whole: bool = whole) -> list[Tensor]:
                    adapted = triton_mlp.adapt_mlp(
                        **arguments, steps=gpu_runs.STEPS, lr=gpu_runs.LR, precision=precision, whole=whole
                    )
                    return [*adapted[0], *adapted[1]]

                name, off = f"{precision} {'whole' if whole else 'by layers'}", error(run())
                rows[name] = {"over_vmap": torch_ms / timer(run), "error": off}
                if not off <= bar + of_vmap:
                    found["wrong"].append(f"inner loop, {name}, {count} episodes: off by {off:.1e} of the update")
        rows["goal_met"] = rows["float32 whole"]["over_vmap"] >= GOALS["over_vmap"]
        found[f"{count} episodes"] = rows
    return found


def engine(device: str, parts: tuple[str, ...] = (), rounds: int | None = None) -> dict[str, Any]:
    """The cases of `mdml-fast bench engine`: every contender right against float64, then timed in turns."""
    from mdml_fast.bench.engine import run_all

    return {
        row.case: {"chosen": row.chosen, "per_second": row.per_second, "ratios": row.ratios, "errors": row.errors}
        for row in run_all(torch.device(device), parts, rounds)
    }


def detector(device: str, splits: int = 2) -> dict[str, Any]:
    """AUROC of the default detector on the open tables, trained and scored there, against float32 on the CPU."""
    from mdml_fast.baselines import mdml
    from mdml_fast.data.open_sets import open_sets
    from mdml_fast.evaluation import EvaluationProtocol, evaluate

    methods = {"cpu": mdml("default", "cpu", "float32")}
    methods |= {dtype: mdml("default", device, dtype) for dtype in ("float32", "bfloat16")}
    found: dict[str, Any] = {"wrong": []}
    for name, table in open_sets().items():
        results = evaluate(table(), methods, EvaluationProtocol(splits=splits, seeds=1))["results"]
        means: dict[str, dict[str, float]] = {
            key: {method: statistics.mean(split[key] for split in results[method]["splits"]) for method in methods}
            for key in ("auroc_unseen", "auroc_seen")
        }
        means["fit_seconds"] = {method: results[method]["fit_seconds"] for method in methods}
        found[name] = means
        for key in ("auroc_unseen", "auroc_seen"):
            for dtype in ("float32", "bfloat16"):
                off = means[key][dtype] - means[key]["cpu"]
                if not abs(off) <= AUROC_TOLERANCE:
                    found["wrong"].append(f"{name}, {key} in {dtype}: {off:+.4f} from the CPU's")
    return found


def wrong_in(findings: Any) -> list[Any]:
    """All that any part of the findings calls wrong."""
    if not isinstance(findings, dict):
        return []
    return [*findings.get("wrong", []), *(found for value in findings.values() for found in wrong_in(value))]


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "correctness": lambda: correctness(processes=gpu_runs.PROCESSES),
    "determinism": lambda: determinism("cuda"),
    "cuda_graph": cuda_graph,
    "peak_memory": peak_memory,
    "bandwidth": lambda: bandwidth("cuda", gpu_runs.median_ms),
    "speed": lambda: speed("cuda", gpu_runs.median_ms),
    "inner_loop": lambda: inner_loop("cuda", gpu_runs.median_ms),
    "engine": lambda: engine("cuda"),
    "detector": lambda: detector("cuda"),
}


def kept(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part finds; whatever goes wrong in it is a finding, so that the other parts still run."""
    try:
        return part()
    except Exception as error:
        traceback.print_exc()
        return {"wrong": [f"{type(error).__name__}: {error}"[:1000]]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="this one, beside what the file already holds")
    parser.add_argument("--out", type=Path, help="the file (results/<gpu>.json)")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_acceptance: PyTorch finds no GPU here, so there is nothing to accept")
        return 3
    out = chosen.out or gpu_runs.results_of_this_gpu()
    findings = json.loads(out.read_text()) if chosen.part and out.exists() else {}
    findings |= {"environment": gpu_runs.environment(), "goals": GOALS}
    for name in chosen.part or PARTS:
        start = time.perf_counter()
        findings[name] = kept(PARTS[name])
        print(f"{name}, {time.perf_counter() - start:.0f} s", json.dumps(findings[name], indent=2), flush=True)
        gpu_runs.write(findings, out)
    wrong = wrong_in(findings)
    print(f"{len(wrong)} findings are wrong" + "".join(f"\n  {found}" for found in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

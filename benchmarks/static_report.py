"""Compile every Triton kernel for chips that are not here, and hold what comes out to limits.

    python benchmarks/static_report.py            compile all, write results/static_report.json, fail on a broken limit
    python benchmarks/static_report.py --check    compile a part, compare it with the stored report, fail on a change

A row is kernel x shape x dtype x chip: registers and stack a thread (a stack is where spills go), shared memory a
program, global loads and stores by width in bits, dots, tensor-core instructions, and instructions in all.
No GPU is needed, and no TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from mdml_kernels import (
    aot,
    launch,
    triton_hinge,
    triton_hinge_kernels,
    triton_inner_loop,
    triton_linear_kernels,
    triton_mlp_kernels,
    triton_row_kernels,
    triton_rows,
)
from mdml_kernels.aot import Case
from mdml_kernels.launch import LaunchConfig, Precision

REPORT = Path(__file__).parent / "results" / "static_report.json"
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# A logit, of all that a row kernel runs: in the time that an H200 reads one of bfloat16 at 4.8 TB/s its 132 x 128 lanes
# issue 14 at 1.98 GHz, twice as many in float32 or where it is written too. More, and memory waits for arithmetic.
INSTRUCTIONS = {"forward": 16, "backward": 24, "double_backward": 64}
FLOAT = "*fp32"


def cases(arch: str) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Every case of a chip, and what is demanded of it."""
    for n_cols in (10, 80, 512, 1000, 65536):
        for dtype in ("fp32", "bf16"):
            yield from _rows(arch, n_cols, dtype)
    yield from _rows(arch, 512, "fp16")
    yield from _rows(arch, 512, "fp32", mass=True)
    yield from _hinge(arch)
    for precision in PRECISIONS:
        yield from _layers(arch, precision)
        yield from _inner_loop(arch, precision, n_rows=64)
        yield from _linear(arch, precision)
    yield from _inner_loop(arch, "tf32", n_rows=80)


def _rows(arch: str, n_cols: int, dtype: str, mass: bool = False) -> Iterator[tuple[Case, dict[str, Any]]]:
    configs = {
        name: launch.rows_config(n_cols, DTYPES[dtype], arch, held) for name, held in triton_rows.PER_THREAD.items()
    }
    logits, background = f"*{dtype}", FLOAT if mass else None
    constants = {
        "K": n_cols,
        "STRIDE_N": n_cols,
        "STRIDE_K": 1,
        "FLAT": True,
        "MASS": mass,
    }
    inputs = {"logits": logits, "inv_temperature": FLOAT, "background": background}
    saved = {"reference": FLOAT, "argmax": "*i32"}
    sizes = {"n_rows": "i32", "rows_per_episode": "i32", "stride_e": "i32"}
    shape = f"K={n_cols} {dtype}{' mass' if mass else ''}"
    # 128 registers let two programs of the largest size, 512 threads, share a multiprocessor of 64 Ki registers.
    widest = {"width": 8 * math.gcd(16, n_cols * DTYPES[dtype].itemsize), "registers": 128}
    few = {name: _few_instructions(name, config) if n_cols in (512, 1000) else {} for name, config in configs.items()}
    yield (
        Case(
            f"rows_forward {shape}",
            triton_row_kernels.rows_forward_kernel,
            {**inputs, "odds": FLOAT, **saved, **sizes},
            {**constants, **_row_tile(configs["forward"])},
            configs["forward"],
        ),
        {**widest, **few["forward"]},
    )
    outputs = {"grad_logits": logits, "grad_inv_temperature": FLOAT, "grad_background": background}
    yield (
        Case(
            f"rows_backward {shape}",
            triton_row_kernels.rows_backward_kernel,
            {**inputs, **saved, "grad": FLOAT, **outputs, **sizes},
            {**constants, **_row_tile(configs["backward"])},
            configs["backward"],
        ),
        {**widest, **few["backward"], "stores": widest["width"]},
    )
    tangents = {"v_logits": logits, "v_inv_temperature": FLOAT, "v_background": background}
    outputs = {"out_logits": logits, "out_inv_temperature": FLOAT, "out_background": background, "along": FLOAT}
    yield (
        Case(
            f"rows_double_backward {shape}",
            triton_row_kernels.rows_double_backward_kernel,
            {**inputs, **saved, "grad": FLOAT, **tangents, **outputs, **sizes, "v_stride_e": "i32"},
            {
                **constants,
                **_row_tile(configs["double_backward"]),
                "V_STRIDE_N": n_cols,
                "V_STRIDE_K": 1,
                "V_FLAT": True,
            },
            configs["double_backward"],
        ),
        {**widest, **few["double_backward"], "stores": widest["width"]},
    )


def _few_instructions(kernel: str, config: LaunchConfig) -> dict[str, int]:
    logits_a_thread = config.block_rows * config.block_cols * config.tiles // (32 * config.num_warps)
    return {"instructions": INSTRUCTIONS[kernel] * logits_a_thread}


def _row_tile(config: LaunchConfig) -> dict[str, int]:
    return {"BLOCK_N": config.block_rows, "BLOCK_K": config.block_cols, "TILES": config.tiles}


def _hinge(arch: str) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Numbers of rows that 16 divides, that 4 divides, and an odd one, which is read number by number."""
    kernels = triton_hinge_kernels
    rows = {"odds": FLOAT, "is_ood": "*u1"}
    for n_rows in (16384, 100, 101):
        config = launch.hinge_config(n_rows, arch)
        sizes: dict[str, str | None] = {"rows_per_episode": "i32:16" if n_rows % 16 == 0 else "i32"}
        tile = {"BLOCK": config.block_rows, "ALIGN": math.gcd(n_rows, 16)}
        wide = {"width": 128 if n_rows % 4 == 0 else 32, "registers": 128}
        chunk = triton_hinge.CHUNK if n_rows > config.block_rows else config.block_rows
        yield (
            Case(
                f"episode_sums n={n_rows}",
                kernels.episode_sums_kernel,
                {**rows, "sums": FLOAT, **sizes, "n_chunks": "i32"},
                {**tile, "CHUNK": chunk, **_one("n_chunks", -(-n_rows // chunk))},
                config,
            ),
            {**wide, **({"narrow": 0} if n_rows % 16 == 0 else {})},
        )
        yield (
            Case(
                f"hinge_slope n={n_rows}",
                kernels.hinge_slope_kernel,
                {**rows, "weights": FLOAT, "grad": FLOAT, "slope": FLOAT, **sizes, "n_tiles": "i32"},
                {**tile, **_one("n_tiles", -(-n_rows // config.block_rows))},
                config,
            ),
            {**wide, "stores": wide["width"], **({"narrow": 3} if n_rows % 16 == 0 else {})},  # an episode's numbers
        )
    arguments: dict[str, str | None] = {"sums": FLOAT, "loss": FLOAT, "weights": FLOAT}
    arguments |= {"margin": "fp32", "n_chunks": "i32"}
    # AMD loads uniform addresses as scalars: no width to demand.
    yield Case("hinge n=16384", kernels.hinge_kernel, arguments, {}, LaunchConfig(1, 1, num_warps=1)), {}


def _one(name: str, value: int) -> dict[str, int]:
    """A launch makes a constant of an integer that is 1."""
    return {name: 1} if value == 1 else {}


def _layers(arch: str, precision: Precision) -> Iterator[tuple[Case, dict[str, Any]]]:
    config = launch.layer_config(arch)
    word = launch.dot_precision(precision, arch)
    sizes = {"N": 64, "I": 64, "O": 128, "STACKED": True, "PRECISION": word}
    names = ("BLOCK_N", "BLOCK_O", "BLOCK_I")
    edge, depth = config.block_rows, config.block_inner
    demand = {"width": 128, "dots": True}
    pointers = {"x": FLOAT, "weight": FLOAT, "bias": FLOAT, "direction": None, "out": FLOAT, "grad": FLOAT}
    kernels = triton_mlp_kernels
    for name, kernel, blocks, more in (
        ("layer_forward", kernels.layer_forward_kernel, (edge, edge, depth), {"RELU": True}),
        ("layer_backward", kernels.layer_backward_kernel, (edge, depth, edge), {}),
        ("layer_update", kernels.layer_update_kernel, (depth, edge, edge), {}),
    ):
        arguments = {**pointers, "hidden": FLOAT, "out_weight": FLOAT, "out_bias": FLOAT, "lr": "fp32"}
        constants = {**sizes, **dict(zip(names, blocks, strict=True)), **more}
        yield Case(f"{name} 64x64x128 {precision}", kernel, arguments, constants, config), demand


def _inner_loop(arch: str, precision: Precision, n_rows: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    config = launch.inner_loop_config(n_rows, 64, 64, 16, precision, arch)
    if config is None:  # goes by layers
        return
    names = ("support", "w1", "b1", "w2", "b2", "head_weight", "head_bias", "inv_temperature")
    outputs = ("out_w1", "out_b1", "out_w2", "out_b2")
    arguments = {**dict.fromkeys((*names, *outputs), FLOAT), "direction": "*i64", "background": None}
    constants = {
        "N": n_rows,
        "D": 64,
        "H": 128,
        "Z": 64,
        "K": 16,
        "BLOCK_N": config.block_rows,
        "BLOCK_D": 64,
        "BLOCK_H": config.block_inner,
        "BLOCK_Z": 64,
        "BLOCK_K": config.block_cols,
        "STACKED": False,
        "MASS": False,
        "PRECISION": launch.inner_loop_precision(precision, arch),
    }
    yield (
        Case(
            f"inner_loop n={n_rows} 64-128-64-16 {precision}",
            triton_inner_loop.inner_loop_kernel,
            {**arguments, "lr": "fp32", "steps": "i32"},
            constants,
            config,
        ),
        # Without its barriers the loop reads what it has not written yet: only a GPU would show it, now and then.
        {"width": 128, "dots": True, "stack": 32, "barriers": 4},
    )


def _linear(arch: str, precision: Precision) -> Iterator[tuple[Case, dict[str, Any]]]:
    operand = "*bf16" if precision == "bfloat16" else FLOAT
    demand = {"width": 128, "dots": True}
    arguments = {
        **{"z": operand, "weight": operand, "bias": operand, "tau": FLOAT, "background": None},
        **{"odds": FLOAT, "reference": FLOAT, "argmax": "*i32", "grad": FLOAT, "n_groups": "i32"},
        **{"grad_z": operand, "grad_tau": FLOAT, "grad_background": None, "grad_weight": FLOAT, "grad_bias": FLOAT},
    }
    kernels = triton_linear_kernels
    forward = launch.linear_forward_config(precision, arch)
    backward = launch.linear_backward_config(256, precision, arch)
    for name, kernel, config, more in (
        ("linear_forward", kernels.linear_forward_kernel, forward, {}),
        ("linear_backward_rows", kernels.linear_backward_rows_kernel, backward, {"BLOCK_OUT": backward.block_out}),
        (
            "linear_backward_head",
            kernels.linear_backward_head_kernel,
            backward,
            {"BLOCK_OUT": backward.block_out, "ROWS": 16384},
        ),
    ):
        constants = {
            "N": 16384,
            "H": 256,
            "K": 8192,
            "MASS": False,
            "BLOCK_N": config.block_rows,
            "BLOCK_K": config.block_cols,
            "BLOCK_H": config.block_inner,
            "PRECISION": launch.dot_precision(precision, arch),
            **more,
        }
        yield Case(f"{name} 16384x256x8192 {precision}", kernel, arguments, constants, config), demand


def broken_limits(row: dict[str, Any]) -> list[str]:
    """What a row of the report breaks, in words."""
    demand, arch = row["demand"], row["arch"]
    loads = {int(width): count for width, count in row["loads"].items()}
    width, registers = demand.get("width", 32), demand.get("registers", 512)
    broken = []
    if row["stack_bytes"] > demand.get("stack", 0):
        broken.append(f"{row['stack_bytes']} bytes of stack a thread, at most {demand.get('stack', 0)}")
    if row["registers"] > registers:
        broken.append(f"{row['registers']} registers a thread, at most {registers}")
    if row.get("instructions", 0) > demand.get("instructions", math.inf):
        broken.append(f"{row['instructions']} instructions, at most {demand['instructions']}")
    if row["shared_bytes"] > SHARED_LIMIT[arch]:
        broken.append(f"{row['shared_bytes']} bytes of shared memory, at most {SHARED_LIMIT[arch]}")
    if row["barriers"] != demand.get("barriers", 0):
        broken.append(f"{row['barriers']} barriers, not {demand.get('barriers', 0)}")
    if "width" in demand and width not in loads:
        broken.append(f"no load of {width} bits, loads are {row['loads']}")
    if demand.get("dots"):
        if not row["dots"] or row["dots_on_tensor_cores"] != row["dots"] or not row["tensor_core"]:
            broken.append(f"{row['dots_on_tensor_cores']} of {row['dots']} dots on tensor cores: {row['tensor_core']}")
    elif any(32 < found < width for found in loads):  # 32 bits are one number a row
        broken.append(f"loads narrower than {width} bits: {row['loads']}")
    if sum(count for found, count in loads.items() if found < width) > demand.get("narrow", math.inf):
        broken.append(f"more than {demand['narrow']} loads narrower than {width} bits: {row['loads']}")
    stores = {int(found) for found in row["stores"]}
    if "stores" in demand and (
        demand["stores"] not in stores or any(32 < found < demand["stores"] for found in stores)
    ):
        broken.append(f"stores not of {demand['stores']} bits: {row['stores']}")
    return broken


def compile_row(arch: str, case: Case, demand: dict[str, Any]) -> dict[str, Any]:
    """One row of the report."""
    return {"arch": arch, "case": case.name, **aot.compile_report(case, arch), "demand": demand}


def source_hash() -> str:
    """Of all that decides what is compiled: a stored report of other sources is out of date."""
    folder = Path(aot.__file__).parent
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted([*folder.glob("triton_*kernels.py"), folder / "triton_inner_loop.py", folder / "launch.py"]):
        digest.update(path.read_bytes())
    for name in ("triton_matmul.py", "triton_row_math.py", "aot.py"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def write() -> int:
    """Compile everything and store it; the number of broken limits."""
    rows = []
    for arch in aot.ARCHS:
        for case, demand in cases(arch):
            rows.append(compile_row(arch, case, demand))
            print(_line(rows[-1]), flush=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"triton": triton.__version__, "sources": source_hash()})[1:-1]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n')
    return sum(len(broken_limits(row)) for row in rows)


def check() -> int:
    """Compile a part, chosen so that each kernel and each chip is met; the number of complaints about it."""
    stored = json.loads(REPORT.read_text())
    complaints = []
    if stored["sources"] != source_hash():
        complaints.append("the stored report is of other sources: run python benchmarks/static_report.py")
    by_name = {(row["arch"], row["case"]): row for row in stored["rows"]}
    for number, arch in enumerate(aot.ARCHS):
        everything = list(cases(arch))
        missing = {case.name for case, _ in everything} - {name for a, name in by_name if a == arch}
        complaints += [f"{arch} {name}: not in the stored report" for name in sorted(missing)]
        for case, demand in everything[number :: len(aot.ARCHS) + 1]:
            row = compile_row(arch, case, demand)
            complaints += [f"{arch} {case.name}: {words}" for words in broken_limits(row)]
            # Another compiler makes other code: then the limits alone hold.
            if stored["triton"] == triton.__version__ and row != by_name.get((arch, case.name)):
                complaints.append(f"{_line(row)}\n  is not what is stored: {by_name.get((arch, case.name))}")
    for complaint in complaints:
        print(complaint)
    return len(complaints)


def _line(row: dict[str, Any]) -> str:
    broken = "; ".join(broken_limits(row))
    loads = " ".join(f"{count}x{width}" for width, count in row["loads"].items())
    cores = " ".join(f"{count}x{name}" for name, count in row["tensor_core"].items())
    return (
        f"{row['arch']:7} {row['case']:46} regs {row['registers']:3} stack {row['stack_bytes']:3} "
        f"shared {row['shared_bytes']:6} loads {loads:22} {cores} {'BROKEN: ' + broken if broken else ''}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored report")
    return 1 if (check() if parser.parse_args().check else write()) else 0


if __name__ == "__main__":
    sys.exit(main())

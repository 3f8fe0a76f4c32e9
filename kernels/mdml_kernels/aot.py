"""Compile a kernel for a chip that is not there, and read what the compiler made of it: registers, spills, shared
memory, width of the global loads and stores, tensor-core instructions.

Needs neither GPU nor driver: `cuobjdump` and `nvdisasm` ship in the triton wheel. Not in a process where
TRITON_INTERPRET is set, which replaces the compiler by the interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mdml_kernels.launch import LaunchConfig, is_amd

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")

_TENSOR_CORE_SASS = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|DMMA)\b")
_TENSOR_CORE_GCN = re.compile(r"\b(v_mfma_\w+)")
_INSTRUCTION_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!\s|NOP)", re.MULTILINE)
_LOAD_SASS = re.compile(r"\bLDG(?:STS)?\.E((?:\.\w+)*)")
_LOAD_GCN = re.compile(r"\b(?:global|buffer|flat)_load_(ubyte|sbyte|ushort|sshort|short_d16|dword(?:x[234])?)")
_STORE_SASS = re.compile(r"\bSTG\.E((?:\.\w+)*)")
_STORE_GCN = re.compile(r"\b(?:global|buffer|flat)_store_(byte|short|dword(?:x[234])?)")
_GCN_BITS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "ubyte": 8, "sbyte": 8, "byte": 8}


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: what `triton.compile` must know.

    Args:
        name: the row of the report.
        kernel: a ``@triton.jit`` function.
        arguments: type of each run-time argument, in triton's words: ``*fp32`` (16-byte aligned), ``i32``, or
            ``i32:16`` for an integer known to be a multiple of 16. None for an absent pointer. Tensors are below 2 GiB,
            which a launch tells AMD's compiler.
        constants: the ``tl.constexpr`` arguments.
        config: warps and pipelining depth; its tile is already among the constants.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str | None]
    constants: Mapping[str, Any]
    config: LaunchConfig


def target_of(arch: str) -> GPUTarget:
    """The compile target of ``sm_90``, ``gfx942``, ...

    Raises:
        ValueError: neither an ``sm_`` nor a ``gfx`` name.
    """
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if arch.startswith("gfx9"):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"arch must be sm_<number> or gfx9<xx>, got {arch!r}")


def compile_report(case: Case, arch: str) -> dict[str, Any]:
    """Compile one case for one chip and report on the machine code.

    Returns:
        registers and stack_bytes a thread (a stack is where spills go), shared_bytes a program, global loads and
        stores by width in bits, dots and how many of them are on tensor cores, tensor-core instructions by name, the
        barriers that the kernel's text asks for, and on NVIDIA's chips the number of instructions.

    Raises:
        RuntimeError: in a process where TRITON_INTERPRET is set.
    """
    if not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError("offline compilation needs a process without TRITON_INTERPRET")
    compiled = triton.compile(
        source_of(case, arch),
        target=target_of(arch),
        options=case.config.options,
    )
    dots, dots_on_tensor_cores = _dots(compiled.asm["ttgir"])
    machine = _read_gcn(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _read_cubin(compiled.asm["cubin"])
    return {
        "num_warps": case.config.num_warps,
        **machine,
        "shared_bytes": compiled.metadata.shared,
        "dots": dots,
        "dots_on_tensor_cores": dots_on_tensor_cores,
        "barriers": len(re.findall(r"\b(?:ttg|gpu)\.barrier\b", compiled.asm["ttgir"])),
    }


def source_of(case: Case, arch: str) -> ASTSource:
    """The case as triton's compiler takes it, for a chip: what a launch there would be specialised to."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(case.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        kind = case.arguments[name]
        if kind is None:
            signature[name] = "constexpr"
            constants[name] = None
            continue
        signature[name] = kind.removesuffix(":16")
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[(position,)] = [["tt.divisibility", 16]]
        if kind.startswith("*") and is_amd(arch):
            attributes[(position,)].append(["tt.pointer_range", 32])
    return ASTSource(case.kernel, signature, constants, attributes)


def _dots(ttgir: str) -> tuple[int, int]:
    """All dots of a kernel, and those that the compiler gave a tensor-core layout."""
    encodings = dict(re.findall(r"^(#\w+) = #(?:ttg|ttng)\.(\w+)<", ttgir, flags=re.MULTILINE))
    plain = re.findall(r"= tt\.dot .*-> tensor<[^>]*?(#\w+)>", ttgir)
    asynchronous = re.findall(r"\b(?:ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b(?!_)", ttgir)
    on_cores = sum(encodings.get(name, "").endswith(("mma", "mfma")) for name in plain)
    return len(plain) + len(asynchronous), on_cores + len(asynchronous)


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"cuobjdump did not report registers: {usage}")
    return {
        "registers": int(numbers[1]),
        "stack_bytes": int(numbers[2]),
        "loads": _counted(_sass_bits(suffix) for suffix in _LOAD_SASS.findall(sass)),
        "stores": _counted(_sass_bits(suffix) for suffix in _STORE_SASS.findall(sass)),
        "tensor_core": _counted(_TENSOR_CORE_SASS.findall(sass)),
        "instructions": len(_INSTRUCTION_SASS.findall(sass)),
    }


def _sass_bits(suffix: str) -> str:
    """``.BYPASS.128`` -> 128; a load that names no width is one of 32 bits."""
    widths = re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", suffix)
    return widths[-1] if widths else "32"


def _read_gcn(text: str) -> dict[str, Any]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    if registers is None or scratch is None:
        raise RuntimeError("the assembly does not name its registers")
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(scratch[1]),
        "loads": _counted(str(_GCN_BITS.get(kind, 16)) for kind in _LOAD_GCN.findall(text)),
        "stores": _counted(str(_GCN_BITS.get(kind, 16)) for kind in _STORE_GCN.findall(text)),
        "tensor_core": _counted(_TENSOR_CORE_GCN.findall(text)),
    }


def _counted(words: Any) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

"""The offline compile report: its limits hold, it is of these sources, and a part of it compiles to the same again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support import ROOT, benchmark_script

pytest.importorskip("triton", reason="the triton backend is optional")

SCRIPT = ROOT / "benchmarks" / "static_report.py"
WITHOUT_INTERPRETER = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def static_report():
    return benchmark_script("static_report")


@pytest.fixture(scope="module")
def stored(static_report):
    return json.loads(static_report.REPORT.read_text())


def test_a_part_compiles_to_what_is_stored():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], env=WITHOUT_INTERPRETER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_limits_hold_on_every_chip(static_report, stored):
    assert {row["arch"] for row in stored["rows"]} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    broken = {(row["arch"], row["case"]): static_report.broken_limits(row) for row in stored["rows"]}
    assert {name: words for name, words in broken.items() if words} == {}


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("rows_forward K=512 fp32", {"stack_bytes": 8}, "bytes of stack"),
        ("rows_forward K=512 fp32", {"registers": 200}, "registers"),
        ("rows_forward K=512 fp32", {"instructions": 1100}, "1100 instructions, at most 1024"),
        ("rows_forward K=512 fp32", {"loads": {"32": 20}}, "no load of 128 bits"),
        ("rows_forward K=512 fp32", {"loads": {"64": 8, "128": 1}}, "narrower than 128"),
        ("episode_sums n=16384", {"loads": {"32": 16, "128": 1}}, "more than 0 loads narrower"),
        ("hinge_slope n=16384", {"loads": {"32": 7, "128": 4}}, "more than 3 loads narrower"),
        ("hinge_slope n=100", {"loads": {"32": 23}}, "no load of 128 bits"),
        ("hinge_slope n=100", {"stores": {"32": 16}}, "stores not of 128"),
        ("inner_loop n=64 64-128-64-16 tf32", {"stack_bytes": 40}, "bytes of stack"),
        ("inner_loop n=64 64-128-64-16 tf32", {"shared_bytes": 300_000}, "shared memory"),
        ("inner_loop n=64 64-128-64-16 tf32", {"dots_on_tensor_cores": 7}, "7 of 8 dots"),
        ("inner_loop n=64 64-128-64-16 tf32", {"barriers": 3}, "3 barriers"),
        ("linear_forward 16384x256x8192 tf32", {"tensor_core": {}}, "dots on tensor cores"),
    ],
)
def test_a_regression_breaks_a_limit(static_report, stored, case, change, words):
    row = next(row for row in stored["rows"] if (row["arch"], row["case"]) == ("sm_90", case))
    assert static_report.broken_limits(row) == []
    (complaint,) = static_report.broken_limits({**row, **change})
    assert words in complaint


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_a_launch_is_specialised_as_the_report_has_it(arch, static_report, monkeypatch):
    """What Triton would compile for a launch of the hinge kernels: types, constants, divisibility, warps."""
    from mdml_kernels import aot, triton_hinge, triton_rows
    from triton import knobs
    from triton.runtime import driver

    class Chip:
        get_current_target = staticmethod(lambda: aot.target_of(arch))
        get_current_device = staticmethod(lambda: arch)
        get_current_stream = staticmethod(lambda _: 0)

    def instead_of_compiling(fn, compile, **_):  # noqa: A002 - triton's name
        launched[fn.name.removesuffix("_kernel")] = compile
        return True

    monkeypatch.setattr(driver, "_active", Chip)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", instead_of_compiling)
    monkeypatch.setattr(triton_hinge, "arch_of", lambda _: arch)
    monkeypatch.setattr(triton_rows, "check_device", lambda *_: None)
    cases = {case.name: case for case, _ in static_report.cases(arch)}
    for n_rows in (16384, 100, 101):
        launched = {}
        odds, is_ood = torch.zeros(2, n_rows), torch.zeros(2, n_rows, dtype=torch.bool)
        loss, weights = triton_hinge.hinge(odds, is_ood, 0.5)
        triton_hinge.hinge_slope(odds, is_ood, weights, loss)
        assert launched.keys() == {"episode_sums", "hinge", "hinge_slope"}
        for name in ("episode_sums", "hinge_slope"):
            case = cases[f"{name} n={n_rows}"]
            source, compiled = aot.source_of(case, arch), launched[name]
            hints = {position: hint for position, hint in compiled["configs"][0].items() if hint}
            assert (source.signature, source.constants, source.attrs) == (
                compiled["signature"],
                compiled["constants"],
                hints,
            )
            assert case.config.options.items() <= compiled.items()


def test_a_process_of_the_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"],
        env={**WITHOUT_INTERPRETER, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "without TRITON_INTERPRET" in done.stderr

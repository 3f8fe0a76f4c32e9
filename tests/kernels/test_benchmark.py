"""The benchmark refuses a wrong kernel, and a plain pytest runs none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mdml_kernels import benchmark
from mdml_kernels.native.loss import NativeMarginLoss

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("form", ["hinge", "bce", "pairwise", "linear"])
def test_a_small_case(form, tmp_path):
    row = benchmark.run(benchmark.Case(form, (2, 40, 16), compiled=False), CPU, rounds=3)
    assert set(row.ratios) == {"eager"}
    assert row.seconds["ours"] > 0
    assert f"{row.ratios['eager']:.2f}" in benchmark.table([row])
    benchmark.write([row], CPU, tmp_path / "deep" / "result.json")
    written = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert written["rows"][0]["case"] == f"{form} [2, 40, 16]"
    assert written["environment"]["torch"] == torch.__version__


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = NativeMarginLoss.backward

    def wrong(*arguments):
        return [1.001 * grad for grad in right(*arguments)]

    monkeypatch.setattr(NativeMarginLoss, "backward", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        benchmark.run(benchmark.Case("hinge", (2, 40, 16), compiled=False), CPU, rounds=1)


def test_a_wrong_compiler_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: 1.001 * function(*inputs))
    with pytest.raises(AssertionError, match="relative error of compile"):
        benchmark.run(benchmark.Case("linear", (1, 40, 16)), CPU, rounds=1)


def test_every_case_has_every_contender(monkeypatch):
    measured = []
    monkeypatch.setattr(benchmark, "run", lambda case, device, rounds: measured.append(case))
    benchmark.run_all(CPU)
    assert [case for case in measured if not case.compiled] == []
    assert {case.form for case in measured} == {"hinge", "bce", "pairwise", "linear"}


@pytest.mark.parametrize(("seconds", "calls"), [(0.02, 4), (2.0, 1)])
def test_a_long_call_needs_no_warming(seconds, calls, monkeypatch):
    """The first call that begins when 0.05 seconds have gone by is timed."""
    now, called = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark.time, "process_time", lambda: now[0])

    def call():
        called.append(now[0])
        now[0] += seconds

    assert benchmark.timed(call, CPU) == pytest.approx(seconds)
    assert len(called) == calls


def test_command(capsys, tmp_path):
    threads = torch.get_num_threads()
    try:
        arguments = ["--case", "[64, 80, 16]", "--rounds", "1", "--no-compile", "--out", str(tmp_path / "out.json")]
        assert benchmark.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    assert "hinge [64, 80, 16]" in capsys.readouterr().out
    assert (tmp_path / "out.json").exists()


def collecting(*arguments):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)


def test_pytest_runs_benchmarks_when_asked_and_only_then():
    both = [collecting("--benchmark"), collecting("benchmarks", "tests/kernels/test_readme.py")]
    asked, plain = ([line for line in one.communicate()[0].splitlines() if "::" in line] for one in both)
    assert sum(line.startswith("benchmarks/test_kernels.py::") for line in asked) == len(benchmark.CASES)
    assert all(line.startswith("benchmarks/") for line in asked)
    assert plain
    assert all(line.startswith("tests/") for line in plain)

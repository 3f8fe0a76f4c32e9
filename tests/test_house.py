"""The rules that a person would forget."""

import subprocess
import sys
from pathlib import Path

import mdml_kernels
import pytest
from support import ROOT

import mdml_fast


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    path = Path(sys.executable).parent / command[0]
    return subprocess.run([path, *command[1:]], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"]],
    ids=" ".join,
)
def test_linters_pass(command: list[str]) -> None:
    result = tool(*command)
    assert result.returncode == 0, result.stdout + result.stderr


def test_folders_that_hold_packages_are_no_packages() -> None:
    for folder in ("kernels", "cli", "tests", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_public_names() -> None:
    assert mdml_kernels.__all__ == [
        "SoftmaxMarginLoss",
        "explain",
        "linear_softmax_confidence",
        "one_class_loss",
        "softmax_confidence",
        "softmax_log_odds",
        "softmax_margin_loss",
    ]
    for module in (mdml_kernels, mdml_fast):
        for name in module.__all__:
            assert getattr(module, name) is not None


@pytest.mark.parametrize("module", ["mdml_fast", "mdml_cli.app"])
def test_importing_the_package_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""`python -m mdml_kernels.benchmark`: the losses against eager PyTorch and `torch.compile`, forward and backward.

Every contender is first checked against float64. They then take turns, round after round, so that a slow moment
of the machine hits all alike, and their medians are compared: the result is a ratio, not a time. Before the call that
is timed each is called for a while (see `timed`). "eager" is what one would write by hand, a softmax, a maximum and the
means; "compile" is that compiled. On a GPU a copy is timed too.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdml_kernels.functional import linear_softmax_confidence, softmax_margin_loss
from mdml_kernels.native import loader
from mdml_kernels.parity import relative_error
from mdml_kernels.reference import Form

_MARGIN = 0.5
# How long a contender is called before it is timed, at least once; a call of so many seconds has warmed itself.
_WARM_SECONDS, _LONG_SECONDS = 0.05, 1.0
# What a contender's gradients may be off, relative to the largest.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A margin loss of logits [E, N, K], or (form ``linear``) the confidence of z [E, N, 256] under K classes."""

    form: str
    shape: tuple[int, int, int]
    compiled: bool = True
    rounds: int = 9

    @property
    def name(self) -> str:
        """For tables and test ids."""
        return f"{self.form} {list(self.shape)}"


CASES = (
    Case("hinge", (64, 80, 16), rounds=51),
    Case("hinge", (64, 80, 512), rounds=31),
    Case("hinge", (64, 1024, 512)),
    Case("hinge", (16, 4096, 64), rounds=21),
    Case("bce", (64, 1024, 512)),
    Case("pairwise", (64, 1024, 512), rounds=5),
    Case("pairwise", (8, 4096, 16), rounds=5),
    Case("linear", (1, 16384, 8192), rounds=3),
)


@dataclass
class Row:
    """The outcome of one case: median seconds and, where eager is slower, ratios above 1."""

    case: str
    seconds: dict[str, float]
    error: float
    ratios: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        ours = self.seconds["ours"]
        self.ratios = {name: value / ours for name, value in self.seconds.items() if name != "ours"}


def run(case: Case, device: torch.device, rounds: int | None = None) -> Row:
    """Check the case, then time the contenders in turn.

    Raises:
        AssertionError: ours is further from float64 than eager by more than 1e-6, or a contender by more than 1e-4.
    """
    inputs = _inputs(case, device)
    contenders: dict[str, Callable[..., Tensor]] = {"ours": _ours(case), "eager": _eager(case)}
    if case.compiled:
        contenders["compile"] = torch.compile(contenders["eager"], dynamic=False)
    error = _checked(case, inputs, contenders)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds or case.rounds):
        for name, contender in contenders.items():
            seconds[name].append(timed(functools.partial(_gradients, contender, inputs), device))
        if device.type == "cuda" and case.form != "linear":
            seconds.setdefault("copy", []).append(timed(lambda: inputs[0].detach().clone(), device))
    return Row(case.name, {name: statistics.median(values) for name, values in seconds.items()}, error)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """The seconds of a call that follows others like it, as a step of a training run does.

    After another contender the cores are slow from idling, or taken by threads of torch's that spin on in wait of more,
    and what the call reads has left the cache. On one CPU thread it is processor time, which other processes do not
    add to.
    """
    on_gpu = device.type == "cuda"
    clock = time.process_time if not on_gpu and torch.get_num_threads() == 1 else time.perf_counter

    def whole() -> None:
        call()
        if on_gpu:
            torch.cuda.synchronize()

    begun = time.perf_counter()
    while True:
        called = time.perf_counter() - begun
        start = clock()
        whole()
        seconds = clock() - start
        if called >= _WARM_SECONDS or seconds >= _LONG_SECONDS:
            return seconds


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=_here())
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "native": loader.native().reason,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


def table(rows: list[Row]) -> str:
    """The ratios, a line per case."""
    names = [name for name in ("eager", "compile", "copy") if any(name in row.ratios for row in rows)]
    lines = [f"{'case':28}{'ours':>10}" + "".join(f"{name:>10}" for name in names) + "   (times over ours)"]
    for row in rows:
        cells = "".join(f"{row.ratios[name]:10.2f}" if name in row.ratios else f"{'-':>10}" for name in names)
        lines.append(f"{row.case:28}{row.seconds['ours'] * 1e3:7.2f} ms{cells}")
    return "\n".join(lines)


def document(rows: list[Row], device: torch.device) -> dict[str, Any]:
    """The environment and the rows, for JSON."""
    return {"environment": environment(device), "rows": [asdict(row) for row in rows]}


def write(rows: list[Row], device: torch.device, path: Path) -> None:
    """The document as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(rows, device), indent=2) + "\n")


def ours(case: Case, device: torch.device) -> Callable[[], object]:
    """Ours on the case's inputs, forward and backward, for whoever times it alone."""
    return functools.partial(_gradients, _ours(case), _inputs(case, device))


def run_all(
    device: torch.device, parts: Sequence[str] = (), rounds: int | None = None, compiled: bool = True
) -> list[Row]:
    """The outcomes of the cases whose name holds one of the parts (all of them, where none is given)."""
    chosen = [case for case in CASES if not parts or any(part in case.name for part in parts)]
    return [run(replace(case, compiled=case.compiled and compiled), device, rounds) for case in chosen]


def main(arguments: list[str] | None = None) -> int:
    """Run the cases, print the table, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m mdml_kernels.benchmark", description="Ours against plain PyTorch.")
    parser.add_argument("--case", action="append", help="part of a case's name; may be given several times (all)")
    parser.add_argument("--rounds", type=int, help="rounds of every case (its own)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="write JSON there")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = run_all(device, chosen.case or (), chosen.rounds, not chosen.no_compile)
    print(table(rows))
    if chosen.out:
        write(rows, device, chosen.out)
    return 0 if rows else 2


def _inputs(case: Case, device: torch.device) -> list[Tensor]:
    """The leaves, then is_ood."""
    generator = torch.Generator().manual_seed(0)
    n_episodes, n_rows, n_classes = case.shape
    is_ood = torch.rand(n_episodes, n_rows, generator=generator) < 0.3
    if case.form == "linear":
        sizes: tuple[tuple[int, ...], ...] = ((n_episodes, n_rows, 256), (n_classes, 256), (n_classes,))
    else:
        sizes = (case.shape,)
    leaves = [torch.randn(size, generator=generator) for size in sizes]
    if case.form == "linear":
        leaves[1] /= 16
    return [*(leaf.to(device).requires_grad_() for leaf in leaves), is_ood.to(device)]


def _ours(case: Case, backend: Any = "auto") -> Callable[..., Tensor]:
    if case.form == "linear":
        return lambda z, w, c, is_ood: _gap(linear_softmax_confidence(z, w, c, backend=backend), is_ood)
    form: Form = case.form  # type: ignore[assignment]  # Case takes any form
    return lambda logits, is_ood: softmax_margin_loss(logits, is_ood, margin=_MARGIN, form=form, backend=backend)


def _eager(case: Case) -> Callable[..., Tensor]:
    """What one writes by hand."""

    def confidence(logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=-1).max(dim=-1).values

    def hinge(logits: Tensor, is_ood: Tensor) -> Tensor:
        return _gap(confidence(logits), is_ood)

    def bce(logits: Tensor, is_ood: Tensor) -> Tensor:
        s = confidence(logits)
        return (_masked_mean(-s.log(), ~is_ood) + _masked_mean(-torch.log1p(-s), is_ood)).mean()

    def pairwise(logits: Tensor, is_ood: Tensor) -> Tensor:
        s = confidence(logits)
        pairs = ~is_ood.unsqueeze(-1) & is_ood.unsqueeze(-2)
        losses = torch.relu(_MARGIN - (s.unsqueeze(-1) - s.unsqueeze(-2)))
        return _masked_mean(losses.flatten(-2), pairs.flatten(-2)).mean()

    def linear(z: Tensor, weight: Tensor, bias: Tensor, is_ood: Tensor) -> Tensor:
        return hinge(torch.nn.functional.linear(z, weight, bias), is_ood)

    forms: dict[str, Callable[..., Tensor]] = {"hinge": hinge, "bce": bce, "pairwise": pairwise, "linear": linear}
    return forms[case.form]


def _gap(s: Tensor, is_ood: Tensor) -> Tensor:
    return torch.relu(_MARGIN - (_masked_mean(s, ~is_ood) - _masked_mean(s, is_ood))).mean()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _gradients(contender: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(contender(*inputs), inputs[:-1])


def _checked(case: Case, inputs: list[Tensor], contenders: dict[str, Callable[..., Tensor]]) -> float:
    """The largest relative error of our gradients, which may exceed eager's by 1e-6: by the definition, of a part.

    Of the whole the definition would take too long: there ours in float64, held to the definition on the part, stands
    for it.
    """
    few = [*(leaf.detach() for leaf in inputs[:-1]), inputs[-1]]
    few[0], few[-1] = (
        (few[0][:, :64], few[-1][:, :64]) if case.form == "linear" else (few[0][:2, :512], few[-1][:2, :512])
    )
    leaves = [leaf.clone().requires_grad_() for leaf in few[:-1]]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = _gradients(_ours(case, "reference"), [*doubles, few[-1]])
    errors = {name: _error(contenders[name], [*leaves, few[-1]], exact) for name in ("ours", "eager")}
    assert errors["ours"] <= errors["eager"] + 1e-6, f"{case.name}: relative error {errors}"
    assert _error(_ours(case), [*doubles, few[-1]], exact) < 1e-9, f"{case.name}: ours in float64"
    exact = _gradients(_ours(case), [*(leaf.detach().double().requires_grad_() for leaf in inputs[:-1]), inputs[-1]])
    for name, contender in contenders.items():  # also warms everything up
        error = _error(contender, inputs, exact)
        assert error < _TOLERANCE, f"{case.name}: relative error of {name} {error}"
    return errors["ours"]


def _error(contender: Callable[..., Tensor], inputs: list[Tensor], exact: tuple[Tensor, ...]) -> float:
    """The largest relative error of the contender's gradients."""
    gradients = _gradients(contender, inputs)
    return max(relative_error(gradient, truth) for gradient, truth in zip(gradients, exact, strict=True))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _here() -> Path:
    return Path(__file__).parent


if __name__ == "__main__":
    sys.exit(main())

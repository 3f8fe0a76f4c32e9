"""The engine against its peers: episodes a second, ratios, and the share of the machine's large sgemm.

Every contender is first checked against float64. They then take turns, round after round, so that a slow moment of the
machine hits all alike, and their medians are compared: what counts is a ratio, not a time.

The share of sgemm counts the products that are needed layer by layer, no more: none to the rows, none to the head's
weights in the inner loop. Where our fused path makes the last layer and the head one, it takes fewer than these: see
`Case.taken`.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from mdml_kernels import SoftmaxMarginLoss
from mdml_kernels.benchmark import document, environment, timed, write
from torch import Tensor, nn

from mdml_fast.bench.peers import Gradients, Peer, Task, installed_peers
from mdml_fast.diagnosis import loop_meta_gradients
from mdml_fast.meta.encoders import ResidualEncoder
from mdml_fast.meta.engine import MetaEngine
from mdml_fast.meta.fused_folding import Sizes
from mdml_fast.meta.heads import PrototypeHead
from mdml_fast.meta.scheduler import MetaScheduler

__all__ = ["CASES", "Case", "Row", "document", "environment", "run", "run_all", "table", "write"]

_MARGIN, _INNER_LR = 0.9, 0.1
# The large product that the machine is measured by.
_SGEMM = 1024


@dataclass(frozen=True)
class Case:
    """E episodes of n support and q query rows, an MLP d-h-z and K logits; or the default detector's own training."""

    name: str
    n_episodes: int
    n_support: int
    n_query: int
    widths: tuple[int, int, int, int]
    inner_steps: int = 5
    rounds: int = 15
    compiled: bool = False

    @property
    def flops(self) -> float:
        """Of the products that an episode needs."""
        d, h, z, k = self.widths
        if self.name == "detector":  # d-h-d on support and query, and distances between them
            rows, distances = self.n_support + self.n_query, self.n_support * self.n_query * d
            return 2.0 * (rows * (2 * d * h + 3 * d * h) + 3 * distances)
        forward, backward = d * h + h * z + z * k, d * h + 2 * h * z + z * k
        inner, outer = self.n_support * (forward + backward), self.n_query * (forward + backward + z * k)
        return 2.0 * (self.inner_steps * inner + outer)

    @property
    def taken(self) -> float:
        """Of the products that our fused path takes on a CPU, where it may fold the last layer into the head."""
        _, h, z, k = self.widths
        sizes = Sizes(self.n_support, self.n_query, self.inner_steps, h, z, k, stacked=False)
        if self.name == "detector" or not sizes.fold:
            return self.flops
        return self.flops - 2.0 * (sizes.apart - sizes.folded)


CASES = (
    Case("small", 256, 32, 40, (32, 64, 32, 16)),
    Case("reference", 64, 64, 80, (64, 128, 64, 16), compiled=True),
    Case("large", 16, 64, 80, (128, 256, 128, 32)),
    Case("detector", 8, 512, 448, (120, 64, 120, 512), inner_steps=0),
)


@dataclass
class Row:
    """The outcome of a case: median seconds of each contender, episodes a second, shares, ratios to `ours`.

    The share is of the products that are counted, `share_taken` of those that are taken, for ours on the fused path.
    """

    case: str
    n_episodes: int
    flops: float
    taken: float
    seconds: dict[str, float]
    sgemm_flops: float
    chosen: str
    errors: dict[str, float]
    per_second: dict[str, float] = field(init=False)
    share: dict[str, float] = field(init=False)
    share_taken: dict[str, float] = field(init=False)
    ratios: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.per_second = {name: self.n_episodes / seconds for name, seconds in self.seconds.items()}
        self.share = {name: rate * self.flops / self.sgemm_flops for name, rate in self.per_second.items()}
        folded = (name for name in ("ours", "ours, bfloat16", "ours, one thread") if name in self.share)
        self.share_taken = {name: self.share[name] * self.taken / self.flops for name in folded}
        self.ratios = {name: seconds / self.seconds["ours"] for name, seconds in self.seconds.items()}


def run(case: Case, device: torch.device, rounds: int | None = None) -> Row:
    """Check the case's contenders, then time them in turn.

    Raises:
        AssertionError: a contender's meta-gradient is not that of a plain float64 loop.
    """
    episodes = _episodes(case, device)
    contenders, chosen = _contenders(case, device)
    errors = _checked(case, contenders, episodes)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    matrix, sgemm = torch.randn(_SGEMM, _SGEMM, device=device), []
    for _ in range(rounds or case.rounds):
        sgemm.append(timed(lambda: matrix @ matrix, device))
        for name, contender in contenders.items():
            seconds[name].append(timed(functools.partial(contender, *episodes), device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    taken = case.taken if device.type == "cpu" else case.flops
    rate = 2 * _SGEMM**3 / statistics.median(sgemm)
    return Row(case.name, case.n_episodes, case.flops, taken, medians, rate, chosen(), errors)


def ours(case: Case, device: torch.device) -> Callable[[], object]:
    """The meta-gradient of the case's episodes by our scheduler, for whoever times it alone."""
    return functools.partial(_of(MetaScheduler(_engine(case, device))), *_episodes(case, device))


def run_all(device: torch.device, parts: Sequence[str] = (), rounds: int | None = None) -> list[Row]:
    """The outcomes of the cases whose name holds one of the parts (all of them, where none is given)."""
    chosen = [case for case in CASES if not parts or any(part in case.name for part in parts)]
    return [run(case, device, rounds) for case in chosen]


def table(rows: list[Row]) -> str:
    """Episodes a second, times over ours, share of sgemm: a line for each contender."""
    lines = []
    for row in rows:
        lines.append(f"{row.case}: {row.n_episodes} episodes, sgemm {row.sgemm_flops / 1e9:.0f} GFLOP/s, {row.chosen}")
        lines.append(f"  {'':22}{'episodes/s':>11}{'times ours':>12}{'of sgemm':>10}")
        for name in row.seconds:
            share = f"{row.share[name]:10.2f}"
            lines.append(f"  {name:22}{row.per_second[name]:11.0f}{row.ratios[name]:12.2f}{share}")
        if row.taken < row.flops:
            taken = ", ".join(f"{name} {share:.2f}" for name, share in row.share_taken.items())
            lines.append(
                f"  Two layers are folded into one: {row.taken / row.flops:.0%} of the products counted are taken,"
            )
            lines.append(f"  at these shares of sgemm: {taken}")
    return "\n".join(lines)


def _episodes(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    support, query = (
        torch.randn(case.n_episodes, rows, case.widths[0], generator=generator)
        for rows in (case.n_support, case.n_query)
    )
    is_ood = torch.arange(case.n_query) >= case.n_query * 4 // 5
    return support.to(device), query.to(device), is_ood.expand(case.n_episodes, -1).to(device)


def _engine(case: Case, device: torch.device, **settings: object) -> MetaEngine:
    """The engine of a case, the same at every call."""
    d, h, z, k = case.widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if case.name == "detector":
            encoder: nn.Module = ResidualEncoder(d, h)
            head: nn.Module = PrototypeHead(d / 2)
            loss = SoftmaxMarginLoss(background=0.0, confidence="mass", form="bce", learn_background=True)
        else:
            encoder = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, z))
            head, loss = nn.Linear(z, k), SoftmaxMarginLoss(margin=_MARGIN)
    directions = case.n_episodes if case.name == "detector" else None
    return MetaEngine(
        *(encoder.to(device), head.to(device), case.inner_steps, _INNER_LR, loss.to(device)),
        n_directions=directions,
        **settings,  # type: ignore[arg-type]
    )


def _contenders(case: Case, device: torch.device) -> tuple[dict[str, Peer], Callable[[], str]]:
    """By name, ours first; and what the scheduler chose for ours."""
    engine = _engine(case, device)
    scheduler = MetaScheduler(engine)
    contenders: dict[str, Peer] = {
        "ours": _of(scheduler),
        "ours, bfloat16": _of(MetaScheduler(_engine(case, device, dtype=torch.bfloat16))),
        "ours, generic": _of(MetaScheduler(_engine(case, device, path="generic"))),
    }
    if case.compiled:
        contenders["ours, compiled"] = _of(MetaScheduler(_engine(case, device, path="generic", compile=True)))
    if scheduler.threads > 1:
        contenders["ours, one thread"] = _of(MetaScheduler(engine, threads=1))
    if case.name == "detector":
        contenders["plain loop"] = _loop_over_directions(engine)
        return contenders, lambda: scheduler.chosen
    task = Task(engine.modules["encoder"], engine.modules["head"], case.inner_steps, _INNER_LR, _MARGIN)
    contenders |= {name: make(task) for name, make in installed_peers().items()}
    return contenders, lambda: scheduler.chosen


def _of(scheduler: MetaScheduler) -> Peer:
    return lambda *episodes: scheduler.meta_gradients(*episodes).grads


def _loop_over_directions(engine: MetaEngine) -> Peer:
    """Plain autograd, one direction after the other."""
    directions = torch.arange(engine.n_directions or 1, device=engine.device)
    return lambda support, query, is_ood: loop_meta_gradients(engine, support, query, is_ood, directions)[1]


def _checked(case: Case, contenders: dict[str, Peer], episodes: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Each contender's relative error to float64 over all gradients; this also warms everything up."""
    exact = _engine(case, episodes[0].device)
    exact.modules.double()
    support, query, is_ood = episodes
    if case.name == "detector":
        expected = _loop_over_directions(exact)(support.double(), query.double(), is_ood)
    else:
        expected = loop_meta_gradients(exact, support.double(), query.double(), is_ood)[1]
    errors = {name: _error(contender(*episodes), expected) for name, contender in contenders.items()}
    for name, error in errors.items():
        assert error < (0.3 if "bfloat16" in name else 1e-4), f"{case.name}, {name}: relative error {error:.1e}"
    return errors


def _error(grads: Gradients, expected: Gradients) -> float:
    off = sum(float((grads[name].double() - value).square().sum()) for name, value in expected.items())
    size = sum(float(value.square().sum()) for value in expected.values())
    return math.sqrt(off / size)

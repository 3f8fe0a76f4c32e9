"""What this machine offers, and whether the engine computes right on it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from mdml_kernels import SoftmaxMarginLoss, explain
from mdml_kernels.native.loader import native
from torch import nn
from torch.func import functional_call

from mdml_fast.meta.engine import MetaEngine
from mdml_fast.meta.paths import Path, choose_path
from mdml_fast.meta.settings import ADAPTED

PACKAGES = ("mdml-fast", "torch", "triton", "numpy", "scikit-learn", "pyarrow", "safetensors")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def diagnose() -> dict[str, Any]:
    """Versions, devices, backends of the loss, the engine's path, and its gradients against a plain loop."""
    environment = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    environment["cpu threads"] = str(torch.get_num_threads())
    environment["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none found by torch"
    environment["native kernels"] = native().reason
    environment |= _paths()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    orders: list[tuple[bool, Path]] = [(True, "fused"), (True, "generic"), (False, "generic")]
    backends = {
        f"{device}, {str(dtype).removeprefix('torch.')}": explain(torch.empty(1, 1, 2, dtype=dtype, device=device))
        for device in devices
        for dtype in (torch.float32, torch.bfloat16)
    }
    checks = [
        _check(torch.device(device), dtype, first_order, path)
        for device in devices
        for dtype in TOLERANCE
        for first_order, path in orders
    ]
    ok = all(check["ok"] for check in checks)
    return {"environment": environment, "backends": backends, "checks": checks, "ok": ok}


def loop_meta_gradients(
    engine: MetaEngine,
    support: torch.Tensor,
    query: torch.Tensor,
    is_ood: torch.Tensor,
    direction: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What `MetaEngine.meta_gradients` must give, by a loop over episodes and plain autograd: losses [E], gradients.

    For checks only, it is slow. With directions, each episode must name its own.
    """
    settings, params = engine.settings, engine.parameters()
    episode_loss = _EpisodeLoss(engine.modules, settings.reconstruction_weight)
    adapted = [name for name in params if name.startswith(ADAPTED)]
    totals = {name: torch.zeros_like(value) for name, value in params.items()}
    losses = []
    for episode, (rows, queries, mask) in enumerate(zip(support, query, is_ood, strict=True)):
        place: Any = ... if direction is None else direction[episode]
        start = {name: value[place].detach().requires_grad_() for name, value in params.items()}
        values = start | {name: value[place] for name, value in engine.buffers().items()}
        for _ in range(settings.inner_steps):
            own = {name: values[name] for name in adapted}
            inner = functional_call(episode_loss, values, (rows, rows, None))
            steps = torch.autograd.grad(
                inner, list(own.values()), create_graph=not settings.first_order, materialize_grads=True
            )
            for (name, value), step in zip(own.items(), steps, strict=True):
                moved = value - settings.inner_lr * step
                values[name] = moved.detach().requires_grad_() if settings.first_order else moved
        outer = functional_call(episode_loss, values, (rows, queries, mask))
        at = [(values if settings.first_order else start)[name] for name in params]
        n_sharing = len(support) if direction is None else int(direction.eq(place).sum())
        for name, gradient in zip(params, torch.autograd.grad(outer, at, materialize_grads=True), strict=True):
            totals[name][place] += gradient / n_sharing
        losses.append(outer.detach())
    return torch.stack(losses), totals


class _EpisodeLoss(nn.Module):
    """The outer loss of one episode's rows, or without labels the inner one, under the engine's names of parameters."""

    def __init__(self, modules: nn.ModuleDict, reconstruction_weight: float) -> None:
        super().__init__()
        self.encoder, self.head = modules["encoder"], modules["head"]
        self.decoder: Any = dict(modules.items()).get("decoder")
        self.loss: Any = modules["loss"]
        self.reconstruction_weight = reconstruction_weight

    def forward(self, support: torch.Tensor, rows: torch.Tensor, is_ood: torch.Tensor | None) -> torch.Tensor:
        takes_support = getattr(self.head, "takes_support", False)
        z = self.encoder(rows)
        logits = self.head(z, self.encoder(support)) if takes_support else self.head(z)
        value: torch.Tensor = self.loss.one_class(logits) if is_ood is None else self.loss(logits, is_ood)
        if self.decoder is None:
            return value
        normal = slice(None) if is_ood is None else ~is_ood
        errors: torch.Tensor = (self.decoder(z) - rows)[normal].square().mean()
        return value + self.reconstruction_weight * errors


def _check(device: torch.device, dtype: torch.dtype, first_order: bool, path: Path) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)
        head = nn.Linear(8, 4).to(dtype)
        support, query = torch.randn(4, 16, 8, dtype=dtype), torch.randn(4, 20, 8, dtype=dtype)
    is_ood = (torch.arange(20) >= 16).expand(4, 20)
    loss = SoftmaxMarginLoss(learn_temperature=True)
    modules = nn.ModuleDict({"encoder": encoder, "head": head, "loss": loss}).to(device=device, dtype=dtype)
    engine = MetaEngine(modules["encoder"], modules["head"], loss=loss, first_order=first_order, path=path)
    episodes = [tensor.to(device) for tensor in (support, query, is_ood)]
    out = engine.meta_gradients(*episodes)
    _, expected = loop_meta_gradients(engine, *episodes)
    error = max(float((out.grads[name] - value).norm() / value.norm()) for name, value in expected.items())
    order = "first" if first_order else "second"
    what = f"meta-gradient against a loop, {order} order, {path} path, {str(dtype).removeprefix('torch.')}, {device}"
    return {"what": what, "error": error, "ok": error <= TOLERANCE[dtype]}


def _paths() -> dict[str, str]:
    """What computes a usual network (an MLP, a linear head), for each dtype."""
    modules = MetaEngine(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Linear(8, 4)).modules
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        f"{str(dtype).removeprefix('torch.')} engine": choose_path(modules, device, dtype, first_order=True).path
        for dtype in (torch.float32, torch.bfloat16)
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

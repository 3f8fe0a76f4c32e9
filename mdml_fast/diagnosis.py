"""What this machine offers, and whether the engine computes right on it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from mdml_kernels import SoftmaxMarginLoss, explain
from torch import nn
from torch.func import functional_call

from mdml_fast.meta.engine import MetaEngine

PACKAGES = ("mdml-fast", "torch", "triton", "numpy", "scikit-learn", "pyarrow", "safetensors")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def diagnose() -> dict[str, Any]:
    """Versions, devices, the loss's backends, and the meta-gradient held against a plain loop over episodes."""
    environment = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    environment["cpu threads"] = str(torch.get_num_threads())
    environment["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none found by torch"
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    backends = {
        f"{device}, {str(dtype).removeprefix('torch.')}": explain(torch.empty(1, 1, 2, dtype=dtype, device=device))
        for device in devices
        for dtype in (torch.float32, torch.bfloat16)
    }
    checks = [
        _check(torch.device(device), dtype, first_order)
        for device in devices
        for dtype in TOLERANCE
        for first_order in (True, False)
    ]
    ok = all(check["ok"] for check in checks)
    return {"environment": environment, "backends": backends, "checks": checks, "ok": ok}


def loop_meta_gradients(
    engine: MetaEngine, support: torch.Tensor, query: torch.Tensor, is_ood: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What `MetaEngine.meta_gradients` must give, by a loop over episodes and plain autograd: losses [E], gradients.

    Without decoder; for checks only, it is slow.
    """
    encoder, head, loss = (engine.modules[name] for name in ("encoder", "head", "loss"))
    assert isinstance(loss, SoftmaxMarginLoss)
    shared = engine.parameters()
    totals = {name: torch.zeros_like(value) for name, value in shared.items()}
    losses = []
    for rows, queries, mask in zip(support, query, is_ood, strict=True):
        own: dict[str, torch.Tensor] = dict(encoder.named_parameters())
        for _ in range(engine.inner_steps):
            inner = loss.one_class(head(functional_call(encoder, own, (rows,))))
            steps = torch.autograd.grad(inner, list(own.values()), create_graph=not engine.first_order)
            own = {name: value - engine.inner_lr * g for (name, value), g in zip(own.items(), steps, strict=True)}
            if engine.first_order:
                own = {name: value.detach().requires_grad_() for name, value in own.items()}
        outer = loss(head(functional_call(encoder, own, (queries,))), mask)
        at = [own[name.removeprefix("encoder.")] if name.startswith("encoder.") else shared[name] for name in shared]
        grads = torch.autograd.grad(outer, at if engine.first_order else list(shared.values()))
        for name, gradient in zip(shared, grads, strict=True):
            totals[name] += gradient / len(support)
        losses.append(outer.detach())
    return torch.stack(losses), totals


def _check(device: torch.device, dtype: torch.dtype, first_order: bool) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)
        head = nn.Linear(8, 4).to(dtype)
        support, query = torch.randn(4, 16, 8, dtype=dtype), torch.randn(4, 20, 8, dtype=dtype)
    is_ood = (torch.arange(20) >= 16).expand(4, 20)
    engine = MetaEngine(encoder, head, loss=SoftmaxMarginLoss(learn_temperature=True), first_order=first_order)
    engine.modules.to(device=device, dtype=dtype)
    episodes = [tensor.to(device) for tensor in (support, query, is_ood)]
    out = engine.meta_gradients(*episodes)
    _, expected = loop_meta_gradients(engine, *episodes)
    error = max(float((out.grads[name] - value).norm() / value.norm()) for name, value in expected.items())
    order = "first" if first_order else "second"
    what = f"meta-gradient against a loop, {order} order, {str(dtype).removeprefix('torch.')}, {device}"
    return {"what": what, "error": error, "ok": error <= TOLERANCE[dtype]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

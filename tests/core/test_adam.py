"""Our Adam against PyTorch's."""

import subprocess
import sys

import torch

from mdml_fast.meta.adam import Adam


def test_it_takes_the_steps_of_torch_optim() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in SHAPES.items()}
    rates, decay = {"a": 1e-2, "b": 3e-3}, {"b": 0.1}
    own = {name: value.clone() for name, value in start.items()}
    theirs = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = Adam(own, rates, decay)
    peer = torch.optim.Adam(
        [{"params": [theirs[name]], "lr": rates[name], "weight_decay": decay.get(name, 0.0)} for name in theirs]
    )
    for _ in range(30):
        grads = {
            name: torch.randn(value.shape, dtype=torch.float64, generator=generator) for name, value in own.items()
        }
        optimizer.step(grads)
        for name, param in theirs.items():
            param.grad = grads[name]
        peer.step()
    for name in own:
        torch.testing.assert_close(own[name], theirs[name].detach(), rtol=1e-12, atol=1e-14)
        assert not torch.equal(own[name], start[name])


SHAPES = {"a": (3, 4), "b": (5,)}


def test_training_does_not_import_torchs_compiler() -> None:
    """It takes a second, and nothing here is compiled by it."""
    code = """
import sys, numpy as np
from mdml_fast import MDMLDetector
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.ensemble import EnsembleConfig
rows = np.random.default_rng(0).normal(size=(120, 3))
rows[100:] += 5
config = DefaultConfig(ensemble=EnsembleConfig(steps=2))
MDMLDetector(config).fit(rows, [0] * 100 + [1] * 20, normal=[0]).predict(rows)
print("torch._dynamo" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]

"""What the CPU backend allocates: one buffer the size of the logits, which becomes their gradient."""

import subprocess
import sys

import pytest
import torch
from mdml_kernels import softmax_margin_loss
from torch.utils._python_dispatch import TorchDispatchMode

PEAK = r"""
import re, sys
from pathlib import Path
import torch
from mdml_kernels import linear_softmax_confidence, softmax_margin_loss

def peak():  # of this process: ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
"""
LOSS = r"""

def call(shape):
    logits = torch.ones(shape, requires_grad=True)
    is_ood = torch.arange(shape[1]).expand(shape[:2]) % 4 == 0
    before = peak()
    softmax_margin_loss(logits, is_ood, form=sys.argv[1]).backward()
    return (peak() - before) / logits.nbytes

call((2, 400, 512))
print(call((64, 1024, 512)))
"""


def printed(program, argument):
    command = [sys.executable, "-c", PEAK + program, argument]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
def test_peak(form):
    assert 0.9 < float(printed(LOSS, form)) < 1.15


HEAD = r"""

def call(n, k):
    z, weight = torch.ones(n, 64, requires_grad=True), torch.ones(k, 64, requires_grad=True)
    before = peak()
    if sys.argv[1] == "eager":
        torch.softmax(z @ weight.T, -1).amax(-1).sum().backward()
    else:
        linear_softmax_confidence(z, weight).sum().backward()
    return peak() - before

call(256, 256)
print(call(8192, 4096))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_head_takes_an_eighth_of_what_eager_takes():
    eager, ours = (int(printed(HEAD, who)) for who in ("eager", "ours"))
    assert eager > 2 * 8192 * 4096 * 4  # the logits, and more
    assert 8 * ours < eager


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("n_classes", [40, 100])  # rows that the compiled kernels turn, and longer ones
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor(0.7)])
def test_a_second_backward_finds_the_buffer_gone_and_gives_the_same(temperature, n_classes):
    logits = torch.randn(3, 6, n_classes, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = softmax_margin_loss(logits, torch.arange(6).expand(3, 6) > 3, margin=0.9, temperature=temperature)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits)
    assert kept.abs().max() > 0
    torch.testing.assert_close(second, kept)
    assert torch.equal(first, kept)  # the second wrote nowhere but to a buffer of its own


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("background", [None, 3.0, "learned"])
def test_whatever_the_losses_are_multiplied_by(reduction, background):
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(3, 21, 100, generator=generator), torch.tensor([1.0, -2.0, 0.0])
    logits[1, 3] = 50 * torch.eye(100)[7]  # of the others nothing is left beside it
    is_ood = torch.arange(21).expand(3, 21) > 15

    def gradients(dtype, backend):
        leaves = [logits.to(dtype).requires_grad_()]
        if background == "learned":
            leaves.append(torch.tensor(3.0, dtype=dtype, requires_grad=True))
        given = leaves[-1] if background == "learned" else background
        loss = softmax_margin_loss(leaves[0], is_ood, background=given, reduction=reduction, backend=backend)
        return torch.autograd.grad((loss * weights.to(dtype)).sum(), leaves)

    for ours, exact in zip(gradients(torch.float32, "cpu"), gradients(torch.float64, "reference"), strict=True):
        assert exact.abs().max() > 0
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-7)


class Made(TorchDispatchMode):
    """Names of the operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
def test_no_gradients_are_made_of_what_has_none(form):
    logits = torch.randn(2, 300, 40).requires_grad_()
    loss = softmax_margin_loss(logits, torch.arange(600).view(2, 300) % 3 == 0, form=form)
    with Made() as made:
        loss.backward()
    assert made.names
    assert "zeros" not in made.names

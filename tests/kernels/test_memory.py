"""What the CPU backend allocates: one buffer the size of the logits, which becomes their gradient."""

import subprocess
import sys

import pytest
import torch
from mdml_kernels import softmax_margin_loss

PEAK = r"""
import re, sys
from pathlib import Path
import torch
from mdml_kernels import softmax_margin_loss

def peak():  # of this process: ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def call(shape):
    logits = torch.ones(shape, requires_grad=True)
    is_ood = torch.arange(shape[1]).expand(shape[:2]) % 4 == 0
    before = peak()
    softmax_margin_loss(logits, is_ood, form=sys.argv[1]).backward()
    return (peak() - before) / logits.nbytes

call((2, 400, 512))
print(call((64, 1024, 512)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
def test_peak(form):
    run = subprocess.run([sys.executable, "-c", PEAK, form], capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.15


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor(0.7)])
def test_a_second_backward_finds_the_buffer_gone_and_gives_the_same(temperature):
    logits = torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = softmax_margin_loss(logits, torch.arange(6).expand(3, 6) > 3, margin=0.9, temperature=temperature)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits)
    assert kept.abs().max() > 0
    torch.testing.assert_close(second, kept)
    assert torch.equal(first, kept)  # the second wrote nowhere but to a buffer of its own

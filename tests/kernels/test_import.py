"""The drop-in is light: next to nothing beside torch, nothing but torch, and no Triton until a kernel runs."""

import json
import subprocess
import sys

PROBE = """
import sys, time
{hide}
start = time.perf_counter()
import torch
middle = time.perf_counter()
import mdml_kernels
end = time.perf_counter()
{use}
import json
print(json.dumps([middle - start, end - middle, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""
HIDE = "sys.modules['triton'] = None  # what an import then finds is that there is none"
USE = """
x = torch.randn(2, 3, 4, requires_grad=True)
loss = mdml_kernels.softmax_margin_loss(x, torch.rand(2, 3) < 0.5, form="bce")
torch.autograd.grad(loss, x, create_graph=True)[0].sum().backward()
"""


def probe(hide="", use=""):
    code = PROBE.format(hide=hide, use=use)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_cost():
    shares = [ours / torch_alone for torch_alone, ours, _ in (probe() for _ in range(2))]
    assert min(shares) < 0.05, f"import mdml_kernels took {shares} of import torch"


def test_it_works_without_triton():
    probe(hide=HIDE, use=USE)


def test_it_imports_neither_triton_nor_the_compiler():
    _, _, modules = probe()
    assert "mdml_kernels" in modules
    alone = json.loads(
        subprocess.run(
            [sys.executable, "-c", "import sys, torch, json; print(json.dumps(sorted(sys.modules)))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    outside = {name.partition(".")[0] for name in alone}
    added = set(modules) - outside - {"mdml_kernels", "json"}
    assert added <= set(sys.stdlib_module_names), f"imported beside torch: {added}"

"""What can be shown of the way on a GPU without one: the inner loop in Triton's interpreter, the replay's copies."""

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

from mdml_fast.meta import on_gpu
from mdml_fast.meta.fused_layers import Layer, Network

INTERPRETED = """
    import torch
    from mdml_kernels import SoftmaxMarginLoss, triton_mlp
    from torch import nn
    from mdml_fast import MetaEngine
    from mdml_fast.meta import on_gpu

    ran, adapt_mlp = [], triton_mlp.adapt_mlp
    triton_mlp.adapt_mlp = lambda *args, **options: ran.append(options["precision"]) or adapt_mlp(*args, **options)
    on_gpu.takes_triton = lambda *_: True
    for n_directions in (None, 3):
        for dtype, tolerance in ((None, 1e-4), (torch.bfloat16, 0.1)):
            outcomes = []
            for path in ("fused", "generic"):
                torch.manual_seed(0)
                encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
                loss = SoftmaxMarginLoss(margin=0.9, background=-0.5, learn_temperature=True)
                engine = MetaEngine(
                    encoder, nn.Linear(8, 4), 2, 0.2, loss, path=path, n_directions=n_directions, dtype=dtype
                )
                rows, query = torch.randn(3, 16, 8), torch.randn(3, 20, 8)
                out = engine.meta_gradients(rows, query, (torch.arange(20) >= 14).expand(3, -1))
                outcomes.append(out.grads)
            for name, value in outcomes[1].items():
                error = (outcomes[0][name] - value).norm() / value.norm()
                assert error < tolerance, (n_directions, dtype, name, float(error))
    assert ran == ["float32", "bfloat16"] * 2, ran
    print("ran")
"""


def test_the_inner_loop_by_triton_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is there on Linux alone")
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", textwrap.dedent(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "ran\n", done.stderr[-3000:]


def test_what_triton_takes() -> None:
    head, gpu = Layer("head.weight", None), torch.device("cuda")
    one, last = Layer("a", "b", "relu"), Layer("c", "d")
    assert on_gpu.takes_triton(Network((one, last)), head, gpu, torch.float32)
    assert not on_gpu.takes_triton(Network((one, last)), head, torch.device("cpu"), torch.float32)
    assert not on_gpu.takes_triton(Network((one, last)), head, gpu, torch.float64)
    assert not on_gpu.takes_triton(Network((one, last)), "prototypes", gpu, torch.float32)
    for network in (
        Network((one._replace(activation="gelu"), last)),
        Network((one, last._replace(activation="relu"))),
        Network((one, last._replace(bias=None))),
        Network((one, last), "log_scale"),
    ):
        assert not on_gpu.takes_triton(network, head, gpu, torch.float32)


class FakeGraph:
    """Replays as a CUDA graph does: from the captured inputs into the captured outputs, on the GPU it is of."""

    current: ClassVar[list[torch.Tensor]] = []

    def replay(self) -> None:
        assert self.current
        self.outputs[0].copy_(2 * self.inputs[0])


def test_a_replay_copies_what_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self) -> None:
            assert FakeGraph.current

        def wait_stream(self, other: object) -> None:
            pass

    @contextlib.contextmanager
    def on_device_of(tensor: torch.Tensor) -> Iterator[None]:
        FakeGraph.current.append(tensor)
        yield
        FakeGraph.current.pop()

    def graph(_: FakeGraph, stream: Stream, capture_error_mode: str) -> contextlib.AbstractContextManager[None]:
        assert FakeGraph.current
        return contextlib.nullcontext()

    monkeypatch.setattr(on_gpu, "on_device_of", on_device_of)
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replayed = on_gpu.Replayed(lambda x: (2 * x,), torch.zeros(3))
    replayed._graph.inputs, replayed._graph.outputs = replayed._inputs, replayed._outputs
    [first] = replayed(torch.ones(3))
    [second] = replayed(torch.full((3,), 5.0))
    assert first.tolist() == [2, 2, 2]
    assert second.tolist() == [10, 10, 10]

"""No backend is worse than plain PyTorch, and the command that says so notices when one is."""

import pytest
import torch
from mdml_kernels import chunks, cpu, parity


@pytest.mark.usefixtures("cpu_way")
def test_every_problem_kind_in_float32():
    found = parity.compare(parity.problems(120, seed=1), ("cpu",))
    assert len(found) == 10, "five forms, two confidences"
    assert [worst for worst in found if worst.missed] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("cpu_way")
def test_other_dtypes(dtype):
    found = parity.compare(parity.problems(12, seed=2, dtype=dtype, largest=40), ("cpu",))
    assert {worst.dtype for worst in found} == {dtype}
    assert [worst for worst in found if worst.missed] == []


@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
@pytest.mark.parametrize("confidence", ["max", "mass"])
@pytest.mark.usefixtures("operators")
def test_saturated_rows(form, confidence):
    """Where S is close to 1 the derivative by plain PyTorch is mostly rounding: ours is not."""
    problem = parity.Problem(form, confidence, "number", "number", (3, 20, 40), torch.float32, seed=5)
    made = problem.tensors()
    made["logits"] = 4 * made["logits"] + 4
    gradients = {}
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        logits = made["logits"].to(dtype).requires_grad_()
        loss = problem.call({"logits": logits, "is_ood": made["is_ood"]}, backend)
        (gradients[dtype],) = torch.autograd.grad(loss.sum(), logits)
    assert gradients[torch.float64].abs().max() > 0
    assert parity.relative_error(gradients[torch.float32], gradients[torch.float64]) < 2e-5


def test_command(capsys):
    assert parity.main(["--problems", "60"]) == 0
    assert "0 of 10 missed" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["forward", "backward", "second"])
def test_command_notices(broken, monkeypatch, capsys):
    """An error of one part in a thousand, in one of the three leaves."""

    def spoilt(function, which):
        def wrapper(*arguments, **options):
            results = list(function(*arguments, **options))
            results[which] = results[which] * 1.001
            return tuple(results)

        return wrapper

    module, name, which = {
        "forward": (chunks, "finish_odds", 0),
        "backward": (cpu, "backward", 0),
        "second": (chunks, "second_order", 0),
    }[broken]
    monkeypatch.setattr(module, name, spoilt(getattr(module, name), which))
    assert parity.main(["--problems", "40"]) == 1
    assert "MISS" in capsys.readouterr().out


def test_nothing_compared_is_a_miss(capsys):
    assert parity.main(["--problems", "0"]) == 1
    assert "0 of 0 missed" in capsys.readouterr().out

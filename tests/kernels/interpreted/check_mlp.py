"""The inner loop's kernels in Triton's interpreter against float64 autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from mdml_kernels import reference, triton_layers, triton_mlp


def stack(seed, *shapes, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) * scale for shape in shapes]


def relative_error(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def expand(tensor, direction, episodes, dtype):
    tensor = tensor.to(dtype)
    return tensor[direction] if direction is not None else tensor.expand(episodes, *tensor.shape[1:])


def adapted_by_autograd(case, steps, lr, confidence, dtype):
    """What `adapt_mlp` must give, and the initial weights of each episode."""
    episodes, direction = len(case["support"]), case["direction"]
    start = [expand(p, direction, episodes, dtype) for p in (*case["weights"], *case["biases"])]
    head = expand(case["head_weight"], direction, episodes, dtype)
    head_bias = expand(case["head_bias"], direction, episodes, dtype)
    parameters = [p.clone() for p in start]
    depth = len(case["weights"])
    for _ in range(steps):
        parameters = [p.requires_grad_() for p in parameters]
        x = case["support"].to(dtype)
        for layer in range(depth):
            x = x @ parameters[layer].mT + parameters[depth + layer].unsqueeze(1)
            x = F.relu(x) if layer < depth - 1 else x
        logits = x @ head.mT + head_bias.unsqueeze(1)
        background = case["background"]
        log_s, _ = reference.log_confidence(
            logits,
            1 / case["inv_temperature"].to(dtype),
            None if background is None else background.to(dtype),
            confidence,
        )
        grads = torch.autograd.grad(-log_s.mean(1).sum(), parameters)
        parameters = [(p - lr * g).detach() for p, g in zip(parameters, grads, strict=True)]
    return start, parameters


def make(episodes, n, sizes, n_classes, directions=None, with_background=False):
    d = 1 if directions is None else directions
    shapes = [(d, o, i) for i, o in itertools.pairwise(sizes)]
    (support,) = stack(1, (episodes, n, sizes[0]), scale=1.0)
    generator = torch.Generator().manual_seed(2)
    return {
        "support": support,
        "weights": stack(3, *shapes),
        "biases": stack(4, *(shape[:2] for shape in shapes)),
        "head_weight": stack(5, (d, n_classes, sizes[-1]))[0],
        "head_bias": stack(6, (d, n_classes))[0],
        "direction": None if directions is None else torch.randint(d, (episodes,), generator=generator),
        "inv_temperature": torch.rand(episodes, generator=generator) + 0.5,
        "background": torch.randn(episodes, generator=generator) if with_background else None,
    }


def assert_adapted(case, steps, lr, tolerance, fenced=lambda tensor: tensor, confidence="max", **options):
    start, expected = adapted_by_autograd(case, steps, lr, confidence, torch.float64)
    _, eager = adapted_by_autograd(case, steps, lr, confidence, torch.float32)
    inputs = {
        name: [fenced(t) for t in value] if isinstance(value, list) else value if value is None else fenced(value)
        for name, value in case.items()
    }
    support, weights, biases = inputs.pop("support"), inputs.pop("weights"), inputs.pop("biases")
    out = triton_mlp.adapt_mlp(
        support, weights, biases, inputs.pop("head_weight"), inputs.pop("head_bias"),
        steps=steps, lr=lr, confidence=confidence, **inputs, **options,
    )  # fmt: skip
    for value, truth, plain, before in zip((*out[0], *out[1]), expected, eager, start, strict=True):
        # Against the size of the update, which is what the kernel computes.
        error, of_eager = (relative_error(v.double() - before, truth - before) for v in (value, plain))
        assert error <= of_eager + tolerance


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
@pytest.mark.parametrize("directions", [None, 3])
@pytest.mark.parametrize(("confidence", "with_background"), [("max", False), ("max", True), ("mass", True)])
def test_inner_loop(whole, directions, confidence, with_background, fenced):
    case = make(2, 21, [9, 37, 12], 5, directions, with_background)
    assert_adapted(case, 3, 0.5, 1e-5, fenced, confidence, whole=whole)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
def test_inner_loop_of_the_reference_shape(whole):
    assert_adapted(make(2, 64, [64, 128, 64], 16), 5, 0.1, 1e-5, whole=whole)


def test_bfloat16_operands_keep_float32_weights():
    """A few hundredths of the update are what eight bits of operands cost; the weights themselves are not rounded."""
    case = make(2, 32, [16, 32, 16], 8)
    assert_adapted(case, 1, 0.01, 5e-2, precision="bfloat16", whole=True)
    assert_adapted(case, 1, 0.01, 5e-2, precision="bfloat16", whole=False)


@pytest.mark.parametrize("sizes", [[5, 7], [5, 17, 11, 7]])
def test_other_depths_go_by_layers(sizes):
    assert_adapted(make(2, 19, sizes, 4), 2, 0.5, 1e-5)


def test_rows_beyond_one_tile_go_by_layers():
    assert_adapted(make(1, 140, [70, 90, 66], 4), 2, 0.5, 1e-5)


def test_nan_in_an_episode_stays_there():
    case = make(3, 16, [8, 16, 8], 4)
    case["support"][1, 3, 2] = torch.nan
    arguments = case["support"], case["weights"], case["biases"], case["head_weight"]
    for whole in (True, False):
        weights, _ = triton_mlp.adapt_mlp(*arguments, steps=2, lr=0.1, whole=whole)
        assert weights[1][1].isnan().all()
        assert not weights[1][[0, 2]].isnan().any()


def test_whole_inner_loop_reads_once_and_writes_once_a_step(traffic):
    """Support and initial weights from memory once, into the episode's own; what a step writes the next finds in L2."""
    case = make(1, 64, [64, 128, 64], 16)
    arguments = case["support"], case["weights"], case["biases"], case["head_weight"]
    weights, biases = triton_mlp.adapt_mlp(*arguments, steps=3, lr=0.1, whole=True)
    for adapted in (*weights, *biases):
        assert traffic.stored(adapted) == (1 + 3) * adapted.nbytes
    assert traffic.loaded(case["support"]) == case["support"].nbytes
    for weight in case["weights"]:
        assert traffic.loaded(weight) == weight.nbytes


@pytest.mark.parametrize("relu", [False, True])
def test_layers(relu, fenced):
    """Each layer kernel against autograd, and the update against the gradient that it does not write."""
    x, grad = stack(1, (3, 70, 45), (3, 70, 67), scale=1.0)
    weight, bias = stack(2, (3, 67, 45), (3, 67))
    x = F.relu(x)
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    out = wide[0] @ wide[1].mT + wide[2].unsqueeze(1)
    out = F.relu(out) if relu else out
    assert relative_error(triton_layers.layer_forward(*map(fenced, (x, weight, bias)), relu=relu), out.detach()) < 1e-6
    masked = torch.where(out == 0, 0.0, grad.double()).float() if relu else grad
    expected = torch.autograd.grad(out, wide, grad.double())
    got = triton_layers.layer_backward(fenced(masked), fenced(weight), fenced(x))
    assert relative_error(got, torch.where(x <= 0, 0.0, expected[0])) < 1e-6
    got_weight, got_bias = triton_layers.layer_gradient(fenced(masked), fenced(x))
    assert relative_error(got_weight, expected[1]) < 1e-6
    assert relative_error(got_bias, expected[2]) < 1e-6
    new_weight, new_bias = triton_layers.layer_update(fenced(masked), fenced(x), fenced(weight), fenced(bias), 0.5)
    assert relative_error(new_weight, weight.double() - 0.5 * expected[1]) < 1e-6
    assert relative_error(new_bias, bias.double() - 0.5 * expected[2]) < 1e-6


def adapt(**changes):
    case = make(2, 6, [4, 8, 4], 3)
    given = {name: case[name] for name in ("support", "weights", "biases", "head_weight")}
    return triton_mlp.adapt_mlp(**{"steps": 1, "lr": 0.1, **given, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"biases": []}, "one per layer"),
        ({"support": torch.zeros(2, 6, 5)}, "must agree"),
        ({"head_weight": torch.zeros(1, 3, 5)}, "head_weight must be"),
        ({"head_weight": torch.zeros(2, 3, 4)}, "stacked alike"),
        ({"direction": torch.zeros(3, dtype=torch.int64)}, "direction must be"),
        ({"weights": [torch.zeros(1, 8, 4), torch.zeros(1, 4, 7)]}, "must chain"),
        ({"confidence": "mass"}, "needs a background"),
        ({"support": torch.zeros(2, 200, 4), "whole": True}, "whole=True"),
    ],
)
def test_bad_input_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        adapt(**changes)

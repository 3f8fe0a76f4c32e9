"""Three nested autograd Functions, so that a fused operator survives `torch.func` and every order of derivative.

A `RowOp` maps input tensors, all with the same leading dim E, to odds [E, N] or losses [E]. With J its Jacobian:

    Forward         the value                         its backward is `Backward`
    Backward        Jᵀ g                              its backward is `DoubleBackward`
    DoubleBackward  ∂(g · J v)/∂inputs, and J v       its derivatives come from the operator's plain definition

Each has a vmap rule (the batch is folded into E) and a jvp. The Hessian being symmetric, the jvp of `Backward` is
`DoubleBackward` again, and J v is the jvp of `Forward`: three leaves close the whole system.
"""

# torch types autograd.Function as Any, its static methods' signatures being free.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

Inputs = tuple[Any, ...]  # tensors, and None for those that are left out
Needs = tuple[bool, ...]


class RowOp(Protocol):
    """What a backend supplies; see the module's docstring. Every tensor has the leading dim E."""

    @property
    def n_inputs(self) -> int:
        """How many inputs there are, counting those that are None."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The odds [E, N], then what backward wants back (tensors that carry no gradient)."""

    def backward(self, inputs: Inputs, saved: Inputs, grad: Tensor, needs: Needs) -> list[Tensor]:
        """Jᵀ grad for the inputs that need it, in their order."""

    def double_backward(
        self, inputs: Inputs, saved: Inputs, grad: Tensor, tangents: Inputs, needs: Needs
    ) -> list[Tensor]:
        """∂(grad · J tangents)/∂inputs for the inputs that need it, then J tangents [E, N]. A tangent may be None."""

    def define(self, *inputs: Any) -> Tensor:
        """The value in differentiable torch operations."""


def apply(op: RowOp, *inputs: Tensor | None) -> Tensor:
    """The operator's value, differentiable any number of times, in forward and in reverse mode."""
    value: Tensor = _Forward.apply(op, *inputs)[0]
    return value


class _AsGiven(inspect.Signature):
    """Of a function that is given all its arguments by position: `Function.apply` binds them at every call, and what
    Python's own binding looks at costs tens of microseconds.
    """

    def bind(self, *args: Any, **kwargs: Any) -> _Bound:  # type: ignore[override]
        return _Bound(args, kwargs)


class _Bound(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


def _signed(function: Any) -> Any:
    function.__signature__ = _AsGiven()
    return function


class _Forward(Function):
    @staticmethod
    @_signed
    def forward(op: RowOp, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return op.forward(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, *tensors = inputs
        ctx.shape = output[0].shape
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for what was saved would be made only to be dropped
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needs = tuple(ctx.needs_input_grad[1:])
        if grad is None or not any(needs):
            return None, *(None for _ in needs)
        backward = _Backward.forward if _is_last() else _Backward.apply
        return None, *spread(backward(ctx.op, needs, grad, *ctx.saved_tensors), needs)

    @staticmethod
    def jvp(ctx: Any, _op: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        grad = saved[ctx.op.n_inputs].new_zeros(ctx.shape)
        along = _DoubleBackward.apply(ctx.op, (False,) * len(tangents), grad, *saved, *tangents)[-1]
        return along, *(None for _ in saved[ctx.op.n_inputs :])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _folded(_Forward, info, in_dims, args)


def _is_last() -> bool:
    """Whether nothing asks for a derivative of what is computed now, in any way: then no node is needed around it."""
    return (
        not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


class _Backward(Function):
    @staticmethod
    @_signed
    def forward(op: RowOp, needs: Needs, grad: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        _refuse_legacy_vmap(grad)
        return tuple(op.backward(tensors[: op.n_inputs], tensors[op.n_inputs :], grad, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004 - torch's name
        ctx.op, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        op, (grad, *tensors) = ctx.op, ctx.saved_tensors
        first = 3  # op, needs and grad come before the inputs
        needs = tuple(ctx.needs_input_grad[first : first + op.n_inputs])
        *grads, along = _DoubleBackward.apply(op, needs, grad, *tensors, *spread(cotangents, ctx.needs))
        # What Forward saved is a function of the inputs, and its share is in theirs.
        return None, None, along, *spread(grads, needs), *(None for _ in tensors[op.n_inputs :])

    @staticmethod
    def jvp(ctx: Any, _op: Any, _needs: Any, grad_tangent: Tensor | None, *tangents: Tensor | None) -> tuple[Any, ...]:
        op, (grad, *tensors) = ctx.op, ctx.saved_tensors
        input_tangents = tangents[: op.n_inputs]
        along: list[Any] = [None] * sum(ctx.needs)
        if any(tangent is not None for tangent in input_tangents):
            along = list(_DoubleBackward.apply(op, ctx.needs, grad, *tensors, *input_tangents)[:-1])
        if grad_tangent is not None:
            linear = _Backward.apply(op, ctx.needs, grad_tangent, *tensors)
            along = [b if a is None else a + b for a, b in zip(along, linear, strict=True)]
        return tuple(along)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _folded(_Backward, info, in_dims, args)


class _DoubleBackward(Function):
    @staticmethod
    @_signed
    def forward(op: RowOp, needs: Needs, grad: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs, saved, tangents = _split(op, tensors)
        for value in (grad, *tangents):
            _refuse_legacy_vmap(value)
        return tuple(op.double_backward(inputs, saved, grad, tangents, needs))

    setup_context = staticmethod(_Backward.setup_context)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        grad, *tensors = ctx.saved_tensors
        function, positions, primals = _definition(ctx.op, ctx.needs, grad, tensors)
        _, pull = _vjp(function, primals)
        grads: list[Any] = [None] * (1 + len(tensors))
        for position, value in zip(positions, pull(cotangents), strict=True):
            grads[position] = value
        return None, None, *grads

    @staticmethod
    def jvp(ctx: Any, _op: Any, _needs: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        grad, *tensors = ctx.saved_tensors
        function, positions, primals = _definition(ctx.op, ctx.needs, grad, tensors)
        along = [tangents[position] for position in positions]
        moves = [torch.zeros_like(p) if t is None else t for p, t in zip(primals, along, strict=True)]
        return tuple(_jvp(function, primals, tuple(moves)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _folded(_DoubleBackward, info, in_dims, args)


def _refuse_legacy_vmap(value: Tensor | None) -> None:
    """`is_grads_batched` and `vectorize=True` go by a vmap of before `torch.func`, which knows no rule of ours."""
    if value is not None and torch._C._functorch.is_legacy_batchedtensor(value):
        raise RuntimeError("is_grads_batched=True and vectorize=True are not supported: use torch.func (vmap, jacrev)")


def _split(op: RowOp, tensors: tuple[Tensor | None, ...]) -> tuple[Inputs, Inputs, Inputs]:
    """The inputs, what Forward saved, and the tangents (as many as the inputs)."""
    return tensors[: op.n_inputs], tensors[op.n_inputs : -op.n_inputs], tensors[-op.n_inputs :]


def spread(values: Any, needs: Needs) -> list[Any]:
    """The values put where they are needed, None elsewhere."""
    rest = iter(values)
    return [next(rest) if need else None for need in needs]


def _folded(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """The vmap rule: every tensor gets the batch in front of its leading dim E, and the two become one."""

    def fold(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        batched = value.unsqueeze(0).expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
        return batched.flatten(0, 1)

    outputs = function.apply(*(fold(value, dim) for value, dim in zip(args, in_dims, strict=True)))
    return tuple(value.unflatten(0, (info.batch_size, -1)) for value in outputs), (0,) * len(outputs)


def _is_smooth(value: Tensor | None) -> bool:
    return value is not None and value.is_floating_point()


def _vjp(function: Any, primals: tuple[Tensor, ...]) -> Any:
    """The function's value and its pullback."""
    return torch.func.vjp(function, *primals)


def _jvp(function: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """J tangents. Forward mode writes tangents in the layout of their primals, so those must not be expanded views."""
    return torch.func.jvp(function, tuple(p.contiguous() for p in primals), tangents)[1]


def _definition(op: RowOp, needs: Needs, grad: Tensor, tensors: list[Tensor | None]) -> tuple[Any, list[int], Any]:
    """`DoubleBackward` in plain operations: a function of the present tensors, their positions, and themselves."""
    everything = [grad, *tensors]
    n_saved = len(tensors) - 2 * op.n_inputs
    saved = range(1 + op.n_inputs, 1 + op.n_inputs + n_saved)
    positions = [i for i, value in enumerate(everything) if _is_smooth(value) and i not in saved]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        full: list[Any] = list(everything)
        for position, value in zip(positions, values, strict=True):
            full[position] = value
        inputs, _, tangents = _split(op, tuple(full[1:]))
        given = [i for i, value in enumerate(inputs) if _is_smooth(value)]
        moves = tuple(torch.zeros_like(inputs[i]) if tangents[i] is None else tangents[i] for i in given)

        def along(*chosen: Tensor) -> Tensor:
            def odds(*primals: Tensor) -> Tensor:
                placed = list(inputs)
                for i, primal in zip(given, primals, strict=True):
                    placed[i] = primal
                return op.define(*placed)

            moved: Tensor = _jvp(odds, chosen, moves)
            return moved

        result, pull = _vjp(along, tuple(inputs[i] for i in given))
        grads = dict(zip(given, pull(full[0]), strict=True))
        return *(grads[i] for i, need in enumerate(needs) if need), result

    return function, positions, tuple(everything[i] for i in positions)

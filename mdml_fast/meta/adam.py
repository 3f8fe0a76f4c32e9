"""Adam on named tensors, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The usual constants: how much of the moments stays with each step, and what keeps the step finite.
BETAS, EPSILON = (0.9, 0.999), 1e-8


class Adam:
    """The update of `torch.optim.Adam` (Kingma, Ba, "Adam: a method for stochastic optimization", 2015).

    The first use of torch's own imports its compiler, which takes as long as training does.

    Args:
        params: what is trained, floating point, by name.
        rates: the learning rate of each.
        decay: of some, the multiple of the parameter that its gradient grows by.

    Attributes:
        n_steps: how many were taken.
        first, second: the moments, by name.
    """

    def __init__(
        self, params: Mapping[str, Tensor], rates: Mapping[str, float], decay: Mapping[str, float] | None = None
    ) -> None:
        self.params = {name: param.detach() for name, param in params.items()}
        self.rates, self.decay = rates, decay or {}
        self.n_steps = 0
        self.first = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self.second = {name: torch.zeros_like(param) for name, param in self.params.items()}

    def step(self, grads: Mapping[str, Tensor]) -> None:
        """Change every parameter by its gradient, of the same name, shape and dtype."""
        self.n_steps += 1
        corrections = [1 - beta**self.n_steps for beta in BETAS]
        for name, param in self.params.items():
            first, second, grad = self.first[name], self.second[name], grads[name]
            if name in self.decay:
                grad = grad.add(param, alpha=self.decay[name])
            first.lerp_(grad, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            size = second.sqrt().div_(corrections[1] ** 0.5).add_(EPSILON)
            param.addcdiv_(first, size, value=-self.rates[name] / corrections[0])

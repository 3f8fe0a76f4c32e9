"""The heads that the fused path takes, for many episodes at once: logits, and the gradients back to embeddings.

Letters: C episodes, n rows, z features of an embedding, K logits. Logits and their gradient are float32 (float64 for
float64 rows) whatever the products compute in.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mdml_fast.meta.fused_layers import Buffers, Use, affine, pull
from mdml_fast.meta.heads import PrototypeHead


class FusedHead(Protocol):
    """What a head does; `values` are its parameters and buffers in the dtype of the products."""

    takes_support: bool

    def logits(self, z: Tensor, support_z: Tensor, values: dict[str, Tensor], out: Tensor, buffers: Buffers) -> None:
        """Logits [C, n, K] of embeddings z [C, n, z] into out."""

    def pull(
        self,
        grad: Tensor,
        z: Tensor,
        support_z: Tensor,
        values: dict[str, Tensor],
        buffers: Buffers,
        use: Use | None,
    ) -> tuple[Tensor, Tensor | None]:
        """From the gradient to the logits to that to z, and to support_z where the head takes it.

        `use` is told of the head's own parameters; None where their gradient is not needed.
        """


def read_head(head: nn.Module) -> FusedHead | None:
    """The head, or None where the fused path does not know it."""
    if type(head) is nn.Linear:
        return LinearHead(None if head.bias is None else "head.bias")
    return PrototypeLogits() if type(head) is PrototypeHead else None


class LinearHead:
    """``ℓ = z Wᵀ + c``."""

    takes_support = False

    def __init__(self, bias: str | None) -> None:
        self.bias = bias

    def logits(self, z: Tensor, support_z: Tensor, values: dict[str, Tensor], out: Tensor, buffers: Buffers) -> None:
        """See `FusedHead`."""
        del support_z
        product = out if out.dtype == z.dtype else buffers.take("logits product", tuple(out.shape), z.dtype)
        affine(z, values["head.weight"], values[self.bias] if self.bias else None, product)
        if product is not out:
            out.copy_(product)

    def pull(
        self,
        grad: Tensor,
        z: Tensor,
        support_z: Tensor,
        values: dict[str, Tensor],
        buffers: Buffers,
        use: Use | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `FusedHead`."""
        del support_z
        grad = grad.to(z.dtype)
        if use:
            use("head.weight", self.bias, grad, z)
        return pull(grad, values["head.weight"], buffers.take("grad z", tuple(z.shape), z.dtype)), None


class PrototypeLogits:
    """``ℓ_k = -|z - c_k|² / 2τ²`` with the support's embeddings as centres c."""

    takes_support = True

    def logits(self, z: Tensor, support_z: Tensor, values: dict[str, Tensor], out: Tensor, buffers: Buffers) -> None:
        """See `FusedHead`."""
        product = out if out.dtype == z.dtype else buffers.take("logits product", tuple(out.shape), z.dtype)
        torch.bmm(z, support_z.mT, out=product)
        if product is not out:
            out.copy_(product)
        out.sub_(_half_squares(z, out.dtype).unsqueeze(-1)).sub_(_half_squares(support_z, out.dtype).unsqueeze(-2))
        out.div_(_per_episode(values["head.variance"], out))

    def pull(
        self,
        grad: Tensor,
        z: Tensor,
        support_z: Tensor,
        values: dict[str, Tensor],
        buffers: Buffers,
        use: Use | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `FusedHead`."""
        del use  # it has no parameters
        grad.div_(_per_episode(values["head.variance"], grad))
        by_row, by_center = grad.sum(-1, keepdim=True).to(z.dtype), grad.sum(-2).unsqueeze(-1).to(z.dtype)
        grad = grad.to(z.dtype)
        grad_z = buffers.take("grad z", tuple(z.shape), z.dtype)
        grad_support = buffers.take("grad support z", tuple(support_z.shape), z.dtype)
        torch.bmm(grad, support_z, out=grad_z).addcmul_(by_row, z, value=-1)
        torch.bmm(grad.mT, z, out=grad_support).addcmul_(by_center, support_z, value=-1)
        return grad_z, grad_support


def _half_squares(z: Tensor, dtype: torch.dtype) -> Tensor:
    """|z|²/2 of embeddings [C, n, z], [C, n]."""
    norms: Tensor = torch.linalg.vector_norm(z, dim=-1, dtype=dtype)
    return norms.square() / 2


def _per_episode(value: Tensor, like: Tensor) -> Tensor:
    """A scalar, or one value per episode [C], to broadcast against [C, n, K] in its dtype."""
    return value.to(like.dtype).view(-1, 1, 1)

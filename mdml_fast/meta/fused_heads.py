"""The heads that the fused path takes, for many episodes at once: logits, and the gradients back to embeddings.

Letters: C episodes, n rows, z features of an embedding, K logits. Logits and their gradient keep the rows' dtype,
whatever the products compute in.
"""

from __future__ import annotations

import torch
from mdml_kernels.native import layers
from mdml_kernels.native import loader as native
from torch import Tensor, nn

from mdml_fast.meta.fused_layers import BatchedLayer, Buffers, Layer, Use, Weights, read_linear
from mdml_fast.meta.heads import PrototypeHead

PROTOTYPES = "prototypes"


def read_head(head: nn.Module) -> Layer | str | None:
    """A linear head's layer, or `PROTOTYPES`; None where the fused path does not know the head."""
    if type(head) is nn.Linear:
        return read_linear("head", head)
    return PROTOTYPES if type(head) is PrototypeHead else None


class BatchedLinearHead:
    """``ℓ = z Wᵀ + c``."""

    def __init__(
        self, layer: Layer, weights: Weights, n_episodes: int, n_rows: int, buffers: Buffers, dtype: torch.dtype
    ) -> None:
        self.layer = BatchedLayer(layer, weights, n_episodes, n_rows, buffers)
        product = self.layer.after
        self.out = product if product.dtype == dtype else buffers.take("logits", tuple(product.shape), dtype)

    def logits(self, z: Tensor, centers: Tensor) -> Tensor:
        """Logits [C, n, K] of embeddings z [C, n, z], in a buffer; it takes no centers."""
        del centers
        product = self.layer.forward(z)
        return product if product is self.out else self.out.copy_(product)

    def pull(self, grad: Tensor, use: Use | None) -> tuple[Tensor, Tensor | None]:
        """The gradient to z, and to the centers, from that to the logits; `use` is told of the head's own layer."""
        grad = grad.to(self.layer.weight.dtype)
        grad_z = self.layer.pull(grad)
        if use:
            use(self.layer, grad)
        return grad_z, None


class BatchedPrototypes:
    """``ℓ_k = -|z - c_k|² / 2τ²`` with embeddings of the support as centers c [C, K, z]."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.variance, self.dtype = weights.master["head.variance"].view(-1, 1, 1), dtype
        self.z = self.centers = self.variance

    def logits(self, z: Tensor, centers: Tensor) -> Tensor:
        """Logits [C, n, K] of embeddings z [C, n, z]."""
        self.z, self.centers = z, centers
        logits = torch.bmm(z, centers.mT).to(self.dtype)
        logits.sub_(half_squares(z, self.dtype)).sub_(half_squares(centers, self.dtype).mT)
        return logits.div_(self.variance)

    def pull(self, grad: Tensor, use: Use | None) -> tuple[Tensor, Tensor | None]:
        """As `BatchedLinearHead.pull`; there are no parameters to be told of. grad is overwritten."""
        del use
        z, centers = self.z, self.centers
        grad.div_(self.variance)
        by_row, by_center = grad.sum(-1, keepdim=True).to(z.dtype), grad.sum(-2).unsqueeze(-1).to(z.dtype)
        grad = grad.to(z.dtype)
        grad_z = torch.bmm(grad, centers).addcmul_(by_row, z, value=-1)
        return grad_z, torch.bmm(grad.mT, z).addcmul_(by_center, centers, value=-1)


class CompiledPrototypes(BatchedPrototypes):
    """The same by the compiled kernels, as a layer of weights c / τ² and biases -|c|² / 2τ².

    A further feature, |z|² / 2 with the weight -1 / τ², gives the rest, and sums the gradient over the centers.
    """

    def __init__(self, weights: Weights, buffers: Buffers) -> None:
        super().__init__(weights, torch.float32)
        self.buffers = buffers
        self.rows = self.weight = self.variance

    def logits(self, z: Tensor, centers: Tensor) -> Tensor:
        """Logits [C, n, K] of embeddings z [C, n, z], in a buffer."""
        self.z, self.centers = z, centers
        self.rows = torch.cat([z, half_squares(z, self.dtype)], -1)
        self.weight = torch.cat([centers, -torch.ones_like(centers[..., :1])], -1).div_(self.variance)
        bias = -half_squares(centers, self.dtype).mT / self.variance
        logits = self.buffers.take("logits", (*z.shape[:2], centers.shape[1]), self.dtype)
        layers.forward(self.rows, self.weight, bias.contiguous(), False, logits)
        return logits

    def pull(self, grad: Tensor, use: Use | None) -> tuple[Tensor, Tensor | None]:
        """See `BatchedPrototypes.pull`."""
        del use
        by_row, by_weight = torch.empty_like(self.rows), torch.empty_like(self.weight)
        by_bias = self.weight.new_empty(len(grad), 1, self.weight.shape[1])
        layers.pull(grad, self.weight, None, by_row)
        layers.step(grad, self.rows, 1.0, (None, None), (by_weight, by_bias))
        grad_z = torch.addcmul(by_row[..., :-1], by_row[..., -1:], self.z)
        return grad_z, by_weight[..., :-1].addcmul_(by_bias.mT, self.centers, value=-1).div_(self.variance)


def half_squares(z: Tensor, dtype: torch.dtype) -> Tensor:
    """|z|²/2 [C, n, 1] of embeddings [C, n, z]."""
    norms: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=dtype)
    return norms.square() / 2


def batched_head(
    head: Layer | str, weights: Weights, n_episodes: int, n_rows: int, buffers: Buffers, dtype: torch.dtype
) -> BatchedLinearHead | BatchedPrototypes:
    """The head, as `read_head` gave it, for so many rows of this dtype."""
    if isinstance(head, Layer):
        return BatchedLinearHead(head, weights, n_episodes, n_rows, buffers, dtype)
    variance = weights.master["head.variance"]
    if native.serves(variance) and weights.compute is weights.master:
        return CompiledPrototypes(weights, buffers)
    return BatchedPrototypes(weights, dtype)

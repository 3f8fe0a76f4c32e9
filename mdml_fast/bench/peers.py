"""First-order meta-gradients as one would have them elsewhere: a plain loop, vmap, and the libraries for it.

Each peer is made of an encoder, a linear head and the settings of the inner loop, and maps support [E, n, d],
query [E, q, d] and is_ood [E, q] to the gradients by name, as `MetaEngine` names them, mean over episodes. The losses
are written out, as a user of such a library would: the one-class loss, and the hinge of the softmax margin.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Gradients = dict[str, Tensor]
Peer = Callable[[Tensor, Tensor, Tensor], Gradients]


class Task(NamedTuple):
    """What a peer is made of."""

    encoder: nn.Module
    head: nn.Module
    inner_steps: int
    inner_lr: float
    margin: float


def one_class(logits: Tensor) -> Tensor:
    """mean(-log S) of logits [n, K]."""
    return -torch.log_softmax(logits, -1).max(-1).values.mean()


def hinge(logits: Tensor, is_ood: Tensor, margin: float) -> Tensor:
    """The softmax margin of logits [q, K]."""
    s = torch.softmax(logits, -1).max(-1).values
    mean_ood = (s * is_ood).sum() / is_ood.sum()
    mean_id = (s * ~is_ood).sum() / (~is_ood).sum()
    return torch.relu(margin - (mean_id - mean_ood))


def plain_loop(task: Task) -> Peer:
    """Plain autograd, one episode after the other."""
    names, head = [name for name, _ in task.encoder.named_parameters()], list(task.head.parameters())

    def episode(support: Tensor, query: Tensor, is_ood: Tensor) -> tuple[Tensor, ...]:
        own = [value.detach().requires_grad_() for value in task.encoder.parameters()]
        for _ in range(task.inner_steps):
            inner = one_class(task.head(_call(task.encoder, names, own, support)))
            steps = torch.autograd.grad(inner, own)
            own = [
                (value - task.inner_lr * step).detach().requires_grad_() for value, step in zip(own, steps, strict=True)
            ]
        outer = hinge(task.head(_call(task.encoder, names, own, query)), is_ood, task.margin)
        return torch.autograd.grad(outer, [*own, *head])

    return _loop(task, episode)


def vmapped(task: Task) -> Peer:
    """torch.func alone: `vmap` over `grad` of one episode."""
    return _under_vmap(
        task, lambda own, step: {name: value - task.inner_lr * step[name] for name, value in own.items()}
    )


def torchopt_functional(task: Task) -> Peer:
    """`torchopt.sgd` under vmap."""
    import torchopt

    optimizer = torchopt.sgd(lr=task.inner_lr)

    def descend(own: Gradients, step: Gradients) -> Gradients:
        updates, _ = optimizer.update(step, optimizer.init(own), params=own, inplace=False)
        moved: Gradients = torchopt.apply_updates(own, updates, inplace=False)
        return moved

    return _under_vmap(task, descend)


def torchopt_object(task: Task) -> Peer:
    """`torchopt.MetaSGD`, one episode after the other."""
    import torchopt

    encoder, head = copy.deepcopy(task.encoder), list(task.head.parameters())
    optimizer = torchopt.MetaSGD(encoder, lr=task.inner_lr)
    frozen = copy.deepcopy(task.head).requires_grad_(False)  # MetaSGD always keeps the graph of its steps

    def episode(support: Tensor, query: Tensor, is_ood: Tensor) -> tuple[Tensor, ...]:
        start = torchopt.extract_state_dict(encoder), torchopt.extract_state_dict(optimizer)
        for _ in range(task.inner_steps):
            optimizer.step(one_class(frozen(encoder(support))))
        outer = hinge(task.head(encoder(query)), is_ood, task.margin)
        grads = torch.autograd.grad(outer, [*encoder.parameters(), *head])
        torchopt.recover_state_dict(encoder, start[0])
        torchopt.recover_state_dict(optimizer, start[1])
        return grads

    return _loop(task, episode)


def higher_loop(task: Task) -> Peer:
    """`higher`, one episode after the other, without tracking of higher-order gradients."""
    import higher

    encoder, head = copy.deepcopy(task.encoder), list(task.head.parameters())
    optimizer = torch.optim.SGD(encoder.parameters(), lr=task.inner_lr)

    def episode(support: Tensor, query: Tensor, is_ood: Tensor) -> tuple[Tensor, ...]:
        with higher.innerloop_ctx(encoder, optimizer, track_higher_grads=False) as (own, steps):
            for _ in range(task.inner_steps):
                steps.step(one_class(task.head(own(support))))
            outer = hinge(task.head(own(query)), is_ood, task.margin)
            return torch.autograd.grad(outer, [*own.parameters(), *head])

    return _loop(task, episode)


def learn2learn_loop(task: Task) -> Peer:
    """`learn2learn.algorithms.MAML`, one episode after the other."""
    import learn2learn

    learner, head = (
        learn2learn.algorithms.MAML(copy.deepcopy(task.encoder), task.inner_lr, first_order=True),
        list(task.head.parameters()),
    )

    def episode(support: Tensor, query: Tensor, is_ood: Tensor) -> tuple[Tensor, ...]:
        own = learner.clone()
        for _ in range(task.inner_steps):
            own.adapt(one_class(task.head(own(support))))
        outer = hinge(task.head(own(query)), is_ood, task.margin)
        return torch.autograd.grad(outer, [*learner.parameters(), *head])

    return _loop(task, episode)


PEERS: dict[str, tuple[str | None, Callable[[Task], Peer]]] = {
    "plain loop": (None, plain_loop),
    "vmap": (None, vmapped),
    "higher": ("higher", higher_loop),
    "torchopt.MetaSGD": ("torchopt", torchopt_object),
    "torchopt.sgd, vmap": ("torchopt", torchopt_functional),
    "learn2learn": ("learn2learn", learn2learn_loop),
}


def installed_peers() -> dict[str, Callable[[Task], Peer]]:
    """The peers whose library is there, by name."""
    return {name: make for name, (library, make) in PEERS.items() if library is None or find_spec(library)}


def _call(module: nn.Module, names: list[str], values: Any, rows: Tensor) -> Tensor:
    result: Tensor = functional_call(module, dict(zip(names, values, strict=True)), (rows,))
    return result


def _loop(task: Task, episode: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Peer:
    """The mean of an episode's gradients (encoder, then head) over a loop."""
    names = [f"{part}.{name}" for part in ("encoder", "head") for name, _ in getattr(task, part).named_parameters()]

    def meta_gradients(support: Tensor, query: Tensor, is_ood: Tensor) -> Gradients:
        totals: Gradients = {}
        for one in zip(support, query, is_ood, strict=True):
            for name, gradient in zip(names, episode(*one), strict=True):
                totals[name] = totals[name] + gradient if name in totals else gradient
        return {name: total / len(support) for name, total in totals.items()}

    return meta_gradients


def _under_vmap(task: Task, descend: Callable[[Gradients, Gradients], Gradients]) -> Peer:
    shared, head = (
        {name: value.detach() for name, value in module.named_parameters()} for module in (task.encoder, task.head)
    )

    def logits(own: Gradients, head: Gradients, rows: Tensor) -> Tensor:
        result: Tensor = functional_call(task.head, head, (functional_call(task.encoder, own, (rows,)),))
        return result

    def adapt(support: Tensor) -> Gradients:
        own = shared
        for _ in range(task.inner_steps):
            own = descend(own, grad(lambda own: one_class(logits(own, head, support)))(own))
        return own

    def outer(own: Gradients, head: Gradients, query: Tensor, is_ood: Tensor) -> Tensor:
        losses = vmap(lambda own, rows, mask: hinge(logits(own, head, rows), mask, task.margin))(own, query, is_ood)
        return losses.mean()

    def meta_gradients(support: Tensor, query: Tensor, is_ood: Tensor) -> Gradients:
        own_grads, head_grads = grad(outer, argnums=(0, 1))(vmap(adapt)(support), head, query, is_ood)
        grads = {f"encoder.{name}": value.sum(0) for name, value in own_grads.items()}
        return grads | {f"head.{name}": value for name, value in head_grads.items()}

    return meta_gradients

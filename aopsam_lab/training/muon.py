"""Muon: momentum whose matrices are brought to singular values near one before the step.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale ``0.2 sqrt(max(rows, columns))``,
which lets it share AdamW's learning rate, is from J. Liu et al., "Muon is scalable for LLM training" (2025). torch.optim.Muon
takes no convolutions and works in bfloat16, which processors without AVX-512 only emulate; hence this one.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Newton-Schulz, quintic
NS_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """(..., R, C) float32 -> (..., R, C) with the same singular vectors and all singular values about one (0.7 to 1.2)."""
    a, b, c = NS_COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, but for parameter groups with ``muon=True`` Muon with Nesterov momentum. Convolutions count as matrices (out, rest)."""

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group.get("muon"):
                self._muon_step(group)
        everything, self.param_groups = self.param_groups, [group for group in self.param_groups if not group.get("muon")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = everything

    def _muon_step(self, group: dict) -> None:
        alike = defaultdict(list)  # matrices of one shape go together: a GPU waits for each small product, hardly longer for many
        for p in group["params"]:
            if p.grad is not None:
                alike[p.flatten(1).shape].append(p)
        for shape, parameters in alike.items():
            updates = []
            for p in parameters:
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))  # AdamW looks for a step in every state
                average = state["momentum"]
                average.lerp_(p.grad, 1 - self.momentum)
                updates.append(p.grad.lerp(average, self.momentum).flatten(1).float())
            for p, update in zip(parameters, orthogonalise(torch.stack(updates))):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-0.2 * group["lr"] * max(shape) ** 0.5)

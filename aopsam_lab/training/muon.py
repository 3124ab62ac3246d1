"""Muon: momentum whose matrices are brought to singular values near one before the step.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale ``0.2 sqrt(max(rows, columns))``,
which lets it share AdamW's learning rate, is from J. Liu et al., "Muon is scalable for LLM training" (2025). torch.optim.Muon
takes no convolutions and works in bfloat16, which processors without AVX-512 only emulate; hence this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Newton-Schulz, quintic
NS_STEPS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """(R, C) float32 -> (R, C) with the same singular vectors and all singular values about one (0.7 to 1.2)."""
    a, b, c = NS_COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.AdamW):
    """AdamW, but for parameter groups with ``muon=True`` Muon with Nesterov momentum. Convolutions count as matrices (out, rest)."""

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        ours = [group for group in self.param_groups if group.get("muon")]
        for group in ours:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))  # AdamW looks for a step in every state
                average = state["momentum"]
                average.lerp_(p.grad, 1 - self.momentum)
                update = orthogonalise(p.grad.lerp(average, self.momentum).flatten(1).float())
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-0.2 * group["lr"] * max(update.shape) ** 0.5)
        everything, self.param_groups = self.param_groups, [group for group in self.param_groups if not group.get("muon")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = everything

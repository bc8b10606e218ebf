"""Barlow Twins: J. Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML
2021."""

import torch
import torch.distributed as dist


class SumOverRanks(torch.autograd.Function):
    """all_reduce(sum) whose backward is all_reduce(sum) as well: every rank's loss depends on every rank's
    input."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        """x of any shape -> the sum over the ranks."""
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        """The gradients of all ranks' losses, summed."""
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def barlow_twins_loss(z1: torch.Tensor, z2: torch.Tensor, *, lambda_: float = 0.005) -> torch.Tensor:
    """Eq. 1: sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2, C the cross-correlation of z1 and z2 (N, D)
    over the batch.

    Columns are standardised with the biased standard deviation. Computed in float32. Under torch.distributed
    z1, z2 are the rank's share (the same N on every rank), the value is that of the global batch on every
    rank, and gradients averaged over the ranks, as DDP does, are those of one process on the joined batch.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    total = SumOverRanks.apply if several else lambda x: x
    n = len(z1) * (dist.get_world_size() if several else 1)

    def standardise(z):  # (N, D), over the global batch
        z = z - total(z.sum(0)) / n
        return z * (total(z.square().sum(0)) / n + 1e-8).rsqrt()

    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = standardise(z1.float()), standardise(z2.float())
        c = total(z1.T @ z2) / n  # (D, D)
        on_diagonal = (1 - c.diagonal()).square().sum()
        off_diagonal = c.square().sum() - c.diagonal().square().sum()
        return on_diagonal + lambda_ * off_diagonal

"""SimCLR: T. Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML
2020."""

import torch
import torch.distributed as dist
import torch.nn.functional as F


class GatherRanks(torch.autograd.Function):
    """Rows of all ranks in rank order; backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows (n, D) -> all rows (n * ranks, D)."""
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        """The gradient (n * ranks, D) of all rows -> this rank's (n, D), summed over the ranks."""
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def nt_xent_loss(z1: torch.Tensor, z2: torch.Tensor, *, temperature: float = 0.5) -> torch.Tensor:
    """NT-Xent (Eq. 1 and Algorithm 1) of two views (N, D): each of the 2N rows picks its partner among the 2N
    - 1 others.

    Rows are normalised here; computed in float32. Under torch.distributed z1, z2 are the rank's share (the
    same N on every rank), negatives come from all ranks, and the value is the mean over this rank's anchors:
    its mean over the ranks is the global loss, and gradients averaged over the ranks are those of one process
    on the joined batch.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    gather, rank = (GatherRanks.apply, dist.get_rank()) if several else (lambda x: x, 0)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        keys1, keys2 = gather(z1), gather(z2)  # (N, D), N over all ranks
        logits = torch.cat([z1, z2]) @ torch.cat([keys1, keys2]).T / temperature  # (2n, 2N)
        i = torch.arange(len(z1), device=z1.device) + rank * len(z1)
        itself, partner = torch.cat([i, i + len(keys1)]), torch.cat([i + len(keys1), i])
        return F.cross_entropy(logits.scatter(1, itself[:, None], float("-inf")), partner)

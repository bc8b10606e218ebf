"""MoCo: K. He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020."""

import torch
import torch.nn.functional as F


def info_nce_loss(
    q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, *, temperature: float = 0.2
) -> torch.Tensor:
    """InfoNCE (Eq. 1 and Algorithm 1): query i picks key i of k (N, D) against the rows of queue (K, D).

    q and k are normalised here, the queue's rows have unit length already; k and queue get no gradient.
    Computed in float32. The value is the mean over the N queries: on several ranks, each with its own queries
    and the same queue, the mean over the ranks is the global loss, in value and in gradient.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = F.normalize(q.float(), dim=1), F.normalize(k.detach().float(), dim=1)
        positive = (q * k).sum(1, keepdim=True)  # (N, 1)
        negative = q @ queue.detach().float().T  # (N, K)
        logits = torch.cat([positive, negative], dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

"""SimSiam: X. Chen and K. He, "Exploring Simple Siamese Representation Learning", CVPR 2021."""

import torch
import torch.nn.functional as F


def negative_cosine_loss(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Eq. 1 with the stop-gradient of Algorithm 1: the mean over the rows of -cos(p, z), p and z (N, D), z
    detached.

    Computed in float32. On several ranks the mean over the ranks is the global loss, in value and in
    gradient.
    """
    with torch.autocast(p.device.type, enabled=False):
        return -F.cosine_similarity(p.float(), z.detach().float(), dim=1).mean()

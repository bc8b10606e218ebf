"""Barlow Twins: both views through one network; the loss is in losses/barlow.py."""

import torch
from torch import nn

from losses.barlow import barlow_twins_loss
from models.backbone import backbone_width
from models.heads import mlp


class BarlowTwins(nn.Module):
    """Barlow Twins (Zbontar et al., 2021): backbone and a projector of three layers on both views.

    `hidden` and `out` are the widths of the projector's layers and of the embedding.
    """

    def __init__(self, backbone: nn.Module, hidden: int = 1024, out: int = 1024, lambda_: float = 0.005):
        super().__init__()
        self.backbone, self.lambda_, self.out = backbone, lambda_, out
        self.projector = mlp([backbone_width(backbone), hidden, hidden, out])

    def forward(self, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        """views (N, 3, H, W) -> loss ()."""
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))  # (N, out)
        return barlow_twins_loss(z1, z2, lambda_=self.lambda_)

    def chance_loss(self, batch_size: int) -> float:
        """Expected loss of unrelated views with decorrelated columns: E[C_ij^2] = 1 / N."""
        return self.out * (1 + 1 / batch_size + self.lambda_ * (self.out - 1) / batch_size)

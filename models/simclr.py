"""SimCLR: both views through one network; the loss is in losses/simclr.py."""

import math

import torch
from torch import nn

from losses.simclr import nt_xent_loss
from models.backbone import backbone_width
from models.heads import mlp


class SimCLR(nn.Module):
    """SimCLR (Chen et al., 2020): backbone and a projector of two layers on both views.

    `hidden` and `out` are the widths of the projector's hidden layer and of the embedding.
    """

    def __init__(self, backbone: nn.Module, hidden: int = 512, out: int = 128, temperature: float = 0.2):
        super().__init__()
        self.backbone, self.temperature = backbone, temperature
        self.projector = mlp([backbone_width(backbone), hidden, out], last_norm=True)

    def forward(self, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        """views (N, 3, H, W) -> loss ()."""
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))  # (N, out)
        return nt_xent_loss(z1, z2, temperature=self.temperature)

    def chance_loss(self, batch_size: int) -> float:
        """Cross-entropy of a uniform guess among the 2N - 1 other views."""
        return math.log(2 * batch_size - 1)

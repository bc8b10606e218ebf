"""SimSiam: a predictor on one view, no gradient through the other; the loss is in losses/simsiam.py."""

import torch
from torch import nn

from losses.simsiam import negative_cosine_loss
from models.backbone import backbone_width
from models.heads import mlp


class SimSiam(nn.Module):
    """SimSiam (Chen and He, 2021): a projector of three layers, and a predictor with a bottleneck.

    `hidden` and `out` are the widths of the projector's layers and of the embedding, `predictor_hidden` that
    of the bottleneck.

    The paper trains `predictor` at a constant learning rate (section 4.2). The optimiser knows it by its
    name, and keeps it at `predictor_rate` times the peak of the others. A slow predictor follows one
    direction of its targets, and the features lose the rest; a fast one keeps up, as does BYOL's without a
    target network (J.-B. Grill et al. 2020, on near-optimal predictors).
    """

    def __init__(
        self,
        backbone: nn.Module,
        hidden: int = 1024,
        out: int = 1024,
        predictor_hidden: int = 256,
        predictor_rate: float = 1.0,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp([backbone_width(backbone), hidden, hidden, out], last_norm=True)
        self.predictor = mlp([out, predictor_hidden, out])
        self.predictor_rate = predictor_rate

    def forward(self, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        """views (N, 3, H, W) -> loss ()."""
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))  # (N, out)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return 0.5 * negative_cosine_loss(p1, z2) + 0.5 * negative_cosine_loss(p2, z1)

    def chance_loss(self, batch_size: int) -> float:
        """Cosine of unrelated directions."""
        return 0.0

from torch import nn

from losses.simsiam import negative_cosine_loss
from models.backbone import backbone_width
from models.heads import mlp


class SimSiam(nn.Module):
    """SimSiam (Chen and He, 2021): a projector of three layers, and a predictor with a bottleneck.

    The paper trains `predictor` at a constant learning rate (section 4.2); the training script does so by its
    name.
    """

    def __init__(self, backbone, hidden=1024, out=1024, predictor_hidden=256):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp([backbone_width(backbone), hidden, hidden, out], last_norm=True)
        self.predictor = mlp([out, predictor_hidden, out])

    def forward(self, view1, view2):
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))  # (N, out)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return 0.5 * negative_cosine_loss(p1, z2) + 0.5 * negative_cosine_loss(p2, z1)

    def chance_loss(self, batch_size):
        """Cosine of unrelated directions."""
        return 0.0

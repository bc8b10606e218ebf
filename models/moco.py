"""MoCo: a key encoder that follows slowly, and the queue of its keys; the loss is in losses/moco.py."""

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from losses.moco import info_nce_loss
from models.backbone import backbone_width
from models.heads import mlp

CAST = (nn.Conv2d, nn.Linear)  # layers whose weights autocast casts
LEAST = 4  # images of a group of split-BN: a statistic of fewer is noise


class MoCo(nn.Module):
    """MoCo v2 (He et al., 2020; Chen et al., 2020): queries against a queue of keys from a slowly moving key
    encoder.

    The key encoder normalises the global batch in `splits` groups (split-BN) and the query encoder over the
    whole of it: a query and its key never share their batch statistics, which would give the positive away.
    With `symmetric` each view is a query once and a key once, and keys enter the queue only after both losses
    are computed.

    `hidden` and `out` are the widths of the projector's hidden layer and of the embedding.
    """

    def __init__(
        self,
        backbone: nn.Module,
        hidden: int = 512,
        out: int = 128,
        temperature: float = 0.2,
        queue_size: int = 4096,
        key_momentum: float = 0.99,
        splits: int = 8,
        symmetric: bool = True,
    ):
        super().__init__()
        self.backbone, self.projector = backbone, mlp([backbone_width(backbone), hidden, out], norm=False)
        self.key_backbone, self.key_projector = copy.deepcopy(backbone), copy.deepcopy(self.projector)
        self.key_backbone.requires_grad_(False)
        self.key_projector.requires_grad_(False)
        self.temperature, self.key_momentum = temperature, key_momentum
        self.splits, self.symmetric = splits, symmetric
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, out), dim=1))
        cursor = torch.zeros((), dtype=torch.long)  # next row of the queue to be replaced
        self.register_buffer("cursor", cursor)

    def forward(self, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        """views (N, 3, H, W) -> loss ()."""
        queue = self.queue.clone()
        with torch.no_grad():
            if self.training:
                self.move_key_encoder()
            with cast_once(self.key_backbone, self.key_projector):
                k2 = self.keys(view2)
                k1 = self.keys(view1) if self.symmetric else None
        q1 = self.projector(self.backbone(view1))
        if not self.symmetric:
            self.enqueue(k2)
            return info_nce_loss(q1, k2, queue, temperature=self.temperature)
        q2 = self.projector(self.backbone(view2))
        self.enqueue(k2)
        self.enqueue(k1)
        return 0.5 * (
            info_nce_loss(q1, k2, queue, temperature=self.temperature)
            + info_nce_loss(q2, k1, queue, temperature=self.temperature)
        )

    @torch.no_grad()
    def keys(self, view: torch.Tensor) -> torch.Tensor:
        """Keys (N, out) of unit length of a view (N, 3, H, W), normalised group by group."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        groups = max(1, min(self.splits // ranks, len(view) // LEAST))
        k = torch.cat([self.key_projector(self.key_backbone(group)) for group in view.tensor_split(groups)])
        return F.normalize(k.float(), dim=1)

    @torch.no_grad()
    def move_key_encoder(self) -> None:
        """key <- m key + (1 - m) query (Eq. 2), all weights in one operator."""
        query = [*self.backbone.parameters(), *self.projector.parameters()]
        key = [*self.key_backbone.parameters(), *self.key_projector.parameters()]
        torch._foreach_lerp_(key, query, 1 - self.key_momentum)

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Put the keys (N, out) of all ranks in the place of the oldest of the queue, while training."""
        if not self.training:
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            shares = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, keys.contiguous())
            keys = torch.cat(shares)
        keys = keys[-len(self.queue) :]
        rows = (self.cursor + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys.type_as(self.queue)
        self.cursor.copy_((self.cursor + len(keys)) % len(self.queue))

    def chance_loss(self, batch_size: int) -> float:
        """Cross-entropy of a uniform guess among the positive and the queue."""
        return math.log(len(self.queue) + 1)


@contextlib.contextmanager
def cast_once(*modules: nn.Module) -> Iterator[None]:
    """Under autocast, the weights of the modules' convolutions and linear layers in its dtype until the block
    ends. Autocast keeps its casts of weights that train; those of a key encoder it makes anew at every
    call."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, CAST)]
    weights = [p for layer in layers for p in layer.parameters(recurse=False)]
    device = weights[0].device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    singles, dtype = [p.data for p in weights], torch.get_autocast_dtype(device)
    halves = [torch.empty_like(single, dtype=dtype) for single in singles]
    torch._foreach_copy_(halves, singles)
    try:
        for p, half in zip(weights, halves, strict=True):
            p.data = half
        yield
    finally:
        for p, single in zip(weights, singles, strict=True):
            p.data = single

"""BatchNorm over all ranks. torch's SyncBatchNorm refuses CPU tensors; the one here works wherever all_reduce
does."""

import torch
import torch.distributed as dist
from torch import nn

from losses.barlow import SumOverRanks


class SyncNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm of x (N, C, ...) with the statistics of the global batch, right in value and gradient. Every
    rank has the same N."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, ...), this rank's share -> the same shape and dtype, normalised."""
        if not self.training:
            return super().forward(x)
        over = [0, *range(2, x.dim())]
        n = x.numel() / x.shape[1] * dist.get_world_size()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = SumOverRanks.apply(wide.sum(over)) / n  # (C,)
        shape = [1, -1] + [1] * (x.dim() - 2)
        centred = wide - mean.view(shape)
        var = SumOverRanks.apply(centred.square().sum(over)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * n / (n - 1)).to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def synchronise(module: nn.Module, cuda: bool) -> nn.Module:
    """Replace every BatchNorm below `module` by one over all ranks; key encoders, which normalise in groups,
    stay."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm if cuda else _to_sync_norm
    for name, child in module.named_children():
        if not name.startswith("key_"):
            setattr(module, name, convert(child))
    return module


def _to_sync_norm(module):
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        norm = SyncNorm(
            module.num_features, module.eps, module.momentum, module.affine, dtype=module.running_mean.dtype
        )
        norm.load_state_dict(module.state_dict())
        return norm
    for name, child in module.named_children():
        setattr(module, name, _to_sync_norm(child))
    return module

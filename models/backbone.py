"""ResNet backbones from torchvision: built, and turned into features. Weights: models/weights.py."""

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.v2 import functional as TF

from common import ConfigError
from models.weights import imagenet_weights, load_weights, read_weights, without_start

BATCH = 256  # images that go through a frozen backbone at once


def build_backbone(
    arch: str = "resnet18", init: str = "random", in_channels: int = 3, maxpool: bool | None = None
) -> nn.Module:
    """torchvision's ResNet without its classifier: images (N, in_channels, H, W) -> features (N, 512), 2048
    for ResNet-50.

    `init` is `random`, `imagenet` or a file that `read_weights` reads. Without `maxpool` the stem halves the
    image once instead of twice, for small images; None: as the weights were pretrained. Keys and shapes are
    torchvision's. `pretraining` of the backbone is what is known of it: mean, std, size and maxpool; None of
    random weights.
    """
    backbone = getattr(torchvision.models, arch)()
    backbone.fc = nn.Identity()
    if in_channels != 3:
        backbone.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.pretraining = None
    if init != "random":
        state, known = imagenet_weights(arch) if init == "imagenet" else read_weights(init)
        load_weights(backbone, state, init)
        backbone.pretraining = known
    if maxpool is None:
        maxpool = (backbone.pretraining or {}).get("maxpool", True)
    if maxpool:
        # The largest of ReLUs is the ReLU of the largest, for a quarter of the numbers: the same bits.
        backbone.maxpool, backbone.relu = nn.Sequential(backbone.maxpool, backbone.relu), nn.Identity()
    else:
        backbone.maxpool = nn.Identity()
    return backbone


def compile_backbones(method: nn.Module) -> None:
    """torch.compile the backbones of a method in place, MoCo's key encoder too: one program for each shape,
    with the pool's own backward kernel."""
    from torch._inductor import decomposition  # takes seconds

    refuse_without_compiler(next(method.parameters()).is_cuda)
    # torch 2.14 replaces that kernel by a scatter in fp32, with atomic additions; 2.10 has no such entry.
    pool = torch.ops.aten.max_pool2d_with_indices_backward.default
    decomposition.decompositions.pop(pool, None)
    decomposition.fast_random_decomps.cache_clear()  # a copy of the table
    for name in ("backbone", "key_backbone"):
        if hasattr(method, name):
            getattr(method, name).compile(dynamic=False)


def refuse_without_compiler(cuda: bool) -> None:
    """ConfigError where what torch.compile writes could not be compiled: Triton's C for a GPU, else C++."""
    variable, usual = ("CC", ["gcc", "clang"]) if cuda else ("CXX", ["g++"])
    given = os.environ.get(variable)
    compilers = shlex.split(given)[:1] if given else usual
    if not any(map(shutil.which, compilers)):
        raise ConfigError(f"--compile: there is no {' or '.join(compilers)}: install one, or leave it out")


def backbone_width(backbone: nn.Module) -> int:
    """Number of features. torchvision's ResNets keep it in `inplanes`; any other module is taken to have
    ResNet-18's 512."""
    return int(getattr(backbone, "inplanes", 512))


@contextlib.contextmanager
def ripe_statistics(backbone: nn.Module) -> Iterator[None]:
    """Within the block, BatchNorm's running statistics of a backbone that trains from scratch are
    `without_start`."""
    fresh = getattr(backbone, "pretraining", {}) is None
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    # The same for all of them, and asked once, as a GPU has to be waited for
    steps = int(norms[0].num_batches_tracked) if fresh and norms else 0
    if not steps:
        yield
        return
    kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    for norm, (mean, variance) in zip(norms, kept, strict=True):
        mean, variance = without_start(mean, variance, steps, norm.momentum)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    try:
        yield
    finally:
        for norm, (mean, var) in zip(norms, kept, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: torch.Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    rows: Sequence[int] | None = None,
    advance: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Features (N, 512) in float32 on the CPU of uint8 images (N, C, H, W), resized to `size` px and
    normalised.

    The backbone runs in eval mode and is left as it was; `dtype` is autocast's; `rows` picks images (all by
    default); `advance` hears of every batch how many images it had.
    """
    device, was_training = next(backbone.parameters()).device, backbone.training
    picked = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
    backbone.eval()
    features = []
    for batch in picked.split(BATCH):
        x = prepare(images[batch.to(images.device)].to(device), size, mean, std)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features.append(backbone(x).float().cpu())
        if advance:
            advance(len(batch))
    backbone.train(was_training)
    return torch.cat(features)


def prepare(images: torch.Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 images (N, C, H, W) -> float32 channels_last (N, C, size, size), resized (antialiased) and
    normalised."""
    x = images.float() / 255
    if x.shape[-2:] != (size, size):
        x = TF.resize(x, [size, size], antialias=True)
    mean, std = on_device(tuple(mean), x.device), on_device(tuple(std), x.device)
    return TF.normalize(x, mean, std).contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=64)
def on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """One number a channel, copied to the device once: a copy a batch would make a GPU wait."""
    return torch.tensor(values, device=device)

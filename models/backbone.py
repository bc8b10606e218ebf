"""ResNet backbones from torchvision: built, initialised from weights of several origins, and turned into
features."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional as TF

from common import WeightsError, first_line, replacing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's weights
ARCHITECTURES = {
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V2,
}
BATCH = 256  # images that go through a frozen backbone at once
METADATA_KEY = "pretraining"  # of a state dict's metadata: mean, std, size and maxpool of the pretraining

State = dict[str, torch.Tensor]


def build_backbone(
    arch: str = "resnet18", init: str = "random", in_channels: int = 3, maxpool: bool | None = None
) -> nn.Module:
    """torchvision's ResNet without its classifier: images (N, in_channels, H, W) -> features (N, 512), 2048
    for ResNet-50.

    `init` is `random`, `imagenet` or a file that `read_weights` reads. Without `maxpool` the stem halves the
    image once instead of twice, for small images; None: as the weights were pretrained. Keys and shapes are
    torchvision's.
    """
    backbone = getattr(torchvision.models, arch)()
    backbone.fc = nn.Identity()
    if in_channels != 3:
        backbone.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    about = {}
    if init == "imagenet":
        load_weights(backbone, imagenet_weights(arch), init)
    elif init != "random":
        state, about = read_weights(init)
        load_weights(backbone, state, init)
    pools = about.get("maxpool", True) if maxpool is None else maxpool
    if pools:
        # The largest of ReLUs is the ReLU of the largest, for a quarter of the numbers: the same bits.
        backbone.maxpool, backbone.relu = nn.Sequential(backbone.maxpool, backbone.relu), nn.Identity()
    else:
        backbone.maxpool = nn.Identity()
    return backbone


def compile_backbone(backbone: nn.Module) -> None:
    """torch.compile a backbone, in place: one program for each shape, with the pool's own backward kernel."""
    from torch._inductor import decomposition  # takes seconds

    # torch 2.14 replaces that kernel by a scatter in fp32, with atomic additions; 2.10 has no such entry.
    pool = torch.ops.aten.max_pool2d_with_indices_backward.default
    decomposition.decompositions.pop(pool, None)
    decomposition.fast_random_decomps.cache_clear()  # a copy of the table
    backbone.compile(dynamic=False)


def backbone_width(backbone: nn.Module) -> int:
    """Number of features. torchvision's ResNets keep it in `inplanes`; any other module is taken to have
    ResNet-18's 512."""
    return int(getattr(backbone, "inplanes", 512))


def imagenet_weights(arch: str) -> State:
    """torchvision's ImageNet-1k weights; WeightsError where they are neither in its cache nor to be
    downloaded."""
    try:
        return ARCHITECTURES[arch].get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        url = ARCHITECTURES[arch].url
        raise WeightsError(
            f"ImageNet weights of {arch} cannot be downloaded ({error}): fetch {url} elsewhere and put "
            f"it into {torch.hub.get_dir()}/checkpoints, or give the file with --init FILE"
        ) from None


def save_backbone(backbone: nn.Module, file: Path, about: dict) -> None:
    """Write backbone.pth: a state dict under torchvision's key names, whose metadata carry `about` (mean,
    std, size, maxpool), so that whoever loads it normalises as the pretraining did. torchvision loads it as
    it is."""
    state = OrderedDict((clean_key(key), value) for key, value in backbone.state_dict().items())
    state._metadata = {METADATA_KEY: about}
    with replacing(file) as partial:
        torch.save(state, partial)


def read_weights(file: str | Path) -> tuple[State, dict]:
    """(state dict of a backbone with torchvision's key names, what the file says about its pretraining).

    Reads torchvision's own files, backbone.pth and checkpoint.pt of train_ssl.py, the snapshots of the
    paper's authors (key MODEL, the layers numbered as children of a Sequential), and the checkpoints of
    official MoCo and SimSiam, solo-learn, lightly and Lightning, compiled or not. The second value holds
    mean, std, size and maxpool where the file is ours, else it is empty.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{file}: no such weights file (or give random or imagenet)") from None
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise WeightsError(f"{file}: not a readable weights file ({first_line(error)})") from None
    about = getattr(content, "_metadata", {}).get(METADATA_KEY, {})
    if isinstance(content, dict) and isinstance(content.get("about"), dict):
        about = content["about"]  # checkpoint.pt
    for key in ("MODEL", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{file}: holds no state dict of tensors")
    if not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise WeightsError(f"{file}: holds no state dict of tensors")
    return torchvision_names(content), about


def clean_key(key: str) -> str:
    """Without what torch.compile and DistributedDataParallel put into names."""
    return re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", key)


def torchvision_names(state: State) -> State:
    """The backbone among the keys of a whole method, renamed as torchvision has them; heads are dropped."""
    state = {clean_key(key): value for key, value in state.items()}
    for prefix in ("model.backbone.", "backbone.", "encoder_q.", "encoder.", "online_network.encoder."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
            break
    numbered = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    return {re.sub(r"^(\d)(?=\.)", lambda m: numbered.get(m[1], m[1]), key): v for key, v in state.items()}


def load_weights(backbone: nn.Module, state: State, source: str | Path) -> None:
    """Load `state` (a classifier `fc.*` is dropped); WeightsError names keys that are missing, unknown or of
    another shape."""
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    own = backbone.state_dict()
    wrong = [
        f"{key} is missing" for key in own if key not in state and not key.endswith("num_batches_tracked")
    ]
    wrong += [f"{key} is unknown" for key in state if key not in own]
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            wrong.append(f"{key} has shape {tuple(state[key].shape)}, not {tuple(value.shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{source}: weights do not fit the backbone: {', '.join(wrong[:3])}{more}")
    backbone.load_state_dict(own | state)


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
) -> torch.Tensor:
    """Features (N, 512) in float32 on the CPU of uint8 images (N, C, H, W), resized to `size` px and
    normalised.

    The backbone runs in eval mode and is left as it was; `dtype` is autocast's; `rows` picks images (all by
    default).
    """
    device, was_training = next(backbone.parameters()).device, backbone.training
    picked = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
    backbone.eval()
    features = []
    for batch in picked.split(BATCH):
        x = prepare(images[batch.to(images.device)].to(device), size, mean, std)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features.append(backbone(x).float().cpu())
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

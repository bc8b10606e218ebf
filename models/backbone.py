"""ResNet backbones from torchvision: built, initialised from weights of several origins, and turned into features."""

import re
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional as TF

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's weights
ARCHITECTURES = {
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V2,
}


class WeightsError(ValueError):
    """Weights that cannot be had, read or matched."""


def build_backbone(arch: str = "resnet18", init: str = "random", in_channels: int = 3) -> nn.Module:
    """torchvision's ResNet without its classifier: images (N, in_channels, H, W) -> features (N, 512), 2048 for ResNet-50.

    `init` is `random`, `imagenet` or a file that `load_weights` reads.
    """
    backbone = getattr(torchvision.models, arch)()
    backbone.fc = nn.Identity()
    if in_channels != 3:
        backbone.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    if init != "random":
        load_weights(backbone, imagenet_weights(arch) if init == "imagenet" else read_weights(init), init)
    return backbone


def imagenet_weights(arch: str) -> dict[str, torch.Tensor]:
    try:
        return ARCHITECTURES[arch].get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        url = ARCHITECTURES[arch].url
        raise WeightsError(
            f"ImageNet weights of {arch} cannot be downloaded ({error}): fetch {url} elsewhere and put "
            f"it into {torch.hub.get_dir()}/checkpoints, or give the file with --init FILE"
        ) from None


def read_weights(file: str | Path) -> dict[str, torch.Tensor]:
    """State dict of a backbone file with torchvision's key names.

    Reads torchvision's own files, backbone.pth and checkpoint.pt of train_ssl.py, and the snapshots of the paper's
    authors (key MODEL, the layers numbered as children of a Sequential).
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{file}: no such weights file (or give random or imagenet)") from None
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise WeightsError(
            f"{file}: not a readable weights file ({str(error).splitlines()[0][:120]})"
        ) from None
    for key in ("MODEL", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(v, torch.Tensor) for v in state.values())
    ):
        raise WeightsError(f"{file}: holds no state dict of tensors")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}
    if any(
        key.startswith("backbone.") for key in state
    ):  # a whole method, or an author's snapshot: heads are dropped
        state = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
    names = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    return {
        re.sub(r"^(\d)(?=\.)", lambda m: names.get(m[1], m[1]), key): value for key, value in state.items()
    }


def load_weights(backbone: nn.Module, state: dict[str, torch.Tensor], source: str | Path) -> None:
    """Load `state` (a classifier `fc.*` is dropped); keys that are missing, unknown or of another shape are refused."""
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    own = backbone.state_dict()
    wrong = (
        [f"{key} is missing" for key in own if key not in state and not key.endswith("num_batches_tracked")]
        + [f"{key} is unknown" for key in state if key not in own]
        + [
            f"{key} has shape {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ]
    )
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{source}: weights do not fit the backbone: {', '.join(wrong[:3])}{more}")
    backbone.load_state_dict(own | state)


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: torch.Tensor,
    size: int,
    mean,
    std,
    *,
    batch_size: int = 256,
    dtype: torch.dtype = torch.float32,
    rows=None,
) -> torch.Tensor:
    """Features (N, 512) in float32 on the CPU of uint8 images (N, C, H, W), resized to `size` px and normalised.

    The backbone runs in eval mode and is left as it was; `dtype` is autocast's; `rows` picks images (all by default).
    """
    parameter, was_training = next(backbone.parameters()), backbone.training
    device = parameter.device
    backbone.eval()
    features = []
    for batch in (torch.arange(len(images)) if rows is None else torch.as_tensor(rows)).split(batch_size):
        x = prepare(images[batch.to(images.device)].to(device), size, mean, std)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features.append(backbone(x).float().cpu())
    backbone.train(was_training)
    return torch.cat(features)


def prepare(images: torch.Tensor, size: int, mean, std) -> torch.Tensor:
    """uint8 images (N, C, H, W) -> float32 channels_last (N, C, size, size), resized (antialiased) and normalised."""
    x = images.float() / 255
    if x.shape[-2:] != (size, size):
        x = TF.resize(x, [size, size], antialias=True)
    return TF.normalize(x, list(mean), list(std)).contiguous(memory_format=torch.channels_last)

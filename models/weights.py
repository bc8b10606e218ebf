"""Files of weights: those of this project are written here, those of others are read."""

import argparse
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

from common import WeightsError, first_line, replacing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's weights
ARCHITECTURES = {
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V2,
}
METADATA_KEY = "pretraining"  # of a state dict's metadata: mean, std, size and maxpool of the pretraining
OF_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
TRAVELS = ("mean", "std", "size", "maxpool")
BACKBONE, HEAD = "0.", "1."  # what begins the keys in a model of transfer.py (models/saved.py)
# Where others keep a state dict
NESTED = ("MODEL", "model", "state_dict", "model_state_dict", "teacher", "net", "backbone")
PREFIXES = (  # that others put before the backbone's keys
    "model.backbone.",
    "backbone.",
    "encoder_q.",
    "encoder.",
    "base_encoder.",
    "online_network.encoder.",
    "online_encoder.net.",
    "model.",
)
NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
NUMPY_TYPES = [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
# What many save beside their weights: the flags, and the best accuracy as a NumPy number. No code runs.
HARMLESS = [argparse.Namespace, np.dtype, np.float64(0).__reduce__()[0], *NUMPY_TYPES]

State = dict[str, torch.Tensor]


def imagenet_weights(arch: str) -> tuple[State, dict]:
    """torchvision's ImageNet-1k weights, as `read_weights` gives them; WeightsError where they are neither in
    its cache nor to be downloaded."""
    try:
        return ARCHITECTURES[arch].get_state_dict(progress=True, check_hash=True), OF_IMAGENET
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
    """(state dict of a backbone with torchvision's key names, what is known of its pretraining).

    Reads torchvision's own files, backbone.pth and checkpoint.pt of train_ssl.py, the models of transfer.py,
    the snapshots of the paper's authors (the layers numbered as children of a Sequential), and the
    checkpoints of official MoCo (also v3), SimSiam and DINO (its teacher), solo-learn, lightly and Lightning,
    compiled or not. The second value holds mean, std, size and maxpool where the file is ours, mean and std
    where it is torchvision's, else nothing. WeightsError where the file is something else.
    """
    content = load_tensors(file)
    if isinstance(content, dict) and {"state", "arch", "classes"} <= content.keys():  # of transfer.py
        whole = content["state"]
        state = {key.removeprefix(BACKBONE): whole[key] for key in whole if key.startswith(BACKBONE)}
        return state, {key: content[key] for key in TRAVELS if key in content}
    about = getattr(content, "_metadata", {}).get(METADATA_KEY, {})
    from_scratch = False
    if isinstance(content, dict) and isinstance(content.get("about"), dict):  # checkpoint.pt
        about = content["about"]
        config = content.get("config")
        from_scratch = isinstance(config, dict) and config.get("init") == "random"
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{file}: holds no state dict of tensors")
    if not all(isinstance(value, torch.Tensor) for value in content.values()):
        keys = ", ".join(map(str, list(content)[:5]))
        raise WeightsError(
            f"{file}: holds no state dict of tensors, nor one under {', '.join(NESTED)}; its keys are {keys}"
        )
    state = torchvision_names(content)
    if from_scratch:
        state = ripe(state)
    if len(state.get("fc.bias", ())) == 1000:  # a classifier of ImageNet-1k
        about = OF_IMAGENET
    return state, about


def ripe(state: State) -> State:
    """The state dict with BatchNorm's running statistics `without_start`."""
    ripened = dict(state)
    for key, steps in state.items():
        norm, _, name = key.rpartition(".")
        mean, variance = f"{norm}.running_mean", f"{norm}.running_var"
        if name == "num_batches_tracked" and steps > 0 and {mean, variance} <= state.keys():
            ripened[mean], ripened[variance] = without_start(state[mean], state[variance], int(steps))
    return ripened


def without_start(
    mean: torch.Tensor, variance: torch.Tensor, steps: int, momentum: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Running statistics without their start, a mean of 0 and a variance of 1, as Adam corrects its moments
    (D. Kingma and J. Ba, 2015, Algorithm 1).

    They are averages in which each step counts `momentum`: after four steps two thirds are still the start,
    and in eval mode every image looks the same. After some hundred steps nothing changes.
    """
    start = (1 - momentum) ** steps  # the share of it
    return mean / (1 - start), ((variance - start) / (1 - start)).clamp_min(0)


def load_tensors(file: str | Path) -> object:
    """What torch.save has put into a file, without running any code of it; WeightsError where it cannot be
    read."""
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{file}: no such weights file (or give random or imagenet)") from None
    except IsADirectoryError:
        raise WeightsError(f"{file}: is a folder: give a file in it, such as backbone.pth") from None
    except OSError as error:
        raise WeightsError(f"{file}: not a readable weights file ({first_line(error)})") from None
    except Exception:  # torch.load raises whatever the damaged bytes lead to
        raise WeightsError(f"{file}: not a readable weights file: {why_unreadable(file)}") from None


def why_unreadable(file: str | Path) -> str:
    """What stands in the way of torch.load, and what to do."""
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # as damaged bytes lead to
        objects = []
    if not objects:
        return "it is cut, damaged, or not of torch.save"
    return (
        f"it holds Python objects beside tensors ({', '.join(sorted(objects)[:3])}); where you trust it, "
        "read it by torch.load(FILE, weights_only=False) and save its state dict alone"
    )


def clean_key(key: str) -> str:
    """Without what torch.compile and DistributedDataParallel put into names."""
    return re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", key)


def torchvision_names(state: State) -> State:
    """The backbone among the keys of a whole method, renamed as torchvision has them; heads are dropped."""
    state = {clean_key(key): value for key, value in state.items()}
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
            break
    return {re.sub(r"^(\d)(?=\.)", lambda m: NUMBERED.get(m[1], m[1]), key): v for key, v in state.items()}


def load_weights(backbone: nn.Module, state: State, source: str | Path) -> None:
    """Load `state` (a classifier `fc.*` is dropped). WeightsError names keys that are missing, unknown, of
    another shape, or whose numbers are not finite."""
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    own = backbone.state_dict()
    wrong = misfits(own, state)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        listed = f"{', '.join(wrong[:3])}{more}{hint_of_keys(own, state)}"
        raise WeightsError(f"{source}: weights do not fit the backbone: {listed}")
    for key, value in state.items():
        if not value.isfinite().all():
            raise WeightsError(f"{source}: {key} holds numbers that are not finite")
    backbone.load_state_dict(own | state)


def misfits(own: State, state: State) -> list[str]:
    """What keeps `state` from taking the place of `own`."""
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    wrong = [f"{key} is missing" for key in needed if key not in state]
    wrong += [f"{key} is unknown" for key in state if key not in own]
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            wrong.append(f"{key} has shape {tuple(state[key].shape)}, not {tuple(value.shape)}")
        elif key in state and value.is_floating_point() and not state[key].is_floating_point():
            wrong.append(f"{key} holds whole numbers")
    return wrong


def hint_of_keys(own: State, state: State) -> str:
    """What to do about misfits; blank where nothing is known."""
    third = "layer1.0.conv3.weight"  # of a bottleneck: ResNet-50, not ResNet-18
    if not own.keys() & state.keys():
        return f". None of its keys is torchvision's, such as {next(iter(state), 'none')}: rename them"
    if (third in state) != (third in own):
        return f": it is a {'deeper' if third in state else 'shallower'} ResNet, see --arch"
    return ""

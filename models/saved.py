"""model-TASK-DATA-INIT.pth: a backbone with the linear head of a task, from transfer.py to predict.py."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from common import WeightsError, first_line, replacing
from models.backbone import build_backbone
from models.weights import BACKBONE, HEAD, State


class Model(NamedTuple):
    """A model that is ready for images."""

    network: nn.Module  # a backbone and a linear head
    classes: list[str]
    task: str  # "fraction", or "scene": classes
    loss: str
    tile: tuple[int, int]  # height and width of the images it learned from, pixels …
    size: int  # … and their side in the network
    mean: list[float]
    std: list[float]
    device: torch.device


def whole_state(backbone: nn.Module | None, head: State) -> State:
    """Backbone and head as one nn.Sequential has them; nothing where there is no head, or no backbone, as six
    numbers an image are no model for predict.py."""
    if backbone is None or not head:
        return {}
    state = {BACKBONE + key: value for key, value in backbone.state_dict().items()}
    return state | {HEAD + key: value for key, value in head.items()}


def save_model(
    file: Path,
    state: State,
    *,
    task: str,
    classes: list[str],
    loss: str,
    arch: str,
    maxpool: bool,
    size: int,
    tile: tuple[int, int],
    mean: list[float],
    std: list[float],
    **origin: object,
) -> None:
    """Write a `whole_state` and what `load_model` needs beside it; `origin` says where it comes from.

    `tile`: height and width of the images in pixels, before they are resized to `size`.
    """
    network = {"arch": arch, "maxpool": maxpool, "size": size, "tile": list(tile), "mean": mean, "std": std}
    about = {"task": task, "classes": classes, "loss": loss}
    tensors = {key: value.cpu() for key, value in state.items()}
    with replacing(file) as partial:
        torch.save(about | network | origin | {"state": tensors}, partial)


def load_model(file: str, device: torch.device) -> Model:
    """The model on `device`, for evaluation. WeightsError if the file is none of transfer.py."""
    try:
        about = torch.load(file, map_location="cpu", weights_only=True)
        state, classes = about["state"], list(about["classes"])
        backbone = build_backbone(about["arch"], maxpool=about.get("maxpool", True))
        network = nn.Sequential(backbone, nn.Linear(state[f"{HEAD}weight"].shape[1], len(classes)))
        network.load_state_dict(state)
        network = network.eval().to(device, memory_format=torch.channels_last)
        images = (tuple(about["tile"]), about["size"], about["mean"], about["std"])
        return Model(network, classes, about["task"], about["loss"], *images, device)
    except FileNotFoundError:
        raise WeightsError(f"{file}: no such model: transfer.py --save-model writes one") from None
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        missing = isinstance(error, KeyError)  # as in backbone.pth, which has no head
        why = f"has no {error}" if missing else first_line(error, 100)
        raise WeightsError(f"{file}: not a model of transfer.py --save-model ({why})") from None


def score_of(file: Path) -> float | None:
    """The `score` of a saved model; None where there is none, or a damaged one, which the next model
    replaces."""
    try:
        return float(torch.load(file, map_location="cpu", weights_only=True)["score"])
    except Exception:  # torch.load raises whatever the damaged bytes lead to
        return None

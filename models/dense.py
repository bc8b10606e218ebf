"""Dense prediction: one convolutional pass over a scene instead of one a patch.

A backbone ends in an average over the cells of its last feature map, and a linear head commutes with an
average: the mean of the cells' logits is the patch's logit. So cells are computed once, in windows that
lie side by side, and a patch anywhere takes the mean of those it covers, each by the area that they share.

A window is as large as a patch: in larger ones the cells see more land and fewer zeros of the padding than
in training, and the map gets worse (by 15 % at two patches). Neighbouring windows overlap by a sixteenth and
fade into each other there. What a patch covers of one window gives the mean of those cells' logits; over
the windows that it touches the fractions are averaged by area, as fractions are: averaged logits are
further off. A patch that is a window gets exactly what the network says of it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

OVERLAP = 16  # windows overlap by at least a patch's side divided by this
BATCH = 1 << 18  # pixels of the windows that go through the network at once
PROBE = 64  # side of the picture that tells the size of a cell, pixels


class Windows(NamedTuple):
    """Windows along one axis of a scene, and what each gives to the patches."""

    starts: list[int]  # pixels
    side: int  # pixels
    # (patches, side) share of a patch that is a pixel of the window; sums to 1 over all
    pixels: list[np.ndarray]
    cells: list[np.ndarray]  # (patches, cells) the same of the feature map's cells


class FeatureMap(nn.Module):
    """A ResNet without its average: images (N, 3, H, W) -> (N, D, H / cell, W / cell)."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        layers = [layer for name, layer in backbone.named_children() if name not in ("avgpool", "fc")]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 3, H, W) -> features (N, D, H / cell, W / cell)."""
        return self.layers(images)


@torch.no_grad()
def cell_size(features: FeatureMap) -> int:
    """Side of a cell in pixels of the network's input: 32 for a ResNet, 16 without its max-pool."""
    device = next(features.parameters()).device
    return PROBE // features(torch.zeros(1, 3, PROBE, PROBE, device=device)).shape[-1]


def windows_along(length: int, starts: list[int], patch: int, size: int, cell: int) -> Windows:
    """Windows over `length` pixels for patches of `patch` px that begin at `starts`.

    size: side of a patch in the network's input; cell: of a cell there, pixels.
    """
    firsts = starts_of(length, patch, patch - patch // OVERLAP)
    weights = fading(length, firsts, patch, max(1, patch // OVERLAP))
    in_cell = shares_of_cells(patch, -(-size // cell))
    begins = np.array(starts)[:, None]
    pixels = []
    for first, weight in zip(firsts, weights):
        at = first + np.arange(patch)
        pixels.append(((at >= begins) & (at < begins + patch)) * weight[first : first + patch] / patch)
    return Windows(firsts, patch, pixels, [share @ in_cell for share in pixels])


def shares_of_cells(patch: int, cells: int) -> np.ndarray:
    """(patch, cells): the share of each pixel of a patch that lies in a cell. The network's average counts
    all cells alike, also the last one where a patch is no whole number of cells: so all are equally large."""
    pixels, ends = np.arange(patch)[:, None], np.arange(cells + 1) * patch / cells
    return (np.minimum(pixels + 1, ends[1:]) - np.maximum(pixels, ends[:-1])).clip(0)


def starts_of(length: int, side: int, step: int) -> list[int]:
    """Where windows begin, evenly spread, at most a step apart; the last one ends at the border."""
    count = 1 + -(-(length - side) // max(1, step))
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def fading(length: int, firsts: list[int], side: int, ramp: int) -> np.ndarray:
    """(windows, length) weights that sum to 1 at each pixel and fall towards a window's ends over `ramp`
    pixels."""
    at = np.arange(side) + 0.5
    profile = np.minimum(np.minimum(at, side - at) / ramp, 1)
    weights = np.zeros((len(firsts), length))
    for weight, first in zip(weights, firsts):
        weight[first : first + side] = profile
    return weights / weights.sum(0)


@torch.no_grad()
def cell_logits(features: FeatureMap, head: nn.Linear, images: torch.Tensor) -> np.ndarray:
    """(N, rows, columns, K) logits of the cells of normalised images (N, 3, H, W)."""
    maps = features(images).permute(0, 2, 3, 1)  # (N, h, w, D)
    return head(maps).float().cpu().numpy()


def mean_logits(rows: np.ndarray, cells: np.ndarray, columns: np.ndarray, area: np.ndarray) -> np.ndarray:
    """(n, m, K) mean logits of the cells (h, w, K) that patches cover; rows (n, h), columns (m, w): their
    shares of the patches, area (n, m): the sums of those shares."""
    across = np.einsum("hwk,bw->hbk", cells, columns)
    return np.tensordot(rows, across, 1).astype(np.float32) / area[..., None].astype(np.float32)


def used(shares: np.ndarray) -> slice:
    """Rows (patches) of a window's shares that are not all zero; they follow one another."""
    rows = np.flatnonzero(shares.any(1))
    return slice(rows[0], rows[-1] + 1) if len(rows) else slice(0, 0)

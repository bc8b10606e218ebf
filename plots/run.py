"""The pictures of one pretraining run: what the network sees, and how it learns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

import common
from plots.style import CHANCE, LOG_LABELS, PAGE, RC, STYLES

if TYPE_CHECKING:
    import torch

SHOWN = 8  # images
GAP = 2  # pixels between them
LEAST = 96  # pixels: smaller views are enlarged


def save_views(
    view1: torch.Tensor, view2: torch.Tensor, mean: list[float], std: list[float], file: Path
) -> None:
    """Eight images, a row for each view, as the network sees them but for the normalisation.

    `view1`, `view2`: (N, 3, H, W) of any float type on any device, normalised with `mean` and `std`.
    `file`: a PNG, written whole or not at all.
    """
    rows = [tiles(view, mean, std) for view in (view1, view2)]
    with common.replacing(file) as partial:
        Image.fromarray(np.concatenate(rows)).save(partial, format="png")


def tiles(view: torch.Tensor, mean: list[float], std: list[float]) -> np.ndarray:
    """The first images of a view side by side, uint8 (H', W', 3), with a black edge around each."""
    images = view[:SHOWN].float().cpu().numpy().transpose(0, 2, 3, 1)  # (n, H, W, 3)
    levels = (255 * (images * np.float32(std) + np.float32(mean))).round().clip(0, 255).astype(np.uint8)
    times = max(1, -(-LEAST // levels.shape[1]))
    large = levels.repeat(times, axis=1).repeat(times, axis=2)
    edged = np.pad(large, ((0, 0), (GAP, GAP), (GAP, GAP), (0, 0)))
    return np.concatenate(list(edged), axis=1)


def draw_curve(log: list[dict], file: Path) -> None:
    """Loss, k-NN macro F1, effective rank and images/s against the epoch, in the style of plot.py's figures.

    `log`: the rows of log.csv, None where an epoch was not measured.
    `file`: a PNG, written whole or not at all.
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(PAGE, 1.9))
        for axes, (column, label) in zip(figure.subplots(1, len(LOG_LABELS)), LOG_LABELS.items()):
            draw_column(axes, log, column, label)
        with common.replacing(file) as partial:
            figure.savefig(partial, format="png")


def draw_column(axes: matplotlib.axes.Axes, log: list[dict], column: str, label: str) -> None:
    """One column of the log; images/s from zero, so that a tremble does not look like a fall."""
    colour, marker, *_ = STYLES["barlow"]
    points = [(row["epoch"], row[column]) for row in log if row.get(column) is not None]
    axes.set_title(label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set(xticks=[], yticks=[])
        return
    epochs, values = zip(*points)
    axes.plot(epochs, values, color=colour, marker=marker, markevery=max(1, len(points) // 6))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    if column == "loss" and log[-1].get("chance_loss") is not None:
        axes.axhline(log[-1]["chance_loss"], label="at chance", **CHANCE)
        axes.legend()
    if column == "images_per_s":
        axes.set_ylim(0, 1.1 * max(values))

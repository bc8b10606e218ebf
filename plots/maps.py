"""Pictures of a scene's map: the scene, the largest class of each patch beside the true one, and each
class's fraction or probability."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import common

PANELS = 10  # classes drawn, the largest ones
COLOURS = (  # of the first ten classes: Okabe and Ito's, and two more
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442",
    "#000000", "#999999", "#882255",
)  # fmt: skip
GOLDEN = 0.618034  # of a turn of the hue, from each further class to the next: none meets another soon
OTHER = "#dddddd"  # of patches whose largest class has no panel
LARGEST = {"fraction": "largest fraction", "scene": "class"}  # task -> title of the map with a class a patch
VALUES = {"fraction": "fraction of the patch", "scene": "probability"}  # task -> what a class's panel shows


def palette(classes: int) -> list[str]:
    """A colour for each class, #rrggbb, by its number alone, so that two maps can be set side by side."""
    return [*COLOURS[:classes], *(further_colour(k) for k in range(len(COLOURS), classes))]


def further_colour(number: int) -> str:
    """Pale and strong, light and dark by turns, of hues that are far from each other."""
    hue = number * GOLDEN % 1
    saturation = (0.45, 0.8)[number % 2]
    value = (0.9, 0.65)[number // 2 % 2]
    return to_hex(hsv_to_rgb((hue, saturation, value)))


class Drawn(NamedTuple):
    """What a picture of a map shows."""

    scene: np.ndarray  # (h, w, 3) uint8, thinned
    height: int  # of the scene, pixels
    width: int
    rows: np.ndarray  # centres of the patches, pixels
    columns: np.ndarray
    found: np.ndarray  # (rows, columns, K), not finite where there are no data
    truth: np.ndarray | None  # the same, not finite where it is void
    classes: list[str]
    task: str  # "fraction", or "scene": then `found` holds the probabilities of the classes

    def amounts(self) -> np.ndarray:
        """(K,) how much of the map each class takes: its mean fraction; of scenes the share of the patches
        whose class it is."""
        held = self.found[np.isfinite(self.found).all(-1)]  # (n, K)
        if self.task == "scene":
            return np.bincount(held.argmax(1), minlength=len(self.classes)) / len(held)
        return held.mean(0)

    def shown(self) -> np.ndarray:
        """The largest classes, the largest first."""
        return np.argsort(-self.amounts(), kind="stable")[:PANELS]

    def class_maps(self) -> dict[str, np.ndarray]:
        """Title -> shares (rows, columns, K): the map, and the truth where it is known."""
        name = LARGEST[self.task]
        maps = {name: self.found}
        return maps if self.truth is None else maps | {f"{name}, truth": self.truth}


def draw_map(file: Path, drawn: Drawn) -> None:
    """The scene, the largest class of each patch with its legend, the same of the truth if it is known, and
    the fraction or probability of each of the classes that take most."""
    shown, maps, amounts = drawn.shown(), drawn.class_maps(), drawn.amounts()
    aspect = min(max(drawn.height / drawn.width, 0.3), 3)
    figure = Figure(figsize=(12, 8 * aspect + 1.5), layout="constrained")
    axes = figure.subplots(-(-(1 + len(maps) + len(shown)) // 4), 4, squeeze=False)
    draw_scene(axes.flat[0], drawn)
    for axis, (title, shares) in zip(axes.flat[1:], maps.items()):
        draw_largest(axis, drawn, shares, shown, title)
    for axis, k in zip(axes.flat[1 + len(maps) :], shown):
        mesh = draw_share(axis, drawn, k, amounts[k])
    for axis in axes.flat[1 + len(maps) + len(shown) :]:
        axis.set_axis_off()
    figure.colorbar(mesh, ax=axes, shrink=0.4, label=VALUES[drawn.task])
    save(figure, file, drawn, shown)


def draw_classes(file: Path, drawn: Drawn) -> None:
    """The scene, the truth if it is known, and the largest class of each patch side by side."""
    shown, maps = drawn.shown(), drawn.class_maps()
    aspect = min(max(drawn.height / drawn.width, 0.3), 3)
    figure = Figure(figsize=(9, 9 / (1 + len(maps)) * aspect + 0.9), layout="constrained")
    axes = figure.subplots(1, 1 + len(maps))
    draw_scene(axes[0], drawn)
    for axis, shares in zip(axes[1:], reversed(maps.values())):
        draw_largest(axis, drawn, shares, shown, "map" if shares is drawn.found else "truth")
    save(figure, file, drawn, shown, dpi=80)


def draw_scene(axis: Axes, drawn: Drawn) -> None:
    """The scene as it is, in an axis of its pixels."""
    axis.imshow(drawn.scene, extent=(0, drawn.width, drawn.height, 0))
    tidy(axis, drawn, "scene")


def draw_largest(axis: Axes, drawn: Drawn, shares: np.ndarray, shown: np.ndarray, title: str) -> None:
    """The class with the largest of shares (rows, columns, K), in its colour where it is among `shown`; blank
    without data."""
    count = len(drawn.classes)
    empty = ~np.isfinite(drawn.found + shares).all(2)
    numbers = np.ma.array(colour_numbers(shares, shown), mask=empty)
    colours = ListedColormap([*palette(count), OTHER])
    axis.pcolormesh(*edges(drawn), numbers, cmap=colours, vmin=-0.5, vmax=count + 0.5)
    tidy(axis, drawn, title)


def colour_numbers(shares: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The number of the largest of all classes (..., K); K where it is not among those `shown`."""
    largest = np.nan_to_num(shares).argmax(-1)
    return np.where(np.isin(largest, shown), largest, shares.shape[-1])


def draw_share(axis: Axes, drawn: Drawn, k: int, amount: float) -> QuadMesh:
    """Fraction or probability of class k, whose part of the whole map is `amount` (0-1); what a colour bar
    takes."""
    shares = np.ma.masked_invalid(drawn.found[..., k])
    mesh = axis.pcolormesh(*edges(drawn), shares, cmap="cividis", vmin=0, vmax=1)
    of_what = "\nof the patches" if drawn.task == "scene" else ""
    tidy(axis, drawn, f"{drawn.classes[k]}: {100 * amount:.1f} %{of_what}")
    return mesh


def edges(drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the cells' edges: half-way between the patches' centres, and the scene's borders."""
    x, y = (
        np.concatenate([[0], (centres[1:] + centres[:-1]) / 2, [length]])
        for centres, length in ((drawn.columns, drawn.width), (drawn.rows, drawn.height))
    )
    return x, y


def tidy(axis: Axes, drawn: Drawn, title: str) -> None:
    """A title, no ticks, and the scene's own shape, with row 0 on top."""
    axis.set(xticks=[], yticks=[], aspect="equal", xlim=(0, drawn.width), ylim=(drawn.height, 0), title=title)


def add_legend(figure: Figure, handles: list[Patch]) -> None:
    """Below the pictures, in as many columns as the names leave room for."""
    for columns in range(5, 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            return
        legend.remove()


def save(figure: Figure, file: Path, drawn: Drawn, shown: np.ndarray, dpi: int = 110) -> None:
    """Write the figure as a PNG, with the legend of the classes `shown` below it."""
    colours = palette(len(drawn.classes))
    handles = [Patch(color=colours[k], label=drawn.classes[k]) for k in sorted(shown)]
    if len(drawn.classes) > len(shown):
        handles.append(Patch(color=OTHER, label="another class"))
    add_legend(figure, handles)
    with common.replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=dpi)

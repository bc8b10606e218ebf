"""Fig. 3: the embeddings of every initialisation as a map, with their silhouette score."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from plots.legends import class_key
from plots.style import COLUMN, PAGE, SPARE, STYLES, name_of
from plots.tables import signed

BOX = (0.085, 0.065)  # width and height of a class's number, of the unit square


def embeddings_figure(embeddings: list[dict], points: int) -> Figure:
    """t-SNE per initialisation side by side, with the silhouette of the features (not of the map)."""
    classes, across = embeddings[0]["classes"], min(4, len(embeddings))
    down = -(-len(embeddings) // across)
    marks = class_marks(len(classes))
    handles = [Line2D([], [], color=c, marker=m, ls="none", ms=3) for c, m in marks]
    width = PAGE if across > 1 else COLUMN
    figure, panels = plt.subplots(down, across, squeeze=False, figsize=(width, 1))
    key = class_key(figure, classes, handles)
    figure.set_figheight(down * (width / across + 0.3) + key + 0.1)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    for axes, item in zip(panels.flat, embeddings):
        draw_embedding(axes, item, points, marks)
    for axes in panels.flat[len(embeddings) :]:
        axes.remove()
    return figure


def class_marks(count: int) -> list[tuple[str, str]]:
    """(colour, marker) of each class: 8 colours × 4 markers are told apart, then they repeat."""
    palette = [colour for colour, *_ in [*STYLES.values(), SPARE[0]]]
    return [(palette[i % 8], "osD^"[i // 8 % 4]) for i in range(count)]


def draw_embedding(axes: plt.Axes, item: dict, points: int, marks: list[tuple[str, str]]) -> None:
    """One panel: a random `points` of the images, each class's number at its median."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(item["labels"]))[:points])
    features, labels = item["features"][chosen], item["labels"][chosen]
    several = 1 < len(set(labels)) < len(labels)
    score = silhouette_score(features, labels) if several else float("nan")
    xy, seen = flatten(features), np.unique(labels)
    for i in seen:
        colour, marker = marks[i]
        axes.scatter(*xy[labels == i].T, s=3, color=colour, marker=marker, lw=0, rasterized=True)
    medians = np.stack([np.median(xy[labels == i], axis=0) for i in seen])
    box = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.65}
    for i, start, end in zip(seen, medians, spread(medians, *BOX)):
        axes.plot(*np.stack([start, end]).T, color="0.2", lw=0.4)
        axes.text(*end, str(i), fontsize=5, ha="center", va="center", bbox=box)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_title(f"{name_of(item['init'])}\nsilhouette {signed(score, '.3f')}")


def flatten(features: np.ndarray) -> np.ndarray:
    """t-SNE of features (n, d) to the unit square (n, 2); a collapsed network is one point.

    One thread: the order of a sum decides its last bits, and those the map.
    """
    if len(features) < 3 or np.ptp(features, axis=0).max() < 1e-9:
        return np.full((len(features), 2), 0.5)
    with threadpool_limits(1):
        tsne = TSNE(init="pca", random_state=0, perplexity=min(30, (len(features) - 1) / 3))
        points = tsne.fit_transform(features)
    return (points - points.min(axis=0)) / np.maximum(np.ptp(points, axis=0), 1e-9)


def spread(anchors: np.ndarray, width: float, height: float) -> np.ndarray:
    """Positions near the anchors (k, 2) in the unit square at which boxes of this size do not overlap."""
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ring = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    offsets = np.concatenate([np.zeros((1, 2)), *(radius * ring for radius in np.arange(0.02, 1.5, 0.02))])
    placed = np.empty((0, 2))
    for anchor in anchors:
        tries = np.clip(anchor + offsets, [width / 2, height / 2], [1 - width / 2, 1 - height / 2])
        gaps = np.abs(tries[:, None] - placed[None])  # (tries, placed, 2)
        free = ((gaps[..., 0] >= width) | (gaps[..., 1] >= height)).all(axis=1)
        placed = np.vstack([placed, tries[free.argmax()]])
    return placed

"""Numbers → the paper's figures: tidy rows and the styles of the initialisations in, a figure out."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from plots.numbers import TASKS, class_names, headline, name_of, ordered
from plots.tables import signed

COLUMN, PAGE = 3.5, 7.16  # inches: one and two columns of an IEEE page
RC = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "figure.labelsize": 7,
    "figure.titlesize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}
# Colour (Okabe and Ito's, with a grey), marker, dashes, hatch: told apart in grey by the last three.
STYLES = {
    "random": ("#8c8c8c", "s", ":", "xxxxx"),
    "channels": ("#000000", "*", (0, (6, 2)), "++++"),
    "imagenet": ("#e69f00", "^", "--", "////"),
    "barlow": ("#0072b2", "o", "-", ""),
    "moco": ("#009e73", "D", "-.", "\\\\\\\\"),
    "simclr": ("#cc79a7", "v", (0, (5, 1)), "...."),
    "simsiam": ("#56b4e9", "P", (0, (1, 1)), "----"),
}
SPARE = [
    ("#d55e00", "X", (0, (3, 1, 1, 1)), "||||"),
    ("#332288", "p", (0, (6, 2)), "++"),
    ("#882255", "<", (0, (2, 2)), "oooo"),
    ("#117733", ">", (0, (4, 1, 1, 1, 1, 1)), ".."),
]
LINES = {"linear": {"ls": "--", "mfc": "white"}, "finetune": {"ls": "-"}}
CHANCE = {"color": "0.2", "lw": 0.8, "ls": (0, (1, 2))}
LABELS = {"fraction": "RMSE (area fraction), lower is better", "scene": "macro F1, higher is better"}
# Section VI-E and Fig. 9: one V100, ResNet-18, 500 epochs of 175,381 and, supervised, of 1,281,167 images.
PAPER_HOURS = {
    "Barlow Twins, V100 (paper)": 2 * 24 + 16,
    "supervised ImageNet-1k, V100 (paper)": 59 * 24 + 15,
}


def styles_of(inits: list[str], configs: dict[str, dict]) -> dict[str, tuple]:
    """One style per initialisation, used in every figure; a run gets its method's while that is free."""
    styles, spare = {init: STYLES[init] for init in inits if init in STYLES}, 0
    for init in (i for i in inits if i not in STYLES):
        own = STYLES.get(configs.get(init, {}).get("method"))
        if own is None or own in styles.values():
            own, spare = SPARE[spare % len(SPARE)], spare + 1
        styles[init] = own
    return styles


def curves_figure(logs: pd.DataFrame, styles: dict) -> Figure:
    """Loss per method (the losses share no scale), dotted at chance; below, what all runs share."""
    methods = list(dict.fromkeys(logs.method))
    figure = plt.figure(figsize=(PAGE, 3.9))
    rows = [grid.subgridspec(1, k) for grid, k in zip(figure.add_gridspec(2, 1), (len(methods), 3))]
    panels = [(rows[0][i], logs[logs.method == m], "loss", name_of(m)) for i, m in enumerate(methods)]
    panels += [
        (rows[1][0], logs, "knn_macro_f1", "k-NN macro F1, higher is better"),
        (rows[1][1], logs, "effective_rank", "effective rank, higher is better"),
        (rows[1][2], logs, "images_per_s", "images/s, higher is faster"),
    ]
    for cell, shown, column, title in panels:
        axes = figure.add_subplot(cell, title=title, xlabel="epoch")
        axes.set_ylabel("loss, lower is better" if cell is panels[0][0] else "")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if shown[column].isna().all():
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
            axes.set(xticks=[], yticks=[])
        for run, log in shown.dropna(subset=[column]).groupby("run", sort=False):
            color, marker, dashes, _ = styles[run]
            axes.plot(
                log.epoch, log[column], color=color, ls=dashes, marker=marker, markevery=max(1, len(log) // 6)
            )
            if column == "loss":
                axes.plot(log.epoch, log.chance_loss, **CHANCE)
    keys = [
        Line2D([], [], color=styles[run][0], marker=styles[run][1], ls=styles[run][2], label=name_of(run))
        for run in logs.run.unique()
    ]
    figure.legend(
        handles=[*keys, Line2D([], [], label="loss at chance", **CHANCE)],
        loc="outside lower center",
        ncols=min(6, len(keys) + 1),
    )
    return figure


def class_key(figure: Figure, classes: list[str], handles: list | None = None) -> float:
    """The numbered class names under the figure, in as many columns as fit; returns the height they take in inches."""
    labels = [f"{i}  {name}" for i, name in enumerate(classes)]
    columns = min(5, len(classes), max(1, int(21 * figure.get_figwidth() / (6 + max(map(len, labels))))))
    figure.legend(
        handles or [Line2D([], [], ls="none") for _ in classes],
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=5.5,
        handlelength=1,
        handletextpad=0.3,
        columnspacing=1,
        labelspacing=0.3,
    )
    return 0.105 * -(-len(classes) // columns)


def spread(anchors: np.ndarray, width: float, height: float) -> np.ndarray:
    """Positions near the anchors (k, 2) in the unit square at which boxes of this size do not overlap."""
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ring = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    offsets = np.concatenate([np.zeros((1, 2)), *(radius * ring for radius in np.arange(0.02, 1.5, 0.02))])
    placed = np.empty((0, 2))
    for anchor in anchors:
        tries = np.clip(anchor + offsets, [width / 2, height / 2], [1 - width / 2, 1 - height / 2])
        gaps = np.abs(tries[:, None] - placed[None])  # tries × placed × 2
        free = ((gaps[..., 0] >= width) | (gaps[..., 1] >= height)).all(axis=1)
        placed = np.vstack([placed, tries[free.argmax()]])
    return placed


def flatten(features: np.ndarray) -> np.ndarray:
    """t-SNE to the unit square (n, 2). One thread: the order of a sum decides its last bits, and those the map."""
    if np.ptp(features, axis=0).max() < 1e-9:
        return np.full((len(features), 2), 0.5)  # a collapsed network is one point
    with threadpool_limits(1):
        tsne = TSNE(init="pca", random_state=0, perplexity=min(30, (len(features) - 1) / 3))
        points = tsne.fit_transform(features)
    return (points - points.min(axis=0)) / np.ptp(points, axis=0)


def draw_embedding(axes: plt.Axes, item: dict, points: int, marks: list[tuple[str, str]]) -> None:
    """One panel of Fig. 3: a random `points` of the images, each class's number at its median."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(item["labels"]))[:points])
    features, labels = item["features"][chosen], item["labels"][chosen]
    score = silhouette_score(features, labels) if 1 < len(set(labels)) < len(labels) else float("nan")
    xy, seen = flatten(features), np.unique(labels)
    for i in seen:
        axes.scatter(*xy[labels == i].T, s=3, color=marks[i][0], marker=marks[i][1], lw=0, rasterized=True)
    medians = np.stack([np.median(xy[labels == i], axis=0) for i in seen])
    for i, start, end in zip(seen, medians, spread(medians, 0.085, 0.065)):
        axes.plot(*np.stack([start, end]).T, color="0.2", lw=0.4)
        axes.text(
            *end,
            str(i),
            fontsize=5,
            ha="center",
            va="center",
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.65},
        )
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_title(f"{name_of(item['init'])}\nsilhouette {signed(score, '.3f')}")


def embeddings_figure(embeddings: list[dict], points: int) -> Figure:
    """Fig. 3: t-SNE per initialisation side by side, with the silhouette of the features (not of the map)."""
    classes, across = embeddings[0]["classes"], min(4, len(embeddings))
    palette = [color for color, *_ in [*STYLES.values(), SPARE[0]]]  # 8 colours × 4 markers = 32 classes
    marks = [(palette[i % 8], "osD^"[i // 8 % 4]) for i in range(len(classes))]
    figure, panels = plt.subplots(
        -(-len(embeddings) // across), across, squeeze=False, figsize=(PAGE if across > 1 else COLUMN, 1)
    )
    key = class_key(figure, classes, [Line2D([], [], color=c, marker=m, ls="none", ms=3) for c, m in marks])
    figure.set_figheight(len(panels) * (figure.get_figwidth() / across + 0.3) + key + 0.1)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    for axes, item in zip(panels.flat, embeddings):
        draw_embedding(axes, item, points, marks)
    for axes in panels.flat[len(embeddings) :]:
        axes.remove()
    return figure


def ratio_figure(summary: pd.DataFrame, task: str, styles: dict) -> Figure:
    """Figs. 4 and 6: mean over the seeds against the train ratio, with a band of one standard deviation."""
    rows = summary[(summary.metric == TASKS[task].metric) & (summary["class"] == "all")]
    figure, axes = plt.subplots(figsize=(COLUMN, 3.0))
    for (init, mode), line in rows.groupby(["init", "mode"], sort=False):
        color, marker, *_ = styles[init]
        line = line.sort_values("ratio")
        axes.plot(line.ratio, line["mean"], color=color, marker=marker, **LINES.get(mode, {}))
        low, high = line["mean"] - line["std"], line["mean"] + line["std"]
        axes.fill_between(line.ratio, low, high, color=color, alpha=0.2, lw=0)
    ratios = sorted(rows.ratio.unique())
    axes.set(xscale="log", xlabel="train ratio (% of the training images, log scale)", ylabel=LABELS[task])
    axes.set_xticks(ratios, [f"{r:g}" for r in ratios])
    axes.minorticks_off()
    axes.grid(alpha=0.3, lw=0.4)
    keys = [
        Line2D([], [], color=styles[i][0], marker=styles[i][1], label=name_of(i)) for i in ordered(rows.init)
    ]
    height = max(2, -(-len(keys) // 2))
    keys += [Line2D([], [], ls="none", label=" ")] * (
        -len(keys) % height
    )  # whole columns, then one for the modes
    keys += [
        Line2D([], [], color="0.2", marker="o", label=name_of(mode), **look)
        for mode, look in LINES.items()
        if (rows["mode"] == mode).any()
    ]
    keys += [Line2D([], [], ls="none", label=" ")] * (-len(keys) % height)
    figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=len(keys) // height,
        handlelength=2.6,
        columnspacing=1.2,
    )
    return figure


def class_figure(summary: pd.DataFrame, task: str, init: str, others: list[str], styles: dict) -> Figure:
    """Figs. 5 and 7: `init` beside each of `others`: a column per pairing, a row per ratio, two bars per class."""
    rows = headline(summary, task)
    classes, ratios = class_names(rows), sorted(rows.ratio.unique())
    bars = rows.pivot(index="class", columns=["init", "ratio"], values=["mean", "std"]).reindex(classes)
    figure, panels = plt.subplots(
        len(ratios),
        len(others),
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(PAGE if len(others) > 1 else COLUMN, 1),
    )
    figure.set_figheight(0.85 * len(ratios) + class_key(figure, classes) + 0.5)
    for (i, j), axes in np.ndenumerate(panels):
        for side, name in ((-0.2, init), (0.2, others[j])):
            if (name, ratios[i]) in bars["mean"]:
                mean, std = (bars[part][name, ratios[i]] for part in ("mean", "std"))
                axes.bar(
                    np.arange(len(classes)) + side,
                    mean,
                    0.4,
                    color=styles[name][0],
                    hatch=styles[name][3],
                    edgecolor="white",
                    lw=0.3,
                    yerr=std.fillna(0),
                    error_kw={"lw": 0.5},
                )
        axes.set_xticks(range(len(classes)), range(len(classes)), fontsize=6 if len(classes) < 15 else 5)
        axes.tick_params(axis="x", length=0)
        axes.margins(x=0.01, y=0.2)
        axes.text(
            1, 1, f"train ratio {ratios[i]:g} %", transform=axes.transAxes, ha="right", va="top", fontsize=6
        )
    for axes, other in zip(panels[0], others):
        keys = [
            plt.Rectangle(
                (0, 0), 1, 1, fc=styles[n][0], hatch=styles[n][3], ec="white", lw=0.3, label=name_of(n)
            )
            for n in (init, other)
        ]
        axes.legend(handles=keys, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axes in panels[-1]:
        axes.set_xlabel("class")
    figure.supylabel(LABELS[task].replace("macro ", ""))
    return figure


def difference_figure(gaps: pd.DataFrame, task: str, init: str, reference: str) -> Figure:
    """Fig. 8: class × ratio difference to the reference (`class_differences`), blue where better, bold at p < .05."""
    grid, p = (
        gaps.pivot(index="class", columns="ratio", values=v).reindex(gaps["class"].unique())
        for v in ("difference", "p")
    )
    limit = max(np.nanmax(np.abs(grid)), 1e-9)
    labels = [textwrap.fill(f"{i}  {name}", 28) for i, name in enumerate(grid.index)]
    lines = max(2, *(label.count("\n") + 1 for label in labels))
    figure, axes = plt.subplots(figsize=(COLUMN, 0.095 * lines * len(grid) + 0.9))
    image = axes.imshow(
        TASKS[task].sign * grid, cmap="RdBu", vmin=-1.6 * limit, vmax=1.6 * limit, aspect="auto"
    )
    for (y, x), value in np.ndenumerate(grid):
        axes.text(
            x,
            y,
            signed(value, "+.3f"),
            ha="center",
            va="center",
            fontsize=5,
            weight="bold" if p.iloc[y, x] < 0.05 else "normal",
        )
    axes.set_yticks(range(len(grid)), labels, fontsize=5.5)
    axes.set_xticks(range(grid.shape[1]), [f"{r:g}" for r in grid.columns])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    n = "–".join(f"{k:g}" for k in sorted({gaps.n.min(), gaps.n.max()}))
    figure.supxlabel(f"train ratio (%); bold: p < 0.05, paired t-test, n = {n} seeds")
    figure.suptitle(f"{name_of(TASKS[task].per_class)} of {name_of(init)} minus {name_of(reference)}")
    bar = figure.colorbar(image, fraction=0.04, aspect=25, ticks=[-1.4 * limit, 1.4 * limit])
    bar.ax.set_yticklabels(["worse", "better"], fontsize=5.5, rotation=90, va="center")
    bar.outline.set_visible(False)
    return figure


def duration(hours: float) -> str:
    """The two largest units: 64 hours are `2 d 16 h`."""
    rest, parts = round(hours * 3600), []
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, seconds)
        parts += [f"{count} {unit}"] if count or parts or unit == "s" else []
    return " ".join(parts[:2])


def time_figure(times: pd.DataFrame, styles: dict) -> Figure:
    """Fig. 9: pretraining time per run and device beside the paper's; a diamond at the time of the paper's workload."""
    names = [
        textwrap.fill(f"{name_of(t.run)}, {t.device}", 36) + f"\n{t.epochs} epochs"
        for t in times.itertuples()
    ]
    bars = [
        (
            name + f" at {t.size} px" * bool(t.size),
            t.hours,
            t.scaled_hours,
            {"color": styles[t.run][0], "hatch": styles[t.run][3], "edgecolor": "white"},
        )
        for name, t in zip(names, times.itertuples())
    ]
    bars += [
        (
            f"{label}\n500 epochs at 224 px",
            hours,
            np.nan,
            {"color": "white", "hatch": "////", "edgecolor": "0.4"},
        )
        for label, hours in PAPER_HOURS.items()
    ]
    lines = max(label.count("\n") for label, *_ in bars) + 1
    figure, axes = plt.subplots(figsize=(COLUMN, (0.1 + 0.1 * lines) * len(bars) + 0.7))
    for y, (_, hours, scaled, look) in enumerate(bars):
        axes.barh(y, hours, 0.6, lw=0.5, **look)
        if not np.isnan(scaled):
            axes.plot(scaled, y, marker="d", mfc="white", mec="black", ls="none")
            axes.annotate(
                duration(scaled), (scaled, y), (4, 0), textcoords="offset points", va="center", fontsize=5.5
            )
    axes.set_yticks(
        range(len(bars)), [f"{label}: {duration(hours)}" for label, hours, *_ in bars], fontsize=5.5
    )
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(min(hours for _, hours, *_ in bars) / 3, max(PAPER_HOURS.values()) * 3))
    figure.supxlabel("pretraining time (hours, log scale), lower is better")
    if times.scaled_hours.notna().any():
        key = Line2D([], [], marker="d", mfc="white", mec="black", ls="none")
        key.set_label("500 epochs × 175,381 images at this rate")
        figure.legend(handles=[key], loc="outside upper right")
    return figure

"""Figs. 4 to 8: tidy rows of transfer and the styles of the initialisations in, a figure out."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots.legends import class_key, in_columns, run_keys
from plots.numbers import class_names, headline
from plots.style import AMOUNTS, AXES, COLUMN, LINES, PAGE, TITLES, name_of, ordered
from plots.tables import signed
from scores import TASKS, sign_of

LABELS = {"fraction": "RMSE (area fraction), lower is better", "scene": "macro F1, higher is better"}
CLASS_LABELS = LABELS | {"scene": "F1, higher is better"}  # of one class


def label_of(metric: str, task: str) -> str:
    """The axis of a metric, with its direction."""
    if metric == TASKS[task].metric:
        return LABELS[task]
    direction = "higher" if sign_of(metric) > 0 else "lower"
    return f"{name_of(metric)}, {direction} is better"


def ratio_figure(summary: pd.DataFrame, task: str, metric: str, styles: dict[str, tuple]) -> Figure:
    """Figs. 4 and 6: mean over the seeds against the train ratio, with a band of one standard deviation."""
    rows = summary[(summary.metric == metric) & (summary["class"] == "all")]
    figure, axes = plt.subplots(figsize=(COLUMN, 3.0))
    for (init, mode), line in rows.groupby(["init", "mode"], sort=False):
        colour, marker, *_ = styles[init]
        line = line.sort_values("ratio")
        axes.plot(line.ratio, line["mean"], color=colour, marker=marker, **LINES.get(mode, {}))
        low, high = line["mean"] - line["std"], line["mean"] + line["std"]
        axes.fill_between(line.ratio, low, high, color=colour, alpha=0.2, lw=0)
    ratios = sorted(rows.ratio.unique())
    axes.set(
        xscale="log",
        xlabel=AXES[rows.unit.iloc[0]],
        ylabel=label_of(metric, task),
    )
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.grid(alpha=0.3, lw=0.4)
    modes = [mode for mode in LINES if (rows["mode"] == mode).any()]
    looks = [Line2D([], [], color="0.2", marker="o", label=name_of(mode), **LINES[mode]) for mode in modes]
    keys, columns = in_columns(run_keys(ordered(rows.init), styles, dashed=False), looks)
    figure.set_figheight(3.0 + 0.14 * max(0, len(keys) // columns - 3))
    figure.legend(
        handles=keys, loc="outside lower center", ncols=columns, handlelength=2.6, columnspacing=1.2
    )
    return figure


# Figs. 5 and 7


def class_figure(
    summary: pd.DataFrame, task: str, init: str, others: list[str], styles: dict[str, tuple]
) -> Figure:
    """`init` beside each of `others`: a column per pairing, a row per ratio, two bars per class."""
    rows = headline(summary, task)
    classes, ratios = class_names(rows), sorted(rows.ratio.unique())
    bars = rows.pivot(index="class", columns=["init", "ratio"], values=["mean", "std"]).reindex(classes)
    width = PAGE if len(others) > 1 else COLUMN
    shape = {"squeeze": False, "sharex": True, "sharey": True, "figsize": (width, 1)}
    figure, panels = plt.subplots(len(ratios), len(others), **shape)
    key = class_key(figure, classes)
    height = 0.85 * len(ratios) + key + 0.5
    figure.set_figheight(height)
    for (row, column), axes in np.ndenumerate(panels):
        pair = {init: -0.2, others[column]: 0.2}  # middle of each bar, of the space between two classes
        draw_bars(axes, bars, ratios[row], pair, styles)
        amount = AMOUNTS[rows.unit.iloc[0]].format(ratios[row])
        axes.text(1, 1, amount, transform=axes.transAxes, ha="right", va="top", fontsize=6)
    for axes, other in zip(panels[0], others):
        keys = [
            plt.Rectangle((0, 0), 1, 1, label=name_of(name), **bar_look(styles[name]))
            for name in (init, other)
        ]
        axes.legend(handles=keys, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axes in panels[-1]:
        axes.set_xlabel("class")
    middle = (key + height + 0.2) / 2  # of the panels, inches: their axis and the key are below them
    figure.supylabel(CLASS_LABELS[task], y=middle / height)
    return figure


def draw_bars(
    axes: plt.Axes, bars: pd.DataFrame, ratio: float, pair: dict[str, float], styles: dict[str, tuple]
) -> None:
    """One panel: the classes at one ratio, with a whisker of one standard deviation."""
    count = len(bars)
    for name, shift in pair.items():
        if (name, ratio) not in bars["mean"]:
            continue
        mean, std = (bars[part][name, ratio] for part in ("mean", "std"))
        whiskers = {"yerr": std.fillna(0), "error_kw": {"lw": 0.5}}
        axes.bar(np.arange(count) + shift, mean, 0.4, **bar_look(styles[name]), **whiskers)
    axes.set_xticks(range(count), range(count), fontsize=6 if count < 15 else 5)
    axes.tick_params(axis="x", length=0)
    axes.margins(x=0.01, y=0.2)


def bar_look(style: tuple) -> dict:
    """What matplotlib's bars take of an entry of STYLES."""
    colour, _, _, hatch = style
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "lw": 0.3}


# Fig. 8


def difference_figure(gaps: pd.DataFrame, task: str, init: str, reference: str) -> Figure:
    """Class × ratio difference to the reference (`class_differences`), blue where better, bold at p < .05."""
    grid, p = (
        gaps.pivot(index="class", columns="ratio", values=column).reindex(gaps["class"].unique())
        for column in ("difference", "p")
    )
    labels = [textwrap.fill(f"{i}  {name}", 28) for i, name in enumerate(grid.index)]
    lines = max(2, *(label.count("\n") + 1 for label in labels))
    figure, axes = plt.subplots(figsize=(COLUMN, 0.095 * lines * len(grid) + 0.9))
    limit = max(np.nanmax(np.abs(grid)), 1e-9)
    scale = {"cmap": "RdBu", "vmin": -1.6 * limit, "vmax": 1.6 * limit}
    image = axes.imshow(TASKS[task].sign * grid, aspect="auto", **scale)
    for (y, x), value in np.ndenumerate(grid):
        weight = "bold" if p.iloc[y, x] < 0.05 else "normal"
        axes.text(x, y, signed(value, "+.3f"), ha="center", va="center", fontsize=5, weight=weight)
    axes.set_yticks(range(len(grid)), labels, fontsize=5.5)
    axes.set_xticks(range(grid.shape[1]), [f"{ratio:g}" for ratio in grid.columns])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    n = "–".join(f"{count:g}" for count in sorted({gaps.n.min(), gaps.n.max()}))
    figure.supxlabel(f"{TITLES[gaps.unit.iloc[0]].lower()}; bold: p < 0.05, paired t-test, n = {n} seeds")
    figure.suptitle(f"{name_of(TASKS[task].per_class)} of {name_of(init)} minus {name_of(reference)}")
    bar = figure.colorbar(image, fraction=0.04, aspect=25, ticks=[-1.4 * limit, 1.4 * limit])
    bar.ax.set_yticklabels(["worse", "better"], fontsize=5.5, rotation=90, va="center")
    bar.outline.set_visible(False)
    return figure

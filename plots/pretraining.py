"""Figures of pretraining runs: learning curves, Fig. 9 (times), and quality against seconds."""

import textwrap
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from common import counted
from plots.legends import run_keys
from plots.numbers import LEVELS
from plots.style import CHANCE, COLUMN, LOG_LABELS, PAGE, PAPER_EPOCHS, PAPER_IMAGES, name_of

# Section VI-E and Fig. 9: one V100, ResNet-18, 500 epochs of 175,381 and, supervised, of 1,281,167 images.
PAPER_HOURS = {
    "Barlow Twins, V100 (paper)": 2 * 24 + 16,
    "supervised ImageNet-1k, V100 (paper)": 59 * 24 + 15,
}
UNITS = {"d": 86_400, "h": 3_600, "min": 60, "s": 1}  # seconds


# Learning curves


def curves_figure(logs: pd.DataFrame, styles: dict[str, tuple]) -> Figure:
    """Loss per method (the losses share no scale), dotted at chance; below, what all runs share."""
    methods = list(dict.fromkeys(logs.method))
    figure = plt.figure(figsize=(PAGE, 3.9))
    above, below = figure.add_gridspec(2, 1)
    losses, shared = above.subgridspec(1, len(methods)), below.subgridspec(1, len(LOG_LABELS) - 1)
    for place, method in enumerate(methods):
        axes = figure.add_subplot(losses[place], title=name_of(method))
        axes.set_ylabel("" if place else LOG_LABELS["loss"])
        draw_curves(axes, logs[logs.method == method], "loss", styles)
    for place, column in enumerate(list(LOG_LABELS)[1:]):
        axes = figure.add_subplot(shared[place], title=LOG_LABELS[column])
        draw_curves(axes, logs, column, styles)
    keys = run_keys(list(logs.run.unique()), styles)
    keys.append(Line2D([], [], label="loss at chance", **CHANCE))
    figure.legend(handles=keys, loc="outside lower center", ncols=min(6, len(keys)))
    return figure


def draw_curves(axes: plt.Axes, logs: pd.DataFrame, column: str, styles: dict[str, tuple]) -> None:
    """One column of the logs against the epoch, a line per run."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if logs[column].isna().all():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set(xticks=[], yticks=[])
        return
    for run, log in logs.dropna(subset=[column]).groupby("run", sort=False):
        colour, marker, dashes, _ = styles[run]
        every = max(1, len(log) // 6)
        axes.plot(log.epoch, log[column], color=colour, ls=dashes, marker=marker, markevery=every)
        if column == "loss":
            axes.plot(log.epoch, log.chance_loss, **CHANCE)
    if column == "images_per_s":
        axes.set_ylim(0, 1.1 * logs[column].max())


# Quality against seconds


def quality_figure(timed: pd.DataFrame, column: str, styles: dict[str, tuple]) -> Figure:
    """How good a backbone is after how many seconds (`quality_over_time`), a dotted line at each level."""
    runs = list(timed.run.unique())
    keys_below = -(-len(runs) // 2)  # rows of the legend, which many runs make high
    figure, axes = plt.subplots(figsize=(COLUMN, 2.4 + 0.15 * max(4, keys_below)))
    for run, rows in timed.groupby("run", sort=False):
        colour, marker, dashes, _ = styles[run]
        every = max(1, len(rows) // 8)
        axes.plot(rows.seconds, rows.quality, color=colour, ls=dashes, marker=marker, markevery=every)
    low, high = axes.get_ylim()
    for level in LEVELS:
        if low < level < high + 0.05:
            axes.axhline(level, **CHANCE)
    axes.set(
        xscale="log",
        xlabel="training time (seconds, log scale)",
        ylabel=f"{name_of(column)}, higher is better",
    )
    plain_log(axes)
    axes.grid(alpha=0.3, lw=0.4)
    figure.legend(handles=run_keys(runs, styles), loc="outside lower center", ncols=min(2, len(runs)))
    return figure


def plain_log(axes: plt.Axes) -> None:
    """Numbers as people write them below a logarithmic x axis, close enough and not too close."""
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 100 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


# Fig. 9


class Bar(NamedTuple):
    """One bar of Fig. 9."""

    label: str
    hours: float
    scaled: float  # hours for the paper's workload at this rate; NaN where it is not comparable
    look: dict


def time_figure(times: pd.DataFrame, styles: dict[str, tuple]) -> Figure:
    """Pretraining time per run and device beside the paper's; a diamond where the paper's workload ends."""
    bars = [run_bar(run, styles[run.run]) for run in times.itertuples()] + paper_bars()
    lines = max(bar.label.count("\n") for bar in bars) + 1
    figure, axes = plt.subplots(figsize=(COLUMN, (0.1 + 0.1 * lines) * len(bars) + 0.7))
    for y, bar in enumerate(bars):
        axes.barh(y, bar.hours, 0.6, lw=0.5, **bar.look)
        if not np.isnan(bar.scaled):
            axes.plot(bar.scaled, y, marker="d", mfc="white", mec="black", ls="none")
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(duration(bar.scaled), (bar.scaled, y), fontsize=5.5, **place)
    labels = [f"{bar.label}: {duration(bar.hours)}" for bar in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=5.5)
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(min(bar.hours for bar in bars) / 3, max(PAPER_HOURS.values()) * 3))
    plain_log(axes)
    figure.supxlabel("pretraining time (hours, log scale), lower is better")
    if times.scaled_hours.notna().any():
        key = Line2D([], [], marker="d", mfc="white", mec="black", ls="none")
        key.set_label(f"{PAPER_EPOCHS} epochs × {PAPER_IMAGES:,} images at this rate")
        figure.legend(handles=[key], loc="outside upper right")
    return figure


def run_bar(run: NamedTuple, style: tuple) -> Bar:
    """The bar of a row of `training_times`."""
    colour, _, _, hatch = style
    name = textwrap.fill(f"{name_of(run.run)}, {run.device}", 36)
    size = f" at {run.size} px" if run.size else ""
    look = {"color": colour, "hatch": hatch, "edgecolor": "white"}
    return Bar(f"{name}\n{counted(int(run.epochs), 'epoch')}{size}", run.hours, run.scaled_hours, look)


def paper_bars() -> list[Bar]:
    """The paper's own hours, which have no speed to go with them."""
    look = {"color": "white", "hatch": "////", "edgecolor": "0.4"}
    return [
        Bar(f"{label}\n500 epochs at 224 px", hours, float("nan"), look)
        for label, hours in PAPER_HOURS.items()
    ]


def duration(hours: float) -> str:
    """The two largest units: 64 hours are `2 d 16 h`."""
    rest, parts = round(hours * 3600), []
    for unit, seconds in UNITS.items():
        count, rest = divmod(rest, seconds)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])

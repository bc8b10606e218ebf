"""Tidy rows → the epoch that counts, means over the seeds, paired tests, and times. Needs no torch."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ttest_rel

import scores
from common import counted
from plots.reading import MEAN_OVER, note, settings_part, way_of
from plots.style import MEAN, PAPER_MEAN, SHARE, ordered, ordered_modes
from scores import TASKS
from scores.choice import SETTING

QUALITY = ["knn5_accuracy", "knn_macro_f1"]  # columns of log.csv that tell how good a backbone is, best first
WAY = ["task", "data", "unit", "mode", *SETTING]  # how the cells of one mode were trained
EQUAL = 1e-12  # means closer than this are one number, but for rounding
LEVELS = [0.6, 0.7, 0.8]  # of the quality, for the seconds it takes to reach them


# The rows that count


def at_chosen_epoch(results: pd.DataFrame) -> pd.DataFrame:
    """Test rows at the epoch that `scores.at_chosen_epoch` gives each cell.

    Where a cell was run in several settings, the one that most cells of its mode share counts, so that like
    is compared with like; then the one with the most seeds, then the best on validation.
    """
    cells = results.groupby(["init", "ratio", "seed"]).ngroup()
    results = results.assign(
        sharing=cells.groupby([results[c] for c in WAY], dropna=False).transform("nunique")
    )
    kept, several = [results.iloc[:0]], 0
    for (task, *_), cell in results.groupby(MEAN_OVER, sort=False):
        settings = [run for _, run in cell.groupby("setting")]
        several += len(settings) > 1
        run = max(settings, key=lambda run: rank_of(run, task))
        chosen = scores.at_chosen_epoch(run, task)
        kept.append(chosen[chosen.split == "test"])
    if several:
        note(
            f"{counted(several, 'cell')} run with several settings: that of the most cells counts, then the "
            "most seeds, then the best validation"
        )
    note_other_weights(results)
    test = pd.concat(kept)
    note_unlike(test)
    return test


def note_other_weights(results: pd.DataFrame) -> None:
    """Say which name stands for other weights in another folder of results: what is drawn joins them."""
    for (data, init), rows in results.groupby(["data", "init"], sort=False):
        known = {out: settings_part(out, f"init {init}").get("weights") for out in rows.out.unique()}
        folders = {weights: out for out, weights in known.items() if weights}
        if len(folders) > 1:
            note(
                f"{init} on {data} stands for other weights in {' than in '.join(folders.values())}, and "
                "both are drawn under it: give --results of one of them, or name the run directories apart"
            )


def note_unlike(test: pd.DataFrame) -> None:
    """Say in what initialisations that are compared with each other were trained in different ways."""
    for (task, data, mode), rows in test.groupby(["task", "data", "mode"], sort=False):
        made = {out: way_of(out, task, mode) for out in set(rows.out)}
        ways = rows[SETTING].map("{:g}".format, na_action="ignore")
        for name in sorted({name for way in made.values() for name in way} - {"size"}):
            ways[name] = [str(made[out][name]) if name in made[out] else None for out in rows.out]
        side_by_side = ways.groupby([rows.unit, rows.ratio])
        unlike = [name for name in ways if (side_by_side[name].nunique() > 1).any()]  # of what is known
        if unlike:
            listed = "; ".join(f"{name} {' and '.join(ways[name].dropna().unique())}" for name in unlike)
            note(f"{task} {data} {mode}: initialisations side by side were trained unlike: {listed}")


def rank_of(run: pd.DataFrame, task: str) -> tuple:
    """What decides between the settings of a cell: the largest."""
    return run.sharing.max(), run.seed.nunique(), best_validation(run, task), run.setting.max()


def best_validation(run: pd.DataFrame, task: str) -> float:
    """Mean over the seeds of their best value on val, signed so that higher is better; -inf without val
    rows."""
    goal = TASKS[task]
    val = run[(run.split == "val") & (run.metric == goal.metric) & (run["class"] == "all")]
    return (goal.sign * val.value).groupby(val.seed).max().mean() if len(val) else -np.inf


def over_seeds(test: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation (n - 1 in the denominator) and n over the seeds of every number."""
    groups = test.groupby([*MEAN_OVER, "metric", "class"], sort=False).value
    return groups.agg(mean="mean", std="std", n="count").reset_index()


def class_names(rows: pd.DataFrame) -> list[str]:
    """The classes in the order of the results file, without `all`."""
    return [name for name in rows["class"].unique() if name != "all"]


def headline(rows: pd.DataFrame, task: str) -> pd.DataFrame:
    """The task's overall metric (class `all`) and its per-class parts, nothing else."""
    goal, overall = TASKS[task], rows["class"] == "all"
    return rows[(rows.task == task) & (rows.metric == np.where(overall, goal.metric, goal.per_class))]


# Differences


def baselines_of(inits: Iterable[str], reference: str | None) -> list[str]:
    """What others are measured against: the reference first, then ImageNet and random weights."""
    return [init for init in dict.fromkeys([reference, "imagenet", "random"]) if init in set(inits)]


def paired_p(a: np.ndarray, b: np.ndarray) -> float:
    """p of the two-sided paired t-test; NaN where undefined (fewer than two pairs, or all differences
    equal)."""
    return float(ttest_rel(a, b).pvalue) if len(a) > 1 and np.ptp(a - b) > EQUAL else float("nan")


class Pair(NamedTuple):
    """Two initialisations in one mode; values: seeds × (ratio, class)."""

    init: str
    baseline: str
    ours: pd.DataFrame
    theirs: pd.DataFrame


def comparison(test: pd.DataFrame, task: str, reference: str | None) -> pd.DataFrame:
    """Each initialisation against each baseline, per mode and train ratio, over the `n` seeds that both have.

    Ratio `mean` averages the common ratios first, `mean without 1 %` those of the paper's tables, which are
    also those of the averages in its text; `ratios` lists them. `improvement` is in % of the baseline,
    positive where better; `wins` and `ties` of `cells` count the class × ratio means that are better and
    equal (the paper has 60 cells, with 1 %); `class_difference` is their mean absolute difference (without
    1 %, of Barlow Twins to ImageNet-1k, .0053 and .0308 in the paper's Section VI-C).
    """
    rows, lines = headline(test, task), []
    unit = rows.unit.iloc[0] if len(rows) else SHARE
    for mode in ordered_modes(rows["mode"]):
        part = rows[rows["mode"] == mode]
        for pair in pairs_of(part, ordered(rows.init), baselines_of(rows.init, reference)):
            for ratio, averaged in ratios_of(pair, unit):
                named = {"mode": mode, "ratio": ratio, "init": pair.init, "baseline": pair.baseline}
                about = {"unit": unit, "ratios": " ".join(f"{one:g}" for one in averaged)}
                lines.append(named | versus(pair, averaged, TASKS[task].sign) | about)
    return pd.DataFrame(lines)


def pairs_of(rows: pd.DataFrame, inits: list[str], baselines: list[str]) -> list[Pair]:
    """Every initialisation beside every baseline that does not come before it, where both have values."""
    values = {
        init: cells.pivot(index="seed", columns=["ratio", "class"], values="value")
        for init, cells in rows.groupby("init")
    }
    pairs = []
    for place, base in enumerate(baselines):
        for init in inits:
            if init not in baselines[: place + 1] and init in values and base in values:
                pairs.append(Pair(init, base, values[init], values[base]))
    return pairs


def ratios_of(pair: Pair, unit: str) -> list[tuple[float | str, list[float]]]:
    """(name, ratios to average): each ratio that both have, then all of them where there are several, then
    all but 1 %."""
    common = pair.ours.columns.intersection(pair.theirs.columns)
    ratios = sorted(ratio for ratio, name in common if name == "all")
    means = [(MEAN, ratios)]
    if unit == SHARE and 1 in ratios:
        means.append((PAPER_MEAN, [ratio for ratio in ratios if ratio != 1]))
    return [(ratio, [ratio]) for ratio in ratios] + [mean for mean in means if len(mean[1]) > 1]


def averaged_ratios(lines: pd.DataFrame) -> dict[str, list[str]]:
    """Mean of a `comparison` → the ratios that its rows average, as text; several where pairs differ."""
    means = lines[lines.ratio.isin([MEAN, PAPER_MEAN])]
    return {name: list(rows.ratios.unique()) for name, rows in means.groupby("ratio")}


def versus(pair: Pair, ratios: list[float], sign: int) -> dict:
    """The numbers of one line of `comparison`, over the mean of these ratios."""
    overall = [(ratio, "all") for ratio in ratios]
    a = pair.ours[overall].dropna().mean(axis=1)
    b = pair.theirs[overall].dropna().mean(axis=1)
    seeds = a.index.intersection(b.index)
    a, b = a[seeds], b[seeds]  # NaN means where no seed is common
    gap = pair.ours.loc[seeds][ratios].mean() - pair.theirs.loc[seeds][ratios].mean()
    gap = gap.drop("all", level=1).dropna()
    return {
        "value": a.mean(),
        "baseline_value": b.mean(),
        "difference": (a - b).mean(),
        "improvement": 100 * sign * (a - b).mean() / b.mean() if b.mean() else np.nan,
        "wins": int((sign * gap > EQUAL).sum()),
        "ties": int((gap.abs() <= EQUAL).sum()),
        "cells": len(gap),
        "class_difference": gap.abs().mean(),
        "n": len(seeds),
        "p": paired_p(a.to_numpy(), b.to_numpy()),
    }


def class_differences(test: pd.DataFrame, task: str, init: str, reference: str) -> pd.DataFrame:
    """Mean difference, n and p per class and ratio over the seeds that both have."""
    rows, lines = headline(test, task), []
    parts = rows[rows["class"] != "all"]
    values = parts.pivot(index=["class", "ratio", "seed"], columns="init", values="value")
    both = values.reindex(columns=[init, reference]).dropna()
    for (name, ratio), cell in both.groupby(level=["class", "ratio"]):
        a, b = cell[init].to_numpy(), cell[reference].to_numpy()
        named = {"class": name, "ratio": ratio, "unit": rows.unit.iloc[0]}
        lines.append(named | {"difference": (a - b).mean(), "n": len(a), "p": paired_p(a, b)})
    place = {name: i for i, name in enumerate(class_names(rows))}
    return pd.DataFrame(sorted(lines, key=lambda line: (place[line["class"]], line["ratio"])))


# Times


def training_times(logs: pd.DataFrame, configs: dict[str, dict], images: int) -> pd.DataFrame:
    """Hours of each run; `scaled_hours` for `images` images at its rate, where they are 224 px wide as the
    paper's."""
    lines = []
    for run, log in logs.groupby("run", sort=False):
        log, config = log.dropna(subset=["seconds"]), configs[run]
        hours = log.seconds.sum() / 3600
        if not hours:
            continue
        # Epochs have the same images, so the mean of their times counts
        rate = 1 / (1 / log.images_per_s).mean()
        comparable = str(config.get("size")) == "224" and rate > 0
        line = {
            "run": run,
            "device": str(config.get("device_name") or config.get("device") or "unknown device"),
            "size": str(config.get("size") or ""),
            "epochs": len(log),
            "hours": hours,
            "scaled_hours": images / rate / 3600 if comparable else float("nan"),
        }
        lines.append(line)
    return pd.DataFrame(lines)


def quality_over_time(logs: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """(column, rows run, epoch, seconds, quality): how good each run's backbone was after how many seconds.

    The column is the one of QUALITY that most runs have; `seconds` sums those of all epochs so far. A run in
    which an epoch has none is left out, as its time is not known.
    """
    having = logs.groupby("run")[QUALITY].count().gt(0).sum()  # runs of each column
    column = max(QUALITY, key=having.get)
    parts = [pd.DataFrame(columns=["run", "epoch", "seconds", "quality"])]
    for run, log in logs.groupby("run", sort=False):
        log = log.sort_values("epoch")
        if log[column].isna().all():
            note(f"{run}: log.csv has no {column}: left out of the time to quality")
            continue
        if log.seconds.isna().any():
            note(f"{run}: an epoch without seconds: left out of the time to quality")
            continue
        timed = pd.DataFrame(
            {"run": run, "epoch": log.epoch, "seconds": log.seconds.cumsum(), "quality": log[column]}
        )
        parts.append(timed.dropna(subset=["quality"]))
    return column, pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)


def time_to_quality(timed: pd.DataFrame) -> pd.DataFrame:
    """A row per run and level: the seconds until a measured epoch reached it (NaN: none did), and the
    best."""
    lines = []
    for run, rows in timed.groupby("run", sort=False):
        best = rows.loc[rows.quality.idxmax()]
        for level in LEVELS:
            reached = rows.seconds[rows.quality >= level]
            line = {"run": run, "level": level, "seconds": reached.min() if len(reached) else float("nan")}
            line |= {
                "best": best.quality,
                "seconds_to_best": best.seconds,
                "total_seconds": rows.seconds.max(),
            }
            lines.append(line)
    return pd.DataFrame(lines)

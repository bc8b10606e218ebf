"""Files written by the other scripts → tidy DataFrames → means and paired tests. Needs no torch."""

import re
import sys
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from scipy.stats import ttest_rel

METHODS = ["barlow", "moco", "simclr", "simsiam"]
NAMES = {
    "random": "Random",
    "channels": "Channel statistics",
    "imagenet": "ImageNet-1k",
    "barlow": "Barlow Twins",
    "moco": "MoCo v2",
    "simclr": "SimCLR",
    "simsiam": "SimSiam",
    "linear": "linear probing",
    "finetune": "fine-tuning",
    "rmse": "RMSE",
    "f1": "F1",
    "f1_micro": "Micro F1",
    "f1_macro": "Macro F1",
    "f1_weighted": "Weighted F1",
}
F1 = ["f1_micro", "f1_macro", "f1_weighted"]
CELL = ["task", "data", "init", "mode", "ratio"]  # what the seeds are averaged over
SETTING = ["lr", "momentum", "weight_decay", "epochs", "batch_size"]


class Task(NamedTuple):
    metric: str  # over all classes; its best validation value chooses the epoch
    per_class: str
    overall: list[str]  # columns of the class-wise table before the classes
    sign: int  # +1 where higher is better


TASKS = {"fraction": Task("rmse", "rmse", ["rmse"], -1), "scene": Task("f1_macro", "f1", F1, +1)}


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def name_of(key: str) -> str:
    return NAMES.get(key, key)


def stem_of(text: str) -> str:
    """`text` as a file name on any system."""
    return re.sub(r"[^\w.-]+", "_", text)


def ordered(inits: Iterable[str]) -> list[str]:
    """Each name once: what is not pretrained here, the four methods, then the others by name."""
    first = ["random", "channels", "imagenet", *METHODS]
    return sorted(
        dict.fromkeys(inits), key=lambda init: (first.index(init) if init in first else len(first), init)
    )


def read_csv(path: Path, text: list[str], numbers: list[str], optional: list[str]) -> pd.DataFrame:
    """Rows of a CSV; a row with a missing or unreadable field is named with its line and left out.

    `text` and `numbers` must be there and filled; `optional` numbers may be empty or absent.
    """
    nothing = pd.DataFrame(columns=text + numbers + optional)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = pd.read_csv(
                path,
                dtype=str,
                keep_default_na=False,
                index_col=False,
                skip_blank_lines=False,
                on_bad_lines="warn",
            ).fillna("")
    except (OSError, ValueError) as error:
        warn(f"{path}: {error}")
        return nothing
    if absent := [name for name in text + numbers if name not in rows]:
        warn(f"{path}: no column {', '.join(absent)}: file left out")
        return nothing
    faults = {
        int(line): what for w in caught for line, what in re.findall(r"line (\d+): (.*)", str(w.message))
    }
    rows.index = np.setdiff1d(
        np.arange(2, len(rows) + len(faults) + 2), list(faults)
    )  # line numbers in the file
    rows = rows[(rows != "").any(axis=1)]
    for name in [*text, *numbers, *(o for o in optional if o in rows)]:
        raw = rows[name].str.strip()
        if name not in text:
            rows[name] = pd.to_numeric(raw, errors="coerce").astype(float)
            wrong = raw[rows[name].isna() & ~raw.str.lower().isin(["", "nan"])]
            faults |= {line: f"{name} '{value}' is not a number" for line, value in wrong.items()}
        if name not in optional:
            faults |= {line: f"{name} is empty" for line in raw.index[raw == ""]}
    for line in sorted(faults)[:20]:
        warn(f"{path}:{line}: {faults[line]}: row left out")
    if len(faults) > 20:
        warn(f"{path}: {len(faults) - 20} more rows left out")
    return rows.drop(index=rows.index.intersection(list(faults)))


def read_results(paths: list[Path]) -> pd.DataFrame:
    """All rows of the results files, a number for the setting in `setting`; of a repeated row the last one counts."""
    text = ["task", "init", "mode", "split", "metric", "class"]
    numbers, optional = ["ratio", "seed", "value"], ["epoch", "images", *SETTING]
    columns = [*text, "data", *numbers, *optional]
    files = [
        read_csv(path, text, numbers, optional).reindex(columns=columns).assign(out=path.parent.as_posix())
        for path in paths
    ]
    rows = pd.concat([pd.DataFrame(columns=columns), *files]).astype(dict.fromkeys(numbers + optional, float))
    if strange := sorted(set(rows.task) - set(TASKS)):
        warn(f"rows of unknown tasks left out: {', '.join(strange)}")
    rows = rows[rows.task.isin(list(TASKS))].reset_index(drop=True)
    rows["data"] = rows.data.fillna("").map(lambda folder: Path(folder).name or "built-in")
    rows["epoch"] = rows.epoch.fillna(0)
    rows["weight_decay"] = rows.weight_decay.mask(
        rows.lr == 0, 0
    )  # of a head that was solved for it is an outcome
    rows["setting"] = rows.groupby(SETTING, dropna=False).ngroup()
    once = rows.drop_duplicates([*CELL, "seed", "setting", "epoch", "split", "metric", "class"], keep="last")
    if len(once) < len(rows):
        warn(f"{len(rows) - len(once)} results stand more than once: the last one counts")
    return once


def read_runs(folders: list[Path]) -> tuple[dict[str, dict], pd.DataFrame]:
    """Configurations by run name, and the logs: one row per run and epoch."""
    optional = ["loss", "chance_loss", "knn_macro_f1", "effective_rank", "images_per_s", "seconds"]
    configs, logs = {}, []
    for folder in (f for f in folders if (f / "log.csv").exists()):
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            warn(f"{folder / 'config.yaml'}: {' '.join(str(error).split())}: flags unknown")
            config = None
        config = config if isinstance(config, dict) else {}
        run = folder.name if folder.name not in configs else folder.as_posix()
        configs[run] = {**config, "folder": folder.as_posix(), "method": str(config.get("method", run))}
        log = read_csv(folder / "log.csv", [], ["epoch"], optional).drop_duplicates("epoch", keep="last")
        logs.append(log.reindex(columns=["epoch", *optional]).assign(run=run, method=configs[run]["method"]))
    empty = pd.DataFrame(columns=["epoch", *optional, "run", "method"])
    return configs, pd.concat([log for log in logs if len(log)] or [empty], ignore_index=True)


def read_embeddings(paths: list[Path]) -> list[dict]:
    """features (n, d), labels (n,), classes and init of each file; images without a label are dropped."""
    found = []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                kept = arrays["labels"] >= 0
                features, labels = arrays["features"][kept].astype(np.float64), arrays["labels"][kept]
                found.append(
                    {
                        "init": str(arrays["init"]),
                        "classes": [str(c) for c in arrays["classes"]],
                        "features": features,
                        "labels": labels,
                    }
                )
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            warn(f"{path}: {error}: embeddings left out")
    order = ordered(item["init"] for item in found)
    return sorted(found, key=lambda item: order.index(item["init"]))


def validation(cell: pd.DataFrame, task: str) -> pd.DataFrame:
    """Epochs × seeds of the metric that chooses, signed so that higher is better."""
    val = cell[(cell.split == "val") & (cell.metric == TASKS[task].metric) & (cell["class"] == "all")]
    return TASKS[task].sign * val.pivot(index="epoch", columns="seed", values="value")


def at_chosen_epoch(results: pd.DataFrame) -> pd.DataFrame:
    """Test rows at the epoch whose validation metric, averaged over the seeds, is best; else at a seed's last epoch.

    Where a cell was run with several settings, the one with the most seeds counts, then the best on validation.
    """
    kept, several = [results.iloc[:0]], 0
    for (task, *_), cell in results.groupby(CELL, sort=False):
        runs = [
            (run.seed.nunique(), np.nan_to_num(validation(run, task).max().mean(), nan=-np.inf), setting, run)
            for setting, run in cell.groupby("setting")
        ]
        several += len(runs) > 1
        *_, run = max(runs, key=lambda run: run[:3])
        test, score = run[run.split == "test"], validation(run, task).dropna()  # epochs that every seed has
        best = score.mean(axis=1).idxmax() if score.size else -1
        reached = test.seed.isin(test.seed[test.epoch == best])
        kept.append(test[test.epoch == test.groupby("seed").epoch.transform("max").mask(reached, best)])
    if several:
        warn(
            f"{several} cells were run with several settings: the most seeds count, then the best validation"
        )
    return pd.concat(kept)


def over_seeds(test: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation (n - 1 in the denominator) and n over the seeds of every number."""
    groups = test.groupby([*CELL, "metric", "class"], sort=False).value
    return groups.agg(mean="mean", std="std", n="count").reset_index()


def class_names(rows: pd.DataFrame) -> list[str]:
    """The classes in the order of the results file, without `all`."""
    return [name for name in rows["class"].unique() if name != "all"]


def headline(rows: pd.DataFrame, task: str) -> pd.DataFrame:
    """The task's overall metric (class `all`) and its per-class parts, nothing else."""
    goal, overall = TASKS[task], rows["class"] == "all"
    return rows[(rows.task == task) & (rows.metric == np.where(overall, goal.metric, goal.per_class))]


def baselines_of(inits: Iterable[str], reference: str | None) -> list[str]:
    """What others are measured against: the reference first, then ImageNet and random weights."""
    return [init for init in dict.fromkeys([reference, "imagenet", "random"]) if init in set(inits)]


def paired_p(a: np.ndarray, b: np.ndarray) -> float:
    """p of the two-sided paired t-test; NaN where undefined (fewer than two pairs, or all differences equal)."""
    return float(ttest_rel(a, b).pvalue) if len(a) > 1 and np.ptp(a - b) > 1e-12 else float("nan")


def versus(ours: pd.DataFrame, theirs: pd.DataFrame, ratios: list[float], sign: int) -> dict:
    """One line of `comparison` from the values of two initialisations, seeds × (ratio, class)."""
    a, b = (x[[(r, "all") for r in ratios]].dropna().mean(axis=1) for x in (ours, theirs))
    seeds = a.index.intersection(b.index)
    a, b = a[seeds], b[seeds]  # NaN means where no seed is common
    gap = (ours[ratios].mean() - theirs[ratios].mean()).drop("all", level=1).dropna()
    improvement = 100 * sign * (a - b).mean() / b.mean() if b.mean() else np.nan
    return {
        "value": a.mean(),
        "baseline_value": b.mean(),
        "difference": (a - b).mean(),
        "improvement": improvement,
        "wins": int((sign * gap > 0).sum()),
        "cells": len(gap),
        "class_difference": gap.abs().mean(),
        "n": len(seeds),
        "p": paired_p(a.to_numpy(), b.to_numpy()),
    }


def comparison(test: pd.DataFrame, task: str, reference: str | None) -> pd.DataFrame:
    """Each initialisation against each baseline, per mode and train ratio, over the `n` seeds that both have.

    Ratio `mean` averages the common ratios first. `improvement` is in % of the baseline, positive where better;
    `wins` of `cells` counts the class × ratio means that are better; `class_difference` is their mean absolute
    difference (the paper's Section VI-C gives .0053 and .0308 of these as its average differences).
    """
    rows, lines = headline(test, task), []
    inits = ordered(rows.init)
    baselines = baselines_of(inits, reference)
    pairs = [
        (init, base) for k, base in enumerate(baselines) for init in inits if init not in baselines[: k + 1]
    ]
    for mode, part in rows.groupby("mode"):
        values = {
            init: cells.pivot(index="seed", columns=["ratio", "class"], values="value")
            for init, cells in part.groupby("init")
        }
        for init, base in (pair for pair in pairs if set(pair) <= set(values)):
            ratios = sorted(
                r for r, c in values[init].columns.intersection(values[base].columns) if c == "all"
            )
            for ratio, some in [
                *((r, [r]) for r in ratios),
                *([("mean", ratios)] if len(ratios) > 1 else []),
            ]:
                lines.append(
                    {
                        "mode": mode,
                        "ratio": ratio,
                        "init": init,
                        "baseline": base,
                        **versus(values[init], values[base], some, TASKS[task].sign),
                    }
                )
    return pd.DataFrame(lines)


def class_differences(test: pd.DataFrame, task: str, init: str, reference: str) -> pd.DataFrame:
    """Mean difference, n and p per class and ratio over the seeds that both have."""
    rows, lines = headline(test, task), []
    values = rows[rows["class"] != "all"].pivot(
        index=["class", "ratio", "seed"], columns="init", values="value"
    )
    for (name, ratio), cell in values[[init, reference]].dropna().groupby(level=["class", "ratio"]):
        a, b = cell[init].to_numpy(), cell[reference].to_numpy()
        lines.append(
            {"class": name, "ratio": ratio, "difference": (a - b).mean(), "n": len(a), "p": paired_p(a, b)}
        )
    place = {name: i for i, name in enumerate(class_names(rows))}
    return pd.DataFrame(sorted(lines, key=lambda line: (place[line["class"]], line["ratio"])))


def training_times(logs: pd.DataFrame, configs: dict[str, dict], images: int) -> pd.DataFrame:
    """Hours of each run; `scaled_hours` for `images` images at its rate, where they are 224 px wide as the paper's."""
    lines = []
    for run, log in logs.groupby("run", sort=False):
        log, config = log.dropna(subset=["seconds"]), configs[run]
        hours, seen = log.seconds.sum() / 3600, (log.images_per_s * log.seconds).sum()
        comparable = config.get("size") == 224 and seen > 0
        device = str(config.get("device_name") or config.get("device") or "unknown device")
        if hours:
            lines.append(
                {
                    "run": run,
                    "device": device,
                    "size": str(config.get("size") or ""),
                    "epochs": len(log),
                    "hours": hours,
                    "scaled_hours": hours / seen * images if comparable else float("nan"),
                }
            )
    return pd.DataFrame(lines)

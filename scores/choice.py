"""The one rule of which epoch counts, and the means over the seeds at that epoch."""

import pandas as pd

from scores.metrics import ALL, TASKS

GROUP = ["task", "data", "init", "mode", "ratio"]  # what the seeds are averaged over
SETTING = ["lr", "momentum", "weight_decay", "epochs", "batch_size"]  # how a cell was trained
SUMMARY = [*GROUP, "split", "metric", "epoch", "mean", "std", "n", *SETTING]  # columns of summary.csv


def choose_epoch(val: pd.DataFrame, sign: int) -> int | None:
    """The epoch whose val metric, averaged over the seeds, is best (the earliest of equals).

    val: a row for each seed and epoch, columns seed, epoch and value; sign: +1 where higher is better.
    Only epochs that every seed has can be chosen: None where there is none, as each seed then kept the
    best epoch of its own.
    """
    score = val.pivot(index="epoch", columns="seed", values="value").dropna().mean(axis=1)
    return int((sign * score).idxmax()) if len(score) else None


def at_chosen_epoch(cell: pd.DataFrame, task: str) -> pd.DataFrame:
    """The rows, val and test, of one cell in one setting at its chosen epoch; without one, at each seed's
    last epoch.

    cell: numeric rows of results.csv (epoch, value) that differ in seed, epoch, split, metric and class only.
    """
    goal = TASKS[task]
    val = cell[(cell.split == "val") & (cell.metric == goal.metric) & (cell["class"] == ALL)]
    best = choose_epoch(val, goal.sign)
    if best is None:
        return cell[cell.epoch == cell.groupby("seed").epoch.transform("max")]
    return cell[cell.epoch == best]


def numeric(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of results.csv, read as text, with numbers for epoch and value."""
    return rows.astype({"epoch": float, "value": float}).astype({"epoch": int})  # spreadsheets write 0.0


def is_solved(rows: pd.DataFrame | pd.Series | dict) -> pd.Series | bool:
    """Whether rows of results.csv, or one of them, are of a head that was solved for: its rate is 0."""
    return pd.to_numeric(rows["lr"], errors="coerce") == 0


def without_penalty(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with 0 for the weight decay of solved heads: their penalty is an outcome, not a setting."""
    zero = rows.lr  # of a solved head, as a number or as text, whichever the rows hold
    return rows.assign(weight_decay=rows.weight_decay.mask(is_solved(rows), zero))


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation (n - 1 in the denominator) and number of the seeds of every metric over all
    classes, on val and test, at the chosen epoch. `rows`: of results.csv, as text. The epoch stays blank
    where each seed has its own."""
    rows = without_penalty(numeric(rows[rows["class"] == ALL]))
    lines = []
    for key, cell in rows.groupby(GROUP + SETTING, sort=False):
        named = dict(zip(GROUP + SETTING, key, strict=True))
        kept = at_chosen_epoch(cell, named["task"])
        for (split, metric), seeds in kept.groupby(["split", "metric"], sort=False):
            epoch = seeds.epoch.iloc[0] if seeds.epoch.nunique() == 1 else ""
            mean, std = round(seeds.value.mean(), 9), round(seeds.value.std(), 9)  # equal values: exactly 0
            values = {"mean": mean, "std": std, "n": len(seeds)}
            lines.append(named | {"split": split, "metric": metric, "epoch": epoch} | values)
    return pd.DataFrame(lines, columns=SUMMARY)

"""Our cells beside Tables III to VI, where the paper's datasets were used."""

import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from plots.missing import Gap
from plots.numbers import class_names, headline, over_seeds
from plots.style import PAPER_IMAGES, SHARE

FOLDER = Path(__file__).parent.parent / "results" / "paper"
# The paper's datasets are known by a part of the folder's name or by the number of training images at ratio
# 100.
PRETRAINING_DATA, TRANSFER_DATA = (r"sentinel2\w*lulc", PAPER_IMAGES), (r"land-?1|andalunmixing", 15_038)
FLAGS = ["hidden", "lr", "momentum", "out_dim", "weight_decay"]  # Table III
# Table → task, mode, dataset
TRANSFERS = {
    "IV": ("scene", "linear", PRETRAINING_DATA),
    "V": ("fraction", "finetune", TRANSFER_DATA),
    "VI": ("scene", "finetune", TRANSFER_DATA),
}
FILES = {"III": "table3", "IV": "table4", "V": "table5", "VI": "table6"}


class Pair(NamedTuple):
    """Our rows and a table of the paper, both with columns `mean` and, for scores, `std`."""

    number: str  # of the table
    stem: str
    ours: pd.DataFrame
    paper: pd.DataFrame


def compare_paper(test: pd.DataFrame, configs: dict[str, dict]) -> tuple[list[Pair], list[Gap]]:
    """Every table of the paper that has rows here, and the gaps of the others."""
    ours = {"III": our_flags(configs)}
    for number, (task, mode, dataset) in TRANSFERS.items():
        ours[number] = our_scores(test[(test.task == task) & (test["mode"] == mode)], task, dataset, configs)
    found, gaps = [], []
    for number, rows in ours.items():
        stem = f"compare-{FILES[number]}"
        if rows.empty:
            gaps.append(Gap(stem, f"Table {number}: nothing here is on the paper's dataset", ""))
            continue
        paper = pd.read_csv(FOLDER / f"{FILES[number]}.csv", dtype={"class": str, "ratio": float})
        found.append(Pair(number, stem, rows, paper.rename(columns={"value": "mean"})))
    return found, gaps


def our_flags(configs: dict[str, dict]) -> pd.DataFrame:
    """The hyperparameters of the runs on the paper's pretraining data, a row for each flag of Table III."""
    rows = []
    for run, config in configs.items():
        if not re.search(PRETRAINING_DATA[0], str(config.get("data")), re.IGNORECASE):
            continue
        for flag in FLAGS:
            if isinstance(config.get(flag), (int, float)):
                named = {"method": config["method"], "hyperparameter": flag, "run": run}
                rows.append(named | {"mean": float(config[flag])})
    return pd.DataFrame(rows)


def our_scores(
    rows: pd.DataFrame, task: str, dataset: tuple[str, int], configs: dict[str, dict]
) -> pd.DataFrame:
    """Means over the seeds on the paper's dataset; classes by number, initialisations by method."""
    name, images = dataset
    rows = rows[rows.unit == SHARE]
    same = rows.data.str.contains(name, case=False) | (rows.groupby("data").images.transform("max") == images)
    rows = over_seeds(rows[same])
    place = {"all": "all"} | {c: str(i) for i, c in enumerate(class_names(headline(rows, task)))}
    methods = [configs.get(init, {}).get("method", init) for init in rows.init]
    return rows.assign(run=rows.init, init=methods, **{"class": rows["class"].map(place)})

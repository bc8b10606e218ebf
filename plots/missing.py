"""What could not be drawn, or stands on fewer cells than the rest, and the command that makes it."""

import shlex
from typing import NamedTuple

import numpy as np
import pandas as pd

from plots.reading import pretraining_data, settings_part, source_of
from plots.style import AMOUNTS, METHODS, NOT_PRETRAINED, SHARE, name_of
from scores.choice import SETTING, is_solved
from scores.printed import exact

DATA = "DATA"  # stands for a folder that no file here names
SHOWN = 6  # missing cells that are named
BASELINES = ["random", "imagenet"]


class Gap(NamedTuple):
    """A row of missing.csv."""

    figures: str  # stems, or the cells that a mean lacks
    missing: str
    command: str  # blank where no command of ours makes it


class Studies(NamedTuple):
    """What is there: the test rows, the configurations by run, the logs and the embeddings."""

    test: pd.DataFrame
    configs: dict[str, dict]
    logs: pd.DataFrame
    embeddings: list[dict]


def find_gaps(there: Studies, stems: dict[str, tuple[str, ...]]) -> list[Gap]:
    """Every gap; `stems`: the figures and tables of each task."""
    return [
        *missing_runs(there.logs),
        *missing_probes(there),
        *missing_inits(there, stems),
        *missing_cells(there.test, there.configs),
    ]


def python(*words: str) -> str:
    """A command line as it is typed."""
    return shlex.join(["python", *words])


def weights(inits: list[str], configs: dict[str, dict]) -> list[str]:
    """What --init takes for these names of results.csv."""
    folders = {init: configs.get(init, {}).get("folder", f"runs/{init}") for init in inits}
    return [init if init in NOT_PRETRAINED else f"{folders[init]}/backbone.pth" for init in inits]


def missing_runs(logs: pd.DataFrame) -> list[Gap]:
    """Methods that no log is of."""
    gaps = []
    for method in METHODS:
        if method not in set(logs.method):
            command = python("train_ssl.py", "--method", method, "--data", DATA, "--out", f"runs/{method}")
            gaps.append(Gap("curves, fig9", name_of(method), command))
    return gaps


def missing_probes(there: Studies) -> list[Gap]:
    """Runs without embeddings (Fig. 3) or without a linear probe on scenes (Table IV)."""
    test = there.test
    probes = test[(test.task == "scene") & (test["mode"] == "linear")]
    if known := pretraining_data(there.configs):
        probes = probes[probes.folder.isin(known)]
    probed = set(probes.init)
    embedded = {item["init"] for item in there.embeddings}
    gaps = []
    for figure, have, extra in (("fig3", embedded, ("--save-embeddings",)), ("table4", probed, ())):
        absent = [run for run in there.configs or ["barlow"] if run not in have]
        if absent:
            command = command_like(probes, "scene", ["linear"], absent, there.configs, extra)
            gaps.append(Gap(figure, ", ".join(map(name_of, absent)), command))
    return gaps


def missing_inits(there: Studies, stems: dict[str, tuple[str, ...]]) -> list[Gap]:
    """Baselines that were not fine-tuned on a task; a task without any rows lacks a method as well."""
    test, gaps = there.test, []
    for task, figures in stems.items():
        rows = test[(test.task == task) & (test["mode"] == "finetune")]
        have = set(rows.init)
        absent = [init for init in BASELINES if init not in have]
        if not have:
            absent.append("barlow")
        if absent:
            command = command_like(rows, task, ["linear", "finetune"], absent, there.configs)
            gaps.append(Gap(", ".join(figures), ", ".join(map(name_of, absent)), command))
    return gaps


def command_like(
    rows: pd.DataFrame,
    task: str,
    modes: list[str],
    inits: list[str],
    configs: dict,
    extra: tuple[str, ...] = (),
) -> str:
    """What makes, of `inits`, the cells that `rows` of others have, as the first of these was made; with no
    rows, the least that has to be said."""
    if rows.empty:
        words = ["--task", task, "--mode", *modes, "--data", DATA, "--init", *weights(inits, configs)]
        return python("transfer.py", *words, *extra)
    like = rows.iloc[0]
    same = rows[(rows.data == like["data"]) & (rows.unit == like["unit"])]
    return cell_command(like, inits, list(zip(same.ratio, same.seed)), configs, extra)


# Cells that the seeds' means lack


def missing_cells(test: pd.DataFrame, configs: dict[str, dict]) -> list[Gap]:
    """Of each initialisation and mode, the (ratio, seed) that others on the same task and data have."""
    gaps = []
    for (_, data, unit), rows in test.groupby(["task", "data", "unit"]):
        every = {(ratio, seed) for ratio in rows.ratio.unique() for seed in rows.seed.unique()}
        for (init, mode), part in rows.groupby(["init", "mode"], sort=False):
            holes = sorted(every - set(zip(part.ratio, part.seed)))
            if not holes:
                continue
            where = f"{len(holes)} of {len(every)} cells of {name_of(init)}, {name_of(mode)}, {data}"
            gaps.append(Gap(where, shown(holes, unit), cell_command(part.iloc[0], [init], holes, configs)))
    return gaps


def shown(holes: list[tuple[float, float]], unit: str) -> str:
    """The first few holes in words."""
    words = [f"{AMOUNTS[unit].format(ratio)} of seed {seed:.0f}" for ratio, seed in holes[:SHOWN]]
    more = f" and {len(holes) - SHOWN} more" if len(holes) > SHOWN else ""
    return ", ".join(words) + more


def cell_command(
    cell: pd.Series,
    inits: list[str],
    holes: list[tuple[float, float]],
    configs: dict[str, dict],
    extra: tuple[str, ...] = (),
) -> str:
    """What makes the holes of `inits` as `cell`, a row beside them, was made."""
    words = ["--task", cell["task"], *data_flags(cell["out"], cell["folder"])]
    words += ["--init", *weights(inits, configs), "--mode", cell["mode"]]
    words += [*cell_flags(holes, cell["unit"]), *setting_flags(cell), *extra, "--out", cell["out"]]
    return python("transfer.py", *words)


def cell_flags(holes: list[tuple[float, float]], unit: str) -> list[str]:
    """--ratios or --per-class, and --seeds; one number after --seeds is how many, so one seed is --seed."""
    ratios, seeds = (sorted(set(side)) for side in zip(*holes))
    words = ["--ratios" if unit == SHARE else "--per-class", *map(exact, ratios)]
    if len(seeds) == 1:
        return [*words, "--seeds", "1", "--seed", exact(seeds[0])]
    return [*words, "--seeds", *map(exact, seeds)]


def setting_flags(cell: pd.Series) -> list[str]:
    """How the other cells were trained: the columns of results.csv, and the task's and mode's part of
    settings.yaml."""
    words = []
    solved = is_solved(cell)
    if cell["mode"] == "linear":
        words += ["--probe", "lbfgs" if solved else "sgd"]
    if not solved:
        for name in SETTING:
            if not np.isnan(cell[name]):
                words += [f"--{name.replace('_', '-')}", exact(cell[name])]
    values = settings_part(cell["out"], f"{cell['task']} {cell['mode']}")
    if values and not solved:
        values = {"schedule": "constant"} | values  # which settings.yaml leaves out
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words += [flag, str(value)]
    return words


def data_flags(out: str, data: str) -> list[str]:
    """Where the images are, as far as the files in `out` say."""
    config = source_of(out, data)
    if config.get("data"):
        named = {name: config[name] for name in ("data", "splits", "split") if config.get(name)}
    elif data == "built-in":
        named = {"scenes": config["scenes"]} if config.get("scenes") else {}
    else:
        named = {"data": f"PATH/{data}"}
    words = []
    for name, value in named.items():
        words += [f"--{name}", str(value)]
    return words

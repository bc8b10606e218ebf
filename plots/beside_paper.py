"""Our cells beside Tables III to VI, where the paper's datasets were used."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from common import ROOT, read_quietly
from plots.missing import Gap
from plots.numbers import class_names, headline, over_seeds
from plots.reading import source_of, way_of
from plots.style import PAPER_IMAGES, SHARE

FOLDER = ROOT / "results" / "paper"
SIZE, SEEDS = 224, 5  # pixels; runs of each cell
FLAGS = ["hidden", "lr", "momentum", "out_dim", "weight_decay"]  # Table III
RECIPES = ROOT / "yaml" / "paper"
OTHERS = {"init": "random", "maxpool": True, "accumulate": 1}  # flags of train_ssl.py
VIEWS = {"min_area": 0.2, "jitter": 0.4, "blur": 0.5, "quarter_turns": False}
FILES = {"III": "table3", "IV": "table4", "V": "table5", "VI": "table6"}


class PaperData(NamedTuple):
    """A dataset of the paper, known by its folder's name or by its training images; its classes must be as
    many."""

    name: str  # a regular expression
    images: int  # that train, at ratio 100
    classes: int

    def known(self, name: object, images: object) -> bool:
        """Whether a dataset's name or its number of training images says that it is this one."""
        return bool(re.search(self.name, str(name), re.IGNORECASE)) or images == self.images


class Transfer(NamedTuple):
    """What a table of scores is of, and how it was trained."""

    task: str
    mode: str
    data: PaperData
    epochs: int
    loss: str
    rates: tuple[float, float]  # the least and the largest that the authors' search chose
    momentum: float


PRETRAINING_DATA = PaperData(r"sentinel2\w*lulc", PAPER_IMAGES, 29)
TRANSFER_DATA = PaperData(r"land-?1|andalunmixing", 15_038, 10)
TRANSFERS = {
    "IV": Transfer("scene", "linear", PRETRAINING_DATA, 50, "softmax", (0.001, 0.001), 0.0),
    "V": Transfer("fraction", "finetune", TRANSFER_DATA, 100, "bce", (0.1, 0.1), 0.9),
    "VI": Transfer("scene", "finetune", TRANSFER_DATA, 100, "softmax", (0.001, 0.01), 0.9),
}


class Pair(NamedTuple):
    """Our rows and a table of the paper, both with columns `mean` and, for scores, `std`."""

    number: str  # of the table
    stem: str
    ours: pd.DataFrame
    paper: pd.DataFrame
    unlike: list[str]  # in what ours were made in another way


def compare_paper(test: pd.DataFrame, configs: dict[str, dict]) -> tuple[list[Pair], list[Gap]]:
    """Every table of the paper that has rows here, and the gaps of the others."""
    runs = {run: config for run, config in configs.items() if is_the_papers(config)}
    ours = {"III": (our_flags(runs), unlike_paper(facts_of_runs(list(runs.values()))))}
    for number, table in TRANSFERS.items():
        rows = rows_of(test, table)
        used = [configs[init] for init in rows.init.unique() if init in configs]
        facts = [*facts_of_transfer(rows, table), *facts_of_runs(used)]
        ours[number] = our_scores(rows, table.task, configs), unlike_paper(facts)
    found, gaps = [], []
    for number, (rows, unlike) in ours.items():
        stem = f"compare-{FILES[number]}"
        if rows.empty:
            gaps.append(Gap(stem, f"Table {number}: nothing here is on the paper's dataset", ""))
            continue
        paper = pd.read_csv(FOLDER / f"{FILES[number]}.csv", dtype={"class": str, "ratio": float})
        found.append(Pair(number, stem, rows, paper.rename(columns={"value": "mean"}), unlike))
    return found, gaps


def is_the_papers(config: dict) -> bool:
    """Whether a run was on the paper's pretraining data."""
    return PRETRAINING_DATA.known(config.get("data"), config.get("images"))


def our_flags(runs: dict[str, dict]) -> pd.DataFrame:
    """The hyperparameters of these runs, a row for each flag of Table III."""
    rows = []
    for run, config in runs.items():
        for flag in FLAGS:
            if isinstance(config.get(flag), (int, float)):
                named = {"method": config["method"], "hyperparameter": flag, "run": run}
                rows.append(named | {"mean": float(config[flag])})
    return pd.DataFrame(rows)


def rows_of(test: pd.DataFrame, table: Transfer) -> pd.DataFrame:
    """The rows of a table's task and mode on its dataset; of several sizes of its images those of the
    paper's, where they are there."""
    rows = test[(test.task == table.task) & (test["mode"] == table.mode) & (test.unit == SHARE)]
    kept = [rows.iloc[:0]]
    for folder, part in rows.groupby("folder"):
        papers = part[part["size"] == str(SIZE)]
        part = papers if len(papers) else part[part.data == part.data.iloc[0]]
        classes = len(class_names(headline(part, table.task)))
        if table.data.known(folder, part.images.max()) and classes == table.data.classes:
            kept.append(part)
    return pd.concat(kept)


def our_scores(rows: pd.DataFrame, task: str, configs: dict[str, dict]) -> pd.DataFrame:
    """Means over the seeds; classes by number, initialisations by method."""
    rows = over_seeds(rows)
    place = {"all": "all"} | {c: str(i) for i, c in enumerate(class_names(headline(rows, task)))}
    methods = [configs.get(init, {}).get("method", init) for init in rows.init]
    return rows.assign(run=rows.init, init=methods, **{"class": rows["class"].map(place)})


# In what ours are not the paper's

Fact = tuple[str, Iterable, object]  # what it is, our values, the paper's


def facts_of_transfer(rows: pd.DataFrame, table: Transfer) -> list[Fact]:
    """How the heads or networks of these rows came about."""
    made = [way for out in rows.out.unique() if (way := way_of(out, table.task, table.mode))]
    places = rows[["out", "folder"]].drop_duplicates()
    trained = rows[rows.epochs > 0]
    return [
        ("training images", rows.groupby("data").images.max(), table.data.images),
        ("split", [split_in(source_of(*place)) for place in places.itertuples(index=False)], "paper"),
        ("size in px", [part.get("size") for part in made], SIZE),
        ("arch", [part.get("arch") for part in made], "resnet18"),
        ("statistics", [part["statistics"] for part in made], "data"),
        ("epochs", rows.epochs.replace(0, "none, as heads are solved for"), table.epochs),
        ("seeds", rows.groupby("init").seed.nunique(), SEEDS),
        *(facts_of_training(trained, made, table) if len(trained) else []),
    ]


def facts_of_training(rows: pd.DataFrame, made: list[dict], table: Transfer) -> list[Fact]:
    """How what SGD trained was trained: `rows` of results.csv, and what settings.yaml says of them."""
    least, largest = table.rates
    papers = " to ".join(dict.fromkeys(map(in_words, table.rates)))
    return [
        ("loss", [part.get("loss") for part in made], table.loss),
        ("schedule", [part["schedule"] for part in made], "constant"),
        ("augment", [part["augment"] for part in made], False),
        ("head at the start", [part["start_head"] for part in made], "random"),
        ("epochs between checks", [part["check_every"] for part in made], 1),
        ("epoch chosen by", [part.get("epoch_choice") for part in made], "common"),
        ("rate", rows.lr[~rows.lr.between(least, largest)], papers),
        ("momentum", rows.momentum, table.momentum),
        ("weight decay", rows.weight_decay, 0),
        ("batch", rows.batch_size, 64),
    ]


def facts_of_runs(configs: list[dict]) -> list[Fact]:
    """How the backbones of these runs were pretrained, but for the flags of Table III."""
    always = {"images": PAPER_IMAGES, "split": "paper", "subset": 1.0, "size": SIZE, "arch": "resnet18"}
    found: dict[tuple[str, object], list] = {}
    for config in configs:
        recipe = read_quietly(RECIPES / f"{config.get('method')}.yaml")
        flags = {key: value for key, value in recipe.items() if key not in ("method", *FLAGS)}
        named = config | {"split": split_in(config)}
        for key, value in (always | flags | VIEWS | OTHERS).items():
            found.setdefault((f"pretraining {key}", value), []).append(named.get(key))
    return [(name, ours, value) for (name, value), ours in found.items()]


def split_in(config: dict) -> str | None:
    """How the flags of a call say that its data were split; None where they do not."""
    return "by lists" if config.get("splits") else config.get("split")


def unlike_paper(facts: list[Fact]) -> list[str]:
    """The facts in which ours are not the paper's, as a caption says them; what is not known is left out."""
    said = []
    for name, ours, paper in facts:
        odd = [text for text in dict.fromkeys(map(in_words, ours)) if text not in ("", in_words(paper))]
        if odd:
            said.append(f"{name} {' and '.join(odd)} (there {in_words(paper)})")
    return said


def in_words(value: object) -> str:
    """`175,381`, `yes` or a text; blank where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.12g}" if isinstance(value, (int, float)) else str(value)

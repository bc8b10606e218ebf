"""The numbers of transfer.py: metrics by name, and results.csv, which any number of processes fill together."""

import contextlib
import fcntl
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from sklearn import metrics

from common import ConfigError, replacing, write_csv, write_yaml

CELL = ["task", "data", "init", "mode", "ratio", "seed"]
OPTIMISATION = [
    "lr",
    "momentum",
    "weight_decay",
    "epochs",
    "batch_size",
]  # 0 where the head is solved for; weight_decay: the penalty found
COLUMNS = [*CELL, "epoch", "split", "metric", "class", "value", *OPTIMISATION, "images", "seconds", "commit"]
HEADLINE = {"fraction": ("rmse", -1), "scene": ("f1_macro", +1)}  # chooses on val; +1: higher is better

Metrics = dict[tuple[str, str], float]  # (metric, class) -> value; class `all` for a number over all classes


def fraction_metrics(truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> Metrics:
    """Of fractions (n, K): RMSE per class and the mean of these (the paper's number), RMSE over all entries (pooled), MAE,
    and R2 as the mean over the classes."""
    error = predicted - truth
    rmse = np.sqrt((error**2).mean(0))
    return {
        ("rmse", "all"): rmse.mean(),
        ("rmse_pooled", "all"): np.sqrt((error**2).mean()),
        ("mae", "all"): np.abs(error).mean(),
        ("r2", "all"): metrics.r2_score(truth, predicted),
        **{("rmse", name): value for name, value in zip(classes, rmse)},
    }


def scene_metrics(truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> Metrics:
    """Of labels (n,): F1 micro, macro and weighted, and per class; a class that is neither there nor predicted counts 0.
    All come from one confusion matrix, as four calls of scikit-learn's f1_score take longer than a head on few images."""
    counts = metrics.confusion_matrix(truth, predicted, labels=range(len(classes)))
    support = counts.sum(1)
    f1 = 2 * counts.diagonal() / np.maximum(support + counts.sum(0), 1)
    return {
        ("f1_micro", "all"): counts.trace() / len(truth),
        ("f1_macro", "all"): f1.mean(),
        ("f1_weighted", "all"): (f1 * support).sum() / len(truth),
        **{("f1", name): value for name, value in zip(classes, f1)},
    }


def measure(task: str, truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> Metrics:
    """Of targets and predictions (n, K): fractions, or one-hot labels and probabilities."""
    if task == "fraction":
        return fraction_metrics(truth, predicted, classes)
    return scene_metrics(truth.argmax(1), predicted.argmax(1), classes)


def write_confusion(file: Path, truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> None:
    """A row for each true class, a column for each predicted one, of labels (n,)."""
    table = pd.DataFrame(
        metrics.confusion_matrix(truth, predicted, labels=range(len(classes))), columns=classes
    )
    table.insert(0, "true \\ predicted", classes)
    file.parent.mkdir(exist_ok=True)
    write_csv(file, table)


def write_embeddings(
    file: Path, features: np.ndarray, labels: np.ndarray, classes: list[str], init: str
) -> None:
    with replacing(file) as partial, open(partial, "wb") as stream:
        np.savez_compressed(
            stream, features=features, labels=labels, classes=np.array(classes), init=np.array(init)
        )


class Results:
    """results.csv in a folder. The rows of a cell come all at once, and only once."""

    def __init__(self, out: Path):
        self.file = out / "results.csv"
        self.read()
        self.lock = os.open(
            out / ".lock", os.O_RDWR | os.O_CREAT, 0o644
        )  # one descriptor: closing any drops a process's locks

    @contextlib.contextmanager
    def claim(self, name: str, wait: bool = True):
        """Whether this process alone holds `name`: the lock of one byte of a file, which ends with the process, however
        that ends. Between machines, the folder has to be on a shared disk that has locks."""
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (
            BlockingIOError,
            PermissionError,
        ):  # POSIX allows either for a lock that another process holds
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, place)

    def read(self) -> pd.DataFrame:
        """All rows, as text; a file of other columns is refused."""
        if not self.file.exists():
            return pd.DataFrame(columns=COLUMNS, dtype=str)
        try:
            rows = pd.read_csv(self.file, dtype=str, keep_default_na=False)
        except ValueError as error:  # pandas' parser errors are ValueErrors
            raise ConfigError(
                f"{self.file}: not a readable CSV ({' '.join(str(error).split())}): move it away"
            ) from None
        if list(rows) != COLUMNS:
            odd = sorted(set(rows) ^ set(COLUMNS)) or ["the order"]
            raise ConfigError(
                f"{self.file}: its columns are not transfer.py's ({', '.join(odd[:4])}): move it away or choose another --out"
            )
        return rows

    def keys(self, rows: pd.DataFrame) -> pd.Series:
        """The cell of each row: the text of CELL and OPTIMISATION."""
        penalty_found = rows.lr == "0"  # then weight_decay is an outcome
        columns = [
            rows[c].mask(penalty_found, "0") if c == "weight_decay" else rows[c]
            for c in [*CELL, *OPTIMISATION]
        ]
        return pd.Series(list(zip(*columns)), index=rows.index, dtype=object)

    def done(self) -> set[tuple[str, ...]]:
        return set(self.keys(self.read()[[*CELL, *OPTIMISATION]].drop_duplicates()))

    def add(self, rows: pd.DataFrame) -> None:
        with self.claim(self.file.name), replacing(self.file) as partial:
            old = self.file.read_bytes() if self.file.exists() else ",".join(COLUMNS).encode() + b"\n"
            partial.write_bytes(
                old + b"\n" * (not old.endswith(b"\n")) + rows.to_csv(index=False, header=False).encode()
            )

    def check_settings(self, now: dict[str, dict]) -> None:
        """Refuse `now` (part -> name -> value) where it differs from what made the rows; settings.yaml remembers it."""
        file = self.file.with_name("settings.yaml")
        with self.claim(file.name):
            try:
                then = dict(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.exists() else {}
            except (yaml.YAMLError, TypeError, ValueError):
                raise ConfigError(
                    f"{file}: damaged; it says what made the rows of {self.file.name}: move both away"
                ) from None
            differ = [
                f"{part}: {name} was {then[part].get(name)}, is {value}"
                for part in now.keys() & then.keys()
                for name, value in now[part].items()
                if then[part].get(name) != value
            ]
            if differ:
                raise ConfigError(
                    f"{self.file} is of other settings ({'; '.join(sorted(differ))}): choose another --out"
                )
            write_yaml(file, then | now)


def summary(rows: pd.DataFrame, task: str, common_epoch: bool) -> str:
    """Mean ± standard deviation over the seeds on test, the best in bold on a terminal: the headline metric a column a
    ratio; with a single ratio, a column a metric. `common_epoch`: at the epoch of the best mean on val."""
    metric, sign = HEADLINE[task]
    rows = rows[(rows["class"] == "all")].astype({"ratio": float, "epoch": int, "value": float})
    kept = []
    for _, cells in rows.groupby(["init", "mode", "ratio"], sort=False):
        if common_epoch and (cells.lr != "0").all():
            val = cells[(cells.split == "val") & (cells.metric == metric)].groupby("epoch").value.mean()
            cells = cells[cells.epoch == (sign * val).idxmax()]
        kept.append(cells[cells.split == "test"])
    rows = pd.concat(kept)
    several = rows.ratio.nunique() > 1
    rows = rows[rows.metric == metric] if several else rows
    rows["column"] = rows.ratio.map("{:g} %".format) if several else rows.metric
    order = list(dict.fromkeys(rows.sort_values("ratio", kind="stable").column))
    groups = rows.groupby(["init", "mode", "column"], sort=False).value
    mean, std, n = (x.unstack("column")[order] for x in (groups.mean(), groups.std(), groups.count()))
    signs = pd.Series({c: -1 if c.startswith(("rmse", "mae")) else 1 for c in order}) if not several else sign
    best = (mean * signs).eq((mean * signs).max())
    lines = [
        f"{metric if several else task} on test, mean ± standard deviation over {n.min().min()} seeds".replace(
            " 1 seeds", " 1 seed"
        ),
        f"{'':24}" + "".join(f"{c:>18}" for c in order),
    ]
    for init, mode in dict.fromkeys(zip(rows.init, rows["mode"])):
        values = [
            (f"{m:.4f}" + (f" ± {s:.4f}" if s == s else "")).rjust(18)
            for m, s in zip(mean.loc[init, mode], std.loc[init, mode])
        ]
        marks = [
            f"\033[1m{v}\033[0m" if b and sys.stdout.isatty() else v
            for v, b in zip(values, best.loc[init, mode])
        ]
        lines.append(f"{init[:13]:13} {mode:10}" + "".join(marks))
    return "\n".join(lines)

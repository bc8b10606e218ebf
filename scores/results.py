"""results.csv, which any number of processes fill together, and the files beside it."""

import contextlib
import fcntl
import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn import metrics

from common import ConfigError, harmless, load_yaml, replacing, write_csv, write_yaml
from scores.choice import SETTING, summarise, without_penalty
from scores.metrics import is_possible
from scores.printed import exact

CELL = ["task", "data", "init", "mode", "ratio", "seed"]
RESULT = ["epoch", "split", "metric", "class"]  # what differs within a cell
COLUMNS = [*CELL, *RESULT, "value", *SETTING, "images", "seconds", "commit"]

Key = tuple[str, ...]  # the text of CELL and SETTING


class Results:
    """results.csv in a folder. The rows of a cell come all at once; a cell that lacks rows is done again."""

    def __init__(self, out: Path):
        self.file = out / "results.csv"
        self.damaged: set[Key] = set()  # cells of which some rows are there
        self.stamp: tuple[int, ...] = ()  # of the file when `counted` was taken
        self.counted: dict[Key, int] = {}  # rows of each cell
        self.read()
        # One descriptor for the life of the process: closing any drops all locks that it has on the file
        self.lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)

    @contextlib.contextmanager
    def claim(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Whether this process alone holds `name`: the lock of one byte of a file, which ends with the
        process, however that ends. Between machines, the folder has to be on a shared disk that has locks."""
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        # POSIX allows either for a lock that another process holds
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError as error:
            where = self.file.parent
            raise ConfigError(
                f"{where}: its disk has no file locks ({error.strerror}): choose another --out"
            ) from None
        try:
            yield True
        finally:
            fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, place)

    def read(self) -> pd.DataFrame:
        """All complete rows, as text; of repeated rows the last. ConfigError if the columns differ."""
        content = self.whole_lines()
        if not content:
            return pd.DataFrame(columns=COLUMNS, dtype=str)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # of lines longer than the first
                rows = pd.read_csv(
                    io.BytesIO(content),
                    dtype=str,
                    keep_default_na=False,
                    index_col=False,
                    encoding_errors="surrogateescape",
                )
        except (ValueError, pd.errors.ParserWarning) as error:  # pandas' parser errors are ValueErrors
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.file}: not a readable CSV ({reason}): move it away") from None
        if list(rows) != COLUMNS:
            odd = ", ".join((sorted(set(rows) ^ set(COLUMNS)) or ["the order"])[:4])
            message = f"{self.file}: its columns are not transfer.py's ({odd})"
            raise ConfigError(f"{message}: move it away or choose another --out")
        rows = as_written(rows[is_whole(rows)])
        key = rows[RESULT].assign(cell=self.keys(rows))
        return rows[~key.duplicated(keep="last")]

    def whole_lines(self) -> bytes:
        """The bytes of results.csv up to its last line end: what follows was cut."""
        content = self.file.read_bytes() if self.file.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    @staticmethod
    def keys(rows: pd.DataFrame) -> pd.Series:
        """The cell of each row: the text of CELL and SETTING."""
        settings = without_penalty(rows)
        texts = (settings[column] for column in [*CELL, *SETTING])
        return pd.Series(list(zip(*texts, strict=True)), rows.index, dtype=object)

    def done(self, wanted: dict[Key, int]) -> set[Key]:
        """Which of the wanted cells have the wanted number of rows; those with fewer are noted as damaged."""
        counts = self.counts()
        there = {key: counts[key] for key in wanted.keys() & counts.keys()}
        whole = {key for key, count in there.items() if count >= wanted[key]}
        self.damaged = there.keys() - whole
        return whole

    def counts(self) -> dict[Key, int]:
        """How many rows each cell has. The file is read again where it is another one: `add` replaces it."""
        stat = self.file.stat() if self.file.exists() else None
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat else ()
        if not stamp or stamp != self.stamp:
            self.stamp, self.counted = stamp, dict(self.keys(self.read()).value_counts())
        return self.counted

    def add(self, key: Key, rows: pd.DataFrame) -> None:
        """Add the rows of a cell, in the place of those that it had."""
        with self.claim(self.file.name), replacing(self.file) as partial:
            old = self.whole_lines()
            if key in self.damaged:
                kept = self.read()
                old = text_of(kept[self.keys(kept) != key], header=True)
            partial.write_bytes((old or text_of(rows[:0], header=True)) + text_of(rows))
        self.damaged.discard(key)

    def write_summary(self) -> None:
        """summary.csv of all rows, whoever wrote them."""
        file = self.file.with_name("summary.csv")
        with self.claim(file.name):
            write_csv(file, summarise(self.read()))

    def check_settings(self, now: dict[str, dict], told: dict[str, dict] | None = None) -> None:
        """Refuse `now` (part -> name -> value) where it differs from what made the rows; settings.yaml
        remembers it, and what is `told`, which may differ."""
        file = self.file.with_name("settings.yaml")
        with self.claim(file.name):
            then = read_settings(file) if file.exists() else {}
            differ = []
            for part in now.keys() & then.keys():
                for name in now[part].keys() | then[part].keys():
                    was, is_now = (side[part].get(name, "not set") for side in (then, now))
                    if was != is_now:
                        differ.append(f"{part}: {name} was {was}, is {is_now}")
            if differ:
                listed = "; ".join(sorted(differ))
                raise ConfigError(f"{self.file} is of other settings ({listed}): choose another --out")
            write_yaml(file, then | now | (told or {}))


def read_settings(file: Path) -> dict[str, dict]:
    """part -> name -> value of settings.yaml; ConfigError where it holds anything else."""
    try:
        settings = load_yaml(file)
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or not all(isinstance(part, dict) for part in settings.values()):
        raise ConfigError(f"{file}: damaged; it says what made the rows of results.csv: move both away")
    return settings


def is_whole(rows: pd.DataFrame) -> pd.Series:
    """Whether a row has all of its fields, and numbers where numbers belong."""
    epochs = pd.to_numeric(rows.epoch, errors="coerce") % 1 == 0  # whole and finite
    values = pd.to_numeric(rows.value, errors="coerce")
    values = (values.notna() | (rows.value == "nan")) & is_possible(rows.metric, values)
    return rows.notna().all(axis=1) & epochs & values


def as_written(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the numbers of a cell as transfer.py writes them, where a spreadsheet has saved 1E-05."""
    return rows.assign(**{name: rows[name].map(exact_text) for name in ("ratio", "seed", *SETTING)})


@lru_cache(maxsize=4096)
def exact_text(text: str) -> str:
    """A number as `exact` has it; other text as it is."""
    try:
        return exact(float(text))
    except (ValueError, OverflowError):
        return text


def text_of(rows: pd.DataFrame, header: bool = False) -> bytes:
    """Rows as the bytes that results.csv holds; names that are not UTF-8 keep theirs."""
    return rows.to_csv(index=False, header=header).encode(errors="surrogateescape")


def write_confusion(file: Path, truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> None:
    """A row for each true class, a column for each predicted one, of labels (n,)."""
    counts = metrics.confusion_matrix(truth, predicted, labels=range(len(classes)))
    names = [harmless(name) for name in classes]
    rows = pd.DataFrame(counts, columns=names)
    rows.insert(0, "true \\ predicted", names)
    file.parent.mkdir(exist_ok=True)
    write_csv(file, rows)


def write_embeddings(
    file: Path, features: np.ndarray, labels: np.ndarray, classes: list[str], data: str, init: str
) -> None:
    """features (n, D) and labels (n,) of test images, for plot.py."""
    arrays = {"features": features, "labels": labels, "classes": np.array(classes)}
    with replacing(file) as partial, open(partial, "wb") as stream:
        np.savez_compressed(stream, **arrays, data=np.array(data), init=np.array(init))

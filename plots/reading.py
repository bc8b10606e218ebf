"""Files written by the other commands → tidy DataFrames. Needs no torch.

What cannot be read is left out, said at once, and noted in the list `problems` that every function takes: one
bad file never costs the figures of the others.
"""

import csv
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from common import counted, harmless, read_quietly, read_values
from plots.style import AMOUNTS, PER_CLASS, SHARE, ordered
from scores import TASKS
from scores.choice import GROUP, SETTING, without_penalty
from scores.metrics import is_possible

MEAN_OVER = [*GROUP, "unit"]  # what the seeds are averaged over
SHOWN_FAULTS = 20  # of one file
VISIBLE = 1e-3  # a difference that tables show
LOG_COLUMNS = [
    "loss",
    "chance_loss",
    "knn_macro_f1",
    "knn5_accuracy",
    "effective_rank",
    "images_per_s",
    "seconds",
]
UNSAID = {  # what settings.yaml leaves out, by flags of transfer.py
    "schedule": "constant",
    "augment": False,
    "start_head": "random",
    "statistics": "backbone",
    "check_every": 1,
}
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    RuntimeError,  # of zipfile: a password, or a compression that it does not know
    zipfile.BadZipFile,
    zlib.error,
)


def note(message: str) -> None:
    """Something a reader should know, although nothing is wrong with the files."""
    print(f"note: {' '.join(message.split())}", file=sys.stderr, flush=True)


def warn(message: str, problems: list[str]) -> None:
    """Something that was left out."""
    message = " ".join(message.split())
    problems.append(message)
    print(f"warning: {message}", file=sys.stderr, flush=True)


# One CSV


def read_csv(
    path: Path, text: list[str], numbers: list[str], optional: list[str], problems: list[str]
) -> pd.DataFrame:
    """Rows of a CSV; a row with a missing or unreadable field is named with its line and left out.

    `text` and `numbers` must be there and filled; `optional` numbers may be empty or absent. A spreadsheet's
    CSV, with semicolons and decimal commas, is read as well. Returns the columns of the file, numbers as
    float64.
    """
    nothing = pd.DataFrame(columns=text + numbers + optional)
    try:
        rows, faults, separator = read_lines(path)
    except UnicodeDecodeError:
        warn(f"{path}: is not UTF-8 text (a spreadsheet's `CSV UTF-8`): file left out", problems)
        return nothing
    except (OSError, ValueError, csv.Error) as error:
        warn(f"{path}: {error}: file left out", problems)
        return nothing
    rows = with_unit(rows)
    absent = [name for name in text + numbers if name not in rows]
    if absent:
        warn(f"{path}: no column {', '.join(absent)}: file left out", problems)
        return nothing
    for name in text:
        rows[name] = rows[name].str.strip()
        faults |= empty_fields(rows[name])
    numeric = [*numbers, *(name for name in optional if name in rows)]
    point = decimal_point(rows[numeric], separator)
    for name in numeric:
        if name in numbers:
            faults |= empty_fields(rows[name])
        rows[name], wrong = as_numbers(rows[name], point)
        faults |= wrong
    for line in sorted(faults)[:SHOWN_FAULTS]:
        warn(f"{path}:{line}: {faults[line]}: row left out", problems)
    if len(faults) > SHOWN_FAULTS:
        warn(f"{path}: {len(faults) - SHOWN_FAULTS} more rows left out", problems)
    return rows.drop(index=rows.index.intersection(list(faults)))


def read_lines(path: Path) -> tuple[pd.DataFrame, dict[int, str], str]:
    """The fields of a CSV as text, indexed by line number; what is wrong with odd lines; the separator."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        told = head.lower().startswith("sep=") and len(head.rstrip("\r\n")) > 4  # as Excel writes it
        if told:
            separator = head[4]
        else:
            separator = ";" if head.count(";") > head.count(",") else ","
            file.seek(0)
        reader = csv.reader(file, delimiter=separator, strict=True)
        names = [name.strip() for name in next(reader, [])]
        found = [(reader.line_num + told, fields) for fields in reader if any(fields)]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"column {', '.join(map(repr, twice))} stands twice")
    width = len(names)
    faults = {
        line: f"has {len(fields)} fields, the first line {width}"
        for line, fields in found
        if any(fields[width:])
    }
    padded = [[*fields, *[""] * width][:width] for _, fields in found]
    lines = [line for line, _ in found]
    return pd.DataFrame(padded, index=lines, columns=names, dtype=str), faults, separator


def decimal_point(rows: pd.DataFrame, separator: str) -> str:
    """A comma where semicolons separate, and numbers have commas; else a point."""
    commas = any(rows[name].str.contains(",", regex=False).any() for name in rows)
    return "," if separator != "," and commas else "."


def with_unit(rows: pd.DataFrame) -> pd.DataFrame:
    """`10/class` in the column ratio as 10 with the unit `/class`; a plain number is a share, in `%`."""
    if "ratio" not in rows:
        return rows
    per_class = rows.ratio.str.strip().str.endswith(PER_CLASS)
    amounts = rows.ratio.str.strip().str.removesuffix(PER_CLASS)
    return rows.assign(ratio=amounts, unit=np.where(per_class, PER_CLASS, SHARE))


def empty_fields(column: pd.Series) -> dict[int, str]:
    """Line → what is wrong, of the fields without text."""
    return {line: f"{column.name} is empty" for line in column.index[column.str.strip() == ""]}


def as_numbers(column: pd.Series, point: str) -> tuple[pd.Series, dict[int, str]]:
    """A text column as float64, NaN where it is empty; and line → what is wrong, of fields that are no
    number: one that parts its thousands is none, as 7,200 may be 7.2 elsewhere."""
    raw = column.str.strip()
    plain = raw.str.replace(",", ".", regex=False) if point == "," else raw
    values = pd.to_numeric(plain, errors="coerce").astype(float)
    odd = raw.str.contains("." if point == "," else ",", regex=False)
    values = values.where(np.isfinite(values) & ~odd)
    wrong = raw[values.isna() & ~raw.str.lower().isin(["", "nan"])]
    return values, {line: f"{column.name} '{value}' is not a number" for line, value in wrong.items()}


# What the other commands wrote


def read_results(paths: list[Path], problems: list[str]) -> pd.DataFrame:
    """All rows of the results files; `out` is their folder, `setting` numbers the ways a cell was trained,
    by its columns and by what the settings.yaml of its folder says of its mode and its weights. `folder` is
    the name of the images' folder; `data` too, with their size where the network saw them at several.

    Of a repeated row the last one counts. Rows of unknown tasks are left out.
    """
    text = ["task", "init", "mode", "split", "metric", "class"]
    numbers, optional = ["ratio", "seed", "value"], ["epoch", "images", *SETTING]
    columns = [*text, "data", "unit", *numbers, *optional]
    files = [pd.DataFrame(columns=columns)]
    for path in paths:
        rows = read_csv(path, text, numbers, optional, problems)
        rows = without_impossible(rows, path, problems)
        rows = rows.reindex(columns=columns).assign(out=path.parent.as_posix())
        files.append(rows.assign(made_by=settings_of(rows, path.parent), size=sizes_of(rows, path.parent)))
    note_other_data([path.parent for path in paths])
    rows = pd.concat([file for file in files if len(file)] or files)
    rows = rows.reindex(columns=[*columns, "out", "made_by", "size"])
    rows = rows.astype(dict.fromkeys(numbers + optional, float))
    strange = sorted(set(rows.task) - set(TASKS))
    if strange:
        warn(f"rows of unknown tasks left out: {', '.join(strange)}", problems)
    rows = rows[rows.task.isin(list(TASKS))].reset_index(drop=True)
    rows["data"] = rows.data.fillna("").map(lambda folder: Path(folder).name or "built-in")
    rows["epoch"] = rows.epoch.fillna(0)
    rows = apart_by_size(without_penalty(rows))
    rows["setting"] = rows.groupby([*SETTING, "made_by"], dropna=False).ngroup()
    return without_repeats(rows, problems)


def without_impossible(rows: pd.DataFrame, path: Path, problems: list[str]) -> pd.DataFrame:
    """The rows whose value can be one of their metric, and a warning about the others."""
    possible = is_possible(rows.metric, rows.value)
    wrong = rows[~possible]
    if len(wrong):
        line, first = wrong.index[0], wrong.iloc[0]
        more = f", and so {counted(len(wrong) - 1, 'more row')}" if len(wrong) > 1 else ""
        warn(f"{path}:{line}: {first.value:g} can be no {first.metric}{more}: left out", problems)
    return rows[possible]


def without_repeats(rows: pd.DataFrame, problems: list[str]) -> pd.DataFrame:
    """The last of the rows that say the same, and a warning where they say different things."""
    key = [*MEAN_OVER, "seed", "setting", "epoch", "split", "metric", "class"]
    values = rows.groupby(key, dropna=False).value
    differ = rows[values.transform("max") - values.transform("min") > VISIBLE]
    if len(differ):
        last = differ.iloc[-1]
        amount = AMOUNTS[last.unit].format(last.ratio)
        cell = f"{last.task} {last['data']} {last.init} {last['mode']} {last.metric}, {amount}"
        folders = " and ".join(sorted(differ.out.unique()))
        warn(
            f"{len(differ)} rows in {folders} differ in nothing but the value, as {cell}: the last counts",
            problems,
        )
    once = rows.drop_duplicates(key, keep="last")
    if len(once) < len(rows):
        note(f"{len(rows) - len(once)} results stand more than once: the last one counts")
    return once


def settings_of(rows: pd.DataFrame, folder: Path) -> list[str]:
    """What settings.yaml says of each row's task and mode, and of the weights of its initialisation, as
    text; blank where there is none."""
    parts = read_quietly(folder / "settings.yaml")

    def text(task: str, mode: str, init: str) -> str:
        return "".join(str(parts.get(part, "")) for part in (f"{task} {mode}", f"init {init}"))

    return [text(*row) for row in zip(rows.task, rows["mode"], rows.init, strict=True)]


def settings_part(out: str | Path, part: str) -> dict:
    """What the settings.yaml of a folder says of a part, as `scene linear`; empty where it says nothing."""
    found = read_quietly(Path(out) / "settings.yaml").get(part)
    return found if isinstance(found, dict) else {}


def way_of(out: str | Path, task: str, mode: str) -> dict:
    """How the cells of a folder were made beyond their columns, by its settings.yaml; empty where that is not
    known."""
    part = settings_part(out, f"{task} {mode}")
    return UNSAID | {str(name): value for name, value in part.items()} if part else {}


def source_of(out: str | Path, data: str) -> dict:
    """The flags that name the images called `data`: settings.yaml of `out` has them, or config.yaml where the
    last call of transfer.py was on the same data; empty where neither says."""
    config = settings_part(out, f"where {data}") or read_quietly(Path(out) / "config.yaml")
    folder = config.get("data")
    name = Path(str(folder)).resolve().name if folder else "built-in"
    return config if name == data else {}


def sizes_of(rows: pd.DataFrame, folder: Path) -> list[str]:
    """At which size the network saw the images of each row, pixels, by settings.yaml; blank where it is not
    known."""
    parts = read_quietly(folder / "settings.yaml")
    known = {name: part.get("size", "") for name, part in parts.items() if isinstance(part, dict)}
    return [str(known.get(f"{task} {mode}", "")) for task, mode in zip(rows.task, rows["mode"], strict=True)]


def apart_by_size(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `folder`, and names of data that no table or test shares between two sizes: a network
    that sees images at 64 px is another one than at 32."""
    sizes = rows["size"].where(rows["size"] != "")  # nunique leaves out what is not known
    several = sizes.groupby([rows.task, rows.data]).transform("nunique") > 1
    apart = several & sizes.notna()
    for name, seen in sizes[apart].groupby(rows.data[apart]):
        listed = " and ".join(sorted(seen.unique(), key=int))
        note(f"the images of {name} were seen at {listed} px: drawn apart")
    return rows.assign(folder=rows.data, data=rows.data.where(~apart, rows.data + "-" + rows["size"] + "px"))


def note_other_data(folders: list[Path]) -> None:
    """Say where a name of data stands for different files in several folders."""
    contents: dict[str, dict[str, str]] = {}
    for folder in folders:
        for part, values in read_quietly(folder / "settings.yaml").items():
            if str(part).startswith("data "):
                contents.setdefault(str(part)[5:], {}).setdefault(str(values), folder.as_posix())
    for name, places in contents.items():
        if len(places) > 1:
            where = " and ".join(places.values())
            note(f"{name} differs in files, dates, splits or labels between {where}: taken for one data set")


def read_runs(folders: list[Path], problems: list[str]) -> tuple[dict[str, dict], pd.DataFrame]:
    """Configurations by run name, with `folder` and `method`; and the logs, a row for each run and epoch."""
    configs, logs = {}, []
    for folder in folders:
        if not (folder / "log.csv").exists():
            continue
        config = read_config(folder / "config.yaml")
        run = folder.name if folder.name not in configs else folder.as_posix()
        method = str(config.get("method", run))
        configs[run] = {**config, "folder": folder.as_posix(), "method": method}
        log = read_csv(folder / "log.csv", [], ["epoch"], LOG_COLUMNS, problems)
        log = log.drop_duplicates("epoch", keep="last").reindex(columns=["epoch", *LOG_COLUMNS])
        logs.append(log.astype(float).assign(run=run, method=method))
    empty = pd.DataFrame(columns=["epoch", *LOG_COLUMNS, "run", "method"])
    return configs, pd.concat([log for log in logs if len(log)] or [empty], ignore_index=True)


def read_config(file: Path) -> dict:
    """The values of a YAML file of flags; empty, with a word, where there is no such file."""
    try:
        return read_values(file)
    except (OSError, ValueError) as error:
        note(f"{file}: {error}: flags unknown")
        return {}


def pretraining_data(configs: dict[str, dict]) -> set[str]:
    """What results.csv calls the data that these runs were pretrained on; empty where that is not known."""
    folders = [config["data"] for config in configs.values() if config.get("data")]
    return {harmless(Path(str(folder)).resolve().name) for folder in folders}


def read_embeddings(paths: list[Path], problems: list[str]) -> list[dict]:
    """features (n, d), labels (n,), classes, init and data of each file, without unlabelled images."""
    found = []
    for path in paths:
        try:
            found.append(read_npz(path))
        except UNREADABLE as error:
            reason = str(error) or type(error).__name__
            warn(f"{path}: {reason}: embeddings left out", problems)
    order = ordered(item["init"] for item in found)
    return sorted(found, key=lambda item: order.index(item["init"]))


def read_npz(path: Path) -> dict:
    """One file of embeddings; raises one of UNREADABLE where it holds anything else."""
    if not zipfile.is_zipfile(path):  # numpy takes it for pickled objects, and tells how to run them
        raise ValueError("is no .npz file, or a damaged one")
    with np.load(path, allow_pickle=False) as arrays:
        features, labels = arrays["features"].astype(np.float64), arrays["labels"].astype(int)
        classes = [str(name) for name in arrays["classes"]]
        init = str(arrays["init"])
        data = str(arrays["data"]) if "data" in arrays else ""
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {features.shape} and labels {labels.shape} do not go together")
    kept = labels >= 0
    if not kept.any():
        raise ValueError("holds no image with a label")
    if labels.max() >= len(classes):
        raise ValueError(f"holds label {labels.max()} of {len(classes)} classes")
    if not np.isfinite(features).all():
        raise ValueError("holds features that are not finite")
    return {
        "init": init,
        "data": data,
        "classes": classes,
        "features": features[kept],
        "labels": labels[kept],
    }

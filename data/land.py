"""Land-1.0: `RGB Images/{train,val,test}/FILE` beside `CSV/csv_{train,val,test}.csv` with the fractions of
each image.

The CSVs are read by position, as their header is documented nowhere: column 3 (from 0) names the file, and
the fractions stand in the columns of numbers from column 5 on: ten at Level_N2, four at Level_N1.
"""

import io
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from common import DataError
from data.folders import Folder, by_stem, stem_of
from data.names import bare_name, land_names, some_of, split_name

NAME_COLUMN, FIRST_FRACTION = 3, 5
ROUNDING = 1e-5  # sums that miss 1 by more than this are counted, and
TOLERANCE = 0.05  # refused beyond this


class Part(NamedTuple):
    """One split of Land-1.0."""

    files: list[str]  # posix paths relative to the root
    fractions: np.ndarray  # (n, K) float64, rows sum to 1
    split: str
    classes: list[str]
    notes: list[str]


def child(folder: Folder, name: str) -> Folder | None:
    """The folder inside that is called `name`, whatever its case, blanks and underscores."""
    for inside in folder.folders:
        if bare_name(inside.name) == bare_name(name):
            return inside
    return None


def find_land(folder: Folder) -> tuple[Folder, list[str]] | None:
    """(the level to read, notes) where a folder is Land-1.0 or one of its levels, else None."""
    if child(folder, "RGB Images") and child(folder, "CSV"):
        return folder, []
    levels = [child(folder, name) for name in ("Level_N2", "Level_N1")]
    levels = [level for level in levels if level and child(level, "RGB Images")]
    if not levels:
        return None
    if len(levels) == 2:
        note = f"{folder.path}: {levels[0].name} is read; for {levels[1].name} name that folder with --data"
        return levels[0], [note]
    return levels[0], []


def read_land(root: Folder) -> list[Part]:
    """The parts of one level, in the order train, val, test. DataError names file and line."""
    images, csv_folder = child(root, "RGB Images"), child(root, "CSV")
    if csv_folder is None:
        raise DataError(f"{root.path}: holds {images.name}/ but no folder CSV/ with csv_train.csv")
    files = find_csvs(csv_folder.path)
    splits = {}
    for folder in images.folders:
        name = split_name(folder.name)
        if name is None:
            continue
        if name in splits:
            raise DataError(f"{images.path}: {splits[name].name} and {folder.name} are both {name}: keep one")
        splits[name] = folder
    parts = []
    for name in ("train", "val", "test"):
        if name in files and name not in splits:
            raise DataError(f"{files[name]}: {images.path} has no folder {name} for it")
        if name in files:
            parts.append(read_part(root.path, files[name], splits[name], name))
    for part in parts[1:]:
        if part.classes != parts[0].classes:
            raise DataError(
                f"{csv_folder.path}: the files name different classes from column {FIRST_FRACTION} on: "
                f"{', '.join(parts[0].classes)} ({parts[0].split}) and "
                f"{', '.join(part.classes)} ({part.split})"
            )
    present = np.any([part.fractions.any(0) for part in parts], axis=0)
    absent = [name for name, there in zip(parts[0].classes, present) if not there]
    if absent:
        parts[0].notes.append(f"{csv_folder.path}: no image holds any {some_of(absent)}: is it a class?")
    return parts


def find_csvs(folder: Path) -> dict[str, Path]:
    """Split -> CSV file; DataError if there are none, or two for one split."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() != ".csv" or file.name.startswith("."):
            continue
        words = re.findall(r"[^\W\d_]+", file.stem.casefold())
        split = next((split_name(word) for word in words if split_name(word)), None)
        if split in found:
            raise DataError(f"{folder}: {found[split].name} and {file.name} are both for {split}: keep one")
        if split:
            found[split] = file
    if not found:
        raise DataError(f"{folder}: holds no csv_train.csv, csv_val.csv or csv_test.csv")
    return found


def read_part(root: Path, file: Path, folder: Folder, split: str) -> Part:
    """The images and fractions of one CSV."""
    cells = read_cells(file)
    numbers, lines = fraction_columns(file, cells), cells.index.to_numpy() + 2
    fractions, notes = normalised(file, numbers, lines)
    names, index = cells.iloc[:, NAME_COLUMN].tolist(), by_stem(folder.images)
    found = [locate(name, index, folder, f"{file}, line {line}") for name, line in zip(names, lines)]
    check_missing(file, folder.path, names, found, lines)
    keep = first_of_each(file, found, fractions, lines)
    if len(keep) < len(found):
        notes.append(f"{file}: {len(found) - len(keep)} lines repeat another and are left out")
    renamed = sum(name != image for name, image in zip(names, found))
    if renamed:
        notes.append(f"{file}: {renamed} names differ from their files in suffix or case")
    unnamed = len(folder.images) - len(keep)
    if unnamed:
        notes.append(f"{folder.path}: {unnamed} images are in no line of {file.name}: left out")
    place = folder.path.relative_to(root).as_posix()
    files = [f"{place}/{found[i]}" for i in keep]
    classes = land_names([str(name) for name in numbers.columns])
    return Part(files, fractions[keep], split, classes, notes)


def read_cells(file: Path) -> pd.DataFrame:
    """All cells of a CSV as text, blank lines dropped: any byte-order mark, line ending and common
    separator."""
    data = file.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = data.decode(encoding, errors="replace")
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    try:
        cells = pd.read_csv(
            io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, skip_blank_lines=False
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{file}: not a readable CSV ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(cells.index, pd.RangeIndex):
        raise DataError(f"{file}: the lines hold more cells than the header")
    if cells.shape[1] <= FIRST_FRACTION:
        raise DataError(
            f"{file}: has {cells.shape[1]} columns; Land-1.0 has the file in column {NAME_COLUMN} and "
            f"fractions from column {FIRST_FRACTION} on"
        )
    cells = cells.fillna("").apply(lambda column: column.str.strip()).rename(columns=str.strip)
    if separator != ",":  # where commas are free, they may be decimal
        cells.iloc[:, FIRST_FRACTION:] = cells.iloc[:, FIRST_FRACTION:].apply(
            lambda c: c.str.replace(",", ".")
        )
    cells = cells[(cells != "").any(axis=1)]
    if cells.empty:
        raise DataError(f"{file}: holds no line below its header")
    return cells


def fraction_columns(file: Path, cells: pd.DataFrame) -> pd.DataFrame:
    """(n, K) numbers: the columns from FIRST_FRACTION on, up to the first that mostly holds no numbers."""
    taken = []
    for position in range(FIRST_FRACTION, cells.shape[1]):
        column = cells.iloc[:, position]
        numbers = pd.to_numeric(column, errors="coerce")
        written = numbers.notna() | column.str.casefold().isin(["", "nan", "na"])
        is_blank = str(column.name).startswith("Unnamed") and not (column != "").any()
        if is_blank or written.mean() <= 0.5 or bare_name(str(column.name)) == "classmax":
            break
        taken.append(numbers)
    if len(taken) < 2:
        raise DataError(
            f"{file}: has {cells.shape[1]} columns, {len(taken)} of them numbers from column "
            f"{FIRST_FRACTION} on, where Land-1.0 has four or ten fractions"
        )
    return pd.concat(taken, axis=1)


def normalised(file: Path, numbers: pd.DataFrame, lines: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(fractions (n, K) whose rows sum to 1, notes): per cent are divided by 100, small errors of the sum
    mended."""
    fractions, notes = numbers.to_numpy(np.float64), []
    sums = fractions[np.isfinite(fractions).all(1)].sum(1)
    if len(sums) and abs(np.median(sums) - 100) <= 100 * TOLERANCE:
        fractions = fractions / 100
        notes.append(f"{file}: fractions in per cent, divided by 100")
    sums = fractions.sum(1)
    missed = abs(sums - 1)
    with np.errstate(invalid="ignore"):
        wrong = ~np.isfinite(fractions).all(1) | (fractions < 0).any(1) | (missed > TOLERANCE + 1e-9)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{file}, line {lines[row]}: the fractions are {np.round(fractions[row], 4).tolist()} (the "
            f"{fractions.shape[1]} columns of numbers from column {FIRST_FRACTION} on); numbers from 0 to 1 "
            f"that sum to 1 are needed ({wrong.sum()} of {len(wrong)} lines are wrong)"
        )
    if off := int((missed > ROUNDING).sum()):
        notes.append(
            f"{file}: {off} of {len(sums)} lines miss the sum of 1, by {missed.max():.3f} at most: normalised"
        )
    return fractions / sums[:, None], notes


def locate(name: str, index: dict[str, list[int]], folder: Folder, where: str) -> str | None:
    """The image that a CSV names, with its own suffix or another or none; None if it is not in the folder.

    DataError, saying `where`, for a name that leads out of the folder or fits several images.
    """
    plain = name.replace("\\", "/")
    if not plain or os.path.isabs(plain) or ".." in plain.split("/"):
        raise DataError(f"{where}: {name!r} is no file inside {folder.path}")
    wanted = plain.rsplit("/", 1)[-1]
    found = [folder.images[row] for row in index.get(stem_of(wanted), [])]
    if wanted in found:
        return wanted
    if len(found) > 1:
        raise DataError(f"{where}: {name} may be {' or '.join(found[:2])} in {folder.path}")
    return found[0] if found else None


def check_missing(
    file: Path, folder: Path, names: list[str], found: list[str | None], lines: np.ndarray
) -> None:
    """DataError that counts the images which are not there and names the first."""
    missing = [i for i, image in enumerate(found) if image is None]
    if missing:
        first = missing[0]
        raise DataError(
            f"{file}, line {lines[first]}: {folder / names[first]} is missing "
            f"({len(missing)} of {len(found)} images are)"
        )


def first_of_each(file: Path, found: list[str], fractions: np.ndarray, lines: np.ndarray) -> list[int]:
    """Positions of the first line of each image; DataError where two lines give one image different
    fractions."""
    first: dict[str, int] = {}
    for i, image in enumerate(found):
        before = first.setdefault(image, i)
        if not np.allclose(fractions[i], fractions[before], atol=1e-6):
            raise DataError(
                f"{file}, lines {lines[before]} and {lines[i]}: {image} has two different sets of fractions"
            )
    return list(first.values())

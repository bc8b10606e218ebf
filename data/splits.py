"""Which images train, and which are kept out: the paper's rule, other people's lists, or blocks of the globe.

All of it is seeded, and the same at every call. A split is an array of names: train, val, test, or '' for
left out.
"""

import random
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from common import DataError
from data.folders import IMAGE_ENDS, stem_of
from data.names import SPLITS, plain_name, split_name

NAMES = ("train", "val", "test")
OR_NONE = "; to pretrain on all images, whatever their folders, add --split none"
SHARES = (0.9, 0.025, 0.075)  # of the paper's three splits
SEED = 42  # of the authors' splits
BLOCK = 1.0  # degrees along a side of the blocks that a spatial split keeps together
GAP = 0.1  # degrees of latitude and of longitude between a training image and any of val or test
_PLACE = re.compile(r"\(\s*([+-]?\d+(?:\.\d+)?)\s*,\s*([+-]?\d+(?:\.\d+)?)\s*\)")
_LABELLED = re.compile(rf"(.+?(?:{IMAGE_ENDS}))[\"']?[\s,;].*", re.IGNORECASE)  # a/b.jpg 0, a/b.jpg,0


# The paper's rule


def split_counts(n: int, shares: tuple[float, ...] = SHARES) -> tuple[int, int, int]:
    """(train, val, test) of a class of n images: int(0.9 n), int(0.025 n) and the rest.

    The rule that gives the paper's 175,381 / 4,861 / 14,635 from the class sizes of its Table II.
    """
    train, val = int(shares[0] * n), int(shares[1] * n)
    return train, val, n - train - val


def split_classes(labels: np.ndarray, seed: int = SEED, shares: tuple[float, ...] = SHARES) -> np.ndarray:
    """Split names (n,) for labels (n,) of files sorted by name within each class: the authors' members.

    As their tool, split-folders 0.6.1, does it: Python's generator is seeded anew for each class, the
    sorted file names are shuffled and cut by `split_counts`.
    """
    split = np.empty(len(labels), dtype="<U5")
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label).tolist()
        random.Random(seed).shuffle(rows)
        split[rows] = np.repeat(NAMES, split_counts(len(rows), shares))
    return split


# Other people's lists


def split_by_lists(root: Path, files: np.ndarray, folder: Path) -> tuple[np.ndarray, list[str]]:
    """(split (n,), notes) of files (n,), posix paths below root, by the lists in `folder`.

    Images in no list are left out. Names that are not on disk are counted in the notes. DataError for a
    name in two lists, one that fits several images, and lists that name nothing.
    """
    lists, notes = find_lists(folder)
    index = by_ends(files)
    split = np.full(len(files), "", dtype="<U5")
    named, absent = 0, 0
    for name, file in lists.items():
        lines = read_list(file)
        named += len(lines)
        for line in lines:
            row = find_row(line, index, files, file)
            if row is None:
                row = find_row(_LABELLED.sub(r"\1", line), index, files, file)
            if row is None:
                absent += 1
                continue
            if split[row] not in ("", name):
                raise DataError(f"{file}: {line} is in {lists[split[row]].name} too: an image has one split")
            split[row] = name
    if not (split == "train").any():
        raise DataError(
            f"{lists['train']}: names none of the {len(files):,} images below {root}: its first line is "
            f"{read_list(lists['train'])[0]!r}, where a name or path such as {files[0]} is needed"
        )
    if absent:
        notes.append(f"{absent:,} of the {named:,} names in the lists of {folder} are not below {root}")
    if unlisted := int((split == "").sum()):
        notes.append(f"{unlisted:,} of {len(files):,} images are in none of the lists of {folder}: left out")
    return split, notes


def find_lists(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """(split -> its list, notes), of the text files `*train*.txt`, `*val*.txt` and `*test*.txt` in a folder.

    A list for two splits, `trainval.txt`, is passed over where each of them has its own.
    """
    if not folder.is_dir():
        raise DataError(f"--splits {folder}: no such folder")
    lists: dict[str, Path] = {}
    unions: dict[Path, set[str]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() != ".txt" or file.name.startswith("."):
            continue
        found = list_splits(file)
        if len(found) > 1:
            unions[file] = found
            continue
        for split in found:
            if split in lists:
                raise DataError(
                    f"--splits {folder}: {lists[split].name} and {file.name} are both for {split}: keep one"
                )
            lists[split] = file
    for file, found in unions.items():
        if not found <= lists.keys():
            speaks = " and ".join(sorted(found))
            raise DataError(f"{file}: its name speaks of {speaks}: one list is for one split")
    if "train" not in lists:
        raise DataError(
            f"--splits {folder}: holds no *train*.txt (nor is one made from *val*.txt or *test*.txt)"
        )
    return lists, [f"{file} is not read: its splits have lists of their own" for file in unions]


def list_splits(file: Path) -> set[str]:
    """The splits that a list's file name mentions, usually one: as a word, else as part of a word."""
    stem = file.stem.casefold()
    words = {SPLITS[word] for word in re.findall(r"[^\W\d_]+", stem) if word in SPLITS}
    found = words or {name for name in NAMES if name in stem}
    return found or {split_name(stem)} - {None}


def read_list(file: Path) -> list[str]:
    """The names or paths in a list, one a line, once each; DataError if there are none."""
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    if "\0" in text:
        raise DataError(f"{file}: is no UTF-8 text (Notepad: Save as, Encoding, UTF-8)")
    lines = [line.strip().strip("\"'").replace("\\", "/") for line in text.splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not lines:
        raise DataError(f"{file}: names no image, one a line")
    return lines


class Ends(NamedTuple):
    """Rows of files by how their paths end, so that a list of many lines is looked up line by line."""

    some: dict[str, list[int]]  # end of a path, folder by folder → rows
    whole: dict[str, list[int]]  # path below the folder of images → rows: one, or one a suffix


def ends_of(path: str) -> list[str]:
    """The path without an image's suffix and differences of case, then without its first folder, and so on:
    a/b/c, b/c, c."""
    folders = [plain_name(part) for part in PurePosixPath(path).parts[:-1] if part not in ("/", ".")]
    parts = [*folders, stem_of(path)]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def by_ends(files: np.ndarray) -> Ends:
    """The index of files (n,), posix paths below the folder of images."""
    found = Ends(defaultdict(list), defaultdict(list))
    for row, file in enumerate(files):
        ends = ends_of(file)
        found.whole[ends[0]].append(row)
        for end in ends:
            found.some[end].append(row)
    return found


def find_row(line: str, index: Ends, files: np.ndarray, where: Path) -> int | None:
    """The row of the file that a line of a list names, None if it is not there; DataError if there are
    several.

    The two paths agree from their ends on, folder by folder, as far as both go; the suffix may differ where
    no file has the line's own.
    """
    whole, *shorter = ends_of(line)
    rows = [*index.some.get(whole, []), *(row for end in shorter for row in index.whole.get(end, []))]
    exact = [row for row in rows if files[row].rsplit("/", 1)[-1] == line.rsplit("/", 1)[-1]]
    rows = exact or rows
    if len(rows) > 1:
        found = " and ".join(files[row] for row in rows[:2])
        raise DataError(f"{where}: {line} may be {found}: give the path below the folder of images")
    return rows[0] if rows else None


# Blocks of the globe


def split_by_place(root: Path, files: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(split (n,), notes): blocks of one degree go to a split as a whole, by the coordinates in the file
    names.

    The shares are the paper's, as nearly as blocks allow, class by class. Training images that lie within
    `GAP` of an image of val or test are left out. DataError where a file name holds no coordinates.
    """
    places = coordinates(root, files)
    split = split_blocks(np.floor(places / BLOCK).astype(int), labels)
    near = near_others(places, split)
    split[near] = ""
    blocks = len(np.unique(np.floor(places / BLOCK), axis=0))
    counts = ", ".join(f"{np.count_nonzero(split == name):,} {name}" for name in NAMES)
    note = (
        f"--split spatial: {blocks:,} blocks of {BLOCK:g} degree give {counts} images; {near.sum():,} "
        f"training images within {GAP:g} degree of val or test are left out"
    )
    return split, [note]


def coordinates(root: Path, files: np.ndarray) -> np.ndarray:
    """(n, 2) latitude and longitude in degrees, from `(lat,lon)` in the names as in Sentinel2GlobalLULC's
    files."""
    places = np.empty((len(files), 2))
    for row, file in enumerate(files):
        found = _PLACE.findall(file.rsplit("/", 1)[-1])
        if not found:
            # data.tiles names the patches of a projected scene by (x=…,y=…)
            what = "metres, not degrees" if "(x=" in file else "none"
            raise DataError(
                f"{root}: --split spatial needs coordinates in the file names, as Sentinel2GlobalLULC "
                f"has them (…_(+7.57,+17.15)_…), and {file} holds {what}: give lists with --splits instead"
            )
        places[row] = tuple(map(float, found[-1]))  # data.tiles puts a patch's behind its scene's name
    wrong = (abs(places) > (90, 360)).any(1)
    if wrong.any():
        raise DataError(f"{root}: {files[wrong.argmax()]} holds no latitude and longitude in degrees")
    return places


def split_blocks(blocks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Split names (n,) for the blocks (n, 2) and labels (n,) of images.

    In a seeded order, each block goes to the split that lacks most of what the block holds: the class
    counts still wanted, as shares of the class.
    """
    _, block = np.unique(blocks, axis=0, return_inverse=True)
    _, label = np.unique(labels, return_inverse=True)
    block = block.ravel()
    counts = np.zeros((block.max() + 1, label.max() + 1))
    np.add.at(counts, (block, label), 1)
    wanted = np.array(SHARES)[:, None] * counts.sum(0)  # (3, classes)
    lacking = wanted.copy()
    chosen = np.empty(len(counts), int)
    for number in np.random.default_rng(SEED).permutation(len(counts)):
        chosen[number] = (lacking / wanted @ counts[number]).argmax()
        lacking[chosen[number]] -= counts[number]
    return np.array(NAMES)[chosen][block]


def near_others(places: np.ndarray, split: np.ndarray) -> np.ndarray:
    """(n,) bool: the training images that lie within `GAP` of an image of val or test.

    Distances are angles on the globe, so that the poles and the date line are no edges; sqrt(2) GAP covers
    every pair that is within GAP in latitude and in longitude.
    """
    train, near = split == "train", np.zeros(len(split), bool)
    if train.all() or not train.any():
        return near
    latitude, longitude = np.radians(places).T
    across = np.cos(latitude)
    points = np.stack([across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)], 1)
    chord = 2 * np.sin(np.radians(np.sqrt(2) * GAP) / 2) + 1e-9
    distance, _ = cKDTree(points[~train]).query(points[train], distance_upper_bound=chord)
    near[train] = np.isfinite(distance)
    return near

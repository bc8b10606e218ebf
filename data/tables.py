"""A dataset is a table: one row per image with its file, label, fractions and split. Any folder becomes one here."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from common import DataError
from data.splits import split_classes, stratified_subset

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}  # folder name -> split


@dataclass(frozen=True)
class Table:
    root: Path
    files: np.ndarray  # (n,) str: posix paths relative to root
    labels: np.ndarray  # (n,) int64: index into classes, -1 without a label
    split: np.ndarray  # (n,) str: train, val or test
    classes: list[str]
    fractions: np.ndarray | None = None  # (n, len(classes)) float32: land-cover fractions of each image

    def __len__(self):
        return len(self.files)

    def rows(self, which: np.ndarray) -> "Table":
        """The table of the rows that a mask or an index array picks."""
        fractions = None if self.fractions is None else self.fractions[which]
        return replace(
            self,
            files=self.files[which],
            labels=self.labels[which],
            split=self.split[which],
            fractions=fractions,
        )

    def targets(self, task: str) -> np.ndarray:
        """(n, len(classes)) float32: the fractions or, for task `scene`, one-hot labels."""
        return np.eye(len(self.classes), dtype=np.float32)[self.labels] if task == "scene" else self.fractions


def load_table(root: str | Path) -> Table:
    """Table of a folder laid out as Land-1.0, as {train,val,test}/CLASS/, as CLASS/ folders, or as images alone.

    Sentinel2GlobalLULC loads raw or split. Where the folder brings no split of its own, the paper's rule makes one,
    the same at every call; images without classes are all for training.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root}: is a file, not a folder of images")
    land = root if (root / "RGB Images").is_dir() else root / "Level_N2"
    if (land / "RGB Images").is_dir():
        return land_table(land)
    folders = sorted(
        (f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")), key=class_order
    )
    loose = images_below(root, recursive=False)
    if len(folders) == 1 and not loose and any(f.is_dir() for f in folders[0].iterdir()):
        return load_table(folders[0])  # an archive unpacked into a folder of its own
    if {f.name for f in folders} <= SPLITS.keys() and any(f.name == "train" for f in folders):
        table = split_table(root, folders)
    elif loose and not any(images_below(f) for f in folders):
        table = Table(root, names(root, loose), np.full(len(loose), -1), np.full(len(loose), "train"), [])
    else:
        if loose:
            raise DataError(
                f"{root}: holds images ({loose[0].name}, …) beside folders of images: move them into a folder"
            )
        table = class_table(root, folders)
    if not len(table):
        raise DataError(f"{root}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return table


def training_subsets(
    table: Table, targets: np.ndarray, ratios: list[float], seeds: list[int]
) -> dict[tuple, np.ndarray]:
    """(ratio %, seed) -> rows of the stratified share of the training images; refused where it lacks a class.

    targets (n, K): fractions or one-hot labels.
    """
    train, subsets = np.flatnonzero(table.split == "train"), {}
    for ratio, seed in ((r, s) for r in ratios for s in seeds):
        subset = train[stratified_subset(table.labels[train], ratio / 100, seed)]
        if absent := [
            table.classes[k] for k in np.flatnonzero((targets[subset].sum(0) == 0) & (targets.sum(0) > 0))
        ]:
            raise DataError(
                f"{table.root}: --ratios {ratio:g} leaves {len(subset)} training images (seed {seed}), none of them with "
                f"class {', '.join(absent)}, which other images have: raise the ratio or leave the class out"
            )
        subsets[ratio, seed] = subset
    return subsets


def class_table(
    root: Path, folders: list[Path], split: str | None = None, classes: list[str] | None = None
) -> Table:
    found = [(folder.name, images_below(folder)) for folder in folders]
    found = [(name, images) for name, images in found if images]
    classes = classes or [name for name, _ in found]
    labels = np.repeat(
        [classes.index(name) for name, _ in found], [len(images) for _, images in found]
    ).astype(np.int64)
    files = names(root, [image for _, images in found for image in images])
    return Table(
        root, files, labels, split_classes(labels) if split is None else np.full(len(files), split), classes
    )


def split_table(root: Path, folders: list[Path]) -> Table:
    """{train,val,test}/CLASS/ folders; images lying directly in the split folders have no label."""
    inside = {f: sorted((c for c in f.iterdir() if c.is_dir()), key=class_order) for f in folders}
    classes = [
        c.name for c in sorted({c.name: c for cs in inside.values() for c in cs}.values(), key=class_order)
    ]
    parts = [class_table(root, inside[f], SPLITS[f.name], classes) for f in folders]
    for folder in folders:
        loose = images_below(folder, recursive=False)
        parts.append(
            Table(
                root,
                names(root, loose),
                np.full(len(loose), -1),
                np.full(len(loose), SPLITS[folder.name]),
                [],
            )
        )
    return Table(
        root, *(np.concatenate([getattr(p, c) for p in parts]) for c in ("files", "labels", "split")), classes
    )


def land_table(root: Path) -> Table:
    """Land-1.0: RGB Images/{train,val,test}/FILE and CSV/csv_{train,val,test}.csv; column 3 names the file, columns
    5-14 hold the fractions. The label is the class of the largest fraction."""
    parts = []
    for name in ("train", "val", "validation", "test"):
        file = root / "CSV" / f"csv_{name}.csv"
        if file.exists():
            parts.append(land_split(root, file, name))
    if not parts:
        raise DataError(f"{root / 'CSV'}: holds no csv_train.csv, csv_val.csv or csv_test.csv")
    for part in parts[1:]:
        if part.classes != parts[0].classes:
            raise DataError(f"{root / 'CSV'}: the files name different classes in columns 5 to 14")
    columns = (np.concatenate([getattr(p, c) for p in parts]) for c in ("files", "labels", "split"))
    return Table(root, *columns, parts[0].classes, np.concatenate([p.fractions for p in parts]))


def land_split(root: Path, file: Path, name: str) -> Table:
    try:
        csv = pd.read_csv(file)
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{file}: not a readable CSV ({error})") from None
    if csv.shape[1] < 15:
        raise DataError(
            f"{file}: has {csv.shape[1]} columns; Land-1.0 has the file in column 3 and fractions in 5 to 14"
        )
    fractions = csv.iloc[:, 5:15].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    wrong = ~np.isfinite(fractions).all(1) | (fractions < 0).any(1) | (abs(fractions.sum(1) - 1) > 1e-2)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{file}, line {row + 2}: the fractions are {np.round(fractions[row], 4).tolist()}; "
            "ten numbers from 0 to 1 that sum to 1 are needed"
        )
    files = np.array([f"RGB Images/{name}/{f}" for f in csv.iloc[:, 3]], dtype=object)
    for i, f in enumerate(files):
        if not (root / f).is_file():
            raise DataError(f"{file}, line {i + 2}: {root / f} is missing")
    fractions = (fractions / fractions.sum(1, keepdims=True)).astype(np.float32)
    return Table(
        root,
        files,
        fractions.argmax(1),
        np.full(len(files), SPLITS[name]),
        list(csv.columns[5:15]),
        fractions,
    )


def class_order(folder: Path):
    """By the leading number where there is one (`10_…` after `9_…`), then by name."""
    number = re.match(r"\d+", folder.name)
    return (0, int(number[0]), folder.name) if number else (1, 0, folder.name)


def images_below(folder: Path, recursive: bool = True) -> list[Path]:
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(
        f for f in found if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".") and f.is_file()
    )


def names(root: Path, files: list[Path]) -> np.ndarray:
    return np.array([f.relative_to(root).as_posix() for f in files], dtype=object)

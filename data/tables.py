"""A dataset is a table: one row per image with its file, label, fractions and split. Any folder becomes one
here."""

import contextlib
import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import DataError
from data import tiff
from data.folders import (
    ARCHIVES,
    IMAGE_SUFFIXES,
    MANY,
    NO_SUFFIX,
    OTHER_PICTURES,
    Folder,
    Scan,
    real_paths,
    scan,
)
from data.land import Part, find_land, read_land
from data.names import (
    around_mask,
    class_key,
    class_name,
    class_order,
    holds_masks,
    is_filler,
    is_numbered,
    paper_name,
    some_of,
    split_name,
)
from data.splits import (
    BLOCK,
    NAMES,
    OR_NONE,
    find_lists,
    split_by_lists,
    split_by_place,
    split_classes,
)

# Blue, green and red of a picture: S2A_17_B04.tif, T31_B04_10m.tif, 17/B4.TIF, B04/17.tif
BAND = re.compile(r"(?<![^_/-])B0?([234])(?=(?:_\d\dm)?\.tiff?$|/.+\.tiff?$)", re.IGNORECASE)
PICTURE_ENDS = ("", "_sat", "_image", "_img", "_rgb", "_RGB")  # of the picture that a mask belongs to


@dataclass(frozen=True)
class Table:
    """The images of a folder, row by row."""

    root: Path
    files: np.ndarray  # (n,) str: posix paths relative to root
    labels: np.ndarray  # (n,) int64: index into classes, -1 without a label
    split: np.ndarray  # (n,) str: train, val or test
    classes: list[str]  # the paper's names where it has them, else the folders'
    fractions: np.ndarray | None = None  # (n, len(classes)) float32: land-cover fractions of each image
    # where the split comes from: paper, folders, csv, lists, spatial; none without classes
    rule: str = "paper"
    notes: tuple[str, ...] = ()  # what was left out or mended, a line each

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
        """(n, len(classes)) float32: the fractions or, for task `scene`, one-hot labels, all zeros where
        there is no label."""
        if task != "scene":
            return self.fractions
        one_hot = np.eye(len(self.classes), dtype=np.float32)[self.labels]
        return one_hot * (self.labels >= 0)[:, None]


def load_table(root: str | Path, splits: str | Path | None = None, split: str = "paper") -> Table:
    """Table of a folder laid out as Land-1.0, as {train,val,test}/CLASS/, as CLASS/ folders, or as images
    alone.

    Sentinel2GlobalLULC loads raw or split, in folders of its own, beside CSVs and what archives leave
    behind. Where the folder brings no split, the paper's rule makes one, the same at every call; images
    without classes are all for training. `splits` names a folder of lists that take the place of either,
    `split="spatial"` cuts by the coordinates in the file names, `split="none"` takes all images at any depth
    for training, whatever their folders are. DataError, with names, for a folder that could be read in two
    ways.
    """
    if splits and split != "paper":
        raise DataError(f"--splits and --split {split} are two ways to split: give one")
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root}: is a file, not a folder of images: unpack it if it is an archive")
    tree, walk = scan(root)
    table = flat_table(tree) if split == "none" else read_tree(tree)
    refuse_masks(table)
    refuse_bands(table)
    table = without_repeats(table, walk)
    notes = (*walk.notes, *table.notes, *notes_on_twins(table), *notes_on_others(tree))
    table = replace(table, notes=notes)
    if not splits and split == "paper" and table.rule in ("paper", "none"):
        table = replace(table, notes=(*notes, *notes_on_lists(root), *notes_on_csvs(root, table.root)))
    for name, count in Counter(table.classes).items():
        if count > 1:
            raise DataError(f"{table.root}: two classes would be called {name}: rename one")
    if splits:
        return resplit(table, "lists", *split_by_lists(table.root, table.files, Path(splits)))
    if split == "spatial":
        if table.rule in ("folders", "csv"):
            own = f"{table.root}: its own split of the images is not used, as --split spatial makes another"
            table = replace(table, notes=(*table.notes, own))
        return resplit(table, "spatial", *split_by_place(table.root, table.files, table.labels))
    return table


def explain_empty(table: Table, split: str) -> str:
    """Why no image of a table is in `split`, and what to do about it: one line for an error or a warning."""
    counts = np.bincount(table.labels[table.labels >= 0], minlength=1)
    unlabelled = int(((table.split == split) & (table.labels < 0)).sum())
    kind = "labelled image" if table.classes or unlabelled else "image"
    what = f"{table.root}: no {kind} is in the {split} split"
    if unlabelled:
        return f"{what}: its {unlabelled:,} images have no labels; sort them into folders of classes"
    if table.rule == "lists":
        return f"{what}: the lists of --splits name none that is there"
    if table.rule == "folders":
        return f"{what}: there is no folder {split}/ with images; add it, or name lists with --splits"
    if table.rule == "csv":
        return f"{what}: CSV/csv_{split}.csv is missing or names no image"
    if table.rule == "spatial":
        return f"{what}: the images cover too few blocks of {BLOCK:g} degree; leave out --split spatial"
    if table.rule == "none":
        return (
            f"{what}: images without classes all train; lay some out as {split}/CLASS, without --split none"
        )
    least = {"train": 2, "val": 40, "test": 1}[split]
    or_none = OR_NONE if counts.max() == 1 else ""  # a folder for each image is no class
    share = {"train": "int(0.9 n)", "val": "int(0.025 n)", "test": "the rest"}[split]
    return (
        f"{what}: the paper's rule gives it {share} of the n images of each class, and the largest class "
        f"has {counts.max()}; give a class at least {least} images, lay the folder out as train/, val/ and "
        f"test/, or name lists with --splits{or_none}"
    )


# From a tree of folders to a table: the one rule of what a split, a class and an image is


def read_tree(folder: Folder) -> Table:
    """The table of a folder; a folder that only wraps another, or stands beside empty ones, is stepped
    over."""
    land = find_land(folder)
    if land:
        return land_table(*land)
    kids = folder.kids()
    splits = split_folders(folder)
    if splits:
        return split_table(folder, splits)
    if not kids:
        return flat_table(folder)
    if folder.images:
        raise DataError(
            f"{folder.path}: holds images ({folder.images[0]}, …) beside folders of images: move them "
            f"into a folder{OR_NONE}"
        )
    if len(kids) == 1 and (kids[0].kids() or is_filler(kids[0].name)):
        return read_tree(kids[0])  # an archive unpacked into a folder of its own
    refuse_datasets(folder, kids)
    return class_table(folder, kids)


def split_folders(folder: Folder) -> dict[str, Folder]:
    """Split -> folder, where folders with images are named after splits; refused where it is not clear
    which is which.

    A folder that holds splits itself is a dataset, whatever it is called.
    """
    found: dict[str, Folder] = {}
    others = []
    for kid in folder.kids():
        name = split_name(kid.name)
        if not name or len({split_name(inside.name) for inside in kid.kids()} - {None}) > 1:
            others.append(kid.name)
        elif name in found:
            raise DataError(f"{folder.path}: {found[name].name} and {kid.name} are both {name}: keep one")
        else:
            found[name] = kid
    if found and (others or folder.images):
        beside = ", ".join([*others, *folder.images][:3])
        raise DataError(
            f"{folder.path}: holds {', '.join(f.name for f in found.values())} and, beside, images in "
            f"{beside}: move them away, or rename what is no split"
        )
    return {name: found[name] for name in NAMES if name in found}


def refuse_datasets(folder: Folder, kids: list[Folder]) -> None:
    """DataError where folders side by side are datasets rather than classes: they hold splits, or the same
    classes, or are called `images`."""
    fillers = [kid.name for kid in kids if is_filler(kid.name)]
    if fillers and len(kids) > 1:
        raise DataError(
            f"{folder.path}: {', '.join(kid.name for kid in kids[:6])} lie side by side, and {fillers[0]} is "
            f"the name of no class: name one of them with --data, or rename it{OR_NONE}"
        )
    cores = {kid.name: core_of(kid) for kid in kids}
    datasets = [kid for kid in kids if is_dataset(cores[kid.name])]
    inside: Counter = Counter()
    for core in cores.values():
        inside.update(class_key(name) for name in class_names_in(core))
    for kid in kids:
        core = cores[kid.name]
        shared = [name for name in class_names_in(core) if inside[class_key(name)] > 1]
        if kid not in datasets and len(shared) > 1 and 2 * len(shared) >= len(core.kids()):
            datasets.append(kid)
    if datasets:
        found = ", ".join(f"{kid.name} ({kid.count:,} images)" for kid in kids[:6])
        held = ", ".join(inner.name for inner in cores[datasets[0].name].kids()[:3])
        raise DataError(
            f"{folder.path}: {found} lie side by side, and {datasets[0].name} holds classes itself, "
            f"{held}: name one of them with --data{OR_NONE}"
        )


def core_of(folder: Folder) -> Folder:
    """The folder that others only wrap, as archives do that are unpacked into one of their own."""
    while len(folder.kids()) == 1 and not folder.images:
        folder = folder.kids()[0]
    return folder


def class_names_in(kid: Folder) -> list[str]:
    """The folders in one that may be classes: years and numbers of parts are not."""
    return [inside.name for inside in kid.kids() if not inside.name.isdigit() and not is_filler(inside.name)]


def is_dataset(kid: Folder) -> bool:
    """Whether a folder holds splits, Land-1.0, or two classes that are numbered or known."""
    names = [inside.name for inside in kid.kids()]
    if find_land(kid) or len({split_name(name) for name in names} - {None}) > 1:
        return True
    return sum(is_numbered(name) or paper_name(name) is not None for name in names) > 1


def flat_table(folder: Folder) -> Table:
    """Images without classes, at any depth: all are for training."""
    if not folder.count:
        others = folder.suffixes().most_common(3)
        found = ", ".join(f"{n:,} {suffix}" for suffix, n in others)
        advice = {**OTHER_PICTURES, **dict.fromkeys(ARCHIVES, "unpack them")}
        mend = next((f": {advice[suffix]}" for suffix, _ in others if suffix in advice), "")
        held = f"; it holds {found}{mend}" if found else ""
        raise DataError(f"{folder.path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){held}")
    files = relative(folder.path, folder.below())
    return Table(folder.path, files, np.full(len(files), -1), np.full(len(files), "train"), [], rule="none")


def class_table(folder: Folder, kids: list[Folder]) -> Table:
    """CLASS/ folders, split by the paper's rule."""
    classes = {class_key(kid.name): class_name(kid.name) for kid in kids}
    files, labels = class_rows(folder, kids, list(classes))
    table = Table(folder.path, files, labels, split_classes(labels), list(classes.values()))
    return replace(table, notes=(*notes_on_empty(folder), *notes_on_depth(folder), *notes_on_number(kids)))


def split_table(folder: Folder, splits: dict[str, Folder]) -> Table:
    """{train,val,test}/CLASS/ folders; images lying directly in a split's folder have no label."""
    insides = {name: unwrapped(inside, name) for name, inside in splits.items()}
    classes: dict[str, str] = {}
    for inside in insides.values():
        for kid in inside.kids():
            classes.setdefault(class_key(kid.name), kid.name)
    classes = dict(sorted(classes.items(), key=lambda item: class_order(item[1])))
    files, labels, split, notes = [], [], [], []
    for name, inside in insides.items():
        found, label = class_rows(folder, inside.kids(), list(classes))
        loose = relative(folder.path, [inside.path / image for image in inside.images])
        files += [found, loose]
        labels += [label, np.full(len(loose), -1)]
        split.append(np.full(len(found) + len(loose), name))
        notes += notes_on_empty(inside) + notes_on_depth(inside)
    labels = np.concatenate(labels)
    names = [class_name(name) for name in classes.values()]
    table = Table(folder.path, np.concatenate(files), labels, np.concatenate(split), names, rule="folders")
    return replace(table, notes=(*notes, *notes_on_splits(table)))


def unwrapped(folder: Folder, split: str) -> Folder:
    """The folder of a split that holds its classes or images.

    `train/images/`, `train/train/` and an archive's one folder of numbered classes are stepped over.
    """
    kids = folder.kids()
    if len(kids) == 1 and not folder.images:
        name = kids[0].name
        if is_filler(name) or split_name(name) == split or is_dataset(kids[0]):
            return unwrapped(kids[0], split)
    refuse_datasets(folder, kids)
    return folder


def class_rows(root: Folder, kids: list[Folder], keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(files, labels) of class folders, each class sorted by name; DataError where two folders spell one
    class."""
    seen: dict[str, Folder] = {}
    number = {key: label for label, key in enumerate(keys)}
    files, labels = [np.empty(0, object)], [np.empty(0, np.int64)]
    for kid in kids:
        key = class_key(kid.name)
        if key in seen:
            raise DataError(
                f"{kid.path.parent}: {seen[key].name} and {kid.name} spell one class: merge or rename them"
            )
        seen[key] = kid
        found = relative(root.path, kid.below())
        files.append(found)
        labels.append(np.full(len(found), number[key]))
    return np.concatenate(files), np.concatenate(labels)


def notes_on_empty(folder: Folder) -> list[str]:
    """What to say of folders without images that stand where classes stand."""
    empty = folder.empty()
    if not empty:
        return []
    return [f"{folder.path}: no images in {some_of(empty)}"]


def notes_on_depth(folder: Folder) -> list[str]:
    """What to say where the folders that are taken for classes hold none but named folders, or all the same
    numbered ones: these may be the classes."""
    kids = folder.kids()
    numbers = shared_numbers(kids)
    inside = {kid.name: class_names_in(kid) or numbers for kid in kids if not kid.images}
    several = [name for name, folders in inside.items() if len(folders) > 1]
    if not several:
        return []
    first = several[0]
    found = ", ".join(kid.name for kid in kids[:5]) + (", …" if len(kids) > 5 else "")
    return [
        f"{folder.path}: the classes are {found}, as ImageFolder reads them; the folders in {first} "
        f"({', '.join(inside[first][:3])}) are no classes: where they should be, move them up or name "
        f"{first} with --data{OR_NONE}"
    ]


def shared_numbers(kids: list[Folder]) -> list[str]:
    """The numbers that every one of several folders has folders of, longer ones aside, which are years or
    dates."""
    if len(kids) < 2:
        return []
    names = [{inside.name for inside in kid.kids()} for kid in kids]
    numbers = [name for name in set.intersection(*names) if re.fullmatch("[0-9]{1,3}", name)]
    return sorted(numbers, key=class_order)


def notes_on_number(kids: list[Folder]) -> list[str]:
    """What to say where many folders hold a few images each: these are scenes rather than classes."""
    usual = int(np.median([kid.count for kid in kids]))
    if len(kids) < 20 or usual >= 10:
        return []
    return [
        f"{kids[0].path.parent}: {len(kids):,} classes ({', '.join(kid.name for kid in kids[:3])}, …) of "
        f"about {usual} images each, of which a part is held out; these may be scenes{OR_NONE}"
    ]


def notes_on_splits(table: Table) -> list[str]:
    """What to say of splits that are absent, and of classes that no training image has."""
    notes = []
    if set(table.split) == {"train"}:
        notes.append(
            f"{table.root}: there is only train/: all {len(table):,} images train, none is left for val "
            "and test"
        )
    held = {name: set(table.labels[table.split == name]) - {-1} for name in NAMES}
    unseen = sorted((held["val"] | held["test"]) - held["train"])
    if not unseen or not held["train"]:
        return notes
    notes.append(f"{table.root}: no training image of {some_of([table.classes[k] for k in unseen])}")
    for name in ("val", "test"):
        if held[name] and not held[name] & held["train"]:
            notes.append(
                f"{table.root}: none of the {len(held[name]):,} folders in {name}/ is a class of train/: "
                f"these may be scenes; leave {name}/ out, or name lists with --splits"
            )
    return notes


def land_table(level: Folder, notes: list[str]) -> Table:
    """Land-1.0: the label is the class of the largest fraction."""
    parts: list[Part] = read_land(level)
    fractions = np.concatenate([part.fractions for part in parts]).astype(np.float32)
    files = np.concatenate([np.array(part.files, dtype=object) for part in parts])
    split = np.repeat([part.split for part in parts], [len(part.files) for part in parts])
    for part in parts:
        notes = [*notes, *part.notes]
    labels = fractions.argmax(1)
    return Table(
        level.path, files, labels, split, parts[0].classes, fractions, rule="csv", notes=tuple(notes)
    )


# What holds for every layout


def refuse_masks(table: Table) -> None:
    """DataError where masks or thumbnails are among the pictures: in folders that are named so, or beside
    the picture whose name is in theirs."""
    stems = [os.path.splitext(file)[0] for file in table.files]
    there = set(stems)
    masks, pictures = [], []
    for file, stem in zip(table.files, stems):
        *folders, name = stem.split("/")
        own = [part for part in around_mask(name) or () if part]
        beside = any("/".join([*folders, part + end]) in there for part in own for end in PICTURE_ENDS)
        (masks if beside or any(map(holds_masks, folders)) else pictures).append(file)
    if masks and pictures:
        raise DataError(
            f"{table.root}: {len(masks):,} of {len(table):,} pictures are named as masks are, or thumbnails "
            f"({masks[0]}; others: {pictures[0]}): name the folder of pictures with --data, or move the "
            "others away"
        )


def refuse_bands(table: Table) -> None:
    """DataError where a picture has its blue, green and red in files of their own, `…_B02.tif` to
    `…_B04.tif`, as BigEarthNet and the archives of Sentinel-2 and Landsat have them, or in folders,
    `B02/….tif` to `B04/….tif`."""
    bands: dict[str, dict[str, str]] = {}
    for file in table.files:
        if found := list(BAND.finditer(file)):
            last = found[-1]
            without = file[: last.start()] + file[last.end() :]
            for picture in {without, BAND.sub("", file)}:  # B04/17_B04.tif names its band twice
                bands.setdefault(picture, {})[last[1]] = file
    whole = list({files["2"]: files for files in bands.values() if len(files) == 3}.values())
    if whole and has_one_band(table.root / whole[0]["2"]):  # else B2 is the name of a place
        blue, green, red = (shlex.quote(str(table.root / whole[0][band])) for band in "234")
        raise DataError(
            f"{table.root}: {len(whole):,} pictures have a file for each band, as {whole[0]['2']}: make one "
            f"8-bit RGB picture of each: gdalbuildvrt -separate RGB.vrt {red} {green} {blue} && "
            "gdal_translate -ot Byte -scale 0 3558 RGB.vrt RGB.png"
        )


def has_one_band(file: Path) -> bool:
    """Whether a file is a TIFF of one band; False where it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return tiff.pages(file.read_bytes())[0].bands == 1
    return False


def notes_on_twins(table: Table) -> list[str]:
    """What to say of pictures that share folder and name with another: the same scene in two formats, as a
    rule."""
    stems = [os.path.splitext(file)[0] for file in table.files]
    count = Counter(stems)
    twins = [file for file, stem in zip(table.files, stems) if count[stem] > 1]
    if not twins:
        return []
    return [
        f"{table.root}: {len(twins):,} of {len(table):,} pictures have the name of another but for the "
        f"suffix ({twins[0]}, {twins[1]}): copies train twice, and may stand on both sides of a split"
    ]


def notes_on_others(tree: Folder) -> list[str]:
    """What to say of files that look like pictures and are not read."""
    suffixes = tree.suffixes()
    found = Counter({suffix: suffixes[suffix] for suffix in OTHER_PICTURES if suffixes[suffix]})
    if suffixes[NO_SUFFIX] >= MANY:
        found[NO_SUFFIX] = suffixes[NO_SUFFIX]
    if not found:
        return []
    kinds = ", ".join(f"{suffix} {n:,}" for suffix, n in found.most_common())
    return [f"{tree.path}: {found.total():,} files are no pictures that are read ({kinds})"]


def notes_on_lists(root: Path) -> list[str]:
    """What to say of lists of names that lie in a folder whose images are split by no list."""
    try:
        lists, _ = find_lists(root)
    except DataError:
        return []
    names = ", ".join(file.name for file in lists.values())
    return [f"{root}: {names} are not read: to split by such lists, add --splits {root}"]


def notes_on_csvs(*folders: Path) -> list[str]:
    """What to say of train.csv and the like, as Kaggle's archives bring them, which split nothing here."""
    found = sorted({file for folder in folders for file in folder.glob("*.csv") if split_name(file.stem)})
    if not found:
        return []
    names = ", ".join(file.name for file in found)
    mend = "to split by them, write their file names to train.txt, val.txt and test.txt, and add --splits"
    return [f"{found[0].parent}: {names} are not read: {mend}"]


def without_repeats(table: Table, walk: Scan) -> Table:
    """The table with each image once: where links give one image two names, the file itself stays, or the
    first link."""
    if not walk.linked:
        return table
    files = [table.root / file for file in table.files]
    real = real_paths(files, walk)
    first: dict[str, int] = {}
    for row in sorted(range(len(files)), key=lambda row: str(files[row]) != real[row]):
        first.setdefault(real[row], row)
    if len(first) == len(files):
        return table
    kept = np.sort(list(first.values()))
    left = np.setdiff1d(np.arange(len(files)), kept)
    note = (
        f"{table.root}: {len(left)} images are links to others of the table and left out (first: "
        f"{table.files[left[0]]} is {table.files[first[real[left[0]]]]})"
    )
    table = table.rows(kept)
    split = split_classes(table.labels) if table.rule == "paper" else table.split
    return replace(table, split=split, notes=(*table.notes, note))


def resplit(table: Table, rule: str, split: np.ndarray, notes: list[str]) -> Table:
    """The table under another split, without the images it leaves out."""
    table = replace(table, split=split, rule=rule, notes=(*table.notes, *notes))
    return table.rows(split != "")


def relative(root: Path, files: list[Path]) -> np.ndarray:
    """Posix paths of files below root, (n,) objects."""
    return np.array([file.relative_to(root).as_posix() for file in files], dtype=object)

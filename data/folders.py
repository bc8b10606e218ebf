"""What lies in a folder: images and folders of images at any depth, links followed once, nothing dropped in
silence."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import DataError
from data.names import class_order, is_hidden, plain_name, some_of

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp"}
IMAGE_ENDS = "|".join(re.escape(suffix) for suffix in sorted(IMAGE_SUFFIXES, reverse=True))  # .jpeg, .jpe
OTHER_PICTURES = {  # suffixes of what holds pictures too, and is not read -> what makes it readable
    **dict.fromkeys((".gif", ".heic", ".heif", ".avif", ".ppm", ".pgm"), "convert them to PNG"),
    **dict.fromkeys((".jp2", ".j2k", ".vrt", ".img", ".ecw", ".sid"), "gdal_translate IN OUT.tif"),
    **dict.fromkeys((".npy", ".npz", ".mat", ".h5", ".hdf5", ".nc", ".parquet"), "export them to pictures"),
}
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}
NO_SUFFIX = "no suffix"
MANY = 10  # files without a suffix: README, LICENSE and the like are fewer


@dataclass
class Folder:
    """A folder as it is seen: hidden entries left out, links followed."""

    path: Path
    images: list[str] = field(default_factory=list)  # names in order; broken links stay among them
    folders: list["Folder"] = field(default_factory=list)  # in class order
    others: Counter = field(default_factory=Counter)  # suffix -> files that are no images

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name

    @property
    def count(self) -> int:
        """How many images lie here and below."""
        return len(self.images) + sum(folder.count for folder in self.folders)

    def kids(self) -> list["Folder"]:
        """The folders directly inside that hold images at any depth."""
        return [folder for folder in self.folders if folder.count]

    def empty(self) -> list[str]:
        """The names of the folders directly inside without any image."""
        return [folder.name for folder in self.folders if not folder.count]

    def below(self) -> list[Path]:
        """Every image here and below, sorted by path."""
        found = [self.path / name for name in self.images]
        for folder in self.folders:
            found += folder.below()
        return sorted(found)

    def suffixes(self) -> Counter:
        """Suffix -> how many files here and below are no images."""
        return sum((folder.suffixes() for folder in self.folders), self.others.copy())


@dataclass
class Scan:
    """One walk over a folder, and what has to be told about it."""

    followed: dict[tuple[int, int], Path] = field(default_factory=dict)  # targets of links -> the link taken
    linked: set[Path] = field(default_factory=set)  # images and folders that are links
    notes: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # folders, and links that lead nowhere


def scan(root: Path) -> tuple[Folder, Scan]:
    """The tree below `root`, and the notes of the walk; DataError for what cannot be read."""
    walk = Scan()
    tree = read_folder(root, (), walk)
    if walk.unreadable:
        raise DataError(f"cannot read {some_of(walk.unreadable, 3)}: make it readable or remove it")
    return tree, walk


def read_folder(path: Path, above: tuple, walk: Scan) -> Folder:
    """The tree below `path`; `above` holds the identities of the folders it lies in, which end loops."""
    folder = Folder(path)
    try:
        above = (*above, identity(path))
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: class_order(entry.name))
    except OSError as error:
        walk.unreadable.append(f"{path} ({error.strerror})")
        return folder
    for entry in entries:
        if not is_hidden(entry.name):
            read_entry(entry, folder, above, walk)
    folder.images.sort()
    return folder


def read_entry(entry: os.DirEntry, folder: Folder, above: tuple, walk: Scan) -> None:
    """Add one entry to its folder. A broken link with an image's name stays an image: the check calls it
    missing."""
    path, suffix = folder.path / entry.name, os.path.splitext(entry.name)[1].lower()
    if entry.is_symlink():
        walk.linked.add(path)
    if is_folder(entry):
        if not entry.is_symlink() or may_follow(path, above, walk):
            folder.folders.append(read_folder(path, above, walk))
    elif suffix in IMAGE_SUFFIXES and (entry.is_symlink() or entry.is_file()):  # not a pipe or a socket
        folder.images.append(entry.name)
    elif entry.is_symlink() and not suffix and not path.exists():
        walk.unreadable.append(f"{path} (a link to {os.readlink(path)}, which is not there)")
    else:
        folder.others[suffix or NO_SUFFIX] += 1


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; False for a link that leads round in a circle."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def may_follow(link: Path, above: tuple, walk: Scan) -> bool:
    """Whether a link to a folder leads to a new one: not to a folder it lies in, and not twice to the
    same."""
    target = identity(link)
    root = Path(os.path.realpath(link))
    here = Path(os.path.realpath(link.parent))
    if target in above or root in here.parents:
        walk.notes.append(f"{link}: a link in a loop, to {root}: not followed")
        return False
    if target in walk.followed:
        walk.notes.append(f"{link}: links to the same folder as {walk.followed[target]}: followed once")
        return False
    walk.followed[target] = link
    return True


def identity(path: Path) -> tuple[int, int]:
    """Device and number of what a path leads to."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def real_paths(files: list[Path], walk: Scan) -> list[str]:
    """Where each image really lies; two names of one image get the same answer, and a broken link, which is
    to be listed as missing, its own place. Asks the disk once a folder."""
    folders: dict[Path, str] = {}
    real = []
    for file in files:
        if file.parent not in folders:
            folders[file.parent] = os.path.realpath(file.parent)
        place = os.path.join(folders[file.parent], file.name)
        real.append(os.path.realpath(place) if file in walk.linked and file.exists() else place)
    return real


def stem_of(name: str) -> str:
    """A file's name without folders, an image's suffix and differences of case."""
    return plain_name(re.sub(f"({IMAGE_ENDS})$", "", name.rsplit("/", 1)[-1], flags=re.IGNORECASE))


def by_stem(files: Sequence[str]) -> dict[str, list[int]]:
    """Name without folders and suffix -> rows of the files that are called so."""
    index = defaultdict(list)
    for row, file in enumerate(files):
        index[stem_of(file)].append(row)
    return index

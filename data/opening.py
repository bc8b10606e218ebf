"""Opening `--data`: the table of a folder, or of the built-in scenes, without files that do not decode.

Every script opens its data here, so that all see the same images, the same splits and the same refusals.
"""

import argparse
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import common
from common import DataError, say
from data.check import check_files, manifest_of, sizes_line
from data.pixels import channel_statistics
from data.synthetic import write_scenes
from data.tables import Table, explain_empty, load_table

TAIL = 512  # bytes at a file's end that tell almost all pictures apart


class Source(NamedTuple):
    """Where images come from, and what is asked of them."""

    data: str | None  # a folder of images; None: the built-in scenes
    layout: str  # of the built-in scenes: pure (29 class folders) or mixed (fractions)
    scenes: int  # how many built-in scenes
    size: int  # side of the built-in scenes, pixels
    cache: Path  # directory of manifests, decoded pixels and built-in scenes
    workers: int  # processes that check files
    skip_bad_files: bool  # leave out files that do not decode instead of refusing
    splits: str | None = None  # a folder of lists, *train*.txt, *val*.txt, *test*.txt
    split: str = "paper"  # the rule where the folder brings no split of its own: paper, spatial or none

    @classmethod
    def of(cls, args: argparse.Namespace, layout: str) -> "Source":
        """The source that the flags of `common.common_flags` name."""
        return cls(
            data=args.data,
            layout=layout,
            scenes=args.scenes,
            size=args.size,
            cache=Path(args.cache),
            workers=args.workers,
            skip_bad_files=args.skip_bad_files,
            splits=args.splits,
            split=args.split,
        )


def open_table(source: Source, report: Path) -> tuple[Table, pd.DataFrame]:
    """(table, checked): the images of a source that decode, and what the check says of each of them, row by
    row.

    Files that are missing or do not decode are listed in the CSV `report`; DataError unless they may be
    skipped.
    """
    root = Path(source.data) if source.data else built_in_scenes(source)
    table = load_table(root, source.splits, source.split)
    for note in table.notes:
        say(f"note: {note}")
    source.cache.mkdir(parents=True, exist_ok=True)
    manifest = manifest_of(table.root, source.cache)
    checked = check_files(table.root, list(table.files), manifest, source.workers)
    bad = (checked.problem != "").to_numpy()
    if bad.any():
        common.write_csv(report, checked[bad])
        refuse_or_skip(table.root, checked[bad], len(bad), report, source.skip_bad_files)
    table, checked = table.rows(~bad), checked[~bad].reset_index(drop=True)
    if not (table.split == "train").any():
        raise DataError(explain_empty(table, "train"))
    if sizes := sizes_line(checked):
        say(f"note: {table.root}: {sizes}")
    tell_duplicates(table, checked, source.cache)
    return table, checked


def refuse_or_skip(root: Path, bad: pd.DataFrame, count: int, report: Path, skip: bool) -> None:
    """Say which of `count` files are bad; DataError unless they may be skipped and good ones are left."""
    first = bad.iloc[0]
    message = (
        f"{root}: {len(bad)} of {count} files do not decode "
        f"(first: {first.file}: {first.problem}; all in {report})"
    )
    if not skip:
        few = 2 * len(bad) <= count
        raise DataError(f"{message}: mend or remove them{', or add --skip-bad-files' if few else ''}")
    if len(bad) == count:
        raise DataError(f"{message}: nothing is left")
    say(f"left out: {message}")


def tell_duplicates(table: Table, checked: pd.DataFrame, cache: Path) -> None:
    """Say how many images are another one byte for byte, and list them in the cache: they stay in the
    table."""
    file = cache / f"duplicates-{digest_of(table, checked)}.csv"
    if file.exists():
        found = pd.read_csv(file, dtype=str, keep_default_na=False, encoding_errors="surrogateescape")
    else:
        found = find_duplicates(table, checked["bytes"].to_numpy())
        common.write_csv(file, found)
    if len(found):
        across = (found["split"] != found["split_of_first"]).sum()
        labels = dict(zip(table.files, table.labels, strict=True))
        against = (found["file"].map(labels) != found["first"].map(labels)).sum()
        contradict = f", {against:,} of another class" if against else ""
        say(
            f"note: {table.root}: {len(found):,} images are another one byte for byte, {across:,} of them in "
            f"another split{contradict} (all in {file})"
        )


def find_duplicates(table: Table, sizes: np.ndarray) -> pd.DataFrame:
    """file, split, first, split_of_first: each image whose bytes an earlier one has.

    Only files of one size are opened, at first for their ends alone: two JPEGs hardly ever end alike.
    """
    groups: dict[tuple, list[int]] = {}
    common_sizes = pd.Series(sizes).duplicated(keep=False).to_numpy()
    alike = np.flatnonzero(common_sizes)
    for row in tqdm(alike, desc="looking for duplicates", unit="file", disable=None, leave=False):
        groups.setdefault((sizes[row], tail_of(table.root / table.files[row])), []).append(row)
    first: dict[bytes, int] = {}
    rows = []
    for group in groups.values():
        if len(group) == 1:
            continue
        for row in group:
            digest = hashlib.sha256((table.root / table.files[row]).read_bytes()).digest()
            before = first.setdefault(digest, row)
            if before != row:
                rows.append((table.files[row], table.split[row], table.files[before], table.split[before]))
    return pd.DataFrame(rows, columns=["file", "split", "first", "split_of_first"])


def tail_of(file: Path) -> bytes:
    """The last TAIL bytes of a file."""
    with open(file, "rb") as stream:
        stream.seek(-min(TAIL, os.fstat(stream.fileno()).st_size), os.SEEK_END)
        return stream.read()


def statistics_of(pixels: torch.Tensor, rows: np.ndarray | None = None) -> tuple[list[float], list[float]]:
    """`channel_statistics`, and a note where a channel tells nothing."""
    mean, std = channel_statistics(pixels, rows)
    for channel, name in enumerate(("red", "green", "blue")):
        if std[channel] == 1:
            say(f"note: {name} is {255 * mean[channel]:.0f} in every pixel: the network sees nothing in it")
    return mean, std


def digest_of(table: Table, checked: pd.DataFrame) -> str:
    """16 hex digits that change with the names, sizes or dates of the files, their split, labels or
    fractions."""
    digest = hashlib.sha256()
    columns = (table.files, checked["bytes"], checked["mtime_ns"], table.split, table.labels)
    for row in zip(*columns, strict=True):
        digest.update("\0".join(map(str, row)).encode(errors="surrogateescape") + b"\n")
    digest.update("\0".join(table.classes).encode(errors="surrogateescape"))
    if table.fractions is not None:
        digest.update(table.fractions.tobytes())
    return digest.hexdigest()[:16]


def stamp_of(root: Path, checked: pd.DataFrame) -> str:
    """16 hex digits that change when any file does.

    Size and mtime are not enough: `cp -p` and `rsync -t` restore an older mtime, archives set a fixed one. So
    ctime, which nobody sets, counts too.
    """
    digest = hashlib.sha256(checked[["bytes", "mtime_ns"]].to_numpy().tobytes())
    changed = [os.stat(root / file).st_ctime_ns for file in checked.file]
    digest.update(np.array(changed, np.int64).tobytes())
    return digest.hexdigest()[:16]


def built_in_scenes(source: Source) -> Path:
    """The folder of the built-in scenes in the cache, written at the first call."""
    root = source.cache / f"scenes-{source.layout}-{source.scenes}-{source.size}"
    if not root.exists():
        try:
            write_scenes(root, layout=source.layout, count=source.scenes, size=source.size, seed=0)
        except OSError:
            if not root.exists():  # else another process was faster
                raise
    return root

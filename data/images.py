"""The images of a pretraining: which train, which are sampled for the checks, their mean and deviation, and
their loader."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import DataError
from data.loader import Loader, Plan, TorchLoader, dali_loader
from data.opening import Source, digest_of, open_table, stamp_of, statistics_of
from data.pixels import common_size, load_pixels
from data.subsets import stratified_subset
from data.tables import Table

BANK, QUERIES = 5000, 2000  # images at most: k-NN neighbours, k-NN queries
FEWEST = 20  # labelled images among unlabelled ones that vote


class Images(NamedTuple):
    """What the run knows of its images."""

    table: Table
    train: np.ndarray  # rows of the table that train
    height: int  # pixels
    width: int
    stamp: str  # changes with the files' contents
    sample: np.ndarray  # rows of the table that are looked at, `bank` training ones first
    bank: int
    pixels: torch.Tensor  # (len(sample), 3, height, width) uint8
    knn: bool  # whether the sample has labels enough for a k-NN check
    mean: list[float]
    std: list[float]
    digest: str  # of names, sizes, dates, splits and labels

    def nbytes(self) -> int:
        """Of the training images, decoded."""
        return len(self.train) * 3 * self.height * self.width

    def held_out(self) -> int:
        """How many labelled val images the k-NN checks ask about."""
        return len(self.sample) - self.bank


def open_images(source: Source, subset: float, seed: int, batch_size: int, report: Path) -> Images:
    """The images of `source`, of whose training rows a stratified share `subset` is drawn with `seed`.

    Bad files are listed in `report`. DataError where fewer than `batch_size` images are left to train on.
    """
    table, checked = open_table(source, report)
    height, width = common_size(checked)
    train = np.flatnonzero(table.split == "train")
    train = train[stratified_subset(table.labels[train], subset, seed)]
    if len(train) < batch_size:
        raise DataError(
            f"{table.root}: {len(train)} images to train on are fewer than one batch of {batch_size}: "
            "lower --batch-size"
        )
    bank, queries = knn_sample(table, train)
    stamp = stamp_of(table.root, checked)
    sample = np.concatenate([bank, queries])

    def decoded(rows: np.ndarray) -> torch.Tensor:
        made = {"cache": source.cache, "workers": source.workers, "stamp": stamp}
        return load_pixels(table.root, table.files[rows], height, width, **made)

    pixels = decoded(sample)
    some = at_most(BANK, train)
    mean, std = statistics_of(pixels[: len(bank)] if np.array_equal(bank, some) else decoded(some))
    knn = len(queries) > 0 and bool((table.labels[bank] >= 0).all())
    digest = digest_of(table, checked)
    return Images(
        table, train, height, width, stamp, sample, len(bank), pixels, knn, list(mean), list(std), digest
    )


def knn_sample(table: Table, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, labelled held-out rows) for the checks: at most BANK and QUERIES, the same for every
    seed."""
    labelled = train[table.labels[train] >= 0]
    few = len(labelled) < min(FEWEST, len(train))
    queries = np.flatnonzero((table.split == "val") & (table.labels >= 0))
    return at_most(BANK, train if few else labelled), at_most(QUERIES, queries)


def at_most(count: int, rows: np.ndarray) -> np.ndarray:
    """`count` of the rows, or all, in their order; always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:count])


def training_pixels(images: Images, source: Source, share: bool) -> torch.Tensor:
    """uint8 (n, 3, height, width) of the training images, decoded once: of a small set all are in the sample
    already. `share`: one decoded file for all processes."""
    if not share and np.array_equal(images.sample[: images.bank], images.train):
        return images.pixels[: images.bank]
    return load_pixels(
        images.table.root,
        images.table.files[images.train],
        images.height,
        images.width,
        cache=source.cache,
        workers=source.workers,
        stamp=images.stamp,
        share=share,
    )


def make_loader(
    name: str,
    images: Images,
    plan: Plan,
    device: torch.device,
    source: Source,
    *,
    size: int,
    dtype: torch.dtype,
    cache_mb: int,
) -> Loader:
    """The loader `name`, torch or dali: `epoch(epoch, start)` gives (view1, view2) of each step, `size` px
    wide, for training in `dtype`. cache_mb: GPU memory for DALI's decoder, MiB."""
    normal = (images.mean, images.std)
    if name == "torch":
        pixels = training_pixels(images, source, share=plan.ranks > 1)
        return TorchLoader(pixels, plan, size, *normal, device, dtype)
    files = images.table.files[images.train]
    about = {"workers": source.workers, "dtype": dtype, "cache_mb": cache_mb}
    return dali_loader(images.table.root, files, plan, size, *normal, device, **about)

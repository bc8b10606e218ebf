"""Which training images a share of them, or a number of each class, takes."""

from collections.abc import Sequence

import numpy as np

from common import DataError, say
from data.names import some_of
from data.tables import Table


def training_subsets(
    table: Table,
    targets: np.ndarray,
    ratios: Sequence[float],
    seeds: Sequence[int],
    per_class: Sequence[int] = (),
) -> dict[tuple[float | str, int], np.ndarray]:
    """(ratio %, seed) -> rows of the stratified share of the training images; refused where it lacks a class.

    targets (n, K): fractions or one-hot labels. Each number in `per_class` adds (f"{n}/class", seed): n
    images of each class, drawn anew for each seed; refused where a class has fewer.
    """
    train = np.flatnonzero(table.split == "train")
    labels = table.labels[train]
    check_enough(table, labels, per_class)
    for ratio in ratios:
        note_small(labels, ratio)
    subsets: dict[tuple[float | str, int], np.ndarray] = {}
    for seed in seeds:
        for ratio in ratios:
            subset = train[stratified_subset(labels, ratio / 100, seed)]
            check_classes(table, targets, subset, f"--ratios {ratio:g} leaves", seed)
            subsets[ratio, seed] = subset
        for count in per_class:
            subset = train[per_class_subset(labels, count, seed)]
            check_classes(table, targets, subset, f"--per-class {count} leaves", seed)
            subsets[f"{count}/class", seed] = subset
    return subsets


def check_enough(table: Table, labels: np.ndarray, per_class: Sequence[int]) -> None:
    """DataError where the training images of a class are fewer than asked for."""
    counts = np.bincount(labels[labels >= 0], minlength=len(table.classes))
    present = np.flatnonzero(counts)
    if not per_class or not len(present):
        return
    rarest = present[counts[present].argmin()]
    if max(per_class) > counts[rarest]:
        raise DataError(
            f"{table.root}: --per-class {max(per_class)}, but {table.classes[rarest]} has "
            f"{counts[rarest]} training images: ask for no more than that"
        )


def note_small(labels: np.ndarray, ratio: float) -> None:
    """Say in how many classes a share is no image, so that one is taken."""
    _, counts = np.unique(labels, return_counts=True)
    small = sum(round(ratio / 100 * count) == 0 for count in counts)
    if small:
        say(
            f"note: {ratio:g} % is less than half an image in {small} of {len(counts)} classes: "
            "one of each is taken all the same"
        )


def check_classes(table: Table, targets: np.ndarray, subset: np.ndarray, what: str, seed: int) -> None:
    """DataError where a training subset lacks a class that the table has."""
    absent = np.flatnonzero((targets[subset].sum(0) == 0) & (targets.sum(0) > 0))
    if not len(absent):
        return
    untrained = absent[targets[table.split == "train"][:, absent].sum(0) == 0]
    if len(untrained):
        raise DataError(
            f"{table.root}: no training image has class {some_of([table.classes[k] for k in untrained])}, "
            "which other images have: add training images of it or leave the class out"
        )
    raise DataError(
        f"{table.root}: {what} {len(subset)} training images (seed {seed}), none of them with "
        f"class {some_of([table.classes[k] for k in absent])}, which other images have: take more "
        "images or leave the class out"
    )


def stratified_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted positions of a share (0-1] of labels (n,): the same share of each class, rounded, at least one
    image."""
    keep = []
    for label in np.unique(labels):
        count = np.count_nonzero(labels == label)
        keep.append(shuffled_rows(labels, label, seed)[: max(1, round(fraction * count))])
    return np.sort(np.concatenate(keep))


def per_class_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted positions of `count` images of each class of labels (n,), -1 aside; all of a class that has
    fewer."""
    classes = np.unique(labels[labels >= 0])
    return np.sort(np.concatenate([shuffled_rows(labels, label, seed)[:count] for label in classes]))


def shuffled_rows(labels: np.ndarray, label: int, seed: int) -> np.ndarray:
    """The positions of one class in an order of (seed, class): a larger subset holds the smaller ones."""
    return np.random.default_rng([seed, label + 1]).permutation(np.flatnonzero(labels == label))

"""Which images train, and which are kept out: the paper's split rule and stratified subsets, both seeded."""

import numpy as np


def split_counts(n: int) -> tuple[int, int, int]:
    """(train, val, test) of a class of n images: int(0.9 n), int(0.025 n) and the rest, the rule that gives the
    paper's 175,381 / 4,861 / 14,635 from the class sizes of its Table II."""
    train, val = int(0.9 * n), int(0.025 * n)
    return train, val, n - train - val


def split_classes(labels: np.ndarray, seed: int = 42) -> np.ndarray:
    """Split names (n,) for labels (n,) of files in sorted order: each class is shuffled and cut by `split_counts`."""
    split = np.empty(len(labels), dtype="<U5")
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = np.random.default_rng([seed, label + 1]).permutation(rows)
        for name, part in zip(
            ("train", "val", "test"), np.split(rows, np.cumsum(split_counts(len(rows)))[:2])
        ):
            split[part] = name
    return split


def stratified_subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted positions of a share (0-1] of labels (n,), the same share of each class, rounded, and at least one image."""
    keep = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(rows)))
        keep.append(np.random.default_rng([seed, label + 1]).permutation(rows)[:count])
    return np.sort(np.concatenate(keep))

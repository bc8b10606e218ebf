"""How good and how healthy features are, without training anything: spread, effective rank, nearest
neighbours."""

import math

import numpy as np
import torch
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

COLLAPSED = {"feature_std": 0.02, "effective_rank": 2.0}  # below either, every image looks the same
DIAGNOSED = 1024  # images at most: the singular values of more change little and take long
NEIGHBOURS = 20


def feature_std(features: torch.Tensor) -> float:
    """Spread of features (n, D): 1 when they point everywhere, 0 when they have collapsed to a point.

    The standard deviation over the images of the unit-length features, averaged over the dimensions, times
    sqrt(D) (X. Chen and K. He, SimSiam, 2021, section 4.1).
    """
    unit = torch.nn.functional.normalize(features, dim=1)
    return float(unit.std(0).mean() * math.sqrt(unit.shape[1]))


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred features (n, D), from 1 to min(n,
    D) (O. Roy and M. Vetterli, "The effective rank", 2007)."""
    p = torch.linalg.svdvals(features - features.mean(0))
    p = p / p.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def knn_macro_f1(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray, k: int = NEIGHBOURS
) -> float:
    """Macro F1 of the vote of the k nearest of bank (n, D), by cosine, with labels (n,), for queries (m, D)
    of truth (m,)."""
    vote = KNeighborsClassifier(min(k, len(bank)), metric="cosine").fit(bank, labels)
    return float(f1_score(truth, vote.predict(queries), average="macro"))


def diagnose(features: torch.Tensor, labels: np.ndarray, bank: int, knn: bool) -> dict[str, float | None]:
    """feature_std and effective_rank of the first `bank` features (n, D), and with `knn` the vote of these
    for the others. labels (n,). A number that cannot be had is None: features that are not finite, or a bank
    without labels."""
    row: dict[str, float | None] = {"feature_std": None, "effective_rank": None, "knn_macro_f1": None}
    if not features.isfinite().all():
        return row
    some = features[: min(bank, DIAGNOSED)]
    row["feature_std"], row["effective_rank"] = feature_std(some), effective_rank(some)
    if knn:
        row["knn_macro_f1"] = knn_macro_f1(features[:bank], labels[:bank], features[bank:], labels[bank:])
    return row


def has_collapsed(row: dict[str, float | None]) -> bool:
    """Whether `diagnose` found a number below the thresholds of COLLAPSED."""
    return any(row[name] is not None and row[name] < least for name, least in COLLAPSED.items())

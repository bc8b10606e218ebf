"""How good and how healthy features are, without training anything: spread, effective rank, nearest
neighbours."""

import math

import numpy as np
import torch
from scipy.stats import mode
from sklearn.metrics import f1_score

from models.probe import VOTERS, nearest

COLLAPSED = {"feature_std": 0.02, "effective_rank": 2.0}  # below either, every image looks the same
DIAGNOSED = 1024  # images at most: the singular values of more change little and take long


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
    centred = (features - features.mean(0)).double()
    n, d = centred.shape
    products = centred.T @ centred if d < n else centred @ centred.T  # whose eigenvalues are their squares
    p = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    p = p / p.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def diagnose(features: torch.Tensor, labels: np.ndarray, bank: int, knn: bool) -> dict[str, float | None]:
    """feature_std and effective_rank of the first `bank` features (n, D), and with `knn` how well these vote
    for the others (`votes_f1`). labels (n,), on the CPU. A number that cannot be had is None: features that
    are not finite, or a bank without labels."""
    row = dict.fromkeys(["feature_std", "effective_rank", "knn_macro_f1", "knn5_accuracy"])
    if not features.isfinite().all():
        return row
    some = features[: min(bank, DIAGNOSED)]
    row["feature_std"], row["effective_rank"] = feature_std(some), effective_rank(some)
    if knn:
        truth = labels[bank:]
        rows = nearest(features[:bank], features[bank:], max(VOTERS)).cpu().numpy()
        votes = labels[:bank][rows]  # (m, 20), the nearest first
        many, few = (mode(votes[:, :k], axis=1).mode for k in VOTERS)  # of equals the smallest
        row["knn_macro_f1"] = votes_f1(truth, many)
        row["knn5_accuracy"] = float((few == truth).mean())
    return row


def votes_f1(truth: np.ndarray, votes: np.ndarray) -> float:
    """Macro F1 of the votes of nearest neighbours, both labels (n,), over the classes that occur in `truth`.

    A sample may lack a class. It has no F1 then, and to count it as 0 would tell of the sample, not of the
    features. A vote for it costs the class that was meant.
    """
    return float(f1_score(truth, votes, labels=np.unique(truth), average="macro", zero_division=0))


def has_collapsed(row: dict[str, float | None]) -> bool:
    """Whether `diagnose` found a number below the thresholds of COLLAPSED."""
    return any(row[name] is not None and row[name] < least for name, least in COLLAPSED.items())

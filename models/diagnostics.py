"""How good and how healthy features are, without training anything: spread, effective rank, nearest neighbours."""

import math

import numpy as np
import torch
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier


def feature_std(features: torch.Tensor) -> float:
    """Standard deviation over the images of the unit-length features (n, D), averaged over the dimensions, times sqrt(D):
    1 when they point everywhere, 0 when they have collapsed to a point (X. Chen and K. He, 2021, section 4.1)."""
    unit = torch.nn.functional.normalize(features, dim=1)
    return float(unit.std(0).mean() * math.sqrt(unit.shape[1]))


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred features (n, D), from 1 to min(n, D)
    (O. Roy and M. Vetterli, "The effective rank", 2007)."""
    p = torch.linalg.svdvals(features - features.mean(0))
    p = p / p.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def knn_macro_f1(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray, k: int = 20
) -> float:
    """Macro F1 of the vote of the k nearest of bank (n, D), by cosine, with labels (n,), for queries (m, D) of truth (m,)."""
    vote = KNeighborsClassifier(min(k, len(bank)), metric="cosine").fit(bank, labels)
    return f1_score(truth, vote.predict(queries), average="macro")

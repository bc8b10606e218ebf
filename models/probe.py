"""Heads on frozen features: a linear one solved for exactly, and the vote of the nearest neighbours."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

PENALTIES = (
    1000,
    100,
    10,
    1,
)  # of the sum of the losses of standardised features: 1 / C as scikit-learn has it


class Axes(NamedTuple):
    """Features (n, D) standardised and turned to their principal axes: x = (features - mean) @ turn."""

    mean: torch.Tensor  # (D,)
    turn: torch.Tensor  # (D, D)
    variance: torch.Tensor  # (D,) along each axis


def principal_axes(features: torch.Tensor) -> Axes:
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    z = (features - mean) / scale
    variance, turn = torch.linalg.eigh(z.T @ z / len(z))
    return Axes(mean, turn / scale[:, None], variance.clamp_min(0))


def linear_heads(features: torch.Tensor, targets: torch.Tensor, axes: Axes, loss: str) -> Iterator[tuple]:
    """(penalty, weight (K, D), bias (K,)) of the head that minimises summed loss + penalty / 2 |weight|^2 for
    each of PENALTIES, the strongest first. features (n, D), targets (n, K); the weight in the penalty is that
    of standardised features, the one returned is for `features` as they are. loss: softmax cross-entropy, or
    bce with logits."""
    x, share = (features - axes.mean) @ axes.turn, targets.mean(0).clamp(1e-6, 1 - 1e-6)
    bias = share.log() if loss == "softmax" else share.logit()
    w = torch.cat([bias[:, None], torch.zeros(targets.shape[1], x.shape[1], device=x.device)], 1)
    for penalty in PENALTIES:
        w = minimise(x, targets, axes.variance, penalty / len(x), loss, w)
        weight = w[:, 1:] @ axes.turn.T
        yield penalty, weight, w[:, 0] - weight @ axes.mean


def minimise(x, y, variance, penalty: float, loss: str, start: torch.Tensor) -> torch.Tensor:
    """L-BFGS on mean loss + penalty / 2 |w|^2 of a head (K, 1 + D), column 0 the bias, for x (n, D) in
    principal axes and y (n, K). The gradient of both losses in the logits is p - y. Each axis is scaled by
    its curvature, which is at most variance / 4 + penalty: a sixth of the steps."""
    scale = (variance / 4 + penalty).rsqrt()
    ridge, x = penalty * scale.square(), x * scale
    w = torch.cat([start[:, :1], start[:, 1:] / scale], 1)
    w.grad = torch.empty_like(w)

    def closure():
        z = F.linear(x, w[:, 1:], w[:, 0])
        total = (
            F.cross_entropy(z, y)
            if loss == "softmax"
            else F.binary_cross_entropy_with_logits(z, y) * y.shape[1]
        )
        residual = ((z.softmax(1) if loss == "softmax" else z.sigmoid()) - y) / len(x)
        w.grad[:, 0], w.grad[:, 1:] = residual.sum(0), residual.T @ x + ridge * w[:, 1:]
        return total + 0.5 * (ridge * w[:, 1:].square()).sum()

    torch.optim.LBFGS(
        [w], max_iter=100, tolerance_grad=1e-3, history_size=20, line_search_fn="strong_wolfe"
    ).step(closure)
    return torch.cat([w[:, :1], w[:, 1:] * scale], 1)


def neighbour_votes(
    bank: torch.Tensor, targets: torch.Tensor, queries: torch.Tensor, k: int = 20
) -> torch.Tensor:
    """(m, K) votes of the k nearest of `bank` (n, D), by cosine, with targets (n, K), for queries (m, D)."""
    bank = F.normalize(bank, dim=1)
    nearest = [(q @ bank.T).topk(min(k, len(bank))).indices for q in F.normalize(queries, dim=1).split(1024)]
    return torch.cat([targets[i].sum(1) for i in nearest])


def probabilities(logits: torch.Tensor, loss: str) -> torch.Tensor:
    """Logits (n, K) on the simplex: softmax, or for `bce` the paper's authors' sigmoid divided by its row
    sum."""
    p = logits.softmax(1) if loss == "softmax" else logits.sigmoid().clamp_min(1e-12)
    return p / p.sum(1, keepdim=True)

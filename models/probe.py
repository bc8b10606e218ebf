"""Heads on frozen features: a linear one solved for exactly, and the vote of the nearest neighbours."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# On the weights of standardised features, beside the sum of the losses: 1 / C as scikit-learn has it
PENALTIES = (1000, 100, 10, 1)
VOTERS = (20, 5)  # nearest neighbours of the k-NN macro F1 and of the 5-NN accuracy


class Axes(NamedTuple):
    """Features (n, D) standardised and turned to their principal axes: x = (features - mean) @ turn."""

    mean: torch.Tensor  # (D,)
    turn: torch.Tensor  # (D, D)
    variance: torch.Tensor  # (D,) along each axis


def principal_axes(features: torch.Tensor) -> Axes:
    """The axes of features (n, D) of the whole training set, whatever their scale. A feature that is constant
    but for its rounding stays without weight."""
    mean, std = features.mean(0), features.std(0)
    scale = torch.where(std > 1e-6 * mean.abs(), std, 1e-6 * mean.abs())
    scale = torch.where(scale > 0, scale, 1)
    z = (features - mean) / scale
    variance, turn = torch.linalg.eigh(z.T @ z / len(z))
    return Axes(mean, turn / scale[:, None], variance.clamp_min(0))


def linear_heads(
    features: torch.Tensor, targets: torch.Tensor, axes: Axes, loss: str
) -> Iterator[tuple[float, nn.Linear]]:
    """(penalty, head) that minimises summed loss + penalty / 2 |weight|^2, for each of PENALTIES, the
    strongest first.

    features (n, D), targets (n, K); the weight in the penalty is that of standardised features, the head
    takes features as they are. loss: `softmax` cross-entropy, or `bce` with logits.
    """
    x = (features - axes.mean) @ axes.turn  # (n, D)
    share = targets.mean(0).clamp(1e-6, 1 - 1e-6)  # (K,)
    bias = share.log() if loss == "softmax" else share.logit()
    w = torch.cat([bias[:, None], torch.zeros(len(share), x.shape[1], device=x.device)], 1)  # (K, 1 + D)
    for penalty in PENALTIES:
        w = minimise(x, targets, axes.variance, penalty / len(x), loss, w)
        weight = w[:, 1:] @ axes.turn.T
        yield penalty, as_layer(weight, w[:, 0] - weight @ axes.mean)


def as_layer(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """The linear layer of weight (K, D) and bias (K,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer.requires_grad_(False)


def minimise(
    x: torch.Tensor, y: torch.Tensor, variance: torch.Tensor, penalty: float, loss: str, start: torch.Tensor
) -> torch.Tensor:
    """L-BFGS on mean loss + penalty / 2 |w|^2 of a head (K, 1 + D), column 0 the bias, from `start`.

    x (n, D) lies in principal axes, y is (n, K). The gradient of both losses in the logits is p - y. Each
    axis is scaled by its curvature, which is at most variance / 4 + penalty: that takes a sixth of the
    steps.
    """
    scale = (variance / 4 + penalty).rsqrt()  # (D,)
    ridge = penalty * scale.square()
    x = x * scale
    w = torch.cat([start[:, :1], start[:, 1:] / scale], 1)
    w.grad = torch.empty_like(w)

    def closure():
        z = F.linear(x, w[:, 1:], w[:, 0])  # (n, K)
        if loss == "softmax":
            total, p = F.cross_entropy(z, y), z.softmax(1)
        else:
            total, p = F.binary_cross_entropy_with_logits(z, y) * y.shape[1], z.sigmoid()
        residual = (p - y) / len(x)
        w.grad[:, 0] = residual.sum(0)
        w.grad[:, 1:] = residual.T @ x + ridge * w[:, 1:]
        return total + 0.5 * (ridge * w[:, 1:].square()).sum()

    optimizer = torch.optim.LBFGS(
        [w], max_iter=100, tolerance_grad=1e-3, history_size=20, line_search_fn="strong_wolfe"
    )
    optimizer.step(closure)
    return torch.cat([w[:, :1], w[:, 1:] * scale], 1)


def nearest(bank: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    """(m, k) rows of `bank` (n, D) that are nearest to queries (m, D) by cosine, the nearest first; n of
    them where k is more."""
    bank = F.normalize(bank, dim=1)
    parts = F.normalize(queries, dim=1).split(1024)
    return torch.cat([(part @ bank.T).topk(min(k, len(bank))).indices for part in parts])


def probabilities(logits: torch.Tensor, loss: str) -> torch.Tensor:
    """Logits (n, K) on the simplex: softmax, or for `bce` the paper's authors' sigmoid divided by its row
    sum."""
    p = logits.softmax(1) if loss == "softmax" else logits.sigmoid().clamp_min(1e-12)
    return p / p.sum(1, keepdim=True)

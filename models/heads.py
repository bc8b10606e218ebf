"""Projection and prediction heads: multilayer perceptrons on backbone features. Needs nothing but torch."""

from torch import nn


def mlp(dims: list[int], *, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Linear layers dims[0] -> dims[1] -> ... with (BatchNorm,) ReLU between them; input (N, dims[0]).

    `norm` puts BatchNorm behind each hidden layer (a bias there would be cancelled, so it is left out);
    `last_norm` ends with a BatchNorm without scale and shift, as SimSiam's and SimCLR's projectors do.
    """
    layers = []
    for wide, narrow in zip(dims[:-2], dims[1:-1]):
        layers.append(nn.Linear(wide, narrow, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(narrow))
        layers.append(nn.ReLU(True))
    layers.append(nn.Linear(dims[-2], dims[-1], bias=not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(dims[-1], affine=False))
    return nn.Sequential(*layers)

"""Projection and prediction heads: multilayer perceptrons on backbone features. Needs nothing but torch."""

from torch import nn


def mlp(dims: list[int], *, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Linear layers dims[0] -> dims[1] -> ... with (BatchNorm,) ReLU between them; input (N, dims[0]).

    `norm` puts BatchNorm behind each hidden layer (a bias there would be cancelled, so it is left out);
    `last_norm` ends with a BatchNorm without scale and shift, as SimSiam's and SimCLR's projectors do.
    """
    layers = []
    for width_in, width in zip(dims[:-2], dims[1:-1]):
        layers += [
            nn.Linear(width_in, width, bias=not norm),
            *([nn.BatchNorm1d(width)] if norm else []),
            nn.ReLU(True),
        ]
    layers.append(nn.Linear(dims[-2], dims[-1], bias=not last_norm))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(dims[-1], affine=False)] if last_norm else []))


def width(backbone: nn.Module) -> int:
    """Number of features of a backbone: torchvision's ResNets leave it in `inplanes` (512 for ResNet-18)."""
    return getattr(backbone, "inplanes", 512)

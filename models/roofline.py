"""How fast a GPU can train a ResNet at best: each operator at the speed of its memory or of its arithmetic.

    operations = training_operations(build_backbone(), 224)
    images_per_second(operations, 3.35e12, 989e12)    # bytes/s and FLOP/s of an H100: about 18,900

Counted are the convolutions, and what lies between them as if BatchNorm, ReLU and the residual's sum were
one kernel; activations cross memory once an operator, in the dtype of training. Weights, heads, optimiser
and views count as nothing: a batch of hundreds shares the weights, and the rest is a few percent at 224 px.
After S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model" (2009),
operator by operator.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

# 3 forward (statistics; read, write), 5 backward (sums of gradient and input; both again, write)
NORM_PASSES = 8
SUM_PASSES = 2  # a block's shortcut read by the forward sum, and its gradient by the sum in the backward pass


class Operation(NamedTuple):
    """What one operator moves and computes for one view of one image."""

    name: str
    bytes: float
    flops: float


@torch.no_grad()
def training_operations(backbone: nn.Module, size: int, element: int = 2) -> list[Operation]:
    """Operators of a forward and backward pass of a ResNet on a view of `size` px, `element` bytes a number.

    The first convolution has no gradient of its input. The backbone's weights are neither used nor changed.
    """
    counted: list[Operation] = []
    hooks = [
        module.register_forward_hook(counter(name, element, counted))
        for name, module in backbone.named_modules()
        if operators_of(module)
    ]
    try:
        shaped = {name: p.to("meta") for name, p in backbone.state_dict().items()}
        images = torch.empty(1, 3, size, size, device="meta")
        was_training = backbone.training
        torch.func.functional_call(backbone.eval(), shaped, images)
        backbone.train(was_training)
    finally:
        for hook in hooks:
            hook.remove()
    return counted


def operators_of(module: nn.Module) -> Callable | None:
    """The function that counts a module's operators, or None for those that count as nothing."""
    if isinstance(module, nn.Conv2d):
        return convolution
    if isinstance(module, nn.BatchNorm2d):
        return norm
    if isinstance(module, nn.MaxPool2d):
        return pooling
    return shortcut if hasattr(module, "downsample") else None


def counter(name: str, element: int, counted: list[Operation]) -> Callable:
    """A forward hook that adds the operators of its module, both passes, to `counted`."""

    def hook(module, inputs, output):
        x, y = element * inputs[0].numel(), element * output.numel()
        for what, moved, flops in operators_of(module)(module, x, y, output):
            counted.append(Operation(f"{name}: {what}", moved, flops))

    return hook


def convolution(module: nn.Conv2d, x: int, y: int, output: torch.Tensor) -> list[tuple[str, float, float]]:
    """(pass, bytes, FLOPs) of each pass; `x` and `y` are the bytes of input and output."""
    flops = 2.0 * output.numel() * module.weight[0].numel()
    passes = ["forward", "gradient of the weights", "gradient of the input"]
    return [(name, x + y, flops) for name in passes[: 2 if module.in_channels == 3 else 3]]


def norm(module: nn.BatchNorm2d, x: int, y: int, output: torch.Tensor) -> list[tuple[str, float, float]]:
    """(what, bytes, FLOPs) of BatchNorm with its ReLU, both passes."""
    return [("norm and ReLU", NORM_PASSES * y, 0.0)]


def pooling(module: nn.MaxPool2d, x: int, y: int, output: torch.Tensor) -> list[tuple[str, float, float]]:
    """(pass, bytes, FLOPs) of a max-pool; comparisons count as no arithmetic."""
    return [("forward", x + y, 0.0), ("gradient", x + y, 0.0)]


def shortcut(module: nn.Module, x: int, y: int, output: torch.Tensor) -> list[tuple[str, float, float]]:
    """(what, bytes, FLOPs) of the sum at a block's end, both passes."""
    return [("sum with the shortcut", SUM_PASSES * y, 0.0)]


def images_per_second(
    operations: Iterable[Operation], bytes_per_s: float, flops_per_s: float, views: int = 2
) -> float:
    """Images a second of which each is seen in `views` views, at the speeds of memory and of arithmetic."""
    seconds = sum(max(op.bytes / bytes_per_s, op.flops / flops_per_s) for op in operations)
    return 1 / (views * seconds)

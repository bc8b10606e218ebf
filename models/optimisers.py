"""Optimisers, their parameter groups, and the learning rate of a step."""

import math

import torch


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then a cosine to zero that the last step does not
    reach."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class LARS(torch.optim.Optimizer):
    """SGD whose step is scaled, weight by weight, to the weight's norm (Y. You et al., 2017), in the variant
    of Barlow Twins' own code: the decay is part of the gradient whose norm divides.

    Biases and norms are not scaled. The operators run over all weights at once (`torch._foreach_*`): a
    ResNet-18 has 60 of them, and one at a time they are 600 launches a step.
    """

    def __init__(
        self,
        params: list,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move all weights that have a gradient. `closure` is not called."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.step_group(group, params)

    def step_group(self, group: dict, params: list[torch.Tensor]) -> None:
        """Move `params`, which have gradients, by the settings of their group."""
        updates = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
        scaled = [i for i, p in enumerate(params) if p.ndim > 1]
        if scaled:
            weights, gradients = [params[i] for i in scaled], [updates[i] for i in scaled]
            weight = torch.stack(torch._foreach_norm(weights))  # (weights,)
            gradient = torch.stack(torch._foreach_norm(gradients))
            ratio = torch.where((weight > 0) & (gradient > 0), group["trust"] * weight / gradient, 1.0)
            torch._foreach_mul_(gradients, list(ratio.unbind()))
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])


OPTIMISERS = {"sgd": torch.optim.SGD, "lars": LARS, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def can_fuse(device: torch.device, precision: str) -> bool:
    """Whether to take `fused` steps: on a GPU, except in fp16, where the scaler may skip the first step."""
    return device.type == "cuda" and precision != "fp16"


def make_optimizer(
    name: str,
    model: torch.nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Optimiser `name` (a key of OPTIMISERS) over the trainable weights; `momentum` is Adam's beta1.

    `fused` takes a step in a few kernels, on a GPU in full precision or bf16. LARS ignores it: its steps are
    fused already.

    Norms and biases do not decay. A `predictor` has groups of its own, `constant`: their rate does not follow
    the schedule (X. Chen and K. He, SimSiam, section 4.2) and stays at the model's `predictor_rate` times lr.
    """
    predictor_rate = getattr(model, "predictor_rate", 1.0)
    groups: dict[tuple[bool, float], list] = {}
    for key, p in model.named_parameters():
        if p.requires_grad:
            constant = predictor_rate if key.startswith("predictor.") else 0.0
            groups.setdefault((p.ndim > 1, constant), []).append(p)
    described = [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "constant": constant}
        for (decays, constant), params in groups.items()
    ]
    if name == "lars":
        return LARS(described, lr=lr, momentum=momentum)
    moments = {"momentum": momentum} if name == "sgd" else {"betas": (momentum, 0.999)}
    return OPTIMISERS[name](described, lr=lr, fused=fused or None, **moments)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, peak: float) -> None:
    """The rate of a step: `rate` by the schedule; where a group's `constant` is above 0, that many times
    `peak`."""
    for group in optimizer.param_groups:
        group["lr"] = group["constant"] * peak if group["constant"] else rate

"""A step's forward and backward pass as one CUDA graph: hundreds of launches become one."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from models.step import Learner

EAGER_STEPS = 3  # before a graph is captured: they tune convolutions, and make what is made once
WARMUP_STEPS = EAGER_STEPS + 2  # and those that capture and replay for the first time: then a clock may start


class Captured(NamedTuple):
    """What replays read and write, always in the same memory."""

    replay: Callable[[], None]
    views: tuple[torch.Tensor, ...]
    loss: torch.Tensor
    gradients: list[tuple[torch.nn.Parameter, torch.Tensor]]


class GraphedLearner:
    """A Learner whose forward and backward pass is captured once for a shape of views, and then replayed.

    The first EAGER_STEPS steps of a shape are ordinary ones, so that no step is taken for the graph's sake.
    The optimiser stays outside: its rate changes with every step. For one GPU, without a scaler.
    """

    def __init__(self, learner: Learner):
        self.learner = learner
        self.shape: tuple = ()
        self.steps = 0  # of this shape
        self.captured: Captured | None = None
        self.refused = False  # by the driver, or by an operator that cannot be captured

    def __call__(self, views: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Train on view1, view2 (n, 3, size, size); the loss, on the device."""
        shape = (views[0].shape, views[0].dtype)
        if shape != self.shape:
            self.shape, self.steps, self.captured = shape, 0, None
        self.steps += 1
        if self.steps > EAGER_STEPS and not self.captured and not self.refused:
            self.try_capture(views)
        if self.captured:
            loss = replayed(self.captured, views)
        elif self.refused:
            loss = self.learner.backward(views)
        else:
            loss = beside(self.learner.backward, views)
        self.learner.update()
        return loss

    def try_capture(self, views: tuple[torch.Tensor, ...]) -> None:
        """Capture; where that fails, say why and go on without a graph."""
        try:
            self.captured = capture(self.learner, views)
        except RuntimeError as error:
            self.refused = True
            self.learner.optimizer.zero_grad(set_to_none=True)
            warnings.warn(f"going on without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=2)


def beside(run: Callable, views: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """run(views) on another stream than the usual one, as everything has to run before a capture."""
    stream, usual = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        loss = run(views)
    usual.wait_stream(stream)
    return loss


def capture(learner: Learner, views: tuple[torch.Tensor, ...]) -> Captured:
    """Record a backward pass without running it. Gradients must be None, as after `Learner.update`."""
    fixed = tuple(view.clone(memory_format=torch.preserve_format) for view in views)
    graph = torch.cuda.CUDAGraph()
    usual = torch.cuda.stream(torch.cuda.current_stream())  # a capture that is refused leaves its own behind
    with usual, torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader's thread goes on
        loss = learner.backward(fixed)
    gradients = [(p, p.grad) for p in learner.model.parameters() if p.grad is not None]
    return Captured(graph.replay, fixed, loss, gradients)


def replayed(captured: Captured, views: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Run the graph on views; the loss, and the gradients where the optimiser looks for them."""
    for fixed, view in zip(captured.views, views, strict=True):
        fixed.copy_(view, non_blocking=True)
    captured.replay()
    for parameter, gradient in captured.gradients:
        parameter.grad = gradient
    return captured.loss.clone()

"""What each step sees, as a pure function of (seed, epoch, step), and the loader that makes it from pixels.

    plan = Plan(len(pixels), 256, *pixels.shape[-2:])
    for view1, view2 in TorchLoader(pixels, plan, 224, mean, std, torch.device("cuda")).epoch(0): ...

Nothing here has a state: a run that resumes at any step, and any number of ranks, sees the same images in the
same views.

On a GPU nothing is waited for. A thread draws the numbers of the steps to come and packs them into pinned
memory; one copy takes them over. The pixels stay on the GPU where they fit, else the thread copies them
ahead.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from common import fits_on_gpu
from data.augment import ROW, Draw, Recipe, draw, pack, view

AHEAD = 2  # steps that are prepared while one is computed
Item = TypeVar("Item")


class Plan(NamedTuple):
    """Order and views of a run.

    Every step has the same number of images, so that a GPU tunes, compiles and captures once. The images that
    this leaves over, fewer than `steps() * ranks`, wait for the next epoch, whose order is another.
    """

    images: int
    batch_size: int  # of all ranks together, at most
    height: int  # of the images, pixels
    width: int
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    recipe: Recipe = Recipe()

    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.images // self.batch_size)

    def largest(self) -> int:
        """Images of one rank in one step."""
        return self.images // self.ranks // self.steps()

    def shown(self) -> int:
        """Images of an epoch, of all ranks together."""
        return self.largest() * self.ranks * self.steps()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, Draw, Draw]]:
        """(rows, draw of view 1, draw of view 2) of this rank for the steps from `start` on.

        The ranks' shares of a step, one behind the other, are the batch of one process of as many images.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
        n = self.largest()
        share = slice(self.rank * n, (self.rank + 1) * n)
        for step in range(start, self.steps()):
            batch = order[step * n * self.ranks :][: n * self.ranks]
            generator = step_generator(self.seed, epoch, step)
            draws = [draw(len(batch), self.height, self.width, generator, self.recipe) for _ in range(2)]
            yield batch[share], *(Draw(*(field[share] for field in d)) for d in draws)


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """The random numbers of one step, whatever came before it."""
    (state,) = np.random.SeedSequence([seed, epoch, step]).generate_state(1)
    return torch.Generator().manual_seed(int(state))


class Step(NamedTuple):
    """What a thread prepares for one step."""

    images: torch.Tensor  # uint8 (n, 3, H, W); or of the whole data set, where the pixels stay on the GPU
    draws: list[Draw]
    numbers: torch.Tensor | None  # `pack` of the draws, pinned; None on a CPU
    copied: torch.cuda.Event | None = None  # when images have reached the GPU


class TorchLoader:
    """Views of uint8 pixels (n, 3, H, W), which stay on `device` where they fit (`common.fits_on_gpu`)."""

    def __init__(self, pixels: torch.Tensor, plan: Plan, size: int, mean, std, device: torch.device):
        self.plan, self.size, self.mean, self.std, self.device = plan, size, mean, std, device
        self.resident = device.type == "cpu" or fits_on_gpu(pixels.nbytes, device)
        self.pixels = pixels.to(device) if self.resident else pixels
        self.side = None if self.resident else torch.cuda.Stream(device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(view1, view2) of each step from `start` on, on the device, channels_last (n, 3, size, size)."""
        prepared = (self.prepare(*step) for step in self.plan.epoch(epoch, start))
        for step in in_thread(prepared, AHEAD):
            yield self.views(step)

    def prepare(self, rows: np.ndarray, *draws: Draw) -> Step:
        """In the thread: whatever a step needs that no GPU has to compute."""
        rows = torch.from_numpy(rows)
        if self.device.type == "cpu":
            return Step(self.pixels[rows], draws, None)
        if self.resident:
            return Step(self.pixels, draws, pack(draws, rows, pin=True))
        images, copied = self.copy_ahead(rows)
        return Step(images, draws, pack(draws, pin=True), copied)

    def copy_ahead(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Pixels of rows (n,), copied beside the computation, and the event that tells of their arrival."""
        staged = torch.empty(len(rows), *self.pixels.shape[1:], dtype=torch.uint8, pin_memory=True)
        torch.index_select(self.pixels, 0, rows, out=staged)
        with torch.cuda.stream(self.side):
            return staged.to(self.device, non_blocking=True), self.side.record_event()

    def views(self, step: Step) -> tuple[torch.Tensor, ...]:
        images, numbers = step.images, [None] * len(step.draws)
        if step.numbers is not None:
            numbers = step.numbers.to(self.device, non_blocking=True)
            images = self.on_stream(step, numbers)
        return tuple(
            view(images, d, self.size, self.mean, self.std, own) for d, own in zip(step.draws, numbers)
        )

    def on_stream(self, step: Step, numbers: torch.Tensor) -> torch.Tensor:
        """The step's images, for the stream that computes."""
        if step.copied is None:
            return step.images[numbers[0, :, ROW].long()]
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(step.copied)
        step.images.record_stream(stream)  # the side stream must not reuse the memory before it has been read
        return step.images


def in_thread(items: Iterator[Item], ahead: int) -> Iterator[Item]:
    """The items in their order, made by a thread that is up to `ahead` of them in advance."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, None) for _ in range(ahead))
        while True:
            item = waiting.popleft().result()
            if item is None:
                return
            waiting.append(pool.submit(next, items, None))
            yield item

"""What each step sees, as a pure function of (seed, epoch, step), and the loader that makes it from decoded pixels.

Nothing here has a state: a run that resumes at any step, and any number of ranks, sees the same images in the same views.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from data.augment import Draw, Recipe, draw, view


class Plan(NamedTuple):
    """Order and views of a run.

    Every step has the same number of images, so that a GPU tunes, compiles and captures once. The images that this
    leaves over, fewer than `steps() * ranks`, wait for the next epoch, whose order is another.
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

        The ranks' shares of a step, one behind the other, are the batch that one process of `ranks` times the share
        would have.
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


class TorchLoader:
    """Views made by torch operators from uint8 pixels (n, 3, H, W), which stay on `device` when they fit beside the model."""

    def __init__(self, pixels: torch.Tensor, plan: Plan, size: int, mean, std, device: torch.device):
        self.plan, self.size, self.mean, self.std, self.device = plan, size, mean, std, device
        if device.type == "cuda" and pixels.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
            pixels = pixels.to(device)
        self.pixels = pixels

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(view1, view2) of each step from `start` on: float32 (n, 3, size, size), channels_last, on the device."""
        for images, draws in self.batches(epoch, start):
            yield tuple(view(images, d, self.size, self.mean, self.std) for d in draws)

    def batches(self, epoch, start):
        if self.pixels.device == self.device:  # nothing to copy, so nothing to prefetch
            for rows, *draws in self.plan.epoch(epoch, start):
                yield self.pixels[torch.from_numpy(rows).to(self.device, non_blocking=True)], draws
            return

        def fetch(rows, *draws):  # in a thread: reading pages and pinning must not hold up the next launch
            return self.pixels[torch.from_numpy(rows)].pin_memory(), draws

        with ThreadPoolExecutor(1) as pool:
            waiting = []
            for item in self.plan.epoch(epoch, start):
                waiting.append(pool.submit(fetch, *item))
                if len(waiting) > 2:
                    images, draws = waiting.pop(0).result()
                    yield images.to(self.device, non_blocking=True), draws
            for future in waiting:
                images, draws = future.result()
                yield images.to(self.device, non_blocking=True), draws

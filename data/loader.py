"""What each step sees, as a pure function of (seed, epoch, step), and the loader that makes it from pixels.

    plan = Plan(len(pixels), 256, *pixels.shape[-2:])
    for view1, view2 in TorchLoader(pixels, plan, 224, mean, std, torch.device("cuda")).epoch(0): ...

Nothing here has a state: a run that resumes at any step sees the same images in the same views. So do two
ranks and one process, where the ranks divide the images of a step; else fewer are shown.

On a GPU nothing is waited for. A thread draws the numbers of the steps to come and packs them into pinned
memory; one copy takes them over. The pixels stay on the GPU where they fit, else the thread copies them
ahead.
"""

import importlib.util
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, Union

import numpy as np
import torch

from common import ConfigError, fits_on_gpu
from data.augment import ROW, Draw, Recipe, draw, pack, view
from data.fused import available, fused_view

if TYPE_CHECKING:
    from data.dali import DaliImages, DaliLoader

AHEAD = 2  # steps that are prepared while one is computed
Item = TypeVar("Item")
Loader = Union["TorchLoader", "DecodedLoader", "DaliLoader"]  # what gives the views of each step


class Plan(NamedTuple):
    """Order and views of a run.

    Every step has the same number of images, so that a GPU tunes, compiles and captures once. The images that
    this leaves over, fewer than `steps() * ranks * parts`, are not seen in this epoch. Each epoch draws an
    order of its own, so most of them are seen in the next.
    """

    images: int
    batch_size: int  # of all ranks together, at most
    height: int  # of the images, pixels
    width: int
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    recipe: Recipe = Recipe()
    parts: int = 1  # into which a rank cuts its images of a step, all of one size

    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.images // self.batch_size)

    def largest(self) -> int:
        """Images of one rank in one step."""
        n = self.images // self.ranks // self.steps()
        return n - n % self.parts

    def shown(self) -> int:
        """Images of an epoch, of all ranks together."""
        return self.largest() * self.ranks * self.steps()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, Draw, Draw]]:
        """(rows, draw of view 1, draw of view 2) of this rank for the steps from `start` on.

        The ranks' shares of a step, one behind the other, are the batch of one process of as many images.
        """
        share = slice(self.rank * self.largest(), (self.rank + 1) * self.largest())
        for step, rows in enumerate(self.rows(epoch, start), start):
            generator = step_generator(self.seed, epoch, step)
            n = self.largest() * self.ranks
            draws = [draw(n, self.height, self.width, generator, self.recipe) for _ in range(2)]
            yield rows, *(Draw(*(field[share] for field in d)) for d in draws)

    def rows(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """The images (n,) of this rank for the steps from `start` on."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
        n = self.largest()
        for step in range(start, self.steps()):
            yield order[(step * self.ranks + self.rank) * n :][:n]


def step_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """The random numbers of one step, whatever came before it."""
    (state,) = np.random.SeedSequence([seed, epoch, step]).generate_state(1)
    return torch.Generator().manual_seed(int(state))


class Step(NamedTuple):
    """What a thread prepares for one step."""

    # uint8 (n, 3, H, W); or of the whole data set, where the pixels stay on a GPU
    images: torch.Tensor | None
    draws: tuple[Draw, ...]
    numbers: torch.Tensor | None  # `pack` of the draws, pinned; None on a CPU
    copied: torch.cuda.Event | None = None  # tells when the images have reached the GPU


class TorchLoader:
    """Views of uint8 pixels (n, 3, H, W), which stay on `device` where they fit (`common.fits_on_gpu`).

    mean and std are three numbers each, in units of the range 0-1; `dtype` is that of training. `nbytes`: of
    the whole set, where pixels are a sample that stands for it, as in bench.py.
    """

    def __init__(
        self,
        pixels: torch.Tensor,
        plan: Plan,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        nbytes: int | None = None,
    ):
        self.plan, self.device = plan, device
        self.size = size  # of the views, pixels: may be changed between epochs
        self.normal, self.dtype, self.fused = (mean, std), dtype, available(device)
        self.resident = device.type == "cpu" or fits_on_gpu(nbytes or pixels.nbytes, device)
        self.pixels = pixels.to(device) if self.resident else pixels
        self.side = None if self.resident else torch.cuda.Stream(device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(view1, view2) of each step from `start` on: (n, 3, size, size) in channels_last on the device.

        They are float32, or of training's dtype where the fused kernels make them.
        """
        prepared = (self.prepare(*step) for step in self.plan.epoch(epoch, start))
        for step in in_thread(prepared, AHEAD):
            if step.copied is not None:
                claim(step.images, step.copied)
            yield views_of(step, step.images, self.size, self.normal, self.dtype, self.fused)

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
        torch.cuda.set_device(self.side.device)  # of this thread: else it is GPU 0, also for other ranks
        staged = torch.empty(len(rows), *self.pixels.shape[1:], dtype=torch.uint8, pin_memory=True)
        torch.index_select(self.pixels, 0, rows, out=staged)
        with torch.cuda.stream(self.side):
            return staged.to(self.device, non_blocking=True), self.side.record_event()


class DecodedLoader:
    """Views of the images that a decoder (`data.dali.DaliImages`) makes anew for each step, on its device."""

    def __init__(
        self,
        decoder: "DaliImages",
        plan: Plan,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.decoder, self.plan, self.device = decoder, plan, device
        self.size = size  # of the views, pixels: may be changed between epochs
        self.normal, self.dtype, self.fused = (mean, std), dtype, available(device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(view1, view2) of each step from `start` on, as TorchLoader gives them."""
        prepared = (self.prepare(*draws) for _rows, *draws in self.plan.epoch(epoch, start))
        images = self.decoder.batches(self.plan.rows(epoch, start))
        for step, batch in zip(in_thread(prepared, AHEAD), images, strict=True):
            yield views_of(step, batch, self.size, self.normal, self.dtype, self.fused)

    def prepare(self, *draws: Draw) -> Step:
        """In the thread: the numbers of a step, pinned for a GPU; the decoder has its images."""
        return Step(None, draws, None if self.device.type == "cpu" else pack(draws, pin=True))


def choose_loader(loader: str, device: torch.device, size: int, nbytes: int) -> tuple[str, str]:
    """(torch or dali, the reason) for views of `size` px from `nbytes` of decoded pixels."""
    try:
        dali = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        dali = False
    if loader == "dali" and not dali:
        raise ConfigError(
            "--loader dali: NVIDIA DALI is not installed (Linux only, see requirements.txt); "
            "--loader torch needs none"
        )
    if loader != "auto":
        return loader, "as asked"
    if not dali:
        return "torch", "DALI is not installed"
    if device.type == "cpu":
        # On one core, DALI's share of torch's CPU time is about 1.1 at 64 px and 0.5 at 224 px
        if size >= 128:
            return "dali", "its operators are faster on large views"
        return "torch", "as fast, and decodes once"
    if fits_on_gpu(nbytes, device):
        return "torch", f"the decoded pixels, {nbytes / 1e9:.1f} GB, fit on the GPU"
    return "dali", "the decoded pixels do not fit on the GPU, which decodes faster than the CPU sends"


def dali_loader(
    root: str | Path,
    files: Sequence[str],
    plan: Plan,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    workers: int = 4,
    cache_mb: int = 0,
) -> "DecodedLoader | DaliLoader":
    """Loader of files below root that DALI decodes; DALI makes the views too where the fused kernels cannot.

    Raises ImportError without DALI.
    """
    from data.dali import DaliImages, DaliLoader  # here: DALI is for Linux alone

    options = {"workers": workers, "cache_mb": cache_mb}
    if not available(device):
        return DaliLoader(root, files, plan, size, mean, std, device, dtype=dtype, **options)
    largest = plan.largest()
    decoder = DaliImages(root, files, plan.height, plan.width, largest=largest, device=device, **options)
    return DecodedLoader(decoder, plan, size, mean, std, device, dtype)


def views_of(
    step: Step, images: torch.Tensor, size: int, normal: tuple, dtype: torch.dtype, fused: bool
) -> tuple[torch.Tensor, ...]:
    """Each draw's view of uint8 images on their device: one copy, of the step's numbers, and no wait."""
    if step.numbers is None:
        return tuple(view(images, draw, size, *normal) for draw in step.draws)
    numbers = step.numbers.to(images.device, non_blocking=True)
    if fused:
        return tuple(
            fused_view(images, draw, size, *normal, dtype, numbers=own)
            for draw, own in zip(step.draws, numbers)
        )
    images = images[numbers[0, :, ROW].long()]
    return tuple(view(images, draw, size, *normal, own) for draw, own in zip(step.draws, numbers))


def claim(images: torch.Tensor, copied: torch.cuda.Event) -> None:
    """Let the stream that computes use images that another stream has copied."""
    stream = torch.cuda.current_stream(images.device)
    stream.wait_event(copied)
    images.record_stream(stream)  # the side stream must not reuse the memory before it has been read


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

"""The one timed training loop: images a second of a loader, of a model, or of both, and the share of time
waited."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from tqdm import tqdm


class Timed(NamedTuple):
    """What a timed stretch of steps took."""

    images_per_s: float
    data_wait: float  # share of the time spent waiting for a batch, 0-1
    seconds: float
    steps: int


def timed_steps(
    batches: Iterable,
    step: Callable[[tuple], object],
    device: torch.device,
    *,
    steps: int,
    seconds: float = float("inf"),
    warmup: int = 0,
    name: str = "",
) -> Timed:
    """Run step(batch) for `steps` batches or until `seconds` are over, after `warmup` steps that are not
    timed.

    A batch is a sequence whose first item has a row for each image. The clock starts and stops with an idle
    device. A bar called `name` follows the steps on a terminal.
    """
    stream: Iterator = iter(batches)
    for _ in range(warmup):
        step(next(stream))
    wait_for(device)
    images = count = 0
    waited, began = 0.0, time.perf_counter()
    bar = tqdm(total=steps, desc=name, unit="step", leave=False, disable=None if name else True)
    clock = began
    while count < steps and clock - began < seconds:
        batch = next(stream)
        waited += time.perf_counter() - clock
        step(batch)
        images, count = images + len(batch[0]), count + 1
        bar.update()
        clock = time.perf_counter()
    wait_for(device)
    bar.close()
    took = time.perf_counter() - began
    return Timed(images / took, waited / took, took, count)


def endless(loader: object) -> Iterator[tuple]:
    """The batches of a loader's epochs, one epoch after the other."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's peak of allocated memory, or this process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""The one timed training loop: images a second of a loader, of a model, or of both, and the share of time
waited."""

import itertools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from models.checkpoint import Progress
from models.graph import WARMUP_STEPS

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints errors of its own where no GPU is


class Watch:
    """The times of an epoch, which goes on where `progress` left it: waiting for data, training, and all of
    it."""

    def __init__(self, progress: Progress):
        now = time.perf_counter()
        self.log, self.waited = progress.log, progress.waited
        self.trained = progress.trained  # seconds, once the epoch's steps are over
        self.began, self.started, self.saved = now - progress.seconds, now - progress.trained, now

    def waiting(self, batches: Iterable) -> Iterator:
        """The batches; the time until each of them is there counts as waited."""
        clock = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - clock
            yield batch
            clock = time.perf_counter()

    def since_save(self) -> float:
        """Seconds since the last checkpoint within this epoch, or since it began."""
        return time.perf_counter() - self.saved

    def stop(self) -> None:
        """The epoch's steps are over."""
        self.trained = time.perf_counter() - self.started

    def seconds(self) -> float:
        """Since the epoch began, the time of earlier processes included."""
        return time.perf_counter() - self.began

    def progress(self, epoch: int, step: int, loss: float) -> Progress:
        """Where the run stands after `step` steps of `epoch`, for a checkpoint."""
        self.saved = now = time.perf_counter()
        return Progress(epoch, step, self.log, loss, self.waited, now - self.started, now - self.began)


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
    patience: float = float("inf"),
    name: str = "",
) -> Timed:
    """Run step(batch) for `steps` batches or until `seconds` are over.

    `warmup` untimed steps come first. They end early once `patience` seconds have passed since the first of
    them, which is not counted, as it starts workers and compiles.

    A batch is a sequence whose first item has a row for each image. The clock starts and stops with an idle
    device. A bar called `name` follows the steps on a terminal.
    """
    stream: Iterator = iter(batches)
    warm_since = float("inf")
    for _ in range(warmup):
        step(next(stream))
        warm_since = min(warm_since, time.perf_counter())
        if time.perf_counter() - warm_since >= patience:
            break
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
    """Return when a GPU has done all that it was asked for; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's peak of allocated memory, or this process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def profile_steps(
    loader: object, step: Callable[[tuple], object], device: torch.device, steps: int, trace: Path
) -> dict[str, float]:
    """Loader alone, model alone and both, `steps` steps each; images a second by the names of profile.csv's
    columns.

    Three more steps are traced into the file `trace`, for chrome://tracing.
    """
    stream = endless(loader)
    views = next(stream)
    again = itertools.repeat(views)
    alone = timed_steps(stream, lambda batch: None, device, steps=steps, name="loader alone")
    model = timed_steps(again, step, device, steps=steps, warmup=WARMUP_STEPS, name="model alone")
    both = timed_steps(stream, step, device, steps=steps, name="both")
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as traced:
        for batch in itertools.islice(stream, 3):
            step(batch)
    traced.export_chrome_trace(str(trace))
    return {
        "loader_images_per_s": alone.images_per_s,
        "model_images_per_s": model.images_per_s,
        "images_per_s": both.images_per_s,
        "data_wait": both.data_wait,
        "peak_memory_gb": peak_memory(device) / 1e9,
    }

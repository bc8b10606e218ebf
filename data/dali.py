"""The two views made by NVIDIA DALI from files: read, decode, augment and normalise on the GPU, or all of it on the CPU.

    loader = DaliLoader(root, files, plan, 224, mean, std, torch.device("cuda"))
    for view1, view2 in loader.epoch(0): ...

DALI draws nothing here: the plan says which images a step holds and how each view is cut, flipped, jittered and blurred,
so this loader and the torch one give the same views, and a run resumes at any step. Copies alone: it needs only
NumPy, torch, DALI and a plan with `height`, `width`, `largest()` and `epoch(epoch, start)`.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

GREY = [0.2989, 0.587, 0.114]  # ITU-R 601
BRIGHTNESS, CONTRAST = 0, 1  # as the plan's `order` counts; 2 is saturation
DEPTH = 3  # batches under way ahead of the one in use


class DaliLoader:
    """Views of files below root, in the plan's order: float32 (float16 if `half`) (n, 3, size, size), channels_last.

    mean and std are three numbers each, in units of the range 0-1. `workers` threads read, and decode or, on a CPU, do
    everything. `cache_mb` of the GPU's memory keep decoded images from one epoch to the next.
    """

    def __init__(
        self,
        root: str | Path,
        files: Sequence[str],
        plan,
        size: int,
        mean,
        std,
        device: torch.device,
        *,
        workers: int = 4,
        half: bool = False,
        cache_mb: int = 0,
    ):
        self.plan, self.size, self.device = plan, size, device
        paths = [os.path.join(root, file) for file in files]
        self.paths = (
            named(paths) if cache_mb else [np.frombuffer(os.fsencode(path), np.uint8) for path in paths]
        )
        self.steps = iter(())
        self.in_use = []
        decoder, device_id = {"device": "cpu"}, None
        if device.type == "cuda":
            device_id = torch.cuda.current_device() if device.index is None else device.index
            decoder = {
                "device": "mixed",
                "jpeg_fancy_upsampling": True,
            }  # the chroma of libjpeg, so of the torch loader
            if cache_mb:
                decoder |= {
                    "cache_size": cache_mb,
                    "cache_type": "threshold",
                }  # every image, until it is full
        self.pipeline = views(
            self.next_step,
            size,
            [255 * v for v in mean],
            [255 * v for v in std],
            types.FLOAT16 if half else types.FLOAT,
            decoder,
            batch_size=plan.largest(),
            num_threads=max(1, workers),
            prefetch_queue_depth=DEPTH,
            device_id=device_id,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(view1, view2) of each step from `start` on, without a copy, valid for as long as they are held.

        A new call ends the one before, wherever it stands.
        """
        self.steps = iter(())
        for _ in self.batches():  # what is under way of an epoch that was given up
            pass
        self.pipeline.reset()
        self.steps = self.plan.epoch(epoch, start)
        for batch in self.batches():
            pair = tuple(torch.from_dlpack(view.as_tensor()).permute(0, 3, 1, 2) for view in batch)
            try:
                yield pair
            finally:
                self.keep(pair)

    def batches(self):
        while True:
            try:
                yield self.pipeline.run()
            except StopIteration:
                return

    def next_step(self):
        """What one run of the pipeline needs: paths, then the parameters of both views. Called ahead by DALI."""
        rows, *draws = next(self.steps)
        numbers = [
            array
            for draw in draws
            for array in parameters(draw, self.plan.height, self.plan.width, self.size)
        ]
        return [[self.paths[row] for row in rows], *numbers]

    def keep(self, pair):
        """Hold the views until the GPU has read them: DALI reuses a buffer as soon as torch lets go of it."""
        if self.device.type == "cuda":
            read = torch.cuda.Event()
            read.record(torch.cuda.current_stream(self.device))
            self.in_use = [(event, views) for event, views in self.in_use if not event.query()] + [
                (read, pair)
            ]


def named(paths: list[str]) -> list:
    """The paths as DALI tensors that carry their name, which reading and decoding pass on: the decoder's cache knows an
    image by its name, and only DALI's own reader gives one. It opens each file once and reads none."""

    @pipeline_def(batch_size=min(1024, len(paths)), num_threads=1, device_id=None)
    def names():
        file, _ = fn.readers.file(files=paths, pad_last_batch=True)
        return fn.get_property(file, key="source_info")

    pipeline, found = names(), []
    while len(found) < len(paths):
        found += pipeline.run()[0]
    return found[: len(paths)]


def parameters(draw, height: int, width: int, size: int) -> list[np.ndarray]:
    """The arguments of `view` after the images, a row for each image, from the plan's draw of one view."""
    box, flip, factor, order, sigma, *turn = (field.numpy() for field in draw if field is not None)
    turned = turn[0] if turn else np.zeros(len(box), bool)
    sides = np.float32([height, width])
    start, extent = box[:, :2] / sides, box[:, 2:] / sides  # shares of the image's own sides
    sized = np.where(flip[:, ::-1], -size, size)  # (height, width) of the view, negative where flipped
    window = np.minimum(
        size // 10 | 1, 2 * np.ceil(4 * sigma) + 1
    )  # less than 1e-4 of the kernel lies beyond 4 sigma
    jittered, factors = (
        (factor != 1).any(1),
        np.take_along_axis(factor, order, 1),
    )  # in the order of their turns
    numbers = [start, extent, sized, *factors.T, sigma], [*order.T, window]
    floats, integers = (
        [np.ascontiguousarray(a, t) for a in n] for n, t in zip(numbers, (np.float32, np.int32))
    )
    return [*floats, jittered, turned, *integers]


@pipeline_def(enable_conditionals=True)
def views(source, size, mean, std, dtype, decoder):
    paths, *numbers = fn.external_source(source=source, num_outputs=1 + 2 * 13, batch=True)
    jpegs = fn.io.file.read(paths, dont_use_mmap=True)  # a mapped file that shrinks would kill the process
    images = fn.decoders.image(jpegs, adjust_orientation=True, **decoder)  # as data.pixels does
    pair = [view(images, *numbers[:13]), view(images, *numbers[13:])]
    return tuple(
        fn.crop_mirror_normalize(v, mean=mean, std=std, dtype=dtype, output_layout="HWC") for v in pair
    )


def view(
    images,
    start,
    extent,
    sized,
    factor1,
    factor2,
    factor3,
    sigma,
    jittered,
    turned,
    turn1,
    turn2,
    turn3,
    window,
):
    """One view (size, size, 3), float32 in 0-255. The crop comes first: a resize alone reads beyond its region."""
    x = fn.slice(images, rel_start=start, rel_shape=extent, axes=(0, 1))
    x = fn.resize(x, size=sized, dtype=types.FLOAT)
    if turned:
        x = fn.transpose(x, perm=[1, 0, 2], transpose_layout=False)
    if jittered:
        x = jitter(x, turn1, factor1)
        x = jitter(x, turn2, factor2)
        x = jitter(x, turn3, factor3)
    if sigma > 0:
        x = fn.gaussian_blur(x, sigma=sigma, window_size=window)
    return x


def jitter(x, turn, factor):
    """One turn of the colour jitter: x <- factor x + (1 - factor) reference, which is black, the mean grey or the grey."""
    if turn == BRIGHTNESS:
        x = x * factor
    elif turn == CONTRAST:
        x = x * factor + (1 - factor) * fn.reductions.mean(fn.coord_transform(x, M=GREY))
    else:
        x = x * factor + (1 - factor) * fn.coord_transform(x, M=GREY)
    return math.min(math.max(x, 0.0), 255.0)

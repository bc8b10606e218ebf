"""Images read and decoded by NVIDIA DALI, on the GPU or on the CPU: bare, or as the two views of a step.

    decoder = DaliImages(root, files, 64, 64, largest=256, device=torch.device("cuda"))
    for images in decoder.batches(iter([rows1, rows2])): ...                    # uint8 (n, 3, 64, 64)

    loader = DaliLoader(root, files, plan, 224, mean, std, torch.device("cpu"))
    for view1, view2 in loader.epoch(0): ...

`DaliImages` feeds views that something else makes. `DaliLoader` makes them itself, by DALI's own operators.
DALI draws nothing: the plan says which images a step holds and how each view is cut, flipped, jittered,
blurred and turned, so this loader and the torch one give the same views, and a run resumes at any step.
Copies alone: it needs only NumPy, torch, DALI and a plan with `height`, `width`, `largest()` and
`epoch(epoch, start)`.
"""

import errno
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

GREY = [0.2989, 0.587, 0.114]  # ITU-R 601
BRIGHTNESS, CONTRAST = 0, 1  # as the plan's `order` counts; 2 is saturation
NUMBERS = 13  # arrays that describe one view, see `parameters`
DEPTH = 3  # batches under way ahead of the one in use


class DaliImages:
    """Decoded files below root in the order asked for: uint8 (n, 3, height, width), dense, on the device.

    An image of another size is scaled as a whole to height x width, as `data.pixels` does.
    """

    def __init__(
        self,
        root: str | Path,
        files: Sequence[str],
        height: int,
        width: int,
        *,
        largest: int,
        device: torch.device,
        workers: int = 4,
        cache_mb: int = 0,
    ):
        self.files = Files(root, files, device, cache_mb)
        self.run = Run(self.files, decoded, (height, width), largest=largest, workers=workers)

    def batches(self, rows: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
        """The images of each array of rows (n <= largest,), valid for as long as they are held.

        A new call ends the one before, wherever it stands. Raises OSError with the name of a file that
        cannot be read or decoded any more.
        """
        for (images,) in self.run.batches((step, []) for step in rows):
            yield images


class DaliLoader:
    """Views of files below root, in the plan's order: (n, 3, size, size) in channels_last on the device.

    They are float32, or float16 if training's `dtype` is: DALI knows no bfloat16, to which autocast casts
    them. mean and std are three numbers each, in units of the range 0-1. `workers` threads read, and decode
    or, on a CPU, do everything. `cache_mb` of the GPU's memory keep decoded images from one epoch to the
    next.
    """

    def __init__(
        self,
        root: str | Path,
        files: Sequence[str],
        plan,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        workers: int = 4,
        dtype: torch.dtype = torch.float32,
        cache_mb: int = 0,
    ):
        self.plan, self.size = plan, size  # of the views, pixels: may be changed between epochs
        self.files = Files(root, files, device, cache_mb)
        half = dtype == torch.float16
        normal = {
            "mean": [255 * v for v in mean],
            "std": [255 * v for v in std],
            "dtype": types.FLOAT16 if half else types.FLOAT,
        }
        arguments = (plan.height, plan.width), normal
        self.run = Run(self.files, views, *arguments, largest=plan.largest(), workers=workers)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(view1, view2) of each step from `start` on, without a copy, valid for as long as they are held.

        A new call ends the one before, wherever it stands. Raises OSError with the name of a file that
        cannot be read or decoded any more.
        """
        for pair in self.run.batches(self.described(epoch, start)):
            yield tuple(view.permute(0, 3, 1, 2) for view in pair)

    def described(self, epoch: int, start: int) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """(rows, parameters of both views) of each step."""
        for rows, *draws in self.plan.epoch(epoch, start):
            height, width = self.plan.height, self.plan.width
            both = [parameters(draw, height, width, self.size) for draw in draws]
            yield rows, both[0] + both[1]


class Files:
    """The files of a data set as DALI takes them, and the options of the decoder on a device."""

    def __init__(self, root: str | Path, files: Sequence[str], device: torch.device, cache_mb: int):
        self.device = device
        self.paths = [os.path.join(root, file) for file in files]
        self.encoded = (
            named(self.paths) if cache_mb else [np.frombuffer(os.fsencode(p), np.uint8) for p in self.paths]
        )
        self.decoder: dict = {"device": "cpu"}
        if device.type == "cuda":  # the chroma of libjpeg, so of the torch loader
            self.decoder = {"device": "mixed", "jpeg_fancy_upsampling": True}
            if cache_mb:  # every image, until it is full
                self.decoder |= {"cache_size": cache_mb, "cache_type": "threshold"}

    def device_id(self) -> int | None:
        """The GPU's number, as DALI wants it; None for the CPU."""
        if self.device.type == "cpu":
            return None
        return torch.cuda.current_device() if self.device.index is None else self.device.index


class Run:
    """A pipeline that runs over the steps of one epoch after the other, DEPTH of them ahead."""

    def __init__(self, files: Files, graph, *arguments, largest: int, workers: int):
        self.files = files
        self.steps: Iterator = iter(())
        self.under_way: deque = deque(maxlen=DEPTH + 2)  # rows of the latest steps
        self.in_use: list = []
        self.pipeline = graph(
            self.next_step,
            files.decoder,
            *arguments,
            batch_size=largest,
            num_threads=max(1, workers),
            prefetch_queue_depth=DEPTH,
            device_id=files.device_id(),
        )

    def batches(self, steps: Iterator[tuple[np.ndarray, list]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """The outputs of the graph for each (rows, parameters) of `steps`."""
        self.steps = iter(())
        for _ in self.outputs():  # what is under way of an epoch that was given up
            pass
        self.pipeline.reset()
        self.steps = steps
        for batch in self.outputs():
            tensors = tuple(torch.from_dlpack(output.as_tensor()) for output in batch)
            try:
                yield tensors
            finally:
                self.keep(tensors)

    def outputs(self) -> Iterator:
        """What the pipeline gives until its source ends; OSError with the name of a file that does not
        decode."""
        while True:
            try:
                yield self.pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                raise explained(
                    error, [self.files.paths[i] for rows in self.under_way for i in rows]
                ) from None

    def next_step(self) -> list:
        """What one run of the pipeline needs: paths, then parameters. Called ahead by DALI."""
        rows, numbers = next(self.steps)
        self.under_way.append(rows)
        return [[self.files.encoded[row] for row in rows], *numbers]

    def keep(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Hold tensors until the GPU has read them: DALI reuses a buffer as soon as torch lets go of it."""
        if self.files.device.type != "cuda":
            return
        read = torch.cuda.Event()
        read.record(torch.cuda.current_stream(self.files.device))
        self.in_use = [(event, held) for event, held in self.in_use if not event.query()]
        self.in_use.append((read, tensors))


def explained(error: RuntimeError, paths: list[str]) -> Exception:
    """An OSError that names the first of the paths that fails when decoded alone, else the error itself."""
    for path in paths:
        if not os.path.exists(path):
            return FileNotFoundError(errno.ENOENT, "gone since it was checked", path)
    alone = one_file(device_id=None)
    for path in paths:
        try:
            alone.run(path=[np.frombuffer(os.fsencode(path), np.uint8)])
        except RuntimeError:
            return OSError(errno.EIO, "cannot be decoded by DALI: damaged since it was checked?", path)
    return error


def named(paths: list[str]) -> list:
    """The paths as DALI tensors that carry their name, which reading and decoding pass on.

    The decoder's cache knows an image by its name, and only DALI's own reader gives one. It opens each file
    once and reads none.
    """

    @pipeline_def(batch_size=min(1024, len(paths)), num_threads=1, device_id=None)
    def names():
        file, _ = fn.readers.file(files=paths, pad_last_batch=True)
        return fn.get_property(file, key="source_info")

    pipeline, found = names(), []
    while len(found) < len(paths):
        found += pipeline.run()[0]
    return found[: len(paths)]


def parameters(draw: Sequence[torch.Tensor | None], height: int, width: int, size: int) -> list[np.ndarray]:
    """The NUMBERS arguments of `view` behind the images, a row for each image, from one view's draw."""
    box, flip, factor, order, sigma, *turn = (field.numpy() for field in draw if field is not None)
    turned = turn[0] if turn else np.zeros(len(box), bool)
    sides = np.float32([height, width])
    start, extent = box[:, :2] / sides, box[:, 2:] / sides  # shares of the image's sides
    sized = np.where(flip[:, ::-1], -size, size)  # (height, width) of the view, negative where flipped
    # less than 1e-4 of the kernel lies beyond 4 sigma
    window = np.minimum(size // 10 | 1, 2 * np.ceil(4 * sigma) + 1)
    factors = np.take_along_axis(factor, order, 1)  # in the order of their turns
    floats = [start, extent, sized, *factors.T, sigma]
    integers = [*order.T, window]
    return [
        *(np.ascontiguousarray(a, np.float32) for a in floats),
        (factor != 1).any(1),
        turned,
        *(np.ascontiguousarray(a, np.int32) for a in integers),
    ]


# Graphs


@pipeline_def(enable_conditionals=True)
def views(source, decoder, plan_size, normal):
    """Both normalised views (size, size, 3) of each image; `source` gives its path and its `parameters`."""
    paths, *numbers = fn.external_source(source=source, num_outputs=1 + 2 * NUMBERS, batch=True)
    images = read(paths, decoder, *plan_size)
    pair = view(images, *numbers[:NUMBERS]), view(images, *numbers[NUMBERS:])
    return tuple(fn.crop_mirror_normalize(v, output_layout="HWC", **normal) for v in pair)


@pipeline_def(enable_conditionals=True)
def decoded(source, decoder, plan_size):
    """Images uint8 (3, height, width); `source` gives their paths."""
    (paths,) = fn.external_source(source=source, num_outputs=1, batch=True)
    images = read(paths, decoder, *plan_size)
    return fn.crop_mirror_normalize(images, dtype=types.UINT8, output_layout="CHW")  # one dense batch


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1)
def one_file():
    """The picture (H, W, 3) behind the path that is fed, on the CPU."""
    paths = fn.external_source(name="path", batch=True)
    return fn.decoders.image(fn.io.file.read(paths, dont_use_mmap=True), device="cpu")


def read(paths, decoder, height, width):
    """Images (height, width, 3), uint8."""
    files = fn.io.file.read(paths, dont_use_mmap=True)  # a mapped file that shrinks would kill the process
    images = fn.decoders.image(files, adjust_orientation=True, **decoder)  # as data.pixels does
    shape = fn.peek_image_shape(files, adjust_orientation=True)
    if shape[0] != height or shape[1] != width:
        images = fn.resize(images, size=[height, width], dtype=types.UINT8)
    return images


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
    operator1,
    operator2,
    operator3,
    window,
):
    """One view (size, size, 3), float32 in 0-255. The crop is first: a resize alone reads beyond its box."""
    x = fn.slice(images, rel_start=start, rel_shape=extent, axes=(0, 1))
    x = fn.resize(x, size=sized, dtype=types.FLOAT)
    if turned:
        x = fn.transpose(x, perm=[1, 0, 2], transpose_layout=False)
    if jittered:
        x = jitter(x, operator1, factor1)
        x = jitter(x, operator2, factor2)
        x = jitter(x, operator3, factor3)
    if sigma > 0:
        x = fn.gaussian_blur(x, sigma=sigma, window_size=window)
    return x


def jitter(x, operator, factor):
    """x <- factor x + (1 - factor) reference, which is black, the mean grey or the grey image."""
    if operator == BRIGHTNESS:
        x = x * factor
    elif operator == CONTRAST:
        x = x * factor + (1 - factor) * fn.reductions.mean(fn.coord_transform(x, M=GREY))
    else:
        x = x * factor + (1 - factor) * fn.coord_transform(x, M=GREY)
    return math.min(math.max(x, 0.0), 255.0)

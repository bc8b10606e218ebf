"""Decoded pixels: every file once into one uint8 array, in memory or, when large, memory-mapped on disk."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data.tables import DataError

IN_MEMORY = 4 << 30  # bytes; a larger set is decoded to disk, where it outlives the run and ranks share it


def common_size(checked: pd.DataFrame) -> tuple[int, int]:
    """(height, width) that most files have, from the columns of `check_files`."""
    return tuple(int(v) for v in checked.value_counts(["height", "width"]).index[0])


def decode(file: Path, height: int, width: int) -> np.ndarray:
    """RGB pixels (3, height, width) of one file; an image of another size is scaled to cover it and cut at the centre."""
    with Image.open(file) as image:
        image = image.convert("RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)


def load_pixels(
    root: Path,
    files: np.ndarray,
    height: int,
    width: int,
    *,
    cache: Path,
    workers: int = 2,
    stamp: str = "",
    in_memory: int = IN_MEMORY,
) -> torch.Tensor:
    """uint8 pixels (n, 3, height, width) of files (n,) below root.

    More than `in_memory` bytes go to a file in `cache`, which a later call with the same files and `stamp` (anything
    that changes with their contents) only maps. It is built under a temporary name: a killed build leaves nothing usable.
    """
    shape = (len(files), 3, height, width)
    size = int(np.prod(shape))
    if size <= in_memory:
        pixels = np.empty(shape, np.uint8)
        decode_into(pixels, root, files, workers)
        return torch.from_numpy(pixels)
    key = hashlib.sha256("\0".join([str(root.resolve()), str(shape), stamp, *files]).encode()).hexdigest()[
        :16
    ]
    target = cache / f"pixels-{key}.u8"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        free = os.statvfs(cache).f_bavail * os.statvfs(cache).f_frsize
        if free < size:
            raise DataError(
                f"{cache}: {free / 1e9:.1f} GB free, but the decoded pixels need {size / 1e9:.1f} GB"
            )
        partial = target.with_suffix(f".{os.getpid()}")
        try:
            decode_into(np.memmap(partial, np.uint8, "w+", shape=shape), root, files, workers)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return torch.from_numpy(
        np.memmap(target, np.uint8, "c", shape=shape)
    )  # copy-on-write: torch wants it writable


def decode_into(pixels: np.ndarray, root: Path, files: np.ndarray, workers: int) -> None:
    def one(i):
        pixels[i] = decode(root / files[i], *pixels.shape[2:])

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for _ in tqdm(
            pool.map(one, range(len(files))), "decode", len(files), unit="file", disable=None, leave=False
        ):
            pass


def channel_statistics(pixels: torch.Tensor, at_most: int = 20_000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels of at most that many evenly spaced images, range 0-1."""
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for part in pixels[:: -(-len(pixels) // at_most)].split(512):
        x = part.to(torch.float64) / 255
        total, squares = total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3))
        count += x.numel() // 3
    mean = total / count
    return [round(v, 4) for v in mean.tolist()], [
        round(v, 4) for v in (squares / count - mean**2).sqrt().tolist()
    ]

"""Scenes: large pictures of any depth and number of bands, read by windows and brought to 8-bit RGB.

    scene = open_scene(Path("scene.tif"))
    look = choose_look(scene, bands=[4, 3, 2], scale=read_scale("3558"))
    pixels, holds = look.read(0, 0, 512, 512)  # uint8 (3, 512, 512), and where they hold data

Pixels hold no data where the opacity band is 0 (unless it is chosen), where all chosen bands have the file's
nodata value or all are 0, and where one is not finite; a single band that is 0 may be dark water. GeoTIFFs
are read by `data.geotiff`, a window at a time, so that a scene may be larger than memory; other formats are
decoded whole, by the one decoder (`data.pixels`).
"""

import argparse
import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import DataError, memory
from data.geotiff import PLACED, Place, Tiff, has_mask, is_tiff
from data.pixels import orientation_of, picture, upright
from data.tiff import TIE_POINT

SAMPLE, BLOCKS = 512, 8  # values are judged from blocks of that side, this many down and across at most
LEAST = 0.5  # share of a patch that must hold data
WORLD_FILES = (".tfw", ".tifw", ".pgw", ".pngw", ".jgw", ".jpgw", ".bpw", ".wld")  # of any picture
BLACK = 510  # of VALUE: less is rounded to 0
WHITE = 10  # times VALUE: far brighter than clouds, which reach five times
FAR = 1.0  # a scene is far from training where a band's mean is that many training deviations away …
STRETCH = 3.0  # … or its deviation is that many times larger or smaller


class Scene(NamedTuple):
    """A large picture, not yet decoded if it is a TIFF."""

    file: Path
    height: int
    width: int
    bands: int  # the opacity band counts
    dtype: np.dtype
    alpha: int | None  # which band is opacity
    nodata: float | None
    place: Place | None
    source: "Tiff | np.ndarray"  # (bands, H, W) where it is decoded

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(bands, height, width) of a window in the scene's own values."""
        if isinstance(self.source, Tiff):
            return self.source.read(top, left, height, width)
        return self.source[:, top : top + height, left : left + width]

    def blocks(self) -> list[tuple[int, int, int, int]]:
        """(top, left, height, width) of evenly spread blocks to judge values by; all of a small scene."""
        tops, lefts = (spread(length) for length in (self.height, self.width))
        return [
            (top, left, min(SAMPLE, self.height - top), min(SAMPLE, self.width - left))
            for top in tops
            for left in lefts
        ]


class Scale(NamedTuple):
    """What --scale asks for: values `low` to `high` become 0 to 255; `percent`: they are percentiles of
    each band."""

    low: float
    high: float
    percent: bool


class Look(NamedTuple):
    """How a scene's values become uint8 RGB."""

    scene: Scene
    bands: tuple[int, int, int]  # from 0
    low: np.ndarray | None  # (3,) the values that become 0 and 255; None: as they are
    high: np.ndarray | None

    def values(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(values (3, h, w) in the scene's type, where they hold data (h, w) bool) of a window."""
        window = self.scene.read(top, left, height, width)
        chosen = window[list(self.bands)]
        holds = (chosen != 0).any(0)
        if chosen.dtype.kind == "f":
            holds &= np.isfinite(chosen).all(0)
        if self.scene.nodata is not None:
            holds &= (chosen != self.scene.nodata).any(0)
        if self.scene.alpha is not None:
            holds &= window[self.scene.alpha] != 0
        return chosen, holds

    def read(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 RGB (3, h, w), where it holds data (h, w) bool) of a window; 0 where it holds none."""
        values, holds = self.values(top, left, height, width)
        if self.low is not None:
            low, high = (ends.astype(np.float32)[:, None, None] for ends in (self.low, self.high))
            shares = (np.where(holds, values, low).astype(np.float32) - low) / (high - low)
            values = np.rint(255 * shares.clip(0, 1))
        return np.where(holds, values, 0).astype(np.uint8), holds

    def looked_at(self, read: Callable | None = None) -> np.ndarray:
        """(3, n) values that hold data, from blocks all over the scene; a scene of voids may have none.

        `read` is the look's `values`, the default, or its `read`, which gives what they become.
        """
        parts = []
        for block in self.scene.blocks():
            values, holds = (read or self.values)(*block)
            parts.append(values[:, holds])
        return np.concatenate(parts, 1)

    def sample(self, read: Callable | None = None) -> np.ndarray:
        """`looked_at`; DataError where that is nothing."""
        sample = self.looked_at(read)
        if not sample.size:
            raise DataError(f"{self.scene.file}: holds no data: all looked at is transparent, nodata or zero")
        return sample


def spread(length: int) -> list[int]:
    """Where blocks of SAMPLE begin: all of them, or BLOCKS evenly spread ones."""
    starts = np.arange(0, length, SAMPLE)
    if len(starts) > BLOCKS:
        starts = starts[np.linspace(0, len(starts) - 1, BLOCKS).round().astype(int)]
    return starts.tolist()


# Opening


def open_scene(file: Path) -> Scene:
    """A TIFF of any depth, without its pixels, or another picture, decoded.

    DataError names the file and what it is where it cannot be read.
    """
    if file.is_dir():
        raise DataError(f"{file}: is a folder: give the scenes in it")
    try:
        tiff = Tiff(file) if is_tiff(file) else None
    except OSError as error:
        raise DataError(f"{file}: not a readable image ({error})") from None
    except DataError:
        if has_mask(file) or is_placed(file):  # a picture has neither
            raise
        with contextlib.suppress(DataError):
            return open_picture(file)  # 8-bit with a colour table, turned, …
        raise
    if tiff is None:
        return open_picture(file)
    tiff.refuse_masks()
    tiff.refuse_pages()
    tiff.refuse_large_chunks()
    size = (tiff.height, tiff.width, tiff.bands)
    return Scene(file, *size, tiff.dtype, tiff.alpha(), tiff.nodata(), tiff.place(), tiff)


def is_placed(file: Path) -> bool:
    """Whether a TIFF says where it lies or which value means no data."""
    with contextlib.suppress(Exception), Image.open(file) as image:  # whatever damaged bytes lead to
        return not PLACED.isdisjoint(getattr(image, "tag_v2", {}))
    return False


def unread_place(scene: Scene) -> str | None:
    """Where a scene lies as this room does not read it, and what to do; None where nothing is lost."""
    file, placed = scene.file, f"{scene.file.stem}-placed.tif"
    beside = file.with_name(f"{file.name}.aux.xml")  # GDAL's, of what the format has no room for
    told = beside.read_text(errors="replace") if beside.is_file() else ""
    if scene.nodata is None and "<NoDataValue" in told:
        return f"{file}: its nodata value, in {beside.name}, is not read: gdal_translate {file} {placed}"
    if scene.place is not None:
        return None
    if "<GeoTransform" in told:
        return f"{file}: has no place: that in {beside.name} is not read: gdal_translate {file} {placed}"
    if isinstance(scene.source, Tiff) and len(scene.source.tags.get(TIE_POINT, ())) > 6:  # more than one
        return f"{file}: has no place: its ground control points are not read: gdalwarp {file} {placed}"
    if world := world_file(file):
        command = f"gdal_translate -a_srs EPSG:NUMBER {file} {placed}"
        return f"{file}: has no place: its world file {world.name} is not read: {command}"
    return None


def world_file(file: Path) -> Path | None:
    """NAME.tfw or NAME.tif.tfw beside NAME.tif."""
    ends = (*WORLD_FILES, *map(str.upper, WORLD_FILES))
    files = [file.with_name(name + end) for name in (file.stem, file.name) for end in ends]
    return next((own for own in files if own.exists()), None)


def open_picture(file: Path) -> Scene:
    """A picture that is decoded whole, with its opacity if it has any."""
    refuse_larger_than_memory(file)
    try:
        pixels = picture(file.read_bytes(), largest=None)
    except DataError as error:
        raise DataError(f"{file}: not a readable image ({error})") from None
    opacity = opacity_of(file)
    if opacity is not None:
        pixels = np.concatenate([pixels, opacity])
    bands, height, width = pixels.shape
    return Scene(file, height, width, bands, pixels.dtype, 3 if bands == 4 else None, None, None, pixels)


def refuse_larger_than_memory(file: Path) -> None:
    """DataError, with the command that stores it in tiles, for a picture too large to decode whole."""
    try:
        with Image.open(file) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError):  # the decoder says what is wrong
        return
    if 8 * width * height > memory() // 2:  # decoded twice, with its opacity
        raise DataError(
            f"{file}: {width} x {height} px are too many to decode at once: "
            f"gdal_translate -co TILED=YES -co COMPRESS=DEFLATE {file} {file.stem}.tif"
        )


def opacity_of(file: Path) -> np.ndarray | None:
    """uint8 (1, H, W), upright as the pixels are; None of a picture that has no transparency."""
    with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(file) as image:
        if "A" in image.getbands() or "transparency" in image.info:
            opacity = np.asarray(image.convert("RGBA").getchannel("A"))
            return upright(opacity[None], orientation_of(image))
    return None


def read_scale(text: str) -> Scale:
    """argparse's type of --scale: `3558`, or percentiles, `2-98%`."""
    percentiles = re.fullmatch(r"([\d.]+)-([\d.]+)%", text)
    try:
        low, high = map(float, percentiles.groups()) if percentiles else (0.0, float(text))
    except ValueError:
        low, high = math.nan, math.nan
    if not low < high < math.inf or (percentiles and high > 100):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither the value that becomes 255, such as 3558, nor percentiles such as 2-98%"
        )
    return Scale(low, high, bool(percentiles))


def choose_look(scene: Scene, bands: list[int] | None, scale: Scale | None) -> Look:
    """Which bands are R, G, B (`bands` count from 1), and which of their values become 0 and 255.

    DataError where that has to be said: more or fewer bands than three, or values that are no 8-bit ones.
    """
    if is_named_data(scene, bands):
        scene = scene._replace(alpha=None)
    look = Look(scene, choose_bands(scene, bands, scale), None, None)
    if scale is None:
        if scene.dtype != np.uint8:
            raise DataError(describe(look, bands))
        return look
    if not scale.percent:
        refuse_misfit(look, scale)
        return look._replace(low=np.full(3, scale.low), high=np.full(3, scale.high))
    low, high = np.percentile(look.sample().astype(np.float64), [scale.low, scale.high], axis=1)
    return look._replace(low=low, high=np.maximum(high, low + 1e-6 * np.maximum(1, np.abs(low))))


def refuse_misfit(look: Look, scale: Scale) -> None:
    """DataError where --scale VALUE would make all of a scene black or white: it is of other units."""
    scene, told = look.scene, f"--scale {scale.high:g}"
    if scene.dtype == np.uint8 and scale.high > 255:
        raise DataError(f"{scene.file}: its values are 8-bit, which {told} makes dark: leave it out")
    values = look.looked_at()
    if not values.size:
        return
    least, most = float(values.min()), float(values.max())
    if most < scale.high / BLACK or least > scale.high * WHITE:
        raise DataError(
            f"{scene.file}: has values {least:g} to {most:g}, which {told} makes "
            f"{'black' if most < scale.high else 'white'}: give the value that becomes 255, or --scale 2-98%"
        )


def is_named_data(scene: Scene, bands: list[int] | None) -> bool:
    """Whether the opacity band of a TIFF is among those asked for: GDAL marks the fourth of four 8-bit bands
    as opacity, whatever it holds."""
    return scene.alpha is not None and isinstance(scene.source, Tiff) and scene.alpha + 1 in (bands or ())


def choose_bands(scene: Scene, bands: list[int] | None, scale: Scale | None) -> tuple[int, int, int]:
    """Red, green and blue, counted from 0; `bands` counts from 1. DataError where the flags do not fit the
    scene."""
    if bands is None:
        colours = [band for band in range(scene.bands) if band != scene.alpha]
        if len(colours) == 3:
            return tuple(colours)
        if len(colours) == 1:
            return (colours[0],) * 3  # grey, as in training
        raise DataError(describe(Look(scene, (0, 0, 0), None, None), bands, scale))
    if max(bands) > scene.bands:
        raise DataError(
            f"{scene.file}: --bands {' '.join(map(str, bands))}: it has {scene.bands} band"
            f"{'s' if scene.bands > 1 else ''} of {scene.dtype}"
        )
    if scene.alpha is not None and scene.alpha + 1 in bands:
        raise DataError(
            f"{scene.file}: --bands {' '.join(map(str, bands))}: band {scene.alpha + 1} is opacity"
        )
    return tuple(band - 1 for band in bands)


def describe(look: Look, bands: list[int] | None, scale: Scale | None = None) -> str:
    """What a scene holds, and the flags that it needs."""
    scene = look.scene
    values = look.sample()
    several = "s" if scene.bands > 1 else ""
    kind = f"{scene.bands} band{several} of {scene.dtype}"
    said = f"{scene.file}: has {kind}, values {values.min():g} to {values.max():g}"
    needs = []
    if bands is None and scene.bands - (scene.alpha is not None) not in (1, 3):
        needs.append("--bands R G B (numbers from 1, such as --bands 4 3 2)")
    if scale is None and scene.dtype != np.uint8:
        needs.append("--scale VALUE (what becomes 255; 3558 in Sentinel2GlobalLULC) or --scale 2-98%")
    return f"{said}; a model takes three bands of 0 to 255: add {' and '.join(needs)}"


# How far a scene is from training


class Values(NamedTuple):
    """Mean and standard deviation of each band, range 0-1."""

    mean: np.ndarray  # (3,)
    std: np.ndarray

    def __str__(self) -> str:
        means, deviations = (" ".join(f"{v:.3f}" for v in part) for part in self)
        return f"mean {means}, std {deviations}"


def values_of(look: Look) -> Values:
    """Of what a model is to see of the scene. DataError if it holds no data."""
    pixels = look.sample(look.read)
    return Values(pixels.mean(1) / 255, pixels.std(1) / 255)


def far(found: Values, learned: Values) -> bool:
    """The scene is unlike what a model learned from: a wrong --scale, other bands, another sensor."""
    ratio = np.maximum(found.std, 1e-6) / np.maximum(learned.std, 1e-6)
    apart = np.abs(found.mean - learned.mean) > FAR * learned.std
    return bool((apart | (ratio > STRETCH) | (ratio < 1 / STRETCH)).any())


# Patches


class Grid(NamedTuple):
    """Patches of height x width px, a stride apart."""

    tops: list[int]
    lefts: list[int]
    height: int
    width: int
    stride: int

    def shape(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return len(self.tops), len(self.lefts)

    def map_place(self, place: Place) -> Place:
        """Of a map with a pixel a patch: pixels of a stride x stride, the centre of each at its patch's
        centre."""
        corner = ((self.width - self.stride) / 2, (self.height - self.stride) / 2)
        return place.grid(self.lefts[0] + corner[0], self.tops[0] + corner[1], self.stride)


def grid_of(scene: Scene, tile: tuple[int, int], stride: int, border: bool) -> Grid:
    """Patches all over a scene that is at least as large as one. `border`: what is left at the right and
    the bottom gets a last column and row of patches, which end there and lie nearer than a stride to the
    ones before."""
    sizes = ((scene.height, tile[0]), (scene.width, tile[1]))
    tops, lefts = (places(length, side, stride, border) for length, side in sizes)
    return Grid(tops, lefts, *tile, stride)


def places(length: int, side: int, stride: int, border: bool = True) -> list[int]:
    """Where patches begin along an axis."""
    starts = list(range(0, length - side + 1, stride))
    rest = length - side
    return [*starts, rest] if border and starts[-1] != rest else starts


def filled_shares(
    holds: np.ndarray, tops: list[int], lefts: list[int], height: int, width: int
) -> np.ndarray:
    """(rows, columns) share of each patch that holds data. holds (H, W) bool."""
    sums = np.zeros((holds.shape[0] + 1, holds.shape[1] + 1), np.int64)
    sums[1:, 1:] = holds.cumsum(0, dtype=np.int64).cumsum(1)
    top, left = np.array(tops)[:, None], np.array(lefts)[None]
    bottom, right = top + height, left + width
    counts = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return counts / (height * width)

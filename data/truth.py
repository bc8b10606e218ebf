"""The true classes of a scene, `predict.py --truth`: read from a picture, and as shares of patches."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import DataError
from data.geomaps import NO_CLASS
from data.geotiff import Place, first_directory, is_tiff, number_in, place_of
from data.pixels import orientation_of
from data.scenes import LEAST, Grid, filled_shares
from data.tiff import GDAL_NODATA

FROM_ONE = "subtract 1 (gdal_calc.py --calc A-1)"  # where classes are numbered from 1


class Truth(NamedTuple):
    """The true classes of a scene."""

    numbers: np.ndarray  # (H, W), from 0
    known: np.ndarray  # (H, W) bool; the others are void
    place: Place | None = None


def read_class_map(file: Path, classes: list[str]) -> Truth:
    """Class numbers from 0; void is the file's nodata value, and 255 where there is no such class.

    DataError where the file is none, or its numbers may be others than those of the model's classes.
    """
    try:
        place = place_of(first_directory(file)[1]) if is_tiff(file) else None
        with Image.open(file) as image:
            turned = orientation_of(image) != 1
            numbers = np.asarray(image)
            nodata = number_in(getattr(image, "tag_v2", {}).get(GDAL_NODATA, ""))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file}: not a readable image ({error})") from None
    if turned:
        raise DataError(f"--truth {file}: its orientation tag turns it: write its rows from the top down")
    if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
        raise DataError(f"--truth {file}: is no picture of class numbers (one channel of integers)")
    count = len(classes)
    if nodata in range(count):
        raise DataError(
            f"--truth {file}: its nodata value is {nodata:g}, which is the number of {classes[int(nodata)]}: "
            f"where its classes begin at 1, {FROM_ONE}; else take the value away: gdal_edit.py -unsetnodata"
        )
    known = np.ones(numbers.shape, bool) if nodata is None else numbers != nodata
    if count <= NO_CLASS:
        known &= numbers != NO_CLASS
    if not known.any():
        raise DataError(f"--truth {file}: all of it is void")
    refuse_other_classes(file, numbers[known], count)
    say_truth(file, numbers, known, classes)
    return Truth(numbers, known, place)


def refuse_other_classes(file: Path, numbers: np.ndarray, count: int) -> None:
    """DataError unless the known numbers (n,) lie in 0 to count - 1."""
    odd = [n for n in (numbers.min(), numbers.max()) if not 0 <= n < count]
    if odd:
        hint = f"; where its classes begin at 1, {FROM_ONE}" if odd == [count] else ""
        raise DataError(f"--truth {file}: holds class {odd[0]}, the model knows 0 to {count - 1}{hint}")


def say_truth(file: Path, numbers: np.ndarray, known: np.ndarray, classes: list[str]) -> None:
    """Which class is which number, and what is left out."""
    said = f"{file}: its numbers are taken from 0, {classes[0]}, to {len(classes) - 1}, {classes[-1]}"
    if numbers[known].min() > 0:
        said += f" (none is 0: where its classes begin at 1, {FROM_ONE})"
    if not known.all():
        said += f"; {(~known).sum()} void pixels are left out"
    print(said)


def true_shares(truth: Truth, classes: int, grid: Grid) -> np.ndarray:
    """(rows, columns, K) fractions of the classes in what is known of the patches; nan where that is less
    than half."""
    corners = (grid.tops, grid.lefts, grid.height, grid.width)
    known = filled_shares(truth.known, *corners)
    shares = np.zeros((*grid.shape(), classes), np.float32)
    for k in range(classes):
        shares[..., k] = filled_shares(truth.known & (truth.numbers == k), *corners)
    held = known >= LEAST
    shares[held] /= known[held][:, None]
    shares[~held] = np.nan
    return shares

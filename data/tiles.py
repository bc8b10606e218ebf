"""Patches out of scenes, as 8-bit pictures to pretrain on or to label.

    python -m data.tiles scene.tif --size 64 --stride 64 --out patches
    python -m data.tiles s2.tif --bands 4 3 2 --scale 3558 --out patches
    python -m data.tiles north.tif south.tif --size 224 --stride 224 --out patches

Every whole patch becomes a PNG, SCENE_r0000_c0064_(LAT,LON).png: the row and column of its first pixel,
and the latitude and longitude of its centre; x and y, in units of the coordinate system, where that is no
geographic one; neither where the scene has no place on Earth. Patches with data in less than half of their
area are left out. OUT appears whole or not at all: a folder that holds anything is refused.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import common
from common import DataError
from data.scenes import (
    LEAST,
    Grid,
    Look,
    choose_look,
    filled_shares,
    grid_of,
    open_scene,
    read_scale,
    unread_place,
)


class Patch(NamedTuple):
    """A patch of a scene that holds data."""

    row: int  # of its first pixel
    column: int
    pixels: np.ndarray  # uint8 (3, size, size)


def build_parser() -> common.Parser:
    """The flags of `python -m data.tiles`."""
    parser = common.Parser(__doc__, usage="%(prog)s SCENES --out FOLDER [flags]")
    parser.prog = "python -m data.tiles"
    parser.add_argument("scenes", nargs="+", type=Path, help="scene files")
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    parser.add_argument("--size", type=common.number(int, 8), default=64, help="side of a patch, pixels")
    parser.add_argument(
        "--stride", type=common.number(int, 1), help="from patch to patch, pixels; --size if left out"
    )
    parser.add_argument(
        "--bands",
        nargs=3,
        type=common.number(int, 1),
        metavar=("R", "G", "B"),
        help="of a scene with more than three, from 1",
    )
    parser.add_argument(
        "--scale",
        type=read_scale,
        metavar="VALUE",
        help="of scenes that are not 8-bit: the value that becomes 255, or percentiles of each band, 2-98%%",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write the patches of the scenes that the command line names."""
    args = build_parser().parse_args(argv)
    stride = args.stride or args.size
    common.refuse_filled(args.out)
    files = list({file.resolve(): file for file in args.scenes}.values())
    looks, grids = [], []
    for file in files:
        look = choose_look(open_scene(file), args.bands, args.scale)
        grids.append(grid_in(look, args.size, stride))
        if note := unread_place(look.scene):
            print(f"warning: {note}", file=sys.stderr)
        looks.append(closed(look))
    total = sum(len(grid.tops) * len(grid.lefts) for grid in grids)

    common.exit_on_signals(lambda: f"nothing is left of {args.out}")
    with common.new_folder(args.out) as part, tqdm(total=total, unit="patch", disable=None) as bar:
        written = sum(
            write_patches(part, name, opened(look), grid, bar)
            for name, look, grid in zip(names_of(files), looks, grids)
        )
        if not written:
            raise DataError(f"{files[0]}: none of {total} patches has data in half of its area")
    print(f"{written} patches of {args.size} px in {args.out}, {total - written} left out for lack of data")


def closed(look: Look) -> Look:
    """The look without what was read of its scene: many scenes together may be larger than memory."""
    return look._replace(scene=look.scene._replace(source=None))


def opened(look: Look) -> Look:
    """A closed look, with its scene opened again."""
    return look._replace(scene=look.scene._replace(source=open_scene(look.scene.file).source))


def grid_in(look: Look, size: int, stride: int) -> Grid:
    """The whole patches of a scene, in pixels; DataError where it holds none."""
    scene = look.scene
    if min(scene.height, scene.width) < size:
        raise DataError(
            f"{scene.file}: {scene.width} x {scene.height} px hold no patch of {size} x {size} px"
        )
    return grid_of(scene, (size, size), stride, border=False)


def names_of(files: list[Path]) -> list[str]:
    """A name for each scene, no two alike, none hidden: its file's, with a number where that is taken."""
    taken: set[str] = set()
    return [common.untaken(file.stem.lstrip(".") or "scene", taken) for file in files]


def write_patches(folder: Path, name: str, look: Look, grid: Grid, bar: tqdm) -> int:
    """How many patches of a scene were written."""
    written = 0
    for patch in patches_of(look, grid, bar):
        row, column, pixels = patch
        place = place_of(look, row + grid.height / 2, column + grid.width / 2)
        file = folder / f"{name}_r{row:04d}_c{column:04d}{place}.png"
        Image.fromarray(pixels.transpose(1, 2, 0)).save(file)
        written += 1
    return written


def patches_of(look: Look, grid: Grid, bar: tqdm) -> Iterator[Patch]:
    """The patches that hold data, row by row; a row of them is read at a time."""
    for top in grid.tops:
        pixels, holds = look.read(top, 0, grid.height, look.scene.width)
        filled = filled_shares(holds, [0], grid.lefts, grid.height, grid.width)[0] >= LEAST
        for left in np.array(grid.lefts)[filled].tolist():
            yield Patch(top, left, np.ascontiguousarray(pixels[:, :, left : left + grid.width]))
        bar.update(len(grid.lefts))


def place_of(look: Look, row: float, column: float) -> str:
    """`_(latitude,longitude)` of a point in pixels, or `_(x=…,y=…)`, which are no degrees; empty without
    georeference."""
    place = look.scene.place
    if place is None:
        return ""
    x, y = place.at(column, row)
    return f"_({y:+.10f},{x:+.10f})" if place.geographic else f"_(x={x:.2f},y={y:.2f})"


if __name__ == "__main__":
    with common.one_line_errors():
        main()

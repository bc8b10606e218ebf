"""Classes or land-cover fractions of new images by a model of transfer.py, and maps of large scenes.

    python predict.py runs/transfer/model-fraction-land-barlow.pth images/*.jpg --out predictions.csv
    python predict.py runs/transfer/model-fraction-land-barlow.pth scene.tif --stride 32 --out map.tif
    python predict.py runs/transfer/model-fraction-land-barlow.pth scene.tif --dense --stride 8 --out map.tif
    python predict.py runs/transfer/model-fraction-land-barlow.pth s2.tif --bands 4 3 2 --scale 3558
    python predict.py runs/transfer/model-fraction-land-barlow.pth scene.png --truth classes.png

The model is one of `transfer.py --save-model`. An image gives a row of a CSV. A picture more than twice as
long or as wide as the images the model learned from is a scene: it is cut into patches of their size, and
what --out is called says what becomes of them:

    NAME.csv   a row a patch: its place in pixels, its centre in the scene's coordinates, its class and
               fractions or probabilities; beside it NAME-map.png, a picture of the map
    NAME.tif   a float32 GeoTIFF, one band a class, one pixel a patch: a pixel is a stride wide and lies
               around its patch's centre, so that half of (patch - stride) is not mapped at each border, and
               up to a stride more at the right and the bottom; beside it NAME-classes.tif, the number of the
               largest class, in colours
    NAME.png   the scene, the truth if it is known, and the largest class side by side

Of several scenes each has its own NAME-SCENE. A picture that cannot be read does not cost the others: it is
listed, and the exit code is 1.

Pixels hold no data where they are transparent, or have the file's nodata value or zero in all bands. A patch
with data in less than half of its area is left out (nan in NAME.tif, 255 in NAME-classes.tif); in the others
pixels without data are black to the model. A picture that is one patch keeps the colours below its
transparency, as in training.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common
from common import ConfigError, DataError


def build_parser() -> common.Parser:
    parser = common.Parser(__doc__, usage="%(prog)s MODEL IMAGES [flags]")
    parser.add_argument("model", help="model-TASK-DATA-INIT.pth of transfer.py --save-model")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument(
        "--out", default="predictions.csv", help="CSV, GeoTIFF (.tif) or picture (.png) to write"
    )
    parser.add_argument(
        "--stride",
        type=common.number(int, 1),
        help="of the patches of a scene, pixels; half a patch if left out",
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="one convolutional pass over a scene instead of one a patch: much faster where patches overlap, "
        "and an approximation: an RMSE 1 to 2 %% above (docs/results.md)",
    )
    parser.add_argument(
        "--bands",
        nargs=3,
        type=common.number(int, 1),
        metavar=("R", "G", "B"),
        help="of a scene with more than three, from 1, in the order the model learned",
    )
    parser.add_argument(
        "--scale",
        type=scale_of,
        metavar="VALUE",
        help="of scenes that are not 8-bit: the value that becomes 255, or percentiles of each band, 2-98%%",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        help="class map of the one scene: a picture of its size whose grey values are class numbers from 0; "
        "255 and a GeoTIFF's nodata value are void",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser


def scale_of(text: str) -> "Scale":
    """argparse type of --scale."""
    from data.scenes import read_scale

    return read_scale(text)


if __name__ == "__main__":  # torch takes seconds to import: --help and wrong flags do not wait for it
    with common.one_line_errors():
        build_parser().parse_args()
    common.interrupt_quietly()

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from data.folders import scan
from data.geomaps import NO_CLASS, write_class_map, write_geotiff
from data.pixels import scaled
from data.scenes import (
    LEAST,
    Grid,
    Look,
    Scale,
    Scene,
    Values,
    choose_look,
    far,
    filled_shares,
    grid_of,
    open_scene,
    unread_place,
    values_of,
)
from data.tables import notes_on_others
from data.truth import Truth, read_class_map, true_shares
from models import dense
from models.backbone import prepare
from models.probe import probabilities
from models.saved import Model, load_model
from plots.maps import Drawn, draw_classes, draw_map, palette

BATCH = 256  # patches a step
BAND = 1 << 24  # pixels of a scene that are read at once
OVERVIEW = 1000  # longest side of the scene in pictures, pixels
GEOTIFFS = (".tif", ".tiff")
PLACE_COLUMNS = ("file", "row", "column", "x", "y", "class")  # of the CSV, before the classes


class Job(NamedTuple):
    """What is to be done with each picture."""

    bands: list[int] | None
    scale: Scale | None
    stride: int
    dense: bool
    truth: Truth | None
    suffix: str  # of --out

    @property
    def tabled(self) -> bool:
        """Whether patches become rows of a CSV, and not pixels of a map alone."""
        return self.suffix not in (*GEOTIFFS, ".png")


class Mapped(NamedTuple):
    """A scene, its patches and what the model says of them."""

    look: Look
    grid: Grid
    shares: np.ndarray  # (rows, columns, K), nan where there are no data
    truth: np.ndarray | None  # the same of the true classes


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device, *_ = common.start_ranks(args.device)
    model = load_model(args.model, device)
    files = find_files(args.images)
    out = Path(args.out)
    targets = name_targets(out, files)
    written = [file for target in targets for file in files_of(target, model.classes)]
    refuse_overwriting(out, written, [*files, Path(args.model), *([args.truth] if args.truth else [])])
    if args.truth and len(files) > 1:
        raise DataError(f"--truth {args.truth}: is of one scene, not of {len(files)} images")
    truth = read_class_map(args.truth, model.classes) if args.truth else None
    stride = args.stride or max(1, min(model.tile) // 2)
    if stride > min(model.tile):
        raise ConfigError(f"--stride {stride} leaves gaps between patches of {min(model.tile)} px: lower it")
    job = Job(args.bands, args.scale, stride, args.dense, truth, out.suffix.lower())

    out.parent.mkdir(parents=True, exist_ok=True)
    tables, failed = [], []
    common.exit_on_signals(lambda: f"{len(tables)} of {len(files)} pictures are done")
    with tqdm(total=len(files), unit="patch", disable=None) as bar:
        try:
            for file, target in zip(files, targets):
                try:
                    tables.append(one_picture(file, target, model, job, bar))
                except DataError as error:
                    failed.append(str(error))
        finally:  # a signal or a full memory at the last picture does not cost the rows of the others
            if job.tabled and tables:
                write_rows(out, tables)
    report_failures(failed, len(files))


# Names


def find_files(images: list[str]) -> list[Path]:
    files = []
    for path in map(Path, images):
        if not path.is_dir():
            files.append(path)
            continue
        tree, _ = scan(path)
        files += tree.below()
        for note in notes_on_others(tree):
            print(f"note: {note}", file=sys.stderr)
    if not files:
        raise DataError(f"{images[0]}: holds no images")
    return list({file.absolute(): file for file in files}.values())  # one named twice is one


def name_targets(out: Path, files: list[Path]) -> list[Path]:
    """Where the map of each file goes if it is a scene: --out's name, and of several also the file's
    own."""
    in_pairs = out.suffix.lower() in GEOTIFFS
    end = out.suffix if in_pairs or out.suffix.lower() == ".png" else "-map.png"
    if len(files) == 1:
        return [out.with_name(out.stem + end)]
    stems = [file.stem.lower() for file in files]
    targets, taken = [], set()
    for file, stem in zip(files, stems):
        name = file.stem if stems.count(stem) == 1 else file.name.replace(".", "-")
        own = common.untaken(name, taken)
        while in_pairs and class_name(own).lower() in taken:
            own = common.untaken(name, taken)
        if in_pairs:
            taken.add(class_name(own).lower())
        targets.append(out.with_name(f"{out.stem}-{own}{end}"))
    return targets


def class_name(stem: str) -> str:
    """Of the map of the largest classes beside a GeoTIFF, without suffix."""
    return f"{stem}-classes"


def files_of(target: Path, classes: list[str]) -> list[Path]:
    """The map of a scene, and beside a GeoTIFF the map of its largest classes, which has room for 255."""
    if target.suffix.lower() not in GEOTIFFS or len(classes) > NO_CLASS:
        return [target]
    return [target, target.with_stem(class_name(target.stem))]


def refuse_overwriting(out: Path, written: list[Path], read: list[Path]) -> None:
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file in it, .csv, .tif or .png")
    for file in (out, *written):
        common.refuse_special(file, "--out")
    same = {file.resolve() for file in read} & {file.resolve() for file in (out, *written)}
    if same:
        raise ConfigError(f"--out {out} would overwrite {same.pop()}: choose another name or folder")
    if out.suffix.lower() not in ("", ".csv", *GEOTIFFS, ".png"):
        raise ConfigError(f"--out {out}: name a .csv, a .tif (GeoTIFF) or a .png")


# One picture


def one_picture(file: Path, target: Path, model: Model, job: Job, bar: tqdm) -> pd.DataFrame:
    """Rows of the CSV; of a scene also the map, in `target`. DataError if the file cannot be used."""
    scene = open_scene(file)
    look = choose_look(scene, job.bands, job.scale)
    large = is_large(scene, model.tile)
    refuse_other_scene(job.truth, scene, model.tile, large)
    if not large:
        return one_image(look, model, job, bar)
    if note := unread_place(scene):
        bar.write(f"warning: {note}", file=sys.stderr)
    compare_values(look, model, bar)
    grid = grid_of(scene, model.tile, job.stride, border=job.suffix not in GEOTIFFS)
    bar.total += len(grid.tops) * len(grid.lefts) - 1
    began = time.perf_counter()
    shares = by_windows(model, look, grid, bar) if job.dense else by_patches(model, look, grid, bar)
    seconds = time.perf_counter() - began
    if not np.isfinite(shares).any():
        height, width = model.tile
        raise DataError(f"{file}: no patch of {width} x {height} px has data in half of its area")
    truth = None if job.truth is None else true_shares(job.truth, len(model.classes), grid)
    mapped = Mapped(look, grid, shares, truth)
    write_map(target, mapped, model, job.suffix)
    say_map(target, mapped, model, seconds, bar)
    return rows_of(mapped, model.classes) if job.tabled else pd.DataFrame()


def is_large(scene: Scene, tile: tuple[int, int]) -> bool:
    """Whether it is a scene of many patches, and not one patch. DataError where it can be neither."""
    down, across = scene.height / tile[0], scene.width / tile[1]
    if max(down, across) <= 2:
        return False
    if min(down, across) < 1:
        raise DataError(
            f"{scene.file}: {scene.width} x {scene.height} px are too long for one patch of {tile[1]} x "
            f"{tile[0]} px, and too narrow for several"
        )
    return True


def refuse_other_scene(truth: Truth | None, scene: Scene, tile: tuple[int, int], large: bool) -> None:
    """DataError where --truth is the class map of another picture, or the picture is none of many patches."""
    if truth is None:
        return
    shape = truth.numbers.shape
    if not large or shape != (scene.height, scene.width):
        raise DataError(
            f"--truth: has shape {shape}, the picture {(scene.height, scene.width)}; it takes one "
            f"scene, more than twice as long or wide as {tile[1]} x {tile[0]} px, and a class map of its size"
        )
    if scene.place and truth.place and scene.place.differs(truth.place, *shape):
        raise DataError(
            f"--truth: lies elsewhere than {scene.file}, or in another coordinate system: "
            "gdalwarp it to the scene"
        )


def one_image(look: Look, model: Model, job: Job, bar: tqdm) -> pd.DataFrame:
    """The row of a picture that is one patch, scaled to the size of those the model learned from."""
    scene = look.scene
    if not job.tabled:
        raise DataError(
            f"{scene.file}: {scene.width} x {scene.height} px are no scene, which is more than twice "
            f"as long or wide as {model.tile[1]} x {model.tile[0]} px: name a CSV with --out"
        )
    _, holds = look.read(0, 0, scene.height, scene.width)
    if holds.mean() < LEAST:
        raise DataError(f"{scene.file}: less than half of it holds data")
    opaque = look._replace(scene=scene._replace(alpha=None, nodata=None))  # as patches are in training
    pixels, _ = opaque.read(0, 0, scene.height, scene.width)
    image = torch.from_numpy(np.ascontiguousarray(scaled(pixels, *model.tile)))
    shares = predict(model, image[None])
    bar.update()
    grid = Grid([0], [0], scene.height, scene.width, 1)
    return rows_of(Mapped(look, grid, shares[None], None), model.classes)


def compare_values(look: Look, model: Model, bar: tqdm) -> None:
    """Say how a scene's values differ from training, before nonsense is mapped."""
    found, learned = values_of(look), Values(np.array(model.mean), np.array(model.std))
    unlike = far(found, learned)
    if unlike or look.low is not None:
        bar.write(f"{look.scene.file}: {found}; the model learned from {learned}", file=sys.stdout)
    if unlike:
        warning = (
            f"warning: {look.scene.file}: its values are far from training (a mean by more than one standard "
            "deviation, or a deviation by a factor of three): the map may be wrong; check --scale and --bands"
        )
        bar.write(warning, file=sys.stderr)


# Patch by patch


def by_patches(model: Model, look: Look, grid: Grid, bar: tqdm) -> np.ndarray:
    """(rows, columns, K) shares of a scene's patches, each through the network; nan where there are no
    data."""
    shares = np.full((*grid.shape(), len(model.classes)), np.nan, np.float32)
    for first, last in bands_of(grid, look.scene.width):
        tops, begin = grid.tops[first:last], grid.tops[first]
        pixels, holds = look.read(begin, 0, tops[-1] + grid.height - begin, look.scene.width)
        corners = [top - begin for top in tops]
        filled = filled_shares(holds, corners, grid.lefts, grid.height, grid.width) >= LEAST
        bar.update(int((~filled).sum()))
        found = np.argwhere(filled)
        for start in range(0, len(found), BATCH):
            part = found[start : start + BATCH]
            tiles = [cut(pixels, corners[i], grid.lefts[j], grid) for i, j in part]
            shares[first + part[:, 0], part[:, 1]] = predict(model, torch.from_numpy(np.stack(tiles)))
            bar.update(len(part))
    return shares


def bands_of(grid: Grid, width: int) -> Iterator[tuple[int, int]]:
    """(first, last) rows of patches that are read together: about BAND pixels, at least one row."""
    first = 0
    while first < len(grid.tops):
        last = first + 1
        while last < len(grid.tops) and (grid.tops[last] + grid.height - grid.tops[first]) * width <= BAND:
            last += 1
        yield first, last
        first = last


def cut(pixels: np.ndarray, top: int, left: int, grid: Grid) -> np.ndarray:
    return pixels[:, top : top + grid.height, left : left + grid.width]


@torch.no_grad()
def predict(model: Model, tiles: torch.Tensor) -> np.ndarray:
    """(n, K) fractions or class probabilities of uint8 tiles (n, 3, H, W)."""
    images = prepare(tiles.to(model.device), model.size, model.mean, model.std)
    return probabilities(model.network(images).float(), model.loss).cpu().numpy()


# One pass over all


def by_windows(model: Model, look: Look, grid: Grid, bar: tqdm) -> np.ndarray:
    """As by_patches, by `models.dense`: of each window a patch takes the mean logits of the cells that it
    covers."""
    features = dense.FeatureMap(model.network[0])
    cell = dense.cell_size(features)
    if model.size <= cell:
        note = f"at {model.size} px a patch is one cell of the features, and the map lies between such cells"
        print(f"note: --dense: {note}: without --dense it is sharper", file=sys.stderr)
    scene = look.scene
    down = dense.windows_along(scene.height, grid.tops, grid.height, model.size, cell)
    across = dense.windows_along(scene.width, grid.lefts, grid.width, model.size, cell)
    shares = np.zeros((*grid.shape(), len(model.classes)), np.float32)
    weights, filled = np.zeros(grid.shape()), np.zeros(grid.shape())
    done = 0
    for i, top in enumerate(down.starts):
        pixels, holds = look.read(top, 0, down.side, scene.width)
        full = [j for j, left in enumerate(across.starts) if holds[:, left : left + across.side].any()]
        lefts = [across.starts[j] for j in full]
        for j, left, cells in zip(full, lefts, logits_of(model, features, pixels, lefts, across.side)):
            rows, columns = dense.used(down.pixels[i]), dense.used(across.pixels[j])
            y, x = down.pixels[i][rows], across.pixels[j][columns]
            filled[rows, columns] += y @ holds[:, left : left + across.side] @ x.T
            area = np.outer(y.sum(1), x.sum(1))
            weights[rows, columns] += area
            logits = dense.mean_logits(down.cells[i][rows], cells, across.cells[j][columns], area)
            shares[rows, columns] += area[..., None] * shares_of(logits, model.loss)
        ready = sum(start < top + down.side for start in grid.tops) * len(grid.lefts)
        bar.update(ready - done)
        done = ready
    held = filled >= LEAST - 1e-6  # sums of many small shares
    shares[held] /= weights[held][:, None]
    shares[~held] = np.nan
    return shares


def shares_of(logits: np.ndarray, loss: str) -> np.ndarray:
    """Logits (…, K) on the simplex."""
    flat = torch.from_numpy(np.ascontiguousarray(logits).reshape(-1, logits.shape[-1]))
    return probabilities(flat, loss).numpy().reshape(logits.shape)


def logits_of(
    model: Model, features: nn.Module, pixels: np.ndarray, lefts: list[int], side: int
) -> Iterator[np.ndarray]:
    """(rows, columns, K) logits of the cells of each window of a band of pixels (3, h, W)."""
    batch = max(1, dense.BATCH // model.size**2)
    for start in range(0, len(lefts), batch):
        windows = np.stack([pixels[:, :, left : left + side] for left in lefts[start : start + batch]])
        images = prepare(torch.from_numpy(windows).to(model.device), model.size, model.mean, model.std)
        yield from dense.cell_logits(features, model.network[1], images)


# What is written


def rows_of(mapped: Mapped, classes: list[str]) -> pd.DataFrame:
    """A row a patch with data: where it begins, its centre in the scene's coordinates, class and shares.

    The shares of a class that is called as another column stand in `NAME (share)`.
    """
    grid, scene = mapped.grid, mapped.look.scene
    i, j = np.nonzero(np.isfinite(mapped.shares).all(2))
    rows, columns = np.array(grid.tops)[i], np.array(grid.lefts)[j]
    shares = mapped.shares[i, j]
    table = {"file": str(scene.file), "row": rows, "column": columns}
    if scene.place:
        table["x"], table["y"] = scene.place.at(columns + grid.width / 2, rows + grid.height / 2)
    table["class"] = np.array(classes, object)[shares.argmax(1)]
    for name, share in zip(columns_of(classes), shares.T, strict=True):
        table[name] = [f"{value:.4f}" for value in share]
    return pd.DataFrame(table)


def columns_of(classes: list[str]) -> list[str]:
    """A column for each class, none called as another column or class."""
    columns = []
    for own in classes:
        name = own
        while name in PLACE_COLUMNS or name in columns or (name != own and name in classes):
            name += " (share)"
        columns.append(name)
    return columns


def write_map(target: Path, mapped: Mapped, model: Model, suffix: str) -> None:
    """The GeoTIFFs, or a picture."""
    if suffix in GEOTIFFS:
        write_geotiffs(files_of(target, model.classes), mapped, model.classes)
        return
    draw = draw_classes if suffix == ".png" else draw_map
    draw(target, drawn_of(mapped, model))


def write_geotiffs(files: list[Path], mapped: Mapped, classes: list[str]) -> None:
    """The shares, and where there is a second file the number of the largest class."""
    place = mapped.look.scene.place
    place = place and mapped.grid.map_place(place)
    write_geotiff(files[0], mapped.shares.transpose(2, 0, 1), classes, place)
    for file in files[1:]:
        held = np.isfinite(mapped.shares).all(2)
        numbers = np.where(held, np.nan_to_num(mapped.shares).argmax(2), NO_CLASS).astype(np.uint8)
        write_class_map(file, numbers, classes, palette(len(classes)), place)


def drawn_of(mapped: Mapped, model: Model) -> Drawn:
    grid, scene = mapped.grid, mapped.look.scene
    rows, columns = np.array(grid.tops) + grid.height / 2, np.array(grid.lefts) + grid.width / 2
    about = (mapped.shares, mapped.truth, model.classes, model.task)
    return Drawn(overview(mapped.look), scene.height, scene.width, rows, columns, *about)


def overview(look: Look) -> np.ndarray:
    """uint8 (h, w, 3): every n-th pixel of a scene, white where there are no data."""
    scene = look.scene
    thin = max(1, -(-max(scene.height, scene.width) // OVERVIEW))
    step = thin * max(1, BAND // (scene.width * thin))
    parts = []
    for top in range(0, scene.height, step):
        pixels, holds = look.read(top, 0, min(step, scene.height - top), scene.width)
        parts.append(np.where(holds, pixels, 255)[:, ::thin, ::thin])
    return np.concatenate(parts, 1).transpose(1, 2, 0)


def say_map(target: Path, mapped: Mapped, model: Model, seconds: float, bar: tqdm) -> None:
    grid, held = mapped.grid, np.isfinite(mapped.shares).all(2)
    empty = f", {(~held).sum()} left out for lack of data" if not held.all() else ""
    patches = f"{held.sum()} patches of {grid.width} x {grid.height} px{empty} in {seconds:.1f} s"
    files = " and ".join(map(str, files_of(target, model.classes)))
    bar.write(f"{mapped.look.scene.file}: {patches}, map in {files}", file=sys.stdout)
    if target.suffix.lower() in GEOTIFFS and len(model.classes) > NO_CLASS:
        why = f"{len(model.classes)} classes are more than the {NO_CLASS} that a colour table can hold"
        bar.write(f"{target}: no map of the largest classes beside it: {why}", file=sys.stdout)
    if mapped.truth is not None:
        held &= np.isfinite(mapped.truth).all(2)
        compared = compare(mapped.shares[held], mapped.truth[held], model.task)
        bar.write(f"against the truth: {compared}", file=sys.stdout)


def compare(found: np.ndarray, truth: np.ndarray, task: str) -> str:
    """How often the largest class is right, and for fractions how far shares (n, K) are off."""
    if not len(found):
        return "no patch has data and a known class in half of its area"
    largest = truth.argmax(1)
    right = (found.argmax(1) == largest).mean()
    said = f"the largest class is right in {right:.0%} of the patches"
    if task == "scene":
        usual = np.bincount(largest).max() / len(largest)
        return f"{said}, the most frequent one is in {usual:.0%}"
    rmse = np.sqrt(((found - truth) ** 2).mean(0)).mean()
    constant = truth.std(0).mean()
    return f"RMSE {rmse:.3f} (mean over the classes; of the best constant answer {constant:.3f}), {said}"


def write_rows(out: Path, tables: list[pd.DataFrame]) -> None:
    rows = pd.concat(tables, ignore_index=True)
    if "x" in rows:
        first = ["file", "row", "column", "x", "y"]
        rows = rows[first + [name for name in rows if name not in first]]
    common.write_csv(out, rows)
    print(f"{len(rows)} rows in {out}")


def report_failures(failed: list[str], pictures: int) -> None:
    """Exit code 1 where some pictures failed; if the only one did, the refusal of any bad input."""
    if len(failed) == pictures == 1:
        raise DataError(failed[0])
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {pictures} pictures failed", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    with common.one_line_errors():
        main()

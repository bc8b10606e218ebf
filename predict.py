"""Classes or land-cover fractions of new images by a model of `transfer.py --save-model`, and a map of a large scene.

    python predict.py runs/transfer/model-fraction-barlow.pth images/*.jpg --out predictions.csv
    python predict.py runs/transfer/model-fraction-barlow.pth scene.tif --stride 32 --out scene.csv
    python predict.py runs/transfer/model-fraction-barlow.pth scene.tif --truth classes.png   # and how far the map is off

An image gives one row of --out. A picture more than twice as large as the images the model learned from is a scene: it is
cut into patches of their size, and each patch gives a row with its place. Beside --out, a scene's map is NAME-map.png.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import nn
from tqdm import tqdm

import common
from common import ConfigError
from data.tables import DataError, images_below
from models.backbone import WeightsError, build_backbone, prepare
from models.probe import probabilities

BATCH, PANELS = 256, 10  # patches a step; classes drawn in a map, the largest ones
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#000000",
    "#999999",
    "#882255",
)


def flags() -> common.Parser:
    parser = common.Parser(__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="model-TASK-INIT.pth of transfer.py --save-model")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", default="predictions.csv", help="CSV to write")
    parser.add_argument(
        "--stride",
        type=common.number(int, 1),
        help="of the patches of a scene, pixels; half a patch if left out",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        help="class map of the one scene: a picture of its size whose grey values are class numbers",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    device, *_ = common.start_ranks(args.device)
    model, about = open_model(args.model, device)
    height, width = about["tile"]
    stride, out = args.stride or max(1, min(height, width) // 2), Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.MAX_IMAGE_PIXELS = None  # a scene is larger than what Pillow takes for an attack
    files = [
        file for path in map(Path, args.images) for file in (images_below(path) if path.is_dir() else [path])
    ]
    if not files:
        raise DataError(f"{args.images[0]}: holds no images")
    if args.truth and len(files) > 1:
        raise DataError(f"--truth {args.truth}: is of one scene, not of {len(files)} images")
    stems, rows = [file.stem for file in files], []
    maps = [
        out.with_name(stem + f"-{i}" * (stems.count(stem) > 1) + "-map.png") for i, stem in enumerate(stems)
    ]
    if same := {f.resolve() for f in (*files, args.truth or files[0], Path(args.model))} & {
        f.resolve() for f in (out, *maps)
    }:
        raise ConfigError(f"--out {out} would overwrite {same.pop()}: choose another name or folder")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name the CSV in it")
    class_map = args.truth and read_class_map(args.truth, len(about["classes"]))
    for i, file in enumerate(tqdm(files, unit="file", disable=None)):
        pixels = read_image(file)
        scene = pixels.shape[1] > 2 * height and pixels.shape[2] > 2 * width
        if class_map is not None and not (scene and class_map.shape == pixels.shape[1:]):
            raise DataError(
                f"--truth {args.truth}: has shape {class_map.shape}, the picture {tuple(pixels.shape[1:])}; it takes one scene, "
                f"more than twice {width} x {height} px, and a class map of the same size"
            )
        tops, lefts = (
            places(n, side, stride) if scene else [0] for n, side in zip(pixels.shape[1:], (height, width))
        )
        corners = [(top, left) for top in tops for left in lefts]
        tiles = [pixels[:, t : t + height, left : left + width] for t, left in corners] if scene else [pixels]
        shares = predict(model, about, tiles, device)
        rows += [
            {
                "file": str(file),
                "row": top,
                "column": left,
                "class": about["classes"][p.argmax()],
                **{name: f"{v:.4f}" for name, v in zip(about["classes"], p)},
            }
            for (top, left), p in zip(corners, shares)
        ]
        if scene:
            truth = (
                None
                if class_map is None
                else true_shares(class_map, len(about["classes"]), corners, (height, width))
            )
            grid = [None if s is None else s.reshape(len(tops), len(lefts), -1) for s in (shares, truth)]
            draw_map(maps[i], pixels, *grid, about["classes"], (height, width), tops, lefts)
            print(f"{file}: {len(shares)} patches of {width} x {height} px, map in {maps[i]}")
            if truth is not None:
                print(f"against {args.truth}: {compare(shares, truth)}")
    common.write_csv(out, rows)
    print(f"{len(rows)} rows in {out}")


def open_model(file: str, device: torch.device) -> tuple[nn.Module, dict]:
    try:
        about = torch.load(file, map_location="cpu", weights_only=True)
        backbone = build_backbone(about["arch"])
        model = nn.Sequential(backbone, nn.Linear(about["state"]["1.weight"].shape[1], len(about["classes"])))
        model.load_state_dict(about["state"])
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise WeightsError(
            f"{file}: not a model of transfer.py --save-model ({str(error).splitlines()[0][:100]})"
        ) from None
    return model.eval().to(device, memory_format=torch.channels_last), about


def read_image(file: Path) -> torch.Tensor:
    """uint8 (3, H, W)"""
    try:
        with Image.open(file) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file}: not a readable image ({error})") from None


def read_class_map(file: Path, classes: int) -> np.ndarray:
    """(H, W) class numbers."""
    try:
        with Image.open(file) as image:
            numbers = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file}: not a readable image ({error})") from None
    if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
        raise DataError(f"--truth {file}: is no picture of class numbers (one channel of integers)")
    if odd := [n for n in (numbers.min(), numbers.max()) if not 0 <= n < classes]:
        raise DataError(f"--truth {file}: holds class {odd[0]}, the model knows 0 to {classes - 1}")
    return numbers


def true_shares(
    class_map: np.ndarray, classes: int, corners: list[tuple[int, int]], tile: tuple[int, int]
) -> np.ndarray:
    """(n, K) fractions of the class map in the patches at `corners`."""
    height, width = tile
    windows = (class_map[top : top + height, left : left + width].ravel() for top, left in corners)
    return np.array([np.bincount(window, minlength=classes) for window in windows]) / (height * width)


def compare(found: np.ndarray, truth: np.ndarray) -> str:
    rmse, constant = np.sqrt(((found - truth) ** 2).mean(0)).mean(), truth.std(0).mean()
    right = (found.argmax(1) == truth.argmax(1)).mean()
    return (
        f"RMSE {rmse:.3f} (mean over the classes; of the best constant answer {constant:.3f}), "
        f"the largest class is right in {right:.0%} of the patches"
    )


def places(length: int, side: int, stride: int) -> list[int]:
    """Where patches begin; the last one ends at the border."""
    return sorted({*range(0, length - side + 1, stride), length - side})


@torch.no_grad()
def predict(model: nn.Module, about: dict, tiles: list[torch.Tensor], device: torch.device) -> np.ndarray:
    """(n, K) fractions or class probabilities of uint8 tiles (3, H, W) of one size."""
    found = []
    for start in range(0, len(tiles), BATCH):
        x = prepare(
            torch.stack(tiles[start : start + BATCH]).to(device), about["size"], about["mean"], about["std"]
        )
        found.append(probabilities(model(x).float(), about["loss"]).cpu())
    return torch.cat(found).numpy()


def draw_map(
    file: Path,
    pixels,
    found: np.ndarray,
    truth: np.ndarray | None,
    classes: list[str],
    tile,
    tops: list[int],
    lefts: list[int],
) -> None:
    """The scene, the class of the largest fraction with its legend, the same of the truth if it is known, and the fraction
    of each of the largest classes, on the grid of the patches' centres. found, truth (rows, columns, K)."""
    shown = np.argsort(-found.mean((0, 1)), kind="stable")[:PANELS]
    centres = [np.array(starts) + side / 2 for starts, side in zip((tops, lefts), tile)]
    y, x = (
        np.concatenate([[0], (c[1:] + c[:-1]) / 2, [n]]) for c, n in zip(centres, pixels.shape[1:])
    )  # edges of the cells
    aspect = min(max(pixels.shape[1] / pixels.shape[2], 0.3), 3)
    figure = Figure(figsize=(12, 8 * aspect + 1.5), layout="constrained")
    maps = {"largest fraction": found} | ({} if truth is None else {"largest fraction, truth": truth})
    axes = figure.subplots(-(-(1 + len(maps) + len(shown)) // 4), 4, squeeze=False)
    thin = max(1, max(pixels.shape) // 1500)
    axes[0, 0].imshow(
        pixels[:, ::thin, ::thin].permute(1, 2, 0), extent=(0, pixels.shape[2], pixels.shape[1], 0)
    )
    axes[0, 0].set_title("scene")
    for axis, (title, shares) in zip(axes.flat[1:], maps.items()):
        axis.pcolormesh(
            x, y, shares[..., shown].argmax(2), cmap=ListedColormap(COLOURS), vmin=0, vmax=PANELS - 1
        )
        axis.set_title(title)
    for axis, k in zip(axes.flat[1 + len(maps) :], shown):
        mesh = axis.pcolormesh(x, y, found[..., k], cmap="cividis", vmin=0, vmax=1)
        axis.set_title(f"{classes[k]}: {100 * found[..., k].mean():.1f} %")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], aspect="equal", xlim=(0, pixels.shape[2]), ylim=(pixels.shape[1], 0))
    for axis in axes.flat[1 + len(maps) + len(shown) :]:
        axis.set_axis_off()
    figure.colorbar(mesh, ax=axes, shrink=0.4, label="fraction of the patch")
    figure.legend(
        handles=[Patch(color=c, label=classes[k]) for c, k in zip(COLOURS, shown)],
        loc="outside lower center",
        ncols=5,
    )
    with common.replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=110)


if __name__ == "__main__":
    with common.one_line_errors():
        main()

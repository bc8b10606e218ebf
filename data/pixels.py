"""How a picture becomes pixels: the one decoder of all scripts, and the array that holds a decoded data set.

    read_picture(Path("tile.jpg"))      # uint8 (3, H, W), RGB, upright
    decode(Path("tile.jpg"), 224, 224)  # the same, scaled as a whole to 224 x 224

What is read: JPEG, PNG, TIFF, BMP and WebP of eight bits a band. Grey becomes three equal bands; palettes, CMYK and
YCbCr become RGB; 1-, 2- and 4-bit grey of PNG and BMP is spread over 0-255. Alpha is dropped and the colours stay as the
file stores them. The orientation that EXIF or a TIFF's tag names is applied. Colour profiles and gamma are ignored.

What is refused, as a number that is silently wrong is worse than no number: more than eight bits (Pillow keeps the high
byte of 16-bit RGB without a word), whole numbers with a sign, floats, two bands or more than three (four where the last
is not marked as alpha), alpha multiplied into the colours, Lab, TIFFs under eight bits, several pages or an animation,
and more than LARGEST pixels. Overviews and masks inside a TIFF, and the previews inside a JPEG, are no pages.

NVIDIA DALI, which decodes for `data.dali`, gives the same pixels for every file that is read here (tests/test_pixels.py).
"""

import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from tqdm import tqdm

from common import DataError
from data import tiff

FORMATS = ("PNG", "TIFF", "BMP", "WEBP")  # beside JPEG; what is inside decides, not the name
LARGEST = 178_956_970  # pixels: 512 MiB of RGB, the size beyond which Pillow suspects an attack
PNG_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> bands
COLOURS = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}  # in a TIFF
RGB, YCBCR = 2, 6
TIFF_BANDS = {0: 1, 1: 1, RGB: 3, 3: 1, 5: 4, YCBCR: 3}  # colours that are read -> bands they need
ALPHA = 2  # mark of an extra band that is not multiplied into the colours
JPEG_IN_TIFF = 7  # the compression under which YCbCr is read: libjpeg makes it RGB
ORIENTATION = tiff.ORIENTATION

Image.MAX_IMAGE_PIXELS = None  # LARGEST says what is too much, in one place
warnings.filterwarnings("ignore", module="PIL")  # of odd notes beside the pixels

IN_MEMORY = 4 << 30  # bytes; a larger set is decoded to disk, where it outlives the run


# One picture


def read_picture(file: Path, largest: int | None = LARGEST) -> np.ndarray:
    """RGB pixels uint8 (3, H, W) of one file at its own size, upright.

    DataError naming the file where the picture is damaged or refused (then with its bands and their type), or has more
    than `largest` pixels (None: no limit, for scenes). OSError where the file cannot be read.
    """
    data = Path(file).read_bytes()
    try:
        return picture(data, largest)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None


def decode(file: Path, height: int, width: int) -> np.ndarray:
    """RGB pixels uint8 (3, height, width) of one file; errors as in `read_picture`.

    A picture of another size is scaled as a whole (bilinear, antialiased, each axis by its own factor): nothing is cut
    off, so that fractions of its area keep their meaning. DALI's shares of an image's own sides do the same.
    """
    pixels = read_picture(file)
    if pixels.shape[1:] == (height, width):
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def picture(data: bytes, largest: int | None = LARGEST) -> np.ndarray:
    """RGB pixels uint8 (3, H, W) of a file's bytes. DataError that says only what is wrong, not where."""
    if not any(data):
        raise DataError("holds only zeros" if data else "empty (0 bytes)")
    read = _from_jpeg if data.startswith(b"\xff\xd8") else _from_other
    try:
        pixels, orientation = read(data, largest)
    except (DataError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"not a valid JPEG, PNG, TIFF, BMP or WebP file: begins with {data[:16]!r}") from None
    except Exception as error:  # Pillow's decoders raise many types on damage
        raise DataError(f"damaged: {error or type(error).__name__}") from None
    return upright(pixels, orientation)


def _from_jpeg(data: bytes, largest: int | None) -> tuple[np.ndarray, int]:
    """(pixels, orientation). torchvision decodes: the same pixels as Pillow's, and libjpeg's complaints are heard."""
    try:
        image = _open(data, ["JPEG"], largest)
    except DataError:
        raise
    except Exception:  # Pillow's header readers raise many types on damage
        raise DataError("not a valid JPEG file: its header is damaged or truncated") from None
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise DataError(str(error).rsplit(", ", 1)[-1]) from None  # torchvision puts its source file first
    return pixels.numpy(), _exif_orientation(image)


def _from_other(data: bytes, largest: int | None) -> tuple[np.ndarray, int]:
    """(pixels, orientation) of a PNG, TIFF, BMP or WebP file."""
    if data[:2] in (b"II", b"MM"):
        _refuse_tiff(data)
    if data.startswith(b"\x89PNG"):
        _refuse_deep_png(data)
        _open(data, ["PNG"], largest).verify()  # the checksums, which decoding skips
    image = _open(data, FORMATS, largest)
    if image.format != "TIFF" and getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{image.n_frames} pictures in one file, an animation; one picture a file is needed")
    pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    if image.format == "TIFF":  # Pillow has turned it, and removed the tag, or has done neither
        return pixels, image.tag_v2.get(ORIENTATION, 1)
    return pixels, _exif_orientation(image)


def _open(data: bytes, formats: Sequence[str], largest: int | None) -> Image.Image:
    """The picture with its header read and nothing decoded. DataError where it has too many pixels."""
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if largest is not None and width * height > largest:
        raise DataError(
            f"{width:,} x {height:,} pixels; at most {largest:,} pixels are read as one picture: cut it into tiles"
        )
    return image


def _refuse_tiff(data: bytes) -> None:
    """DataError unless the TIFF holds one page of eight-bit colours that every decoder reads alike."""
    try:
        page, *others = tiff.pages(data)
    except ValueError as error:
        raise DataError(f"not a valid TIFF file: {error}") from None
    count = 1 + sum(not other.part for other in others)
    if count > 1:
        raise DataError(f"{count} pages; one picture a file is needed: tiffsplit, or gdal_translate")
    if page.type != "uint8":
        raise DataError(refusal(page.bands, page.type))
    alpha = page.colours == RGB and page.extra == (ALPHA,)
    jpeg = page.colours != YCBCR or page.compression == JPEG_IN_TIFF
    if page.bands != TIFF_BANDS.get(page.colours, 0) + alpha or not jpeg:
        raise DataError(refusal(page.bands, page.type, COLOURS.get(page.colours, "other")))


def _refuse_deep_png(data: bytes) -> None:
    """DataError where a PNG holds 16 bits a band: Pillow would keep the high byte of three without a word."""
    depth, colours = data[24:26] if len(data) > 25 else (8, 2)
    if depth == 16:
        raise DataError(refusal(PNG_BANDS.get(colours, 1), "uint16"))


def refusal(bands: int, kind: str, colours: str = "") -> str:
    """Why a picture of so many bands of that type is not read, and what makes it readable."""
    held = f"{bands} {'band' if bands == 1 else 'bands'} of {kind}"
    if colours:
        held += f" in {colours} colours"
    gdal, flags = [], []
    if bands not in (1, 3):
        gdal.append("-b RED -b GREEN -b BLUE")
        flags.append("--bands")
    if kind != "uint8":
        gdal.append("-ot Byte -scale")
        flags.append("--scale")
    if not flags:
        return f"{held}; 8-bit RGB is needed: convert it"
    advice = f"gdal_translate {' '.join(gdal)} …, or predict.py {' '.join(flags)}"
    return f"{held}; 8-bit RGB is needed: {advice}"


def _exif_orientation(image: Image.Image) -> int:
    """1 to 8 as the EXIF notes say, 1 where there are none or they are damaged (XMP's are not looked at)."""
    notes = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    try:
        return next(tiff.directories(notes)).get(ORIENTATION, (1,))[0]
    except (ValueError, StopIteration):
        return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (3, H, W) turned and mirrored as EXIF's orientation 1 to 8 asks; any other number leaves them."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(0, 2, 1)  # rows become columns
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]  # upside down
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]  # left to right
    return pixels


# A data set


def common_size(checked: pd.DataFrame) -> tuple[int, int]:
    """(height, width) that most files have, from the columns of `check_files`."""
    return tuple(int(v) for v in checked.value_counts(["height", "width"]).index[0])


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

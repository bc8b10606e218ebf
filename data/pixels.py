"""How a picture becomes pixels: the one decoder of all scripts, and the array that holds a decoded data set.

    read_picture(Path("tile.jpg"))      # uint8 (3, H, W), RGB, upright
    decode(Path("tile.jpg"), 224, 224)  # the same, scaled as a whole to 224 x 224

Read are JPEG, PNG, TIFF, BMP and WebP of eight bits a band. Grey becomes three equal bands; palettes, CMYK
and YCbCr become RGB; 1-, 2- and 4-bit grey of PNG and BMP is spread over 0-255. Alpha is dropped, and the
colours stay as the file stores them. The orientation in EXIF or in a TIFF's tag is applied. Colour profiles
and gamma are ignored.

Refused, as a wrong number is worse than none: more than eight bits (Pillow keeps the high byte of 16-bit
RGB without a word), whole numbers with a sign, floats, TIFFs under eight bits, two bands or more than three
(four where the last is not marked as alpha: it may be infrared), alpha multiplied into the colours, Lab,
several pages, animations, more than LARGEST pixels. Overviews and masks inside a TIFF are no pages, nor are
the previews inside a JPEG.

NVIDIA DALI, which decodes for `data.dali`, gives the same pixels on a CPU of every file that is read here
(TIFFs with a palette or CMYK within one level): tests/test_pixels.py.

On import, for the whole process: Image.MAX_IMAGE_PIXELS is set to None, and Pillow's warnings are ignored.
"""

import contextlib
import hashlib
import io
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from tqdm import tqdm

import common
from common import DataError
from data import tiff

RULES = 2  # of what is read, and how: manifests and decoded pixels made under other rules are made anew
FORMATS = ("PNG", "TIFF", "BMP", "WEBP")  # beside JPEG; what is inside decides, not the name
WHITE = 3558  # the value of Sentinel-2's bands that becomes 255 in Sentinel2GlobalLULC
SHALLOW = {f"uint{bits}": 2**bits - 1 for bits in range(1, 8)}  # types under eight bits -> their white
FOR_GDAL = {  # first bytes -> what they are
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"<VRTDataset": "a virtual file of GDAL",
}
LARGEST = 178_956_970  # pixels: 512 MiB of RGB, the size beyond which Pillow suspects an attack
SAMPLED = 20_000  # images that mean and deviation are taken of, at most
PNG_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> bands
COLOURS = {  # of a TIFF, where the number of bands does not fit them
    0: "not marked as red, green and blue",
    1: "not marked as red, green and blue",
    2: "of which none is marked as plain alpha",
    3: "with a palette",
    5: "in CMYK colours",
    6: "in YCbCr colours",
    8: "in Lab colours",
}
COMPRESSIONS = {1, 5, 7, 8, 32773, 32946, 50000}  # none, LZW, JPEG, deflate, PackBits, old deflate, Zstandard
RGB, YCBCR = 2, 6
TIFF_BANDS = {0: 1, 1: 1, RGB: 3, 3: 1, 5: 4, YCBCR: 3}  # colours that are read -> bands they need
ALPHA = 2  # mark of an extra band that is not multiplied into the colours
JPEG_IN_TIFF = 7  # the compression under which YCbCr is read: libjpeg makes it RGB
ORIENTATION = tiff.ORIENTATION

Image.MAX_IMAGE_PIXELS = None  # LARGEST says what is too much, in one place
warnings.filterwarnings("ignore", module="PIL")  # of odd notes beside the pixels

IN_MEMORY = 4 << 30  # bytes; a larger set is decoded to disk, where it outlives the run
WAIT = 0.2  # seconds between two looks at whether another process has decoded the set


# One picture


def read_picture(file: Path) -> np.ndarray:
    """RGB pixels uint8 (3, H, W) of one file at its own size, upright.

    DataError naming the file where the picture is damaged or refused (then with its bands and their type), or
    has more than LARGEST pixels. OSError where the file cannot be read.
    """
    data = Path(file).read_bytes()
    try:
        return picture(data)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None


def decode(file: Path, height: int, width: int) -> np.ndarray:
    """RGB pixels uint8 (3, height, width) of one file; errors as in `read_picture`.

    A picture of another size is scaled as a whole (bilinear, antialiased, each axis by its own factor):
    nothing is cut off, so that fractions of its area keep their meaning. The DALI loader cuts its views by
    shares of a picture's own sides, which is the same.
    """
    return scaled(read_picture(file), height, width)


def scaled(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (3, height, width) of pixels (3, H, W) of any size: the rule of `decode`."""
    if pixels.shape[1:] == (height, width):
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def picture(data: bytes, largest: int | None = LARGEST) -> np.ndarray:
    """RGB pixels uint8 (3, H, W) of a file's bytes, of at most `largest` (None: no limit, for scenes).

    DataError that says only what is wrong, not where.
    """
    if not any(data):
        raise DataError("holds only zeros" if data else "empty (0 bytes)")
    read = _from_jpeg if data.startswith(b"\xff\xd8") else _from_other
    try:
        pixels, orientation = read(data, largest)
    except (DataError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"not a valid JPEG, PNG, TIFF, BMP or WebP file: {beginning(data)}") from None
    except Exception as error:  # Pillow's decoders raise many types on damage
        raise DataError(f"damaged: {error or type(error).__name__}") from None
    return upright(pixels, orientation)


def beginning(data: bytes) -> str:
    """What the file's first bytes say, and how GDAL makes a picture of it."""
    for first, kind in FOR_GDAL.items():
        if data.startswith(first):
            return f"it is {kind}: gdal_translate IN OUT.tif"
    return f"begins with {data[:16]!r}"


def _from_jpeg(data: bytes, largest: int | None) -> tuple[np.ndarray, int]:
    """(pixels, orientation). torchvision gives Pillow's pixels, and lets libjpeg's complaints be heard."""
    try:
        image = _open(data, ["JPEG"], largest)
    except DataError:
        raise
    except Exception:  # Pillow's header readers raise many types on damage
        raise DataError("not a valid JPEG file: its header is damaged or truncated") from None
    # Decoders differ in whether 255 is no ink or full ink
    if image.mode == "CMYK" and "adobe" not in image.info:
        raise DataError(refusal(4, "uint8", "in CMYK colours without Adobe's mark"))
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
    if data.startswith(b"BM"):
        _refuse_shallow_bmp(data)
    image = _open(data, FORMATS, largest)
    if image.format != "TIFF" and getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{image.n_frames} pictures in one file, an animation; one picture a file is needed")
    pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return pixels, orientation_of(image)


def orientation_of(image: Image.Image) -> int:
    """1 to 8: how the pixels of a decoded picture are still to be turned, see `upright`."""
    if image.format == "TIFF":  # Pillow has turned it, and removed the tag, or has done neither
        return image.tag_v2.get(ORIENTATION, 1)
    return _exif_orientation(image)


def _open(data: bytes, formats: Sequence[str], largest: int | None) -> Image.Image:
    """The picture with its header read and nothing decoded. DataError where it has too many pixels."""
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if largest is not None and width * height > largest:
        raise DataError(
            f"{width:,} x {height:,} pixels; a picture has at most {largest:,}: cut it into tiles"
        )
    return image


def _refuse_tiff(data: bytes) -> None:
    """DataError unless the TIFF holds one page of eight-bit colours that every decoder reads alike."""
    try:
        page, *others = tiff.pages(data)
    except ValueError as error:
        raise DataError(f"not a valid TIFF file: {error}") from None
    if page.pieces < page.needed:  # Pillow leaves what is missing black, without a word
        raise DataError(
            f"damaged: the file holds {page.pieces} strips or tiles, its size asks for {page.needed}"
        )
    count = 1 + sum(not other.part for other in others)
    if count > 1:
        raise DataError(f"{count} pages; one picture a file is needed: tiffsplit, or gdal_translate")
    if page.type != "uint8":
        raise DataError(refusal(page.bands, page.type, tiles=True))
    alpha = page.colours == RGB and page.extra == (ALPHA,)
    if page.bands != TIFF_BANDS.get(page.colours, 0) + alpha:
        colours = COLOURS.get(page.colours, "in unknown colours")
        raise DataError(refusal(page.bands, page.type, colours, tiles=True))
    if page.colours == YCBCR and page.compression != JPEG_IN_TIFF:
        raise DataError(refusal(page.bands, page.type, "in YCbCr colours without JPEG"))
    if page.compression not in COMPRESSIONS:
        raise DataError(
            f"compressed by a rare method (number {page.compression}): gdal_translate -co COMPRESS=LZW"
        )


def _refuse_deep_png(data: bytes) -> None:
    """DataError where a PNG holds 16 bits a band: Pillow would keep the high byte of three without a word."""
    depth, colours = data[24:26] if len(data) > 25 else (8, 2)
    if depth == 16:
        raise DataError(refusal(PNG_BANDS.get(colours, 1), "uint16"))


def _refuse_shallow_bmp(data: bytes) -> None:
    """DataError where a BMP holds five or six bits a band, which DALI does not read."""
    if data[28:30] == b"\x10\0":
        raise DataError(refusal(3, "uint5"))


def refusal(bands: int, kind: str, colours: str = "", tiles: bool = False) -> str:
    """Why a picture of so many bands of that type is not read, and what makes it readable: the same values
    to the same grey in every file. `tiles`: whether data.tiles reads the file."""
    held = f"{bands} {'band' if bands == 1 else 'bands'} of {kind} {colours}".rstrip()
    white = SHALLOW.get(kind, WHITE)
    gdal, flags = [], []
    if bands not in (1, 3):
        numbers = ["4", "3", "2"] if bands in (12, 13) else ["R", "G", "B"]  # Sentinel-2's, else unknown
        gdal += [f"-b {number}" for number in numbers]
        flags += ["--bands", *numbers]
    if kind != "uint8":
        gdal.append(f"-ot Byte -scale 0 {white} 0 255")
        flags.append(f"--scale {white}")
    if not flags:
        return f"{held}; 8-bit RGB is needed: gdal_translate -colorinterp red,green,blue …, or convert it"
    advice = f"gdal_translate {' '.join(gdal)} IN OUT"
    if tiles and kind not in SHALLOW:
        command = f"python -m data.tiles FOLDER/*.tif {' '.join(flags)} --size SIDE --out PATCHES"
        advice = f"{command}, or {advice}"
    return f"{held}; 8-bit RGB is needed: {advice}"


def _exif_orientation(image: Image.Image) -> int:
    """1 to 8 as the EXIF notes say, 1 where there are none or they are damaged. XMP's are not looked at."""
    notes = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    try:
        return next(tiff.directories(notes)).get(ORIENTATION, (1,))[0]
    except (ValueError, StopIteration):
        return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (3, H, W) turned and mirrored as EXIF's orientation 1 to 8 asks; other numbers leave them."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(0, 2, 1)  # rows become columns
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]  # upside down
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]  # left to right
    return pixels


# A data set


def common_size(checked: pd.DataFrame) -> tuple[int, int]:
    """(height, width) that most files have, in pixels, from the columns of `check_files`."""
    height, width = checked.value_counts(["height", "width"]).index[0]
    return int(height), int(width)


def load_pixels(
    root: Path,
    files: np.ndarray,
    height: int,
    width: int,
    *,
    cache: Path,
    workers: int | None = None,
    stamp: str = "",
    in_memory: int = IN_MEMORY,
    share: bool = False,
) -> torch.Tensor:
    """uint8 (n, 3, height, width) of files (n,) below root, decoded by `workers` threads (None: all cores).

    More than `in_memory` bytes, and a set of any size that is to be shared (`share`), go to a file in
    `cache`, which a later call with the same files and `stamp` (anything that changes with their contents)
    only maps: what one process writes into the tensor, no other sees. Of several processes that ask for the
    same set at once, one decodes and the others wait for its file. It is built under a temporary name: a
    killed build leaves nothing usable, and the next one removes what is left.

    DataError where a picture is damaged or refused, or where memory or disk are too small; OSError naming the
    file that cannot be read.
    """
    root, shape = Path(root), (len(files), 3, height, width)
    workers = workers or common.cores()
    size = math.prod(shape)
    if size <= in_memory and not share:
        pixels = _empty(shape, root)
        decode_into(pixels, root, files, workers)
        return torch.from_numpy(pixels)
    identity = "\0".join([str(RULES), str(root.resolve()), str(shape), stamp, *files])
    key = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:16]
    target = Path(cache) / f"pixels-{key}.u8"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        common.sweep(target.parent)
        with _one_at_a_time(target.with_suffix(".lock")):
            if not target.exists():  # else the process that was waited for has built it
                _build(target, shape, root, files, workers)
    return torch.from_numpy(np.memmap(target, np.uint8, "c", shape=shape))  # torch wants it writable


def decode_into(pixels: np.ndarray, root: Path, files: np.ndarray, workers: int) -> None:
    """Decode files (n,) below root into uint8 (n, 3, H, W), in `workers` threads; errors as in `decode`."""

    def one(i: int) -> None:
        pixels[i] = decode(root / files[i], *pixels.shape[2:])

    with ThreadPoolExecutor(max(1, workers)) as pool:
        done = pool.map(one, range(len(files)))  # the first error cancels what has not begun
        for _ in tqdm(done, "decode", len(files), unit="file", disable=None, leave=False):
            pass


def _empty(shape: tuple[int, ...], root: Path) -> np.ndarray:
    try:
        return np.empty(shape, np.uint8)
    except MemoryError:
        raise DataError(
            f"{root}: not enough memory for the decoded pixels, {math.prod(shape) / 1e9:.1f} GB"
        ) from None


def _build(target: Path, shape: tuple[int, ...], root: Path, files: np.ndarray, workers: int) -> None:
    """The decoded pixels of files (n,) as the file `target`, whole or not at all."""
    with common.replacing(target) as partial:
        _reserve(partial, math.prod(shape))
        pixels = np.memmap(partial, np.uint8, "r+", shape=shape)
        decode_into(pixels, root, files, workers)
        pixels.flush()


def _reserve(file: Path, size: int) -> None:
    """A file of `size` bytes, all on the disk: a process that writes into a map of a file with holes is
    killed (SIGBUS) where the disk becomes full. DataError where there is no room."""
    with file.open("wb") as opened:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)
            else:
                opened.truncate(size)
        except OSError as error:
            free = shutil.disk_usage(file.parent).free
            raise DataError(
                f"{file.parent}: the decoded pixels need {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free "
                f"({error.strerror}): make room, or name another --cache"
            ) from None


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Wait until no other process holds the lock `file`, then hold it. It ends with its holder."""
    lock = common.take_lock(file)
    if lock is None:
        print(f"waiting for another process to decode the same images ({file})", flush=True)
    while lock is None:
        time.sleep(WAIT)
        lock = common.take_lock(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(lock)


def channel_statistics(
    pixels: torch.Tensor, rows: np.ndarray | None = None
) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) of each channel of uint8 pixels (n, 3, H, W), in units of the range 0-1.

    Over all pixels of at most SAMPLED evenly spaced images, of all or of `rows`, of which 64 are in memory at
    a time; rounded to four places. The deviation of a channel that is the same everywhere is given as 1, as
    it is divided by.
    """
    sample = torch.arange(len(pixels)) if rows is None else torch.from_numpy(rows)
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for some in sample[:: -(-len(sample) // SAMPLED)].split(64):
        for channel in range(3):
            counts[channel] += torch.bincount(pixels[some, channel].flatten(), minlength=256)
    value = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True).double()  # (3, 256)
    mean = share @ value
    std = (share * (value - mean[:, None]).square()).sum(1).sqrt()
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) or 1.0 for v in std.tolist()]

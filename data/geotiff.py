"""TIFF files of any depth by windows, and where they lie: numpy and zlib, no GDAL.

    tiff = Tiff(Path("scene.tif"))
    tiff.read(top=0, left=512, height=256, width=256)  # (bands, 256, 256), in the file's type

Read are strips and tiles, classic and BigTIFF, 8 to 64 bits an integer or float, any number of bands, band
by band or pixel by pixel, plain or compressed (Deflate, LZW, PackBits, Zstandard, LZMA, JPEG) with both
predictors. What the tags are, and how they are read, is in `data.tiff`.
"""

import contextlib
import io
import math
import mmap
import os
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import DataError, memory
from data import tiff

# Tags of a file that says where it lies, or what is no data
PLACED = {tiff.PIXEL_SCALE, tiff.TIE_POINT, tiff.TRANSFORM, tiff.GDAL_NODATA}
RASTER_TYPE, MODEL_TYPE, GEOGRAPHIC, PROJECTED = 1025, 1024, 2048, 3072  # GeoTIFF keys
MOST_BANDS = 65535  # their number is 16 bits wide
KINDS = {1: "u", 2: "i", 3: "f"}  # sample format -> numpy's letter
BITS_OF = {"u": {8, 16, 32, 64}, "i": {8, 16, 32, 64}, "f": {16, 32, 64}}
NONE, LZW, JPEG, ADOBE_DEFLATE, DEFLATE = 1, 5, 7, 8, 32946
PREDICTED = {LZW, ADOBE_DEFLATE, DEFLATE, 34925, 50000}  # the others know no predictor
BY_PILLOW = {LZW, 32773, 34925, 50000}  # LZW, PackBits, LZMA, Zstandard: as pictures of bytes
NAMES = {2: "CCITT", 3: "CCITT", 4: "CCITT", 6: "old JPEG", 34712: "JPEG 2000", 34887: "LERC", 50001: "WebP"}
KEPT = 256 << 20  # bytes of decoded strips and tiles that are kept for the next window


class Place(NamedTuple):
    """Where pixels lie: x = a column + b row + c and y = d column + e row + f at their corners, and the
    GeoTIFF keys of the coordinate reference system, as the file has them."""

    transform: tuple[float, float, float, float, float, float]  # a, b, c, d, e, f, in units of the CRS
    keys: tuple[int, ...] = ()
    doubles: tuple[float, ...] = ()
    text: bytes = b""

    def at(self, column, row) -> tuple:
        """(x, y) of a corner; numbers or arrays."""
        a, b, c, d, e, f = self.transform
        return a * column + b * row + c, d * column + e * row + f

    def grid(self, column: float, row: float, step: int) -> "Place":
        """Of cells of step x step pixels, the first of which has its corner at (column, row)."""
        a, b, _, d, e, _ = self.transform
        x, y = self.at(column, row)
        return self._replace(transform=(a * step, b * step, x, d * step, e * step, y))

    def differs(self, other: "Place", height: int, width: int) -> bool:
        """Whether the pixels of two pictures of one size lie more than half a pixel apart, or in other
        systems as far as both have a number."""
        a, b, _, d, e, _ = self.transform
        half = 0.5 * max(math.hypot(a, d), math.hypot(b, e))
        for corner in ((0, 0), (width, 0), (0, height)):
            if math.dist(self.at(*corner), other.at(*corner)) > half:
                return True
        codes = [(self.key(number), other.key(number)) for number in (GEOGRAPHIC, PROJECTED)]
        return any(None not in pair and pair[0] != pair[1] for pair in codes)

    def key(self, number: int) -> int | None:
        """Value of a GeoTIFF key that stands in the directory itself."""
        for start in range(4, len(self.keys) - 3, 4):
            if self.keys[start] == number and self.keys[start + 1] == 0:
                return self.keys[start + 3]
        return None

    @property
    def geographic(self) -> bool:
        """x is a longitude and y a latitude, in degrees."""
        return self.key(MODEL_TYPE) == 2


class Tiff:
    """The first picture of a TIFF file, read by windows. DataError if it is none, or one that this room
    cannot read."""

    def __init__(self, file: Path):
        self.file = file
        self.order, self.tags = first_directory(file)
        self.width, self.height = self.one(tiff.WIDTH), self.one(tiff.HEIGHT)
        self.bands = self.one(tiff.SAMPLES, 1)
        self.compression = self.one(tiff.COMPRESSION, 1)
        self.predictor = self.one(tiff.PREDICTOR, 1) if self.compression in PREDICTED else 1
        self.separate = self.one(tiff.PLANAR, 1) == 2 and self.bands > 1
        self.dtype = self.sample_type()
        self.tiled = tiff.TILE_WIDTH in self.tags
        self.chunk_width = self.one(tiff.TILE_WIDTH) if self.tiled else self.width
        self.chunk_height = self.one(tiff.TILE_HEIGHT) if self.tiled else self.strip_height()
        self.offsets = self.tags.get(tiff.TILE_OFFSETS if self.tiled else tiff.STRIP_OFFSETS, ())
        self.sizes = self.tags.get(tiff.TILE_BYTES if self.tiled else tiff.STRIP_BYTES, ())
        self.kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self.check()

    def one(self, tag: int, default: int | None = None) -> int:
        """The first value of a tag; DataError where it is missing and has no default."""
        values = self.tags.get(tag, () if default is None else (default,))
        if not values:
            raise DataError(f"{self.file}: a damaged TIFF: tag {tag} is missing")
        return values[0]

    def strip_height(self) -> int:
        """Rows of a strip, pixels, as far as the picture goes."""
        return max(1, min(self.one(tiff.STRIP_ROWS, self.height), self.height))

    def sample_type(self) -> np.dtype:
        """The type of the numbers in the file; DataError for complex, mixed or odd ones."""
        bits = set(self.tags.get(tiff.BITS, (1,)))
        formats = set(self.tags.get(tiff.SAMPLE_FORMAT, (1,)))
        kind = KINDS.get(min(formats))
        odd = None
        if min(formats) > 4:
            odd = "complex numbers"
        elif kind is None or len(formats) > 1:
            odd = "numbers of no type, or of several"
        elif len(bits) > 1 or not bits <= BITS_OF[kind]:
            odd = f"{'/'.join(map(str, sorted(bits)))} bits a sample"
        if odd:
            raise DataError(f"{self.file}: has {odd}: {self.translate('-ot Float32')}")
        return np.dtype(f"{kind}{min(bits) // 8}")

    def translate(self, options: str = "-co COMPRESS=DEFLATE") -> str:
        """The command that makes the file readable here."""
        options = f"{options} " if options else ""
        return f"gdal_translate {options}-co TILED=YES {self.file} {self.file.stem}-tiled.tif"

    def check(self) -> None:
        """What would fail in the middle of a scene fails at its beginning."""
        sides = (self.width, self.height, self.chunk_width, self.chunk_height)
        if min(sides) < 1 or not 1 <= self.bands <= MOST_BANDS:
            raise DataError(
                f"{self.file}: a damaged TIFF: {self.width} x {self.height} px, {self.bands} bands"
            )
        if len(self.tags.get(tiff.EXTRA_SAMPLES, ())) >= self.bands:
            raise DataError(f"{self.file}: a damaged TIFF: none of its {self.bands} bands is a colour")
        if self.one(tiff.FILL_ORDER, 1) != 1:
            raise DataError(f"{self.file}: holds the bits of a byte in reverse: {self.translate()}")
        colours, turn = self.one(tiff.PHOTOMETRIC, 1), self.one(tiff.ORIENTATION, 1)
        if colours not in (1, 2) and not (colours == 6 and self.compression == JPEG) or turn != 1:
            raise DataError(
                f"{self.file}: its colours (PhotometricInterpretation {colours}) or its orientation ({turn}) "
                f"are not those of a scene: {self.translate('-expand rgb' if colours == 3 else '')}"
            )
        if self.compression not in BY_PILLOW | {NONE, JPEG, ADOBE_DEFLATE, DEFLATE}:
            name = NAMES.get(self.compression, f"method {self.compression}")
            raise DataError(f"{self.file}: is compressed by {name}: {self.translate()}")
        if self.compression == JPEG and self.dtype != np.uint8:
            raise DataError(f"{self.file}: holds JPEG of {self.dtype}: {self.translate()}")
        if self.predictor not in (1, 2) and (self.predictor, self.dtype.kind) != (3, "f"):
            raise DataError(
                f"{self.file}: has predictor {self.predictor} for {self.dtype}: {self.translate()}"
            )
        down, across = self.chunks()
        expected = down * across * (self.bands if self.separate else 1)
        self.one(tiff.TILE_BYTES if self.tiled else tiff.STRIP_BYTES)  # DataError where they are missing
        if not len(self.offsets) == len(self.sizes) == expected:
            raise DataError(f"{self.file}: a damaged TIFF: {len(self.offsets)} of {expected} strips or tiles")

    def refuse_masks(self) -> None:
        """What a mask hides would be mapped."""
        if has_mask(self.file) or self.file.with_name(f"{self.file.name}.msk").exists():
            bands = " ".join(f"-b {band + 1}" for band in range(self.bands))
            alpha = f"{bands} -b mask -colorinterp_{self.bands + 1} alpha -co COMPRESS=DEFLATE"
            raise DataError(f"{self.file}: has a mask, which is not read here: {self.translate(alpha)}")

    def refuse_pages(self) -> None:
        """Which of several pages is the scene is not known. A smaller one is taken for an overview, whatever
        its tags say."""
        size = (self.height, self.width)
        alike = [page for page in pages_of(self.file) if (page.height, page.width) == size and not page.part]
        if len(alike) > 1:
            raise DataError(
                f"{self.file}: has {len(alike)} pages of {self.width} x {self.height} px, a scene has one: "
                f"gdal_translate GTIFF_DIR:1:{self.file} {self.file.stem}-1.tif"
            )

    def refuse_large_chunks(self) -> None:
        """A compressed strip is unpacked whole."""
        if self.compression != NONE and self.chunk_bytes() > memory() // 4:
            size = self.chunk_bytes() / 1e9
            raise DataError(
                f"{self.file}: a strip or tile of it takes {size:.1f} GB, more than this machine can hold: "
                f"{self.translate()}"
            )

    def chunks(self) -> tuple[int, int]:
        """Strips or tiles down and across the picture."""
        return -(-self.height // self.chunk_height), -(-self.width // self.chunk_width)

    def chunk_bands(self) -> int:
        """Bands that lie together in a strip or tile."""
        return 1 if self.separate else self.bands

    def chunk_bytes(self) -> int:
        """Size of a whole strip or tile, decompressed."""
        return self.chunk_height * self.chunk_width * self.chunk_bands() * self.dtype.itemsize

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(bands, height, width) of a window that lies in the picture, in the file's type."""
        window = np.empty((self.bands, height, width), self.dtype)
        down, across = self.chunks()
        for i in range(top // self.chunk_height, -(-(top + height) // self.chunk_height)):
            for j in range(left // self.chunk_width, -(-(left + width) // self.chunk_width)):
                y, x = i * self.chunk_height, j * self.chunk_width
                first, last = max(top, y), min(top + height, y + self.chunk_height)
                begin, end = max(left, x), min(left + width, x + self.chunk_width)
                target = np.s_[first - top : last - top, begin - left : end - left]
                for plane in range(self.bands if self.separate else 1):
                    number = (plane * down + i) * across + j
                    block = self.rows_of(number, i, first - y, last - y)[:, begin - x : end - x]
                    bands = slice(plane, plane + 1) if self.separate else slice(None)
                    window[bands, *target] = block.transpose(2, 0, 1)
        return window

    def rows_of(self, number: int, i: int, first: int, last: int) -> np.ndarray:
        """Rows first to last (rows, chunk width, bands of a chunk) of strip or tile `number` in chunk row
        i."""
        rows = (
            self.chunk_height if self.tiled else min(self.chunk_height, self.height - i * self.chunk_height)
        )
        shape = (rows, self.chunk_width, self.chunk_bands())
        if self.sizes[number] == 0:  # a sparse file: GDAL leaves out what holds no data
            return np.full((last - first, *shape[1:]), self.nodata() or 0).astype(self.dtype)
        if self.compression == NONE:
            row = self.chunk_bytes() // self.chunk_height
            raw = self.bytes_at(self.offsets[number] + first * row, (last - first) * row)
            return self.decoded(raw, (last - first, *shape[1:]))
        if number not in self.kept:
            raw = self.bytes_at(self.offsets[number], self.sizes[number])
            self.kept[number] = self.decoded(self.unpacked(raw, shape), shape)
            while len(self.kept) > self.most_kept():
                self.kept.popitem(last=False)
        return self.kept[number][first:last]

    def most_kept(self) -> int:
        """How many unpacked strips or tiles stay in memory: two rows of them, if that is an eighth of it at
        most, so that patches from left to right, row by row, unpack each once."""
        two_rows = 2 * self.chunks()[1] * (self.bands if self.separate else 1)
        size = self.chunk_bytes()
        return max(self.bands, KEPT // size, min(two_rows, memory() // 8 // size))

    def bytes_at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on; DataError where the file ends before."""
        try:
            with open(self.file, "rb") as stream:
                missing = offset + count - file_size(stream)
                if missing > 0:
                    raise DataError(
                        f"{self.file}: the file is cut off: {missing} bytes are missing at its end"
                    )
                stream.seek(offset)
                return stream.read(count)
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error})") from None

    def unpacked(self, raw: bytes, shape: tuple[int, int, int]) -> bytes:
        """A strip or tile without its compression; the predictor is still in."""
        rows, row = shape[0], shape[1] * shape[2] * self.dtype.itemsize
        try:
            if self.compression in (ADOBE_DEFLATE, DEFLATE):
                return zlib.decompress(raw)
            if self.compression == JPEG:
                return self.by_pillow(raw, rows, shape[1], shape[2], (tiff.JPEG_TABLES, tiff.SUBSAMPLING))
            return self.by_pillow(raw, rows, row, 1)
        except (zlib.error, OSError, ValueError, SyntaxError) as error:
            odd = f"{self.file}: a strip or tile does not decode ({type(error).__name__})"
            raise DataError(f"{odd}: it is damaged, or of a rare kind: {self.translate()}") from None

    def by_pillow(self, raw: bytes, height: int, width: int, bands: int, copied: tuple = ()) -> bytes:
        """Pillow's libtiff unpacks one strip: it stands in a TIFF of its own, 8 bits a sample."""
        entries = {
            tiff.WIDTH: ("I", (width,)),
            tiff.HEIGHT: ("I", (height,)),
            tiff.BITS: ("H", (8,) * bands),
            tiff.COMPRESSION: ("H", (self.compression,)),
            tiff.PHOTOMETRIC: ("H", (self.one(tiff.PHOTOMETRIC, 1) if copied and bands > 1 else 1,)),
            tiff.STRIP_OFFSETS: ("I", (8,)),
            tiff.SAMPLES: ("H", (bands,)),
            tiff.STRIP_ROWS: ("I", (height,)),
            tiff.STRIP_BYTES: ("I", (len(raw),)),
            tiff.PLANAR: ("H", (1,)),
        }
        for tag in copied:
            if tag in self.tags:
                entries[tag] = ("s" if tag == tiff.JPEG_TABLES else "H", self.tags[tag])
        start = 8 + len(raw) + len(raw) % 2
        file = struct.pack("<2sHI", b"II", 42, start) + raw + b"\0" * (len(raw) % 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(file + tiff.directory(entries, start))) as image:
                return image.tobytes()

    def decoded(self, raw: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        """Bytes -> (rows, columns, bands) of the file's type, in this machine's byte order."""
        size = int(np.prod(shape)) * self.dtype.itemsize
        if len(raw) < size:
            raise DataError(f"{self.file}: a strip or tile holds {len(raw)} bytes, not {size}")
        if self.predictor == 3:  # bytes of a row: all the highest ones, all the next, …, as differences
            row = np.frombuffer(raw, np.uint8, size).reshape(shape[0], -1, shape[2])
            planes = np.cumsum(row, 1, dtype=np.uint8).reshape(shape[0], self.dtype.itemsize, -1)
            values = np.ascontiguousarray(planes.swapaxes(1, 2)).view(self.dtype.newbyteorder(">"))
            return values.reshape(shape).astype(self.dtype)
        stored = self.dtype.newbyteorder(self.order)
        values = np.frombuffer(raw, stored, size // stored.itemsize).reshape(shape)
        values = values.astype(self.dtype, copy=False)
        if self.predictor == 2:  # differences of words, whatever they stand for
            words = values.view(f"u{self.dtype.itemsize}")
            return np.cumsum(words, 1, dtype=words.dtype).view(self.dtype)
        return values

    def nodata(self) -> float | None:
        """The value that marks pixels without data (GDAL's tag)."""
        return number_in(self.tags.get(tiff.GDAL_NODATA, b""))

    def alpha(self) -> int | None:
        """Which band is opacity."""
        extra = self.tags.get(tiff.EXTRA_SAMPLES, ())
        alphas = [i for i, kind in enumerate(extra) if kind in (1, 2)]
        return self.bands - len(extra) + alphas[0] if alphas else None

    def place(self) -> Place | None:
        """Where the picture lies, None without georeference."""
        return place_of(self.tags)


def place_of(tags: dict[int, tiff.Values]) -> Place | None:
    """Where the tags of a TIFF put it, None without georeference."""
    scale, tie, matrix = (tags.get(tag) for tag in (tiff.PIXEL_SCALE, tiff.TIE_POINT, tiff.TRANSFORM))
    if scale and tie and len(scale) >= 2 and all(scale[:2]) and len(tie) >= 6:
        column, row, _, x, y = tie[:5]
        across, down = scale[0], abs(scale[1])  # as GDAL: some writers give it a sign
        transform = (across, 0.0, x - column * across, 0.0, -down, y + row * down)
    elif matrix and len(matrix) >= 8:
        transform = (matrix[0], matrix[1], matrix[3], matrix[4], matrix[5], matrix[7])
    else:
        return None
    keys = tags.get(tiff.GEO_KEYS, ())
    place = Place(transform, keys, tags.get(tiff.GEO_DOUBLES, ()), tags.get(tiff.GEO_TEXT, b""))
    if place.key(RASTER_TYPE) != 2:
        return place
    area = tuple(1 if keys[i - 3 : i] == (RASTER_TYPE, 0, 1) else key for i, key in enumerate(keys))
    return place._replace(keys=area).grid(-0.5, -0.5, 1)  # the tie point was a pixel's centre


def number_in(text: bytes | str) -> float | None:
    """What GDAL's tag of nodata says: its first word. None where that is no number."""
    words = text.decode(errors="replace") if isinstance(text, bytes) else text
    try:
        return float(words.partition("\0")[0].split()[0])
    except (ValueError, IndexError):
        return None


def file_size(stream: io.BufferedReader) -> int:
    """Bytes of an open file."""
    return os.fstat(stream.fileno()).st_size


@contextlib.contextmanager
def mapped(file: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file, of which only those that are looked at are read."""
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def first_directory(file: Path) -> tuple[str, dict]:
    """(byte order, {tag: values}) of the first page; DataError if the file is damaged."""
    try:
        with mapped(file) as data:
            return tiff.byte_order(data), next(tiff.directories(data))
    except (ValueError, StopIteration) as error:
        raise DataError(f"{file}: a damaged TIFF ({error or 'it has no page'})") from None


def pages_of(file: Path) -> list[tiff.Page]:
    """The pages of a TIFF; none where one after the first is damaged."""
    with contextlib.suppress(ValueError), mapped(file) as data:
        return tiff.pages(data)
    return []


def has_mask(file: Path) -> bool:
    """Whether a page of the file masks another, as GDAL writes what holds no data."""
    return any(page.mask for page in pages_of(file))


def is_tiff(file: Path) -> bool:
    """By its first bytes. OSError if it cannot be opened."""
    with open(file, "rb") as stream:
        return stream.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

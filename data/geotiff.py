"""TIFF files of any depth by windows, where they lie, and GeoTIFFs of maps: numpy and zlib, no GDAL.

    tiff = Tiff(Path("scene.tif"))
    tiff.read(top=0, left=512, height=256, width=256)  # (bands, 256, 256), in the file's type

Read are strips and tiles, classic and BigTIFF, 8 to 64 bits an integer or float, any number of bands, band
by band or pixel by pixel, plain or compressed (Deflate, LZW, PackBits, Zstandard, LZMA, JPEG) with both
predictors. What a page is before anything decodes it, `data.tiff` says.
Sources: Adobe, TIFF 6.0 (1992); OGC 19-008r4, GeoTIFF 1.1, https://docs.ogc.org/is/19-008r4/19-008r4.html;
GDAL's tags, https://gdal.org/en/stable/drivers/raster/gtiff.html.
"""

import contextlib
import io
import mmap
import os
import struct
import warnings
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

import common
from common import DataError, memory
from data import tiff

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_ROWS, STRIP_BYTES = 273, 274, 277, 278, 279
PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 284, 317, 322, 323, 324, 325
COLOUR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES, SUBSAMPLING = 320, 338, 339, 347, 530
PIXEL_SCALE, TIE_POINT, TRANSFORM = 33550, 33922, 34264
GEO_KEYS, GEO_DOUBLES, GEO_TEXT = 34735, 34736, 34737
GDAL_METADATA, GDAL_NODATA = 42112, 42113
# Tags of a file that says where it lies, or what is no data
PLACED = {PIXEL_SCALE, TIE_POINT, TRANSFORM, GDAL_NODATA}
RASTER_TYPE, MODEL_TYPE = 1025, 1024  # GeoTIFF keys

FORMATS = {  # type of a tag's values -> struct's letter
    1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "s", 8: "h", 9: "i",
    10: "ii", 11: "f", 12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q",
}  # fmt: skip
WHOLE_NUMBERS = {1, 3, 4, 13, 16, 18}  # types of values, as in FORMATS, of these tags:
WHOLE = {WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_ROWS}
WHOLE |= {STRIP_BYTES, PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES}
WHOLE |= {EXTRA_SAMPLES, SAMPLE_FORMAT, SUBSAMPLING, GEO_KEYS}
TEXTS = {GEO_TEXT, GDAL_NODATA}
MOST_BANDS = 65535  # their number is 16 bits wide
KINDS = {1: "u", 2: "i", 3: "f"}  # sample format -> numpy's letter
NONE, LZW, JPEG, ADOBE_DEFLATE, DEFLATE = 1, 5, 7, 8, 32946
PREDICTED = {LZW, ADOBE_DEFLATE, DEFLATE, 34925, 50000}  # the others know no predictor
BY_PILLOW = {LZW, 32773, 34925, 50000}  # LZW, PackBits, LZMA, Zstandard: as pictures of bytes
NAMES = {2: "CCITT", 3: "CCITT", 4: "CCITT", 6: "old JPEG", 34712: "JPEG 2000", 34887: "LERC", 50001: "WebP"}
KEPT = 256 << 20  # bytes of decoded strips and tiles that are kept for the next window
NO_CLASS = 255  # in a map of classes: no data
TILE = 256  # side of the tiles of a written file, pixels


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
        with open(file, "rb") as stream:
            self.order, self.tags = read_tags(stream, file)
        self.width, self.height = self.one(WIDTH), self.one(HEIGHT)
        self.bands = self.one(SAMPLES, 1)
        self.compression = self.one(COMPRESSION, 1)
        self.predictor = self.one(PREDICTOR, 1) if self.compression in PREDICTED else 1
        self.separate = self.one(PLANAR, 1) == 2 and self.bands > 1
        self.dtype = self.sample_type()
        self.tiled = TILE_WIDTH in self.tags
        self.chunk_width = self.one(TILE_WIDTH) if self.tiled else self.width
        self.chunk_height = self.one(TILE_HEIGHT) if self.tiled else self.strip_height()
        self.offsets = self.tags.get(TILE_OFFSETS if self.tiled else STRIP_OFFSETS, ())
        self.sizes = self.tags.get(TILE_BYTES if self.tiled else STRIP_BYTES, ())
        self.kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self.check()

    def one(self, tag: int, default: int | None = None) -> int:
        values = self.tags.get(tag, () if default is None else (default,))
        if not values:
            raise DataError(f"{self.file}: a damaged TIFF: tag {tag} is missing")
        return values[0]

    def strip_height(self) -> int:
        return max(1, min(self.one(STRIP_ROWS, self.height), self.height))

    def sample_type(self) -> np.dtype:
        bits, formats = set(self.tags.get(BITS, (1,))), set(self.tags.get(SAMPLE_FORMAT, (1,)))
        kind = KINDS.get(min(formats))
        known = {"u": {8, 16, 32, 64}, "i": {8, 16, 32, 64}, "f": {16, 32, 64}}.get(kind, set())
        if len(bits) > 1 or len(formats) > 1 or not bits <= known:
            what = (
                "complex numbers" if min(formats) > 4 else f"{'/'.join(map(str, sorted(bits)))} bits a sample"
            )
            raise DataError(f"{self.file}: has {what}: {self.translate('-ot Float32')}")
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
        colours, turn = self.one(PHOTOMETRIC, 1), self.one(ORIENTATION, 1)
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
        if not len(self.offsets) == len(self.sizes) == expected:
            raise DataError(f"{self.file}: a damaged TIFF: {len(self.offsets)} of {expected} strips or tiles")

    def refuse_masks(self) -> None:
        """What a mask hides would be mapped."""
        if has_mask(self.file) or self.file.with_name(f"{self.file.name}.msk").exists():
            bands = " ".join(f"-b {band + 1}" for band in range(self.bands))
            alpha = f"{bands} -b mask -colorinterp_{self.bands + 1} alpha -co COMPRESS=DEFLATE"
            raise DataError(f"{self.file}: has a mask, which is not read here: {self.translate(alpha)}")

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
        return 1 if self.separate else self.bands

    def chunk_bytes(self) -> int:
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
            while len(self.kept) > max(self.bands, KEPT // self.chunk_bytes()):
                self.kept.popitem(last=False)
        return self.kept[number][first:last]

    def bytes_at(self, offset: int, count: int) -> bytes:
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
                return self.by_pillow(raw, rows, shape[1], shape[2], (JPEG_TABLES, SUBSAMPLING))
            return self.by_pillow(raw, rows, row, 1)
        except (zlib.error, OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{self.file}: a strip or tile does not decode ({error})") from None

    def by_pillow(self, raw: bytes, height: int, width: int, bands: int, copied: tuple = ()) -> bytes:
        """Pillow's libtiff unpacks one strip: it stands in a TIFF of its own, 8 bits a sample."""
        entries = {
            WIDTH: ("I", (width,)),
            HEIGHT: ("I", (height,)),
            BITS: ("H", (8,) * bands),
            COMPRESSION: ("H", (self.compression,)),
            PHOTOMETRIC: ("H", (self.one(PHOTOMETRIC, 1) if copied and bands > 1 else 1,)),
            STRIP_OFFSETS: ("I", (8,)),
            SAMPLES: ("H", (bands,)),
            STRIP_ROWS: ("I", (height,)),
            STRIP_BYTES: ("I", (len(raw),)),
            PLANAR: ("H", (1,)),
        }
        for tag in copied:
            if tag in self.tags:
                entries[tag] = ("s" if tag == JPEG_TABLES else "H", self.tags[tag])
        start = 8 + len(raw) + len(raw) % 2
        file = struct.pack("<2sHI", b"II", 42, start) + raw + b"\0" * (len(raw) % 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(file + directory(entries, start))) as image:
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
        return number_in(self.tags.get(GDAL_NODATA, b""))

    def alpha(self) -> int | None:
        """Which band is opacity."""
        extra = self.tags.get(EXTRA_SAMPLES, ())
        alphas = [i for i, kind in enumerate(extra) if kind in (1, 2)]
        return self.bands - len(extra) + alphas[0] if alphas else None

    def place(self) -> Place | None:
        """Where the picture lies, None without georeference."""
        scale, tie, matrix = (self.tags.get(tag) for tag in (PIXEL_SCALE, TIE_POINT, TRANSFORM))
        if matrix and len(matrix) >= 8:
            transform = (matrix[0], matrix[1], matrix[3], matrix[4], matrix[5], matrix[7])
        elif scale and tie and len(scale) >= 2 and len(tie) >= 6:
            column, row, _, x, y = tie[:5]
            transform = (scale[0], 0.0, x - column * scale[0], 0.0, -scale[1], y + row * scale[1])
        else:
            return None
        keys = self.tags.get(GEO_KEYS, ())
        place = Place(transform, keys, self.tags.get(GEO_DOUBLES, ()), self.tags.get(GEO_TEXT, b""))
        if place.key(RASTER_TYPE) != 2:
            return place
        area = tuple(1 if keys[i - 3 : i] == (RASTER_TYPE, 0, 1) else key for i, key in enumerate(keys))
        return place._replace(keys=area).grid(-0.5, -0.5, 1)  # the tie point was a pixel's centre


def number_in(text: bytes | str) -> float | None:
    """What GDAL's tag of nodata says; None where it is no number."""
    try:
        return float(text.strip(b"\0 " if isinstance(text, bytes) else "\0 "))
    except ValueError:
        return None


def file_size(stream: io.BufferedReader) -> int:
    """Bytes of an open file."""
    return os.fstat(stream.fileno()).st_size


def has_mask(file: Path) -> bool:
    """Whether a page of the file masks another, as GDAL writes what holds no data."""
    with (
        contextlib.suppress(ValueError),  # damage after the first page
        open(file, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return any(page.mask for page in tiff.pages(data))
    return False


def is_tiff(file: Path) -> bool:
    """By its first bytes. OSError if it cannot be opened."""
    with open(file, "rb") as stream:
        return stream.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_tags(stream: io.BufferedReader, file: Path) -> tuple[str, dict]:
    """(byte order, {tag: values or bytes}) of the first directory of a TIFF."""
    try:
        order = {b"II": "<", b"MM": ">"}[stream.read(2)]
        (version,) = struct.unpack(order + "H", stream.read(2))
        big = version == 43
        if big:
            stream.read(4)
        word, count, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
        (start,) = struct.unpack(order + word, stream.read(8 if big else 4))
        stream.seek(start)
        (entries,) = struct.unpack(order + count, stream.read(8 if big else 2))
        table = stream.read(entry * min(entries, 65536))
        tags = {}
        for at in range(0, len(table) - entry + 1, entry):
            tag, kind, number = struct.unpack(order + "HH" + word, table[at : at + entry - entry // 5 * 2])
            check_kind(tag, kind, number)
            if kind in FORMATS:
                tags[tag] = read_values(stream, order, FORMATS[kind], number, table[at : at + entry], word)
        return order, tags
    except (struct.error, KeyError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"{file}: a damaged TIFF ({error})") from None


def check_kind(tag: int, kind: int, number: int) -> None:
    """ValueError where a tag that is used here has values of a type that it cannot have, or none."""
    if tag in WHOLE and (kind not in WHOLE_NUMBERS or not number):
        raise ValueError(f"tag {tag} holds no whole numbers")
    if tag in TEXTS and FORMATS.get(kind) != "s":
        raise ValueError(f"tag {tag} holds no text")


def read_values(
    stream: io.BufferedReader, order: str, letters: str, number: int, entry: bytes, word: str
) -> tuple | bytes:
    """Values of one entry, from the entry itself where they fit, else from where it points. ValueError where
    the file ends before."""
    field = entry[-struct.calcsize("<" + word) :]
    form = f"{order}{number * len(letters)}{letters[0]}"
    size = struct.calcsize(form)
    if size > len(field):
        (offset,) = struct.unpack(order + word, field)
        if offset + size > file_size(stream):
            raise ValueError(f"a tag counts {number} values, which reach beyond the end of the file")
        stream.seek(offset)
        field = stream.read(size)
    values = struct.unpack(form, field[:size])
    return values[0] if letters == "s" else values


# Writing


def directory(entries: dict[int, tuple[str, tuple | bytes]], start: int) -> bytes:
    """A little-endian directory that stands at byte `start`, and the values that do not fit into its
    entries. entries: tag -> (struct's letter, values)."""
    kinds = {"s": 2, "H": 3, "I": 4, "d": 12, "B": 1}
    table, rest = [struct.pack("<H", len(entries))], b""
    after = start + 2 + 12 * len(entries) + 4
    for tag, (letter, values) in sorted(entries.items()):
        body = values if letter == "s" else struct.pack(f"<{len(values)}{letter}", *values)
        field = body.ljust(4, b"\0")
        if len(body) > 4:
            field = struct.pack("<I", after + len(rest))
            rest += body + b"\0" * (len(body) % 2)
        table.append(struct.pack("<HHI", tag, kinds[letter], len(values)) + field)
    return b"".join(table) + struct.pack("<I", 0) + rest


def write_geotiff(file: Path, bands: np.ndarray, names: list[str], place: Place | None) -> None:
    """float32 bands (K, H, W) with their names; nan means no data. Errors as in `write_bands`."""
    items = [item("DESCRIPTION", i, name, ' role="description"') for i, name in enumerate(names)]
    entries = {PHOTOMETRIC: ("H", (1,)), GDAL_METADATA: ("s", metadata(items))}
    write_bands(file, bands.astype("<f4"), float("nan"), entries, place)


def write_class_map(
    file: Path, numbers: np.ndarray, names: list[str], colours: list[str], place: Place | None
) -> None:
    """uint8 numbers (H, W) of classes, NO_CLASS where there are no data, with a colour table.

    names and colours (#rrggbb) are those of the classes 0, 1, …; the names stand in the band's metadata,
    CLASS_0 and so on, and for QGIS's legend in FILE.aux.xml, GDAL's own. Errors as in `write_bands`.
    """
    table = np.zeros((256, 3), int)
    table[: len(colours)] = [tuple(bytes.fromhex(colour[1:])) for colour in colours]
    items = [item("DESCRIPTION", 0, "class", ' role="description"')]
    items += [item(f"CLASS_{k}", 0, name) for k, name in enumerate(names)]
    entries = {
        PHOTOMETRIC: ("H", (3,)),  # a palette …
        COLOUR_MAP: ("H", tuple((257 * table.T).ravel().tolist())),  # … of 16 bits, all reds first
        GDAL_METADATA: ("s", metadata(items)),
    }
    write_bands(file, numbers[None], NO_CLASS, entries, place)
    listed = "".join(f"<Category>{escape(name)}</Category>" for name in names)
    with common.replacing(file.with_name(f"{file.name}.aux.xml")) as partial:
        partial.write_text(
            '<PAMDataset><PAMRasterBand band="1"><CategoryNames>'
            f"{listed}</CategoryNames></PAMRasterBand></PAMDataset>\n",
            encoding="utf-8",
            errors="replace",  # of names that are no text
        )


def write_bands(file: Path, bands: np.ndarray, nodata: float, more: dict, place: Place | None) -> None:
    """Bands (K, H, W) of one type and `more` tags, tiled and compressed (Deflate), whole or not at all.

    DataError above 4 GB, which a classic TIFF cannot hold.
    """
    count, height, width = bands.shape
    data, offsets, sizes = packed_tiles(bands, nodata)
    if len(data) > 2**32 - 2**20:
        raise DataError(f"{file}: a map of {len(data) / 1e9:.1f} GB: take a larger --stride")
    entries = {
        WIDTH: ("I", (width,)),
        HEIGHT: ("I", (height,)),
        BITS: ("H", (8 * bands.itemsize,) * count),
        COMPRESSION: ("H", (ADOBE_DEFLATE,)),
        SAMPLES: ("H", (count,)),
        PLANAR: ("H", (2,)),  # band after band
        TILE_WIDTH: ("I", (TILE,)),
        TILE_HEIGHT: ("I", (TILE,)),
        TILE_OFFSETS: ("I", tuple(offsets)),
        TILE_BYTES: ("I", tuple(sizes)),
        SAMPLE_FORMAT: ("H", (3 if bands.dtype.kind == "f" else 1,) * count),
        GDAL_NODATA: ("s", f"{nodata:g}".encode() + b"\0"),
        **place_tags(place),
        **more,
    }
    if count > 1:
        entries[EXTRA_SAMPLES] = ("H", (0,) * (count - 1))
    struct.pack_into("<I", data, 4, len(data))
    with common.replacing(file) as partial, open(partial, "wb") as stream:
        stream.write(data)
        stream.write(directory(entries, len(data)))


def packed_tiles(bands: np.ndarray, nodata: float) -> tuple[bytearray, list[int], list[int]]:
    """(a TIFF's first 8 bytes and all tiles, where each begins, its bytes); bands (K, H, W)."""
    _, height, width = bands.shape
    data, offsets, sizes = bytearray(struct.pack("<2sHI", b"II", 42, 0)), [], []
    for band in bands:
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                tile = np.full((TILE, TILE), nodata, bands.dtype)
                part = band[top : top + TILE, left : left + TILE]
                tile[: part.shape[0], : part.shape[1]] = part
                packed = zlib.compress(tile.tobytes(), 6)
                offsets.append(len(data))
                sizes.append(len(packed))
                data += packed + b"\0" * (len(packed) % 2)
    return data, offsets, sizes


def item(name: str, band: int, text: str, role: str = "") -> str:
    """A line of GDAL's metadata of a band; it escapes a text twice."""
    return f'<Item name="{name}" sample="{band}"{role}>{escape(escape(text))}</Item>'


def metadata(items: list[str]) -> bytes:
    """The XML in which GDAL keeps what it knows of the bands."""
    return f"<GDALMetadata>{''.join(items)}</GDALMetadata>\0".encode(errors="replace")


def place_tags(place: Place | None) -> dict[int, tuple[str, tuple | bytes]]:
    if place is None:
        return {}
    a, b, c, d, e, f = place.transform
    if b == d == 0 and a > 0 > e:
        tags = {PIXEL_SCALE: ("d", (a, -e, 0.0)), TIE_POINT: ("d", (0.0, 0.0, 0.0, c, f, 0.0))}
    else:
        tags = {TRANSFORM: ("d", (a, b, 0.0, c, d, e, 0.0, f, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0))}
    if place.keys:
        tags[GEO_KEYS] = ("H", place.keys)
    if place.doubles:
        tags[GEO_DOUBLES] = ("d", place.doubles)
    if place.text:
        tags[GEO_TEXT] = ("s", place.text)
    return tags

"""The TIFF format: what a file says of its pages before anything decodes them, and a directory to write.

    page, *more = pages(Path("scene.tif").read_bytes())
    page.bands, page.type, page.width  # 4, "uint16", 10980

Decoders open only the TIFFs they know, and cut the numbers of some to eight bits in silence: hence this. EXIF
notes in JPEG, PNG and WebP files are a TIFF without pixels: `directories` reads them too.
Sources: Adobe, TIFF 6.0 (1992); BigTIFF (libtiff's specification); OGC 19-008r4, GeoTIFF 1.1,
https://docs.ogc.org/is/19-008r4/19-008r4.html; GDAL's tags,
https://gdal.org/en/stable/drivers/raster/gtiff.html.
"""

import mmap
import struct
from collections.abc import Iterator
from typing import NamedTuple

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_ROWS, STRIP_BYTES = 266, 273, 274, 277, 278, 279
PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 284, 317, 322, 323, 324, 325
COLOUR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES, SUBSAMPLING = 320, 338, 339, 347, 530
PIXEL_SCALE, TIE_POINT, TRANSFORM = 33550, 33922, 34264
GEO_KEYS, GEO_DOUBLES, GEO_TEXT = 34735, 34736, 34737
GDAL_METADATA, GDAL_NODATA = 42112, 42113

# What is read, by the type that the values must have
WHOLE = {SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIP_OFFSETS, ORIENTATION, SAMPLES}
WHOLE |= {STRIP_ROWS, STRIP_BYTES, PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES}
WHOLE |= {EXTRA_SAMPLES, SAMPLE_FORMAT, SUBSAMPLING, GEO_KEYS, FILL_ORDER}
TEXTS = {JPEG_TABLES, GEO_TEXT, GDAL_NODATA}  # or bytes
FLOATS = {PIXEL_SCALE, TIE_POINT, TRANSFORM, GEO_DOUBLES}
READ = WHOLE | TEXTS | FLOATS

# Type of a tag's values -> struct's letter
WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
BYTES = {2: "s", 7: "s"}
DECIMALS = {11: "f", 12: "d"}
WRITTEN = {"B": 1, "s": 2, "H": 3, "I": 4, "d": 12}  # struct's letter -> type, of what is written
SAMPLE_NAMES = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "cint", 6: "complex"}  # by sample format
REDUCED, MASK = 1, 4  # bits of SUBFILE: an overview of another page, its transparency mask

Values = tuple | bytes  # of a tag; texts are bytes


class Page(NamedTuple):
    """One page: what the tags say, with the specification's defaults where they are silent."""

    width: int
    height: int
    bands: int
    type: str  # as NumPy names it: uint8, int16, float32, …
    colours: int  # PhotometricInterpretation: 0 and 1 grey, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 Lab
    extra: tuple[int, ...]  # of each band beyond the colours: 0 unspecified, 1 alpha in the colours, 2 alpha
    compression: int
    part: bool  # of another page: an overview or a mask
    mask: bool
    pieces: int  # strips or tiles that the file holds
    needed: int  # strips or tiles that the size asks for


# Reading


def pages(data: bytes | mmap.mmap) -> list[Page]:
    """The pages of a TIFF or BigTIFF in their order. ValueError where the file is damaged or is no TIFF."""
    return [page_of(tags) for tags in directories(data)]


def page_of(tags: dict[int, Values]) -> Page:
    """What the tags of one page say, with TIFF's defaults for those that are missing."""

    def first(tag: int, default: int) -> int:
        return tags.get(tag, (default,))[0]

    width, height = first(WIDTH, 0), first(HEIGHT, 0)
    separate = first(PLANAR, 1) == 2  # one band after the other
    planes = first(SAMPLES, 1) if separate else 1
    piece = (first(TILE_WIDTH, width), first(TILE_HEIGHT, first(STRIP_ROWS, height)))
    across, down = (
        -(-side // max(1, of_piece)) for side, of_piece in zip((width, height), piece, strict=True)
    )
    number = SAMPLE_NAMES.get(first(SAMPLE_FORMAT, 1), "unknown")
    return Page(
        width=width,
        height=height,
        bands=first(SAMPLES, 1),
        type=f"{number}{max(tags.get(BITS, (1,)))}",
        colours=first(PHOTOMETRIC, 1),
        extra=tags.get(EXTRA_SAMPLES, ()),
        compression=first(COMPRESSION, 1),
        part=bool(first(SUBFILE, 0) & (REDUCED | MASK)),
        mask=bool(first(SUBFILE, 0) & MASK),
        pieces=len(tags.get(TILE_OFFSETS, tags.get(STRIP_OFFSETS, ()))),
        needed=across * down * planes,
    )


def byte_order(data: bytes | mmap.mmap) -> str:
    """struct's sign of it, `<` or `>`. ValueError where the file is no TIFF."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16 or struct.unpack(order + "H", data[2:4])[0] not in (42, 43):
        raise ValueError("no TIFF header")
    return order


def directories(data: bytes | mmap.mmap) -> Iterator[dict[int, Values]]:
    """{tag: values} of each image directory, of the tags in READ. ValueError where one is damaged."""
    order = byte_order(data)
    big = struct.unpack(order + "H", data[2:4]) == (43,)
    seen = set()
    try:
        (place,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        while place and place not in seen:  # a directory that comes again is a loop, and ends the list
            seen.add(place)
            tags, place = read_directory(data, place, order, big)
            yield tags
    except (struct.error, OverflowError):  # a place beyond the file, or beyond any file
        raise ValueError("its directory of tags is damaged or cut off") from None


def read_directory(
    data: bytes | mmap.mmap, place: int, order: str, big: bool
) -> tuple[dict[int, Values], int]:
    """The tags of the directory at byte `place`, and the place of the next one, 0 after the last."""
    count_code, entry_code, next_code = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    (count,) = struct.unpack_from(order + count_code, data, place)
    place += struct.calcsize(order + count_code)
    tags = {}
    for _ in range(count):
        tag, kind, number, inline = struct.unpack_from(order + entry_code, data, place)
        place += struct.calcsize(order + entry_code)
        if tag in READ:
            letter = letter_of(tag, kind, number)
            tags[tag] = read_values(data, order, letter, number, inline, next_code)
    (following,) = struct.unpack_from(order + next_code, data, place)
    return tags, following


def letter_of(tag: int, kind: int, number: int) -> str:
    """struct's letter of a tag's values. ValueError where they are of a type that it cannot have, or none."""
    if tag in WHOLE:
        kinds, what = WHOLE_NUMBERS if number else {}, "whole numbers"
    else:
        kinds, what = (BYTES, "text") if tag in TEXTS else (DECIMALS, "decimals")
    if kind not in kinds:
        raise ValueError(f"its tag {tag} holds no {what}")
    return kinds[kind]


def read_values(
    data: bytes | mmap.mmap, order: str, letter: str, number: int, inline: bytes, pointer: str
) -> Values:
    """The values of one entry, from the entry itself where they fit, else from where it points. ValueError
    where the file ends before."""
    form = f"{order}{number}{letter}"
    size = struct.calcsize(form)
    if size <= len(inline):
        values = struct.unpack_from(form, inline)
    else:
        (offset,) = struct.unpack(order + pointer, inline)
        if offset + size > len(data):
            raise ValueError(f"a tag counts {number} values, which reach beyond the end of the file")
        values = struct.unpack_from(form, data, offset)
    return values[0] if letter == "s" else values


# Writing


def directory(entries: dict[int, tuple[str, Values]], start: int) -> bytes:
    """A little-endian directory that stands at byte `start`, and the values that do not fit into its
    entries. entries: tag -> (struct's letter, values)."""
    table, rest = [struct.pack("<H", len(entries))], b""
    after = start + 2 + 12 * len(entries) + 4
    for tag, (letter, values) in sorted(entries.items()):
        body = values if letter == "s" else struct.pack(f"<{len(values)}{letter}", *values)
        field = body.ljust(4, b"\0")
        if len(body) > 4:
            field = struct.pack("<I", after + len(rest))
            rest += body + b"\0" * (len(body) % 2)
        table.append(struct.pack("<HHI", tag, WRITTEN[letter], len(values)) + field)
    return b"".join(table) + struct.pack("<I", 0) + rest

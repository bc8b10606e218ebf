"""What a TIFF says of its pages before anything decodes them: size, bands, type, colours, orientation.

    page, *more = pages(Path("scene.tif").read_bytes())
    page.bands, page.type, page.width  # 4, "uint16", 10980

Decoders open only the TIFFs they know, and cut the numbers of some to eight bits in silence: hence this. EXIF
notes in JPEG, PNG and WebP files are a TIFF without pixels: `directories` reads them too.
Source: TIFF revision 6.0 (Adobe, 1992); BigTIFF (libtiff's specification).
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, COLOURS = 254, 256, 257, 258, 259, 262
STRIPS, ORIENTATION, BANDS, ROWS_OF_STRIP, PLANAR = 273, 274, 277, 278, 284
TILE_WIDTH, TILE_HEIGHT, TILES, EXTRA, NUMBERS = 322, 323, 324, 338, 339
COUNTED = {STRIPS, TILES}  # places of the parts in the file: it matters only how many there are
KNOWN = {SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, COLOURS, ORIENTATION, BANDS, ROWS_OF_STRIP, PLANAR}
KNOWN |= {TILE_WIDTH, TILE_HEIGHT, EXTRA, NUMBERS}

WHOLE_NUMBERS = {
    1: "B",
    3: "H",
    4: "I",
    16: "Q",
}  # field type -> code of struct, of all that the tags above hold
NUMBER_NAMES = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "cint", 6: "complex"}  # values of tag 339
REDUCED, MASK = 1, 4  # bits of tag 254: an overview of another page, its transparency mask
MOST_VALUES = 4096  # of one tag; a damaged count must not read the whole file


class Page(NamedTuple):
    """One page: what the tags say, with the specification's defaults where they are silent."""

    width: int
    height: int
    bands: int
    bits: tuple[int, ...]  # of each band
    type: str  # as NumPy names it: uint8, int16, float32, …
    colours: int  # PhotometricInterpretation: 0 and 1 grey, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 Lab
    extra: tuple[int, ...]  # of each band beyond the colours: 0 unspecified, 1 alpha in the colours, 2 alpha
    compression: int
    planar: int  # 1: the bands of a pixel lie together, 2: one band after the other
    orientation: int  # 1 to 8, as in EXIF
    part: bool  # of another page: an overview or a mask
    mask: bool
    pieces: int  # strips or tiles that the file holds
    needed: int  # strips or tiles that the size asks for


def pages(data: bytes) -> list[Page]:
    """The pages of a TIFF or BigTIFF in their order. ValueError where the file is damaged or is no TIFF."""
    return [page_of(tags) for tags in directories(data)]


def page_of(tags: dict[int, tuple[int, ...]]) -> Page:
    def first(tag: int, default: int) -> int:
        return tags.get(tag, (default,))[0]

    bits = tags.get(BITS, (1,))
    width, height, planar = first(WIDTH, 0), first(HEIGHT, 0), first(PLANAR, 1)
    planes = first(BANDS, 1) if planar == 2 else 1
    piece = (first(TILE_WIDTH, width), first(TILE_HEIGHT, first(ROWS_OF_STRIP, height)))
    across, down = (
        -(-side // max(1, of_piece)) for side, of_piece in zip((width, height), piece, strict=True)
    )
    number = NUMBER_NAMES.get(first(NUMBERS, 1), "unknown")
    return Page(
        width=width,
        height=height,
        bands=first(BANDS, 1),
        bits=bits,
        type=f"{number}{max(bits)}",
        colours=first(COLOURS, 1),
        extra=tags.get(EXTRA, ()),
        compression=first(COMPRESSION, 1),
        planar=planar,
        orientation=first(ORIENTATION, 1),
        part=bool(first(SUBFILE, 0) & (REDUCED | MASK)),
        mask=bool(first(SUBFILE, 0) & MASK),
        pieces=first(TILES, first(STRIPS, 0)),
        needed=across * down * planes,
    )


def directories(data: bytes) -> Iterator[dict[int, tuple[int, ...]]]:
    """{tag: values} of each image directory, of the tags named above. ValueError where one is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    version = struct.unpack(order + "H", data[2:4])[0] if order and len(data) >= 16 else None
    if version not in (42, 43):
        raise ValueError("no TIFF header")
    big = version == 43
    seen = set()
    try:
        (place,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        while place and place not in seen:  # a directory that comes again is a loop, and ends the list
            seen.add(place)
            tags, place = _directory(data, place, order, big)
            yield tags
    except (struct.error, OverflowError):  # a place beyond the file, or beyond any file
        raise ValueError("its directory of tags is damaged or cut off") from None


def _directory(data: bytes, place: int, order: str, big: bool) -> tuple[dict[int, tuple[int, ...]], int]:
    """The tags of the directory at byte `place`, and the place of the next one, 0 after the last."""
    count_code, entry_code, next_code = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    (count,) = struct.unpack_from(order + count_code, data, place)
    place += struct.calcsize(order + count_code)
    tags = {}
    for _ in range(count):
        tag, kind, n, inline = struct.unpack_from(order + entry_code, data, place)
        place += struct.calcsize(order + entry_code)
        if tag in COUNTED:
            tags[tag] = (n,)
        elif tag in KNOWN:
            if kind not in WHOLE_NUMBERS or not 0 < n <= MOST_VALUES:
                raise ValueError(f"its tag {tag} is damaged")
            tags[tag] = _values(data, order + str(n) + WHOLE_NUMBERS[kind], inline, order + next_code)
    (following,) = struct.unpack_from(order + next_code, data, place)
    return tags, following


def _values(data: bytes, code: str, inline: bytes, pointer: str) -> tuple[int, ...]:
    """The values of one entry, which stand in the entry itself where they fit."""
    if struct.calcsize(code) <= len(inline):
        return struct.unpack_from(code, inline)
    return struct.unpack_from(code, data, struct.unpack(pointer, inline)[0])

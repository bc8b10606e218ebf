"""Maps as GeoTIFFs: bands of float32, or numbers of classes in colours; tiled and compressed.

write_geotiff(Path("map.tif"), bands, ["Forest", "Water"], place)  # bands (2, H, W), nan: no data
write_class_map(Path("classes.tif"), numbers, ["Forest", "Water"], ["#117733", "#88ccee"], place)
"""

import struct
import zlib
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

import common
from common import DataError
from data import tiff
from data.geotiff import ADOBE_DEFLATE, Place

NO_CLASS = 255  # in a map of classes: no data
TILE = 256  # side of the tiles of a written file, pixels


def write_geotiff(file: Path, bands: np.ndarray, names: list[str], place: Place | None) -> None:
    """float32 bands (K, H, W) with their names; nan means no data. Errors as in `write_bands`."""
    items = [item("DESCRIPTION", i, name, ' role="description"') for i, name in enumerate(names)]
    entries = {tiff.PHOTOMETRIC: ("H", (1,)), tiff.GDAL_METADATA: ("s", metadata(items))}
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
        tiff.PHOTOMETRIC: ("H", (3,)),  # a palette …
        tiff.COLOUR_MAP: ("H", tuple((257 * table.T).ravel().tolist())),  # … of 16 bits, all reds first
        tiff.GDAL_METADATA: ("s", metadata(items)),
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
        tiff.WIDTH: ("I", (width,)),
        tiff.HEIGHT: ("I", (height,)),
        tiff.BITS: ("H", (8 * bands.itemsize,) * count),
        tiff.COMPRESSION: ("H", (ADOBE_DEFLATE,)),
        tiff.SAMPLES: ("H", (count,)),
        tiff.PLANAR: ("H", (2,)),  # band after band
        tiff.TILE_WIDTH: ("I", (TILE,)),
        tiff.TILE_HEIGHT: ("I", (TILE,)),
        tiff.TILE_OFFSETS: ("I", tuple(offsets)),
        tiff.TILE_BYTES: ("I", tuple(sizes)),
        tiff.SAMPLE_FORMAT: ("H", (3 if bands.dtype.kind == "f" else 1,) * count),
        tiff.GDAL_NODATA: ("s", f"{nodata:g}".encode() + b"\0"),
        **place_tags(place),
        **more,
    }
    if count > 1:
        entries[tiff.EXTRA_SAMPLES] = ("H", (0,) * (count - 1))
    struct.pack_into("<I", data, 4, len(data))
    with common.replacing(file) as partial, open(partial, "wb") as stream:
        stream.write(data)
        stream.write(tiff.directory(entries, len(data)))


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


def place_tags(place: Place | None) -> dict[int, tuple[str, tiff.Values]]:
    """GeoTIFF's tags of a place: tag -> (type, values); none without a place."""
    if place is None:
        return {}
    a, b, c, d, e, f = place.transform
    if b == d == 0 and a > 0 > e:
        tags = {tiff.PIXEL_SCALE: ("d", (a, -e, 0.0)), tiff.TIE_POINT: ("d", (0.0, 0.0, 0.0, c, f, 0.0))}
    else:
        tags = {tiff.TRANSFORM: ("d", (a, b, 0.0, c, d, e, 0.0, f, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0))}
    if place.keys:
        tags[tiff.GEO_KEYS] = ("H", place.keys)
    if place.doubles:
        tags[tiff.GEO_DOUBLES] = ("d", place.doubles)
    if place.text:
        tags[tiff.GEO_TEXT] = ("s", place.text)
    return tags

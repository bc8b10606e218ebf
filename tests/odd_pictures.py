"""Odd and damaged pictures from a seed: every mode in every format, written TIFFs, damage of many kinds.

    python tests/odd_pictures.py FOLDER [SEED [COUNT]]     # writes them to look at

`odd_pictures(seed)` holds one of each kind, undamaged; `make_corpus(folder, seed, count)` writes those and
damaged copies of them as files. The same seed gives the same bytes with the same version of Pillow.
"""

import io
import struct
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 32, 48
STRIPS, ORIENTATION = 273, 274  # tags: where the strips begin; the orientation, in EXIF and in TIFF
FORMATS = {"JPEG": "jpg", "PNG": "png", "TIFF": "tif", "BMP": "bmp", "WEBP": "webp"}
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")


def smooth(rng: np.random.Generator, bands: int = 3, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """A smooth random picture with some noise, uint8 (H, W, bands), as compression likes it."""
    height, width = size
    planes = []
    for _ in range(bands):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7), dtype=np.uint8))
        planes.append(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)))
    noisy = np.stack(planes, 2) + rng.normal(0, 4, (height, width, bands))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def saved(image: Image.Image, format: str, **options) -> bytes | None:
    """The image as a file, None where the format does not hold its mode."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, format, **options)
    except (OSError, ValueError, KeyError):
        return None
    return buffer.getvalue()


def odd_pictures(seed: int) -> dict[str, bytes]:
    """{file name: bytes} of one undamaged picture of each kind; the name says which one."""
    rng = np.random.default_rng(seed)
    found = modes_in_formats(rng)
    for make in (oriented, jpegs, pngs, bmps, several_pictures, written_tiffs, pillow_tiffs):
        found.update(make(rng))
    return {name: data for name, data in found.items() if data is not None}


def in_mode(rng: np.random.Generator, mode: str) -> Image.Image:
    """A smooth picture in one of Pillow's modes, with an alpha from 0 to 255 where it has one."""
    image = Image.fromarray(smooth(rng))
    if mode == "I;16":
        return Image.fromarray(smooth(rng, 1)[..., 0].astype(np.uint16) * 200)
    if mode == "LAB":
        profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
        return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    if mode == "PA":
        return image.convert("P").convert("PA")
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        alpha = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
        image.putalpha(Image.fromarray(alpha))
    return image


def modes_in_formats(rng: np.random.Generator) -> dict[str, bytes | None]:
    found = {}
    for mode in MODES:
        image = in_mode(rng, mode)
        for format, suffix in FORMATS.items():
            found[f"mode {mode.replace(';', '_')}.{suffix}"] = saved(image, format)
    return found


def oriented(rng: np.random.Generator) -> dict[str, bytes | None]:
    """EXIF's eight orientations, and numbers that are none."""
    found = {}
    image = Image.fromarray(smooth(rng))
    for number in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 300):
        exif = Image.Exif()
        exif[ORIENTATION] = number
        for format in ("JPEG", "PNG", "WEBP"):
            found[f"orientation {number}.{FORMATS[format]}"] = saved(image, format, exif=exif)
        found[f"orientation {number}.tif"] = saved(image, "TIFF", tiffinfo={ORIENTATION: number})
    return found


def jpegs(rng: np.random.Generator) -> dict[str, bytes | None]:
    image = Image.fromarray(smooth(rng))
    found = {f"chroma {s}.jpg": saved(image, "JPEG", subsampling=s, quality=90) for s in (0, 1, 2)}
    found["progressive.jpg"] = saved(image, "JPEG", progressive=True)
    found["progressive grey.jpg"] = saved(image.convert("L"), "JPEG", progressive=True)
    found["stored as RGB.jpg"] = saved(image, "JPEG", keep_rgb=True)
    found["restart markers.jpg"] = saved(image, "JPEG", restart_marker_rows=1)
    found["comment.jpg"] = saved(image, "JPEG", comment=b"a comment")
    found["odd sides.jpg"] = saved(image.crop((0, 0, 31, 17)), "JPEG")
    found["one pixel.jpg"] = saved(image.crop((0, 0, 1, 1)), "JPEG")
    cmyk = saved(image.convert("CMYK"), "JPEG")
    adobe = cmyk.index(b"Adobe")
    found["YCCK.jpg"] = cmyk[: adobe + 11] + b"\x02" + cmyk[adobe + 12 :]  # the same numbers, read as YCCK
    found["CMYK without Adobe's mark.jpg"] = cmyk[: adobe - 4] + cmyk[adobe + 12 :]
    plain = found["chroma 0.jpg"]
    found["12 bits.jpg"] = plain.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    found["notes after the end.jpg"] = plain + b"some camera's notes"
    found["empty EXIF.jpg"] = saved(image, "JPEG", exif=b"Exif\0\0")
    found["no TIFF as EXIF.jpg"] = saved(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    return found


def pngs(rng: np.random.Generator) -> dict[str, bytes | None]:
    image = Image.fromarray(smooth(rng))
    found = {f"palette of {n}.png": saved(image.quantize(n), "PNG") for n in (2, 4, 16, 256)}
    found["palette with a transparent colour.png"] = saved(image.quantize(16), "PNG", transparency=3)
    found["palette with alpha.png"] = saved(image.quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))
    found["grey with a transparent level.png"] = saved(image.convert("L"), "PNG", transparency=90)
    found["colour with a transparent colour.png"] = saved(image, "PNG", transparency=(1, 2, 3))
    for bits in (1, 2, 4):
        found[f"grey of {bits} bits.png"] = saved(image.convert("L"), "PNG", bits=bits)
    deep = smooth(rng, 4).astype(">u2") * 200
    for kind, bands in ((0, 1), (2, 3), (4, 2), (6, 4)):
        found[f"16 bits in {bands} bands.png"] = written_png(deep[..., :bands], kind)
    found["PNG inside.jpg"] = saved(image, "PNG")
    found["JPEG inside.png"] = saved(image, "JPEG")
    found["GIF inside.png"] = saved(image, "GIF")
    return found


def written_png(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16-bit numbers (H, W, bands), which Pillow does not write."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmps(rng: np.random.Generator) -> dict[str, bytes | None]:
    """Depths that Pillow reads but does not write: 5 bits a band; four bytes a pixel, either way up."""
    colours = smooth(rng)
    five = (colours >> 3).astype(np.uint16)
    packed = (five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2]).astype("<u2")
    padded = np.concatenate([colours[..., ::-1], np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], 2)
    return {
        "5 bits a band.bmp": written_bmp(packed[::-1].tobytes(), 16, HEIGHT),
        "four bytes a pixel.bmp": written_bmp(padded[::-1].tobytes(), 32, HEIGHT),
        "top down.bmp": written_bmp(padded.tobytes(), 32, -HEIGHT),
    }


def written_bmp(pixels: bytes, bits: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, height, 1, bits, 0, len(pixels), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


def several_pictures(rng: np.random.Generator) -> dict[str, bytes | None]:
    first, second = (Image.fromarray(smooth(rng)) for _ in range(2))
    pages = {"save_all": True, "append_images": [second]}
    return {
        "pages.tif": saved(first, "TIFF", **pages),
        "animation.webp": saved(first, "WEBP", **pages),
        "animation.png": saved(first, "PNG", **pages),
        "animation.gif": saved(first, "GIF", **pages),
        "two pictures.jpg": saved(first, "MPO", **pages),
    }


def pillow_tiffs(rng: np.random.Generator) -> dict[str, bytes | None]:
    image = Image.fromarray(smooth(rng))
    names = ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate", "tiff_deflate", "zstd", "lzma", "webp")
    found = {f"{name}.tif": saved(image, "TIFF", compression=name) for name in names}
    found["grey jpeg.tif"] = saved(image.convert("L"), "TIFF", compression="jpeg")
    found["palette lzw.tif"] = saved(image.convert("P"), "TIFF", compression="tiff_lzw")
    found["RGBA lzw.tif"] = saved(in_mode(rng, "RGBA"), "TIFF", compression="tiff_lzw")
    found["fax.tif"] = saved(image.convert("1"), "TIFF", compression="group4")
    found["lzw with differences.tif"] = saved(image, "TIFF", compression="tiff_lzw", tiffinfo={317: 2})
    return found


def written_tiffs(rng: np.random.Generator) -> dict[str, bytes]:
    """What satellite products hold and Pillow does not write: bands, types, planes, BigTIFF, overviews."""
    found = {}
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"):
        for bands in (1, 2, 3, 4, 5, 13):
            found[f"{bands} bands of {kind}.tif"] = written_tiff(smooth(rng, bands).astype(kind))
            if bands > 2:
                pixels = smooth(rng, bands).astype(kind)
                found[f"RGB of {bands} bands of {kind}.tif"] = written_tiff(pixels, colours=2)
    three, four = smooth(rng), smooth(rng, 4)
    for extra in (0, 1, 2, 999):
        found[f"fourth band {extra}.tif"] = written_tiff(four, colours=2, extra=extra)
    found["white is zero.tif"] = written_tiff(three[..., :1], colours=0)
    found["big-endian.tif"] = written_tiff(three, colours=2, order=">")
    found["planes.tif"] = written_tiff(three, colours=2, planar=2)
    found["BigTIFF.tif"] = written_tiff(three, colours=2, big=True)
    found["big-endian BigTIFF.tif"] = written_tiff(three, colours=2, order=">", big=True)
    found["CMYK.tif"] = written_tiff(four, colours=5)
    found["overview.tif"] = written_tiff(three, colours=2, following=(three[::2, ::2], 1))
    found["mask.tif"] = written_tiff(three, colours=2, following=(three[..., :1], 4))
    found["second page.tif"] = written_tiff(three, colours=2, following=(three, 0))
    return found


def written_tiff(
    pixels: np.ndarray,
    colours: int = 1,
    extra: int | None = None,
    planar: int = 1,
    order: str = "<",
    big: bool = False,
    following: tuple[np.ndarray, int] | None = None,
) -> bytes:
    """An uncompressed TIFF of pixels (H, W, bands); `extra` marks the bands beyond the colours.

    following: the pixels of a second page and its kind (tag 254: 0 a page, 1 an overview, 4 a mask).
    """
    mark = b"II" if order == "<" else b"MM"
    if big:
        data = mark + struct.pack(order + "HHHQ", 43, 8, 0, 16)
    else:
        data = mark + struct.pack(order + "HI", 42, 8)
    tags = tags_of(pixels, colours, extra, planar, 0)
    data += written_page(
        len(data), tags, strips_of(pixels, planar, order), order, big, last=following is None
    )
    if following is not None:
        image, subfile = following
        tags = tags_of(image, colours if image.shape[2] > 1 else 1, extra, planar, subfile)
        data += written_page(len(data), tags, strips_of(image, planar, order), order, big, last=True)
    return data


def strips_of(pixels: np.ndarray, planar: int, order: str) -> list[bytes]:
    """One strip of all bands, or one of each band."""
    parts = pixels.transpose(2, 0, 1) if planar == 2 else [pixels]
    return [part.astype(part.dtype.newbyteorder(order)).tobytes() for part in parts]


def written_page(begin: int, tags: dict, strips: list[bytes], order: str, big: bool, last: bool) -> bytes:
    """A directory that begins at byte `begin`, the values that do not fit into it, and the strips."""
    count, entry, word = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    room = struct.calcsize(order + word)
    size = struct.calcsize(order + count) + len(tags) * (struct.calcsize(order + entry) + room) + room
    packed = {tag: struct.pack(f"{order}{len(v)}{kind}", *v) for tag, (kind, v) in tags.items()}
    outside = sum(len(value) for value in packed.values() if len(value) > room)
    place = begin + size + outside
    places = [place + sum(map(len, strips[:i])) for i in range(len(strips))]
    packed[STRIPS] = struct.pack(f"{order}{len(strips)}I", *places)

    directory, values = struct.pack(order + count, len(tags)), b""
    for tag in sorted(tags):
        kind, numbers = tags[tag]
        value = packed[tag]
        if len(value) > room:
            value, values = struct.pack(order + word, begin + size + len(values)), values + value
        code = {"H": 3, "I": 4}[kind]
        directory += struct.pack(order + entry, tag, code, len(numbers)) + value.ljust(room, b"\0")
    pixels = b"".join(strips)
    directory += struct.pack(order + word, 0 if last else place + len(pixels))
    return directory + values + pixels


def tags_of(image: np.ndarray, colours: int, extra: int | None, planar: int, subfile: int) -> dict:
    """{tag: (struct code, values)} of one page."""
    height, width, bands = image.shape
    bits, number = 8 * image.itemsize, {"u": 1, "i": 2, "f": 3}[image.dtype.kind]
    strips = bands if planar == 2 else 1
    beyond = bands - {0: 1, 1: 1, 2: 3, 5: 4}[colours]
    tags = {
        254: ("I", [subfile]),
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * bands),
        259: ("H", [1]),
        262: ("H", [colours]),
        STRIPS: ("I", [0] * strips),
        277: ("H", [bands]),
        278: ("I", [height]),
        279: ("I", [image.nbytes // strips] * strips),
        284: ("H", [planar]),
        339: ("H", [number] * bands),
    }
    if beyond and extra is not None:
        tags[338] = ("H", [extra] * beyond)
    return tags


# Damage


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(0, len(data))]


def flip_bit(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(changed)


def flip_bit_of_header(data: bytes, rng: np.random.Generator) -> bytes:
    return flip_bit(data[:100], rng) + data[100:]


def zero_block(data: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.integers(1, 1 + min(512, len(data))))
    start = int(rng.integers(0, 1 + len(data) - length))
    return data[:start] + bytes(length) + data[start + length :]


def noise_block(data: bytes, rng: np.random.Generator) -> bytes:
    length = int(rng.integers(1, 1 + min(64, len(data))))
    start = int(rng.integers(0, 1 + len(data) - length))
    return data[:start] + rng.bytes(length) + data[start + length :]


def hole(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes are missing in the middle."""
    start, length = rng.integers(0, len(data)), rng.integers(1, 300)
    return data[:start] + data[start + length :]


def twice(data: bytes, rng: np.random.Generator) -> bytes:
    return data + data[: rng.integers(1, len(data))]


def text_for_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """A transfer as text: line ends of Windows."""
    return data.replace(b"\n", b"\r\n")


DAMAGE = (
    truncate,
    flip_bit,
    flip_bit,
    flip_bit_of_header,
    flip_bit_of_header,
    zero_block,
    noise_block,
    hole,
    twice,
    text_for_bytes,
)


def make_corpus(folder: Path, seed: int, count: int) -> list[Path]:
    """Write `count` files below `folder`: at most a third whole, each kind once; the others damaged."""
    rng = np.random.default_rng([seed, 1])
    kinds = odd_pictures(seed)
    names = list(kinds)
    rng.shuffle(names)
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        name = names[number % len(names)]
        data = kinds[name]
        word = "whole"
        if number >= min(len(names), count // 3):
            damage = DAMAGE[rng.integers(len(DAMAGE))]
            data, word = damage(data, rng), damage.__name__
        file = folder / f"{number:05d} {word} {name}"
        file.write_bytes(data)
        files.append(file)
    return files


if __name__ == "__main__":
    place, *numbers = sys.argv[1:]
    seed, count = [*map(int, numbers), *(0, 2000)[len(numbers) :]]
    print(f"{len(make_corpus(Path(place), seed, count))} files in {place}")

"""The decoder: what it reads and refuses, alike in the check and both loaders; the decoded array."""

import io
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from odd_pictures import make_corpus, odd_pictures, saved, smooth, written_tiff
from PIL import Image, ImageOps

from common import DataError
from data import pixels, tiff, tiles
from data.augment import Draw, view
from data.check import check_files
from data.pixels import LARGEST, common_size, decode, load_pixels, picture, read_picture, upright

RNG = np.random.default_rng(0)
COLOURS = smooth(RNG)  # (32, 48, 3)
GREY = COLOURS[..., :1]
IMAGE = Image.fromarray(COLOURS)


@pytest.fixture(scope="module")
def kinds():
    return odd_pictures(0)


def refusal_of(data: bytes) -> str:
    with pytest.raises(DataError) as refused:
        picture(data)
    return str(refused.value)


# What is read


def test_the_pixels_are_those_of_the_file():
    rgb = COLOURS.transpose(2, 0, 1)
    for data in (
        saved(IMAGE, "PNG"),
        saved(IMAGE, "BMP"),
        saved(IMAGE, "TIFF"),
        written_tiff(COLOURS, colours=2),
    ):
        assert (picture(data) == rgb).all()
    for planar, order, big in ((2, "<", False), (1, ">", False), (1, "<", True)):
        assert (picture(written_tiff(COLOURS, 2, planar=planar, order=order, big=big)) == rgb).all()
    assert (picture(saved(IMAGE, "WEBP", lossless=True)) == rgb).all()
    jpeg = saved(IMAGE, "JPEG")
    assert (picture(jpeg).transpose(1, 2, 0) == np.asarray(Image.open(io.BytesIO(jpeg)))).all()


def test_grey_becomes_three_equal_bands():
    for data in (saved(Image.fromarray(GREY[..., 0]), "PNG"), written_tiff(GREY)):
        assert (picture(data) == GREY.transpose(2, 0, 1)).all()
    assert (picture(written_tiff(GREY, colours=0)) == 255 - GREY.transpose(2, 0, 1)).all()


def test_alpha_is_dropped_and_the_colours_stay():
    image = IMAGE.copy()
    image.putalpha(0)
    for data in (saved(image, "PNG"), saved(image, "TIFF")):
        assert (picture(data) == COLOURS.transpose(2, 0, 1)).all()
    palette = IMAGE.quantize(16)
    seen = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert (picture(saved(palette, "PNG", transparency=3)) == seen).all()


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_orientation_is_applied(format, number):
    exif = Image.Exif()
    exif[tiff.ORIENTATION] = number
    notes = {"tiffinfo": {tiff.ORIENTATION: number}} if format == "TIFF" else {"exif": exif}
    exact = {"lossless": True} if format == "WEBP" else {}
    plain = picture(saved(IMAGE, format, **exact))
    turned = picture(saved(IMAGE, format, **exact, **notes))
    expected = Image.fromarray(np.ascontiguousarray(plain.transpose(1, 2, 0)))
    expected.getexif()[tiff.ORIENTATION] = number
    expected = np.asarray(ImageOps.exif_transpose(expected)).transpose(2, 0, 1)
    assert turned.shape == expected.shape and (turned == expected).all()
    assert (turned == upright(plain, number)).all()


def test_overviews_and_masks_are_no_pages():
    rgb = COLOURS.transpose(2, 0, 1)
    for following in ((COLOURS[::2, ::2], 1), (GREY, 4)):
        assert (picture(written_tiff(COLOURS, colours=2, following=following)) == rgb).all()
    assert "2 pages" in refusal_of(written_tiff(COLOURS, colours=2, following=(COLOURS, 0)))


# What is refused


@pytest.mark.parametrize(
    "name, words",
    [
        ("1 bands of uint16.tif", "1 band of uint16; 8-bit RGB is needed: python -m data.tiles FOLDER/*.tif"),
        ("RGB of 3 bands of uint16.tif", "3 bands of uint16"),
        ("RGB of 3 bands of int8.tif", "3 bands of int8"),
        ("1 bands of int16.tif", "1 band of int16"),
        ("1 bands of float32.tif", "1 band of float32"),
        ("13 bands of uint16.tif", "13 bands of uint16"),
        ("13 bands of uint8.tif", "13 bands of uint8"),
        ("2 bands of uint8.tif", "2 bands of uint8"),
        ("fourth band 0.tif", "4 bands of uint8 of which none is marked as plain alpha"),
        ("fourth band 1.tif", "4 bands of uint8 of which none is marked as plain alpha"),
        ("mode LAB.tif", "3 bands of uint8 in Lab colours"),
        ("mode 1.tif", "1 band of uint1"),
        ("mode F.tif", "1 band of float32"),
        ("16 bits in 1 bands.png", "1 band of uint16"),
        ("16 bits in 3 bands.png", "3 bands of uint16"),
        ("16 bits in 4 bands.png", "4 bands of uint16"),
        ("5 bits a band.bmp", "3 bands of uint5"),
        ("CMYK without Adobe's mark.jpg", "4 bands of uint8 in CMYK colours"),
        ("animation.png", "2 pictures in one file"),
        ("animation.webp", "2 pictures in one file"),
        ("pages.tif", "2 pages"),
        ("GIF inside.png", "not a valid JPEG, PNG, TIFF, BMP or WebP file: begins with b'GIF8"),
    ],
)
def test_a_refusal_names_bands_and_type(kinds, tmp_path, name, words):
    (tmp_path / name).write_bytes(kinds[name])
    with pytest.raises(DataError) as refused:
        read_picture(tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name}: ") and words in str(refused.value)
    problem = check_files(tmp_path, [name], tmp_path / "manifest.csv", 1)["problem"][0]
    assert str(refused.value) == f"{tmp_path / name}: {problem}"


def test_advice_stretches_every_file_alike(kinds, tmp_path):
    stretch = "gdal_translate -b 4 -b 3 -b 2 -ot Byte -scale 0 3558 0 255"
    said = refusal_of(kinds["13 bands of uint16.tif"])
    assert stretch in said and "predict.py" not in said
    png = refusal_of(kinds["16 bits in 4 bands.png"])
    assert "-b R -b G -b B -ot Byte -scale 0 3558" in png and "data.tiles" not in png  # it reads no deep PNG
    assert "-scale 0 1 0 255" in refusal_of(kinds["mode 1.tif"])
    (tmp_path / "patch.tif").write_bytes(kinds["13 bands of uint16.tif"])
    advice = re.search(r"data.tiles FOLDER/\*.tif (.+) --size SIDE", said)[1].split()
    tiles.main([str(tmp_path / "patch.tif"), *advice, "--size", "32", "--out", str(tmp_path / "out")])
    assert [read_picture(file).shape for file in (tmp_path / "out").iterdir()] == [(3, 32, 32)]


def test_what_gdal_reads_is_named():
    hint = "it is {}: gdal_translate IN OUT.tif"
    for options in ({}, {"no_jp2": True}):
        assert hint.format("JPEG 2000") in refusal_of(saved(IMAGE, "JPEG2000", **options))
    assert hint.format("a virtual file of GDAL") in refusal_of(b'<VRTDataset rasterXSize="9">')


def test_a_rare_compression_is_refused():
    data = written_tiff(COLOURS, colours=2)
    method = data.index(b"\x03\x01\x03\0\x01\0\0\0\x01\0") + 8
    lzma = data[:method] + (34925).to_bytes(2, "little") + data[method + 2 :]
    assert "compressed by a rare method (number 34925)" in refusal_of(lzma)


def test_a_tiff_that_lacks_strips_is_refused():
    data = written_tiff(COLOURS, colours=2)
    height = data.index(b"\x01\x01\x04\0\x01\0\0\0\x20\0\0\0") + 8
    taller = data[:height] + b"\x40" + data[height + 1 :]  # twice the rows that the one strip holds
    assert "1 strips or tiles, its size asks for 2" in refusal_of(taller)


def test_the_limit_of_the_check_is_that_of_the_decoder(tmp_path):
    """A JPEG's header that says 14,000 x 14,000: nothing of that size is decoded to find out."""
    data = bytearray(saved(IMAGE, "JPEG"))
    frame = data.index(b"\xff\xc0") + 5
    data[frame : frame + 4] = (14_000).to_bytes(2, "big") * 2
    (tmp_path / "huge.jpg").write_bytes(data)
    assert LARGEST < 14_000**2
    with pytest.raises(DataError, match="14,000 x 14,000 pixels; a picture has at most 178,956,970"):
        decode(tmp_path / "huge.jpg", 32, 32)
    problem = check_files(tmp_path, ["huge.jpg"], tmp_path / "manifest.csv", 1)["problem"][0]
    assert problem.startswith("14,000 x 14,000 pixels")
    with pytest.raises(DataError, match="truncated|Corrupt|damaged"):
        picture(bytes(data)[:-2], largest=None)


def test_a_picture_larger_than_a_limit_is_read_without_one():
    data = saved(IMAGE, "PNG")
    with pytest.raises(DataError, match="48 x 32 pixels"):
        picture(data, largest=1000)
    assert picture(data, largest=None).shape == (3, 32, 48)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        read_picture(tmp_path / "gone.jpg")
    assert missing.value.filename == str(tmp_path / "gone.jpg")


# The same everywhere


def test_check_and_decoder_agree_on_a_damaged_corpus(tmp_path):
    """A good file decodes; one that does not decode is bad, in the same words unless libtiff has better ones.

    What only the check hears are libjpeg's complaints about a JPEG that it decodes all the same.
    """
    files = make_corpus(tmp_path / "corpus", seed=0, count=150)
    names = [file.name for file in files]
    table = check_files(tmp_path / "corpus", names, tmp_path / "manifest.csv", 1)
    sizes = zip(table["height"], table["width"], strict=True)
    for file, problem, size in zip(files, table["problem"], sizes, strict=True):
        try:
            decoded = read_picture(file)
        except DataError as error:
            said = str(error).removeprefix(f"{file}: ")
            assert problem == said or (problem and said.startswith("damaged: decoder error")), file.name
        else:
            assert problem == "" or problem.startswith("Corrupt JPEG data"), file.name
            assert decoded.dtype == np.uint8 and decoded.shape == (3, *size), file.name
    assert 10 < (table["problem"] == "").sum() < 140  # both kinds are among them


def test_the_corpus_is_the_same_for_a_seed(tmp_path):
    first, again, other = (make_corpus(tmp_path / n, seed, 30) for n, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in again]
    assert [f.read_bytes() for f in first] != [f.read_bytes() for f in other]


def dali_pixels(files) -> list[np.ndarray]:
    """What DALI decodes of each file, as `data.dali` does."""
    dali = pytest.importorskip("nvidia.dali")
    paths = [np.frombuffer(os.fsencode(file), np.uint8) for file in files]

    @dali.pipeline_def(batch_size=len(paths), num_threads=1, device_id=None)
    def decoded():
        data = dali.fn.io.file.read(dali.fn.external_source(source=lambda: paths, batch=True))
        return dali.fn.decoders.image(data, device="cpu", adjust_orientation=True)

    (images,) = decoded().run()
    return [np.asarray(images[i]).transpose(2, 0, 1) for i in range(len(paths))]


def test_dali_gives_the_same_pixels_of_every_picture_that_is_read(kinds, tmp_path):
    ours = {}
    for name, data in kinds.items():
        try:
            ours[tmp_path / name] = picture(data)
        except DataError:
            continue
        (tmp_path / name).write_bytes(data)
    assert len(ours) > 100
    for (file, mine), theirs in zip(ours.items(), dali_pixels(ours), strict=True):
        assert mine.shape == theirs.shape, file.name
        # palettes of 16 bits and CMYK are rounded otherwise in a TIFF
        most = 1 if file.name in ("mode P.tif", "palette lzw.tif", "CMYK.tif") else 0
        assert np.abs(mine.astype(int) - theirs).max() <= most, file.name


def test_a_picture_of_another_size_is_scaled_as_a_whole(tmp_path):
    """A half of the area stays a half, in the torch loader's pixels and in DALI's views alike."""
    halves = np.zeros((64, 128, 3), np.uint8)
    halves[:, 64:] = 200
    Image.fromarray(halves).save(tmp_path / "wide.png")
    decoded = decode(tmp_path / "wide.png", 64, 64)
    assert decoded.shape == (3, 64, 64)
    assert (decoded[..., :31] == 0).all() and (decoded[..., 33:] == 200).all()
    assert abs(decoded.mean() - 100) < 0.5

    small = smooth(np.random.default_rng(1), size=(20, 80))
    Image.fromarray(small).save(tmp_path / "small.png")
    assert abs(decode(tmp_path / "small.png", 64, 64).mean((1, 2)) - small.mean((0, 1))).max() < 1


class Fixed:
    """A plan of one step: image 0 and no other, both views drawn alike."""

    height, width = 64, 64

    def __init__(self, drawn: Draw):
        self.drawn = drawn

    def steps(self):
        return 1

    def largest(self):
        return 1

    def epoch(self, epoch, start=0):
        yield np.arange(1), self.drawn, self.drawn


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (100, 100), (48, 40)])
def test_both_loaders_see_the_same_part_of_a_picture_of_another_size(tmp_path, shape):
    dali = pytest.importorskip("data.dali", exc_type=ImportError)
    Image.fromarray(smooth(np.random.default_rng(2), size=shape)).save(tmp_path / "other.png")
    drawn = Draw(
        box=torch.tensor([[8, 16, 40, 32]]),
        flip=torch.tensor([[False, True]]),
        factor=torch.ones(1, 3),
        order=torch.arange(3)[None],
        sigma=torch.zeros(1),
        turn=torch.tensor([False]),
    )
    levels = {"mean": [0, 0, 0], "std": [1 / 255] * 3}
    decoded = torch.from_numpy(decode(tmp_path / "other.png", 64, 64).copy())[None]
    mine = view(decoded, drawn, 32, **levels)
    cpu = torch.device("cpu")
    loader = dali.DaliLoader(tmp_path, ["other.png"], Fixed(drawn), 32, **levels, device=cpu, workers=1)
    ((theirs, _),) = loader.epoch(0)
    inside = (mine - theirs).abs()[..., 2:-2, 2:-2]
    assert inside.max() < 1.5  # grey levels: one decoder or the other rounds between its two resizes


# The decoded array


@pytest.fixture
def folder(tmp_path):
    """Six small pictures, one of another size."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(6):
        Image.fromarray(smooth(np.random.default_rng(i), size=(16, 16 + (i == 5)))).save(root / f"{i}.png")
    return root, np.array([f"{i}.png" for i in range(6)], dtype=object)


def test_shared_pixels_are_those_in_memory(folder, tmp_path):
    root, files = folder
    memory = load_pixels(root, files, 16, 16, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    shared = load_pixels(root, files, 16, 16, cache=tmp_path / "cache", share=True)
    assert torch.equal(memory, shared)
    (file,) = (tmp_path / "cache").iterdir()  # no lock and no temporary file is left
    shared[0] = 0
    again = load_pixels(root, files, 16, 16, cache=tmp_path / "cache", share=True)
    assert torch.equal(memory, again) and file.stat().st_size == memory.numel()


def build(root, files, cache, slow, queue):
    """In a process of its own: load, and say whether this process decoded."""
    decoded = []

    def slowly(*arguments):
        decoded.append(1)
        time.sleep(slow)
        return decode(*arguments)

    pixels.decode = slowly
    total = load_pixels(root, files, 16, 16, cache=cache, share=True, workers=1).sum().item()
    queue.put((len(decoded), total))


def start(*arguments):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=build, args=(*arguments, queue))
    process.start()
    return process, queue


def test_of_several_processes_one_decodes(folder, tmp_path):
    root, files = folder
    started = [start(root, files, tmp_path / "cache", 0.1) for _ in range(3)]
    answers = [queue.get(timeout=60) for _, queue in started]
    for process, _ in started:
        process.join(60)
    assert sorted(count for count, _ in answers) == [0, 0, 6]
    assert len({total for _, total in answers}) == 1
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".u8"]


def test_what_a_killed_build_leaves_is_removed(folder, tmp_path):
    root, files = folder
    cache = tmp_path / "cache"
    process, _ = start(root, files, cache, 10)
    until = time.monotonic() + 60
    while not list(cache.glob(".pixels-*")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert list(cache.glob(".pixels-*"))
    load_pixels(root, files[:4], 16, 16, cache=cache, share=True)  # another set: it need not be the same one
    assert not list(cache.glob(".pixels-*"))
    load_pixels(root, files, 16, 16, cache=cache, share=True)
    assert sorted(file.suffix for file in cache.iterdir()) == [".u8", ".u8"]


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch):
    root, files = folder

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"need 4.61e-06 GB, .* GB are free \(No space left on device\)"):
        load_pixels(root, files, 16, 16, cache=tmp_path / "cache", share=True)
    assert not list((tmp_path / "cache").iterdir())


def test_too_little_memory_is_one_line(folder, tmp_path):
    root, files = folder
    with pytest.raises(DataError, match=f"{root}: not enough memory for the decoded pixels"):
        load_pixels(root, files, 10**8, 10**8, cache=tmp_path / "cache", in_memory=1 << 62)


def test_a_bad_file_ends_the_build_and_is_named(folder, tmp_path):
    root, files = folder
    (root / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="3.png: not a valid"):
        load_pixels(root, files, 16, 16, cache=tmp_path / "cache", share=True)
    (root / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match="3.png"):
        load_pixels(root, files, 16, 16, cache=tmp_path / "cache", share=True)
    assert not list((tmp_path / "cache").iterdir())


def test_names_that_are_no_text_have_a_place_in_the_cache(folder, tmp_path):
    root, _ = folder
    name = os.fsdecode(b"caf\xe9.png")
    try:
        IMAGE.save(root / name)
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    files = np.array([name], dtype=object)
    assert load_pixels(root, files, 32, 48, cache=tmp_path / "cache", share=True).shape == (1, 3, 32, 48)


def test_the_common_size_is_that_of_the_upright_pictures(tmp_path):
    exif = Image.Exif()
    exif[tiff.ORIENTATION] = 6
    for i in range(3):
        IMAGE.save(tmp_path / f"{i}.jpg", exif=exif)
    table = check_files(tmp_path, [f"{i}.jpg" for i in range(3)], tmp_path / "manifest.csv", 1)
    assert common_size(table) == (48, 32)

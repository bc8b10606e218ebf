"""Scenes against rasterio: what is read, where it lies, what is written, and the patches cut from them."""

import contextlib
import os
import socket
import struct
import time
import tracemalloc
import weakref
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refused
from PIL import Image, TiffImagePlugin

import predict
from common import ConfigError, DataError
from data import geomaps, geotiff, tiff, tiles
from data.geomaps import write_class_map
from data.geotiff import Tiff
from data.scenes import (
    BLOCKS,
    SAMPLE,
    Grid,
    Scene,
    Values,
    choose_look,
    far,
    grid_of,
    open_scene,
    places,
    read_scale,
    spread,
    values_of,
)
from models import dense
from models.backbone import build_backbone
from models.saved import load_model
from plots.maps import colour_numbers, palette

rasterio = pytest.importorskip(
    "rasterio", reason="rasterio, which the reader is tested against, is not installed"
)
from rasterio.transform import Affine, from_origin  # noqa: E402

SIDE = 32  # of the patches of the model below


def values(dtype, bands, height=90, width=110, seed=0):
    """Rough pictures in a type's own range."""
    steps = np.random.default_rng(seed).integers(-9, 10, (bands, height, width)).cumsum(2)
    return (np.abs(steps) % 200 + (1000 if np.dtype(dtype).itemsize > 1 else 20)).astype(dtype)


def write(file, array, **profile):
    bands, height, width = array.shape
    size = {"count": bands, "height": height, "width": width, "dtype": array.dtype}
    profile = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 10, 10)} | profile
    with rasterio.open(file, "w", driver="GTiff", **size, **profile) as target:
        target.write(array)
    return file


LAYOUTS = {
    "strips": {},
    "tiles": {"tiled": True, "blockxsize": 32, "blockysize": 48},
    "lines": {"blockysize": 7},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype, bands, compress, predictor, interleave, endianness, big",
    [
        ("uint8", 3, None, 1, "pixel", "LITTLE", "NO"),
        ("uint8", 5, "lzw", 2, "band", "LITTLE", "NO"),
        ("uint8", 3, "packbits", 1, "pixel", "BIG", "YES"),
        ("uint16", 13, "lzw", 2, "pixel", "LITTLE", "NO"),
        ("uint16", 4, "deflate", 2, "band", "BIG", "YES"),
        ("int16", 3, "zstd", 2, "pixel", "LITTLE", "NO"),
        ("uint32", 2, None, 1, "band", "BIG", "NO"),
        ("float32", 3, "deflate", 3, "pixel", "LITTLE", "YES"),
        ("float32", 3, "lzw", 3, "pixel", "BIG", "NO"),
        ("float64", 2, "lzma", 3, "band", "LITTLE", "NO"),
        ("float32", 3, "deflate", 2, "pixel", "BIG", "NO"),
        ("float64", 2, "zstd", 2, "band", "LITTLE", "NO"),
        ("int8", 2, "lzw", 2, "pixel", "LITTLE", "NO"),
    ],
)
def test_windows_equal_rasterio(
    tmp_path, layout, dtype, bands, compress, predictor, interleave, endianness, big
):
    array = values(dtype, bands)
    options = {"interleave": interleave, "endianness": endianness, "bigtiff": big, **LAYOUTS[layout]}
    file = write(tmp_path / "s.tif", array, compress=compress, predictor=predictor, **options)
    tiff = Tiff(file)
    assert tiff.dtype == dtype and (tiff.bands, tiff.height, tiff.width) == array.shape
    assert (tiff.read(0, 0, 90, 110) == array).all()
    for top, left, height, width in ((31, 40, 50, 70), (0, 0, 1, 1), (89, 109, 1, 1), (47, 31, 2, 2)):
        window = tiff.read(top, left, height, width)
        assert window.dtype == dtype
        assert (window == array[:, top : top + height, left : left + width]).all()


def test_patches_row_by_row_unpack_each_tile_once(tmp_path, monkeypatch):
    """Of wide scenes a row of tiles is larger than KEPT."""
    file = write(tmp_path / "s.tif", values("uint8", 3), compress="deflate", **LAYOUTS["tiles"])
    monkeypatch.setattr(geotiff, "KEPT", 0)
    unpacked, unpack = [], Tiff.unpacked
    monkeypatch.setattr(Tiff, "unpacked", lambda self, *rest: unpacked.append(1) or unpack(self, *rest))
    scene = Tiff(file)
    for top in range(0, scene.height - 15, 8):
        for left in range(0, scene.width - 15, 8):
            scene.read(top, left, 16, 16)
    down, across = scene.chunks()
    assert len(unpacked) == down * across > 4


def test_little_memory_has_room_for_a_pixel_of_all_bands(tmp_path, monkeypatch):
    file = write(tmp_path / "s.tif", values("uint8", 5), interleave="band", **LAYOUTS["tiles"])
    monkeypatch.setattr(geotiff, "memory", lambda: 0)
    assert Tiff(file).most_kept() == geotiff.KEPT // (32 * 48)
    monkeypatch.setattr(geotiff, "KEPT", 0)
    assert Tiff(file).most_kept() == 5


def with_tag(file, tag, value):
    """The file with a short tag of its first directory changed in place."""
    content = bytearray(file.read_bytes())
    (start,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, start)
    places = {
        struct.unpack_from("<H", content, start + 2 + 12 * i)[0]: start + 2 + 12 * i for i in range(entries)
    }
    struct.pack_into("<H", content, places[tag] + 8, value)
    file.write_bytes(content)


def test_a_predictor_that_cannot_be_is_refused(tmp_path):
    file = write(tmp_path / "s.tif", values("uint16", 3), compress="deflate", predictor=2)
    for odd in (3, 7):
        with_tag(file, 317, odd)
        with pytest.raises(DataError, match=f"predictor {odd} for uint16"):
            Tiff(file)


def test_jpeg_in_a_tiff(tmp_path):
    array = np.full((3, 96, 112), [[[90]], [[140]], [[60]]], np.uint8)
    for photometric in ("RGB", "YCBCR"):
        options = {"compress": "jpeg", "photometric": photometric, "tiled": True, "blockxsize": 32}
        file = write(tmp_path / "j.tif", array, blockysize=32, **options)
        assert np.abs(Tiff(file).read(5, 5, 80, 90).astype(int) - array[:, :80, :90]).max() <= 3


def test_what_a_file_says_of_itself(tmp_path):
    file = write(tmp_path / "n.tif", values("int16", 3), nodata=-32768)
    assert Tiff(file).nodata() == -32768 and Tiff(file).alpha() is None
    rgba = write(tmp_path / "a.tif", values("uint8", 4), photometric="RGB", alpha="YES")
    assert Tiff(rgba).alpha() == 3 and Tiff(rgba).nodata() is None
    for nodata in (-5, None):
        empty = np.full((3, 90, 110), nodata or 0, np.int16)
        sparse = write(tmp_path / "sparse.tif", empty, nodata=nodata, sparse_ok=True)
        assert set(Tiff(sparse).sizes) == {0} and (Tiff(sparse).read(0, 0, 90, 110) == empty).all()


TRANSFORMS = {
    "north up": from_origin(5e5, 5e6, 10, 10),
    "rotated": Affine(8.0, 3.0, 5e5, 2.5, -9.0, 5e6),
    "south up": Affine(10.0, 0.0, 5e5, 0.0, 10.0, 5e6),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("point", [False, True])
def test_place_equals_rasterio(tmp_path, name, point):
    file = write(tmp_path / "s.tif", values("uint8", 3), transform=TRANSFORMS[name])
    if point:
        with rasterio.open(file, "r+") as target:
            target.update_tags(AREA_OR_POINT="Point")
    place = Tiff(file).place()
    with rasterio.open(file) as source:
        assert np.allclose(place.transform, source.transform[:6], atol=1e-9, rtol=0)
        assert place.at(3, 7) == pytest.approx(source.xy(7, 3, offset="ul"), abs=1e-9)
    assert not place.geographic
    bands = np.random.default_rng(1).random((2, 300, 260), np.float32)
    bands[0, 5:9] = np.nan
    geomaps.write_geotiff(tmp_path / "m.tif", bands, ["Forest & <wood>", "Café"], place)
    with rasterio.open(tmp_path / "m.tif") as written:
        assert np.array_equal(written.read(), bands, equal_nan=True)
        assert written.crs.to_epsg() == 32633 and np.isnan(written.nodata)
        assert np.allclose(written.transform[:6], place.transform, atol=1e-9, rtol=0)
        assert written.descriptions == ("Forest & <wood>", "Café")
        assert written.profile["tiled"] and written.compression.value == "DEFLATE"


def test_geotiff_without_a_place(tmp_path):
    geomaps.write_geotiff(tmp_path / "m.tif", np.ones((1, 3, 4), np.float32), ["a"], None)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning), rasterio.open(tmp_path / "m.tif") as written:
        assert written.crs is None and (written.read() == 1).all()


def test_damage_is_one_line(tmp_path):
    file = write(tmp_path / "s.tif", values("uint16", 3), compress="deflate")
    whole = file.read_bytes()
    for size in (6, 200, len(whole) // 2, len(whole) - 1000):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match="s.tif"):
            Tiff(file).read(0, 0, 90, 110)
    lerc = tmp_path / "c.tif"
    write(lerc, values("uint16", 3).astype(np.complex64))
    with pytest.raises(DataError, match="c.tif: has complex numbers: gdal_translate"):
        Tiff(lerc)


WHOLE_PAGE = {
    256: ("I", (40,)), 257: ("I", (30,)), 258: ("H", (8, 8, 8)), 259: ("H", (1,)), 262: ("H", (2,)),
    273: ("I", (8,)), 277: ("H", (3,)), 278: ("I", (30,)), 279: ("I", (3600,)), 284: ("H", (1,)),
}  # fmt: skip


@pytest.mark.parametrize(
    "odd, said",
    [
        ({277: ("H", (0,)), 284: ("H", (0,))}, "0 bands"),
        ({277: ("I", (2**32 - 1,))}, "4294967295 bands"),
        ({277: ("I", (2**32 - 1,)), 284: ("I", (2**32 - 1,))}, "4294967295 bands"),
        ({256: ("d", (40.0,))}, "tag 256 holds no whole numbers"),
        ({258: ("H", ())}, "tag 258 holds no whole numbers"),
        ({42113: ("H", (7,))}, "tag 42113 holds no text"),
        ({259: ("H", (7,)), 347: ("B", (1, 2, 3))}, "tag 347 holds no text"),
        ({33550: ("I", (10, 1))}, "tag 33550 holds no decimals"),
        ({338: ("H", (0, 0, 1))}, "none of its 3 bands is a colour"),
        ({339: ("H", (4, 4, 4))}, "has numbers of no type, or of several"),
        ({279: ("I", (2**31,)), 257: ("I", (2**31,)), 278: ("I", (2**31,))}, "bytes are missing at its end"),
    ],
)
def test_odd_headers_are_one_line(model, tmp_path, capsys, odd, said):
    content = b"II*\0" + struct.pack("<I", 8 + 3600) + bytes(3600)
    file = tmp_path / "odd.tif"
    file.write_bytes(content + tiff.directory(WHOLE_PAGE | odd, 8 + 3600))
    began = time.perf_counter()
    assert said in refused(capsys, predict.main, model, file, "--device", "cpu", "--out", tmp_path / "m.csv")
    assert time.perf_counter() - began < 5


PLACES = {
    "as usual": ((10.0, 10.0, 0.0), None, (10, 0, 500, 0, -10, 4000)),
    "a scale with a sign": ((10.0, -10.0, 0.0), None, (10, 0, 500, 0, -10, 4000)),
    "a scale and a matrix": ((10.0, 10.0, 0.0), (0.0,) * 16, (10, 0, 500, 0, -10, 4000)),
    "a matrix": (None, (9.0, 1.0, 0.0, 3.0, 1.0, -9.0, 0.0, 4.0) + (0.0,) * 8, (9, 1, 3, 1, -9, 4)),
    "a scale of zero": ((0.0, 0.0, 0.0), None, None),
}


@pytest.mark.parametrize("scale, matrix, place", PLACES.values(), ids=PLACES)
def test_a_place_is_read_as_gdal_reads_it(tmp_path, scale, matrix, place):
    tie = (0.0, 0.0, 0.0, 500.0, 4000.0, 0.0)
    tags = WHOLE_PAGE | ({33550: ("d", scale), 33922: ("d", tie)} if scale else {})
    tags |= {34264: ("d", matrix)} if matrix else {}
    file = tmp_path / "placed.tif"
    file.write_bytes(b"II*\0" + struct.pack("<I", 8 + 3600) + bytes(3600) + tiff.directory(tags, 8 + 3600))
    found = Tiff(file).place()
    assert found == (place and geotiff.Place(place))
    with rasterio.open(file) as gdal:
        assert gdal.transform.is_identity if place is None else gdal.transform[:6] == found.transform


def test_bytes_that_are_turned_round_are_not_read(tmp_path):
    tags = WHOLE_PAGE | {266: ("H", (2,))}
    file = tmp_path / "s.tif"
    file.write_bytes(b"II*\0" + struct.pack("<I", 8 + 3600) + bytes(3600) + tiff.directory(tags, 8 + 3600))
    with pytest.raises(DataError, match="s.tif: holds the bits of a byte in reverse: gdal_translate"):
        Tiff(file)


@pytest.mark.parametrize("text", [b"255\0", b"255\0junk", b"255 0 0\0", b" 255 \0"])
def test_no_data_is_the_first_word(text):
    assert geotiff.number_in(text) == 255 and geotiff.number_in(b"junk\0") is None


@pytest.mark.parametrize("tag, kind", [(tiff.GEO_TEXT, 2), (tiff.BITS, 3), (tiff.GEO_DOUBLES, 12)])
def test_a_count_beyond_the_file_is_refused_at_once(tmp_path, tag, kind):
    """Forty million values in a file of 300 bytes took seconds and a gigabyte."""
    entry = struct.pack("<HHII", tag, kind, 40_000_000, 100)
    file = tmp_path / "odd.tif"
    file.write_bytes(b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(282))
    tracemalloc.start()
    with pytest.raises(DataError, match="odd.tif: a damaged TIFF .a tag counts 40000000 values"):
        Tiff(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_place_beyond_any_file_is_damage(tmp_path):
    file = tmp_path / "odd.tif"
    file.write_bytes(b"II+\0" + struct.pack("<HHQ", 8, 0, 2**63) + bytes(20))
    assert not geotiff.has_mask(file)
    with pytest.raises(DataError, match="odd.tif"):
        open_scene(file)


def test_a_strip_larger_than_memory_names_the_way_out(tmp_path, monkeypatch):
    file = write(tmp_path / "s.tif", values("uint16", 3), compress="lzw", blockysize=90)
    monkeypatch.setattr(geotiff, "memory", lambda: 4 * 90 * 110 * 6 - 1)
    with pytest.raises(
        DataError, match="gdal_translate -co COMPRESS=DEFLATE -co TILED=YES .*s.tif s-tiled.tif"
    ):
        open_scene(file)
    open_scene(write(tmp_path / "plain.tif", values("uint16", 3), blockysize=90))  # is read a row at a time


# What a model sees


def test_scale_and_bands(tmp_path):
    array = values("uint16", 5)
    scene = open_scene(write(tmp_path / "s.tif", array))
    seen, holds = choose_look(scene, [4, 3, 1], read_scale("1200")).read(3, 5, 20, 30)
    window = array[[3, 2, 0], 3:23, 5:35]
    assert (seen == np.rint(255 * np.minimum(window / 1200, 1))).all() and holds.all()
    seen, _ = choose_look(scene, [4, 3, 1], read_scale("2-98%")).read(0, 0, 90, 110)
    low, high = np.percentile(array[[3, 2, 0]], [2, 98], axis=(1, 2))[..., None, None]
    exact = 255 * np.clip((array[[3, 2, 0]] - low) / (high - low), 0, 1)
    assert np.abs(seen - exact).max() < 0.51
    plain = open_scene(write(tmp_path / "p.tif", values("uint8", 3)))
    assert (choose_look(plain, None, None).read(0, 0, 90, 110)[0] == values("uint8", 3)).all()


@pytest.mark.parametrize("text", ["", "0", "-3", "98-2%", "2-101%", "nan", "inf", "2-98"])
def test_no_scale(capsys, text):
    said = refused(capsys, predict.main, "m.pth", "s.tif", f"--scale={text}")
    assert "neither the value that becomes 255" in said


@pytest.mark.parametrize(
    "dtype, bands, flags, said",
    [
        ("uint16", 3, (None, None), r"3 bands of uint16, values 1\d+ to 1\d+; .* add --scale VALUE"),
        ("float32", 13, (None, None), r"13 bands of float32, values .* add --bands R G B .* and --scale"),
        ("int16", 1, (None, None), r"1 band of int16, .* add --scale"),
        ("uint8", 5, (None, None), r"5 bands of uint8, .* add --bands R G B .*2\)$"),
        ("uint16", 3, ([4, 3, 2], None), r"--bands 4 3 2: it has 3 bands of uint16"),
    ],
)
def test_refusals_name_bands_type_and_range(tmp_path, dtype, bands, flags, said):
    scene = open_scene(write(tmp_path / "s.tif", values(dtype, bands)))
    with pytest.raises(DataError, match=said):
        choose_look(scene, *flags)


def test_what_holds_no_data(tmp_path):
    array = values("uint16", 3)
    array[:, :10] = 0
    array[:, 20:30] = 7
    array[1, 40:50] = 7
    scene = open_scene(write(tmp_path / "s.tif", array, nodata=7))
    pixels, holds = choose_look(scene, None, read_scale("1200")).read(0, 0, 90, 110)
    empty = np.zeros((90, 110), bool)
    empty[:10] = empty[20:30] = True
    assert (holds == ~empty).all() and not pixels[:, empty].any()
    rgba = values("uint8", 4)
    rgba[3] = np.where(empty, 0, 255)
    for file in (tmp_path / "a.tif", tmp_path / "a.png"):
        if file.suffix == ".tif":
            write(file, rgba, photometric="RGB", alpha="YES")
        else:
            Image.fromarray(rgba.transpose(1, 2, 0)).save(file)
        pixels, holds = choose_look(open_scene(file), None, None).read(0, 0, 90, 110)
        assert (holds == ~empty).all() and (pixels[:, holds] == rgba[:3, holds]).all()
    floats = values("float32", 3)
    floats[0, 0, 0] = np.nan
    look = choose_look(open_scene(write(tmp_path / "f.tif", floats)), None, read_scale("2-98%"))
    assert np.argwhere(~look.read(0, 0, 90, 110)[1]).tolist() == [[0, 0]]
    empty_scene = open_scene(write(tmp_path / "e.tif", np.zeros((3, 90, 110), np.uint16)))
    with pytest.raises(DataError, match="holds no data"):
        choose_look(empty_scene, None, None)


def test_a_band_that_is_named_is_no_opacity(tmp_path):
    """Four 8-bit bands, of which GDAL calls the last opacity; it is infrared, and 0 over water."""
    array = values("uint8", 4)
    array[3, :20] = 0
    file = write(tmp_path / "s.tif", array)
    assert open_scene(file).alpha == 3
    pixels, holds = choose_look(open_scene(file), [4, 3, 2], None).read(0, 0, 90, 110)
    assert holds.all() and (pixels == array[[3, 2, 1]]).all()
    _, holds = choose_look(open_scene(file), [3, 2, 1], None).read(0, 0, 90, 110)
    assert not holds[:20].any() and holds[20:].all()


def test_dark_water_is_no_hole(tmp_path):
    """Where nodata is 0 in an 8-bit picture, water may be 0 in red."""
    array = values("uint8", 3)
    array[0, :, :60] = 0
    array[:, :5] = 0
    file = write(tmp_path / "s.tif", array, nodata=0)
    _, holds = choose_look(open_scene(file), None, None).read(0, 0, 90, 110)
    with rasterio.open(file) as source:
        assert (holds == (source.dataset_mask() > 0)).all() and holds.mean() > 0.9
    tiles.main([str(file), "--size", "32", "--out", str(tmp_path / "patches")])
    assert len(list((tmp_path / "patches").iterdir())) == 6


def test_far_from_training(tmp_path):
    scene = open_scene(write(tmp_path / "s.tif", values("uint16", 3)))
    look = choose_look(scene, None, read_scale("2000"))
    learned, shares = values_of(look), look.read(0, 0, 90, 110)[0] / 255
    assert np.allclose(learned, [shares.mean((1, 2)), shares.std((1, 2))])
    assert not far(learned, learned)
    assert far(values_of(choose_look(scene, None, read_scale("9000"))), learned)  # darker
    assert far(values_of(choose_look(scene, None, read_scale("2-98%"))), learned)  # wider


# Patches


def test_grid():
    assert places(100, 20, 30) == [0, 30, 60, 80] and places(100, 20, 30, border=False) == [0, 30, 60]
    assert places(20, 20, 7) == [0]
    scene = Scene(Path("s.png"), 40, 90, 3, np.dtype("uint8"), None, None, None, np.zeros((3, 40, 90)))
    assert grid_of(scene, (20, 30), 15, border=True) == Grid([0, 15, 20], [0, 15, 30, 45, 60], 20, 30, 15)


def test_tiles(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    array = values("uint16", 3, 100, 130)
    array[:, :70, :60] = 0
    place = from_origin(17.25, 7.5, 0.001, 0.001)
    file = write(tmp_path / "scene.tif", array, crs="EPSG:4326", transform=place)
    out = tmp_path / "patches"
    flags = [file, "--size", "32", "--out", out, "--scale", "1200"]
    tiles.main([str(flag) for flag in flags])
    found = sorted(out.iterdir())
    full = [
        (row, column)
        for row in (0, 32, 64)
        for column in (0, 32, 64, 96)
        if (array[:, row : row + 32, column : column + 32] != 0).any(0).mean() >= 0.5
    ]
    assert len(found) == len(full) < 12
    assert all(f"_r{row:04d}_c{column:04d}_" in file.name for (row, column), file in zip(full, found))
    said = capsys.readouterr().out
    assert f"{len(found)} patches of 32 px in {out}" in said and f"{12 - len(found)} left out" in said
    name = f"scene_r0000_c0064_({7.5 - 0.016:+.10f},{17.25 + 0.08:+.10f}).png"
    with Image.open(out / name) as image:
        exact = np.rint(255 * np.minimum(array[:, :32, 64:96] / 1200, 1))
        assert (np.asarray(image).transpose(2, 0, 1) == exact).all()
    assert "not empty: name a new folder" in refused(capsys, tiles.main, *flags)
    assert "hold no patch" in refused(
        capsys, tiles.main, file, "--size", 128, "--scale", 1200, "--out", tmp_path / "x"
    )
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for odd in (".", tmp_path / "link"):
        assert "this folder itself" in refused(
            capsys, tiles.main, file, "--size", 32, "--scale", 9, "--out", odd
        )
    monkeypatch.chdir(tmp_path)
    left = tmp_path / f".new.{socket.gethostname()}.{2**22 + 1}"  # of a process that cannot be
    left.mkdir()
    tiles.main([str(file), "--size", "32", "--scale", "1200", "--out", str(tmp_path / "new")])
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "x").exists()


def test_tiles_a_stride_apart_hold_data_in_half_of_their_area_or_more(tmp_path, capsys):
    array = values("uint8", 3, 32, 64)
    array[:, :, :16] = 0
    flags = ["--size", "32", "--stride", "16", "--out"]
    tiles.main([str(write(tmp_path / "s.tif", array)), *flags, str(tmp_path / "p")])
    assert sorted(file.name[8:13] for file in (tmp_path / "p").iterdir()) == ["c0000", "c0016", "c0032"]
    file = write(tmp_path / "empty.tif", 0 * array)
    said = refused(capsys, tiles.main, file, *flags, tmp_path / "none")
    assert "empty.tif: none of 3 patches has data in half of its area" in said
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".*"))


def test_tiles_of_several_scenes_in_metres(tmp_path):
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "s.tif", values("uint8", 3))
    second = write(tmp_path / "b" / "s.tif", values("uint8", 3, seed=1))
    tiles.main([str(first), str(second), "--size", "90", "--out", str(tmp_path / "p")])
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == [
        "s-2_r0000_c0000_(x=500450.00,y=4999550.00).png",
        "s_r0000_c0000_(x=500450.00,y=4999550.00).png",
    ]


@pytest.mark.parametrize("order", [["s-2", "s", "b/s"], ["s", "b/s", "s-2"], ["S", "b/s", "s-2"]])
def test_no_two_scenes_share_a_name(order):
    """`s-2` may be a scene's own name, and the number that the second `s` gets; some disks know no case."""
    names = tiles.names_of([Path(f"{name}.tif") for name in order])
    assert len({name.lower() for name in names}) == 3


def test_no_patch_is_hidden():
    assert tiles.names_of([Path(".north.tif"), Path("._x.tif"), Path("...tif")]) == ["north", "_x", "scene"]


# Maps


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with weights of chance, of patches of 32 px and three classes."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(build_backbone("resnet18"), torch.nn.Linear(512, 3))
    with torch.no_grad():
        network.train()
        for _ in range(3):  # the norms' statistics
            network(torch.randn(16, 3, SIDE, SIDE))
    about = {
        "task": "fraction",
        "classes": ["Water", "Forest & wood", "Rock"],
        "loss": "softmax",
        "arch": "resnet18",
        "size": SIDE,
        "tile": [SIDE, SIDE],
        "mean": [0.4, 0.4, 0.4],
        "std": [0.2, 0.2, 0.2],
        "state": network.state_dict(),
    }
    file = tmp_path_factory.mktemp("model") / "model.pth"
    torch.save(about, file)
    return file


def run(model, *flags):
    predict.main([str(flag) for flag in (model, *flags, "--device", "cpu")])


def read_csv(file):
    return pd.read_csv(file)


def test_geotiff_of_a_scene(model, tmp_path, capsys):
    array = values("uint16", 5, 150, 133)
    array[:, :60, :80] = 0
    file = write(tmp_path / "s.tif", array)
    flags = ("--bands", 4, 3, 2, "--scale", 1300, "--stride", 12)
    run(model, file, *flags, "--out", tmp_path / "map.tif")
    run(model, file, *flags, "--out", tmp_path / "map.csv")
    rows = read_csv(tmp_path / "map.csv")
    assert rows.row.max() == 150 - SIDE and rows.column.max() == 133 - SIDE
    assert np.allclose(rows.x, 5e5 + 10 * (rows.column + 16)) and np.allclose(
        rows.y, 5e6 - 10 * (rows.row + 16)
    )
    with rasterio.open(tmp_path / "map.tif") as found:
        shares = found.read()
        assert found.descriptions == ("Water", "Forest & wood", "Rock") and found.crs.to_epsg() == 32633
        assert shares.shape == (3, len(range(0, 150 - 31, 12)), len(range(0, 133 - 31, 12)))
        assert np.allclose(found.transform[:6], (120, 0, 5e5 + 100, 0, -120, 5e6 - 100), atol=1e-9)
        for i in range(shares.shape[1]):
            for j in range(shares.shape[2]):
                row = rows[(rows.row == 12 * i) & (rows.column == 12 * j)]
                holds = (array[[3, 2, 1], 12 * i : 12 * i + 32, 12 * j : 12 * j + 32] != 0).any(
                    0
                ).mean() >= 0.5
                assert len(row) == holds == np.isfinite(shares[:, i, j]).all()
                if holds:
                    assert np.allclose(row.iloc[0, -3:].astype(float), shares[:, i, j], atol=1e-4)
                    assert found.xy(i, j) == pytest.approx((row.x.item(), row.y.item()), abs=1e-9)
    said = capsys.readouterr()
    assert "left out for lack of data" in said.out and "the model learned from mean 0.400" in said.out
    assert not list(tmp_path.glob(".*")) and (tmp_path / "map-map.png").exists()


@pytest.mark.parametrize("task", ["fraction", "scene"])
def test_a_picture_of_a_map_knows_the_task(model, tmp_path, monkeypatch, task):
    torch.save(torch.load(model, weights_only=True) | {"task": task}, tmp_path / "model.pth")
    file, seen = write(tmp_path / "s.tif", values("uint8", 3)), []
    monkeypatch.setattr(predict, "draw_map", lambda file, drawn: seen.append(drawn.task))
    run(tmp_path / "model.pth", file, "--out", tmp_path / "m.csv")
    assert seen == [task]


@pytest.mark.parametrize("stride", [8, 32])
def test_borders_that_are_not_mapped_are_as_help_says(model, tmp_path, stride):
    file = write(tmp_path / "s.tif", values("uint8", 3, 150, 133))
    run(model, file, "--stride", stride, "--out", tmp_path / "map.tif")
    with rasterio.open(file) as scene, rasterio.open(tmp_path / "map.tif") as found:
        left, bottom, right, top = (abs(a - b) / 10 for a, b in zip(found.bounds, scene.bounds))
    half = (SIDE - stride) / 2
    assert left == top == half
    assert half <= right < half + stride and half <= bottom < half + stride
    said = " ".join(predict.build_parser().format_help().split())
    assert (
        "half of (patch - stride) is not mapped at each border, and up to a stride more at the right" in said
    )


def test_help_calls_the_dense_pass_an_approximation():
    said = " ".join(predict.build_parser().format_help().split())
    assert "an approximation: an RMSE 1 to 2 % above (docs/results.md)" in said


def test_a_map_of_the_largest_classes_stands_beside(model, tmp_path, capsys):
    """For QGIS: one band of numbers in the picture's colours, where the shares lie."""
    array = values("uint8", 3, 150, 133)
    array[:, :60, :80] = 0
    run(model, write(tmp_path / "s.tif", array), "--stride", 12, "--out", tmp_path / "map.tif")
    beside = tmp_path / "map-classes.tif"
    assert f"map in {tmp_path / 'map.tif'} and {beside}\n" in capsys.readouterr().out
    with rasterio.open(tmp_path / "map.tif") as shares, rasterio.open(beside) as found:
        assert found.dtypes == ("uint8",) and found.nodata == 255 and found.crs == shares.crs
        assert found.transform == shares.transform and found.shape == shares.shape
        full = np.isfinite(shares.read()).all(0)
        assert 0 < full.mean() < 1
        largest = np.nan_to_num(shares.read()).argmax(0)
        assert (found.read(1) == np.where(full, largest, 255)).all()
        assert ((found.dataset_mask() > 0) == full).all()
        assert found.colorinterp == (rasterio.enums.ColorInterp.palette,)
        colours = [found.colormap(1)[k] for k in range(3)]
        assert [f"#{r:02x}{g:02x}{b:02x}" for r, g, b, _ in colours] == palette(3)
        assert all(opacity == 255 for *_, opacity in colours) and found.colormap(1)[255][3] == 0
        names = {"CLASS_0": "Water", "CLASS_1": "Forest & wood", "CLASS_2": "Rock"}
        assert found.tags(1) == names and found.descriptions == ("class",)
        assert found.files == [str(beside), f"{beside}.aux.xml"]
    listed = ElementTree.parse(f"{beside}.aux.xml").findall("PAMRasterBand/CategoryNames/Category")
    assert [category.text for category in listed] == list(names.values())


def test_a_map_keeps_a_system_with_numbers_of_its_own(tmp_path):
    crs = "+proj=laea +lat_0=11.5 +lon_0=21.25 +x_0=300 +y_0=400 +ellps=bessel +units=m"
    scene = write(tmp_path / "s.tif", values("uint8", 1), crs=crs)
    bands = np.random.default_rng(0).random((4, 3, 4), np.float32)
    geomaps.write_geotiff(tmp_path / "m.tif", bands, list("abcd"), Tiff(scene).place())
    with rasterio.open(scene) as source, rasterio.open(tmp_path / "m.tif") as found:
        assert found.crs == source.crs and found.transform == source.transform
    tags = Tiff(tmp_path / "m.tif").tags
    assert tags[tiff.EXTRA_SAMPLES] == (0, 0, 0)
    assert any(size % 2 for size in tags[tiff.TILE_BYTES])
    assert not any(offset % 2 for offset in tags[tiff.TILE_OFFSETS]), "as TIFF has it"


def test_a_map_too_large_for_a_tiff_is_refused(tmp_path, monkeypatch):
    class Tiles(bytearray):
        def __len__(self):
            return 2**32

    monkeypatch.setattr(geomaps, "packed_tiles", lambda *_: (Tiles(8), [8], [0]))
    with pytest.raises(DataError, match="a map of 4.3 GB: take a larger --stride"):
        geomaps.write_geotiff(tmp_path / "m.tif", np.zeros((1, 4, 4), np.float32), ["a"], None)
    assert not list(tmp_path.iterdir())


def test_class_names_that_are_no_text_are_written(tmp_path):
    numbers, names = np.zeros((4, 4), np.uint8), [os.fsdecode(b"caf\xe9")]
    write_class_map(tmp_path / "m.tif", numbers, names, ["#102030"], None)
    with rasterio.open(tmp_path / "m.tif") as found:
        assert found.tags(1) == {"CLASS_0": "caf?"}
    with Image.open(tmp_path / "m.tif") as found:  # 16 bits a colour, of which GDAL reads the upper 8
        assert found.tag_v2[320][:512:256] == (0x1010, 0x2020)


def test_maps_of_classes_meet_no_other_file(model, tmp_path, capsys):
    for name in ("a", "a-classes", "b"):
        write(tmp_path / f"{name}.tif", values("uint8", 3))
    scenes = [tmp_path / f"{name}.tif" for name in ("a-classes", "a", "b")]
    run(model, *scenes, "--out", tmp_path / "o" / "m.tif")
    names = {file.name for file in (tmp_path / "o").iterdir()}
    own = {"m-a-classes", "m-a-2", "m-b"}
    ends = (".tif", "-classes.tif", "-classes.tif.aux.xml")
    assert names == {name + end for name in own for end in ends}
    capsys.readouterr()
    said = refused(capsys, predict.main, model, tmp_path / "a-classes.tif", "--out", tmp_path / "a.tif")
    assert "would overwrite" in said and "a-classes.tif" in said


def test_more_classes_than_a_colour_table_holds(model, tmp_path, capsys):
    about = torch.load(model, weights_only=True)
    classes = [f"class {k}" for k in range(256)]
    state = about["state"] | {"1.weight": torch.randn(256, 512), "1.bias": torch.zeros(256)}
    torch.save(about | {"classes": classes, "state": state}, tmp_path / "model.pth")
    file = write(tmp_path / "s.tif", values("uint8", 3))
    run(tmp_path / "model.pth", file, "--out", tmp_path / "m.tif")
    assert "256 classes are more than the 255" in capsys.readouterr().out
    assert (tmp_path / "m.tif").exists() and not (tmp_path / "m-classes.tif").exists()


def test_a_far_scene_warns(model, tmp_path, capsys):
    file = write(tmp_path / "s.tif", values("uint16", 3))
    run(model, file, "--scale", 60000, "--out", tmp_path / "m.tif")
    assert "warning: " in capsys.readouterr().err


@pytest.mark.parametrize("world", ["s.tfw", "s.tif.tfw", "s.wld", "s.TFW"])
def test_a_world_file_is_not_overlooked(model, tmp_path, capsys, world):
    picture = Image.fromarray(values("uint8", 3).transpose(1, 2, 0))
    picture.save(tmp_path / "s.tif")
    (tmp_path / world).write_text("10\n0\n0\n-10\n5\n5\n")
    said = f"its world file {world} is not read: gdal_translate -a_srs EPSG:NUMBER"
    run(model, tmp_path / "s.tif", "--out", tmp_path / "m.tif")
    assert capsys.readouterr().err.count(said) == 1
    tiles.main([str(flag) for flag in (tmp_path / "s.tif", "--size", 32, "--out", tmp_path / "patches")])
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize(
    "told, said",
    [
        ("<GeoTransform>0, 10, 0, 0, 0, -10</GeoTransform>", "has no place: that in s.png.aux.xml is"),
        (
            "<PAMRasterBand><NoDataValue>9</NoDataValue></PAMRasterBand>",
            "its nodata value, in s.png.aux.xml, is",
        ),
    ],
)
def test_what_gdal_writes_beside_a_picture_is_not_overlooked(told, said, model, tmp_path, capsys):
    Image.fromarray(values("uint8", 3, 100, 120).transpose(1, 2, 0)).save(tmp_path / "s.png")
    (tmp_path / "s.png.aux.xml").write_text(f"<PAMDataset>{told}</PAMDataset>")
    run(model, tmp_path / "s.png", "--out", tmp_path / "m.csv")
    assert f"{said} not read: gdal_translate" in capsys.readouterr().err


def test_control_points_are_not_overlooked(model, tmp_path, capsys):
    file = write(tmp_path / "s.tif", values("uint8", 3), transform=None, crs=None)
    points = [
        rasterio.control.GroundControlPoint(r, c, 10 * c, -10 * r) for r, c in ((0, 0), (0, 99), (80, 0))
    ]
    with rasterio.open(file, "r+") as target:
        target.gcps = (points, "EPSG:32633")
    run(model, file, "--out", tmp_path / "m.tif")
    assert "its ground control points are not read: gdalwarp" in capsys.readouterr().err


def test_a_placed_scene_needs_no_world_file(model, tmp_path, capsys):
    file = write(tmp_path / "s.tif", values("uint8", 3))
    (tmp_path / "s.tfw").write_text("10\n0\n0\n-10\n5\n5\n")
    run(model, file, "--out", tmp_path / "m.tif")
    assert "world file" not in capsys.readouterr().err


def test_dense_agrees_with_patches(model, tmp_path):
    """A patch that is a window gets the network's own answer; all of them go together."""
    scene = open_scene(write(tmp_path / "s.tif", values("uint8", 3, 200, 170)))
    look = choose_look(scene, None, None)
    opened = load_model(str(model), torch.device("cpu"))
    grid = grid_of(scene, (SIDE, SIDE), 4, border=True)
    with predict.tqdm(disable=True) as bar:
        reference = predict.by_patches(opened, look, grid, bar)
        found = predict.by_windows(opened, look, grid, bar)
    assert np.allclose(found.sum(2), 1, atol=1e-5)
    assert np.abs(found[0, 0] - reference[0, 0]).max() < 0.1 * np.ptp(reference)
    assert np.corrcoef(found.ravel(), reference.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("side", [SIDE, 48, 90])
def test_dense_equals_patches_without_overlap(side, model, tmp_path, monkeypatch):
    """Also where a patch is no whole number of the network's cells, which are of 32 px."""
    monkeypatch.setattr(dense, "OVERLAP", 1000)
    scene = open_scene(write(tmp_path / "s.tif", values("uint8", 3, 4 * side, 3 * side)))
    look = choose_look(scene, None, None)
    opened = load_model(str(model), torch.device("cpu"))._replace(size=side, tile=(side, side))
    grid = grid_of(scene, (side, side), side, border=True)
    with predict.tqdm(disable=True) as bar:
        reference = predict.by_patches(opened, look, grid, bar)
        found = predict.by_windows(opened, look, grid, bar)
    assert np.abs(found - reference).max() < 1e-5


def test_a_dense_map_of_one_cell_a_patch_says_so(model, tmp_path, capsys):
    scene = open_scene(write(tmp_path / "s.tif", values("uint8", 3, 100, 100)))
    look, grid = choose_look(scene, None, None), grid_of(scene, (SIDE, SIDE), SIDE, border=True)
    opened = load_model(str(model), torch.device("cpu"))
    for size in (33, 32):
        assert "note: --dense" not in capsys.readouterr().err
        with predict.tqdm(disable=True) as bar:
            predict.by_windows(opened._replace(size=size), look, grid, bar)
    assert "note: --dense: at 32 px a patch is one cell of the features" in capsys.readouterr().err


def test_a_folder_is_no_scene(tmp_path):
    with pytest.raises(DataError, match="is a folder: give the scenes in it"):
        open_scene(tmp_path)


def test_dense_leaves_out_the_same_patches(model, tmp_path):
    array = values("uint8", 3, 150, 133)
    array[:, 20:90, 10:77] = 0
    file = write(tmp_path / "s.tif", array)
    for name, flags in (("p.tif", ()), ("d.tif", ("--dense",))):
        run(model, file, *flags, "--stride", 7, "--out", tmp_path / name)
    with rasterio.open(tmp_path / "p.tif") as patches, rasterio.open(tmp_path / "d.tif") as windows:
        a, b = patches.read(), windows.read()
        assert patches.transform == windows.transform and (np.isnan(a) == np.isnan(b)).all()
        assert 0 < np.isnan(a).mean() < 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"transform": from_origin(600_000, 4_100_000, 10, 10)},
        {"transform": from_origin(500_000, 4_100_000, 20, 20)},
        {"crs": "EPSG:32631"},
        {},
    ],
)
def test_a_truth_of_another_place_is_refused(change, model, tmp_path):
    """All scenes of Sentinel-2 have one size: a mix-up is easy."""
    placed = {"crs": "EPSG:32630", "transform": from_origin(500_000, 4_100_000, 10, 10)}
    size = {"driver": "GTiff", "height": 100, "width": 120, "dtype": "uint8"}
    with rasterio.open(tmp_path / "s.tif", "w", count=3, **size, **placed) as target:
        target.write(values("uint8", 3, 100, 120))
    with rasterio.open(tmp_path / "t.tif", "w", count=1, **size, **(placed | change)) as target:
        target.write(values("uint8", 1, 100, 120) % 3)
    flags = (tmp_path / "s.tif", "--truth", tmp_path / "t.tif", "--out", tmp_path / "m.csv")
    if not change:
        return run(model, *flags)
    with pytest.raises(DataError, match="--truth: lies elsewhere than .*s.tif"):
        run(model, *flags)


def test_a_picture_of_one_patch_keeps_the_colours_below_its_transparency(model, tmp_path):
    """As patches do in training and in transfer.py."""
    colours = values("uint8", 3, SIDE, SIDE).transpose(1, 2, 0)
    opacity = np.full((SIDE, SIDE, 1), 255, np.uint8)
    opacity[:, :12] = 0
    Image.fromarray(colours).save(tmp_path / "plain.png")
    Image.fromarray(np.concatenate([colours, opacity], 2)).save(tmp_path / "clear.png")
    for name in ("plain", "clear"):
        run(model, tmp_path / f"{name}.png", "--out", tmp_path / f"{name}.csv")
    a, b = (pd.read_csv(tmp_path / f"{name}.csv").drop(columns="file") for name in ("plain", "clear"))
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("flags", [(), ("--dense",)])
def test_bands_of_rows_do_not_show(model, tmp_path, monkeypatch, flags):
    """A scene larger than what is read at once gives the same map."""
    file = write(tmp_path / "s.tif", values("uint8", 3, 150, 133), tiled=True, blockxsize=16, blockysize=16)
    run(model, file, *flags, "--stride", 9, "--out", tmp_path / "a.tif")
    monkeypatch.setattr(predict, "BAND", 133 * 40)
    run(model, file, *flags, "--stride", 9, "--out", tmp_path / "b.tif")
    with rasterio.open(tmp_path / "a.tif") as a, rasterio.open(tmp_path / "b.tif") as b:
        assert np.allclose(a.read(), b.read(), atol=1e-6)


def test_classes_called_as_columns_keep_both(model, tmp_path):
    about = torch.load(model, weights_only=True) | {"classes": ["row", "class", "Rock"]}
    torch.save(about, tmp_path / "model.pth")
    file = write(tmp_path / "s.tif", values("uint8", 3))
    run(model, file, "--out", tmp_path / "plain.csv")
    run(tmp_path / "model.pth", file, "--out", tmp_path / "odd.csv")
    plain, odd = read_csv(tmp_path / "plain.csv"), read_csv(tmp_path / "odd.csv")
    assert list(odd.columns[-3:]) == ["row (share)", "class (share)", "Rock"]
    assert (odd.row == plain.row).all() and (odd["row (share)"] == plain["Water"]).all()
    renamed = {"Water": "row", "Forest & wood": "class", "Rock": "Rock"}
    assert (odd["class"] == plain["class"].map(renamed)).all()


def test_every_class_keeps_a_column():
    assert predict.columns_of(["a", "class", "class (share)"]) == [
        "a",
        "class (share) (share)",
        "class (share)",
    ]
    assert predict.columns_of(["x", "y", "b"]) == ["x (share)", "y (share)", "b"]


@pytest.mark.parametrize("placed", [True, False])
def test_a_colour_table_does_not_cost_the_place(tmp_path, placed):
    """A GeoTIFF with one would be mapped without its coordinates; a plain picture has none to lose."""
    file = tmp_path / "palette.tif"
    picture = Image.fromarray(values("uint8", 3).transpose(1, 2, 0)).quantize(16)
    tags = {33550: (10.0, 10.0, 0.0), 33922: (0.0, 0.0, 0.0, 5e5, 5e6, 0.0)}
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, numbers in tags.items() if placed else ():
        info.tagtype[tag] = 12
        info[tag] = numbers
    picture.save(file, tiffinfo=info)
    if placed:
        with pytest.raises(DataError, match="-expand rgb"):
            open_scene(file)
    else:
        assert open_scene(file).bands == 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_opacity_is_turned_as_the_pixels_are(tmp_path, orientation):
    """Where the picture is transparent its red is 9, wherever EXIF turns it to."""
    pixels = np.full((60, 90, 4), 200, np.uint8)
    pixels[:20, :50] = (9, 9, 9, 0)
    notes = Image.Exif()
    notes[274] = orientation
    for suffix in ("png", "webp"):
        file = tmp_path / f"turned.{suffix}"
        Image.fromarray(pixels).save(
            file, exif=notes, **({"lossless": True, "exact": True} if suffix == "webp" else {})
        )
        look = choose_look(open_scene(file), None, None)
        found, holds = look.read(0, 0, look.scene.height, look.scene.width)
        assert holds.shape == ((90, 60) if orientation > 4 else (60, 90)) and 0 < holds.mean() < 1
        assert (holds == (found[0] == 200)).all()


def test_a_picture_of_two_patches_is_one_and_needs_data_in_half_of_it(model, tmp_path):
    array = values("uint8", 3, 2 * SIDE, 2 * SIDE)
    for rows, held in ((SIDE, True), (SIDE + 1, False)):
        array[:, :rows] = 0
        file = write(tmp_path / "s.tif", array)
        with contextlib.nullcontext() if held else pytest.raises(DataError, match="less than half of it"):
            run(model, file, "--out", tmp_path / "p.csv")
    assert len(read_csv(tmp_path / "p.csv")) == 1 and not (tmp_path / "p-map.png").exists()


def test_the_centre_of_an_oblong_patch(tmp_path):
    look = choose_look(open_scene(write(tmp_path / "s.tif", values("uint8", 3))), None, None)
    grid = Grid([0, 7], [3], 20, 40, 7)
    shares = np.array([[[0.9, 0.1]], [[0.2, 0.8]]], np.float32)
    rows = predict.rows_of(predict.Mapped(look, grid, shares, None), ["a", "b"])
    assert rows.x.tolist() == [5e5 + 230] * 2 and rows.y.tolist() == [5e6 - 100, 5e6 - 170]
    assert rows["class"].tolist() == ["a", "b"] and rows.row.tolist() == [0, 7]


def test_an_overview_takes_every_nth_pixel_whatever_is_read_at_once(tmp_path, monkeypatch):
    array = values("uint8", 3)
    array[:, :20] = 0
    look = choose_look(open_scene(write(tmp_path / "s.tif", array)), None, None)
    monkeypatch.setattr(predict, "OVERVIEW", 40)
    expected = np.where((array != 0).any(0), array, 255)[:, ::3, ::3].transpose(1, 2, 0)
    for band in (1, 110 * 10, 1 << 24):
        monkeypatch.setattr(predict, "BAND", band)
        assert (predict.overview(look) == expected).all()


def test_a_strip_is_neither_a_patch_nor_squashed_into_one(model, tmp_path):
    for name, height, width in (("narrow", SIDE - 1, 5 * SIDE), ("flat", SIDE, 6 * SIDE)):
        Image.fromarray(values("uint8", 3, height, width).transpose(1, 2, 0)).save(tmp_path / f"{name}.png")
    with pytest.raises(DataError, match="too narrow for several"):
        run(model, tmp_path / "narrow.png", "--out", tmp_path / "n.csv")
    run(model, tmp_path / "flat.png", "--out", tmp_path / "f.csv")
    assert len(read_csv(tmp_path / "f.csv")) > 9


@pytest.mark.parametrize(
    "kind, high, scale, said",
    [
        ("float32", 1, "3558", "values 0.* to 0.*, which --scale 3558 makes black: give the value"),
        ("uint8", 255, "3558", "its values are 8-bit, which --scale 3558 makes dark: leave it out"),
        (
            "uint16",
            3000,
            "1",
            "which --scale 1 makes white: give the value that becomes 255, or --scale",
        ),
        ("uint16", 16000, "3558", ""),
        ("float32", 0.02, "1", ""),
    ],
)
def test_a_scale_of_other_units_is_refused(kind, high, scale, said, tmp_path):
    shares = np.random.default_rng(0).uniform(0.3, 1, (3, 90, 110))
    scene = open_scene(write(tmp_path / "s.tif", (high * shares).astype(kind)))
    if said:
        with pytest.raises(DataError, match=f"s.tif: .*{said}"):
            choose_look(scene, None, read_scale(scale))
    else:
        assert choose_look(scene, None, read_scale(scale)).high[0] == float(scale)


def test_tiles_holds_one_scene_at_a_time_and_takes_it_once(tmp_path, monkeypatch):
    sources = []

    def open_and_watch(file):
        scene = open_scene(file)
        sources.append(weakref.ref(scene.source))
        assert (
            sum(source() is not None for source in sources) <= 2
        )  # the last one, until this is its successor
        return scene

    monkeypatch.setattr(tiles, "open_scene", open_and_watch)
    files = [tmp_path / f"{name}.png" for name in "abcda"]
    for file in files:
        Image.fromarray(values("uint8", 3).transpose(1, 2, 0)).save(file)
    tiles.main([*map(str, files), "--size", "32", "--out", str(tmp_path / "out")])
    assert len(sources) == 8 and len(list((tmp_path / "out").glob("a_r0000_c0000*"))) == 1


def test_one_of_several_pages_is_not_taken_for_the_scene(tmp_path):
    """A stack of dates, as ImageJ and scanners write it; smaller pages are overviews."""
    pages = [Image.fromarray(values("uint8", 3, side, side).transpose(1, 2, 0)) for side in (90, 90, 45)]
    for name, others in (("stack.tif", pages[1:]), ("overview.tif", pages[2:])):
        pages[0].save(tmp_path / name, save_all=True, append_images=others)
    with pytest.raises(DataError, match="stack.tif: has 2 pages of 90 x 90 px.*GTIFF_DIR:1:"):
        open_scene(tmp_path / "stack.tif")
    assert (open_scene(tmp_path / "overview.tif").read(0, 0, 90, 90).transpose(1, 2, 0) == pages[0]).all()


def test_masks_of_their_own_are_refused(tmp_path):
    """As GDAL writes them into a GeoTIFF, or beside it: what they hide would be mapped."""
    for inside in (True, False):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside):
            file = tmp_path / f"{inside}.tif"
            size = {"count": 3, "height": 90, "width": 110, "dtype": "uint8"}
            with rasterio.open(file, "w", driver="GTiff", **size) as target:
                target.write(values("uint8", 3))
                target.write_mask(np.arange(110)[None] > np.full((90, 1), 40))
        with pytest.raises(DataError, match="has a mask.*-b mask -colorinterp_4 alpha"):
            open_scene(file)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--out", "map.gtiff"], "name a .csv, a .tif"),
        (["--bands", "1", "2", "4", "--out", "m.csv"], "band 4 is opacity"),
        (["--stride", SIDE + 1, "--out", "m.csv"], "leaves gaps"),
    ],
)
def test_flags_that_would_mislead_are_refused(model, tmp_path, monkeypatch, capsys, flags, said):
    pixels = values("uint8", 4)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "s.png")
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, predict.main, model, "s.png", *flags, "--device", "cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["s.png"]


def test_a_picture_named_twice_is_one(model, tmp_path):
    Image.fromarray(values("uint8", 3, 32, 32).transpose(1, 2, 0)).save(tmp_path / "a.png")
    run(model, tmp_path, tmp_path / "a.png", "--out", tmp_path / "out" / "p.csv")
    assert len(read_csv(tmp_path / "out" / "p.csv")) == 1


def test_a_map_paints_no_class_in_the_colour_of_another():
    """Of twelve classes ten have a colour; a patch of one of the other two shows as neither."""
    shares = np.full((1, 3, 12), 0.01)
    shares[0, 0, 4] = shares[0, 1, 11] = shares[0, 2, 10] = 0.5
    shown = np.array([4, 0, 1, 2, 3, 5, 6, 7, 8, 11])
    assert colour_numbers(shares, shown).tolist() == [[4, 11, 12]]


def test_several_scenes_do_not_meet(model, tmp_path):
    write(tmp_path / "s.tif", values("uint8", 3))
    Image.fromarray(values("uint8", 3, seed=1).transpose(1, 2, 0)).save(tmp_path / "s.png")
    run(model, tmp_path / "s.png", tmp_path / "s.tif", "--out", tmp_path / "o" / "map.csv")
    names = {file.name for file in (tmp_path / "o").iterdir()}
    assert names == {"map.csv", "map-s-tif-map.png", "map-s-png-map.png"}
    rows = read_csv(tmp_path / "o" / "map.csv")
    assert rows.x.notna().sum() == rows.x.isna().sum() > 0
    assert list(rows.columns[:5]) == ["file", "row", "column", "x", "y"], "though the first has no place"


def test_one_bad_picture_costs_no_other(model, tmp_path, capsys):
    for i in range(6):
        Image.fromarray(values("uint8", 3, 32, 32, i).transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:700])
    deep = values("uint16", 1)[0]
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with pytest.raises(SystemExit) as stopped:
        run(model, tmp_path, "--out", tmp_path / "out" / "p.csv")
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "2.png" in said and "2 of 7 pictures failed" in said
    assert "deep.png" in said and "uint16" in said
    assert len(read_csv(tmp_path / "out" / "p.csv")) == 5


def test_a_map_needs_a_scene(model, tmp_path, capsys):
    Image.fromarray(values("uint8", 3, 32, 32).transpose(1, 2, 0)).save(tmp_path / "s.png")
    for name in ("m.tif", "m.png"):
        assert "are no scene" in refused(
            capsys, predict.main, model, tmp_path / "s.png", "--out", tmp_path / name
        )
    assert "name a .csv" in refused(
        capsys, predict.main, model, tmp_path / "s.png", "--out", tmp_path / "m.jpg"
    )


def test_premultiplied_opacity_is_opacity(tmp_path):
    array = values("uint8", 4)
    array[3, :20] = 0
    file = write(tmp_path / "s.tif", array, photometric="RGB", alpha="PREMULTIPLIED")
    _, holds = choose_look(open_scene(file), None, None).read(0, 0, 90, 110)
    assert open_scene(file).alpha == 3 and not holds[:20].any()


def test_a_scene_is_far_in_either_direction():
    learned = Values(np.full(3, 0.4), np.full(3, 0.1))
    for mean, std, expected in (
        (0, 4, True),
        (0, 0.25, True),
        (0.2, 1, True),
        (-0.2, 1, True),
        (0.05, 2, False),
        (-0.05, 0.5, False),
    ):
        assert far(Values(learned.mean + mean, learned.std * std), learned) == expected
    one = np.array([0, 0, 1])
    assert far(Values(learned.mean + 0.2 * one, learned.std), learned), "in one band is enough"
    assert far(Values(learned.mean, learned.std * 4**one), learned)


def test_a_band_of_one_value_is_stretched_to_black(tmp_path):
    array = values("uint16", 3)
    array[1] = 1234
    scene = open_scene(write(tmp_path / "s.tif", array))
    with np.errstate(all="raise"):
        pixels, _ = choose_look(scene, None, read_scale("2-98%")).read(0, 0, 90, 110)
    assert not pixels[1].any() and pixels[0].any()


def test_a_picture_too_large_for_memory_names_the_way_out(tmp_path, monkeypatch):
    """Its pixels and its opacity are decoded at once; a TIFF in tiles is not."""
    Image.fromarray(values("uint8", 3).transpose(1, 2, 0)).save(tmp_path / "s.png")
    monkeypatch.setattr("data.scenes.memory", lambda: 16 * 90 * 110)
    open_scene(tmp_path / "s.png")
    monkeypatch.setattr("data.scenes.memory", lambda: 15 * 90 * 110)
    with pytest.raises(DataError, match="110 x 90 px are too many to decode at once: gdal_translate"):
        open_scene(tmp_path / "s.png")


def test_a_colour_may_be_transparent(tmp_path):
    """As a palette's: GIF and PNG have no band of opacity then."""
    picture = Image.fromarray((np.arange(90 * 110) // 4950).reshape(90, 110).astype(np.uint8), "P")
    picture.putpalette([200, 100, 50, 10, 20, 30])
    picture.save(tmp_path / "s.png", transparency=0)
    pixels, holds = choose_look(open_scene(tmp_path / "s.png"), None, None).read(0, 0, 90, 110)
    assert not holds[:45].any() and holds[45:].all() and pixels[:, 60, 0].tolist() == [10, 20, 30]


def test_a_large_scene_is_judged_from_end_to_end():
    starts = spread(100 * SAMPLE)
    assert len(starts) == BLOCKS and starts[0] == 0 and starts[-1] == 99 * SAMPLE
    assert max(np.diff(starts)) < 2 * min(np.diff(starts))
    pixels = np.zeros((3, SAMPLE + 9, 2 * SAMPLE + 40), np.uint8)
    blocks = Scene(Path("s.png"), *pixels.shape[1:], 3, pixels.dtype, None, None, None, pixels).blocks()
    assert len(blocks) == 6 and sum(height * width for *_, height, width in blocks) == pixels[0].size


def test_patches_overlap_by_half_where_no_stride_is_given(model, tmp_path):
    file = write(tmp_path / "s.tif", values("uint8", 3))
    run(model, file, "--out", tmp_path / "m.csv")
    assert sorted(set(read_csv(tmp_path / "m.csv").column)) == [*range(0, 110 - SIDE, SIDE // 2), 110 - SIDE]


def test_strides_go_by_the_shorter_side_of_a_patch(model, tmp_path):
    torch.save(torch.load(model, weights_only=True) | {"tile": [SIDE, 20]}, tmp_path / "model.pth")
    file = write(tmp_path / "s.tif", values("uint8", 3))
    with pytest.raises(ConfigError, match="--stride 24 leaves gaps between patches of 20 px"):
        run(tmp_path / "model.pth", file, "--stride", 24, "--out", tmp_path / "m.csv")
    run(tmp_path / "model.pth", file, "--out", tmp_path / "m.csv")
    assert sorted(set(read_csv(tmp_path / "m.csv").row))[:3] == [0, 10, 20]


def test_windows_overlap_by_a_sixteenth_of_a_patch_at_least():
    starts = dense.windows_along(160, [0], 32, 32, 32).starts
    assert starts[0] == 0 and starts[-1] == 128 and max(np.diff(starts)) <= 30


def test_pictures_that_all_fail_are_listed(model, tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"none")
    with pytest.raises(SystemExit) as end:
        run(model, tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "p.csv")
    assert end.value.code == 1 and "2 of 2 pictures failed" in capsys.readouterr().err


def test_windows_fade_into_each_other_at_both_ends():
    weights = dense.fading(50, [0, 20], 30, 10)
    assert np.allclose(weights.sum(0), 1) and np.allclose(weights[0], weights[1][::-1])
    assert np.allclose(weights[0, 20:30], 1 - (np.arange(10) + 0.5) / 10)


def test_a_tie_point_that_is_no_corner_is_read_as_gdal_reads_it(tmp_path):
    tags = {33550: ("d", (10.0, 20.0, 0.0)), 33922: ("d", (5.0, 3.0, 0.0, 500.0, 4000.0, 0.0))}
    file, start = tmp_path / "placed.tif", 8 + 3600
    content = b"II*\0" + struct.pack("<I", start) + bytes(3600)
    file.write_bytes(content + tiff.directory(WHOLE_PAGE | tags, start))
    with rasterio.open(file) as gdal:
        assert Tiff(file).place().transform == gdal.transform[:6] == (10, 0, 450, 0, -20, 4060)


def test_opacity_need_not_be_the_last_band(tmp_path):
    tags = WHOLE_PAGE | {258: ("H", (8,) * 5), 277: ("H", (5,)), 338: ("H", (2, 0)), 279: ("I", (6000,))}
    content = b"II*\0" + struct.pack("<I", 8 + 6000) + bytes(6000)
    (tmp_path / "s.tif").write_bytes(content + tiff.directory(tags, 8 + 6000))
    assert Tiff(tmp_path / "s.tif").alpha() == 3


def test_a_pixel_of_a_map_has_its_patch_s_centre_in_a_turned_scene_too():
    place = geotiff.Place((8, 3, 5e5, 2.5, -9, 5e6))
    grid = Grid([4, 12], [6, 14], 32, 20, 8)
    for i, top in enumerate(grid.tops):
        for j, left in enumerate(grid.lefts):
            centre = place.at(left + 10, top + 16)
            assert grid.map_place(place).at(j + 0.5, i + 0.5) == pytest.approx(centre, abs=1e-6)


def test_places_are_compared_at_all_corners_of_the_picture():
    place, wider, deeper = (geotiff.Place((x, 0, 0, 0, -y, 0)) for x, y in ((10, 10), (10.1, 10), (10, 10.1)))
    for other, height, width in ((wider, 40, 60), (deeper, 60, 40)):
        assert place.differs(other, height, width) and not place.differs(other, width, height)


def test_degrees_in_two_systems_are_two_places():
    place, other = (
        geotiff.Place((1, 0, 0, 0, -1, 0), (1, 1, 0, 1, 2048, 0, 1, code)) for code in (4326, 4258)
    )
    assert place.differs(other, 9, 9) and not place.differs(place, 9, 9)

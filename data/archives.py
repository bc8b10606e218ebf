"""The names of files and folders in the real archives, as people unpack them: what `data.synthetic` writes
its scenes to.

A layout of pure scenes is a list of templates, one for each copy of a scene on disk.
"""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data.names import PURE_NAMES
from data.splits import SHARES, split_classes

OTHER_SHARES = (0.8, 0.1, 0.1)
COPY = "Sentinel2GlobalLULC_SSL/Sentinel2GlobalLULC-ratio=({})-seed=42"
FIRST_COPY, SECOND_COPY = COPY.format("0.900,0.0250,0.0750"), COPY.format("0.800,0.1000,0.1000")
PURE_LAYOUTS = {
    "archives": ["Sentinel2LULC_JPEG/{folder}_jpeg/{file}.jpg"],  # beside the CSVs, and what a Mac adds
    "geotiff": [
        "Sentinel2LULC_JPEG/{folder}_jpeg/{file}.jpg",
        "Sentinel2LULC_GeoTiff/{folder}_tif/{file}.tif",
    ],
    "padded": ["Sentinel2LULC_JPEG/{padded}_jpeg/{file}.jpg"],
    "wrapped": ["Sentinel2LULC_354/Sentinel2LULC_354/{folder}_jpeg/{file}.jpg"],
    "split": [FIRST_COPY + "/{split}/{folder}_jpeg/{file}.jpg"],
    "copies": [
        FIRST_COPY + "/{split}/{folder}_jpeg/{file}.jpg",
        SECOND_COPY + "/{other_split}/{folder}_jpeg/{file}.jpg",
    ],
    "valid": ["{valid}/{folder}_jpeg/{file}.jpg"],  # train/, valid/ and test/
}
CSV_HEADER = [
    "Land Cover Class ID",
    "Land Cover Class Short Name",
    "Image ID",
    "Pixel purity Value",
    "GHM Value",
    "Latitude",
    "Longitude",
    "Country Code",
    "Administrative Department Level1",
    "Administrative Department Level2",
    "Locality",
    "Number of S2 images",
]
CAPPED = {1, 4, 8, 14, 21, 22, 23}  # classes of 14,000 images: more were found than downloaded
DEGREES_A_PIXEL = 10 / 111_320  # 10 m, in degrees of latitude
TOWNS = [  # latitude, longitude, country, two departments, locality: around these the scenes lie
    (7.58, 17.15, "TD", "Logone-Oriental", "nan", "Beboto"),
    (36.72, -4.42, "ES", "Andalucía", "Málaga", "Álora"),
    (60.39, 25.66, "FI", "Uusimaa", "nan", "Porvoo"),
    (-3.12, -60.02, "BR", "Amazonas", "Manaus", "Careiro (Castanho)"),
    (51.51, -179.90, "US", "Alaska", "Aleutians West", "nan"),
    (-36.85, 174.76, "NZ", "Auckland", "nan", "Mount Eden, Maungawhau"),
]


class Shot(NamedTuple):
    """One scene of a class, and what the archives say of it."""

    index: int  # of the class, from 0
    number: int  # of the scene within its class
    latitude: float
    longitude: float
    town: int
    purity: float  # %
    human: float  # global human modification, %

    @property
    def file(self) -> str:
        """The file's name without its suffix, as Sentinel2GlobalLULC has it."""
        short = list(PURE_NAMES)[self.index]
        *_, country, first, second, locality = TOWNS[self.town]
        return (
            f"{self.index + 1}_{short}_{self.purity:.1f}__{self.number}_{self.human:.1f}_"
            f"({self.latitude:+.10f},{self.longitude:+.10f})_{country}_{first}_{second}_{locality}"
        )

    @property
    def folder(self) -> str:
        """The class folder's name without its ending, padded with `_` to thirteen letters."""
        return f"{self.index + 1}_{list(PURE_NAMES)[self.index]:_<13}"


def shots_of(index: int, count: int, seed: int) -> list[Shot]:
    """`count` scenes of a class, scattered a degree or so around the towns."""
    shots = []
    for number in range(count):
        rng = np.random.default_rng([seed, 3, index, number])
        town = int(rng.integers(len(TOWNS)))
        latitude, longitude = np.array(TOWNS[town][:2]) + rng.normal(0, 1, 2)
        longitude = (longitude + 180) % 360 - 180
        shots.append(Shot(index, number, latitude, longitude, town, rng.uniform(70, 100), rng.uniform(0, 60)))
    return shots


def paths_of(layout: str, shots: list[Shot]) -> list[list[str]]:
    """Where each scene of one class is written in a layout, in the order of the shots: one path a copy."""
    order = sorted(range(len(shots)), key=lambda i: f"{shots[i].file}.jpg")
    labels = np.zeros(len(shots), int)
    split, other = np.empty(len(shots), object), np.empty(len(shots), object)
    split[order] = split_classes(labels, shares=SHARES)
    other[order] = split_classes(labels, shares=OTHER_SHARES)
    paths = []
    for i, shot in enumerate(shots):
        names = {
            "folder": shot.folder,
            "padded": shot.folder.zfill(len(shot.folder) + (shot.index < 9)),
            "file": shot.file,
            "split": split[i],
            "other_split": other[i],
            "valid": "valid" if split[i] == "val" else split[i],
        }
        paths.append([template.format(**names) for template in PURE_LAYOUTS[layout]])
    return paths


def write_extras(root: Path, layout: str, shots: list[Shot]) -> None:
    """What lies beside the images of one class in a layout: its CSVs, and the shadow files of a Mac."""
    if layout not in ("archives", "geotiff"):
        return
    folder = root / "Sentinel2LULC_CSV"
    folder.mkdir(exist_ok=True)
    names = [f"{shots[0].folder}_CSV.csv"]
    if shots[0].index + 1 in CAPPED:
        names.append(f"{shots[0].folder}_CSV_including_non_downloaded_images.csv")
    for name in names:
        (folder / name).write_text(csv_text(shots), encoding="utf-8-sig")
    shadow = root / "__MACOSX" / "Sentinel2LULC_JPEG" / f"{shots[0].folder}_jpeg"
    shadow.mkdir(parents=True)
    for shot in shots:
        (shadow / f"._{shot.file}.jpg").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")


def csv_text(shots: list[Shot]) -> str:
    """The metadata of one class, a line a scene."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(CSV_HEADER)
    for shot in shots:
        place = [f"{shot.latitude:.10f}", f"{shot.longitude:.10f}", *TOWNS[shot.town][2:]]
        numbers = [f"{shot.purity:.1f}", f"{shot.human:.1f}"]
        table.writerow(
            [
                shot.index + 1,
                list(PURE_NAMES)[shot.index],
                shot.number,
                *numbers,
                *place,
                20 + shot.number % 80,
            ]
        )
    return text.getvalue()


def save_picture(path: Path, image: np.ndarray, shot: Shot, quality: int) -> None:
    """Write a scene (H, W, 3) uint8 as a JPEG or, by the path's suffix, as a GeoTIFF in EPSG:4326."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        Image.fromarray(image).save(path, tiffinfo=geo_tags(shot, *image.shape[:2]))
    else:
        Image.fromarray(image).save(path, quality=quality)


def geo_tags(shot: Shot, height: int, width: int) -> ImageFileDirectory_v2:
    """GeoTIFF's tags for a picture that is centred on its scene's coordinates."""
    step = DEGREES_A_PIXEL
    east = step / max(0.01, np.cos(np.radians(shot.latitude)))
    left, top = shot.longitude - east * width / 2, shot.latitude + step * height / 2
    tags = ImageFileDirectory_v2()
    tags[33550] = (float(east), float(step), 0.0)
    tags[33922] = (0.0, 0.0, 0.0, float(left), float(top), 0.0)
    tags[34735] = (1, 1, 0, 3, 1024, 0, 1, 2, 1025, 0, 1, 1, 2048, 0, 1, 4326)
    tags.tagtype[33550] = tags.tagtype[33922] = 12  # double
    tags.tagtype[34735] = 3  # short
    return tags

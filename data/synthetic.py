"""Built-in scenes: land seen from above at 10 m a pixel, drawn from noise, cells and rows, without downloads.

    python -m data.synthetic scenes --layout pure --count 2900 --size 64   # 29 class folders
    python -m data.synthetic mixed --layout mixed --count 1000 --size 128  # exact class fractions
    python -m data.synthetic large --layout scene --size 1024              # a picture and its class map
    python -m data.synthetic s2 --layout archives --count 290              # named as Sentinel2GlobalLULC

Layouts of class folders, with the archive's names and coordinates: `archives` (beside CSVs and a Mac's
shadow files), `geotiff` (and GeoTIFFs of the same scenes), `padded` (01_…), `wrapped` (twice), `split` and
`copies` (the authors', at one ratio and at two), `valid` (train/, valid/, test/). Of fractions, beside
`mixed`: `levels` (Land-1.0's Level_N1 and Level_N2) and `percent` (as a spreadsheet leaves it).

A recipe is a list of layers painted one over the other: a texture, its colours, its settings (lengths in
pixels). Season, sun, haze, gain, tint, orientation and scale vary whatever the class, so that colour alone
says little. A scene depends on (seed, layout, class or split, number) and on nothing else.
"""

import csv
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

import common
from data.archives import PURE_LAYOUTS, paths_of, save_picture, shots_of, write_extras

Recipe = list[tuple]

# RGB reflectance in the wet season and in the dry or cold one; a scene lies somewhere between the two
PALETTE = {
    "soil": ((0.34, 0.27, 0.22), (0.58, 0.47, 0.37)),
    "sand": ((0.52, 0.44, 0.34), (0.72, 0.62, 0.50)),
    "rock": ((0.36, 0.34, 0.33), (0.52, 0.48, 0.45)),
    "mud": ((0.27, 0.26, 0.22), (0.42, 0.37, 0.31)),
    "grass": ((0.27, 0.40, 0.22), (0.54, 0.47, 0.31)),
    "straw": ((0.38, 0.44, 0.24), (0.68, 0.58, 0.38)),
    "crop": ((0.20, 0.42, 0.18), (0.40, 0.46, 0.24)),
    "moss": ((0.33, 0.37, 0.24), (0.47, 0.42, 0.33)),
    "leaf": ((0.15, 0.29, 0.14), (0.27, 0.28, 0.17)),
    "autumn": ((0.16, 0.31, 0.13), (0.39, 0.30, 0.20)),
    "needle": ((0.12, 0.24, 0.15), (0.19, 0.26, 0.18)),
    "larch": ((0.17, 0.29, 0.14), (0.42, 0.35, 0.19)),
    "sea": ((0.08, 0.17, 0.28), (0.14, 0.27, 0.33)),
    "lake": ((0.12, 0.22, 0.25), (0.26, 0.32, 0.29)),
    "snow": ((0.80, 0.84, 0.90), (0.62, 0.66, 0.74)),
    "plastic": ((0.80, 0.82, 0.84), (0.66, 0.70, 0.74)),
    "roof": ((0.62, 0.40, 0.34), (0.68, 0.66, 0.64)),
    "road": ((0.34, 0.34, 0.36), (0.46, 0.45, 0.45)),
}


@dataclass
class Land:
    """A scene before it is photographed: colour (H, W, 3) and height (H, W) over rotated coordinates u, v
    (H, W)."""

    rng: np.random.Generator
    u: np.ndarray
    v: np.ndarray
    scale: float
    season: float
    colour: np.ndarray
    height: np.ndarray

    def frame(self, size: float, aspect: float, warp: float) -> tuple[np.ndarray, np.ndarray]:
        """u and v counted in sizes, from 1 up; bent by noise where the land was not laid out with a ruler."""
        u, v = self.u / np.float32(size * aspect * self.scale), self.v / np.float32(size * self.scale)
        if warp:
            u, v = (a + np.float32(warp) * self.noise(3 * size) for a in (u, v))
        return u - np.floor(u.min()) + 1, v - np.floor(v.min()) + 1

    def noise(self, wavelength: float, slope: float = 3, stretch: float = 1) -> np.ndarray:
        """`noise` of the land's shape; the wavelength is in pixels of a scene of scale 1."""
        return noise(self.rng, self.height.shape, wavelength * self.scale, slope, stretch)

    def draw(self, names: str, count: int, spread: float) -> np.ndarray:
        """(count, 3) colours, each from one of the palette's `names`, `spread` apart in season."""
        ends = np.array([PALETTE[name] for name in names.split()], np.float32)
        wet, dry = ends[self.rng.integers(len(ends), size=count)].swapaxes(0, 1)
        moment = np.clip(self.season + spread * self.rng.standard_normal((count, 1)), 0, 1)
        return np.float32(wet + moment * (dry - wet) + 0.02 * self.rng.standard_normal((count, 3)))

    def paint(self, alpha: np.ndarray, colour: np.ndarray, height: np.ndarray | float) -> None:
        """Lay a colour (..., 3) and a height over the land, as opaque as alpha (H, W), 0-1, says."""
        self.colour += alpha[..., None] * (colour - self.colour)
        self.height += alpha * (height - self.height)


def noise(
    rng: np.random.Generator, shape: tuple[int, int], wavelength: float, slope: float = 3, stretch: float = 1
) -> np.ndarray:
    """Gaussian field (H, W), mean 0, variance 1; amplitude falls as frequency^-slope above 1/wavelength
    (Matérn)."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * fx + np.sin(angle) * fy
    across = np.cos(angle) * fy - np.sin(angle) * fx
    amplitude = (1 + wavelength**2 * ((stretch * along) ** 2 + across**2)) ** (-slope / 2)
    white = rng.standard_normal((*amplitude.shape, 2), np.float32).view(np.complex64)[..., 0]
    field = np.fft.irfft2(np.float32(amplitude) * white, shape)
    field -= field.mean()
    return field / (field.std() + np.float32(1e-6))


def cells(
    land: Land, size: float, jitter: float, aspect: float = 1, square: bool = False, warp: float = 0
) -> tuple:
    """Nearest of jittered grid points (Worley 1996): distance, gap to the second (in sizes), number, of how
    many."""
    u, v = land.frame(size, aspect, warp)
    i, j = u.astype(np.int32), v.astype(np.int32)
    rows, columns = int(i.max()) + 2, int(j.max()) + 2
    points = np.indices((rows, columns), np.float32) + np.float32(0.5)
    points += np.float32(jitter) * (land.rng.random(points.shape, np.float32) - np.float32(0.5))
    around = (np.arange(-1, 2)[:, None] * columns + np.arange(-1, 2)).reshape(9, 1, 1)
    near = (i * columns + j) + around  # (9, H, W)
    du, dv = points[0].take(near) - u, points[1].take(near) - v
    distance = np.maximum(np.abs(du), np.abs(dv)) if square else np.sqrt(du * du + dv * dv)
    first = distance.argmin(0)[None]
    nearest, number = (np.take_along_axis(a, first, 0)[0] for a in (distance, near))
    np.put_along_axis(distance, first, np.float32(9), 0)
    return nearest, distance.min(0) - nearest, number, rows * columns


def plots(land: Land, size: float, aspect: float, warp: float) -> tuple:
    """Rectangles of unequal length in strips, like bricks: twice the way out (in sizes), number, of how
    many."""
    u, v = land.frame(size, 1, warp)
    j = v.astype(np.int32)
    length = np.float32(aspect * land.rng.uniform(0.6, 1.6, j.max() + 1))[j]
    u = u / length + land.rng.random(j.max() + 1, np.float32)[j]
    along, across = (0.5 - np.abs(u % 1 - 0.5)) * length, 0.5 - np.abs(v % 1 - 0.5)
    columns = int(u.max()) + 1
    return 2 * np.minimum(along, across), j * columns + u.astype(np.int32), (int(j.max()) + 1) * columns


def step(x: np.ndarray) -> np.ndarray:
    """0 below -0.5, 1 above 0.5, a ramp between."""
    return np.clip(x + np.float32(0.5), 0, 1)


def ground(
    land: Land,
    colours: str,
    wavelength: float = 20,
    slope: float = 2.5,
    stretch: float = 1,
    contrast: float = 0.3,
    relief: float = 0,
) -> None:
    """Two colours blended by noise, over gentle or steep relief."""
    field = land.noise(wavelength, slope, stretch)
    first, second = land.draw(colours, 2, 0.2)
    land.colour[:] = first + step(np.float32(contrast) * field)[..., None] * (second - first)
    land.height[:] = np.float32(relief) * field


def patches(
    land: Land,
    colours: str,
    cover: float,
    wavelength: float = 12,
    slope: float = 4,
    stretch: float = 1,
    tall: float = 0,
    winding: bool = False,
) -> None:
    """Where noise is high: ponds, thickets, outcrops. Where it changes sign (`winding`): creeks, gullies,
    tracks."""
    field = land.noise(wavelength, slope, stretch)
    field = -np.abs(field) if winding else field
    cut = np.quantile(field, np.clip(1 - cover * np.exp(land.rng.normal(0, 0.25)), 0, 1))
    land.paint(
        step(np.float32(wavelength / 2) * (field - np.float32(cut))), land.draw(colours, 1, 0.15), tall
    )


def objects(
    land: Land,
    colours: str,
    size: float,
    cover: float,
    radius: float = 0.5,
    jitter: float = 1,
    profile: float = 2,
    tall: float = 1,
    spread: float = 0.15,
    square: bool = False,
    aspect: float = 1,
) -> None:
    """What stands on the ground: crowns (`profile` 1 a cone, 2 a dome), roofs (square, flat), circles under
    a pivot."""
    distance, _, number, count = cells(land, size, jitter, aspect, square)
    reach = np.float32(radius * land.rng.uniform(0.75, 1.25, count) * (land.rng.random(count) < cover))[
        number
    ]
    top = tall * (1 - np.minimum(distance / np.maximum(reach, np.float32(0.01)), 1) ** np.float32(profile))
    alpha = step((reach - distance) * np.float32(size * land.scale)) * (reach > 0)
    land.paint(alpha, land.draw(colours, count, spread)[number], land.height + top)


def parcels(
    land: Land,
    colours: str,
    size: float,
    aspect: float = 1.5,
    jitter: float = 0,
    border: str = "grass",
    width: float = 1,
    furrow: float = 0,
    period: float = 4,
    warp: float = 0,
    tall: float = 0,
) -> None:
    """Fields, each with its own colour and furrows, and what lies between them: cells if `jitter`ed, else
    rectangles.

    Without colours only what lies between is painted: streets over a town."""
    gap, number, count = (
        cells(land, size, jitter, aspect, warp=warp)[1:] if jitter else plots(land, size, aspect, warp)
    )
    if colours:
        angle = land.rng.integers(2, size=count) * np.pi / 2 + land.rng.normal(0, 0.1, count)
        across = np.float32(np.cos(angle))[number] * land.u + np.float32(np.sin(angle))[number] * land.v
        depth = np.float32(furrow * land.rng.uniform(0, 2, count))[number]
        rows = 1 + depth * np.sin(across * np.float32(2 * np.pi / (period * land.scale)))
        land.colour[:] = land.draw(colours, count, 0.25)[number] * rows[..., None]
    land.paint(
        step((np.float32(width) - gap * np.float32(size * land.scale)) / 2), land.draw(border, 1, 0.15), tall
    )


def forest(cover: float, kind: str) -> Recipe:
    """Crowns differ in shape, size and height by leaf, and from tree to tree in season where the leaves
    fall."""
    colours, size, profile, tall, spread = {
        "DeBr": ("autumn", 6, 2.5, 2, 0.3),
        "DeNe": ("larch", 3.6, 1, 4, 0.3),
        "EvBr": ("leaf", 7, 2.5, 2, 0.05),
        "EvNe": ("needle", 3.6, 1, 4, 0.05),
    }[kind]
    crowns = dict(size=size, cover=cover, radius=0.62, profile=profile, tall=tall, spread=spread)
    return [(ground, "grass soil moss straw", dict(contrast=0.4)), (objects, colours, crowns)]


def forests(kind: str) -> dict[str, Recipe]:
    """The open, close and dense forest of a kind of leaf, by their names in the archive."""
    covers = {"Op": 0.3, "Cl": 0.65, "De": 1}
    return {f"Forests{density}{kind}": forest(cover, kind) for density, cover in covers.items()}


PURE: dict[str, Recipe] = {  # Sentinel2GlobalLULC, in the order of Table II, by the names of the archive
    "BarrenLands": [
        (ground, "soil sand rock", dict(slope=2, relief=2)),
        (patches, "sand rock", dict(cover=0.08, wavelength=25, winding=True)),
    ],
    "MossAndLichen": [
        (parcels, "moss", dict(size=8, aspect=1, jitter=1, border="mud straw", width=1.5)),
        (patches, "lake", dict(cover=0.06, wavelength=9)),
    ],
    "Grasslands": [
        (ground, "grass straw", dict(wavelength=30, relief=0.5)),
        (patches, "soil", dict(cover=0.02, wavelength=60, winding=True)),
        (objects, "leaf", dict(size=4, cover=0.02, tall=2)),
    ],
    "ShrublandOpen": [
        (ground, "soil sand straw", dict(relief=0.6)),
        (objects, "leaf grass", dict(size=3, cover=0.3)),
    ],
    "SrublandClose": [
        (ground, "soil sand straw", dict(relief=0.6)),
        (patches, "leaf moss", dict(cover=0.5)),
        (objects, "leaf grass", dict(size=3, cover=0.6)),
    ],
    **forests("DeBr"),
    **forests("DeNe"),
    **forests("EvBr"),
    **forests("EvNe"),
    "WetlandMangro": [
        (ground, "leaf", {}),
        (objects, "leaf", dict(size=3, cover=1, radius=0.6, spread=0.1)),
        (patches, "mud lake", dict(cover=0.14, wavelength=22, winding=True)),
        (patches, "lake sea", dict(cover=0.15, wavelength=30)),
    ],
    "WetlandSwamps": [
        (ground, "lake mud", dict(wavelength=14)),
        (patches, "moss grass", dict(cover=0.35)),
        (objects, "autumn leaf", dict(size=4.5, cover=0.45, tall=2)),
    ],
    "WetlandMarshl": [
        (ground, "grass straw moss", dict(stretch=2)),
        (patches, "lake", dict(cover=0.3, wavelength=10, slope=3, stretch=2)),
    ],
    "WaterBodyMari": [(ground, "sea lake", dict(wavelength=8, slope=3, stretch=5, contrast=0.5, relief=0.4))],
    "WaterBodyCont": [
        (ground, "lake sea", dict(wavelength=40, slope=3)),
        (patches, "grass soil leaf", dict(cover=0.25, wavelength=60, tall=1)),
    ],
    "PermanentSnow": [
        (ground, "snow", dict(wavelength=35, relief=4)),
        (patches, "rock", dict(cover=0.1, slope=2)),
    ],
    "CropSeasWater": [
        (
            parcels,
            "lake lake crop mud",
            dict(size=9, aspect=2, jitter=0.6, border="straw", width=1.5, warp=0.3),
        )
    ],
    "CropCereaIrri": [
        (ground, "soil straw sand", {}),
        (objects, "crop straw crop", dict(size=22, cover=0.85, radius=0.42, jitter=0.1, tall=0, spread=0.4)),
    ],
    "CropCereaRain": [(parcels, "straw soil grass", dict(size=26, furrow=0.1))],
    "CropBroadIrri": [
        (parcels, "crop soil", dict(size=16, aspect=2, border="lake", width=2, furrow=0.2, period=5))
    ],
    "CropBroadRain": [
        (parcels, "crop grass soil", dict(size=15, jitter=0.7, border="leaf", width=2, warp=0.15, tall=2)),
        (objects, "leaf", dict(size=6, cover=0.1, tall=2)),
    ],
    "UrbanBlUpArea": [
        (ground, "road grass soil", dict(wavelength=15)),
        (
            objects,
            "roof road roof",
            dict(size=4.5, cover=0.7, radius=0.42, jitter=0.4, profile=20, tall=2.5, square=True, aspect=1.4),
        ),
        (parcels, "", dict(size=16, border="road", width=3)),
    ],
}
TREES = (objects, "leaf", dict(size=7, cover=0.25, tall=2))
# Land-1.0: its scenes (Table II), and the looks a class may take
MIXED: dict[str, tuple[int, list[Recipe]]] = {
    "Artificial": (437, [PURE["UrbanBlUpArea"]]),
    "AnnualCroplands": (3690, [PURE[name] for name in PURE if name.startswith("Crop")]),
    "Greenhouses": (
        123,
        [[(parcels, "plastic", dict(size=7, aspect=3, border="road soil", width=2, furrow=0.04))]],
    ),
    "WoodyCroplands": (
        5979,
        [
            [
                (parcels, "soil straw sand", dict(size=40, border="soil")),
                (objects, "leaf", dict(size=5, cover=0.97, radius=0.33, jitter=0.1)),
            ]
        ],
    ),
    "CropsAndNatural": (
        159,
        [[*PURE["CropBroadRain"], (patches, "leaf moss", dict(cover=0.3, tall=1)), TREES]],
    ),
    "Grasslands": (2448, [PURE["Grasslands"], [*PURE["Grasslands"], TREES]]),
    "Shrublands": (6383, [PURE["ShrublandOpen"], PURE["SrublandClose"], [*PURE["ShrublandOpen"], TREES]]),
    "Forests": (1237, [PURE[name] for name in PURE if name.startswith(("ForestsCl", "ForestsDe"))]),
    "Barelands": (702, [PURE["BarrenLands"]]),
    "Wetlands": (331, [PURE["WetlandMarshl"], PURE["WetlandSwamps"], PURE["WaterBodyCont"]]),
}
CLASSES, MIXED_CLASSES = list(PURE), list(MIXED)
LEVEL_N1 = {  # Land-1.0's four classes -> the columns of the ten that they hold
    "Artificial": [0],
    "Agricultural": [1, 2, 3, 4],
    "Terrestrial": [5, 6, 7, 8],
    "Wetlands": [9],
}


def bare(shape: tuple[int, int], rng: np.random.Generator, season: float) -> Land:
    """A land (H, W) without layers, turned and shifted at random; `season` goes from 0, wet, to 1, dry."""
    y, x = np.indices(shape, np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin, du, dv = np.float32([np.cos(angle), np.sin(angle), *rng.uniform(0, 99, 2)])
    u = cos * x + sin * y + du
    v = cos * y - sin * x + dv
    scale = np.exp(rng.uniform(-0.3, 0.3))
    colour, height = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
    return Land(rng, u, v, scale, season, colour, height)


def grow(recipe: Recipe, shape: tuple[int, int], rng: np.random.Generator, season: float) -> Land:
    """A land (H, W) with the layers of a recipe, one over the other."""
    land = bare(shape, rng, season)
    for layer, colours, settings in recipe:
        layer(land, colours, **settings)
    land.colour *= 1 + np.float32(0.05) * noise(rng, shape, 4, 1.5)[..., None]
    return land


def shade(height: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light (H, W) under a sun of random azimuth and elevation: lit and dark slopes, shadows of up to three
    pixels."""
    azimuth, climb = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.3)  # climb: tangent of the elevation
    sun = np.float32([np.sin(azimuth), np.cos(azimuth)])  # y, x
    slope = np.gradient(height)
    light = 1 - np.float32(0.25 / climb) * np.tanh(sun[0] * slope[0] + sun[1] * slope[1])
    rows, columns = (np.arange(n) for n in height.shape)
    for k in (1, 2, 3):
        dy, dx = np.rint(k * sun).astype(int)
        towards = height[np.clip(rows + dy, 0, rows[-1])][:, np.clip(columns + dx, 0, columns[-1])]
        light *= 1 - np.float32(0.22) * np.clip(towards - height - np.float32(k * climb), 0, 1)
    return light


def photograph(land: Land) -> np.ndarray:
    """Sun, saturation, haze, gain, warmth and the sensor, in this order: uint8 (H, W, 3)."""
    rng, image = land.rng, land.colour * shade(land.height, land.rng)[..., None]
    grey = image.mean(-1, keepdims=True)
    image = grey + np.float32(rng.uniform(0.4, 1.1)) * (image - grey)
    haze = (
        np.float32(0.6 * rng.beta(1, 3))
        * step(np.float32(0.25) * noise(rng, land.height.shape, 60))[..., None]
    )
    image += haze * (np.float32([0.55, 0.60, 0.68]) - image)
    warmth = rng.normal(0, 0.07)
    image *= np.float32(
        np.exp(rng.normal(0, 0.22) + np.array([warmth, 0, -warmth]) + rng.normal(0, 0.025, 3))
    )
    image += rng.normal(0, 0.015) + np.float32(0.01) * rng.standard_normal(image.shape, np.float32)
    sensor = ImageFilter.GaussianBlur(rng.uniform(0, 0.6))
    return np.array(Image.fromarray(np.uint8(np.clip(image, 0, 1) * 255)).filter(sensor))


def render(index: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One pure scene of class CLASSES[index]: uint8 (size, size, 3)."""
    return photograph(grow(PURE[CLASSES[index]], (size, size), rng, rng.random()))


def mixed_scene(
    height: int, width: int, rng: np.random.Generator, region: float = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Warped Voronoi cells of about `region` pixels: uint8 (H, W, 3), and their indices into MIXED_CLASSES
    (H, W)."""
    land = bare((height, width), rng, rng.random())
    *_, number, count = cells(land, region, 1, warp=0.25)
    weights = np.sqrt([scenes for scenes, _ in MIXED.values()])  # Land-1.0's imbalance, weakened
    classes = rng.choice(len(MIXED), count, p=weights / weights.sum())
    for cell in np.unique(number):
        box = tuple(slice(hit.min(), hit.max() + 1) for hit in np.nonzero(number == cell))
        inside = number[box] == cell
        _, looks = MIXED[MIXED_CLASSES[classes[cell]]]
        patch = grow(looks[rng.integers(len(looks))], inside.shape, rng, land.season)
        land.colour[box][inside] = patch.colour[inside]
        land.height[box][inside] = patch.height[inside]
    return photograph(land), classes[number]


def render_mixed(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One mixed scene, uint8 (size, size, 3), and the exact shares of its area (10,), in the order of
    MIXED_CLASSES."""
    image, class_map = mixed_scene(size, size, rng, size * rng.uniform(0.4, 1.2))
    return image, np.bincount(class_map.ravel(), minlength=len(MIXED)) / class_map.size


def class_sizes(count: int) -> list[int]:
    """How many of `count` scenes each pure class gets: as many as the others, or one more."""
    return [count // len(CLASSES) + (index < count % len(CLASSES)) for index in range(len(CLASSES))]


def write_pure(root: Path, count: int, size: int, seed: int, quality: int, bar: tqdm) -> None:
    """A folder a class, with JPEGs of one class each."""
    for index, (name, n) in enumerate(zip(CLASSES, class_sizes(count), strict=True)):
        folder = root / f"{index + 1}_{name:_<13}_jpeg"
        folder.mkdir()
        for i in range(n):
            image = render(index, size, np.random.default_rng([seed, 0, index, i]))
            Image.fromarray(image).save(folder / f"{i:05d}.jpg", quality=quality)
            bar.update()


def write_archive(root: Path, layout: str, count: int, size: int, seed: int, quality: int, bar: tqdm) -> None:
    """The scenes of `pure` under the names of a real archive, with what lies beside them there."""
    for index, n in enumerate(class_sizes(count)):
        shots = shots_of(index, n, seed)
        for shot, paths in zip(shots, paths_of(layout, shots), strict=True):
            image = render(index, size, np.random.default_rng([seed, 0, index, shot.number]))
            for path in paths:
                save_picture(root / path, image, shot, quality)
            bar.update()
        write_extras(root, layout, shots)


def write_mixed(root: Path, count: int, size: int, seed: int, quality: int, bar: tqdm) -> None:
    """Land-1.0's layout: JPEGs of several classes each, and CSV files of their fractions."""
    level = root / "Level_N2"
    for split, shares in draw_mixed(level, ("train", "val", "test"), count, size, seed, quality, bar):
        rows = fraction_rows(split, shares, MIXED_CLASSES, "N2")
        write_cells(level / "CSV" / f"csv_{split}.csv", rows)


def write_levels(root: Path, count: int, size: int, seed: int, quality: int, bar: tqdm) -> None:
    """Land-1.0 with both of its levels, ten classes and four, beside a spreadsheet."""
    ten, four = root / "Level_N2", root / "Level_N1"
    for split, shares in draw_mixed(ten, ("train", "val", "test"), count, size, seed, quality, bar):
        write_cells(ten / "CSV" / f"csv_{split}.csv", fraction_rows(split, shares, MIXED_CLASSES, "N2"))
        sums = np.stack([shares[:, columns].sum(1) for columns in LEVEL_N1.values()], 1)
        write_cells(four / "CSV" / f"csv_{split}.csv", fraction_rows(split, sums, list(LEVEL_N1), "N1"))
    shutil.copytree(ten / "RGB Images", four / "RGB Images")
    with zipfile.ZipFile(root / "Land-1.0.xlsx", "w") as sheet:
        sheet.writestr("[Content_Types].xml", "<Types/>")


def write_percent(root: Path, count: int, size: int, seed: int, quality: int, bar: tqdm) -> None:
    """Land-1.0 as a spreadsheet leaves it: per cent to one decimal, `;` and decimal commas, names without
    suffix."""
    level = root / "Level_N2"
    for split, shares in draw_mixed(level, ("train", "validation", "test"), count, size, seed, quality, bar):
        rows = fraction_rows(split, shares, MIXED_CLASSES, "N2")
        for row, values in zip(rows[1:], shares, strict=True):
            row[3] = row[3].removesuffix(".jpg")
            row[5:15] = [f"{100 * value:.1f}".replace(".", ",") for value in values]
        write_cells(level / "CSV" / f"csv_{split}.csv", rows, encoding="utf-8-sig", delimiter=";")


def draw_mixed(
    level: Path, names: tuple[str, str, str], count: int, size: int, seed: int, quality: int, bar: tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    """Write the pictures of Land-1.0, 70/10/20, below `level`; yields (split, shares (n, 10)) of each of
    its splits."""
    train, val = int(0.7 * count), int(0.1 * count)
    (level / "CSV").mkdir(parents=True)
    for number, (split, n) in enumerate(zip(names, (train, val, count - train - val), strict=True)):
        folder = level / "RGB Images" / split
        folder.mkdir(parents=True)
        shares = np.empty((n, len(MIXED_CLASSES)))
        for i in range(n):
            image, shares[i] = render_mixed(size, np.random.default_rng([seed, 1, number, i]))
            Image.fromarray(image).save(folder / f"{split}_{i:05d}.jpg", quality=quality)
            bar.update()
        yield split, shares


def fraction_rows(split: str, shares: np.ndarray, classes: list[str], level: str) -> list[list]:
    """The header and the rows of a CSV of Land-1.0: file in column 3, fractions from column 5 on."""
    rows = [["ID", "Latitude", "Longitude", "Filename", "Level", *classes, "Class_max"]]
    for i, values in enumerate(shares):
        numbers = [f"{share:.6f}" for share in values]
        rows.append([i, "", "", f"{split}_{i:05d}.jpg", level, *numbers, classes[values.argmax()]])
    return rows


def write_cells(file: Path, rows: list[list], encoding: str = "utf-8", delimiter: str = ",") -> None:
    """Write rows of texts and numbers as a CSV, in any encoding and with any delimiter."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding=encoding) as table:
        csv.writer(table, delimiter=delimiter).writerows(rows)


def write_large(root: Path, count: int, size: int, seed: int, quality: int, bar: tqdm) -> None:
    """Pairs of PNGs: a scene, and a map of its classes with their numbers as values."""
    for i in range(count):
        image, class_map = mixed_scene(size, size, np.random.default_rng([seed, 2, i]))
        Image.fromarray(image).save(root / f"scene-{i}.png")
        Image.fromarray(class_map.astype(np.uint8)).save(root / f"classes-{i}.png")
        bar.update()


WRITERS = {
    "pure": write_pure,
    "mixed": write_mixed,
    "scene": write_large,
    "levels": write_levels,
    "percent": write_percent,
    **{layout: partial(write_archive, layout=layout) for layout in PURE_LAYOUTS},
}
LEAST = dict.fromkeys(WRITERS, len(CLASSES)) | {"mixed": 10, "levels": 10, "percent": 10, "scene": 1}


def write_scenes(
    root: str | Path,
    layout: str = "pure",
    count: int = 2900,
    size: int = 64,
    seed: int = 0,
    quality: int = 95,
) -> None:
    """Write `count` JPEGs: 29 class folders (`pure`), or Land-1.0's folders and CSVs, split 70/10/20
    (`mixed`).

    Or large mixed scenes as PNGs, each with its class map, whose grey values are indices into MIXED_CLASSES
    (`scene`); or the first two under the names of a real archive (the other layouts of the docstring
    above). `root` appears whole or not at all. FileExistsError if it holds anything or is `.`, ValueError
    for a number out of range.
    """
    root = Path(root)
    check_numbers(layout, count, size, seed, quality)
    with (
        common.new_folder(root) as part,
        tqdm(total=count, desc=f"{layout} scenes", unit="scene", disable=None) as bar,
    ):
        WRITERS[layout](part, count=count, size=size, seed=seed, quality=quality, bar=bar)


def check_numbers(layout: str, count: int, size: int, seed: int, quality: int) -> None:
    """ValueError for a layout that is not there or a number out of range."""
    if layout not in WRITERS:
        raise ValueError(f"layout is {layout!r}: give {', '.join(WRITERS)}")
    for name, value, low, high in (
        ("count", count, LEAST[layout], 10**7),
        ("size", size, 16, 4096),
        ("seed", seed, 0, 2**63),
        ("quality", quality, 1, 100),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}: give a number from {low} to {high} (layout {layout})")


def build_parser() -> common.Parser:
    """The flags of `python -m data.synthetic`."""
    parser = common.Parser(__doc__, usage="python -m data.synthetic OUT [flags]")
    parser.prog = "python -m data.synthetic"
    parser.add_argument("out", help="folder to create")
    parser.add_argument(
        "--layout", choices=tuple(WRITERS), default="pure", help="what is written, and under which names"
    )
    parser.add_argument("--count", type=int, help="scenes in all; 2900 or, of the large ones, 1 if left out")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side, 10 m each")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write scenes as the command line says."""
    flags = build_parser().parse_args(argv)
    common.exit_on_signals(lambda: f"nothing is left of {flags.out}")
    count = flags.count
    if count is None:
        count = 1 if flags.layout == "scene" else 2900
    try:
        write_scenes(flags.out, flags.layout, count, flags.size, flags.seed, flags.quality)
    except (FileExistsError, ValueError) as error:
        raise common.ConfigError(str(error)) from None
    print(f"{count} scenes of {flags.size} px, layout {flags.layout}: {flags.out}", flush=True)


if __name__ == "__main__":
    with common.one_line_errors():
        main()

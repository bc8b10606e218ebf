"""The built-in scenes: the same for ever, laid out as the real archives, with fractions that are true.

python -m tests.test_synthetic    # what colour, texture and a random network know of 2,900 scenes
"""

import csv

import numpy as np
import pytest
from conftest import refused
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data import synthetic
from data.names import LAND_NAMES, PURE_NAMES
from data.splits import coordinates
from data.tables import DataError, load_table


def contents(root):
    return {
        file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    root = tmp_path_factory.mktemp("pure") / "scenes"
    synthetic.write_scenes(root, "pure", count=60, size=32)
    return root


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed") / "scenes"
    synthetic.write_scenes(root, "mixed", count=20, size=48, seed=3)
    return root


def test_same_seed_same_bytes_and_another_seed_none(pure, tmp_path):
    synthetic.write_scenes(tmp_path / "again", "pure", count=60, size=32)
    synthetic.write_scenes(tmp_path / "other", "pure", count=60, size=32, seed=1)
    first, other = contents(pure), contents(tmp_path / "other")
    assert contents(tmp_path / "again") == first
    assert other.keys() == first.keys() and not any(other[name] == first[name] for name in first)
    assert len(set(first.values())) == len(first) == 60


@pytest.mark.parametrize(
    "layout, fewer, options", [("pure", 29, dict(size=32)), ("mixed", 10, dict(size=48, seed=3))]
)
def test_a_scene_does_not_depend_on_how_many_there_are(layout, fewer, options, pure, mixed, tmp_path):
    synthetic.write_scenes(tmp_path / "fewer", layout, count=fewer, **options)
    more = contents({"pure": pure, "mixed": mixed}[layout])
    images = {name: data for name, data in contents(tmp_path / "fewer").items() if name.endswith(".jpg")}
    assert len(images) == fewer and all(more[name] == data for name, data in images.items())


def test_pure_scenes_are_laid_out_as_the_archive(pure):
    names = sorted((folder.name for folder in pure.iterdir()), key=lambda name: int(name.split("_")[0]))
    assert names[:6] == [
        "1_BarrenLands___jpeg",
        "2_MossAndLichen_jpeg",
        "3_Grasslands____jpeg",
        "4_ShrublandOpen_jpeg",
        "5_SrublandClose_jpeg",
        "6_ForestsOpDeBr_jpeg",
    ]
    assert names[28] == "29_UrbanBlUpArea_jpeg" and len(names) == 29
    table = load_table(pure)
    assert table.classes == list(PURE_NAMES.values()) and len(table) == 60
    assert set(np.bincount(table.labels)) == {2, 3}
    scene = synthetic.render(9, 32, np.random.default_rng([0, 0, 9, 1]))
    stored = np.asarray(Image.open(pure / names[9] / "00001.jpg"))
    # JPEG's loss, not another scene
    assert stored.shape == (32, 32, 3) and abs(stored.astype(int) - scene).mean() < 6


def test_mixed_scenes_are_laid_out_as_land(mixed):
    for split, n in {"train": 14, "val": 2, "test": 4}.items():
        with open(mixed / "Level_N2" / "CSV" / f"csv_{split}.csv", newline="") as file:
            header, *rows = csv.reader(file)
        assert header == [
            "ID",
            "Latitude",
            "Longitude",
            "Filename",
            "Level",
            *synthetic.MIXED_CLASSES,
            "Class_max",
        ]
        images = sorted(image.name for image in (mixed / "Level_N2" / "RGB Images" / split).iterdir())
        assert [row[3] for row in rows] == images and len(images) == n
        for row in rows:
            shares = np.array(row[5:15], float)
            assert abs(shares.sum() - 1) < 1e-5 and row[15] == header[5 + shares.argmax()]
    table = load_table(mixed)
    assert table.fractions.shape == (20, 10) and (table.fractions.max(1) < 1).any()


def test_fractions_are_the_areas_of_the_class_map(mixed):
    table, size = load_table(mixed), 48
    for i, row in enumerate(np.flatnonzero(table.split == "train")):
        rng = np.random.default_rng([3, 1, 0, i])
        _, class_map = synthetic.mixed_scene(size, size, rng, size * rng.uniform(0.4, 1.2))
        areas = [(class_map == index).sum() / size**2 for index in range(10)]
        np.testing.assert_allclose(table.fractions[row], areas, atol=2e-6)


@pytest.fixture
def flat(monkeypatch):
    """Mixed scenes whose pixels are the number of the class that was painted there."""

    def grow(recipe, shape, rng, season):
        land = synthetic.bare(shape, rng, season)
        land.colour += [any(recipe is look for look in looks) for _, looks in synthetic.MIXED.values()].index(
            True
        )
        return land

    monkeypatch.setattr(synthetic, "grow", grow)
    monkeypatch.setattr(synthetic, "photograph", lambda land: land.colour)


def test_the_class_map_says_what_was_painted_where(flat):
    image, class_map = synthetic.mixed_scene(90, 130, np.random.default_rng(0), region=30)
    assert class_map.shape == (90, 130) and len(np.unique(class_map)) > 3
    np.testing.assert_array_equal(image, np.repeat(class_map[..., None], 3, -1))


def test_mixed_classes_are_imbalanced_as_in_land(flat):
    _, class_map = synthetic.mixed_scene(320, 320, np.random.default_rng(0), region=10)
    area = np.bincount(class_map.ravel(), minlength=10) / class_map.size
    weights = np.sqrt([scenes for scenes, _ in synthetic.MIXED.values()])
    np.testing.assert_allclose(area, weights / weights.sum(), atol=0.05)
    assert area.max() > 4 * area.min() > 0


@pytest.mark.parametrize("size", [32, 51, 512])
def test_every_class_at_every_size(size):
    for index in range(29) if size < 100 else (0, 8, 28):
        scene = synthetic.render(index, size, np.random.default_rng(index))
        assert scene.shape == (size, size, 3) and scene.dtype == np.uint8 and scene.std() > 1, (
            synthetic.CLASSES[index]
        )
    image, shares = synthetic.render_mixed(size, np.random.default_rng(0))
    assert image.shape == (size, size, 3) and abs(shares.sum() - 1) < 1e-9


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--count", "28"], "count is 28"),
        (["--count", "9", "--layout", "mixed"], "count is 9"),
        (["--size", "8"], "size is 8"),
        (["--quality", "0"], "quality is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--count", "many"], "invalid int value"),
        (["--layout", "round"], "invalid choice"),
        ([], "not empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, says, tmp_path, capsys):
    if not flags:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("kept")
    assert says in refused(capsys, synthetic.main, tmp_path / "out", *flags)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ([] if flags else ["mine.txt"])


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(index, size, rng):
        if index == 5:
            raise OSError("No space left on device")
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(synthetic, "render", full)
    with pytest.raises(OSError, match="No space"):
        synthetic.write_scenes(tmp_path / "out")
    assert not list(tmp_path.iterdir())


LOADED = {  # layout -> classes, images of each split (None: refused)
    "archives": (29, {"train": 2, "val": 0, "test": 29}),
    "geotiff": None,
    "padded": (29, {"train": 2, "val": 0, "test": 29}),
    "wrapped": (29, {"train": 2, "val": 0, "test": 29}),
    "split": (29, {"train": 2, "val": 0, "test": 29}),
    "copies": None,
    "valid": (29, {"train": 2, "val": 0, "test": 29}),
    "levels": (10, {"train": 21, "val": 3, "test": 7}),
    "percent": (10, {"train": 21, "val": 3, "test": 7}),
}


@pytest.mark.parametrize("layout", LOADED)
def test_every_layout_loads_or_is_refused_by_name(layout, tmp_path):
    root = tmp_path / "scenes"
    synthetic.write_scenes(root, layout, count=31, size=16)
    if LOADED[layout] is None:
        with pytest.raises(DataError, match="name one of them with --data"):
            load_table(root)
        return
    table = load_table(root)
    names = PURE_NAMES if LOADED[layout][0] == 29 else LAND_NAMES
    assert table.classes == list(names.values())
    assert {name: int((table.split == name).sum()) for name in ("train", "val", "test")} == LOADED[layout][1]
    assert all(Image.open(table.root / file).size == (16, 16) for file in table.files)


def test_archives_hold_what_the_real_ones_hold(tmp_path):
    synthetic.write_scenes(tmp_path / "s2", "geotiff", count=60, size=16)
    csvs = sorted((tmp_path / "s2" / "Sentinel2LULC_CSV").iterdir())
    assert len(csvs) == 36 and sum("including_non_downloaded" in file.name for file in csvs) == 7
    rows = list(csv.DictReader(csvs[0].read_text(encoding="utf-8-sig").splitlines()))
    assert len(rows) == 2 and rows[0]["Land Cover Class Short Name"] in PURE_NAMES
    jpeg = load_table(tmp_path / "s2" / "Sentinel2LULC_JPEG")
    geotiff = load_table(tmp_path / "s2" / "Sentinel2LULC_GeoTiff")
    assert jpeg.classes == geotiff.classes and (jpeg.split == geotiff.split).all()
    places = coordinates(jpeg.root, jpeg.files)
    picture = Image.open(geotiff.root / geotiff.files[7])
    step, tie = picture.tag_v2[33550], picture.tag_v2[33922]
    centre = tie[4] - 8 * step[1], tie[3] + 8 * step[0]
    assert np.allclose(centre, places[7], atol=1e-9) and picture.tag_v2[34735][-1] == 4326
    assert load_table(tmp_path / "s2" / "Sentinel2LULC_JPEG", split="spatial").rule == "spatial"


def test_level_n1_sums_the_columns_of_level_n2(tmp_path):
    synthetic.write_scenes(tmp_path / "land", "levels", count=20, size=32)
    ten, four = (load_table(tmp_path / "land" / f"Level_N{level}") for level in (2, 1))
    assert four.classes == list(synthetic.LEVEL_N1) and (ten.files == four.files).all()
    for k, columns in enumerate(synthetic.LEVEL_N1.values()):
        assert np.allclose(four.fractions[:, k], ten.fractions[:, columns].sum(1), atol=1e-5)


def test_per_cent_with_commas_means_the_same_fractions(mixed, tmp_path):
    synthetic.write_scenes(tmp_path / "percent", "percent", count=20, size=48, seed=3)
    exact, rounded = load_table(mixed), load_table(tmp_path / "percent")
    assert np.allclose(exact.fractions, rounded.fractions, atol=2e-3)
    assert any("per cent" in note for note in rounded.notes)


def sample(each, size=64, seed=7):
    """`each` scenes of every class, their labels, and the mask of the quarter kept for testing."""
    images = [
        synthetic.render(c, size, np.random.default_rng([seed, 0, c, i])) for c, i in np.ndindex(29, each)
    ]
    return np.stack(images), np.repeat(np.arange(29), each), np.tile(np.arange(each) % 4 == 0, 29)


def colour(images):
    return np.concatenate([images.mean((1, 2)), images.std((1, 2))], 1)


def texture(images):
    """Power in eleven rings of the spectrum and quantiles of the gradient, of the grey image."""
    grey = images.mean(-1) - images.mean((1, 2, 3))[:, None, None]
    size, power = grey.shape[1], abs(np.fft.rfft2(grey)) ** 2
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    edges = np.geomspace(1 / size, 0.5, 12)
    rings = [power[:, (a <= radius) & (radius < b)].mean(1) for a, b in zip(edges, edges[1:])]
    steps = np.quantile(
        np.hypot(*np.gradient(grey, axis=(1, 2))).reshape(len(grey), -1), [0.1, 0.3, 0.5, 0.7, 0.9, 0.97], 1
    )
    return np.log(np.stack([*rings, *steps], 1) + 1e-3)


def macro_f1(model, features, labels, test):
    model = make_pipeline(StandardScaler(), model).fit(features[~test], labels[~test])
    return f1_score(labels[test], model.predict(features[test]), average="macro")


def test_colour_alone_does_not_tell_the_classes_and_texture_does():
    images, labels, test = sample(20)
    by_colour = macro_f1(KNeighborsClassifier(5), colour(images), labels, test)
    by_texture = macro_f1(
        LogisticRegression(max_iter=300), np.c_[colour(images), texture(images)], labels, test
    )
    assert 2 / 29 < by_colour < 0.4, by_colour
    assert by_texture > by_colour + 0.25, (by_texture, by_colour)


def random_features(images):
    import torch
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18().eval()
    net.fc = torch.nn.Identity()
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    with torch.inference_mode():
        return torch.cat([net(part) for part in x.split(128)]).numpy()


def report(each=100):
    images, labels, test = sample(each)
    kinds = {
        "channel mean": images.mean((1, 2)),
        "channel mean, std": colour(images),
        "texture": texture(images),
        "texture and channel mean, std": np.c_[texture(images), colour(images)],
        "random ResNet-18, 512 features": random_features(images),
    }
    print(f"macro F1 on {test.sum()} of {len(labels)} scenes of 64 px   5-NN  10-NN  20-NN  linear")
    for name, features in kinds.items():
        models = [*map(KNeighborsClassifier, (5, 10, 20)), LogisticRegression(max_iter=500)]
        print(f"{name:44s}", *(f"{macro_f1(model, features, labels, test):5.3f} " for model in models))


if __name__ == "__main__":
    report()


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    out = tmp_path / "out"
    synthetic.main([str(out), "--count", "29", "--size", "16"])
    assert capsys.readouterr().out == f"29 scenes of 16 px, layout pure: {out}\n"
    assert len(list(out.rglob("*.jpg"))) == 29


@pytest.mark.parametrize("layout, count", [("mixed", 10), ("archives", 29), ("scene", 1)])
def test_another_seed_draws_other_scenes_in_every_layout(layout, count, tmp_path):
    drawn = []
    for seed in (0, 1):
        synthetic.write_scenes(tmp_path / str(seed), layout, count, 16, seed)
        files = [file for end in ("jpg", "png") for file in (tmp_path / str(seed)).rglob(f"[!.]*.{end}")]
        drawn.append({np.asarray(Image.open(file)).tobytes() for file in files})
    assert len(drawn[0]) == len(drawn[1]) >= count and not drawn[0] & drawn[1]

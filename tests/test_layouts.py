"""Opening folders as people unpack them: they load rightly, or are refused by name."""

import dataclasses
import itertools
import os
import re
import shlex
import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, picture
from PIL import Image
from test_data import TABLE_II

import common
from data.folders import Folder
from data.names import LAND_NAMES, PURE_NAMES, class_name, land_names
from data.opening import TAIL, Source, built_in_scenes, digest_of, open_table, tail_of
from data.splits import coordinates, near_others, split_blocks, split_by_lists, split_by_place
from data.subsets import training_subsets
from data.tables import DataError, explain_empty, load_table, read_tree


def source(root, tmp_path, **options):
    defaults = {"data": str(root), "layout": "pure", "scenes": 60, "size": 32, "cache": tmp_path / "cache"}
    return Source(**{**defaults, "workers": 1, "skip_bad_files": False, **options})


def test_a_source_reads_the_common_flags():
    parser = common.Parser(__doc__)
    common.common_flags(parser)
    flags = parser.parse_args(["--splits", "lists", "--split", "spatial", "--scenes", "60"])
    opened = Source.of(flags, "mixed")
    assert opened[-2:] == ("lists", "spatial") and opened.layout == "mixed" and opened.scenes == 60


def test_bad_files_are_listed_and_refused_or_left_out(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for label in ("1_Water (deep)", "10_Café"):
        (copy / label).mkdir()
        for file in sorted((folder / label).iterdir()):
            os.link(file, copy / label / file.name)
    cut = copy / "10_Café" / "cut.jpg"
    cut.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="1 of 61 files do not decode .*cut.jpg"):
        open_table(source(copy, tmp_path), tmp_path / "bad.csv")
    assert "cut.jpg" in (tmp_path / "bad.csv").read_text()
    with pytest.raises(DataError, match="3 of 3 files do not decode .*: mend or remove them$"):
        open_table(source(plant(tmp_path / "most", "{}.jpg"), tmp_path), tmp_path / "bad.csv")
    table, checked = open_table(source(copy, tmp_path, skip_bad_files=True), tmp_path / "bad.csv")
    assert len(table) == len(checked) == 60 and (checked.file == table.files).all()


def test_the_digest_changes_with_names_sizes_dates_and_labels(folder, tmp_path):
    table, checked = open_table(source(folder, tmp_path), tmp_path / "bad.csv")
    first = digest_of(table, checked)
    assert first == digest_of(table, checked) and len(first) == 16
    later = checked.assign(mtime_ns=checked.mtime_ns + (checked.index == 5))
    assert digest_of(table, later) != first
    assert digest_of(table, checked.assign(bytes=checked.bytes + 1)) != first
    assert digest_of(table.rows(slice(1, None)), checked[1:]) != first
    moved = table.rows(slice(None))
    moved.labels[3] = 2
    assert digest_of(moved, checked) != first


# Folders


def plant(root, *patterns, each=3):
    """Empty files below root: `{}` in a pattern stands for the numbers of `each`."""
    for pattern in patterns:
        for i in range(each if "{}" in pattern else 1):
            file = root / pattern.format(i)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return root


def paint(root, *names):
    """A PNG of its own for each name below root."""
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(rng, 32)).save(root / f"{name}.png")


def counted(table):
    return {name: int((table.split == name).sum()) for name in ("train", "val", "test")}


SPELLINGS = [
    ("train", "val", "test"),
    ("train", "valid", "test"),
    ("Train", "Val", "Test"),
    ("training", "validation", "testing"),
    ("TRAINING", "dev", "TEST"),
    ("train_set", "val-images", "test set"),
    ("01_train", "02_valid", "03_test"),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids="/".join)
def test_splits_in_any_spelling(spelling, tmp_path):
    train, val, test = spelling
    plant(tmp_path, f"{train}/A/{{}}.jpg", f"{train}/B/{{}}.jpg", each=5)
    plant(tmp_path, f"{val}/A/{{}}.jpg", f"{test}/A/{{}}.png", f"{test}/B/{{}}.png", each=2)
    table = load_table(tmp_path)
    assert table.classes == ["A", "B"] and counted(table) == {"train": 10, "val": 2, "test": 4}
    assert table.rule == "folders" and table.notes == ()


LITTER = [
    "annotations/all.json",
    "__MACOSX/train/A/._0.jpg",
    "@eaDir/train/0.jpg",
    ".ipynb_checkpoints/A/0-checkpoint.jpg",
    "train/.ipynb_checkpoints/0.jpg",
    "train/A/.ipynb_checkpoints/0-checkpoint.jpg",
    "train/A/@eaDir/0.jpg/SYNOPHOTO_THUMB.jpg",
    "train/A/._0.jpg",
    "test/__MACOSX/A/0.jpg",
    "README.md",
    "train/.DS_Store",
    "train/A/#recycle/0.jpg",
]


def test_what_tools_leave_behind_is_no_class_and_no_image(tmp_path):
    plant(tmp_path, "train/A/{}.jpg", "train/B/{}.jpg", "test/A/{}.jpg", *LITTER)
    table = load_table(tmp_path)
    assert table.classes == ["A", "B"] and counted(table) == {"train": 6, "val": 0, "test": 3}
    assert not any(part in file for file in table.files for part in ("/.", "@", "#", "MACOSX"))


def test_litter_beside_class_folders(tmp_path):
    plant(tmp_path, "A/{}.jpg", "B/{}.jpg", "__MACOSX/A/._{}.jpg", "annotations/a.json", ".git/x.jpg", each=4)
    table = load_table(tmp_path)
    assert table.classes == ["A", "B"] and len(table) == 8
    assert table.notes == (f"{tmp_path}: no images in annotations",)


@pytest.mark.parametrize("above", ["", "train/"])
def test_named_folders_inside_of_classes_are_told(above, tmp_path):
    plant(
        tmp_path,
        f"{above}north/forest/{{}}.jpg",
        f"{above}north/sea/{{}}.jpg",
        f"{above}south/river/{{}}.jpg",
    )
    table = load_table(tmp_path)
    assert table.classes == ["north", "south"] and len(table) == 9
    assert "folders in north (forest, sea) are no classes" in table.notes[0]


def test_numbered_classes_inside_of_every_folder_are_told(tmp_path):
    (note,) = load_table(plant(tmp_path, *(f"sen{n}/{k}/{{}}.png" for n in (1, 2) for k in range(4)))).notes
    assert "the classes are sen1, sen2" in note and "the folders in sen1 (0, 1, 2) are no classes" in note


def test_numbered_parts_of_a_class_are_not_told(tmp_path):
    table = load_table(plant(tmp_path, "A/2019/{}.jpg", "A/1/{}.jpg", "A/2/{}.jpg", "B/{}.jpg"))
    assert table.classes == ["A", "B"] and len(table) == 12 and table.notes == ()


def test_train_alone_trains_and_is_told(tmp_path):
    table = load_table(plant(tmp_path, "train/A/{}.jpg", "train/B/{}.jpg", "labels/a.txt", each=50))
    assert counted(table) == {"train": 100, "val": 0, "test": 0}
    assert "only train/" in table.notes[0]
    assert "no folder val/" in explain_empty(table, "val")


def test_images_without_labels_beside_labelled_splits(tmp_path):
    table = load_table(plant(tmp_path, "train/{}.jpg", "val/A/{}.jpg", "val/B/{}.jpg"))
    assert counted(table) == {"train": 3, "val": 6, "test": 0}
    assert set(table.labels[table.split == "train"]) == {-1} and set(table.labels[3:]) == {0, 1}


@pytest.mark.parametrize(
    "patterns, classes, count",
    [
        (["data/images/A/{}.jpg", "data/images/B/{}.jpg"], ["A", "B"], 6),
        (["S_354/S_354/1_A/{}.jpg", "S_354/S_354/2_B/{}.jpg", "S_354/notes.txt"], ["1_A", "2_B"], 6),
        (["images/train/A/{}.jpg", "images/test/A/{}.jpg", "labels/train/a.txt"], ["A"], 6),
        (["train/images/{}.jpg", "train/labels/a.txt", "val/images/{}.jpg"], [], 6),
        (["train/train/A/{}.jpg", "test/test/A/{}.jpg"], ["A"], 6),
        (["images/{}.jpg"], [], 3),
        (["A/2019/{}.jpg", "A/2020/{}.jpg", "B/2019/{}.jpg", "B/2020/{}.jpg"], ["A", "B"], 12),
        (["A/images/{}.jpg", "B/images/{}.jpg"], ["A", "B"], 6),
        (["10_C/{}.jpg", "9_B/{}.jpg", "01_A/{}.jpg"], ["01_A", "9_B", "10_C"], 9),
        (["X_JPEG/1_A/{}.jpg", "X_JPEG/2_B/{}.jpg", "X_CSV/1_A.csv", "X_GeoTiff/1_A/"], ["1_A", "2_B"], 6),
    ],
)
def test_wrappers_are_stepped_over(patterns, classes, count, tmp_path):
    for pattern in patterns:
        if pattern.endswith("/"):
            (tmp_path / pattern).mkdir(parents=True)
        else:
            plant(tmp_path, pattern)
    table = load_table(tmp_path)
    assert table.classes == classes and len(table) == count
    assert all((table.root / file).is_file() for file in table.files)


COPY = "Sentinel2GlobalLULC-ratio=(0.{}00,0.0250,0.0750)-seed=42"


@pytest.mark.parametrize(
    "patterns, named",
    [
        (
            ["X_JPEG/1_A/{}.jpg", "X_JPEG/2_B/{}.jpg", "X_GeoTiff/1_A/{}.tif", "X_GeoTiff/2_B/{}.tif"],
            "X_GeoTiff",
        ),
        ([f"{COPY.format(r)}/{s}/1_A/{{}}.jpg" for r in (8, 9) for s in ("train", "test")], COPY.format(8)),
        (["a/Forest/{}.jpg", "a/River/{}.jpg", "b/Forest/{}.jpg", "b/River/{}.jpg"], "a .6 images., b .6"),
        (["Fields/{}.jpg", "Sentinel2/1_A/{}.jpg", "Sentinel2/2_B/{}.jpg"], "Sentinel2 holds classes itself"),
        (["train/A/{}.jpg", "Train/A/{}.jpg", "test/A/{}.jpg"], "Train and train are both train"),
        (["train/A/{}.jpg", "val/A/{}.jpg", "validation/A/{}.jpg"], "val and validation are both val"),
        (["train/A/{}.jpg", "val/A/{}.jpg", "extra/A/{}.jpg"], "beside, images in extra"),
        (["train/A/{}.jpg", "test/A/{}.jpg", "stray.png"], "beside, images in stray.png"),
        (["A/{}.jpg", "stray.png"], "stray.png"),
        (["Forest/{}.jpg", "forest/{}.jpg"], "Forest and forest spell one class"),
        (["BarrenLands/{}.jpg", "Barren Lands/{}.jpg"], "spell one class"),
        (["=a/{}.jpg", "'=a/{}.jpg"], "two classes would be called '=a"),
        (["images/{}.jpg", "masks/{}.png"], "images is the name of no class"),
        (["train/images/{}.jpg", "train/masks/{}.png"], "images is the name of no class"),
        (["notes/{}.jp2"], "holds no images .*3 .jp2: gdal_translate IN OUT.tif"),
        (["data/{}.zip", "a.txt"], "it holds 3 .zip, 1 .txt: unpack them"),
        (["{}.h5"], "it holds 3 .h5: export them to pictures"),
        (["{}.txt"], "it holds 3 .txt$"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_by_name(patterns, named, tmp_path):
    plant(tmp_path, *patterns)
    with pytest.raises(DataError, match=named.replace("(0", "\\(0").replace("0)", "0\\)")) as error:
        load_table(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_one_class_spelt_differently_in_the_splits(tmp_path):
    plant(tmp_path, "train/01_BarrenLands___jpeg/{}.jpg", "train/Big_Field/{}.jpg")
    plant(tmp_path, "test/1_BarrenLands___jpeg/{}.jpg", "test/big field_/{}.jpg", "test/New/{}.jpg")
    table = load_table(tmp_path)
    assert table.classes == ["Barren Lands", "Big_Field", "New"]
    assert sorted(table.labels[table.split == "test"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert "no training image of New" in table.notes[0]


# Links


def test_links_are_followed_once(tmp_path):
    real = plant(tmp_path / "elsewhere", "A/{}.jpg", "B/{}.jpg")
    root = plant(tmp_path / "root", "C/{}.jpg")
    (root / "A").symlink_to(real / "A")
    (root / "B").mkdir()
    for file in sorted((real / "B").iterdir()):
        (root / "B" / file.name).symlink_to(file)
    (root / "D").symlink_to(real / "A")
    (root / "C" / "again.jpg").symlink_to(root / "C" / "0.jpg")
    (root / "C" / "round").symlink_to(root)
    (root / "C" / "up").symlink_to(tmp_path)
    table = load_table(root)
    assert table.classes == ["A", "B", "C"] and np.bincount(table.labels).tolist() == [3, 3, 3]
    assert "C/again.jpg" not in table.files
    said = "\n".join(table.notes)
    for words in ("round: a link in a loop", "up: a link in a loop", "D: links to the same folder"):
        assert words in said
    assert "1 images are links to others" in said and "C/again.jpg is C/0.jpg" in said


def test_broken_links_stay_for_the_check_to_name(tmp_path):
    plant(tmp_path, "A/{}.jpg", "B/{}.jpg", each=4)
    for name in ("gone.jpg", "gone too.jpg"):
        (tmp_path / "A" / name).symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "A" / "self.jpg").symlink_to(tmp_path / "A" / "self.jpg")
    table = load_table(tmp_path)
    assert len(table) == 11 and {"A/gone.jpg", "A/gone too.jpg", "A/self.jpg"} <= set(table.files)
    (tmp_path / "C").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="C .a link to .*nowhere"):
        load_table(tmp_path)


def test_splits_made_of_links_into_a_folder_beside_the_root(tmp_path):
    real = plant(tmp_path / "all", "A/{}.jpg", each=6)
    for i, name in enumerate(["train", "train", "train", "train", "val", "test"]):
        (tmp_path / "split" / name / "A").mkdir(parents=True, exist_ok=True)
        (tmp_path / "split" / name / "A" / f"{i}.jpg").symlink_to(real / "A" / f"{i}.jpg")
    assert counted(load_table(tmp_path / "split")) == {"train": 4, "val": 1, "test": 1}


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    plant(tmp_path, "A/{}.jpg", "B/{}.jpg")
    listing = os.scandir

    def refuse(path):
        if str(path).endswith("B"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="B .Permission denied"):
        load_table(tmp_path)


# Empty splits


def test_empty_splits_say_why_and_what_to_do(tmp_path):
    few = load_table(plant(tmp_path / "few", "A/{}.jpg", "B/{}.jpg", each=30))
    assert counted(few) == {"train": 54, "val": 0, "test": 6}
    said = explain_empty(few, "val")
    assert "int(0.025 n)" in said and "largest class has 30" in said and "at least 40" in said
    plant(tmp_path / "one", "A/0.jpg", "B/0.jpg", "C/0.jpg")
    plant(tmp_path / "val", "val/A/{}.jpg")
    for name, words in (("one", "largest class has 1; .*add --split none"), ("val", "no folder train/")):
        for file in (tmp_path / name).rglob("*.jpg"):
            Image.new("RGB", (32, 32)).save(file)
        with pytest.raises(DataError, match=words):
            open_table(source(tmp_path / name, tmp_path), tmp_path / "bad.csv")


def test_a_split_without_labels_says_so(tmp_path):
    plant(tmp_path, "train_images/{}.jpg", "val_images/{}.jpg", each=20)
    said = f"{tmp_path}: no labelled image is in the val split: its 20 images have no labels"
    assert explain_empty(load_table(tmp_path), "val").startswith(said)
    assert "there is no folder test/ with images" in explain_empty(load_table(tmp_path), "test")


# The authors' split


def test_the_members_are_those_of_split_folders(tmp_path):
    splitfolders = pytest.importorskip("splitfolders", reason="split-folders 0.6.1 is a test requirement")
    raw = tmp_path / "raw"
    for name, n in (("1_BarrenLands___jpeg", 80), ("2_MossAndLichen_jpeg", 45), ("3_Grasslands____jpeg", 7)):
        plant(raw, f"{name}/{{}} (+1.5,é)_x.jpg", each=n)
    splitfolders.ratio(raw, tmp_path / "theirs", seed=42, ratio=(0.9, 0.025, 0.075))
    table = load_table(raw)
    theirs = load_table(tmp_path / "theirs")
    ours = {f"{split}/{file}" for split, file in zip(table.split, table.files)}
    assert ours == set(theirs.files) and len(ours) == 132
    assert counted(table) == counted(theirs) == {"train": 118, "val": 3, "test": 11}


def test_the_whole_archive_by_its_names(tmp_path):
    for number, (short, n) in enumerate(zip(PURE_NAMES, TABLE_II), 1):
        folder = tmp_path / f"{number:02d}_{short:_<13}_jpeg"
        folder.mkdir()
        for i in range(n // 100):  # a hundredth in files; the rule itself is tested at full size
            (folder / f"{i}.jpg").touch()
    table = load_table(tmp_path)
    assert table.classes == list(PURE_NAMES.values()) and len(table.classes) == 29
    assert np.bincount(table.labels).tolist() == [n // 100 for n in TABLE_II]


def test_full_size_gives_the_papers_counts(monkeypatch):
    tree = Folder(Path("/archive"))
    for number, (short, n) in enumerate(zip(PURE_NAMES, TABLE_II), 1):
        names = sorted(f"{number}_{short}_{i}.jpg" for i in range(n))
        tree.folders.append(Folder(tree.path / f"{number}_{short:_<13}_jpeg", names))
    table = read_tree(tree)
    assert counted(table) == {"train": 175_381, "val": 4_861, "test": 14_635}
    assert len(set(table.files)) == 194_877


def test_the_papers_names():
    assert len(set(PURE_NAMES.values())) == 29 and len(set(LAND_NAMES.values())) == 10
    assert class_name("5_SrublandClose_jpeg") == class_name("05_SrublandClose_tif") == "Close Shrublands"
    assert class_name("10_ForestsClDeNe_jpeg") == "Close Deciduous Needleleaf Forests"
    assert class_name("29_UrbanBlUpArea") == class_name("UrbanBlUpArea") == "Urban and Built-up Areas"
    assert class_name("1_Water (deep)") == "1_Water (deep)" and class_name("Forest") == "Forest"
    for name in ('=HYPERLINK("x")', "@sum", "+1", "-1"):
        assert class_name(name) == "'" + name


# Lists


def lists_of(folder, **lists):
    folder.mkdir(exist_ok=True)
    for name, lines in lists.items():
        (folder / f"my-{name}-list.txt").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    return folder


def test_lists_split_by_names_and_paths(tmp_path):
    root = plant(tmp_path / "root", "A/a{}.jpg", "B/b{}.tif", "C/b0.tif", each=4)
    lists = lists_of(
        tmp_path / "lists",
        train=["a0.jpg", "A/a1.jpg", "/other/machine/tiles/A/a2.jpg", "a0.jpg", "# comment", ""],
        val=["b1.jpg", "gone.jpg"],
        test=["B\\b0.tif"],
    )
    table = load_table(root, splits=lists)
    found = dict(zip(table.files, table.split))
    assert found == {
        "A/a0.jpg": "train",
        "A/a1.jpg": "train",
        "A/a2.jpg": "train",
        "B/b0.tif": "test",
        "B/b1.tif": "val",
    }
    assert table.rule == "lists" and "1 of the 6 names" in table.notes[0]
    assert "4 of 9 images are in none of the lists" in table.notes[1]


def test_long_lists_of_files_called_alike_take_seconds(tmp_path):
    """Compared with each other one by one, these would take two minutes, those of a large archive hours."""
    files = np.array([f"site_{number}/S2/rgb.png" for number in range(4000)])
    lists = lists_of(tmp_path, train=[*files[:3000]], val=[f"root/{file}" for file in files[3000:]])
    start = time.process_time()
    split, notes = split_by_lists(tmp_path, files, lists)
    assert list(split) == 3000 * ["train"] + 1000 * ["val"] and not notes
    assert time.process_time() - start < 10


def test_lists_with_labels_and_a_list_of_two_splits(tmp_path):
    root = plant(tmp_path / "root", "air port/a {}.jpg", "B/b{}.jpeg", each=4)
    train = ["air port/a 0.jpg 0", "air port/a 1.jpg,0", '"B/b1.jpeg",1', "B/b2.jpg;1 0", "B/gone.jpg 1"]
    lists = lists_of(tmp_path / "lists", train=train, val=["B/b3.jpeg\t1"], trainval=["B/b3.jpeg"])
    table = load_table(root, splits=lists)
    assert counted(table) == {"train": 4, "val": 1, "test": 0} and "air port/a 1.jpg" in table.files
    assert "my-trainval-list.txt is not read" in table.notes[0] and "1 of the 6 names" in table.notes[1]


def test_lists_beside_the_images_are_told(tmp_path):
    root = plant(tmp_path / "root", "A/a{}.jpg", "B/b{}.jpg", each=4)
    assert load_table(root).notes == ()
    lists_of(root, train=["a0.jpg"], test=["b0.jpg"])
    (note,) = load_table(root).notes
    assert "my-test-list.txt, my-train-list.txt are not read" in note
    assert not any("--splits" in note for note in load_table(root, splits=root).notes)
    plant(tmp_path / "flat", "{}.jpg", "train.txt")
    assert f"add --splits {tmp_path / 'flat'}" in load_table(tmp_path / "flat").notes[0]


@pytest.mark.parametrize(
    "lists, says",
    [
        ({"train": ["a0.jpg"], "val": ["A/a0.jpg"]}, "a0.jpg is in my-train-list.txt too"),
        ({"train": ["b0.tif"]}, "b0.tif may be B/b0.tif and C/b0.tif"),
        ({"train": ["a0.jpg"], "test": ["", " "]}, "my-test-list.txt: names no image"),
        ({"train": ["x y.jpg 0"]}, "names none of the 9 images .*'x y.jpg 0'.* such as A/a0.jpg"),
        ({"train": ["a0.jpg"], "train-val": ["a0.jpg"]}, "train and val"),
        ({"val": ["a0.jpg"]}, "no .train"),
        ({"train-val": ["a0.jpg"]}, "train and val"),
        ({"train": ["a0.jpg"], "train-2": ["a1.jpg"]}, "both for train"),
    ],
)
def test_lists_that_do_not_say_one_thing(lists, says, tmp_path):
    root = plant(tmp_path / "root", "A/a{}.jpg", "B/b{}.tif", "C/b0.tif", each=4)
    with pytest.raises(DataError, match=says):
        load_table(root, splits=lists_of(tmp_path / "lists", **lists))


EUROSAT = ROOT.parent / "shared"


@pytest.mark.skipif(not (EUROSAT / "eurosat_spatial").is_dir(), reason="EuroSAT lies beside no checkout here")
def test_the_public_spatial_lists_of_eurosat():
    table = load_table(EUROSAT / "eurosat", splits=EUROSAT / "eurosat_spatial")
    assert counted(table) == {"train": 13_010, "val": 4_293, "test": 4_297}
    assert "5,400 of the 27,000 names" in table.notes[0]


# Places


def located(root, n=1500, seed=0):
    """Images around the globe, the poles and the date line among them, named as Sentinel2GlobalLULC's."""
    rng = np.random.default_rng(seed)
    centres = np.array(
        [[89.95, 10], [0, 179.98], [-33.5, -70.6], [7.5, 17.1], [60, 25], [48.2, 16.4], [1, 1], [-3, 30]]
    )
    for i in range(n):
        lat, lon = centres[i % 8] + rng.normal(0, 0.9, 2)
        lat, lon = np.clip(lat, -90, 90), (lon + 180) % 360 - 180
        label = ("1_BarrenLands___jpeg", "2_MossAndLichen_jpeg")[i % 3 == 0]
        name = f"{label[:5]}_80.0__{i}_15.8_({lat:+.10f},{lon:+.10f})_TD_nan_Beboto.jpg"
        plant(root, f"{label}/{name}")
    return root


def test_no_test_tile_lies_near_a_training_tile(tmp_path):
    table = load_table(located(tmp_path), split="spatial")
    assert table.rule == "spatial" and min(counted(table).values()) > 20
    places = coordinates(table.root, table.files)
    train, others = places[table.split == "train"], places[table.split != "train"]
    north = abs(train[:, None, 0] - others[None, :, 0])
    east = abs(train[:, None, 1] - others[None, :, 1])
    east = np.minimum(east, 360 - east)
    assert not ((north <= 0.1) & (east <= 0.1)).any()
    mean = np.radians((train[:, None, 0] + others[None, :, 0]) / 2)
    assert np.hypot(north, east * np.cos(mean))[abs(np.degrees(mean)) < 80].min() > 0.1
    assert len(table) < 1500 and f"{1500 - len(table)} training images within 0.1" in table.notes[-1]
    again = load_table(tmp_path, split="spatial")
    assert (again.files == table.files).all() and (again.split == table.split).all()
    blocks = {name: set(map(tuple, np.floor(places[table.split == name]))) for name in counted(table)}
    assert not blocks["train"] & blocks["test"] and not blocks["train"] & blocks["val"]


def test_a_split_of_its_own_is_told_where_blocks_take_its_place(tmp_path):
    located(tmp_path / "train", 200)
    located(tmp_path / "test", 200, seed=1)
    assert "makes another" not in "".join(load_table(tmp_path).notes)
    table = load_table(tmp_path, split="spatial")
    assert any("its own split of the images is not used" in note for note in table.notes)


def test_a_patch_lies_where_its_own_place_says(tmp_path):
    """data.tiles puts the patch's place behind the scene's name, which may hold the scene's."""
    files = ["a/scene_(+10.00,+20.00)_r0000_c0000_(+9.988,-179.978).png"]
    assert coordinates(tmp_path, files).tolist() == [[9.988, -179.978]]


def test_names_without_coordinates_are_refused(tmp_path):
    plant(located(tmp_path, 20), "2_MossAndLichen_jpeg/plain.jpg")
    with pytest.raises(DataError, match="plain.jpg holds none"):
        load_table(tmp_path, split="spatial")
    folder = tmp_path / "2_MossAndLichen_jpeg"
    (folder / "plain.jpg").rename(folder / "scene_r0_c0_(x=500320.00,y=4299680.00).png")
    with pytest.raises(DataError, match="holds metres, not degrees: give lists"):
        load_table(tmp_path, split="spatial")


# Land-1.0


HEADER = ["ID", "Latitude", "Longitude", "Filename", "Level"]
SHARES = [0.5, 0.25, 0.125, 0.125]


def land_of(root, rows=None, level="Level_N2", header=("A", "B", "C", "D", "Class_max"), text=None, **files):
    """One level of Land-1.0 with images 000.jpg, 001.jpg, 002.jpg in train, and the rows of its CSV."""
    for split in ("train", "val", "test"):
        plant(root, *(f"{level}/RGB Images/{split}/00{i}.jpg" for i in range(3)))
        lines = rows if rows and split == "train" else [[f"00{i}.jpg", *SHARES, "A"] for i in range(3)]
        lines = [[i, "", "", name, "N2", *values] for i, (name, *values) in enumerate(lines)]
        file = root / level / "CSV" / f"csv_{split}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(",".join(map(str, line)) for line in [[*HEADER, *header], *lines]) + "\n")
    return root


def test_land_with_names_that_look_like_numbers(tmp_path):
    table = load_table(
        land_of(tmp_path, [["001", *SHARES, "A"], ["002.tif", *SHARES, "A"], ["000.JPG", *SHARES, "A"]])
    )
    assert table.files[:3].tolist() == [f"RGB Images/train/00{i}.jpg" for i in (1, 2, 0)]
    assert "3 names differ" in table.notes[0] and table.rule == "csv"


def test_land_at_both_levels_and_each_alone(tmp_path):
    land_of(tmp_path, level="Level_N1")
    land_of(tmp_path, level="Level_N2", header=("A", "B", "C2", "D2", "Class_max"))
    (tmp_path / "Land-1.0.xlsx").touch()
    table = load_table(tmp_path)
    assert table.classes == ["A", "B", "C2", "D2"] and "Level_N2 is read; for Level_N1 name" in table.notes[0]
    assert load_table(tmp_path / "Level_N1").classes == ["A", "B", "C", "D"]
    assert load_table(tmp_path / "Level_N1").root.name == "Level_N1"


def test_land_beside_folders_of_other_names(tmp_path):
    plant(land_of(tmp_path), "Level_N2/RGB Images/old/000.jpg", "Level_N2/RGB Images/backup/000.jpg")
    assert len(load_table(tmp_path).files) == 9


def test_land_in_per_cent_and_sums_that_miss_one(tmp_path):
    percent = [[f"00{i}.jpg", 50, 25, 12.5, 12.5, "A"] for i in range(3)]
    table = load_table(land_of(tmp_path / "percent", percent))
    assert np.allclose(table.fractions, SHARES) and "per cent" in table.notes[0]
    rounded = [["000.jpg", 0.5, 0.25, 0.13, 0.13, "A"], ["001.jpg", *SHARES, "A"], ["002.jpg", *SHARES, "A"]]
    table = load_table(land_of(tmp_path / "rounded", rounded))
    assert (
        np.allclose(table.fractions.sum(1), 1)
        and "1 of 3 lines miss the sum of 1, by 0.010" in table.notes[0]
    )
    rounded[1][1] = 0.56
    with pytest.raises(DataError, match="line 3: the fractions are"):
        load_table(land_of(tmp_path / "wrong", rounded))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t", ", "])
def test_land_in_every_dialect(line_end, encoding, separator, tmp_path):
    land_of(tmp_path)
    for file in (tmp_path / "Level_N2" / "CSV").iterdir():
        text = file.read_text().replace(",", separator)
        if separator in ";\t":  # where commas are free, they are decimal
            text = re.sub(r"(\d)\.(\d)", r"\1,\2", text)
        file.write_bytes(text.replace("\n", line_end).encode(encoding))
    table = load_table(tmp_path)
    assert len(table) == 9 and np.allclose(table.fractions, SHARES) and table.classes == list("ABCD")


@pytest.mark.parametrize(
    "row, says",
    [
        (["../../x.jpg", *SHARES, "A"], "line 3: '../../x.jpg' is no file inside"),
        (["../val/000.jpg", *SHARES, "A"], "line 3: '../val/000.jpg' is no file inside"),
        (["/etc/x.jpg", *SHARES, "A"], "line 3: '/etc/x.jpg' is no file inside"),
        (["", *SHARES, "A"], "line 3: '' is no file inside"),
        (["009.jpg", *SHARES, "A"], "line 3: .*009.jpg is missing .1 of 3"),
        (["000.jpg", 0.25, 0.5, 0.125, 0.125, "B"], "lines 2 and 3: 000.jpg has two different"),
        (["001.jpg", "nan", *SHARES[1:], "A"], "line 3: the fractions are .nan"),
        (["001.jpg", "much", *SHARES[1:], "A"], "line 3: the fractions are .nan"),
        (["001.jpg", -0.5, 1.25, 0.125, 0.125, "A"], "line 3: the fractions are .-0.5"),
    ],
)
def test_land_lines_that_cannot_be_used(row, says, tmp_path):
    with pytest.raises(DataError, match=says):
        load_table(land_of(tmp_path, [["000.jpg", *SHARES, "A"], row, ["002.jpg", *SHARES, "A"]]))


def test_land_repeats_unlisted_images_and_broken_links(tmp_path):
    land_of(tmp_path, [["000.jpg", *SHARES, "A"], ["000.jpg", *SHARES, "A"], ["link.jpg", *SHARES, "A"]])
    (tmp_path / "Level_N2/RGB Images/train/link.jpg").symlink_to(tmp_path / "gone.jpg")
    table = load_table(tmp_path)
    assert counted(table)["train"] == 2 and "RGB Images/train/link.jpg" in table.files
    said = "\n".join(table.notes)
    assert "1 lines repeat" in said and "2 images are in no line" in said


def test_land_with_folders_in_another_case(tmp_path):
    land_of(tmp_path, header=("=HYPERLINK()", "B", "C", "D", "Class_max"))
    level = tmp_path / "Level_N2"
    (level / "RGB Images" / "val").rename(level / "RGB Images" / "Validation")
    (level / "RGB Images").rename(level / "rgb_images")
    (level / "CSV" / "csv_val.csv").rename(level / "CSV" / "CSV_Validation.csv")
    table = load_table(plant(tmp_path, "__MACOSX/Level_N2/._x.jpg"))
    assert counted(table) == {"train": 3, "val": 3, "test": 3} and table.classes[0] == "'=HYPERLINK()"


# Subsets


def test_subsets_by_share_and_by_number(tmp_path):
    table = load_table(plant(tmp_path, "train/A/{}.jpg", "val/A/{}.jpg", each=20))
    plant(tmp_path, "train/B/{}.jpg", each=6)
    table = load_table(tmp_path)
    subsets = training_subsets(table, table.targets("scene"), [50], [0, 1], per_class=[2, 6])
    assert list(subsets) == [(50, 0), ("2/class", 0), ("6/class", 0), (50, 1), ("2/class", 1), ("6/class", 1)]
    assert np.bincount(table.labels[subsets["6/class", 1]]).tolist() == [6, 6]
    assert set(subsets["2/class", 0]) < set(subsets["6/class", 0]) != set(subsets["6/class", 1])
    assert (table.split[subsets["6/class", 0]] == "train").all()
    with pytest.raises(DataError, match="--per-class 7, but B has 6"):
        training_subsets(table, table.targets("scene"), [], [0], per_class=[7])


def test_a_share_of_less_than_half_an_image_is_told(tmp_path, capsys):
    plant(tmp_path, "train/A/{}.jpg", "val/A/{}.jpg", each=20)
    table = load_table(plant(tmp_path, "train/B/{}.jpg", each=6))
    subsets = training_subsets(table, table.targets("scene"), [5, 50], [0, 1])
    assert len(subsets[5, 0]) == 2
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "note: 5 % is less than half an image in 1 of 2 classes: one of each is taken all the same"
    ]


def test_an_archive_unpacked_into_each_split(tmp_path):
    for name in ("train", "test"):
        plant(tmp_path, f"{name}/S2_JPEG/1_A/{{}}.jpg", f"{name}/S2_JPEG/2_B/{{}}.jpg")
    assert load_table(tmp_path).classes == ["1_A", "2_B"]
    plant(tmp_path, "train/S2_GeoTiff/1_A/{}.tif", "train/S2_GeoTiff/2_B/{}.tif")
    with pytest.raises(DataError, match="S2_GeoTiff .*S2_JPEG .*side by side"):
        load_table(tmp_path)


def test_land_columns_get_the_papers_names_where_all_are_its_classes():
    assert land_names(list(LAND_NAMES)) == list(LAND_NAMES.values())
    assert land_names([name.replace(" ", "_").lower() for name in LAND_NAMES.values()]) == list(
        LAND_NAMES.values()
    )
    assert land_names(["Grasslands", "Water", "=1"]) == ["Grasslands", "Water", "'=1"]


def test_land_with_the_empty_columns_of_a_spreadsheet(tmp_path):
    rows = [[f"00{i}.jpg", *SHARES, "", ""] for i in range(3)]
    land_of(tmp_path, rows, header=("A", "B", "C", "D", "", ""))
    for name in ("val", "test"):
        (tmp_path / "Level_N2" / "CSV" / f"csv_{name}.csv").unlink()
    assert load_table(tmp_path).classes == list("ABCD")


def test_land_with_a_column_that_is_no_class_says_so(tmp_path):
    rows = [[f"00{i}.jpg", *SHARES, 0] for i in range(3)]
    land_of(tmp_path, rows, header=("A", "B", "C", "D", "Flag"))
    for name in ("val", "test"):
        (tmp_path / "Level_N2" / "CSV" / f"csv_{name}.csv").unlink()
    table = load_table(tmp_path)
    assert any("no image holds any Flag: is it a class?" in note for note in table.notes)


def test_duplicates_are_listed_and_stay(tmp_path, capsys):
    paint(tmp_path, "train/A/0", "train/A/1", "test/A/2")
    for copy in ("train/A/again", "train/A/more", "test/A/leak"):
        shutil.copy(tmp_path / "train/A/0.png", tmp_path / f"{copy}.png")
    for _ in range(2):
        table, _ = open_table(source(tmp_path, tmp_path / "work"), tmp_path / "bad.csv")
        said = capsys.readouterr().out
        assert (
            len(table) == 6 and "3 images are another one byte for byte, 1 of them in another split" in said
        )
    listed = next((tmp_path / "work" / "cache").glob("duplicates-*.csv")).read_text()
    assert "test/A/leak.png,test,train/A/0.png,train" in listed


def test_a_pair_is_enough_for_a_duplicate(tmp_path, capsys):
    paint(tmp_path, "A/0", "B/1")
    shutil.copy(tmp_path / "A/0.png", tmp_path / "A/2.png")
    open_table(source(tmp_path, tmp_path / "work"), tmp_path / "bad.csv")
    assert "1 images are another one byte for byte" in capsys.readouterr().out


def test_duplicates_with_contradicting_labels_are_counted(tmp_path, capsys):
    paint(tmp_path, "A/0", "A/1", "B/2")
    for copy in ("A/again", "B/other"):
        shutil.copy(tmp_path / "A/0.png", tmp_path / f"{copy}.png")
    open_table(source(tmp_path, tmp_path / "work"), tmp_path / "bad.csv")
    said = capsys.readouterr().out
    assert "2 images are another one byte for byte" in said and "split, 1 of another class (all in" in said


# Masks, twins, scenes

MASKED = {
    "in one folder": ("train/{}_sat.jpg", "train/{}_mask.png"),
    "the picture's whole name": ("{}.png", "{}_instance_color_RGB.png"),
    "in folders of classes": ("Rural/images_png/{}.png", "Rural/masks_png/{}.png"),
    "by other names": ("2_Ortho_RGB/{}.tif", "5_Labels_for_participants/{}.tif"),
    "for a change": ("train/A/{}.png", "train/B/{}.png", "train/label/{}.png"),
    "by a word in front": ("{}.png", "mask_{}.png"),
    "by two words": ("images/{}.png", "Ground Truth/{}.png"),
    "of VOC": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
    "of mmsegmentation": ("img_dir/{}.jpg", "ann_dir/{}.png"),
    "of roads": ("train/sat/{}.tiff", "train/map/{}.tif"),
    "thumbnails beside": ("Forest/{}.jpg", "Forest/{}_thumb.jpg"),
    "thumbnails in a folder": ("Forest/{}.jpg", "Forest/thumbs/{}.jpg", "River/{}.jpg"),
}


@pytest.mark.parametrize("patterns", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("split", ["paper", "none"])
def test_masks_are_no_pictures(patterns, split, tmp_path):
    plant(tmp_path, *patterns)
    with pytest.raises(DataError, match="named as masks are|lie side by side"):
        load_table(tmp_path, split=split)


@pytest.mark.parametrize(
    "patterns",
    [
        ("seg_train/seg_train/{}/{}.jpg", "seg_test/seg_test/{}/{}.jpg"),
        ("UCM/UCM/train/{}/{}.jpg", "NWPU/NWPU/train/{}/{}.jpg", "NWPU/NWPU/test/{}/{}.jpg"),
        ("2019/images/{}/{}.jpg", "2020/images/{}/{}.jpg"),
        ("one/UCM/{}/{}.jpg", "two/NWPU/{}/{}.jpg"),
    ],
)
def test_datasets_that_are_wrapped_are_no_classes(patterns, tmp_path):
    """As archives are unpacked into folders of their own: the test images of one would train."""
    plant(tmp_path, *(pattern.format(name, "{}") for pattern in patterns for name in ("airport", "beach")))
    with pytest.raises(DataError, match="lie side by side, and .* holds classes itself"):
        load_table(tmp_path)


def test_classes_that_are_wrapped_alike_are_classes(tmp_path):
    plant(tmp_path, "Forest/2019/images/{}.jpg", "River/2019/images/{}.jpg")
    assert load_table(tmp_path).classes == ["Forest", "River"]


def test_lists_of_names_in_csvs_are_not_passed_over_in_silence(tmp_path):
    plant(tmp_path, "EuroSAT/Forest/{}.jpg", "EuroSAT/River/{}.jpg")
    for name in ("train.csv", "test.csv", "label_map.csv"):
        (tmp_path / "EuroSAT" / name).write_text("Filename\n")
    (note,) = load_table(tmp_path).notes
    assert "test.csv, train.csv are not read" in note and "add --splits" in note


def test_a_list_in_another_encoding_is_named(tmp_path):
    plant(tmp_path / "data", "Forest/{}.jpg", "River/{}.jpg")
    (tmp_path / "train.txt").write_text("Forest/0.jpg\nRiver/0.jpg\n", encoding="utf-16")
    with pytest.raises(DataError, match="train.txt: is no UTF-8 text"):
        load_table(tmp_path / "data", splits=tmp_path)


def test_what_only_sounds_like_a_mask_loads(tmp_path):
    plant(tmp_path, "labels/Damask/{}.jpg", "labels/label_free/{}.jpg", "labels/Segou/gt_{}.jpg")
    shutil.move(tmp_path / "labels" / "label_free", tmp_path / "labels" / "unlabelled")
    assert len(load_table(tmp_path / "labels")) == 9
    plant(tmp_path / "masks_alone", "{}_mask.png", "{}_mask2.png")
    assert len(load_table(tmp_path / "masks_alone")) == 6


@pytest.mark.parametrize("split", ["paper", "none"])
@pytest.mark.parametrize(
    "name",
    [
        "S2A_{0}/S2A_{0}_B0{1}.tif",
        "{0}/B{1}.TIF",
        "{0}_T31_B0{1}_10m.tif",
        "B0{1}/{0}.tif",
        "train/b{1}/x/{0}.tif",
        "B0{1}/{0}_B0{1}.tif",
        "B2/{0}_B0{1}.tif",
    ],
)
def test_a_file_for_each_band_is_no_picture(split, name, tmp_path):
    for place, band in itertools.product(range(3), (1, 2, 3, 4)):
        grey = tmp_path / "it's" / name.format(place, band)
        grey.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(grey)
    with pytest.raises(DataError, match="3 pictures have a file for each band, as .*") as error:
        load_table(tmp_path / "it's", split=split)
    command = shlex.split(str(error.value).partition("each: ")[2].partition(" && ")[0])
    assert command[0] == "gdalbuildvrt" and all(Path(file).is_file() for file in command[3:])


def test_a_place_that_is_called_as_a_band_loads(tmp_path):
    for band in (2, 3, 4):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"area_B{band}.tif")
    assert len(load_table(tmp_path)) == 3


def test_pictures_that_stand_twice_are_told(tmp_path):
    plant(tmp_path, "A/{}.jpg", "A/{}.tif", "B/{}.jpg", each=4)
    (note,) = load_table(tmp_path).notes
    assert "8 of 12 pictures have the name of another but for the suffix (A/0.jpg, A/0.tif)" in note


def test_pictures_that_are_not_read_are_told(tmp_path):
    plant(tmp_path, "A/{}.jpg", "A/{}.jfif", "B/{}.JPE", "A/x{}.gif", "B/{}.jp2", "B/plain{}", each=10)
    plant(tmp_path, "README", "notes{}.txt", "{}.json", "{}.xml", "{}.csv", "A/{}.tfw")
    table = load_table(tmp_path)
    assert len(table) == 30
    said = "31 files are no pictures that are read (no suffix 11, .gif 10, .jp2 10)"
    assert table.notes[-1] == f"{tmp_path}: {said}"
    train = lists_of(tmp_path / "lists", train=["A/3.jfif", "B/3.jpg"])
    assert set(load_table(tmp_path, splits=train).files) == {"A/3.jfif", "B/3.JPE"}


def test_split_none_takes_all_images_at_any_depth(tmp_path):
    plant(tmp_path, "0001/20200101/rgb_{}.png", "0001/20200601/rgb_{}.png", "0002/20200101/rgb_{}.png")
    plant(tmp_path, "loose_{}.jpg")
    with pytest.raises(DataError, match="beside folders of images.* add --split none"):
        load_table(tmp_path)
    table = load_table(tmp_path, split="none")
    assert len(table) == 12 and table.classes == [] and set(table.split) == {"train"}
    assert table.rule == "none" and (table.labels == -1).all()
    with pytest.raises(DataError, match="--splits and --split none"):
        load_table(tmp_path, tmp_path, "none")


def test_many_folders_of_few_images_are_told(tmp_path):
    plant(tmp_path, *(f"{scene:07d}/{{}}.png" for scene in range(30)), each=4)
    (note,) = load_table(tmp_path).notes
    assert "30 classes (0000000, 0000001, 0000002, …) of about 4 images" in note and "--split none" in note


def test_scenes_in_the_place_of_classes_are_told(tmp_path):
    plant(tmp_path, "train/A/{}.jpg", "train/B/{}.jpg", "val/A/{}.jpg")
    plant(tmp_path, *(f"test/{scene:07d}/{{}}.jpg" for scene in range(30)), each=2)
    table = load_table(tmp_path)
    first = "0000000, 0000001, 0000002, 0000003, 0000004 and 25 more"
    assert table.notes[0] == f"{tmp_path}: no training image of {first}"
    assert "none of the 30 folders in test/ is a class of train/" in table.notes[1] and len(table.notes) == 2
    with pytest.raises(DataError, match=f"no training image has class {first}, .*add training images"):
        training_subsets(table, table.targets("scene"), [100], [0])


def test_no_label_is_no_target(tmp_path):
    plant(tmp_path, "train/{}.jpg", "val/A/{}.jpg", "val/B/{}.jpg")
    table = load_table(tmp_path)
    assert table.targets("scene").sum(1).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "place, other, near",
    [
        ((60.0, 25.0), (60.0, 25.25), True),  # there a degree of longitude is half as long
        ((60.0, 25.0), (60.0, 25.35), False),
        ((25.0, 60.0), (25.0, 60.25), False),
        ((0.0, 179.95), (0.0, -179.95), True),
        ((89.97, 10.0), (89.97, -170.0), True),
    ],
)
def test_nearness_is_an_angle_on_the_globe(place, other, near):
    assert near_others(np.array([place, other]), np.array(["train", "val"])).tolist() == [near, False]


def test_blocks_beside_the_equator_and_greenwich_are_as_large_as_others(tmp_path):
    """Four blocks of a degree meet there: all images of one would train."""
    places = itertools.product((-0.5, 0.5), (-0.5, 0.5), range(10))
    files = np.array([f"({north:+},{east:+})_{i}.jpg" for north, east, i in places])
    split, (note,) = split_by_place(tmp_path, files, np.zeros(40, int))
    assert set(split) == {"train", "val", "test"} and "4 blocks of 1 degree" in note


def test_land_repeats_leave_the_images_after_them_their_own_fractions(tmp_path):
    rows = [["000.jpg", *SHARES, "A"], ["000.jpg", *SHARES, "A"], ["001.jpg", *SHARES[::-1], "D"]]
    table = load_table(land_of(tmp_path, rows))
    assert table.files[:2].tolist() == ["RGB Images/train/000.jpg", "RGB Images/train/001.jpg"]
    assert table.fractions[:2].tolist() == [SHARES, SHARES[::-1]] and table.labels[:2].tolist() == [0, 3]


def test_the_digest_changes_with_splits_classes_and_fractions(tmp_path):
    table = load_table(land_of(tmp_path))
    checked = pd.DataFrame({"bytes": 0, "mtime_ns": 0}, index=range(len(table)))
    changes = [{}, {"classes": ["A", "B", "D", "C"]}, {"fractions": table.fractions[:, ::-1]}]
    changes.append({"split": table.split[::-1]})
    assert len({digest_of(dataclasses.replace(table, **change), checked) for change in changes}) == 4


def test_an_accent_is_the_same_however_a_mac_has_encoded_it(tmp_path):
    plant(tmp_path / "data", "train/B/{}.jpg", "train/Caf\u00e9/\u00e9{}.jpg", "val/Cafe\u0301/{}.jpg")
    table = load_table(tmp_path / "data")
    assert table.classes == ["B", "Caf\u00e9"] and table.labels[table.split == "val"].tolist() == [1, 1, 1]
    lists = lists_of(tmp_path / "lists", train=[unicodedata.normalize("NFD", "\u00e90.jpg")])
    assert load_table(tmp_path / "data", splits=lists).files.tolist() == ["train/Caf\u00e9/\u00e90.jpg"]


def test_zeros_before_a_number_make_no_other_class(tmp_path):
    plant(tmp_path, "train/01_Sea/{}.jpg", "train/2_Ice/{}.jpg", "val/1_Sea/{}.jpg")
    table = load_table(tmp_path)
    assert table.classes == ["01_Sea", "2_Ice"] and set(table.labels[table.split == "val"]) == {0}


def test_blocks_give_a_rare_class_its_shares_too():
    blocks = np.repeat(np.arange(400), 25)
    labels = np.where((blocks % 5 == 0) & (np.arange(10_000) % 25 == 0), 1, 0)
    split = split_blocks(np.stack([blocks, blocks], 1), labels)
    assert [int((split[labels == 1] == name).sum()) for name in ("train", "val", "test")] == [72, 2, 6]


def test_built_in_scenes_of_another_kind_have_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("data.opening.write_scenes", lambda *_, **__: None)
    kinds = ({}, {"size": 24}, {"scenes": 61}, {"layout": "mixed"})
    assert len({built_in_scenes(source(tmp_path, tmp_path, **kind)) for kind in kinds}) == 4


def test_built_in_scenes_that_another_process_has_written_meanwhile_are_taken(tmp_path, monkeypatch):
    def write(root, **about):
        assert about == {"layout": "pure", "count": 60, "size": 32, "seed": 0}
        if made:
            root.mkdir(parents=True)
        raise FileExistsError(root)

    monkeypatch.setattr("data.opening.write_scenes", write)
    made = False
    with pytest.raises(FileExistsError):
        built_in_scenes(source(tmp_path, tmp_path))
    made = True
    assert built_in_scenes(source(tmp_path, tmp_path)).is_dir()


def test_the_papers_rule_counts_images_without_the_links_to_them(tmp_path):
    plant(tmp_path, "A/{}.jpg", "B/{}.jpg", each=20)
    plain = load_table(tmp_path)
    for i in range(20):
        (tmp_path / "A" / f"link-{i}.jpg").symlink_to(tmp_path / "A" / f"{i}.jpg")
    table = load_table(tmp_path)
    assert table.files.tolist() == plain.files.tolist() and table.split.tolist() == plain.split.tolist()


def test_files_are_told_apart_by_their_ends_however_short_they_are(tmp_path):
    for length in (3, TAIL + 9):
        content = bytes(i % 251 for i in range(length))
        (tmp_path / "file").write_bytes(content)
        assert tail_of(tmp_path / "file") == content[-TAIL:]


def test_pictures_that_end_alike_are_no_duplicates(tmp_path, capsys):
    (tmp_path / "data" / "A").mkdir(parents=True)
    for i in (0, 1):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[-1] = i  # the first row of a BMP file
        Image.fromarray(pixels).save(tmp_path / "data" / "A" / f"{i}.bmp")
    open_table(source(tmp_path / "data", tmp_path / "work"), tmp_path / "bad.csv")
    assert "byte for byte" not in capsys.readouterr().out

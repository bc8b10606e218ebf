"""Tables, splits, decoded pixels: the layouts load, and nothing is lost or mixed up."""

import os
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from PIL import Image

from data.opening import stamp_of, statistics_of
from data.pixels import channel_statistics, common_size, decode, load_pixels
from data.splits import split_classes, split_counts
from data.subsets import per_class_subset, stratified_subset
from data.tables import DataError, load_table

TABLE_II = [
    14000,
    4656,
    8869,
    14000,
    11937,
    4437,
    1348,
    14000,
    10438,
    6380,
    2880,
    567,
    1258,
    14000,
    3914,
    3872,
    13991,
    416,
    487,
    4205,
    14000,
    14000,
    14000,
    2004,
    842,
    1020,
    353,
    413,
    12590,
]


def test_split_gives_the_papers_counts():
    labels = np.repeat(np.arange(29), TABLE_II)
    split = split_classes(labels)
    assert len(labels) == 194_877
    assert [int((split == s).sum()) for s in ("train", "val", "test")] == [175_381, 4_861, 14_635]
    for label, n in enumerate(TABLE_II):
        assert tuple(
            int((split[labels == label] == s).sum()) for s in ("train", "val", "test")
        ) == split_counts(n)
    assert np.array_equal(split, split_classes(labels)) and not np.array_equal(
        split, split_classes(labels, seed=1)
    )


def test_subset_is_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [100, 40, 2])
    chosen = stratified_subset(labels, 0.4, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [40, 16, 1]
    assert np.array_equal(chosen, stratified_subset(labels, 0.4, seed=0))
    assert not np.array_equal(chosen, stratified_subset(labels, 0.4, seed=1))
    assert np.array_equal(stratified_subset(labels, 1.0, seed=5), np.arange(142))


def test_class_folders_in_the_order_of_their_numbers(folder):
    table = load_table(folder)
    assert table.classes == ["1_Water (deep)", "2_Fields, 50%", "10_Café"]
    assert len(table) == 90 and np.bincount(table.labels).tolist() == [30, 30, 30]
    assert all(table.classes[label] == file.split("/")[0] for file, label in zip(table.files, table.labels))
    assert {s: int((table.split == s).sum()) for s in ("train", "val", "test")} == {
        "train": 81,
        "val": 0,
        "test": 9,
    }


def test_archive_inside_a_folder_and_split_copy_and_flat_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "raw" / "Sentinel2LULC_JPEG")
    assert len(load_table(tmp_path / "raw")) == 90
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        shutil.copytree(folder, tmp_path / "split" / name)
    table = load_table(tmp_path / "split")
    assert len(table) == 270 and table.classes == load_table(folder).classes
    assert all(file.startswith(("train", "val", "test")) for file in table.files)
    assert {s: int((table.split == s).sum()) for s in ("train", "val", "test")} == {
        "train": 90,
        "val": 90,
        "test": 90,
    }
    flat = tmp_path / "flat"
    shutil.copytree(folder / "10_Café", flat)
    (flat / "notes.txt").write_text("not an image")
    table = load_table(flat)
    assert len(table) == 30 and set(table.labels) == {-1} and set(table.split) == {"train"}


@pytest.fixture
def land(tmp_path):
    """Land-1.0's layout: six images a split, ten classes, the second release's folder names."""
    root, rng = tmp_path / "Land-1.0", np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        folder = root / "Level_N2" / "RGB Images" / split
        folder.mkdir(parents=True)
        (root / "Level_N2" / "CSV").mkdir(exist_ok=True)
        rows = []
        for i in range(6):
            Image.fromarray(picture(rng, 16)).save(folder / f"{split} {i}%.jpg")
            fractions = rng.dirichlet(np.ones(10)).round(6)
            fractions[0] += 1 - fractions.sum()
            rows.append(
                [i, 0.0, 0.0, f"{split} {i}%.jpg", "N2", *fractions, "ABCDEFGHIJ"[fractions.argmax()]]
            )
        columns = ["anything", "lat", "lon", "file", "level", *"ABCDEFGHIJ", "Class_max"]
        pd.DataFrame(rows, columns=columns).to_csv(
            root / "Level_N2" / "CSV" / f"csv_{split}.csv", index=False
        )
    return root


def test_land_layout_reads_by_position(land):
    table = load_table(land)
    assert len(table) == 18 and table.classes == list("ABCDEFGHIJ") and table.fractions.shape == (18, 10)
    assert {s: int((table.split == s).sum()) for s in ("train", "val", "test")} == {
        "train": 6,
        "val": 6,
        "test": 6,
    }
    csv = pd.read_csv(land / "Level_N2" / "CSV" / "csv_test.csv")
    part = table.rows(table.split == "test")
    assert [table.classes[k] for k in part.labels] == csv.Class_max.tolist()
    assert np.allclose(part.fractions, csv.iloc[:, 5:15], atol=1e-5)
    assert all((land / "Level_N2" / f).is_file() for f in table.files)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda csv: csv.assign(A=csv.A + 0.5), "line 2: the fractions"),
        (lambda csv: csv.assign(B=-csv.B), "line 2: the fractions"),
        (lambda csv: csv.assign(C=np.nan), "line 2: the fractions"),
        (lambda csv: csv.iloc[:, :9], "line 2: the fractions .* 4 columns"),
        (lambda csv: csv.assign(file=csv.file.where(csv.index != 3, "gone.jpg")), "line 5"),
    ],
)
def test_land_errors_name_file_and_line(land, spoil, says):
    file = land / "Level_N2" / "CSV" / "csv_train.csv"
    spoil(pd.read_csv(file)).to_csv(file, index=False)
    with pytest.raises(DataError, match=says) as error:
        load_table(land)
    assert "csv_train.csv" in str(error.value)


def test_folders_that_cannot_be_used(tmp_path, folder):
    with pytest.raises(DataError, match="no such folder"):
        load_table(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        load_table(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_table(tmp_path / "empty")
    shutil.copytree(folder, tmp_path / "both")
    Image.new("RGB", (8, 8)).save(tmp_path / "both" / "stray.png")
    with pytest.raises(DataError, match="stray.png"):
        load_table(tmp_path / "both")


def test_pixels_are_the_decoded_files_in_memory_and_on_disk(folder, tmp_path):
    table = load_table(folder)
    memory = load_pixels(table.root, table.files, 32, 32, cache=tmp_path)
    disk = load_pixels(table.root, table.files, 32, 32, cache=tmp_path, in_memory=0)
    assert memory.shape == (90, 3, 32, 32) and memory.dtype == torch.uint8 and torch.equal(memory, disk)
    expected = np.asarray(Image.open(table.root / table.files[40]).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(memory[40], expected)
    written = list(tmp_path.iterdir())
    assert [f.suffix for f in written] == [".u8"]
    stamp = written[0].stat().st_mtime_ns
    load_pixels(table.root, table.files, 32, 32, cache=tmp_path, in_memory=0)
    assert written[0].stat().st_mtime_ns == stamp, "mapped again, not decoded again"
    load_pixels(table.root, table.files, 32, 32, cache=tmp_path, in_memory=0, stamp="changed")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("value", [0, 3, 200, 255])
def test_a_constant_channel_is_said_and_divided_by_one(value, capsys):
    """As two bands of radar have it, saved as RGB."""
    pixels = torch.randint(0, 256, (77, 3, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels[:, 2] = value
    mean, std = statistics_of(pixels)
    assert std[2] == 1 and 0 < std[0] < 0.5 and mean[2] == pytest.approx(value / 255, abs=1e-4)
    assert f"blue is {value} in every pixel" in capsys.readouterr().out


def test_any_change_of_a_file_changes_the_stamp(tmp_path):
    """`cp -p` and `rsync -t` bring older dates than those of the files they replace, archives fixed ones."""

    def stamp():
        stats = [(tmp_path / file).stat() for file in "abc"]
        rows = [(file, s.st_size, s.st_mtime_ns) for file, s in zip("abc", stats)]
        return stamp_of(tmp_path, pd.DataFrame(rows, columns=["file", "bytes", "mtime_ns"]))

    for date, file in enumerate("abc", 50):
        (tmp_path / file).write_bytes(b"1234567")
        os.utime(tmp_path / file, ns=(date, date))
    stamps = [stamp()]
    assert stamp() == stamps[0]
    os.utime(tmp_path / "a", ns=(40, 40))
    stamps.append(stamp())
    time.sleep(0.02)  # the disk's clock ticks a hundred times a second and more
    (tmp_path / "b").write_bytes(b"7654321")
    os.utime(tmp_path / "b", ns=(51, 51))
    stamps.append(stamp())
    assert len(set(stamps)) == 3


def test_a_failed_build_leaves_no_cache(folder, tmp_path):
    table = load_table(folder)
    with pytest.raises(OSError):
        load_pixels(table.root, np.append(table.files, "gone.jpg"), 32, 32, cache=tmp_path, in_memory=0)
    assert not list(tmp_path.iterdir())


def test_odd_sizes_are_scaled_as_a_whole(tmp_path):
    Image.new("RGB", (64, 32), (10, 200, 30)).save(tmp_path / "wide.png")
    Image.new("L", (16, 16), 77).save(tmp_path / "grey.png")
    assert decode(tmp_path / "wide.png", 32, 32).shape == (3, 32, 32)
    assert (decode(tmp_path / "grey.png", 32, 32) == 77).all()
    assert common_size(pd.DataFrame({"height": [32, 64, 32], "width": [40, 64, 40]})) == (32, 40)


@pytest.mark.parametrize("rows", [None, np.arange(5, 600, 3)])
def test_channel_statistics(rows):
    pixels = torch.randint(
        0, 256, (700, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels[:, 1] //= 2
    pixels[:5], pixels[600:] = pixels[:5] // 3, pixels[600:] // 3
    x = (pixels if rows is None else pixels[rows]).double() / 255
    mean, std = channel_statistics(pixels, rows)
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=5.1e-5)
    assert std == pytest.approx(x.std((0, 2, 3)).tolist(), abs=1e-4)


def test_statistics_are_of_images_from_all_over_the_set(monkeypatch):
    """Files are in the order of their classes."""
    monkeypatch.setattr("data.pixels.SAMPLED", 10)
    pixels = torch.arange(100, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
    mean, _ = channel_statistics(pixels)
    assert mean == pytest.approx([45 / 255] * 3, abs=1e-4)


def test_images_without_a_label_are_no_class_of_their_own():
    labels = np.array([0, -1, 1, -1, 0, 1, -1])
    assert sorted(labels[per_class_subset(labels, 1, seed=0)]) == [0, 1]


def test_decoded_pixels_of_other_images_sizes_or_rules_have_a_file_of_their_own(
    folder, tmp_path, monkeypatch
):
    files, cache = load_table(folder).files, tmp_path / "cache"
    copy = shutil.copytree(folder, tmp_path / "copy")
    asked = [
        (folder, files[:2], 32),
        (folder, files[1:3], 32),
        (folder, files[:2], 24),
        (copy, files[:2], 32),
    ]
    for root, some, side in asked:
        load_pixels(root, some, side, side, cache=cache, share=True)
    monkeypatch.setattr("data.pixels.RULES", 99)
    load_pixels(folder, files[:2], 32, 32, cache=cache, share=True)
    assert len(list(cache.glob("*.u8"))) == 5

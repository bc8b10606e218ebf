"""predict.py: the numbers of transfer.py on the same images, and a map of a built-in scene against its
truth."""

import contextlib
import os
import signal

import numpy as np
import pandas as pd
import pytest
from conftest import refused
from PIL import Image, TiffImagePlugin

import predict
import transfer
from common import DataError
from data.synthetic import MIXED_CLASSES, mixed_scene
from data.truth import read_class_map

TILE = 48


def shares_in(found):
    """(n, 10) fractions of a CSV, whose last columns they are."""
    return found.iloc[:, -10:].to_numpy()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A large built-in scene, and tiles cut from it that a model learns from, in Land-1.0's layout."""
    folder = tmp_path_factory.mktemp("world")
    pixels, class_map = mixed_scene(240, 336, np.random.default_rng(5), region=90)
    Image.fromarray(pixels).save(folder / "scene.png")
    Image.fromarray(class_map.astype(np.uint8)).save(folder / "classes.png")
    (folder / "land" / "CSV").mkdir(parents=True)
    corners = np.random.default_rng(0).integers(0, [240 - TILE, 336 - TILE], (300, 2))
    for split, part in (("train", corners[:220]), ("val", corners[220:260]), ("test", corners[260:])):
        images = folder / "land" / "RGB Images" / split
        images.mkdir(parents=True)
        rows = []
        for i, (top, left) in enumerate(part):
            window = np.s_[top : top + TILE, left : left + TILE]
            Image.fromarray(pixels[window]).save(images / f"{i:03d}.png")
            shares = np.bincount(class_map[window].ravel(), minlength=10) / TILE**2
            rows.append([i, "", "", f"{i:03d}.png", "N2", *shares, MIXED_CLASSES[shares.argmax()]])
        header = ["ID", "Latitude", "Longitude", "Filename", "Level", *MIXED_CLASSES, "Class_max"]
        pd.DataFrame(rows, columns=header).to_csv(folder / "land" / "CSV" / f"csv_{split}.csv", index=False)
    transfer.main(
        [
            "--data",
            str(folder / "land"),
            "--size",
            "64",
            "--ratios",
            "100",
            "--seeds",
            "1",
            "--save-model",
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--workers",
            "1",
            "--out",
            str(folder / "out"),
            "--cache",
            str(folder / "cache"),
        ]
    )
    return folder, class_map


def test_images_get_the_numbers_of_transfer(world, tmp_path):
    folder, _ = world
    predict.main(
        [
            str(folder / "out" / "model-fraction-land-random.pth"),
            str(folder / "land" / "RGB Images" / "test"),
            "--out",
            str(tmp_path / "new" / "p.csv"),
            "--device",
            "cpu",
        ]
    )
    found = pd.read_csv(tmp_path / "new" / "p.csv")
    assert len(found) == 40 and found.file[3].endswith("003.png")
    fractions, names = shares_in(found), np.array(found.columns[-10:])
    assert (
        np.allclose(fractions.sum(1), 1, atol=1e-3) and (found["class"] == names[fractions.argmax(1)]).all()
    )
    truth = pd.read_csv(folder / "land" / "CSV" / "csv_test.csv")[MIXED_CLASSES].to_numpy()
    results = pd.read_csv(folder / "out" / "results.csv")
    rmse = results[
        (results.split == "test") & (results.metric == "rmse") & (results["class"] == "all")
    ].value.item()
    assert np.sqrt(((fractions - truth) ** 2).mean(0)).mean() == pytest.approx(rmse, abs=2e-4)


@contextlib.contextmanager
def restored_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_end_at_the_last_picture_does_not_cost_the_rows_of_the_others(
    number, world, tmp_path, monkeypatch, capsys
):
    folder, _ = world
    model, images = folder / "out" / "model-fraction-land-random.pth", folder / "land" / "RGB Images" / "test"
    one, seen = predict.one_picture, []

    def until_the_third(*about):
        seen.append(about[0])
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return one(*about)

    monkeypatch.setattr(predict, "one_picture", until_the_third)
    with restored_signals(), pytest.raises(SystemExit) as end:
        predict.main([str(model), str(images), "--out", str(tmp_path / "p.csv"), "--device", "cpu"])
    assert end.value.code == 128 + number and len(pd.read_csv(tmp_path / "p.csv")) == 2
    assert f"{number.name}: 2 of 40 pictures are done" in capsys.readouterr().err


def test_map_of_a_scene_against_its_truth(world, tmp_path, capsys):
    folder, class_map = world
    predict.main(
        [
            str(folder / "out" / "model-fraction-land-random.pth"),
            str(folder / "scene.png"),
            "--stride",
            "24",
            "--out",
            str(tmp_path / "scene.csv"),
            "--truth",
            str(folder / "classes.png"),
            "--device",
            "cpu",
        ]
    )
    found = pd.read_csv(tmp_path / "scene.csv")
    assert len(found) == 9 * 13 and found.row.max() == 240 - TILE and found.column.max() == 336 - TILE

    def error(top, left):
        windows = [class_map[r : r + TILE, c : c + TILE].ravel() for r, c in zip(top, left)]
        truth = np.array([np.bincount(w, minlength=10) / TILE**2 for w in windows])
        return np.sqrt(((shares_in(found) - truth) ** 2).mean(0)).mean(), truth

    rmse, truth = error(found.row, found.column)
    spread = truth.std(0).mean()
    right = (truth.argmax(1) == shares_in(found).argmax(1)).mean()
    assert f"RMSE {rmse:.3f} (mean over the classes; of the best constant answer {spread:.3f})" in (
        said := capsys.readouterr().out
    )
    assert f"right in {right:.0%}" in said
    assert rmse < 0.75 * spread
    upside_down = error(found.row.max() - found.row, found.column.max() - found.column)[0]
    assert rmse < 0.75 * upside_down
    with Image.open(tmp_path / "scene-map.png") as image:
        assert image.width > 800 and np.asarray(image.convert("RGB")).std() > 20


def write_truth(file, numbers, nodata=None):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    if nodata is not None:
        info[42113] = str(nodata)
    Image.fromarray(numbers).save(file, **({"tiffinfo": info} if file.suffix == ".tif" else {}))
    return file


def against(world, truth, out):
    """What predict.py says of the built-in scene against a truth."""
    folder, _ = world
    model, scene = folder / "out" / "model-fraction-land-random.pth", folder / "scene.png"
    flags = ["--truth", truth, "--stride", 24, "--out", out, "--device", "cpu"]
    predict.main([str(flag) for flag in (model, scene, *flags)])


@pytest.mark.parametrize("void, nodata", [(255, None), (-1, -1), (99, 99.0), (255, 77)])
def test_void_pixels_of_a_truth_count_nowhere(world, tmp_path, capsys, void, nodata):
    """Whatever marks them; the class below them must not matter."""
    _, class_map = world
    numbers = class_map.astype(np.int32)
    numbers[:100] = numbers[:, 100:110] = void
    against(world, write_truth(tmp_path / "truth.tif", numbers, nodata), tmp_path / "scene.csv")
    said = capsys.readouterr().out
    assert f"its numbers are taken from 0, {MIXED_CLASSES[0]}, to 9, {MIXED_CLASSES[-1]}" in said
    assert f"; {(numbers == void).sum()} void pixels are left out\n" in said
    found = pd.read_csv(tmp_path / "scene.csv")
    truth, shares = [], []
    for row, own in zip(found.itertuples(), shares_in(found)):
        window = numbers[row.row : row.row + TILE, row.column : row.column + TILE].ravel()
        window = window[window != void]
        if len(window) >= TILE**2 / 2:
            truth.append(np.bincount(window, minlength=10) / len(window))
            shares.append(own)
    assert 0 < len(truth) < len(found)
    rmse = np.sqrt(((np.array(shares) - truth) ** 2).mean(0)).mean()
    assert f"against the truth: RMSE {rmse:.3f} " in said


def test_a_model_of_scenes_is_compared_by_its_classes():
    """An RMSE would compare probabilities with shares of an area."""
    truth = np.eye(3)[[0, 0, 0, 1, 2]]
    found = np.eye(3)[[0, 0, 1, 1, 1]]
    said = predict.compare(found, truth, "scene")
    assert "right in 60% of the patches, the most frequent one is in 60%" in said
    assert "RMSE" not in said and "RMSE" in predict.compare(found, truth, "fraction")


def test_what_a_class_map_holds_beside_its_classes(tmp_path):
    """255 is void where no class has that number; a number below all classes is one too many."""
    file = write_truth(tmp_path / "t.png", np.array([[0, 255]], np.uint8))
    for count, known in ((3, [True, False]), (255, [True, False]), (256, [True, True])):
        assert read_class_map(file, list(map(str, range(count)))).known.tolist() == [known]
    with pytest.raises(DataError, match="holds class -1, the model knows 0 to 1"):
        read_class_map(write_truth(tmp_path / "t.tif", np.array([[0, -1]], np.int32)), ["a", "b"])
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "turned.tif", tiffinfo={274: 6})
    with pytest.raises(DataError, match="its orientation tag turns it"):
        read_class_map(tmp_path / "turned.tif", ["a", "b"])


def test_a_truth_says_how_it_is_numbered(world, tmp_path, capsys):
    _, class_map = world
    few = np.minimum(class_map, 4).astype(np.uint8)
    against(world, write_truth(tmp_path / "from-0.png", few), tmp_path / "a.csv")
    assert "none is 0" not in capsys.readouterr().out
    against(world, write_truth(tmp_path / "from-1.png", few + 1), tmp_path / "b.csv")
    assert "none is 0: where its classes begin at 1, subtract 1" in capsys.readouterr().out


def test_a_truth_that_may_mean_other_classes_is_refused(world, tmp_path, capsys):
    folder, class_map = world
    model, numbers = folder / "out" / "model-fraction-land-random.pth", class_map.astype(np.uint8)
    for name, odd, nodata, part in (
        (
            "one.png",
            numbers + 1,
            None,
            "holds class 10, the model knows 0 to 9; where its classes begin at 1",
        ),
        (
            "zero.tif",
            np.minimum(numbers, 5),
            0,
            f"nodata value is 0, which is the number of {MIXED_CLASSES[0]}",
        ),
        ("void.png", np.full_like(numbers, 255), None, "all of it is void"),
    ):
        truth = write_truth(tmp_path / name, odd, nodata)
        flags = ("--truth", truth, "--out", tmp_path / "p.csv", "--device", "cpu")
        assert part in refused(capsys, predict.main, model, folder / "scene.png", *flags)


def test_bad_input(world, tmp_path, capsys):
    folder, _ = world
    model, image = folder / "out" / "model-fraction-land-random.pth", folder / "scene.png"
    (tmp_path / "noise.png").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for arguments, part in (
        (
            [tmp_path / "none.pth", image],
            "none.pth: no such model: transfer.py --save-model writes one",
        ),
        ([image, image], "scene.png: not a model of transfer.py --save-model"),
        ([model, tmp_path / "none.png"], "none.png: not a readable image ([Errno 2] No such file"),
        ([model, tmp_path / "noise.png"], "noise.png: not a readable image"),
        ([model, tmp_path / "empty"], "empty: holds no images"),
    ):
        assert part in refused(
            capsys, predict.main, *arguments, "--out", tmp_path / "p.csv", "--device", "cpu"
        )
    Image.fromarray(np.full((240, 336), 99, np.uint8)).save(tmp_path / "far.png")
    Image.fromarray(np.zeros((240, 335), np.uint8)).save(tmp_path / "narrow.png")
    Image.fromarray(np.zeros((240, 336), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((240, 336), -1, np.int32)).save(tmp_path / "signed.tif")
    for truth, part in (
        (folder / "scene.png", "one channel of integers"),
        (tmp_path / "noise.png", "noise.png: not a readable image"),
        (tmp_path / "far.png", "holds class 99, the model knows 0 to 9"),
        (tmp_path / "float.tif", "one channel of integers"),
        (tmp_path / "narrow.png", "has shape (240, 335), the picture (240, 336)"),
        (tmp_path / "signed.tif", "holds class -1"),
    ):
        assert part in refused(
            capsys,
            predict.main,
            model,
            image,
            "--truth",
            truth,
            "--out",
            tmp_path / "p.csv",
            "--device",
            "cpu",
        )
    two = [image, tmp_path / "far.png", "--truth", image, "--out", tmp_path / "p.csv"]
    assert "one scene, not of 2" in refused(capsys, predict.main, model, *two)
    assert not (tmp_path / "p.csv").exists()


def test_nothing_that_is_read_is_written_over(world, tmp_path, capsys):
    folder, _ = world
    model, image = folder / "out" / "model-fraction-land-random.pth", folder / "scene.png"
    kept = {f: f.read_bytes() for f in (model, image)}
    for out in (image, model):
        assert "would overwrite" in refused(
            capsys, predict.main, model, image, "--out", out, "--device", "cpu"
        )
    Image.fromarray(np.zeros((240, 336), np.uint8)).save(tmp_path / "x-map.png")
    assert "would overwrite" in refused(
        capsys, predict.main, model, image, "--truth", tmp_path / "x-map.png", "--out", tmp_path / "x.csv"
    )
    assert "is a folder" in refused(capsys, predict.main, model, image, "--out", tmp_path, "--device", "cpu")
    assert all(f.read_bytes() == content for f, content in kept.items())


def test_no_file_takes_the_place_of_a_device(world, tmp_path, capsys):
    folder, _ = world
    model = folder / "out" / "model-fraction-land-random.pth"
    os.mkfifo(tmp_path / "pipe")  # stands for a device: root would have put a file in its place
    os.mkfifo(tmp_path / "y-map.png")
    for name, what in (("pipe", "pipe"), ("y.csv", "y-map.png")):
        words = refused(capsys, predict.main, model, folder / "scene.png", "--out", tmp_path / name)
        assert f"{what} is a folder or a device" in words
    assert (tmp_path / "pipe").is_fifo() and not (tmp_path / "y.csv").exists()


def test_the_most_frequent_class_is_that_of_the_truth():
    said = predict.compare(np.eye(3)[[0, 0, 0, 0, 0]], np.eye(3)[[0, 0, 0, 1, 2]], "scene")
    assert said.endswith("right in 60% of the patches, the most frequent one is in 60%")

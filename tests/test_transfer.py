"""transfer.py: frozen backbones, tables that survive kills and ranks, and input that is wrong."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from conftest import ROOT, Reads, refused
from PIL import Image
from torch import nn

import common
import transfer
from common import ConfigError
from data.augment import draw
from models.probe import PENALTIES
from models.weights import IMAGENET_MEAN, IMAGENET_STD, save_backbone
from scores import TASKS
from scores.results import CELL, COLUMNS

CLASSES = list("abcdefghij")
QUICK = (
    "--size 32 --epochs 1 --batch-size 16 --ratios 50 100 --seeds 2 --device cpu --precision fp32 --workers 1"
)


def write_land(root: Path, counts={"train": 60, "val": 20, "test": 30}) -> Path:
    """Land-1.0's layout: images of two stripes in the colours of their classes, with their fractions."""
    rng = np.random.default_rng(0)
    colours = rng.integers(30, 225, (10, 3))
    (root / "CSV").mkdir(parents=True)
    for split, n in counts.items():
        (root / "RGB Images" / split).mkdir(parents=True)
        rows = []
        for i in range(n):
            first, second, width = i % 10, (i + 1 + rng.integers(9)) % 10, int(rng.integers(18, 32))
            pixels = np.repeat(colours[[first] * width + [second] * (32 - width)][None], 32, 0) + rng.normal(
                0, 20, (32, 32, 3)
            )
            Image.fromarray(np.uint8(pixels.clip(0, 255))).save(root / "RGB Images" / split / f"{i}.png")
            fractions = np.zeros(10)
            fractions[first], fractions[second] = width / 32, 1 - width / 32
            rows.append([i, "", "", f"{i}.png", "N2", *fractions, CLASSES[first]])
        header = ["ID", "Latitude", "Longitude", "Filename", "Level", *CLASSES, "Class_max"]
        pd.DataFrame(rows, columns=header).to_csv(root / "CSV" / f"csv_{split}.csv", index=False)
    return root


@pytest.fixture(scope="module")
def land(tmp_path_factory):
    return write_land(tmp_path_factory.mktemp("data") / "land")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data") / "folders", np.random.default_rng(0)
    for k, name in enumerate(("1_sea", "2_sand", "10_wood")):
        (root / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.normal(60 + 60 * k, 40, (32, 32, 3))
            Image.fromarray(np.uint8(pixels.clip(0, 255))).save(root / name / f"{i}.png")
    return root


def argv_of(data, out, *flags) -> list[str]:
    """Flags as words; those given as text are split."""
    words = ["--data", data, "--out", out, "--cache", Path(data).parent / "cache"]
    for flag in (QUICK, *flags):
        words += flag.split() if isinstance(flag, str) else [flag]
    return [str(word) for word in words]


def run(data, out, *flags) -> pd.DataFrame:
    transfer.main(argv_of(data, out, *flags))
    return pd.read_csv(Path(out) / "results.csv")


def values(results):
    """What must not depend on when and where a cell ran, in the order of the cells."""
    return (
        results.drop(columns=["seconds", "commit"])
        .sort_values([*CELL, "epoch", "split", "metric", "class"])
        .reset_index(drop=True)
    )


# The table


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """The same weights as a backbone.pth of train_ssl.py and as a snapshot of the paper's authors."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    backbone = torchvision.models.resnet18()
    backbone.fc = torch.nn.Identity()
    (folder / "barlow").mkdir()
    torch.save(backbone.state_dict(), folder / "barlow" / "backbone.pth")
    numbered = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    state = {
        f"backbone.{numbered[k.split('.')[0]]}.{k.split('.', 1)[1]}": v
        for k, v in backbone.state_dict().items()
    }
    torch.save(
        {"MODEL": state | {"projection_head.0.weight": torch.zeros(2, 2)}, "EPOCHS": 3}, folder / "authors.pt"
    )
    return folder


def test_table_of_linear_cells(land, snapshot, tmp_path, monkeypatch, capsys):
    built = []

    def build(*args):
        backbone = transfer_build(*args)
        built.append((backbone, {k: v.clone() for k, v in backbone.state_dict().items()}))
        return backbone

    transfer_build = transfer.build_backbone
    monkeypatch.setattr(transfer, "build_backbone", build)
    inits = ["random", "channels", snapshot / "barlow" / "backbone.pth", snapshot / "authors.pt"]
    results = run(land, tmp_path, "--init", *inits)
    assert list(results) == COLUMNS and set(results.init) == {"random", "channels", "barlow", "authors"}
    assert (
        len(results.drop_duplicates(CELL)) == 4 * 2 * 2
        and not results.duplicated([*CELL, "split", "metric", "class"]).any()
    )
    assert set(results[(results.split == "test") & (results["class"] == "all")].metric) == {
        "rmse",
        "rmse_pooled",
        "mae",
        "r2",
    }
    assert set(results[results.metric == "rmse"]["class"]) == {"all", *CLASSES}
    assert (
        set(results.images) == {30, 60}
        and (results.lr == 0).all()
        and results.weight_decay.isin(PENALTIES).all()
    )
    for init in ("random", "barlow"):  # the seed redraws the subset, and for random the backbone too
        spread = results[
            (results.init == init)
            & (results.metric == "rmse")
            & (results["class"] == "all")
            & (results.split == "test")
        ]
        assert spread[spread.ratio == 50].value.nunique() == 2
        assert spread[spread.ratio == 100].value.nunique() == (2 if init == "random" else 1)
    same = [values(results[results.init == init]).drop(columns="init") for init in ("barlow", "authors")]
    pd.testing.assert_frame_equal(*same)
    for backbone, before in built:
        assert backbone.training and all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())

    bytes_before, _ = (tmp_path / "results.csv").read_bytes(), capsys.readouterr()
    monkeypatch.setattr(transfer, "extract_features", None)  # nothing is left to do
    run(land, tmp_path, "--init", *inits)
    assert (tmp_path / "results.csv").read_bytes() == bytes_before
    text = capsys.readouterr().out
    assert "in summary.csv also rmse_pooled, mae, r2" in text
    assert "0 cells in" in text and "16 were there already" in text and "±" in text and "\033" not in text
    both = run(land, tmp_path, "--init", "channels", "--task", "scene")
    assert (tmp_path / "results.csv").read_bytes().startswith(bytes_before) and set(both.task) == {
        "fraction",
        "scene",
    }


def test_fine_tuning_changes_the_backbone_and_keeps_the_best_epoch(folders, tmp_path):
    results = run(
        folders,
        tmp_path,
        "--task scene --mode finetune --ratios 100 --seeds 1 --epochs 3 --augment --save-model",
        "--precision bf16",
    )
    assert results.epoch.nunique() == 1 and results.epoch.iloc[0] in (1, 2, 3)
    model = torch.load(tmp_path / "model-scene-folders-random.pth", weights_only=True)
    torch.manual_seed(0)
    start = transfer.build_backbone("resnet18").state_dict()
    assert not torch.equal(model["state"]["0.conv1.weight"], start["conv1.weight"])
    assert not torch.equal(model["state"]["0.bn1.running_mean"], start["bn1.running_mean"])
    val = results[(results.split == "val") & (results.metric == "f1_macro")].value.item()
    assert model["score"] == pytest.approx(val, rel=1e-5) and model["classes"] == [
        "1_sea",
        "2_sand",
        "10_wood",
    ]


def test_two_names_that_a_spreadsheet_would_show_alike_are_refused(snapshot, tmp_path):
    files = [tmp_path / name / "backbone.pth" for name in ("=x", "'=x")]
    for file in files:
        file.parent.mkdir()
        shutil.copy(snapshot / "barlow" / "backbone.pth", file)
    with pytest.raises(transfer.ConfigError, match="are both called '=x in results.csv"):
        transfer.open_inits([str(file) for file in files], "resnet18")


def test_two_pairs_of_data_and_init_do_not_share_a_file(tmp_path):
    results = transfer.Results(tmp_path)
    rows = pd.DataFrame([dict.fromkeys(transfer.COLUMNS, "0") | {"data": "a-b", "init": "c"}])
    rows[transfer.COLUMNS].to_csv(results.file, index=False)
    transfer.refuse_one_name(results, "a-b", [transfer.Init("c", "c"), transfer.Init("b-c", "b-c")])
    with pytest.raises(transfer.ConfigError, match="of c on a-b and of b-c on a would have one name"):
        transfer.refuse_one_name(results, "a", [transfer.Init("b-c", "b-c")])


def test_val_is_looked_at_now_and_then(folders, tmp_path, capsys):
    """The same training, looked at more rarely: the same numbers at the epochs that are looked at."""
    flags = "--task scene --mode finetune --ratios 50 --seeds 1 --epochs 3 --epoch-choice common"
    every = run(folders, tmp_path / "every", flags)
    some = run(folders, tmp_path / "some", flags, "--check-every 2")
    assert sorted(some.epoch.unique()) == [2, 3]
    there = every[every.epoch.isin([2, 3])].reset_index(drop=True)
    pd.testing.assert_frame_equal(values(there), values(some))
    run(folders, tmp_path / "some", flags, "--check-every 2")
    assert "1 were there already" in capsys.readouterr().out
    error = bad(capsys, folders, tmp_path / "some", flags)
    assert "check_every was 2, is not set" in error


def test_fine_tuning_starts_at_the_linear_probe(folders, snapshot, tmp_path, capsys, monkeypatch):
    """Before its first step it says what the linear probe says; a folder does not mix the two starts."""
    monkeypatch.setattr(transfer, "train", lambda model, *_, **__: iter([(1, model)]))
    weights = str(snapshot / "barlow" / "backbone.pth")
    flags = ("--task scene --ratios 50 --seeds 1 --epochs 1 --precision fp32", "--init", weights)
    start = "--start-head probe"

    def confusion(name: str, mode: str, *more: str) -> bytes:
        run(folders, tmp_path / name, *flags, f"--mode {mode}", *more)
        return (tmp_path / name / "confusion" / f"folders-barlow-{mode}-50-0.csv").read_bytes()

    linear = confusion("linear", "linear")
    assert confusion("probed", "finetune", start) == linear
    assert confusion("afresh", "finetune") != linear
    error = bad(capsys, folders, tmp_path / "afresh", *flags, "--mode finetune", start)
    assert "start_head was not set, is probe" in error
    error = bad(capsys, folders, tmp_path / "probed", *flags, "--mode finetune")
    assert "start_head was probe, is not set" in error


@pytest.mark.parametrize(
    ("init", "start", "kept"),
    [("file", "probe", True), ("file", "random", False), ("random", "probe", False)],
)
def test_the_statistics_of_a_pretraining_stay_from_the_probe_on(
    folders, snapshot, tmp_path, init, start, kept
):
    weights = snapshot / "barlow" / "backbone.pth"
    flags = "--task scene --mode finetune --ratios 50 --seeds 1 --epochs 1 --lr 0.01 --save-model"
    run(folders, tmp_path, flags, f"--start-head {start}", "--init", weights if init == "file" else "random")
    (file,) = tmp_path.glob("model-*.pth")
    state = torch.load(file, weights_only=True)["state"]
    torch.manual_seed(0)
    drawn = transfer.build_backbone("resnet18").state_dict()
    before = torch.load(weights) if init == "file" else drawn
    assert torch.equal(state["0.bn1.running_mean"], before["bn1.running_mean"]) == kept
    assert not torch.equal(state["0.conv1.weight"], before["conv1.weight"])
    assert not torch.equal(state["0.bn1.weight"], before["bn1.weight"])


def test_a_class_without_test_images_is_told(folders, tmp_path, capsys):
    for split, names in (("train", ("1_sea", "2_sand")), ("val", ("1_sea", "2_sand")), ("test", ("1_sea",))):
        for name in names:
            shutil.copytree(folders / name, tmp_path / "data" / split / name)
    run(
        tmp_path / "data",
        tmp_path / "out",
        "--task scene --init channels --mode linear --ratios 100 --seeds 1",
    )
    said = capsys.readouterr().out
    assert "note: test has no image of sand: their F1 counts as 0 in macro F1" in said.replace(
        "2_sand", "sand"
    )
    assert "note: val" not in said


def test_a_model_that_few_images_choose_is_said_to_be_luck(land, tmp_path, capsys, monkeypatch):
    flags = "--task scene --ratios 100 --seeds 1 --init random --mode linear"
    run(land, tmp_path / "not", flags)
    assert "luck" not in capsys.readouterr().out
    run(land, tmp_path / "few", flags, "--save-model")
    said = [line for line in capsys.readouterr().out.splitlines() if "luck" in line]
    assert len(said) == 1 and re.match(r"--save-model: val has \d+ images, which is few: ", said[0])
    monkeypatch.setattr(transfer, "FEW", 2)
    run(land, tmp_path / "many", flags, "--save-model")
    assert "luck" not in capsys.readouterr().out
    run(land, tmp_path / "none", flags.replace("random", "channels"), "--save-model")
    assert "--save-model: channels is no network" in capsys.readouterr().out


def test_scenes_with_neighbours_confusion_and_embeddings(folders, tmp_path):
    results = run(
        folders, tmp_path, "--task scene --ratios 100 --seeds 1 --init channels random --save-embeddings"
    )
    test = results[(results.split == "test")]
    task = TASKS["scene"]
    assert set(test[test["class"] == "all"].metric) == {*task.overall, *task.of_features}
    assert list(test[(test.metric == "f1") & (test.init == "random")]["class"]) == [
        "1_sea",
        "2_sand",
        "10_wood",
    ]
    assert test[(test.init == "channels") & (test.metric == "f1_macro")].value.item() > 0.8
    confusion = pd.read_csv(tmp_path / "confusion" / "folders-channels-linear-100-0.csv", index_col=0)
    assert (
        list(confusion) == list(confusion.index) == ["1_sea", "2_sand", "10_wood"]
        and confusion.to_numpy().sum() == 9
    )
    micro = np.trace(confusion.to_numpy()) / 9
    assert test[(test.init == "channels") & (test.metric == "f1_micro")].value.item() == pytest.approx(
        micro, rel=1e-5
    )
    with np.load(tmp_path / "embeddings-folders-random.npz") as saved:
        assert (
            saved["features"].shape == (9, 512)
            and saved["labels"].shape == (9,)
            and str(saved["init"]) == "random"
        )
        assert list(saved["classes"]) == ["1_sea", "2_sand", "10_wood"]


def test_paper_protocol_has_a_common_epoch(land, tmp_path, capsys):
    flags = transfer.read_flags(
        transfer.build_parser(), ["--data", str(land), "--protocol", "paper", "--seeds", "2"]
    )
    assert (flags.loss, flags.probe, flags.epoch_choice, flags.batch_size, flags.epochs, flags.lr) == (
        "bce",
        "sgd",
        "common",
        64,
        100,
        0.1,
    )
    assert flags.statistics == "data"
    assert flags.seed_list == [0, 1] and flags.ratios == [1, 5, 10, 25, 50, 100] and flags.size == 224
    results = run(land, tmp_path, "--protocol", "paper", "--epochs", 12, "--ratios", 50, "--init", "channels")
    overall = results[(results["class"] == "all") & (results.metric == "rmse")]
    assert sorted(results.epoch.unique()) == list(range(1, 13)) and (results.lr == 0.1).all()
    best = overall[overall.split == "val"].groupby("epoch").value.mean().idxmin()
    mean = overall[(overall.split == "test") & (overall.epoch == best)].value.mean()
    assert f"{mean:.4f} ±" in capsys.readouterr().out


# Kills and ranks


CELLS = "--mode finetune linear --ratios 50 100 --seeds 2"


@pytest.fixture(scope="module")
def whole(land, tmp_path_factory):
    return values(run(land, tmp_path_factory.mktemp("whole"), CELLS))


def start(land, out, *launcher):
    command = [sys.executable, *launcher, str(ROOT / "transfer.py"), *argv_of(land, out, CELLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_rows(process, file):
    deadline = time.monotonic() + 300
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def test_killed_and_started_again(land, whole, tmp_path, monkeypatch):
    process = start(land, tmp_path)
    wait_for_rows(process, tmp_path / "results.csv")
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = pd.read_csv(tmp_path / "results.csv")
    cells = len(kept.drop_duplicates(CELL))
    assert 0 < cells < 8, "the kill came too early or too late to show anything"
    ran, finetune = [], transfer.finetune
    monkeypatch.setattr(transfer, "finetune", lambda cell, *rest: ran.append(cell) or finetune(cell, *rest))
    again = run(land, tmp_path, CELLS)
    pd.testing.assert_frame_equal(again[: len(kept)], kept)
    assert len(ran) == 4 - len(kept[kept["mode"] == "finetune"].drop_duplicates(CELL))
    pd.testing.assert_frame_equal(values(again), whole)


def test_a_signal_ends_it_with_one_line_that_counts_the_cells(land, tmp_path):
    process = start(land, tmp_path)
    wait_for_rows(process, tmp_path / "results.csv")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    kept = len(pd.read_csv(tmp_path / "results.csv").drop_duplicates(CELL))
    assert process.returncode == 128 + signal.SIGTERM
    assert said == f"SIGTERM: {kept} of 8 cells are in {tmp_path / 'results.csv'}; the same command goes on\n"
    assert not list(tmp_path.glob(".*.csv.*")), "a half-written file stayed"


def test_two_ranks_equal_one_process(land, whole, tmp_path):
    process = start(land, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    pd.testing.assert_frame_equal(values(pd.read_csv(tmp_path / "results.csv")), whole)


def test_cells_of_other_processes_are_counted_apart(land, tmp_path, capsys, monkeypatch):
    flags, probe_all = "--mode linear --ratios 50 100 --seeds 1", transfer.probe_all

    def after_another(*rest):
        monkeypatch.setattr(transfer, "probe_all", probe_all)
        run(land, tmp_path, flags)
        probe_all(*rest)

    monkeypatch.setattr(transfer, "probe_all", after_another)
    run(land, tmp_path, flags)
    inner, outer = [line for line in capsys.readouterr().out.splitlines() if "were there already" in line]
    assert inner.startswith("2 cells in") and "other processes" not in inner
    assert outer.startswith("0 cells in") and "0 were there already, 2 came from other processes" in outer


# Input that is wrong: one line, exit code 2


def bad(capsys, data, out, *flags) -> str:
    return refused(capsys, lambda argv: run(data, out, *argv), *flags)


def edit(row, column, value):
    def change(root):
        csv = pd.read_csv(root / "CSV" / "csv_val.csv")
        csv[csv.columns[column]] = csv[csv.columns[column]].astype(object)
        csv.iloc[row, column] = value
        csv.to_csv(root / "CSV" / "csv_val.csv", index=False)

    return change


def cut_columns(root):
    file = root / "CSV" / "csv_test.csv"
    pd.read_csv(file).iloc[:, :9].to_csv(file, index=False)


def empty_class(root):
    file = root / "CSV" / "csv_train.csv"
    csv = pd.read_csv(file)
    csv["a"], csv["b"] = 0.0, csv.b + csv.a
    csv.to_csv(file, index=False)


@pytest.mark.parametrize(
    "change, parts",
    [
        (edit(4, 5, 0.7), ["csv_val.csv, line 6", "sum to 1"]),
        (edit(0, 5, -0.1), ["csv_val.csv, line 2", "-0.1"]),
        (edit(2, 7, "nan"), ["csv_val.csv, line 4"]),
        (edit(3, 3, "gone.png"), ["csv_val.csv, line 5", "gone.png is missing"]),
        (cut_columns, ["csv_test.csv, line 2", "the 4 columns of numbers"]),
        (empty_class, ["no training image has class a", "leave the class out"]),
    ],
)
def test_bad_tables(tmp_path, capsys, change, parts):
    root = write_land(tmp_path / "land", {"train": 20, "val": 10, "test": 10})
    change(root)
    error = bad(capsys, root, tmp_path / "out")
    assert all(part in error for part in parts), error


def test_bad_weights_names_and_settings(land, folders, snapshot, tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    (tmp_path / "noise.pth").write_bytes(b"nothing")
    state = torch.load(snapshot / "barlow" / "backbone.pth")
    state["bn1.weight"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    out = tmp_path / "out"
    assert "no such weights file" in bad(capsys, land, out, "--init", tmp_path / "none.pth")
    assert "not a readable weights file" in bad(capsys, land, out, "--init", tmp_path / "noise.pth")
    assert "bn1.weight is missing" in bad(capsys, land, out, "--init", tmp_path / "odd.pth")
    assert "bn1.weight holds numbers that are not finite" in bad(
        capsys, land, out, "--init", tmp_path / "nan.pth"
    )
    assert "both called random" in bad(capsys, land, out, "--init", "random", "random")
    assert "class fractions" in bad(capsys, folders, out)
    assert "--seeds 0" in bad(capsys, land, out, "--seeds", 0)
    assert "bce is for --task fraction" in bad(capsys, land, out, "--task", "scene", "--loss", "bce")
    assert "add --mode linear" in bad(capsys, land, out, "--init", "channels", "--mode", "finetune")
    assert not (out / "results.csv").exists()

    run(land, out, "--init", "channels")
    before = (out / "results.csv").read_bytes()
    error = bad(capsys, land, out, "--init", "channels", "--loss", "bce", "--size", 24)
    assert "fraction linear: loss was softmax, is bce; fraction linear: size was 32, is 24" in error
    assert (out / "results.csv").read_bytes() == before
    (out / "results.csv").write_text("a,b\n1,2\n")
    assert "results.csv" in bad(capsys, land, out, "--init", "channels")
    assert (out / "results.csv").read_text() == "a,b\n1,2\n"


def test_weights_of_imagenet_bring_their_statistics(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18-f37072fd.pth")
    file, random = transfer.open_inits([str(tmp_path / "resnet18-f37072fd.pth"), "random"], "resnet18")
    assert file.name == "resnet18-f37072fd" and file.digest and not random.digest
    assert transfer.statistics(file, None) == (IMAGENET_MEAN, IMAGENET_STD)


def test_weights_bring_the_statistics_and_the_stem_of_their_pretraining(tmp_path):
    (tmp_path / "simclr").mkdir()
    backbone = transfer.build_backbone("resnet18", maxpool=False)
    about = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "size": 32, "maxpool": False}
    save_backbone(backbone, tmp_path / "simclr" / "backbone.pth", about)
    (init,) = transfer.open_inits([str(tmp_path / "simclr" / "backbone.pth")], "resnet18")
    assert transfer.statistics(init, None) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) and not init.maxpool
    (tmp_path / "random").mkdir()
    save_backbone(backbone, tmp_path / "random" / "backbone.pth", about)
    with pytest.raises(ConfigError, match="rename its folder"):
        transfer.open_inits([str(tmp_path / "random" / "backbone.pth")], "resnet18")


def test_images_are_normalised_as_the_paper_does_by_the_data_that_they_come_from(folders, tmp_path, capsys):
    """With --statistics data; a model carries what it saw, and a folder does not mix the two."""
    (tmp_path / "moco").mkdir()
    about = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "size": 32, "maxpool": True}
    save_backbone(transfer.build_backbone("resnet18"), tmp_path / "moco" / "backbone.pth", about)
    flags = "--task scene --ratios 100 --seeds 1 --save-model --mode linear finetune"
    weights = ("--init", tmp_path / "moco" / "backbone.pth", "random")
    own, data = tmp_path / "own", tmp_path / "data"
    found = [run(folders, own, flags, *weights), run(folders, data, flags, *weights, "--statistics data")]
    first, second = (rows[(rows.metric == "f1_macro") & (rows.split == "val")] for rows in found)
    same = first.value.to_numpy() == second.value.to_numpy()
    assert same[(first.init == "random").to_numpy()].all(), "whose statistics are the data's anyway"

    def model(out, init):
        return torch.load(out / f"model-scene-folders-{init}.pth", weights_only=True)

    assert model(own, "moco")["mean"] == about["mean"]
    for part in ("mean", "std"):
        assert model(data, "moco")[part] == model(data, "random")[part] == model(own, "random")[part]
    assert "statistics" not in (own / "settings.yaml").read_text()
    assert "statistics was data, is not set" in bad(capsys, folders, data, flags, *weights)


# Flags


# For each flag a value that is not its default
OTHER = yaml.safe_load("""
data: x
splits: lists
split: spatial
out: runs/x
cache: c
scenes: 77
size: 48
workers: 3
skip_bad_files: true
epochs: 7
batch_size: 12
lr: 0.0123456789
momentum: 0.5
weight_decay: 3.0e-7
seed: 20240101
device: cpu
precision: bf16
task: scene
init: [channels, a/backbone.pth]
arch: resnet50
mode: [finetune, linear]
ratios: [0.1, 33.333333, 100]
per_class: [10, 3]
seeds: [1234567, 7]
protocol: paper
loss: bce
probe: sgd
linear_lr: 0.3
epoch_choice: common
check_every: 3
schedule: cosine
statistics: data
augment: true
start_head: probe
save_model: true
share_pixels: true
save_embeddings: true
""")


@pytest.mark.parametrize("values", [OTHER | {"task": "fraction"}, OTHER | {"loss": "softmax"}, {}])
def test_a_saved_configuration_gives_every_flag_again(tmp_path, values):
    def read(argv):
        parser = transfer.build_parser()
        return common.flags_of(transfer.read_flags(parser, argv), parser)

    assert OTHER.keys() == common.flag_actions(transfer.build_parser()).keys() - {"config"}
    common.write_yaml(tmp_path / "mine.yaml", values)
    first = read(["--config", str(tmp_path / "mine.yaml")])
    assert {key: first[key] for key in values} == values
    common.write_yaml(tmp_path / "config.yaml", first | common.about(torch.device("cpu")))
    again = read(["--config", str(tmp_path / "config.yaml")])
    assert again | {"config": None} == first | {"config": None}
    changed = read(
        ["--config", str(tmp_path / "config.yaml"), "--no-augment", "--no-save-model", "--seeds", "2"]
    )
    assert not changed["augment"] and not changed["save_model"] and changed["seeds"] == [2]


def test_my_configuration_stands_over_the_papers(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 0.5\nseeds: [1, 2]\n")
    words = ["--data", "x", "--protocol", "paper", "--config", str(tmp_path / "mine.yaml"), "--ratios", "10"]
    args = transfer.read_flags(transfer.build_parser(), words)
    assert (args.lr, args.seed_list, args.ratios) == (0.5, [1, 2], [10])
    assert (args.loss, args.probe, args.epoch_choice, args.weight_decay) == ("bce", "sgd", "common", 0)


def test_numbers_of_images_a_class_stand_alone_or_beside_shares():
    def ratios(*words):
        args = transfer.read_flags(transfer.build_parser(), ["--data", "x", *words])
        return args.ratios, args.per_class

    assert ratios() == ([5, 10, 25, 50, 100], []) and ratios("--per-class", "10", "1") == ([], [10, 1])
    assert ratios("--per-class", "10", "--ratios", "100") == ([100], [10])
    with pytest.raises(ConfigError, match="--per-class N"):
        ratios("--ratios")


# What results.csv holds


def test_large_seeds_fine_ratios_and_images_a_class_survive(land, tmp_path, capsys):
    flags = "--task scene --init channels --seed 20240101 --seeds 2 --ratios 33.333333 --per-class 3"
    results = run(land, tmp_path, flags)
    rows = pd.read_csv(tmp_path / "results.csv", dtype=str)
    assert set(rows.seed) == {"20240101", "20240102"} and set(rows.ratio) == {"33.333333", "3/class"}
    assert set(results[results.ratio == "3/class"].images) == {30}
    assert sorted(f.name for f in (tmp_path / "confusion").iterdir())[0] == (
        "land-channels-linear-3-per-class-20240101.csv"
    )
    summary = pd.read_csv(tmp_path / "summary.csv", dtype={"ratio": str})
    assert ",".join(summary).startswith("task,data,init,mode,ratio,split,metric,epoch,mean,std,n,")
    assert set(summary.split) == {"val", "test"} and set(summary.n) == {2}
    said = capsys.readouterr().out
    assert "3/class" in said and "33.3333 %" in said
    headline = summary[(summary.metric == "f1_macro") & (summary.split == "test")].set_index("ratio")["mean"]
    assert f"{headline['3/class']:.4f} ±" in said and f"{headline['33.333333']:.4f} ±" in said
    bytes_before = (tmp_path / "results.csv").read_bytes()
    run(land, tmp_path, flags)
    assert (tmp_path / "results.csv").read_bytes() == bytes_before


def test_cells_that_were_cut_are_done_again(land, tmp_path, capsys):
    whole = values(run(land, tmp_path, "--init channels --ratios 50 100 --seeds 2"))
    text = (tmp_path / "results.csv").read_text()
    lines = text.splitlines(keepends=True)
    del lines[len(lines) // 2]  # inside a cell
    (tmp_path / "results.csv").write_text("".join(lines)[:-30])  # and inside the last one
    capsys.readouterr()
    again = values(run(land, tmp_path, "--init channels --ratios 50 100 --seeds 2"))
    assert "2 of them again, as results.csv was cut inside them" in capsys.readouterr().out
    pd.testing.assert_frame_equal(again, whole)


def test_two_data_sets_in_one_folder_keep_files_of_their_own(land, folders, tmp_path):
    flags = "--task scene --ratios 100 --seeds 1 --save-model --save-embeddings"
    for data in (land, folders):
        run(data, tmp_path, flags)
    for name in ("land", "folders"):
        model = torch.load(tmp_path / f"model-scene-{name}-random.pth", weights_only=True)
        assert model["data"] == name and model["maxpool"] and len(model["mean"]) == 3
        with np.load(tmp_path / f"embeddings-{name}-random.npz") as saved:
            assert str(saved["data"]) == name
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert set(summary.data) == {"land", "folders"} and set(summary.n) == {1}
    assert {"accuracy", "knn5_accuracy"} <= set(summary.metric)
    (tmp_path / "model-scene-land-random.pth").write_bytes(b"cut")
    (tmp_path / "results.csv").unlink()
    run(land, tmp_path, flags)  # a damaged model is replaced, not met with a traceback
    assert torch.load(tmp_path / "model-scene-land-random.pth", weights_only=True)["data"] == "land"


# train and choose, alone


class Points(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor

    def batch(self, rows, training=False):
        return self.inputs[rows], self.targets[rows]


def test_train_and_choose_need_nothing_but_what_they_take():
    torch.manual_seed(0)
    x = torch.randn(120, 4)
    points = Points(x, F.one_hot((x[:, 0] > 0).long(), 2).float())
    training = transfer.Training(
        lr=0.5, momentum=0.9, weight_decay=0, epochs=6, batch_size=32, loss="softmax"
    )
    model = nn.Linear(4, 2)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    steps = transfer.train(model, points, np.arange(100), training, seed=3)
    assert [epoch for epoch, trained in steps if trained is model] == [1, 2, 3, 4, 5, 6]
    right = transfer.predict(model, points, np.arange(100, 120), "softmax").argmax(1)
    assert (right == points.targets[100:].argmax(1).numpy()).mean() > 0.8

    twice = []
    for _ in range(2):
        model.load_state_dict(start)
        twice.append(
            [m.weight.clone() for _, m in transfer.train(model, points, np.arange(100), training, seed=3)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*twice))

    scores = {1: 0.3, 2: 0.7, 3: 0.7, 4: 0.1}
    asked = []

    def judge(step, split):
        asked.append((step, split))
        return np.full((1, 1), step), {("f1_macro", "all"): scores[step]}

    outcome = transfer.choose([(step, step) for step in scores], judge, TASKS["scene"])
    assert outcome.score == 0.7 and outcome.predicted == 2 and [r[0] for r in outcome.records] == [2]
    assert asked == [(1, "val"), (1, "test"), (2, "val"), (2, "test"), (3, "val"), (4, "val")]
    outcome = transfer.choose([(step, step) for step in scores], judge, TASKS["scene"], every=True)
    assert outcome.predicted == 2 and [r[0] for r in outcome.records] == [1, 2, 3, 4]
    lowest = TASKS["scene"]._replace(sign=-1)
    assert transfer.choose([(step, step) for step in scores], judge, lowest).predicted == 4


@pytest.mark.parametrize("batch_size", [4, 32])
def test_training_waits_for_the_device_once_an_epoch(batch_size):
    points = Points(torch.randn(64, 3), torch.eye(2).repeat(32, 1))
    training = transfer.Training(0.1, 0.9, 1e-4, 5, batch_size, "softmax")
    with Reads() as reads:
        list(transfer.train(nn.Linear(3, 2), points, np.arange(64), training, seed=0))
    assert reads.count == 5


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.5] * 8), ("cosine", [0.25 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])],
)
def test_the_rate_stays_or_falls_along_a_cosine(monkeypatch, schedule, rates):
    points = Points(torch.randn(16, 3), torch.eye(2).repeat(8, 1))
    training = transfer.Training(0.5, 0.9, 0, 2, 4, "softmax", schedule)
    seen, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *_: (seen.append([group["lr"] for group in self.param_groups]), step(self)),
    )
    list(transfer.train(nn.Linear(3, 2), points, np.arange(16), training, seed=0))
    assert [rate for groups in seen for rate in set(groups)] == pytest.approx(rates)


def test_a_folder_does_not_mix_two_schedules(land, tmp_path, capsys):
    flags = "--task scene --mode finetune --ratios 100 --seeds 1 --epochs 1 --init random"
    run(land, tmp_path, flags, "--schedule constant")
    error = bad(capsys, land, tmp_path, flags)
    assert "schedule was not set, is cosine" in error
    run(land, tmp_path, flags.replace("finetune", "linear"))


def test_a_loss_that_is_not_finite_names_the_epoch_and_the_rate():
    points = Points(torch.full((8, 2), float("inf")), torch.eye(2).repeat(4, 1))
    training = transfer.Training(0.5, 0.9, 0, 2, 4, "softmax")
    with pytest.raises(ConfigError, match="not finite in epoch 1: lower the learning rate, now 0.5"):
        list(transfer.train(nn.Linear(2, 2), points, np.arange(8), training, seed=0))


def test_predictions_that_are_not_finite_are_refused_not_counted_as_the_first_class():
    points = Points(torch.full((8, 2), float("inf")), torch.eye(2).repeat(4, 1))
    data = types.SimpleNamespace(rows={"val": np.arange(8)}, targets=points.targets, classes=["a", "b"])
    judge = transfer.Judge(points, data, "scene", "softmax", torch.float32)
    with pytest.raises(ConfigError, match="predictions are not finite: lower the learning rate"):
        judge(nn.Linear(2, 2), "val")


def test_the_folder_of_the_images_is_remembered_and_may_move(land, tmp_path):
    flags = "--init channels --mode linear --seeds 1 --ratios 100"
    run(land, tmp_path / "out", flags)
    moved = shutil.copytree(land, tmp_path / "elsewhere" / land.name)
    run(moved, tmp_path / "out", flags, "--cache", land.parent / "cache")
    kept = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())[f"where {land.name}"]
    assert (kept["data"], kept["split"], kept["splits"]) == (str(moved), "paper", None)


def test_the_bar_moves_while_features_are_taken(land, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(transfer.Work, "advance", lambda self, images: seen.append(images))
    run(land, tmp_path, "--init random --mode linear --seeds 1 --ratios 100")
    counts = re.search(r"\((\d+) train, (\d+) val, (\d+) test images\)", capsys.readouterr().out)
    assert sum(seen) == sum(map(int, counts.groups()))


def test_a_cell_that_diverges_is_named_and_costs_none_of_the_others(land, tmp_path, capsys):
    flags = "--init random channels --mode finetune linear --lr 1000 --epochs 2 --seeds 1 --ratios 100"
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            run(land, tmp_path, flags)
        said = capsys.readouterr()
        (failed,) = [line for line in said.err.splitlines() if line.startswith("failed: ")]
        assert failed.startswith("failed: random, finetune, 100 %, seed 0: the ") and "not finite" in failed
        last = said.out.splitlines()[-1]  # which tune.py gives as the reason
        assert stop.value.code == 1 and last.startswith("1 of 3 cells failed, the first: random, finetune")
        rows = pd.read_csv(tmp_path / "results.csv")
        assert set(zip(rows.init, rows["mode"])) == {("random", "linear"), ("channels", "linear")}
        assert len(pd.read_csv(tmp_path / "summary.csv"))
    alone = bad(capsys, land, tmp_path / "alone", flags.replace(" linear", "").replace(" channels", ""))
    assert "random, finetune, 100 %, seed 0: the " in alone


@pytest.mark.parametrize("task", ["fraction", "scene"])
def test_random_views_of_oblong_images_keep_the_area_of_fractions(task):
    recipe = transfer.random_views(task, 24, 48)
    box = draw(500, 24, 48, torch.Generator().manual_seed(0), recipe).box
    whole = (box == torch.tensor([0, 0, 24, 48])).all(1)
    assert whole.all() if task == "fraction" else whole.float().mean() < 0.5
    assert recipe.quarter_turns


# Data that does not do


def write_folders(root, counts: dict[str, int]):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((16, 16, 3), 9 * i % 255, np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    "counts, parts",
    [
        ({"a": 30, "b": 30}, ["no labelled image is in the val split", "40 images", "--splits"]),
        ({"only": 50}, ["one class, only", "nothing to tell apart"]),
        ({"all": 50, "b": 50}, ["a class is called all", "rename it"]),
        ({"train": 8}, ["labels"]),
        ({"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1}, ["no labelled image is in the val split"]),
    ],
)
def test_data_that_does_not_do(tmp_path, capsys, counts, parts):
    error = bad(capsys, write_folders(tmp_path / "x", counts), tmp_path / "out", "--task scene")
    assert all(part in error for part in parts), error


def test_one_training_image_cannot_be_fine_tuned_on():
    args = transfer.read_flags(transfer.build_parser(), ["--size", "24", "--precision", "fp32"])
    study = transfer.study_of(args, torch.device("cpu"))
    pixels, rows = torch.zeros(3, 3, 16, 16, dtype=torch.uint8), {"train": [0], "val": [1], "test": [2]}
    rows = {split: np.array(which) for split, which in rows.items()}
    subsets = {("1/class", 0): rows["train"]}
    channels = ([0.5] * 3, [0.2] * 3)
    data = transfer.Data("x", pixels, torch.eye(2)[[0, 1, 0]], ["a", "b"], rows, subsets, *channels, "")
    cell = transfer.Cell(transfer.Init("random", "random"), "finetune", "1/class", 0)
    message = "random, finetune, 1/class, seed 0: BatchNorm cannot train on one image"
    with pytest.raises(ConfigError, match=message), transfer.Work.at(types.SimpleNamespace(), cell):
        transfer.finetune(cell, data, study, print)


@pytest.mark.parametrize("task, best", [("fraction", 0.1), ("scene", 0.3)])
def test_the_model_that_is_kept_is_the_best_on_val(task, best, tmp_path):
    words = ["--data", "x", "--task", task, "--precision", "fp32"]
    study = transfer.study_of(transfer.read_flags(transfer.build_parser(), words), torch.device("cpu"))
    init, results = transfer.Init("random", "random"), transfer.Results(tmp_path)
    data = transfer.Data("d", torch.zeros(1, 3, 8, 8), None, ["a", "b"], {}, {}, [0.5] * 3, [0.2] * 3, "")
    for seed, score in enumerate((0.2, 0.1, 0.3, 0.2)):
        outcome = transfer.Outcome([], np.zeros((1, 2)), score, {"x": torch.tensor(seed)})
        cell = transfer.Cell(init, "linear", 100, seed)
        transfer.save_best_model(tmp_path, cell, outcome, data, study, results)
    model = torch.load(tmp_path / f"model-{task}-d-random.pth", weights_only=True)
    assert model["score"] == best and model["state"]["x"] == model["seed"]


def test_features_are_standardised_by_the_training_images(monkeypatch):
    seen, axes = [], transfer.principal_axes
    monkeypatch.setattr(transfer, "principal_axes", lambda features: seen.append(features) or axes(features))
    pixels = torch.randint(0, 256, (9, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows = {"train": np.array([1, 4, 5]), "val": np.array([0, 2]), "test": np.array([3, 6, 7, 8])}
    data = transfer.Data("d", pixels, torch.eye(3).repeat(3, 1), list("abc"), rows, {}, [], [], "")
    study = types.SimpleNamespace(device=torch.device("cpu"))
    frozen = transfer.freeze(transfer.Init("channels", "channels"), None, data, study, print)
    assert len(seen) == 1 and torch.equal(seen[0], frozen.features[rows["train"]])


def test_the_seed_draws_the_order_of_the_images():
    points = Points(torch.randn(64, 3), torch.eye(2).repeat(32, 1))
    training = transfer.Training(0.5, 0, 0, 1, 8, "softmax")
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        ((_, model),) = transfer.train(nn.Linear(3, 2), points, np.arange(64), training, seed=seed)
        weights.append(model.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_model_without_the_stems_pool_says_so(tmp_path):
    words = ["--data", "x", "--precision", "fp32"]
    study = transfer.study_of(transfer.read_flags(transfer.build_parser(), words), torch.device("cpu"))
    init = transfer.Init("m", "m", mean=(0.1,) * 3, std=(0.2,) * 3, maxpool=False)
    data = transfer.Data("d", torch.zeros(1, 3, 8, 8), None, ["a", "b"], {}, {}, [0.5] * 3, [0.2] * 3, "")
    outcome = transfer.Outcome([], np.zeros((1, 2)), 0.1, {"x": torch.zeros(1)})
    cell = transfer.Cell(init, "linear", 100, 0)
    transfer.save_best_model(tmp_path, cell, outcome, data, study, transfer.Results(tmp_path))
    assert torch.load(tmp_path / "model-fraction-d-m.pth", weights_only=True)["maxpool"] is False


def test_a_seed_draws_the_backbone_and_the_head(monkeypatch):
    states = []
    monkeypatch.setattr(transfer, "train", lambda model, *_, **__: states.append(transfer.copy_of(model)))
    monkeypatch.setattr(transfer, "choose", lambda *_: None)
    words = ["--data", "x", "--size", "32", "--precision", "fp32"]
    study = transfer.study_of(transfer.read_flags(transfer.build_parser(), words), torch.device("cpu"))
    subsets = {(100, seed): np.arange(4) for seed in (0, 1)}
    channels, pixels = ([0.5] * 3, [0.2] * 3), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    data = transfer.Data("d", pixels, torch.eye(4), list("abcd"), {}, subsets, *channels, "")
    for seed in (0, 1, 0):
        cell = transfer.Cell(transfer.Init("random", "random"), "finetune", 100, seed)
        transfer.finetune(cell, data, study, print)
    for key in ("0.conv1.weight", "1.weight"):
        first, second, again = (state[key] for state in states)
        assert torch.equal(first, again) and not torch.equal(first, second), key


def test_heads_that_are_trained_have_a_rate_of_their_own():
    words = ["--data", "x", "--probe", "sgd", "--lr", "0.1", "--linear-lr", "0.3", "--precision", "fp32"]
    study = transfer.study_of(transfer.read_flags(transfer.build_parser(), words), torch.device("cpu"))
    assert (study.head.lr, study.whole.lr) == (0.3, 0.1)


def test_what_makes_rows_unlike_is_remembered():
    """Each of these has no column in results.csv: a folder that does not remember it mixes two of them."""

    def remembered(*words, data="digest", weights="digest"):
        words = ["--data", "x", "--probe", "sgd", "--precision", "bf16", *words]
        study = transfer.study_of(transfer.read_flags(transfer.build_parser(), words), torch.device("cpu"))
        found = transfer.Data("d", None, None, [], {}, {}, [], [], data)
        init = transfer.Init("m", "m", weights, mean=(0.1,), std=(0.2,))
        return yaml.safe_dump(transfer.settings([init], found, study, ["linear", "finetune"]))

    flags = ["--precision fp32", "--size 64", "--arch resnet50", "--loss bce", "--augment", "--check-every 2"]
    flags += ["--epoch-choice common", "--schedule constant", "--statistics data", "--start-head probe"]
    found = [remembered(), *(remembered(*flag.split()) for flag in flags)]
    found += [remembered(data="other"), remembered(weights="other")]
    assert len(set(found)) == len(found) == 13


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_momentum_and_decay_are_those_of_the_training(name):
    points = Points(torch.randn(16, 3), torch.eye(2).repeat(8, 1))
    weights = []
    for value in (0.1, 0.2):
        torch.manual_seed(0)
        training = transfer.Training(0.5, 0, 0, 2, 4, "softmax")._replace(**{name: value})
        *_, (_, model) = transfer.train(nn.Linear(3, 2), points, np.arange(16), training, seed=0)
        weights.append(model.weight)
    assert not torch.equal(*weights)


def test_a_seed_draws_the_views_of_fine_tuning(monkeypatch):
    seeds = []
    found = lambda model, pictures, *_, **__: seeds.append(pictures.generator.initial_seed())
    monkeypatch.setattr(transfer, "train", found)
    monkeypatch.setattr(transfer, "choose", lambda *_: None)
    words = ["--data", "x", "--size", "32", "--precision", "fp32", "--augment"]
    study = transfer.study_of(transfer.read_flags(transfer.build_parser(), words), torch.device("cpu"))
    pixels, subsets = (
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        {(100, seed): np.arange(4) for seed in (3, 4)},
    )
    data = transfer.Data("d", pixels, torch.eye(4), list("abcd"), {}, subsets, [0.5] * 3, [0.2] * 3, "")
    for seed in (3, 4):
        transfer.finetune(
            transfer.Cell(transfer.Init("random", "random"), "finetune", 100, seed), data, study, print
        )
    assert seeds == [3, 4]

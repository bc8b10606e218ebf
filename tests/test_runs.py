"""Whose a run directory is, and what a run survives: other processes, other data, damaged and missing
files."""

import math
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, refused, script
from PIL import Image
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

import common
import train_ssl
import transfer
from data.images import knn_sample, open_images
from data.opening import Source
from data.tables import Table
from models import METHODS
from models.backbone import build_backbone, read_weights
from models.checkpoint import (
    KEPT,
    Parts,
    Progress,
    Saver,
    leave_blank_row,
    load_checkpoint,
    read_checkpoint,
)
from models.diagnostics import diagnose, effective_rank, feature_std
from models.optimisers import LARS, make_optimizer
from models.step import Learner
from models.weights import save_backbone


@pytest.fixture
def simclr(tiny):
    return ["--method", "simclr", *tiny]


def test_a_second_process_is_refused_with_host_and_process_of_the_first(simclr, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with common.hold(tmp_path / "run", "train_ssl.py"):
        error = script("train_ssl.py", *simclr)
    assert error.returncode == 2 and not (tmp_path / "run" / "config.yaml").exists()
    assert f"{socket.gethostname()}, process {os.getpid()}" in error.stderr
    with common.hold(tmp_path / "run", "train_ssl.py"):
        pass  # the lock went with its holder
    assert not (tmp_path / "run" / ".running").exists()


def test_a_lock_ends_with_a_killed_process(tmp_path):
    code = """
import common, pathlib, time
with common.hold(pathlib.Path("."), "it"):
    print("held", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(common.ConfigError, match=f"process {child.pid}"), common.hold(tmp_path, "it"):
        pass
    child.kill()
    child.wait()
    with common.hold(tmp_path, "it"):
        assert str(os.getpid()) in (tmp_path / ".running").read_text()


def test_the_lock_of_a_dead_process_that_its_child_still_has_is_waited_for(tmp_path):
    code = """
import common, os, pathlib, signal, time
with common.hold(pathlib.Path("."), "it"):
    if os.fork() == 0:
        print("held", flush=True)
        time.sleep(3)
        os._exit(0)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout.readline() == b"held\n"
    parent.wait()
    began = time.monotonic()
    with common.hold(tmp_path, "it"):
        assert time.monotonic() - began > 0.5, "the child had it for a while"


def test_no_file_takes_the_place_of_a_device_or_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "pipe")
    for path in tmp_path.iterdir():
        with pytest.raises(OSError, match="folder or a device"), common.replacing(path) as partial:
            partial.write_text("whole")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link.csv").is_symlink()
    assert len(list(tmp_path.iterdir())) == 3
    assert common.is_special(Path("/dev/stdout")) and not common.is_special(tmp_path / "new.csv")


def test_temporary_files_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    left = [tmp_path / f".checkpoint.pt.{host}.{dead.pid}", tmp_path / f".other[1].csv.{host}.{dead.pid}"]
    kept = [
        tmp_path / f".checkpoint.pt.{host}.{os.getppid()}",
        tmp_path / f".checkpoint.pt.elsewhere.{dead.pid}",
    ]
    old = tmp_path / f".checkpoint.pt.node.17.{dead.pid}"
    for file in (*left, *kept, old):
        file.write_text("half")
    for file in (old, kept[0]):  # the latter's process lives
        os.utime(file, (0, 0))
    with common.replacing(tmp_path / "other[1].csv") as partial:
        partial.write_text("whole")
    assert left[0].exists() and not left[1].exists(), "only what belongs to the file"
    with common.hold(tmp_path, "it"):
        assert not left[0].exists() and not old.exists() and all(file.exists() for file in kept)


def test_other_data_is_refused_and_says_so(folder, simclr, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    flags = [*simclr, "--data", data]
    train_ssl.main([str(f) for f in [*flags, "--stop-epoch", "1"]])
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    gone = sorted((data / "10_Café").iterdir())[0]
    gone.rename(tmp_path / "kept.jpg")
    assert "began with other data" in refused(capsys, train_ssl.main, *flags)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept
    (tmp_path / "kept.jpg").rename(gone)
    train_ssl.main([str(f) for f in flags])
    assert len(pd.read_csv(tmp_path / "run" / "log.csv")) == 2


def test_the_same_images_by_another_path_are_the_same_data(folder, simclr, tmp_path, capsys):
    """Of images and of lists; other lists of the same images are other data."""
    files = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*"))
    (tmp_path / "lists").mkdir()
    for name, part in (("train", files[:81]), ("val", files[81:85]), ("test", files[85:])):
        (tmp_path / "lists" / f"{name}.txt").write_text("\n".join(part), encoding="utf-8")
    began = ["--data", folder, "--splits", tmp_path / "lists", "--stop-epoch", "1"]
    train_ssl.main([str(word) for word in [*simclr, *began]])
    data, lists = tmp_path / "data", tmp_path / "moved"
    data.symlink_to(folder)
    (tmp_path / "lists").rename(lists)
    flags = [*simclr, "--data", data, "--splits", lists]
    train_ssl.main([str(word) for word in flags])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["data"], config["splits"]) == (str(data), str(lists)) and config["mean"]
    assert len(pd.read_csv(tmp_path / "run" / "log.csv")) == 2
    (lists / "val.txt").rename(lists / "kept.txt")
    (lists / "test.txt").rename(lists / "val.txt")
    (lists / "kept.txt").rename(lists / "test.txt")
    assert "began with other data" in refused(capsys, train_ssl.main, *flags)


def test_the_checkpoint_before_is_used_where_the_newest_is_damaged(simclr, tmp_path, capsys):
    train_ssl.main([*simclr, "--epochs", "3", "--knn-every", "1", "--out", str(tmp_path / "whole")])
    train_ssl.main([*simclr, "--epochs", "3", "--knn-every", "1", "--stop-epoch", "2"])
    newest = tmp_path / "run" / "checkpoint.pt"
    for damage in (b"", b"text", newest.read_bytes()[:1000]):
        newest.write_bytes(damage)
        capsys.readouterr()
        train_ssl.main([*simclr, "--epochs", "3", "--knn-every", "1", "--stop-epoch", "2"])
        assert "going back to checkpoint.prev.pt" in capsys.readouterr().out
    train_ssl.main([*simclr, "--epochs", "3", "--knn-every", "1"])
    a, b = (torch.load(tmp_path / d / "backbone.pth") for d in ("whole", "run"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_backbone_whose_checkpoints_are_gone_is_not_written_over_by_another_run(simclr, tmp_path, capsys):
    run = tmp_path / "run"
    train_ssl.main([*simclr, "--epochs", "1"])
    kept = (run / "backbone.pth").read_bytes()
    for file in run.glob("checkpoint*"):
        file.unlink()
    error = refused(capsys, train_ssl.main, *simclr, "--epochs", "1", "--seed", "7")
    assert "another run, without a checkpoint (seed was 0, is 7): choose another --out" in error
    assert (run / "backbone.pth").read_bytes() == kept
    train_ssl.main([*simclr, "--epochs", "1"])  # as a run that was killed before its first checkpoint
    (run / "checkpoint.pt").unlink()
    (run / "config.yaml").unlink()
    assert "without a checkpoint" in refused(capsys, train_ssl.main, *simclr, "--epochs", "1")


def test_a_checkpoint_that_lacks_a_part_is_damaged(tmp_path, capsys, monkeypatch):
    torch.save(dict.fromkeys(KEPT, {}), tmp_path / "checkpoint.prev.pt")
    for lacking in sorted(KEPT):
        torch.save(dict.fromkeys(KEPT - {lacking}, {}), tmp_path / "checkpoint.pt")
        assert read_checkpoint(tmp_path)[0].name == "checkpoint.prev.pt"
        assert "going back to checkpoint.prev.pt" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # what all ranks have to say, rank 0 says
    assert read_checkpoint(tmp_path)[0].name == "checkpoint.prev.pt" and not capsys.readouterr().out


def test_a_drive_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(common.fcntl, "flock", flock)

    def main(words):
        with common.hold(tmp_path / "run", "train_ssl.py"):
            pass

    error = refused(capsys, main)
    assert ".running: cannot be locked (No locks available)" in error


@pytest.mark.parametrize("damage", [Path.unlink, Path.touch, lambda file: file.write_text("a: [1")])
def test_files_that_others_read_are_written_again(damage, simclr, tmp_path):
    train_ssl.main([*simclr, "--stop-epoch", "1"])
    for name in ("config.yaml", "views.png"):
        (tmp_path / "run" / name).unlink()
    if damage is not Path.unlink:
        damage(tmp_path / "run" / "config.yaml")
    train_ssl.main(simclr)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["collapsed_below"] == {"feature_std": 0.02, "effective_rank": 2.0}
    assert config["images"] == 81
    assert Image.open(tmp_path / "run" / "views.png").size[0] > 0


def test_what_auto_chose_binds_no_later_start():
    method = torch.nn.Linear(2, 2)
    parts = Parts(
        method, torch.optim.SGD(method.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False)
    )
    state = {"config": {"loader": "torch", "lr": 0.1}, "digest": "d"}

    def load(config, chosen):
        content = state | {"model": method.state_dict(), "optimizer": parts.optimizer.state_dict()}
        content |= {"scaler": {}, "rng": torch.get_rng_state(), "progress": vars(Progress(epoch=3))}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("models.checkpoint.read_checkpoint", lambda out: (out / "checkpoint.pt", content))
            about = {"mean": [0], "std": [1]}
            return load_checkpoint(common.ROOT, parts, config, chosen, "d", about)[0].epoch

    assert load({"loader": "dali", "lr": 0.1}, {"loader"}) == 3
    assert load({"loader": "torch", "lr": 0.1, "compile": True, "graph": True}, set()) == 3
    with pytest.raises(common.ConfigError, match="turns was None, is 1"):
        load({"loader": "torch", "lr": 0.1, "turns": 1}, set())
    with pytest.raises(common.ConfigError, match="loader was torch, is dali"):
        load({"loader": "dali", "lr": 0.1}, set())
    with pytest.raises(common.ConfigError, match="lr was 0.1"):
        load({"loader": "dali", "lr": 0.2}, {"loader"})


def test_a_run_goes_on_in_another_precision_and_fused_as_its_device_is(monkeypatch):
    """The scaler is blank of bf16, and `fused` is of the machine."""
    method = torch.nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    content = {"config": {}, "digest": "d", "model": method.state_dict(), "rng": torch.get_rng_state()}
    content |= {"progress": vars(Progress(epoch=3)), "about": {"mean": [0], "std": [1]}}

    def load(saved: dict, fused: bool, others: bool | None) -> tuple[float, bool]:
        begun = torch.optim.AdamW(method.parameters(), 0.1, fused=others)
        whole = content | {"optimizer": begun.state_dict(), "scaler": saved}
        monkeypatch.setattr("models.checkpoint.read_checkpoint", lambda out: (out / "checkpoint.pt", whole))
        parts = Parts(method, torch.optim.AdamW(method.parameters(), 0.1, fused=fused), scaler)
        load_checkpoint(common.ROOT, parts, {}, set(), "d", content["about"])
        return scaler.get_scale(), parts.optimizer.param_groups[0]["fused"]

    assert load({}, fused=True, others=None) == (8.0, True)
    other = torch.amp.GradScaler("cpu", init_scale=16.0).state_dict()
    assert load(other, fused=False, others=True) == (16.0, False)


def test_statistics_that_are_not_finite_are_no_checkpoint_and_leave_one_blank_row(tmp_path, monkeypatch):
    norm = torch.nn.BatchNorm1d(2)
    norm.running_var[1] = float("inf")
    parts = Parts(norm, torch.optim.SGD(norm.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False))
    save = Saver(tmp_path, parts, {}, {}, "", "")
    for step, epoch in ((0, 1), (1, 2), (1, 2)):  # as long as nobody lowers the rate
        with pytest.raises(common.ConfigError, match=f"not finite in epoch {epoch}: .* no checkpoint yet"):
            save(Progress(epoch=1, step=step))
    assert (tmp_path / "log.csv").read_text() == "epoch,loss\n1,\n2,\n"
    monkeypatch.setattr("models.checkpoint.dist.is_initialized", lambda: True)
    monkeypatch.setattr("models.checkpoint.dist.get_rank", lambda: 1)
    leave_blank_row(tmp_path / "log.csv", 3)  # of a rank that does not lead
    assert (tmp_path / "log.csv").read_text().endswith("2,\n")


def train_on(place: Path, pictures: dict[str, tuple[int, int]], subset: float = 1) -> None:
    """An epoch on pictures: folder -> how many, and the least of their values, which range over 50."""
    rng = np.random.default_rng(0)
    for folder, (count, low) in pictures.items():
        (place / "data" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(low, low + 50, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "data" / folder / f"{i}.png")
    flags = ["--data", place / "data", "--size", "32", "--batch-size", "10", "--epochs", "1"]
    flags += ["--subset", subset, "--hidden", "8", "--out-dim", "8", "--device", "cpu"]
    flags += ["--out", place / "run", "--cache", place / "cache"]
    train_ssl.main([str(f) for f in ["--method", "simclr", *flags]])


def test_the_last_epoch_is_voted_on(tmp_path):
    train_on(tmp_path, {"train/A": (20, 100), "train/B": (20, 200), "val/A": (5, 100), "val/B": (5, 200)})
    assert pd.read_csv(tmp_path / "run" / "log.csv").knn_macro_f1.notna().all(), "one epoch of every five"


def test_unlabelled_training_images_leave_the_vote_blank(tmp_path, capsys):
    train_on(tmp_path, {"train": (20, 100), "val/Forest": (20, 0), "val/River": (20, 200)})
    assert "k-NN checks: off" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "run" / "log.csv").knn_macro_f1.isna().all()


def test_few_labelled_images_do_not_stand_for_all(tmp_path, capsys):
    """Mean and deviation are those of all training images, and one labelled image votes for nothing."""
    train_on(tmp_path, {"train": (30, 200), "train/A": (1, 0), "val/A": (20, 0), "val/B": (20, 0)})
    assert "off: 1 labelled training images among unlabelled ones are too few" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert min(config["mean"]) > 0.8
    assert pd.read_csv(tmp_path / "run" / "log.csv").feature_std.notna().all()


def test_a_share_of_the_images_may_leave_too_few_that_vote(tmp_path, capsys):
    train_on(tmp_path, {"train": (60, 0), "train/A": (40, 0), "val/A": (20, 0)}, subset=0.25)
    assert "off: 10 labelled training images among unlabelled ones are too few" in capsys.readouterr().out


def test_a_run_that_died_before_its_first_checkpoint_leaves_no_record(simclr, tmp_path, capsys, monkeypatch):
    """The refusal says to lower --lr in the same directory: config.yaml is then that of the second run."""
    forward = METHODS["simclr"].forward
    with monkeypatch.context() as broken:
        broken.setattr(METHODS["simclr"], "forward", lambda self, a, b: forward(self, a, b) * float("nan"))
        error = refused(capsys, train_ssl.main, *simclr, "--lr", "0.5")
    assert "not finite" in error and (tmp_path / "run" / "config.yaml").exists()
    (tmp_path / "run" / "views.png").write_bytes(b"old")
    train_ssl.main([*simclr, "--lr", "0.001"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lr"] == 0.001
    assert (tmp_path / "run" / "views.png").read_bytes() != b"old"


def test_parts_of_a_step_move_the_key_encoder_as_one_and_count_their_own_chance(tiny, tmp_path):
    args = train_ssl.read_flags(
        train_ssl.build_parser(), ["--method", "moco", "--accumulate", "4", "--key-momentum", "0.9"]
    )
    assert train_ssl.build_method(args).key_momentum ** 4 == pytest.approx(0.9)
    flags = ["--method", "simclr", *tiny, "--accumulate", "3", "--epochs", "1"]
    train_ssl.main(flags)
    chance = pd.read_csv(tmp_path / "run" / "log.csv").chance_loss.item()
    assert chance == pytest.approx(np.log(2 * 9 - 1))


def test_a_run_does_not_go_on_with_the_statistics_of_other_weights(simclr, tmp_path, capsys):
    train_ssl.main([*simclr, "--stop-epoch", "1"])
    shutil.copy(tmp_path / "run" / "backbone.pth", tmp_path / "start.pth")
    second = [*simclr, "--init", str(tmp_path / "start.pth"), "--out", str(tmp_path / "second")]
    train_ssl.main([*second, "--stop-epoch", "1"])
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 32, "maxpool": True}
    save_backbone(build_backbone(), tmp_path / "start.pth", about)
    assert "began with another mean" in refused(capsys, train_ssl.main, *second)


def test_sizes_that_grow_resume_and_are_written_as_text(simclr, tmp_path):
    sized = [*simclr, "--size", "24:32", "--epochs", "5"]
    train_ssl.main([*sized, "--out", str(tmp_path / "whole")])
    train_ssl.main([*sized, "--stop-epoch", "3"])
    train_ssl.main([*sized, "--stop-epoch", "4"])
    train_ssl.main(["--config", str(tmp_path / "run" / "config.yaml"), "--stop-epoch", "5"])
    a, b = (torch.load(tmp_path / d / "backbone.pth") for d in ("whole", "run"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert read_weights(tmp_path / "run" / "backbone.pth")[1]["size"] == 32
    assert [train_ssl.size_at("24:32", epoch, 5) for epoch in range(5)] == [24, 24, 24, 24, 32]
    assert [train_ssl.size_at("24:32", epoch, 3) for epoch in range(3)] == [24, 24, 32]


def test_a_run_among_the_images_is_refused(tmp_path, monkeypatch, capsys):
    """Its pictures would be images, and its folder a class, at the next start."""
    (tmp_path / "data" / "A").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data")
    for flags in (["--data", "."], ["--data", tmp_path / "data", "--out", tmp_path / "data" / "A" / "run"]):
        assert "lies inside the data" in refused(capsys, train_ssl.main, *flags)
    assert [place.name for place in tmp_path.rglob("*")] == ["data", "A"]


@pytest.mark.parametrize(
    "text, size", [("size: 32:48", "32:48"), ("size: '32:64'", "32:64"), ("size: 64", 64)]
)
def test_yaml_minutes_and_seconds_are_sizes_here(text, size, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    parser = train_ssl.build_parser()
    assert common.parse(parser, ["--config", str(tmp_path / "c.yaml")]).size == size


def test_the_statistics_of_pretraining_travel_with_the_backbone(simclr, tmp_path):
    train_ssl.main([*simclr, "--no-maxpool", "--stop-epoch", "1"])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    about = read_weights(tmp_path / "run" / "backbone.pth")[1]
    assert about == {"mean": config["mean"], "std": config["std"], "size": 32, "maxpool": False}
    assert read_weights(tmp_path / "run" / "checkpoint.pt")[1] == about
    backbone = build_backbone(init=str(tmp_path / "run" / "backbone.pth"))
    assert isinstance(backbone.maxpool, torch.nn.Identity)
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 512)


def test_a_file_limit_is_one_line_and_keeps_the_last_checkpoint(simclr, tmp_path):
    train_ssl.main([*simclr, "--stop-epoch", "1"])
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    command = [sys.executable, "train_ssl.py", *simclr]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=small, timeout=240)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert "run/" in done.stderr and (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept
    assert not list((tmp_path / "run").glob(".*.*.*")), "no half file stays"


def test_a_network_too_large_for_memory_is_one_line(simclr, capsys):
    error = refused(capsys, train_ssl.main, *simclr, "--hidden", "65536", "--out-dim", "65536")
    assert "memory" in error


def test_an_overflow_skips_the_step_and_nothing_else():
    """fp16: after a step with infinite gradients, weights and momentum are those of a run without that
    step."""

    def train(overflows):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = make_optimizer("sgd", model, 0.1, 0.9, 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
        learn = Learner(lambda a, b: (model(a) * b).sum(), optimizer, scaler, torch.float32)
        for x, times in [(1.0, 1.0), *([(1.0, float("inf"))] if overflows else []), (2.0, 1.0), (3.0, 1.0)]:
            learn((torch.full((2, 4), x), torch.full((2, 1), times)))
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True)))


def test_parts_of_a_step_add_up_to_the_gradient_of_their_mean():
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    weights = []
    for parts in (1, 4):
        torch.manual_seed(1)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        loss = Learner(
            lambda a, b, m=model: (m(a) - m(b)).square().mean(), optimizer, scaler, torch.float32, parts
        )((x, y))
        weights.append((loss, model.weight.detach().clone()))
    assert torch.allclose(weights[0][0], weights[1][0]) and torch.allclose(
        weights[0][1], weights[1][1], atol=1e-6
    )


def test_lars_of_all_weights_at_once_is_lars_of_one_at_a_time():
    torch.manual_seed(0)
    shapes = [(3, 4), (4,), (2, 3, 3, 3)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected, buffers = [p.detach().clone() for p in params], [torch.zeros(shape) for shape in shapes]
    optimizer = LARS(params, lr=0.3, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.1 * (step + 1)) * (i + 1)
            update = p.grad + 0.01 * expected[i]
            if p.ndim > 1:
                update = update * 0.001 * expected[i].norm() / update.norm()
            buffers[i] = 0.9 * buffers[i] + update
            expected[i] = expected[i] - 0.3 * buffers[i]
        optimizer.step()
    assert all(torch.allclose(p, e, atol=1e-6) for p, e in zip(params, expected))


def test_features_that_are_not_finite_are_not_judged():
    features = torch.randn(20, 8)
    features[3, 2] = float("inf")
    row = diagnose(features, np.zeros(20, int), 10, True)
    assert row == dict.fromkeys(["feature_std", "effective_rank", "knn_macro_f1", "knn5_accuracy"])


def test_the_health_of_features_is_that_of_the_training_images():
    features = torch.cat([torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.ones(30, 4)])
    row = diagnose(features, np.zeros(42, int), 12, False)
    assert row["feature_std"] == feature_std(features[:12])
    assert row["effective_rank"] == effective_rank(features[:12]) and row["knn5_accuracy"] is None


@pytest.fixture
def four_classes():
    """features (300, 6) and labels, of which 200 vote, and the votes of scikit-learn's classifier for 100."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    features = torch.from_numpy(rng.normal(size=(300, 6)) + np.eye(6)[labels]).float()
    votes = {
        k: KNeighborsClassifier(k, metric="cosine").fit(features[:200], labels[:200]).predict(features[200:])
        for k in (5, 20)
    }
    return features, labels, votes


def test_nearest_neighbours_vote_as_scikit_learns_classifier(four_classes):
    features, labels, votes = four_classes
    row = diagnose(features, labels, 200, True)
    assert row["knn_macro_f1"] == f1_score(labels[200:], votes[20], average="macro")
    assert row["knn5_accuracy"] == (votes[5] == labels[200:]).mean()


def test_a_class_that_a_sample_lacks_has_no_part_in_the_f1_of_votes(four_classes):
    """In log.csv and in transfer.py's results alike, although some vote for it."""
    features, labels, votes = four_classes
    held = labels[200:] != 3
    rows = np.concatenate([np.arange(200), 200 + np.flatnonzero(held)])
    truth, answers = labels[200:][held], votes[20][held]
    assert (answers == 3).any()
    expected = f1_score(truth, answers, labels=[0, 1, 2], average="macro")
    assert diagnose(features[rows], labels[rows], 200, True)["knn_macro_f1"] == expected
    targets = torch.eye(4)[labels]
    frozen = transfer.Frozen(None, features, targets, None, {})
    data = transfer.Data("d", None, targets, list("abcd"), {"test": rows[200:]}, {}, [], [], "")
    assert transfer.neighbours(frozen, np.arange(200), data, "test")["knn_f1_macro", "all"] == expected


def test_epoch_lines_reach_a_file_when_they_are_made(simclr, tmp_path):
    log = tmp_path / "log.txt"
    with open(log, "w") as stream:
        command = [sys.executable, "train_ssl.py", *simclr, "--epochs", "300"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.DEVNULL)
        end = time.time() + 120
        while "epoch 1/300" not in log.read_text() and time.time() < end:
            time.sleep(0.2)
        rows = pd.read_csv(tmp_path / "run" / "log.csv") if (tmp_path / "run" / "log.csv").exists() else []
        process.kill()
        process.wait()
    assert 1 <= len(rows) <= 3, "the line was there long before the run's end"


def test_the_health_of_features_by_hand():
    """Neither number depends on the features' scale, nor the rank on their mean."""
    everywhere = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert feature_std(everywhere) == feature_std(8 * everywhere) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(9, 16)) == pytest.approx(0, abs=1e-6)
    plus = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    features = torch.cat([plus, -plus]) + 5  # singular values in the ratio of 3 to 1
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    for some in (features, features.repeat(4, 1), torch.nn.functional.pad(features, (0, 9))):
        assert effective_rank(some) == pytest.approx(expected, rel=1e-3)
    assert effective_rank(everywhere) == pytest.approx(16, rel=0.01)


def test_votes_are_of_images_from_all_over_the_training_set_on_val(monkeypatch):
    """Files are in the order of their classes."""
    monkeypatch.setattr("data.images.BANK", 20)
    labels, split = np.repeat([0, 1], 50), np.tile(["train", "train", "val", "test"], 25)
    table = Table(ROOT, np.arange(100).astype(str), labels, split, ["a", "b"])
    bank, queries = knn_sample(table, np.flatnonzero(split == "train"))
    assert set(split[queries]) == {"val"} and len(queries) == 25
    assert set(split[bank]) == {"train"} and len(set(bank)) == 20 and set(labels[bank]) == {0, 1}


def test_the_seed_draws_the_subset(folder, tmp_path):
    words = ["--method", "simclr", "--data", str(folder), "--cache", str(tmp_path)]
    source = Source.of(train_ssl.read_flags(train_ssl.build_parser(), words), "pure")
    drawn = [open_images(source, 0.5, seed, 8, tmp_path / "bad.csv").train.tolist() for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_batch_may_hold_all_images_and_no_more(folder, tmp_path):
    words = ["--method", "simclr", "--data", str(folder), "--cache", str(tmp_path)]
    source = Source.of(train_ssl.read_flags(train_ssl.build_parser(), words), "pure")
    images = open_images(source, 1.0, 0, 81, tmp_path / "bad.csv")
    assert images.nbytes() == 81 * 3 * 32 * 32 and (images.bank, images.held_out()) == (81, 0)
    with pytest.raises(common.DataError, match="81 images to train on are fewer than one batch of 82"):
        open_images(source, 1.0, 0, 82, tmp_path / "bad.csv")


def test_a_run_does_not_go_on_with_another_deviation_either(monkeypatch):
    began = {"config": {}, "digest": "d", "about": {"mean": [0], "std": [1]}}
    monkeypatch.setattr("models.checkpoint.read_checkpoint", lambda out: (out / "checkpoint.pt", began))
    with pytest.raises(common.ConfigError, match=r"began with another std \(\[1\], now \[2\]\)"):
        load_checkpoint(common.ROOT, None, {}, set(), "d", {"mean": [0], "std": [2]})

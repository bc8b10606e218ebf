"""Killed with SIGKILL at any moment and started again, a run ends with the same weights, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_train import wait_for

import train_ssl
from models import METHODS
from models.backbone import build_backbone

CASES = [*((method, "torch") for method in METHODS), ("moco", "dali"), ("barlow", "dali")]


@pytest.mark.parametrize("method, loader", CASES)
def test_killed_at_a_random_moment(method, loader, tiny, tmp_path):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    flags = ["--method", method, "--loader", loader, *tiny, "--batch-size", "16"]
    train_ssl.main([*flags, "--out", str(tmp_path / "whole")])
    seed = random.randrange(10**6)
    print("kill seed", seed)  # shown when the test fails
    process = subprocess.Popen(
        [sys.executable, "train_ssl.py", *flags, "--save-minutes", "1e-9"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    time.sleep(random.Random(seed).uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    train_ssl.main(flags)
    whole, killed = (torch.load(tmp_path / d / "checkpoint.pt", weights_only=True) for d in ("whole", "run"))
    assert_equal(whole["model"], killed["model"])
    assert_equal(whole["optimizer"], killed["optimizer"])
    assert_equal(*(torch.load(tmp_path / d / "backbone.pth") for d in ("whole", "run")))
    logs = [pd.read_csv(tmp_path / d / "log.csv") for d in ("whole", "run")]
    assert logs[0][["epoch", "loss", "lr", "feature_std", "effective_rank"]].equals(
        logs[1][["epoch", "loss", "lr", "feature_std", "effective_rank"]]
    )


@pytest.mark.parametrize("last_words", ["diagnose", "describe", "draw_curve"])
def test_dies_after_the_last_step_of_an_epoch(last_words, tiny, tmp_path, monkeypatch):
    """With a checkpoint of the last step, before the log; with the log, before the checkpoint; with both,
    before the curve."""
    flags = ["--method", "simclr", *tiny]
    train_ssl.main([*flags, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_ssl, last_words, lambda *_: 1 / 0)
        train_ssl.main([*flags, "--save-minutes", "1e-9"])
    train_ssl.main(flags)
    assert_equal(*(torch.load(tmp_path / d / "backbone.pth") for d in ("whole", "run")))
    logs = [pd.read_csv(tmp_path / d / "log.csv") for d in ("whole", "run")]
    assert (
        logs[0]
        .drop(columns=["images_per_s", "data_wait", "seconds"])
        .equals(logs[1].drop(columns=["images_per_s", "data_wait", "seconds"]))
    )
    assert (tmp_path / "run" / "curve.png").exists()


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_stop_epoch_then_on(tiny, tmp_path):
    train_ssl.main(["--method", "moco", *tiny, "--out", str(tmp_path / "whole")])
    train_ssl.main(["--method", "moco", *tiny, "--stop-epoch", "1"])
    assert len(pd.read_csv(tmp_path / "run" / "log.csv")) == 1
    train_ssl.main(["--method", "moco", *tiny])
    whole = torch.load(tmp_path / "whole" / "backbone.pth")
    assert_equal(whole, torch.load(tmp_path / "run" / "backbone.pth"))
    log = (tmp_path / "run" / "log.csv").read_bytes()
    for name in ("backbone.pth", "log.csv", "curve.png"):
        (tmp_path / "run" / name).unlink()
    train_ssl.main(["--method", "moco", *tiny])  # is complete, and writes what is gone
    assert_equal(whole, torch.load(tmp_path / "run" / "backbone.pth"))
    assert (tmp_path / "run" / "log.csv").read_bytes() == log and (tmp_path / "run" / "curve.png").exists()
    assert_equal(whole, build_backbone(init=tmp_path / "run" / "checkpoint.pt").state_dict())

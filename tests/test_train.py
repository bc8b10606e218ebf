"""Pretraining from the command line: what it leaves, that it learns, and that it says no in one line."""

import contextlib
import copy
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
import yaml
from conftest import ROOT, Reads, refused, script
from PIL import Image

import common
import train_ssl
from common import WeightsError
from data import loader, pixels
from data.augment import Recipe
from data.images import Images
from data.loader import Plan
from models import METHODS
from models.backbone import (
    build_backbone,
    compile_backbones,
    extract_features,
    prepare,
    refuse_without_compiler,
    ripe_statistics,
)
from models.optimisers import LARS, OPTIMISERS, can_fuse, learning_rate, make_optimizer, set_rate
from models.step import CHECK_STEPS, DTYPES, Learner, Losses, StopFlag
from models.weights import read_weights

CHECKED = "feature_std,effective_rank,knn_macro_f1,knn5_accuracy"
COLUMNS = f"epoch,loss,chance_loss,lr,{CHECKED},images_per_s,data_wait,seconds"


@pytest.mark.parametrize("name", METHODS)
def test_a_run_leaves_what_the_design_says(name, tiny, tmp_path, capsys):
    train_ssl.main(["--method", name, *tiny])
    out = tmp_path / "run"
    assert {f.name for f in out.iterdir()} == {
        "config.yaml",
        "log.csv",
        "checkpoint.pt",
        "checkpoint.prev.pt",
        "backbone.pth",
        "views.png",
        "curve.png",
    }
    assert (out / "log.csv").read_text().splitlines()[0] == COLUMNS
    log = pd.read_csv(out / "log.csv")
    assert log.epoch.tolist() == [1, 2] and (log.loss != log.chance_loss).all() and (log.lr > 0).all()
    missing = torchvision.models.resnet18().load_state_dict(torch.load(out / "backbone.pth"), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["method"] == name and config["hidden"] == 32
    assert config["precision"] in ("bf16", "fp32")
    assert config["versions"]["torch"] == torch.__version__.split("+")[0] and "device_name" in config
    assert Image.open(out / "views.png").size[0] > 8 * 32
    assert "hidden: 32" in capsys.readouterr().out, "the resolved configuration is printed"


def test_a_compiled_backbone_has_one_program_a_size_and_none_for_the_checks(tiny, tmp_path, monkeypatch):
    programs = []

    def keep(graph, inputs):
        assert not any(isinstance(x, torch.SymInt) for x in inputs), "shapes are numbers, not symbols"
        shapes = [tuple(x.shape) for x in inputs if x.ndim == 4]  # of kernels, too
        programs.extend((n, side) for n, channels, side, _ in shapes if channels == 3 and side >= 24)
        return graph

    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend=keep, **how))
    torch._dynamo.reset()
    command = ["--method", "moco", *tiny, "--size", "24:32", "--compile", "--epochs", "5", "--knn-every", "1"]
    train_ssl.main([*command, "--stop-epoch", "4"])
    train_ssl.main(command)  # as another process would, with modules of its own
    groups = (7, 6, 27)  # MoCo's keys in four groups, its queries in one
    assert programs == [(n, side) for side in (24, 32) for n in groups]
    plain = torchvision.models.resnet18().state_dict()
    saved = torch.load(tmp_path / "run" / "backbone.pth")
    assert {key: value.shape for key, value in saved.items()} == {
        key: value.shape for key, value in plain.items() if not key.startswith("fc.")
    }


def test_compiled_the_pool_keeps_its_backward_kernel():
    from torch._inductor.decomposition import select_decomp_table

    method = METHODS["moco"](build_backbone(), hidden=16, out=8)
    compile_backbones(method)
    assert method.backbone._compiled_call_impl and method.key_backbone._compiled_call_impl
    assert torch.ops.aten.max_pool2d_with_indices_backward.default not in select_decomp_table()


def test_compilers_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/gcc")  # of a GPU alone
    refuse_without_compiler(cuda=False)
    monkeypatch.setenv("CXX", "/nowhere/g++ -O2")
    with pytest.raises(common.ConfigError, match="--compile: there is no /nowhere/g..: install one"):
        compile_backbones(METHODS["moco"](build_backbone(), hidden=16, out=8))
    with pytest.raises(common.ConfigError, match="there is no /nowhere/gcc"):
        refuse_without_compiler(cuda=True)


def test_a_step_of_one_image_a_rank_is_refused_of_moco_alone(tmp_path):
    """The norms of two ranks are one, but for those of MoCo's key encoder."""
    images = types.SimpleNamespace(train=range(81), height=32, width=32)

    def largest(method, ranks):
        words = ["--method", method, "--out", str(tmp_path), "--batch-size", "3"]
        args = train_ssl.read_flags(train_ssl.build_parser(), words)
        return train_ssl.make_plan(args, images, 0, ranks).largest()

    assert (largest("simsiam", 2), largest("moco", 1)) == (1, 3)
    with pytest.raises(common.ConfigError, match="BatchNorm cannot train on one image"):
        largest("moco", 2)


def test_a_backbone_of_other_bands():
    assert build_backbone(in_channels=4)(torch.randn(2, 4, 64, 64)).shape == (2, 512)


def test_images_are_resized_with_antialiasing_and_normalised():
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16)
    expected = (images / 255 - 0.5) / 0.25
    assert torch.allclose(prepare(images, 16, [0.5] * 3, [0.25] * 3), expected, atol=1e-6)
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., 3::8] = stripes[..., 4::8] = 255  # where a resize without it would look
    assert prepare(stripes, 8, [0] * 3, [1] * 3).mean() == pytest.approx(0.25, abs=0.05)


def test_features_depend_on_no_other_image_and_leave_the_backbone_as_it_was():
    torch.manual_seed(0)
    backbone = build_backbone().train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images, heard = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), []
    about = {"size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    features = extract_features(backbone, images, **about, advance=heard.append)
    some = extract_features(backbone, images, **about, rows=[3, 1])
    assert torch.allclose(some, features[[3, 1]], atol=1e-4) and heard == [5]
    assert backbone.training and all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_stem_gives_torchvision_s_bits(arch):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)()
    theirs.fc = torch.nn.Identity()
    ours = build_backbone(arch)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(8, 3, 64, 64)
    outputs = []
    for model in (theirs, ours):
        outputs.append(model(images))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for (name, weight), mine in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(weight.grad, mine.grad), name


def test_it_learns(tiny, tmp_path):
    """Every image has its own colours: a few epochs tell the pictures apart better than chance."""
    flags = dict(zip(tiny[::2], tiny[1::2])) | {
        "--epochs": "20",
        "--out": str(tmp_path / "learns"),
        "--precision": "fp32",
    }
    train_ssl.main(
        [
            "--method",
            "simclr",
            "--optimizer",
            "adamw",
            "--lr",
            "2e-3",
            "--jitter",
            "0.1",
            "--blur",
            "0",
            "--min-area",
            "0.6",
            *(x for pair in flags.items() for x in pair),
        ]
    )
    log = pd.read_csv(tmp_path / "learns" / "log.csv")
    assert log.loss.iloc[-1] < 0.9 * log.chance_loss.iloc[-1]
    assert log.effective_rank.iloc[-1] > 2 and log.feature_std.iloc[-1] > 0.05


def test_warmup_then_cosine_never_zero():
    rates = [learning_rate(s, 100, 10, 0.5) for s in range(100)]
    assert (
        rates[:10] == pytest.approx([0.05 * (k + 1) for k in range(10)])
        and max(rates) == rates[9] == rates[10] == 0.5
    )
    assert (
        rates[55] == pytest.approx(0.25)
        and all(a >= b for a, b in zip(rates[9:], rates[10:]))
        and min(rates) > 0
    )
    assert min(learning_rate(s, 5, 10, 0.5) for s in range(5)) > 0, "a run shorter than its warm-up"


def test_lars_scales_each_weight_and_leaves_biases():
    weight, bias = (torch.nn.Parameter(torch.full(shape, 2.0)) for shape in ((3, 4), (4,)))
    optimizer = LARS([weight, bias], lr=0.5, momentum=0.0, weight_decay=0.1, trust=0.01)
    for p in (weight, bias):
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    update = torch.full((3, 4), 3.0 + 0.1 * 2.0)
    expected = 2.0 - 0.5 * 0.01 * torch.full((3, 4), 2.0).norm() / update.norm() * update
    assert torch.allclose(weight, expected) and torch.allclose(
        bias, torch.full((4,), 2.0 - 0.5 * (3.0 + 0.1 * 2.0))
    )


def test_lars_moves_a_weight_of_zeros_and_none_that_has_no_gradient():
    zero, still, unused = (torch.nn.Parameter(torch.full((2, 2), value)) for value in (0.0, 1.0, 1.0))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still, unused], lr=0.5).step()
    assert (zero == -0.5).all() and (still == 1).all() and (unused == 1).all()


def test_predictor_keeps_its_rate_and_norms_do_not_decay():
    model = METHODS["simsiam"](build_backbone(), hidden=8, out=8)
    groups = make_optimizer("sgd", model, 0.1, 0.9, 1e-2).param_groups
    predictor = {id(p) for p in model.predictor.parameters()}
    for group in groups:
        assert all((id(p) in predictor) == (group["constant"] > 0) for p in group["params"])
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_predictor_rate_is_a_multiple_of_the_peak_and_stays_there():
    model = METHODS["simsiam"](build_backbone(), hidden=8, out=8, predictor_rate=30.0)
    optimizer = make_optimizer("sgd", model, 0.1, 0.9, 1e-2)
    set_rate(optimizer, 0.01, 0.1)
    predictor = {id(p) for p in model.predictor.parameters()}
    for group in optimizer.param_groups:
        expected = 3.0 if id(group["params"][0]) in predictor else 0.01
        assert group["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_momentum_is_the_first_beta_of_adam(name):
    for group in make_optimizer(name, torch.nn.Linear(2, 2), 0.1, 0.8, 0.1).param_groups:
        assert group["betas"] == (0.8, 0.999) if "betas" in group else group["momentum"] == 0.8


@pytest.mark.parametrize("name", OPTIMISERS)
def test_fused_steps_are_the_others_and_go_on_from_their_state(name):
    torch.manual_seed(0)
    first = torch.nn.Linear(5, 3)
    models = [copy.deepcopy(first) for _ in range(2)]
    optimizers = [make_optimizer(name, m, 0.1, 0.9, 0.1, fused) for m, fused in zip(models, (False, True))]
    for step in range(4):
        images = torch.randn(7, 5)
        for model, optimizer in zip(models, optimizers):
            set_rate(optimizer, 0.1 / (step + 1), 0.1)
            model(images).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:  # as on another machine
            plain, fused = (copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers)
            optimizers[0].load_state_dict(fused)
            optimizers[1].load_state_dict(plain)
    for mine, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.allclose(mine, other, atol=1e-6)
    assert not torch.equal(models[0].weight, first.weight)


def test_steps_are_fused_on_a_gpu_alone_and_not_in_fp16():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [can_fuse(gpu, precision) for precision in ("bf16", "fp32", "fp16")] == [True, True, False]
    assert not can_fuse(cpu, "fp32") and not can_fuse(cpu, "bf16")


@pytest.mark.parametrize("name, optimizer", zip(METHODS, itertools.cycle(OPTIMISERS)))
def test_a_step_waits_for_no_device(name, optimizer, tmp_path):
    settings = {"queue_size": 16} if name == "moco" else {}
    method = METHODS[name](build_backbone(), hidden=8, out=8, **settings)
    fused = make_optimizer(optimizer, method, 0.1, 0.9, 1e-4, fused=True)
    learn = Learner(method, fused, torch.amp.GradScaler("cpu", enabled=False), torch.bfloat16)
    losses = Losses(0.0, torch.device("cpu"), 0, tmp_path)
    views = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    with Reads() as reads:
        for step in range(2):
            set_rate(fused, 0.1 / (step + 1), 0.1)
            losses.add(learn(views), step)
    assert reads.count == 0 and losses.total() != 0


@pytest.mark.parametrize("precision", DTYPES)
def test_a_step_computes_in_its_precision(precision):
    layer, seen = torch.nn.Linear(4, 1), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    optimizer, scaler = torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False)
    learn = Learner(lambda a, b: layer(a).float().mean(), optimizer, scaler, DTYPES[precision])
    assert not learn((torch.ones(2, 4), torch.ones(2, 4))).requires_grad, "it would keep every step's graph"
    assert seen == [{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]]


def test_the_first_loss_that_is_not_finite_is_named_at_the_second_look_and_none_is_rounded(tmp_path):
    """At a look the host reads a copy that was asked for at the one before."""
    losses = Losses(2.0**30, torch.device("cpu"), epoch=0, out=tmp_path)
    losses.add(torch.tensor(1.0), 0)
    assert losses.total() == 2**30 + 1
    for step in range(1, 2 * CHECK_STEPS - 1):
        losses.add(torch.tensor(float("nan") if step > 2 else 1.0), step)
    with pytest.raises(common.ConfigError, match="epoch 1, step 4: lower --lr"):
        losses.add(torch.tensor(1.0), 2 * CHECK_STEPS - 1)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    train_ssl.main(["--method", "simclr", *tiny, "--stop-epoch", "1"])
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    forward = METHODS["simclr"].forward
    monkeypatch.setattr(METHODS["simclr"], "forward", lambda self, a, b: forward(self, a, b) * float("nan"))
    error = refused(capsys, train_ssl.main, "--method", "simclr", *tiny)
    assert (
        "not finite at epoch 2, step 1" in error and (tmp_path / "run" / "checkpoint.pt").read_bytes() == good
    )
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[-1].startswith("2,,")  # for tune.py


def test_weights_that_are_not_finite_are_no_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    """The last step of an epoch may leave such weights by a loss that is finite."""
    train_ssl.main(["--method", "simclr", *tiny, "--stop-epoch", "1"])
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("checkpoint.pt", "backbone.pth")}
    update = Learner.update

    def diverge(learner):
        update(learner)
        with torch.no_grad():
            learner.model.backbone.conv1.weight[0, 0, 0, 0] = float("inf")

    with (tmp_path / "run" / "log.csv").open("a") as log:
        log.write("3,0.5,,,,,,,,,\n")  # of a later epoch, whose checkpoints are gone
    monkeypatch.setattr(train_ssl.Plan, "steps", lambda self: 1)
    monkeypatch.setattr(Learner, "update", diverge)
    error = refused(capsys, train_ssl.main, "--method", "simclr", *tiny)
    assert "the weights are not finite in epoch 2: lower --lr" in error and "last good checkpoint" in error
    assert {name: (tmp_path / "run" / name).read_bytes() for name in kept} == kept
    epochs = [line.split(",")[:2] for line in (tmp_path / "run" / "log.csv").read_text().splitlines()[2:]]
    assert epochs == [["2", ""]]


def test_a_training_in_fp16_is_looked_at_in_fp32():
    """Young statistics let features grow beyond what fp16 holds."""
    backbone = build_backbone()
    torch.nn.init.constant_(backbone.bn1.weight, 1e6)
    labels = np.zeros(8, int)
    table = types.SimpleNamespace(labels=labels)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    looked_at = types.SimpleNamespace(
        pixels=pixels, bank=8, mean=[0.5] * 3, std=[0.2] * 3, table=table, sample=np.arange(8)
    )
    flags = types.SimpleNamespace(size=32, compile=False)
    row = train_ssl.check_features(backbone, looked_at, flags, torch.float16, knn=False)
    assert row["feature_std"] is not None and row["effective_rank"] > 1


@pytest.mark.parametrize(
    "crowd, gpu, threads, hint",
    [
        ("9 threads compete for 2 cores", False, 2, "9 threads compete for 2 cores: OMP_NUM_THREADS=1"),
        ("9 threads compete for 2 cores", False, 1, ""),
        ("9 threads compete for 2 cores", True, 2, ""),
        ("", False, 2, ""),
    ],
)
def test_a_crowded_cpu_gets_a_hint(crowd, gpu, threads, hint, monkeypatch):
    monkeypatch.setattr(common, "crowded", lambda: crowd)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    said = train_ssl.hint_of_load()
    assert hint in said and bool(said) == bool(hint)


def test_collapse_is_announced():
    row = {
        "epoch": 1,
        "loss": -1,
        "chance_loss": 0,
        "feature_std": 0.001,
        "effective_rank": 30,
        "knn_macro_f1": None,
        "knn5_accuracy": None,
        "images_per_s": 1,
        "data_wait": 0,
    }
    assert "warning: the features have collapsed" in train_ssl.describe(row, 2, torch.device("cpu"))
    assert "warning" not in train_ssl.describe(row | {"feature_std": 0.4}, 2, torch.device("cpu"))
    assert "waiting" not in train_ssl.describe(row, 2, torch.device("cuda"))


def test_each_image_of_a_small_set_is_decoded_once(tiny, monkeypatch):
    decoded, decode = [], pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda file, *size: (decoded.append(file), decode(file, *size))[1])
    train_ssl.main([*tiny, "--epochs", "1"])
    assert len(decoded) > 50 and len(decoded) == len(set(decoded))


def test_the_seconds_of_a_log_cover_its_files(tiny, tmp_path, monkeypatch):
    """All but those of the last epoch, whose row stands in them."""
    clock, late = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000 * len(late))
    monkeypatch.setattr(train_ssl, "save_backbone", lambda *about: late.append("by 1,000 seconds"))
    train_ssl.main([*tiny, "--knn-every", "1"])
    first, second = pd.read_csv(tmp_path / "run" / "log.csv").seconds
    assert first < 1000 < second


def test_finished_and_other_configurations(tiny, tmp_path, capsys):
    train_ssl.main(["--method", "simclr", *tiny])
    kept = (tmp_path / "run" / "backbone.pth").read_bytes()
    train_ssl.main(["--method", "simclr", *tiny, "--workers", "2"])
    assert (
        "is complete" in capsys.readouterr().out and (tmp_path / "run" / "backbone.pth").read_bytes() == kept
    )
    error = refused(capsys, train_ssl.main, "--method", "simclr", *tiny, "--lr", "0.123")
    assert "lr was 0.1" in error or "lr was" in error and "is 0.123" in error
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (tmp_path / "run" / name).write_bytes(b"damaged" * 100)
    assert "damaged" in refused(capsys, train_ssl.main, "--method", "simclr", *tiny)


def test_young_statistics_are_weighted_means_of_the_batches():
    """After a few steps most of them is still the start; the weights decay by .9 a step, and add up to 1."""
    torch.manual_seed(0)
    backbone = build_backbone()
    norm, seen = backbone.bn1, []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    for _ in range(3):
        backbone(torch.randn(8, 3, 32, 32) + 1)
    weights = 0.9 ** torch.arange(2, -1, -1.0)
    weights /= weights.sum()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with ripe_statistics(backbone):
        means, variances = (torch.stack([f(x, dim=(0, 2, 3)) for x in seen]) for f in (torch.mean, torch.var))
        assert torch.allclose(norm.running_mean, weights @ means, atol=1e-5)
        assert torch.allclose(norm.running_var, weights @ variances, rtol=1e-4)
        assert not torch.allclose(norm.running_var, before["bn1.running_var"], rtol=0.1)
    with contextlib.suppress(KeyboardInterrupt), ripe_statistics(backbone):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    norm.num_batches_tracked.fill_(10_000)  # the first one's counts for all
    with ripe_statistics(backbone):
        assert torch.equal(norm.running_var, before["bn1.running_var"])  # of a long run: as they are
    backbone.pretraining = {}  # it began with those of its file
    with ripe_statistics(backbone):
        assert torch.equal(backbone.layer1[0].bn1.running_var, before["layer1.0.bn1.running_var"])


def test_features_after_four_steps_have_not_collapsed(tmp_path, capsys):
    flags = "--method simclr --scenes 200 --size 32 --batch-size 64 --epochs 2 --hidden 32 --out-dim 16"
    train_ssl.main([*flags.split(), "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")])
    assert "collapsed: every" not in capsys.readouterr().err
    assert pd.read_csv(tmp_path / "run" / "log.csv").feature_std.min() > 0.1


def test_config_of_a_run_reproduces_it(tiny, tmp_path):
    train_ssl.main(["--method", "moco", *tiny, "--queue-size", "54"])
    train_ssl.main(["--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")])
    a, b = (torch.load(tmp_path / d / "backbone.pth") for d in ("run", "again"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_init_takes_our_files_torchvisions_and_the_authors(tiny, tmp_path, capsys):
    torch.manual_seed(5)
    reference = torchvision.models.resnet18()
    state = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    authors = {
        "backbone." + ".".join([numbers[k.split(".")[0]], *k.split(".")[1:]]): v for k, v in state.items()
    }
    torch.save(reference.state_dict(), tmp_path / "torchvision.pth")
    torch.save(
        {"MODEL": authors | {"projection_head.0.weight": torch.zeros(2)}, "EPOCH": 500},
        tmp_path / "authors.pt",
    )
    torch.save(
        {"model": {f"backbone.{k}": v for k, v in state.items()} | {"queue": torch.zeros(2)}},
        tmp_path / "checkpoint.pt",
    )
    torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, tmp_path / "compiled.pth")
    for name in ("torchvision.pth", "authors.pt", "checkpoint.pt", "compiled.pth"):
        loaded = build_backbone(init=str(tmp_path / name)).state_dict()
        assert all(torch.equal(loaded[k], state[k]) for k in state), name
    train_ssl.main(["--method", "barlow", *tiny, "--init", str(tmp_path / "authors.pt"), "--stop-epoch", "1"])
    (
        state.pop("layer1.0.conv1.weight"),
        state.update({"other.weight": torch.zeros(1), "bn1.bias": torch.zeros(3)}),
    )
    torch.save(state, tmp_path / "misfit.pth")
    with pytest.raises(
        WeightsError, match="layer1.0.conv1.weight is missing, other.weight is unknown, bn1.bias has shape"
    ):
        build_backbone(init=str(tmp_path / "misfit.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("text.pth", "gone.pth"):
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name)


def test_imagenet_weights_come_through_torchvisions_api(tmp_path, monkeypatch, tiny, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    )
    assert "cannot be downloaded" in refused(
        capsys, train_ssl.main, "--method", "barlow", *tiny, "--init", "imagenet"
    )
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(
        type(weights), "get_state_dict", lambda self, **k: torchvision.models.resnet18().state_dict()
    )
    train_ssl.main(["--method", "barlow", *tiny, "--init", "imagenet", "--stop-epoch", "1"])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["mean"] == [0.485, 0.456, 0.406], "ImageNet weights keep their normalisation"


def test_profile_names_the_bottleneck(tiny, tmp_path, capfd):
    train_ssl.main(["--method", "barlow", *tiny, "--profile", "2", "--size", "24:32"])
    said = capfd.readouterr()
    assert "views of 24 px; the last fifth of the epochs sees 32 px" in said.out
    assert "bottleneck: the" in said.out and "ERROR" not in said.err
    row = pd.read_csv(tmp_path / "run" / "profile.csv").iloc[0]
    assert row["size"] == 24 and row.loader_images_per_s > row.images_per_s > 0 and 0 < row.data_wait < 1
    assert (tmp_path / "run" / "trace.json").stat().st_size > 1000 and not (
        tmp_path / "run" / "checkpoint.pt"
    ).exists()


def test_auto_chooses_a_loader_and_says_why(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: object())
    assert [loader.choose_loader("auto", cpu, size, 10**6)[0] for size in (64, 224)] == ["torch", "dali"]
    assert loader.choose_loader("torch", cpu, 224, 10**6) == ("torch", "as asked")
    monkeypatch.setattr(loader, "fits_on_gpu", lambda nbytes, device: nbytes < 10**9)
    gpu = torch.device("cuda")
    chosen = [loader.choose_loader("auto", gpu, 64, nbytes)[0] for nbytes in (10**6, 10**9)]
    assert chosen == ["torch", "dali"]
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    assert loader.choose_loader("auto", cpu, 224, 10**6) == ("torch", "DALI is not installed")
    with pytest.raises(common.ConfigError, match="not installed"):
        loader.choose_loader("dali", cpu, 224, 10**6)


def test_built_in_scenes_and_the_command_line(tmp_path):
    done = script(
        "train_ssl.py",
        "--method",
        "barlow",
        "--scenes",
        "120",
        "--size",
        "32",
        "--epochs",
        "1",
        "--batch-size",
        "48",
        "--hidden",
        "16",
        "--out-dim",
        "16",
        "--out",
        tmp_path / "run",
        "--cache",
        tmp_path / "cache",
    )
    assert done.returncode == 0 and "120 built-in scenes" in done.stdout, done.stderr
    assert "%|" not in done.stderr, "no progress bar where the output is not a terminal"
    assert len(pd.read_csv(tmp_path / "run" / "log.csv")) == 1


def test_bad_files_stop_the_run_unless_skipped(folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    first = sorted((data / "10_Café").iterdir())
    first[0].write_bytes(first[0].read_bytes()[:300])
    first[1].write_bytes(b"")
    first[2].write_text("not an image")
    flags = [
        "--method",
        "barlow",
        "--data",
        data,
        "--size",
        "32",
        "--batch-size",
        "20",
        "--epochs",
        "1",
        "--hidden",
        "8",
        "--out-dim",
        "8",
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
        "--cache",
        tmp_path / "cache",
    ]
    assert "3 of 90 files do not decode" in refused(capsys, train_ssl.main, *flags)
    assert len(pd.read_csv(tmp_path / "run" / "bad_files.csv")) == 3
    train_ssl.main([str(f) for f in flags] + ["--skip-bad-files"])
    assert "left out" in capsys.readouterr().out and (tmp_path / "run" / "backbone.pth").exists()


def test_nothing_is_left_of_bad_files_alone(tiny, tmp_path, capsys):
    (tmp_path / "data" / "A").mkdir(parents=True)
    for name in ("1.jpg", "2.png"):
        (tmp_path / "data" / "A" / name).write_text("not an image")
    flags = ["--method", "barlow", *tiny, "--data", tmp_path / "data", "--skip-bad-files"]
    assert "nothing is left" in refused(capsys, train_ssl.main, *flags)


@pytest.mark.parametrize(
    "yaml_text, says",
    [
        ("learning_rat: 0.1", "nearest valid key is 'lr'|nearest valid key"),
        ("batchsize: 8", "'batch_size'"),
        ("lr: 1e-3x", "not a number"),
        ("seed: 1e3", "not a whole number"),
        ("epochs: 2.5", "not a whole number"),
        ("lr: .nan", "not a number"),
        ("seed: 0x10", "not a whole number"),
        ("lr: 1:30.5", "not a number"),
        ("lr: 0.1\nlr: 0.2", "lr stands twice"),
        ("batch-size: 64\nbatch_size: 32", "batch_size stands twice"),
        (f"seed: 0x{'f' * 6000}", "not a whole number"),
        (f"seed: {'[' * 3000}", "nested too deep|not readable"),
        ("weight_decay: -1.0", "at least 0"),
        ("method: bert", "not one of barlow"),
        ("compile: maybe", "not true or false"),
        ("just text", "holds no"),
        ("a: [", "not readable as YAML"),
        *((f"lr: !!{tag} x", "not readable as YAML") for tag in ("int", "bool", "timestamp")),
    ],
)
def test_yaml_that_is_wrong(yaml_text, says, tiny, tmp_path, capsys):
    (tmp_path / "odd name.yaml").write_text(yaml_text)
    error = refused(capsys, train_ssl.main, *tiny, "--config", tmp_path / "odd name.yaml")
    assert "odd name.yaml" in error and any(part in error for part in says.split("|")), error


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--lr", "nan"], "not a number"),
        (["--lr", "-1"], "above 0"),
        (["--epochs", "0"], "at least 1"),
        (["--learning-rate", "1"], "nearest valid flag"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--data", "gone"], "gone: no such folder"),
        (["--batch-size", "500"], "fewer than one batch"),
        (["--temperature", "0.1"], "no setting of barlow"),
        (["--out", "README.md"], "README.md"),
        (["--init", "gone.pth"], "gone.pth: no such weights file"),
        (["--subset", "0"], "above 0"),
        (["--size", "5000"], "at most 2048"),
        (["--lr", "1e39"], "at most 1000"),
        (["--batch-size", "2"], "81 images into 41 steps, and BatchNorm cannot train on one image: raise it"),
        (["--batch-size", "2", "--accumulate", "2"], "41 steps of 2 parts (--accumulate), and BatchNorm"),
    ],
)
def test_flags_that_are_wrong(flags, says, tiny, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert says in refused(capsys, train_ssl.main, "--method", "barlow", *tiny, *flags)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--graph"], "--graph is for one GPU"),
        (["--compile"], "--compile is for one process"),
        (["--profile", "2"], "--profile is for one process"),
        (["--batch-size", "9"], "does not divide among 2 ranks"),
        (["--method", "moco", "--bn-splits", "3"], "--bn-splits 3 does not divide among 2 ranks"),
    ],
)
def test_flags_that_are_wrong_over_ranks(flags, says):
    args = train_ssl.read_flags(train_ssl.build_parser(), ["--data", "x", *flags])
    with pytest.raises(common.ConfigError, match=says):
        train_ssl.resolve(args, torch.device("cpu"), ranks=2)


def test_command_line_beats_yaml_beats_default(tiny, tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 0.25\nweight_decay: 0.001\noptimizer: adamw\nsymmetric: false\n")
    args = common.parse(
        train_ssl.build_parser(), [*tiny, "--config", str(tmp_path / "c.yaml"), "--lr", "0.5", "--symmetric"]
    )
    assert (args.lr, args.weight_decay, args.optimizer, args.momentum, args.symmetric) == (
        0.5,
        0.001,
        "adamw",
        0.9,
        True,
    )


def test_sigterm_saves_says_so_and_goes_on(tiny, tmp_path):
    command = [sys.executable, "train_ssl.py", "--method", "barlow", *tiny, "--epochs", "300"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 128 + signal.SIGTERM and "stopped by a signal" in out and "Traceback" not in err
    )
    state = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert state["progress"]["epoch"] >= 1 and state["config"]["epochs"] == 300


def test_slurms_warning_ends_the_step_and_saves_it(tiny, tmp_path, capsys, monkeypatch):
    forward = METHODS["simclr"].forward

    def warned(self, view1, view2):
        os.kill(os.getpid(), signal.SIGUSR1)
        return forward(self, view1, view2)

    monkeypatch.setattr(METHODS["simclr"], "forward", warned)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # so that a run without a handler ends this test alone
    with pytest.raises(SystemExit) as stopped:
        train_ssl.main(["--method", "simclr", *tiny])
    assert stopped.value.code == 128 + signal.SIGUSR1 == 138
    assert "stopped by a signal in epoch 1/2 after step 1/3" in capsys.readouterr().out
    progress = torch.load(tmp_path / "run" / "checkpoint.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (0, 1)


def test_ctrl_c_after_a_signal_interrupts_and_the_first_signal_is_the_exit_code():
    flag = StopFlag(1)
    flag.handle(signal.SIGUSR1, None)
    flag.handle(signal.SIGTERM, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert flag.ask(due=False) == (True, False) and flag.exit_code() == 128 + signal.SIGUSR1


def wait_for(file: Path, process, seconds=120):
    end = time.time() + seconds
    while not file.exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.02)


def test_the_flags_of_the_views_reach_the_plan():
    words = "--method simclr --data x --batch-size 8 --min-area 0.5 --jitter 0.1 --blur 0.3 --quarter-turns"
    words += " --seed 7 --accumulate 2"
    args = train_ssl.read_flags(train_ssl.build_parser(), words.split())
    images = types.SimpleNamespace(train=range(40), height=30, width=20)
    recipe = Recipe(area=(0.5, 1), jitter=0.1, blur_probability=0.3, quarter_turns=True)
    expected = Plan(40, 8, 30, 20, seed=7, rank=1, ranks=2, recipe=recipe, parts=2)
    assert train_ssl.make_plan(args, images, 1, 2) == expected


def test_the_rate_follows_every_step_of_the_whole_run_and_warm_up_counts_epochs(tiny, tmp_path, monkeypatch):
    """Three steps an epoch; a run that is to stop early has the rates of one that is not."""
    rates = []
    monkeypatch.setattr(train_ssl, "set_rate", lambda optimizer, rate, peak: rates.append(rate))
    flags = ["--epochs", "3", "--warmup-epochs", "1", "--lr", "0.001", "--stop-epoch", "2"]
    train_ssl.main(["--method", "simclr", *tiny, *flags])
    assert rates == pytest.approx([learning_rate(step, 9, 3, 0.001) for step in range(6)])
    assert pd.read_csv(tmp_path / "run" / "log.csv").lr.tolist() == pytest.approx([rates[2], rates[5]])


def flags_of(words):
    return train_ssl.read_flags(train_ssl.build_parser(), ["--data", "x", *words.split()])


def test_a_run_has_a_folder_of_its_method_and_an_optimiser_of_its_flags():
    args = flags_of("--method moco --optimizer sgd --lr 0.3 --momentum 0.8 --weight-decay 0.01")
    assert args.out == "runs/moco"
    method = METHODS["moco"](build_backbone(), hidden=8, out=8)
    groups = train_ssl.build_optimizer(args, method, torch.device("cpu")).param_groups
    assert {(group["lr"], group["momentum"]) for group in groups} == {(0.3, 0.8)}
    assert {group["weight_decay"] for group in groups} == {0.01, 0}
    with pytest.raises(common.ConfigError, match="does not divide among 1 ranks and 2 parts"):
        train_ssl.resolve(flags_of("--batch-size 9 --accumulate 2"), torch.device("cpu"), ranks=1)


def test_images_are_normalised_as_the_weights_of_init_have_learned():
    images = Images(*[None] * len(Images._fields))._replace(mean=[0.1] * 3, std=[0.2] * 3)
    for known, mean, std in (
        (None, 0.1, 0.2),
        ({}, 0.1, 0.2),
        ({"mean": [0.5] * 3, "std": [0.3] * 3}, 0.5, 0.3),
    ):
        found = train_ssl.as_pretrained(images, types.SimpleNamespace(pretraining=known))
        assert (found.mean, found.std) == ([mean] * 3, [std] * 3)


def test_enlarged_images_are_said():
    images = types.SimpleNamespace(height=32, width=30)
    assert train_ssl.size_line(64, images).endswith(
        "enlarging them costs 4 times the time; --size 32 is their own"
    )
    assert train_ssl.size_line("24:40", images).endswith("small first; the images have 30 x 32")


def test_an_epoch_leaves_ripe_weights_and_a_checkpoint_now_and_then(tmp_path):
    class Save(list):
        __call__ = list.append

        def refuse_not_finite(self, epoch):
            pass

    backbone, save, progress = build_backbone(), Save(), types.SimpleNamespace(epoch=1, log=[{"epoch": 1}])
    backbone.train()(torch.randn(4, 3, 32, 32))
    (tmp_path / "checkpoint.pt").touch()
    for age, saved in ((train_ssl.BETWEEN_CHECKPOINTS - 9, 0), (train_ssl.BETWEEN_CHECKPOINTS + 9, 1)):
        os.utime(tmp_path / "checkpoint.pt", times=(time.time() - age,) * 2)
        train_ssl.finish_epoch(tmp_path, progress, backbone, {}, save, due=False)
        assert len(save) == saved == (tmp_path / "backbone.pth").exists()
    with ripe_statistics(backbone):
        ripe = backbone.bn1.running_var.clone()
    assert torch.equal(torch.load(tmp_path / "backbone.pth")["bn1.running_var"], ripe)


def test_no_run_goes_beyond_its_epochs(tiny, tmp_path):
    train_ssl.main([*tiny, "--epochs", "1", "--stop-epoch", "3"])
    assert pd.read_csv(tmp_path / "run" / "log.csv").epoch.tolist() == [1]

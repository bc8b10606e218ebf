"""Weights of this project and of others: what loads is exact, what cannot is refused in words of use."""

import argparse
import warnings

import numpy as np
import pytest
import torch
import torchvision
from conftest import refused

import train_ssl
import transfer
from common import WeightsError
from models.backbone import build_backbone
from models.saved import load_model, save_model, score_of
from models.weights import IMAGENET_MEAN, IMAGENET_STD, load_weights, save_backbone


@pytest.fixture
def state():
    """torchvision's keys, without the classifier."""
    torch.manual_seed(3)
    return build_backbone().state_dict()


def loads(file, state) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = build_backbone(init=str(file)).state_dict()
    return all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "prefix",
    [
        "encoder_q.",
        "encoder.",
        "backbone._orig_mod.",
        "module.encoder_q.",
        "model.backbone.",
        "online_encoder.net.",
        "module.base_encoder.",
        "model.",
    ],
)
def test_weights_of_other_projects_load(prefix, state, tmp_path):
    named = {prefix + key: value for key, value in state.items()}
    head = f"{prefix}fc.0.weight" if "encoder" in prefix else "projector.0.weight"
    torch.save({"state_dict": named | {head: torch.zeros(2, 2)}}, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth", state)


@pytest.mark.parametrize("key", ["model_state_dict", "teacher", "model", "net"])
def test_what_others_save_beside_their_weights_does_no_harm(key, state, tmp_path):
    named = {f"module.backbone.{name}": value for name, value in state.items()}
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "epoch": np.int64(3)}
    torch.save({"student": {}, key: named, "optimizer": {"state": {}}} | beside, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth", state)


def test_a_model_of_transfer_is_an_init(state, tmp_path):
    """Its backbone, fine-tuned on one task, goes on to another."""
    about = {"mean": [0.1] * 3, "std": [0.2] * 3, "size": 32, "maxpool": False}
    whole = {f"0.{key}": value for key, value in state.items()}
    whole |= {"1.weight": torch.zeros(2, 512), "1.bias": torch.zeros(2)}
    torch.save(about | {"state": whole, "arch": "resnet18", "classes": ["a", "b"]}, tmp_path / "model.pth")
    assert loads(tmp_path / "model.pth", state)
    assert build_backbone(init=str(tmp_path / "model.pth")).pretraining == about


def test_torchvisions_own_files_bring_imagenets_statistics_to_every_script(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    known = build_backbone(init=str(tmp_path / "w.pth")).pretraining
    assert known == {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} and build_backbone().pretraining is None
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "w.pth")
    assert build_backbone(init=str(tmp_path / "w.pth")).pretraining == {}, "a classifier of something else"


@pytest.mark.parametrize("key", ["layer1.0.conv1.weight", "bn1.running_mean"])
def test_weights_that_are_not_finite_are_refused_before_images_are_decoded(
    key, state, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_ssl, "open_images", None)
    monkeypatch.setattr(transfer, "open_data", None)
    state[key].view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    said = f"{key} holds numbers that are not finite"
    files = ["--init", tmp_path / "w.pth", "--out", tmp_path / "run"]
    assert said in refused(capsys, train_ssl.main, *files)
    assert said in refused(capsys, transfer.main, *files)


def test_infinite_weights_are_refused_and_a_classifier_is_left_out(state):
    backbone = build_backbone()
    load_weights(backbone, state | {"fc.weight": torch.full((2, 2), torch.inf)}, "w.pth")
    state["layer4.1.bn2.weight"][3] = -torch.inf
    with pytest.raises(WeightsError, match="w.pth: layer4.1.bn2.weight holds numbers that are not finite"):
        load_weights(backbone, state, "w.pth")


def test_a_checkpoint_that_lacks_statistics_or_flags_is_refused_or_read_as_it_is(state, tmp_path):
    whole = {f"backbone.{key}": value for key, value in state.items()}
    torch.save({"about": {}, "model": whole}, tmp_path / "c.pt")
    assert torch.equal(build_backbone(init=tmp_path / "c.pt").bn1.running_var, state["bn1.running_var"])
    whole["backbone.bn1.num_batches_tracked"] = torch.tensor(4)
    del whole["backbone.bn1.running_var"]
    torch.save({"about": {}, "config": {"init": "random"}, "model": whole}, tmp_path / "c.pt")
    with pytest.raises(WeightsError, match="bn1.running_var is missing"):
        build_backbone(init=tmp_path / "c.pt")


def test_a_model_without_a_score_that_can_be_read_has_none(tmp_path):
    (tmp_path / "text.pth").write_text("no model")
    for name, content in (("old.pth", {"task": "scene"}), ("new.pth", {"score": 0.5})):
        torch.save(content, tmp_path / name)
    found = [score_of(tmp_path / name) for name in ("gone.pth", "text.pth", "old.pth", "new.pth")]
    assert found == [None, None, None, 0.5]


def test_a_stem_without_its_pool_is_asked_for(state, tmp_path, capsys):
    about = {"mean": [0.1] * 3, "std": [0.2] * 3, "size": 32, "maxpool": False}
    save_backbone(build_backbone(maxpool=False), tmp_path / "backbone.pth", about)
    flags = ["--init", tmp_path / "backbone.pth", "--out", tmp_path / "run", "--scenes", "60", "--size", "32"]
    flags += ["--batch-size", "16", "--epochs", "1"]
    assert "add --no-maxpool" in refused(capsys, train_ssl.main, *flags)
    train_ssl.main([str(flag) for flag in [*flags, "--no-maxpool"]])


def test_what_cannot_be_read_says_why_and_what_to_do(state, tmp_path):
    torch.save(torchvision.models.resnet18(), tmp_path / "module.pth")
    torch.save({"trunk": state, "epoch": 3}, tmp_path / "nested.pth")
    torch.save({f"trunk.{key}": value for key, value in state.items()}, tmp_path / "prefix.pth")
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "deep.pth")
    torch.save({key: value.to(torch.int8) for key, value in state.items()}, tmp_path / "int8.pth")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "folder.pth").mkdir()
    expected = {
        "module.pth": r"Python objects beside tensors \(torch.*weights_only=False\) and save its state dict",
        "nested.pth": "its keys are trunk, epoch",
        "prefix.pth": "None of its keys is torchvision's, such as trunk.conv1.weight: rename them",
        "deep.pth": "it is a deeper ResNet, see --arch",
        "int8.pth": "conv1.weight holds whole numbers",
        "pointer.pth": "cut, damaged, or not of torch.save",
        "folder.pth": "is a folder: give a file in it, such as backbone.pth",
    }
    for name, said in expected.items():
        with pytest.raises(WeightsError, match=said) as error:
            build_backbone(init=str(tmp_path / name))
        assert str(error.value).isprintable() and name in str(error.value)
    torch.save(state, tmp_path / "shallow.pth")
    with pytest.raises(WeightsError, match="it is a shallower ResNet"):
        build_backbone("resnet50", init=str(tmp_path / "shallow.pth"))


def test_one_name_does_not_stand_for_weights_that_see_images_differently(state, tmp_path, capsys):
    """The same weights with the statistics of ImageNet or of the data, and with another stem."""
    whole = torchvision.models.resnet18()
    whole.load_state_dict(state, strict=False)
    about = {"mean": [0.1] * 3, "std": [0.2] * 3, "size": 32, "maxpool": False}
    flags = ["--task", "scene", "--scenes", "60", "--size", "32", "--ratios", "100", "--seeds", "1"]
    flags += [
        "--init",
        str(tmp_path / "w.pth"),
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "c"),
    ]
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    transfer.main(flags)
    before = (tmp_path / "out" / "results.csv").read_bytes()
    torch.save(state, tmp_path / "w.pth")
    assert "init w: statistics was not set, is of the data" in refused(capsys, transfer.main, *flags)
    save_backbone(build_backbone(init=str(tmp_path / "w.pth"), maxpool=False), tmp_path / "w.pth", about)
    assert "init w: maxpool was not set, is False" in refused(capsys, transfer.main, *flags)
    assert (tmp_path / "out" / "results.csv").read_bytes() == before


def test_a_model_keeps_its_stem_and_its_loss(tmp_path):
    """Weights fit with and without the max-pool, logits a softmax and a sigmoid: nothing would fail."""
    network = torch.nn.Sequential(build_backbone(maxpool=False), torch.nn.Linear(512, 2))
    about = {"task": "fraction", "classes": ["a", "b"], "loss": "bce", "arch": "resnet18", "maxpool": False}
    about |= {"size": 32, "tile": (48, 40), "mean": [0.1] * 3, "std": [0.2] * 3}
    save_model(tmp_path / "m.pth", network.state_dict(), **about)
    model = load_model(str(tmp_path / "m.pth"), torch.device("cpu"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.network(x), network.eval()(x), atol=1e-5)
    for name in ("task", "classes", "loss", "size", "tile", "mean", "std"):
        assert getattr(model, name) == about[name], name

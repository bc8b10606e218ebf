"""What all commands share: values of YAML files, the commit, cores, memory and precision of this machine."""

import importlib
import os
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused

import common
from common import ConfigError


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("train_ssl", "lr:", "lr: has no value; leave the line out for the default, 0.1"),
        ("train_ssl", "compile: null", "compile: has no value; leave the line out for the default, False"),
        ("train_ssl", "lr: []", r"lr: \[\] is not a number"),
        ("transfer", "epochs: null", "epochs: has no value"),
        ("transfer", "init: []", "init: the list is empty"),
        ("transfer", "init:", "init: has no value"),
    ],
)
def test_a_key_of_yaml_without_a_value_is_refused(name, text, says, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"c.yaml: {says}"):
        common.read_yaml(tmp_path / "c.yaml", importlib.import_module(name).build_parser())


def test_a_key_without_a_value_stands_for_a_default_that_is_none(tmp_path):
    (tmp_path / "c.yaml").write_text("data:\nhidden: null\n")
    parser = importlib.import_module("train_ssl").build_parser()
    assert common.read_yaml(tmp_path / "c.yaml", parser) == {"data": None, "hidden": None}


@pytest.mark.parametrize(
    "text, says",
    [
        ("out: 1.10", "out: YAML reads 1.1 as a number: put the name in quotes"),
        ("epochs: [3]", "epochs: [3] is not a whole number"),
        ("lr: yes", "lr: True is not a number"),
        ("lr: 2020-13", "lr: '2020-13' is not a number"),
    ],
)
def test_what_yaml_reads_otherwise_is_told(text, says, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        common.read_yaml(tmp_path / "c.yaml", importlib.import_module("train_ssl").build_parser())
    assert str(error.value) == f"{tmp_path / 'c.yaml'}: {says}"


@pytest.mark.parametrize(("text", "rate"), [("1e-3", 1e-3), ("125E-7", 1.25e-5), ("'0.1'", 0.1), ("1e1", 10)])
def test_numbers_are_read_as_on_the_command_line(text, rate, tmp_path):
    (tmp_path / "c.yaml").write_text(f"lr: {text}\nseed: 010\n")
    parser = importlib.import_module("train_ssl").build_parser()
    assert common.read_yaml(tmp_path / "c.yaml", parser) == {"lr": rate, "seed": 10}


def test_a_whole_number_beyond_all_floats_is_one_line(tmp_path, capsys):
    train_ssl, digits = importlib.import_module("train_ssl"), "1" + 400 * "0"
    (tmp_path / "c.yaml").write_text(f"seed: {digits}")
    for flags in (["--seed", digits], ["--config", tmp_path / "c.yaml"]):
        assert f"'{digits}' is not a whole number" in refused(capsys, train_ssl.main, *flags)


@pytest.mark.parametrize("name", ["20240101_1", "'1.10'", "v1.10", "010"])
def test_names_that_look_like_numbers_stay_as_they_are_written(name, tmp_path):
    (tmp_path / "c.yaml").write_text(f"out: {name}")
    parser = importlib.import_module("train_ssl").build_parser()
    assert common.read_yaml(tmp_path / "c.yaml", parser) == {"out": name.strip("'")}


def test_without_git_or_a_checkout_there_is_no_commit(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(common, "ROOT", ROOT / "data")  # unpacked inside a checkout of something else
        assert common.git_commit() == ""
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    assert common.git_commit() == ""


@pytest.mark.parametrize(
    "quota, cores", [("max 100000", 3), ("200000 100000", 2), ("50000 100000", 1), ("800000 100000", 3)]
)
def test_cores_are_those_that_taskset_and_a_container_leave(quota, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda file: quota)
    assert common.cores() == cores


def test_without_a_container_cores_are_those_that_taskset_leaves(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda file: (_ for _ in ()).throw(FileNotFoundError(file)))
    assert common.cores() == 3


def test_fp16_is_refused_on_a_cpu_and_is_what_an_old_gpu_gets(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ConfigError, match="a CPU only emulates it"):
        common.resolve_precision("fp16", cpu)
    assert common.resolve_precision("auto", cpu) in ("bf16", "fp32")
    for capability, precision in (((7, 0), "fp16"), ((8, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert common.resolve_precision("auto", gpu) == precision
        assert common.resolve_precision("fp16", gpu) == "fp16"


def test_whether_pixels_stay_on_a_gpu_goes_by_its_whole_memory(monkeypatch):
    """What another job has taken of it just now changes nothing."""
    known = types.SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (10**9, known.total_memory))
    gpu = torch.device("cuda")
    assert common.fits_on_gpu(39 * 10**9, gpu) and not common.fits_on_gpu(41 * 10**9, gpu)
    assert not common.fits_on_gpu(1, torch.device("cpu"))

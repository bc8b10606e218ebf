"""What all commands share: values of YAML files, the commit, cores, memory and precision of this machine."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
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


def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path):
    lines = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(lines)
    found = subprocess.run(
        [sys.executable, "train_ssl.py", "--out", tmp_path / "run"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the suite may run under nohup
        check=False,
    )
    assert found.returncode == -signal.SIGINT and not found.stderr


@pytest.mark.parametrize("text", ["a: !!bool x", "a: !!timestamp x", "a: !!int x", "a: [", "a: [" * 3000])
def test_a_damaged_file_of_ours_counts_as_empty(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert common.read_quietly(tmp_path / "config.yaml") == {}


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


@pytest.mark.parametrize(
    "kind, bounds, wrong, right",
    [
        (float, {"above": 0, "high": 1}, ["0", "1.01", "inf", "nan", "x"], ["1", "1e-9"]),
        (int, {"low": 2, "high": 5}, ["1", "6", "2.0", "x", ""], ["2", "5"]),
        (float, {"low": 0}, ["-1e-9", "inf"], ["0", "1e300"]),
    ],
)
def test_the_bounds_of_a_number(kind, bounds, wrong, right):
    convert = common.number(kind, **bounds)
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError):
            convert(text)
    assert [convert(text) for text in right] == [kind(text) for text in right]


def test_yaml_takes_names_with_dashes_one_value_for_a_list_and_what_a_run_has_noted(tmp_path):
    (tmp_path / "c.yaml").write_text("weight-decay: 0.5\ninit: random\nimages: 9\ncommit: abc\n")
    parser = importlib.import_module("transfer").build_parser()
    assert common.read_yaml(tmp_path / "c.yaml", parser) == {"weight_decay": 0.5, "init": ["random"]}
    (tmp_path / "c.yaml").write_text("images: 64\n")
    parser = importlib.import_module("bench").build_parser()
    assert common.read_yaml(tmp_path / "c.yaml", parser) == {"images": 64}, "there it is a flag"


@pytest.mark.parametrize(
    "error, code, said",
    [
        (
            FileNotFoundError(2, "No such file or directory", "x.csv"),
            2,
            "error: x.csv: No such file or directory",
        ),
        (OSError("no more threads"), 2, "error: no more threads"),
        (ConfigError("two\nlines"), 2, "error: two lines"),
        (RuntimeError("CUDA out of memory"), 2, "error: not enough memory (CUDA out of memory): lower"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_that_a_user_can_mend_are_one_line(error, code, said, capsys):
    with pytest.raises(SystemExit) as end, common.one_line_errors():
        raise error
    assert end.value.code == code and capsys.readouterr().err.startswith(said)
    with pytest.raises(RuntimeError, match="shape"), common.one_line_errors():
        raise RuntimeError("shape")


def test_signals_that_are_ignored_stay_so():
    """As under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        common.exit_on_signals(lambda: "all")
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), signal.SIGTERM)
        assert end.value.code == 128 + signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_file_that_is_not_finished_leaves_nothing_and_names_what_failed(tmp_path):
    (tmp_path / "new.csv").write_text("old")
    for error in (KeyError("x"), OSError(28, "No space left on device"), OSError(5, "bad disk", "other.jpg")):
        with pytest.raises(type(error)) as caught, common.replacing(tmp_path / "new.csv") as partial:
            partial.write_text("half")
            raise error
        assert [file.name for file in tmp_path.iterdir()] == ["new.csv"]
        names = {28: str(tmp_path / "new.csv"), 5: "other.jpg"}
        assert getattr(caught.value, "filename", None) == names.get(getattr(error, "errno", None))
    assert (tmp_path / "new.csv").read_text() == "old"


def test_processes_of_others_live(monkeypatch):
    def kill(pid, number):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", kill)
    assert common.is_alive(1)


def test_memory_is_what_a_container_leaves(monkeypatch):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, expected in (("1000000\n", 10**6), ("max\n", whole), (f"{2 * whole}\n", whole)):
        monkeypatch.setattr(Path, "read_text", lambda file: limit)
        assert common.memory() == expected


def test_a_machine_is_crowded_where_half_as_many_threads_again_as_cores_want_to_run(monkeypatch):
    monkeypatch.setattr(common, "cores", lambda: 2)
    for load, said in ((2.9, ""), (3.1, "3 threads compete for 2 cores")):
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
        assert common.crowded() == said
    assert [common.counted(n, "core") for n in (0, 1, 2)] == ["0 cores", "1 core", "2 cores"]


def test_a_rank_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="rank 2 has no GPU, torch sees 2 GPUs: lower --nproc_per_node"):
        common.start_ranks("auto")


def test_a_name_that_a_tab_begins_is_quoted():
    assert [common.harmless(name) for name in ("\t=1", "\r=1", "a=1")] == ["'\t=1", "'\r=1", "a=1"]

"""The benchmark: its sentence, its turns, its roofline; and the whole of it on tiny images."""

import itertools
import re
import time
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture, refused
from PIL import Image

import bench
from bench import Clock, Contender, Effort, Row, Setting
from models.backbone import build_backbone
from models.graph import EAGER_STEPS
from models.roofline import images_per_second, training_operations
from models.timing import Timed, profile_steps, timed_steps
from plots.profile import group_of

SETTING = Setting(32, 8)


def at(rate, wait=0.0):
    """A run of one second."""
    return Timed(rate, wait, 1.0, 1)


def contender(part, rates, what="x", precision="fp32"):
    """One whose turns come to these rates; a rate that is an error is raised."""
    left = list(rates)

    def run():
        rate = left.pop(0)
        if isinstance(rate, Exception):
            raise rate
        return at(rate)

    return Contender(part, what, run, precision, "eager")


# The roofline


# Bytes/s of memory and FLOP/s of half-precision matrix products, dense, from the vendor's data sheets
GPUS = {
    "V100": (0.9e12, 125e12),
    "A100-80": (2.039e12, 312e12),
    "H100": (3.35e12, 989.4e12),
    "H200": (4.8e12, 989.4e12),
}


@pytest.mark.parametrize("gpu, known", [("V100", 3467), ("A100-80", 8338), ("H100", 19139), ("H200", 23218)])
def test_roofline_of_resnet18_is_the_known_one(gpu, known):
    rate = images_per_second(training_operations(build_backbone(), 224), *GPUS[gpu])
    assert rate == pytest.approx(known, rel=0.03)


def test_operations_are_those_of_the_papers_and_follow_the_size():
    small, large = (training_operations(build_backbone(), size) for size in (64, 128))
    total = {n: sum(op.flops for op in ops) for n, ops in ((64, small), (128, large))}
    assert total[128] / total[64] == pytest.approx(4, rel=0.02)
    forward = [op for op in training_operations(build_backbone(), 224) if op.name.endswith(": forward")]
    # multiply-adds of He et al.
    assert sum(op.flops for op in forward) == pytest.approx(2 * 1.814e9, rel=0.001)
    halves, singles = (training_operations(build_backbone(), 64, element) for element in (2, 4))
    assert sum(op.bytes for op in singles) == 2 * sum(op.bytes for op in halves)
    slow = images_per_second(large, 1e9, 1e30), images_per_second(large, 1e30, 1e9)
    assert slow == pytest.approx((1e9 / 2 / sum(op.bytes for op in large), 1e9 / 2 / total[128]))


def test_counting_leaves_the_backbone_as_it_was():
    backbone = build_backbone()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    training_operations(backbone, 64)
    assert backbone.training and not any(module._forward_hooks for module in backbone.modules())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


# Turns


def test_contenders_take_turns_and_one_that_fails_is_out():
    first = contender("both", [10, 12, 30])
    second = contender("usual", [RuntimeError("no room\nat all")])
    results = bench.take_turns([first, second], 3, Clock(60))
    assert [r.images_per_s for r in results[0]] == [10, 12, 30] and len(results[1]) == 1
    row, failed = (bench.row_of(c, SETTING, found) for c, found in zip((first, second), results, strict=True))
    assert (row.value, row.low, row.high, row.n) == (12, 10, 30, 3)
    assert failed.n == 0 and failed.value != failed.value and "no room" in failed.note


def test_no_turn_starts_that_would_end_too_late(capsys):
    class Slow(Clock):
        def left(self):
            self.end -= 1  # each look at the clock takes a second
            return self.end

    clock = Slow(0)
    clock.end = 12
    results = bench.take_turns([contender("model", range(1, 9)), contender("both", range(1, 9))], 8, clock)
    assert 1 <= len(results[0]) == len(results[1]) < 5
    assert "no time for another turn" in capsys.readouterr().out
    row = bench.row_of(contender("model", []), SETTING, [])
    assert row.note == "no time was left"


def test_a_mistake_of_the_user_is_no_result():
    with pytest.raises(bench.common.DataError):
        bench.take_turns([contender("model", [bench.common.DataError("no such folder")])], 1, Clock(60))


def test_a_missing_compiler_costs_the_compiled_rows_alone():
    error = bench.common.ConfigError("--compile: there is no g++")
    assert bench.take_turns([contender("model", [error])], 1, Clock(60)) == [[error]]


def test_ratios_are_taken_within_a_turn():
    pair = [contender("both", []), contender("usual", [])]
    (row,) = bench.ratios(pair, [[at(20), at(90), at(40)], [at(10), at(30), at(20)]], SETTING)
    assert (row.value, row.low, row.high, row.n) == (2, 2, 3, 3)


# The sentence


@pytest.mark.parametrize(
    "rates, limit",
    [
        ((100, 1000, 99), "the loader limits it (model alone 10.0 times as fast)"),
        ((3000, 300, 290), "the model limits it (loader alone 10.0 times as fast)"),
        ((300, 200, 120), "loader and model share the machine: model alone reaches 200 images/s"),
    ],
)
def test_sentence_says_rate_hours_and_limit(rates, limit):
    said = bench.sentence(dict(zip(("loader alone", "model alone", "both"), rates)), 36_000, 100)
    hours = 36_000 * 100 / rates[2] / 3600
    assert said == f"{rates[2]} images/s: 36,000 images in 100 epochs take {hours:,.1f} hours; {limit}"
    assert bench.hours_of(40_000, 100) == "0.11 hours"


def test_flags_choose_the_setting():
    def settings(*flags, device="cpu"):
        return bench.settings_of(bench.build_parser().parse_args(flags), torch.device(device))

    assert settings() == [Setting(64, 256), Setting(224, 32)]
    assert settings(device="cuda") == [Setting(224, 512), Setting(64, 256)]
    assert settings("--size", "200") == [Setting(200, 32)]
    assert settings("--size", "32", "--batch-size", "12") == [Setting(32, 12)]


# All of it


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder of 40 images, of which 36 train, and measurements of one step."""
    (tmp_path / "data" / "water").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(picture(rng, 24)).save(tmp_path / "data" / "water" / f"{i}.png")
    monkeypatch.setitem(bench.EFFORTS, "cpu", Effort(1, 5.0, 0))
    flags = ["--data", tmp_path / "data", "--size", 32, "--batch-size", 4, "--device", "cpu", "--workers", 1]
    return [str(f) for f in [*flags, "--cache", tmp_path / "cache", "--out", tmp_path / "out" / "b.csv"]]


def test_one_command_prints_and_writes_the_table_and_replaces_the_one_before(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.csv").write_text("an,older\ntable,!\n")
    bench.main([*tiny, "--repeats", "1", "--no-compile", "--images", "1000", "--epochs", "20"])
    table = pd.read_csv(tmp_path / "out" / "b.csv")
    assert list(table.columns) == [*Row._fields, "device", "torch", "commit"]
    counts = table.part.value_counts()
    assert counts["model"] == counts["both"] == len(bench.precisions_of(torch.device("cpu")))
    assert counts["ceiling"] == 1 + counts["model"] and counts["usual"] in (1, 2)
    assert counts["ratio"] == counts["both"] * counts["usual"]
    measured = table[table.part.isin(["loader", "model", "both", "usual"])]
    assert (measured.value > 0).all() and (measured.n == 1).all()
    said = capsys.readouterr().out
    assert re.search(r"32 px: \d+ images/s .* times the usual stack in fp32", said)
    best = table[table.part == "both"].value.max()
    assert f"; 1,000 images in 20 epochs: {bench.hours_of(20_000, best)}" in said


def test_quick_says_one_sentence_and_writes_nothing(tiny, tmp_path, capsys):
    bench.main([*tiny, "--quick", "--epochs", "7"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.fullmatch(r"[\d,]+ images/s: 36 images in 7 epochs take [\d.]+ hours; .*(limits|share).*", last)
    assert not (tmp_path / "out").exists()


def test_quick_without_data_tells_the_hours_of_the_paper(tiny, capsys):
    places = tiny.index("--data")
    bench.main([*tiny[:places], *tiny[places + 2 :], "--quick"])
    assert ": 175,381 images in 500 epochs take" in capsys.readouterr().out.strip().splitlines()[-1]


def test_the_loader_is_chosen_by_all_images_not_by_those_that_are_read(tiny, monkeypatch):
    """A data set that does not fit on the GPU is measured as it would be trained on."""
    asked = []
    monkeypatch.setattr(bench, "choose_loader", lambda *words: (asked.append(words[-1]), ("dali", ""))[1])
    args = bench.build_parser().parse_args([*tiny, "--images", "1000000"])
    case = bench.make_case(Setting(32, 8), args, torch.device("cpu"))
    assert bench.best_kind(case) == "dali"
    every = 1_000_000 * case.images.pixels[0].nbytes
    assert asked == [every]
    monkeypatch.setattr(bench, "TorchLoader", lambda *words, **about: types.SimpleNamespace(**about))
    assert bench.make_loader(case, "torch", torch.float32).nbytes == every


def test_quick_takes_fewer_images_a_step_where_a_step_takes_long(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "QUICK_STEP", 1e-9)
    bench.main([*tiny, "--quick", "--batch-size", "16"])
    assert "batches of 8 (16 would take more than 1e-09 seconds a step)" in capsys.readouterr().out


@pytest.mark.parametrize("rate, batch", [(0.1, 8), (20, 60), (1000, 256)])
def test_a_quick_step_ends_in_seconds(rate, batch, monkeypatch):
    monkeypatch.setattr(bench, "timed_steps", lambda *words, **more: at(rate))
    case = bench.Case(Setting(32, 256), None, torch.device("cpu"), "barlow", "resnet18", 1)
    assert bench.shortened(case, None).setting == Setting(32, batch)


def test_the_usual_stack_gets_batches_from_workers_that_hand_over_small_parts(tiny, monkeypatch):
    handed, seen = [], []
    loader = torch.utils.data.DataLoader

    def listening(data, batch_size, **more):
        handed.append((batch_size, more["timeout"], more["multiprocessing_context"]))
        return loader(data, batch_size, **more)

    monkeypatch.setattr(torch.utils.data, "DataLoader", listening)
    args = bench.build_parser().parse_args([*tiny, "--batch-size", "24"])
    case = bench.make_case(Setting(32, 24), args, torch.device("cpu"))
    found = bench.train_usual(case, lambda: lambda views: seen.append([view.shape for view in views]))
    assert handed == [(8, bench.STUCK, "forkserver")] and seen == (1 + found.steps) * [2 * [(24, 3, 32, 32)]]


def test_a_warm_up_ends_when_patience_does():
    def steps(**patience):
        seen = []
        timed_steps(itertools.repeat([[0]]), seen.append, torch.device("cpu"), steps=2, warmup=5, **patience)
        return len(seen)

    assert steps() == 7 and steps(patience=0) == 3, "the first step starts workers and compiles"


def test_a_profile_starts_its_clock_after_the_capture_of_a_graph(tmp_path):
    class Loader:
        def epoch(self, number):
            return iter([[[0] * 8]] * 50)

    steps = itertools.count(1)

    def step(batch):
        time.sleep(0.5 * (next(steps) == EAGER_STEPS + 1))

    found = profile_steps(Loader(), step, torch.device("cpu"), 3, tmp_path / "trace.json")
    assert found["model_images_per_s"] > 3 * 8 / 0.5


def test_one_thread_is_not_said_to_be_many(monkeypatch):
    cpu = torch.device("cpu")
    for threads, said in ((1, "1 thread"), (3, "3 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert bench.common.about(cpu)["device_name"].endswith(f", {said}")
    monkeypatch.setattr(bench.common, "cores", lambda: 1)
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (4.0, 0, 0))
    assert "4 threads compete for 1 core, so" in bench.busy()


def test_a_folder_without_images_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, bench.main, "--data", tmp_path / "empty", "--quick", "--device", "cpu")


def test_picture_shows_where_the_time_goes(tiny, tmp_path, capsys):
    bench.main([*tiny, "--picture", str(tmp_path / "time.png")])
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert "views (torch)" in said and "convolutions, backward" in said
    with Image.open(tmp_path / "time.png") as image:
        assert image.format == "PNG" and min(image.size) > 200


@pytest.mark.parametrize(
    "name, group",
    [
        ("aten::mkldnn_convolution", "convolutions, forward"),
        ("aten::convolution_backward", "convolutions, backward"),
        ("sm90_xmma_dgrad_implicit_gemm_bf16", "convolutions, backward"),
        ("aten::native_batch_norm", "norms"),
        ("aten::addmm", "matrix products"),
        ("aten::_foreach_add_", "sums and optimiser"),
        ("aten::add_", "sums and optimiser"),
        ("vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>", "sums and optimiser"),
        ("at::native::(anonymous namespace)::launch_clamp_scalar", "ReLU and pooling"),
        ("aten::log", "other"),
    ],
)
def test_operators_are_told_apart(name, group):
    assert group_of(name) == group


def test_two_gpus_have_two_tables():
    cuda = torch.device("cuda")
    assert bench.name_for_file(cuda, "NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert bench.name_for_file(torch.device("cpu"), "AMD EPYC, 2 threads") == "cpu"


def test_a_share_is_both_over_the_model_alone():
    rates = {"model": 100.0, "both": 80.0}
    rows = [
        Row(part, "barlow", rate, "images/s", precision="fp32", mode="eager") for part, rate in rates.items()
    ]
    case = bench.Case(SETTING, None, torch.device("cpu"), "barlow", "resnet18", 1)
    assert [row.value for row in bench.shares(rows, case, None)] == [0.8]


def test_a_ceiling_counts_bytes_both_ways_and_two_operations_a_product(monkeypatch):
    monkeypatch.setattr(bench, "best_seconds", lambda call, device: 0.5)
    found = bench.measure_ceilings(torch.device("cpu"))
    assert found.copy == 2 * 2**27 / 0.5 and set(found.flops.values()) == {2 * 1024**3 / 0.5}


def test_the_share_of_waiting_is_of_the_time_that_was_taken():
    def slow():
        while True:
            time.sleep(0.05)
            yield [[0] * 3]

    found = timed_steps(slow(), lambda batch: None, torch.device("cpu"), steps=4, seconds=100)
    assert 0.9 < found.data_wait <= 1 and found.images_per_s == pytest.approx(12 / found.seconds)

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
from matplotlib.figure import Figure
from PIL import Image

import bench
from bench import Clock, Contender, Effort, Row, Setting
from data.fused import costs
from models.backbone import build_backbone
from models.checkpoint import Progress
from models.graph import EAGER_STEPS, GraphedLearner
from models.roofline import images_per_second, training_operations
from models.timing import Timed, Watch, endless, profile_steps, timed_steps
from plots.profile import draw_times, group_of, grouped

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
    moved = {name: sum(op.bytes for op in small if op.name.endswith(name)) for name in ("ReLU", "shortcut")}
    assert moved == {"ReLU": 8 * 2 * 202_752, "shortcut": 2 * 2 * 61_440}  # passes, bytes, numbers
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
    made = lambda *words, **about: types.SimpleNamespace(fused=True, **about)
    monkeypatch.setattr(bench, "TorchLoader", made)
    for kind in ("torch", "fused"):
        made = bench.make_loader(case, kind, torch.float32)
        assert made.nbytes == every and made.fused == (kind == "fused")


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


@pytest.fixture
def clock(monkeypatch):
    """A list of one number, seconds, that time.perf_counter tells."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_profile_starts_its_clock_after_the_capture_of_a_graph(tmp_path, clock):
    """A batch of 8 takes the loader 1 s and the model 3 s, and a capture 100 s."""

    class Loader:
        def epoch(self, number):
            for _ in range(50):
                clock[0] += 1
                yield [[0] * 8]

    steps = itertools.count(1)

    def step(batch):
        clock[0] += 3 + 100 * (next(steps) == EAGER_STEPS + 1)

    found = profile_steps(Loader(), step, torch.device("cpu"), 3, tmp_path / "trace.json")
    assert 0.05 < found.pop("peak_memory_gb") < 500
    rates = {"loader_images_per_s": 8, "model_images_per_s": 8 / 3, "images_per_s": 2}
    assert found == pytest.approx(rates | {"data_wait": 0.25})


def test_the_clock_starts_and_stops_with_an_idle_device(clock, monkeypatch):
    """A GPU is only told what to do by a step, and does it later: each of these takes a second."""
    asked = []

    def idle(device):
        clock[0] += len(asked)
        asked.clear()

    monkeypatch.setattr("models.timing.wait_for", idle)
    batches = itertools.repeat([[0] * 8])
    found = timed_steps(batches, asked.append, torch.device("cpu"), steps=4, warmup=2)
    assert found == Timed(images_per_s=8, data_wait=0, seconds=4, steps=4)


def test_a_measurement_ends_when_its_seconds_are_over(clock):
    def step(batch):
        clock[0] += 1

    found = timed_steps(itertools.repeat([[0]]), step, torch.device("cpu"), steps=99, seconds=2.5)
    assert found.steps == 3 and found.seconds == 3


def test_epochs_without_end_are_one_after_the_other():
    loader = types.SimpleNamespace(epoch=lambda number: [number] * 2)
    assert list(itertools.islice(endless(loader), 5)) == [0, 0, 1, 1, 2]


def test_the_times_of_an_epoch_go_on_where_it_was_left(clock):
    watch = Watch(Progress(waited=1.0, trained=20.0, seconds=30.0))

    def batches():
        for seconds in (2, 3):
            clock[0] += seconds
            yield seconds

    for _ in watch.waiting(batches()):
        clock[0] += 5
    assert watch.since_save() == 15
    assert watch.progress(3, 7, 0.5) == Progress(3, 7, [], 0.5, waited=6.0, trained=35.0, seconds=45.0)
    clock[0] += 1
    watch.stop()
    assert (watch.since_save(), watch.trained, watch.seconds()) == (1, 36, 46)


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


def test_picture_shows_where_the_time_goes(tiny, tmp_path, capsys, monkeypatch):
    found, profiled = [], bench.profiled
    monkeypatch.setattr(bench, "profiled", lambda *run: (found.append(profiled(*run)), found[-1])[1])
    bench.main([*tiny, "--picture", str(tmp_path / "new" / "time.png")])
    said = capsys.readouterr().out.strip().splitlines()[-1]
    name = "convolutions, backward"
    assert "views (torch)" in said and f"{name} {1e3 * found[1][name] / bench.PROFILED:.0f} ms" in said
    with Image.open(tmp_path / "new" / "time.png") as image:
        assert image.format == "PNG" and min(image.size) > 200


@pytest.mark.parametrize(
    "name, group",
    [
        ("aten::mkldnn_convolution", "convolutions, forward"),
        ("aten::convolution_backward", "convolutions, backward"),
        ("sm90_xmma_dgrad_implicit_gemm_bf16", "convolutions, backward"),
        ("ConvolutionBackward0", "convolutions, backward"),
        ("aten::native_batch_norm", "norms"),
        ("NativeBatchNormBackward0", "norms"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NHWC<__half2>", "norms"),
        ("aten::cat", "copies and casts"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("Optimizer.step#SGD.step", "sums and optimiser"),
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


def test_the_time_of_a_group_is_that_of_its_operators_without_what_they_call():
    own = {"self_cpu_time_total": 2e6, "self_device_time_total": 3e6}  # microseconds
    event = types.SimpleNamespace(key="aten::addmm", cpu_time_total=9e6, device_time_total=9e6, **own)
    for cuda, seconds in ((False, 2), (True, 3)):
        found = grouped([event, event], cuda)
        assert found.pop("matrix products") == 2 * seconds and not any(found.values())


def test_the_picture_of_times_is_in_milliseconds_and_shares_of_all(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda own, *file, **how: (drawn.append(own), save(own, *file, **how))
    )
    draw_times({"norms": 0.3, "other": 0.1}, "a step", tmp_path / "time.png")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [100, 300] and axes.get_xlabel() == "ms a step"
    assert [text.get_text() for text in axes.texts] == [" 25.0 %", " 75.0 %"]


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


def test_on_a_gpu_the_roofline_is_that_of_the_precision_and_the_loader_is_bound_by_bytes():
    images = bench.Images(None, None, torch.empty(1, 3, 20, 24), 1)
    case = bench.Case(SETTING, images, torch.device("cuda"), "barlow", "resnet18", 1)
    ceilings = bench.Ceilings(1e12, {"fp32": 1e13, "bf16": 1e14})
    rows = [Row("model", "barlow", 1e5, "", precision=name) for name in ("fp32", "bf16")]
    for row, element, speed in zip(bench.shares(rows, case, ceilings), (4, 2), (1e13, 1e14), strict=True):
        rate = images_per_second(training_operations(build_backbone(), 32, element), 1e12, speed)
        assert row.value == pytest.approx(1e5 / rate)
    moved = sum(cost.read + cost.written for cost in costs(32, 20, 24).values())
    assert bench.bound(case, "torch", ceilings) == f"at most {1e12 / (2 * 817 * 32**2):,.0f}"
    assert bench.bound(case, "fused", ceilings) == f"at most {1e12 / (2 * moved):,.0f}"
    assert bench.bound(case, "dali", ceilings) == ""


def test_a_ceiling_counts_bytes_both_ways_and_two_operations_a_product(monkeypatch):
    monkeypatch.setattr(bench, "best_seconds", lambda call, device: 0.5)
    found = bench.measure_ceilings(torch.device("cpu"))
    assert found.copy == 2 * 2**27 / 0.5 and set(found.flops.values()) == {2 * 1024**3 / 0.5}


def test_a_ceiling_is_that_of_one_call_the_fastest_in_gigabytes_and_teraflops(monkeypatch):
    seconds = itertools.cycle([5.0, 3.0, 4.0])
    monkeypatch.setattr(bench, "timed_steps", lambda *words, **more: Timed(0, 0, next(seconds), 2))
    assert bench.best_seconds(None, torch.device("cpu")) == 1.5
    rows = bench.rows_of_ceilings(bench.Ceilings(2e9, {"bf16": 3e12}))
    assert [(row.value, row.unit, row.precision) for row in rows] == [
        (2, "GB/s", ""),
        (3, "TFLOP/s", "bf16"),
    ]


def test_products_of_float32_are_in_tf32_for_the_ceiling_alone():
    usual = torch.backends.cuda.matmul.fp32_precision
    with bench.as_convolutions_do():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == usual != "tf32"


def test_the_model_alone_sees_one_batch_again_and_both_see_new_ones(monkeypatch):
    taken, cpu = [], torch.device("cpu")
    batches = lambda number: (taken.append(number) or [[0]] for _ in range(50))
    monkeypatch.setattr(bench, "best_kind", lambda case: "torch")
    monkeypatch.setattr(bench, "make_loader", lambda *words: types.SimpleNamespace(epoch=batches))
    monkeypatch.setattr(bench, "make_learner", lambda *words: lambda batch: None)
    case = bench.Case(SETTING, None, cpu, "barlow", "resnet18", 1)
    steps = sum(bench.EFFORTS["cpu"][::2])
    for contender in bench.training_contenders(case, None, compiled=True):
        taken.clear()
        contender.run()
        assert len(taken) == {"model": 1, "both": steps}[contender.part]


def test_eager_steps_are_not_called_those_of_a_graph():
    graphed = GraphedLearner(types.SimpleNamespace(backward=lambda views: None, update=lambda: None))
    graphed.refused = True
    views = itertools.repeat([torch.zeros(1)])
    with pytest.raises(RuntimeError, match="no CUDA graph could be captured"):
        bench.train(lambda loader: views, lambda: None, lambda: graphed, torch.device("cpu"))


def test_learners_have_the_scaler_and_the_memory_format_of_what_they_stand_for(monkeypatch):
    """The usual stack is channels first in fp32 alone, where most code leaves it so."""
    asked = []
    monkeypatch.setattr(bench, "can_fuse", lambda *about: asked.append(about))
    case = bench.Case(SETTING, None, torch.device("cpu"), "simclr", "resnet18", 1)
    for make, precision, last in (
        (bench.usual_learner, "fp32", False),
        (bench.usual_learner, "bf16", True),
        (lambda *about: bench.make_learner(*about, "eager"), "fp16", True),
    ):
        learn = make(case, precision)
        weight = learn.model.backbone.conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last
        assert learn.dtype == bench.DTYPES[precision]
        assert learn.scaler.is_enabled() == (precision == "fp16")
        assert asked.pop() == (case.device, precision)


def test_a_gpu_is_said_to_wait_for_nothing(monkeypatch):
    monkeypatch.setattr(bench, "timed_steps", lambda *words, **more: at(5, wait=0.5))
    for device, said in (("cpu", ", 50.0 % waiting"), ("cuda", "")):
        found = bench.timed(None, None, torch.device(device))
        assert bench.told(contender("both", []), found) == f"both x fp32 eager: 5 images/s{said}"


def test_the_summary_takes_the_fastest_way_of_each_setting_and_its_own_ratio():
    def row(part, what, value, size, mode):
        return Row(part, what, value, "", size, 8, "bf16", mode)

    rows = [row("both", "barlow", value, 32, mode) for mode, value in (("eager", 100), ("graph", 200))]
    rows += [row("ratio", "both / usual stack in fp32", r, 32, m) for m, r in (("eager", 5), ("graph", 9))]
    rows += [row("both", "barlow", 300, 64, "eager"), row("both", "barlow", float("nan"), 64, "graph")]
    table = bench.as_table(rows, {"device_name": "", "versions": {"torch": ""}, "commit": ""})
    assert list(bench.summary(table, [Setting(32, 8), Setting(64, 8), Setting(96, 8)], 72_000, 10)) == [
        "32 px: 200 images/s (bf16 graph); 9.00 times the usual stack in fp32; "
        "72,000 images in 10 epochs: 1.0 hours",
        "64 px: 300 images/s (bf16 eager); 72,000 images in 10 epochs: 0.67 hours",
        "96 px: nothing was measured",
    ]


def test_the_share_of_waiting_is_of_the_time_that_was_taken():
    def slow():
        while True:
            time.sleep(0.05)
            yield [[0] * 3]

    found = timed_steps(slow(), lambda batch: None, torch.device("cpu"), steps=4, seconds=100)
    assert 0.9 < found.data_wait <= 1 and found.images_per_s == pytest.approx(12 / found.seconds)

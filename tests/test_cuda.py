"""The loaders' machinery, on any machine; and on one with a GPU, that nothing there is waited for.

pytest -m gpu        # what needs an NVIDIA GPU
"""

import threading
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import picture, refused, script
from PIL import Image

import common
from data import fused, loader
from data.augment import Recipe
from data.loader import DecodedLoader, Plan, TorchLoader, in_thread
from data.pixels import load_pixels
from models import METHODS, graph
from models.backbone import compile_backbones
from models.optimisers import make_optimizer, set_rate
from models.step import Learner

CPU = torch.device("cpu")
NORMAL = {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.1, 0.3)}


def gpu(test):
    """Mark a test that needs an NVIDIA GPU, and skip it without one."""
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    return pytest.mark.gpu(without(test))


def noise(n, side=40):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


def test_a_thread_makes_the_items_in_order_and_no_further_ahead_than_asked():
    made, taken = [], []

    def items():
        for i in range(9):
            made.append((i, len(taken), threading.current_thread()))
            yield i

    for i in in_thread(items(), 2):
        taken.append(i)
    assert taken == list(range(9))
    assert all(i <= seen + 2 for i, seen, _ in made)
    assert {thread for *_, thread in made}.isdisjoint({threading.main_thread()})


def test_an_error_in_the_thread_comes_up_at_its_step():
    def items():
        yield 1
        raise OSError("gone")

    stream = in_thread(items(), 2)
    assert next(stream) == 1
    with pytest.raises(OSError, match="gone"):
        next(stream)


def test_a_loader_given_up_leaves_no_thread_behind():
    before = threading.active_count()
    stream = TorchLoader(noise(40), Plan(40, 4, 40, 40), 32, **NORMAL, device=CPU).epoch(0)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_rows_of_a_plan_are_those_of_its_epochs():
    plan = Plan(103, 20, 8, 8, seed=3, rank=1, ranks=2)
    both = list(zip(plan.rows(4, 2), plan.epoch(4, 2), strict=True))
    assert len(both) == plan.steps() - 2
    assert all(np.array_equal(rows, full[0]) for rows, full in both)


@pytest.mark.parametrize("parts, ranks", [(1, 1), (3, 1), (4, 2)])
def test_parts_of_a_step_have_one_size(parts, ranks):
    plan = Plan(200, 48, 8, 8, ranks=ranks, parts=parts)
    sizes = {len(rows) for rows in plan.rows(0)}
    assert len(sizes) == 1 and not sizes.pop() % parts and plan.steps() == 5
    assert 200 - plan.shown() < plan.steps() * ranks * parts


def test_views_of_decoded_files_are_those_of_pixels(tmp_path):
    dali = pytest.importorskip("data.dali", reason="NVIDIA DALI is not installed", exc_type=ImportError)
    rng = np.random.default_rng(0)
    files = np.array([f"{i}.png" for i in range(50)])
    for file in files:
        Image.fromarray(picture(rng, 24)).save(tmp_path / file)
    plan = Plan(50, 12, 24, 24, seed=2, recipe=Recipe(quarter_turns=True))
    decoder = dali.DaliImages(tmp_path, files, 24, 24, largest=plan.largest(), device=CPU, workers=1)
    ours = DecodedLoader(decoder, plan, 32, **NORMAL, device=CPU)
    theirs = TorchLoader(load_pixels(tmp_path, files, 24, 24, cache=tmp_path), plan, 32, **NORMAL, device=CPU)
    for epoch, start in ((0, 0), (1, 3), (2, 0)):
        pairs = list(zip(ours.epoch(epoch, start), theirs.epoch(epoch, start), strict=True))
        assert len(pairs) == plan.steps() - start
        assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_dali_makes_the_views_itself_where_no_kernel_can(tmp_path, monkeypatch):
    dali = pytest.importorskip("data.dali", reason="NVIDIA DALI is not installed", exc_type=ImportError)
    Image.fromarray(picture(np.random.default_rng(0), 16)).save(tmp_path / "0.png")
    plan = Plan(4, 2, 16, 16)
    asked = {"device": CPU, "workers": 2, "cache_mb": 8, "dtype": torch.float16}
    made = loader.dali_loader(tmp_path, ["0.png"] * 4, plan, 16, **NORMAL, **asked)
    assert isinstance(made, dali.DaliLoader) and not fused.available(CPU)
    made.size = 24  # as a run that ends on larger views does
    view, _ = next(made.epoch(0))
    assert view.shape == (2, 3, 24, 24) and view.dtype == torch.float16
    assert made.run.pipeline.num_threads == 2
    assert not isinstance(made.files.encoded[0], np.ndarray), "the cache wants tensors with a name"
    monkeypatch.setattr(loader, "available", lambda device: True)
    made = loader.dali_loader(tmp_path, ["0.png"] * 4, plan, 16, **NORMAL, **asked)
    assert isinstance(made, DecodedLoader) and made.fused and made.dtype == torch.float16
    assert made.decoder.run.pipeline.num_threads == 2


def test_what_lies_on_a_gpu_is_decided_by_the_whole_set(monkeypatch):
    asked = []
    monkeypatch.setattr(loader, "available", lambda device: False)
    monkeypatch.setattr(loader, "fits_on_gpu", lambda nbytes, device: asked.append(nbytes))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "beside the usual one")
    pixels, plan, gpu = noise(8), Plan(8, 4, 40, 40), torch.device("cuda")
    made = [TorchLoader(pixels, plan, 32, **NORMAL, device=gpu, nbytes=n) for n in (None, 10**12)]
    assert asked == [pixels.nbytes, 10**12] and not made[1].resident and made[1].pixels is pixels


def test_without_kernels_a_step_still_finds_its_rows_among_all_pixels():
    """As on a GPU that holds the whole set, and whose Triton fails."""
    pixels, plan, normal = noise(30), Plan(30, 10, 40, 40, seed=1), tuple(NORMAL.values())
    rows, *draws = next(plan.epoch(0, 1))
    step = loader.Step(None, draws, loader.pack(draws, torch.from_numpy(rows)))
    ours = loader.views_of(step, pixels, 32, normal, torch.float32, fused=False)
    theirs = next(TorchLoader(pixels, plan, 32, **NORMAL, device=CPU).epoch(0, 1))
    assert all(map(torch.equal, ours, theirs))


def test_copied_images_are_waited_for_and_kept_until_they_are_read(monkeypatch):
    done = []
    usual = types.SimpleNamespace(wait_event=lambda event: done.append(("waits for", event)))
    images = types.SimpleNamespace(device=CPU, record_stream=lambda stream: done.append(("kept", stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: usual)
    loader.claim(images, "copied")
    assert done == [("waits for", "copied"), ("kept", usual)]


class Again(NamedTuple):
    """Stands in for a graph where there is none: runs the passes again, into the memory of the first run."""

    learner: Learner
    views: tuple
    loss: torch.Tensor
    gradients: list

    def replay(self):
        kept = [(p, g) for p, g in self.gradients]
        loss = self.learner.backward(self.views)
        self.loss.copy_(loss)
        for parameter, gradient in kept:
            gradient.copy_(parameter.grad)
            parameter.grad = None  # a replay writes memory, and sets nothing


def captured_here(learner, views):
    """`graph.capture` as a CPU can: what a capture would only record is taken back."""
    before = {key: value.clone() for key, value in learner.model.state_dict().items()}
    fixed = tuple(view.clone() for view in views)
    loss = learner.backward(fixed)
    learner.model.load_state_dict(before)
    gradients = [(p, p.grad) for p in learner.model.parameters() if p.grad is not None]
    learner.optimizer.zero_grad()
    return Again(learner, fixed, loss, gradients)


def small_learner(name):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    backbone.append(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten()))
    extra = {"queue_size": 24} if name == "moco" else {}
    method = METHODS[name](backbone, hidden=16, out=8, **extra)
    optimizer = make_optimizer("sgd", method, 0.05, 0.9, 1e-4)
    return Learner(method, optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.float32)


@pytest.mark.parametrize("name", METHODS)
def test_steps_of_a_graph_are_those_without(name, monkeypatch):
    eager, losses = [], []
    monkeypatch.setattr(graph, "beside", lambda run, views: (eager.append(len(losses)), run(views))[1])
    monkeypatch.setattr(graph, "capture", captured_here)
    plain, made = small_learner(name), small_learner(name)
    graphed, generator = graph.GraphedLearner(made), torch.Generator().manual_seed(1)
    for step in range(12):
        side = 12 if step < 6 else 16  # as --size SMALL:LARGE does
        views = tuple(torch.randn(2, 8, 3, side, side, generator=generator))
        for learner in (plain, made):
            set_rate(learner.optimizer, 0.05 / (step + 1), 0.05)
        losses.append((plain(views), graphed(views)))
    assert all(torch.equal(a, b) for a, b in losses), "also those that a later replay could write over"
    assert graphed.captured is not None
    assert eager == [0, 1, 2, 6, 7, 8], "each size is tuned before its capture"
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, made.model.state_dict()[key]), key


def test_a_graph_that_cannot_be_captured_is_done_without(monkeypatch):
    def fails(learner, views):
        learner.backward(views)  # leaves gradients behind
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graph, "beside", lambda run, views: run(views))
    monkeypatch.setattr(graph, "capture", fails)
    plain, graphed = small_learner("simsiam"), graph.GraphedLearner(small_learner("simsiam"))
    views = tuple(torch.randn(2, 8, 3, 12, 12, generator=torch.Generator().manual_seed(1)))
    for _ in range(graph.EAGER_STEPS):
        assert torch.equal(plain(views), graphed(views))
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted"):
        assert torch.equal(plain(views), graphed(views))
    assert plain.optimizer.param_groups[0]["params"][0].grad is None
    for mine, other in zip(plain.model.parameters(), graphed.learner.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_after_a_refused_capture_steps_run_where_all_else_does(monkeypatch):
    monkeypatch.setattr(graph, "beside", lambda *_: pytest.fail("another stream, with memory of its own"))
    graphed = graph.GraphedLearner(small_learner("simsiam"))
    graphed.refused = True
    graphed(tuple(torch.randn(2, 8, 3, 12, 12)))


def test_a_rank_without_a_gpu_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(common.ConfigError, match="rank 2 has no GPU, torch sees 2 GPUs: lower"):
        common.start_ranks("auto")


def test_a_gpu_older_than_torch_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "Tesla V100")
    for capability in ((7, 5), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place, it=capability: it)
        common.refuse_old_gpu(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 0))
    with pytest.raises(common.ConfigError, match=r"Tesla V100 \(sm_70\) .* install requirements-v100.txt"):
        common.refuse_old_gpu(CPU)


@pytest.mark.parametrize("flags", [["--device", "cpu"], ["--device", "cpu", "--accumulate", "3"]])
def test_a_graph_where_it_cannot_be_is_refused(flags, tiny, capsys):
    import train_ssl

    assert "--graph is for one GPU" in refused(capsys, train_ssl.main, *tiny, *flags, "--graph")


# On a GPU


@gpu
@pytest.mark.parametrize("resident", [True, False])
def test_views_of_the_gpu_are_those_of_the_cpu_and_nothing_is_waited_for(resident, monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(loader, "fits_on_gpu", lambda nbytes, device: resident)
    plan = Plan(100, 20, 40, 40, seed=1, recipe=Recipe(quarter_turns=True))
    there = TorchLoader(noise(100), plan, 32, **NORMAL, device=device)
    here = TorchLoader(noise(100), plan, 32, **NORMAL, device=CPU)
    list(there.epoch(0))  # compiles, and fills the pools of memory
    torch.cuda.synchronize()
    if there.side:
        with torch.cuda.stream(there.side):
            torch.cuda._sleep(10**8)  # copies come late: a view that does not wait for its own is of nothing
    torch.cuda.set_sync_debug_mode("error")
    try:
        pairs = list(there.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(pairs, here.epoch(1), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.is_cuda and a.is_contiguous(memory_format=torch.channels_last)
            assert torch.allclose(a.cpu(), b, atol=1e-3)


@gpu
def test_views_come_in_the_dtype_of_training_where_kernels_make_them():
    device = torch.device("cuda", torch.cuda.current_device())
    made = TorchLoader(noise(8), Plan(8, 4, 40, 40), 32, **NORMAL, device=device, dtype=torch.bfloat16)
    wanted = torch.bfloat16 if fused.available(device) else torch.float32
    assert {view.dtype for pair in made.epoch(0) for view in pair} == {wanted}


@gpu
def test_the_losses_of_a_run_on_the_gpu_are_those_of_the_cpu(tiny, tmp_path):
    import pandas as pd

    logs, exact = [], {"NVIDIA_TF32_OVERRIDE": "0"}  # TF32 rounds to 10 bits, and BatchNorm magnifies it
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        flags = ["--device", device, "--precision", "fp32", "--lr", "1e-4", "--out", out]
        run = script("train_ssl.py", *tiny, *flags, **exact)
        assert run.returncode == 0, run.stderr[-2000:]
        logs.append(pd.read_csv(out / "log.csv").loss)
    assert logs[1].tolist() == pytest.approx(logs[0].tolist(), rel=1e-2)


@gpu
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", METHODS)
def test_steps_of_a_captured_graph_are_those_without(name, dtype, close):
    plain, made = on_the_gpu(name, dtype), on_the_gpu(name, dtype)
    graphed, generator = graph.GraphedLearner(made), torch.Generator().manual_seed(1)
    for step in range(8):
        views = tuple(torch.randn(2, 8, 3, 12, 12, generator=generator).cuda())
        assert torch.allclose(plain(views), graphed(views), rtol=close), step
    assert graphed.captured is not None
    for key, value in plain.model.state_dict().items():
        other = made.model.state_dict()[key]
        assert torch.allclose(value.float(), other.float(), rtol=10 * close, atol=0.1 * close), key


@gpu
@pytest.mark.parametrize("name", ["simsiam", "moco"])
def test_a_graph_is_captured_of_what_is_compiled(name):
    plain, made = on_the_gpu(name, torch.bfloat16), on_the_gpu(name, torch.bfloat16)
    for learner in (plain, made):
        compile_backbones(learner.model)
    graphed, generator = graph.GraphedLearner(made), torch.Generator().manual_seed(1)
    for step in range(8):
        views = tuple(torch.randn(2, 8, 3, 12, 12, generator=generator).cuda())
        assert torch.allclose(plain(views), graphed(views), rtol=2e-2), step
    assert graphed.captured is not None


@gpu
def test_a_graph_is_captured_beside_pixels_that_a_thread_copies(monkeypatch):
    monkeypatch.setattr(loader, "fits_on_gpu", lambda nbytes, device: False)
    learners = on_the_gpu("barlow", torch.float32), on_the_gpu("barlow", torch.float32)
    plain, graphed = learners[0], graph.GraphedLearner(learners[1])
    there = TorchLoader(noise(96), Plan(96, 8, 40, 40), 16, **NORMAL, device=torch.device("cuda", 0))
    for step, views in enumerate(there.epoch(0)):
        assert torch.allclose(plain(views), graphed(views), rtol=1e-3), step
    assert graphed.captured is not None


def on_the_gpu(name, dtype):
    """A small learner there, that trains in `dtype`, slowly: Barlow Twins magnifies what is rounded."""
    learner = small_learner(name)._replace(dtype=dtype)
    learner.model.cuda()
    set_rate(learner.optimizer, 0.005, 0.05)
    return learner

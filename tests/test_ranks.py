"""Two gloo ranks with different data are one process on the joined batch: gradients, statistics, queue, whole
runs."""

import copy
import os
import signal
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import script
from torch.nn.parallel import DistributedDataParallel

import train_ssl
from models import METHODS
from models.backbone import build_backbone
from models.optimisers import make_optimizer
from models.step import Learner, Losses, StopFlag, mean_over_ranks
from models.sync_norm import SyncNorm, synchronise

RANKS, BATCH = 2, 16


def joined_batch():
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, BATCH, 3, 32, 32, generator=g).double()
        + torch.linspace(-1, 1, BATCH)[None, :, None, None, None]
    )


def build(name):
    torch.manual_seed(1)
    return METHODS[name](
        build_backbone(), hidden=32, out=16, **({"queue_size": 24} if name == "moco" else {})
    ).double()


def outcome(model, method, views):
    loss = model(*views)
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}
    buffers = {k: b.clone() for k, b in method.named_buffers() if not k.startswith("key_")}
    return {"loss": loss.detach(), "gradients": gradients, "buffers": buffers}


def work(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    share = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    for name in METHODS:
        method = synchronise(build(name), cuda=False)
        model = DistributedDataParallel(method, broadcast_buffers=False)
        found = outcome(model, method, joined_batch()[:, share])
        losses = [torch.empty_like(found["loss"]) for _ in range(RANKS)]
        dist.all_gather(losses, found["loss"])
        torch.save(found | {"loss": torch.stack(losses).mean()}, f"{results}/{name}-{rank}.pt")
    torch.save(of_parts(share), f"{results}/parts-{rank}.pt")
    step = {"heard": heard(rank), "loss": loss_of_all(rank), "left": left_at(rank)}
    torch.save(step, f"{results}/step-{rank}.pt")
    dist.destroy_process_group()


def of_parts(share):
    """The gradient of a step of two parts, and how many times its ranks have sent gradients."""
    method = synchronise(build("simclr"), cuda=False)
    model, sent = DistributedDataParallel(method, broadcast_buffers=False, bucket_cap_mb=1000), []

    def mean(_, bucket):
        sent.append(bucket.is_last())
        dist.all_reduce(bucket.buffer())
        done = torch.futures.Future()
        done.set_result(bucket.buffer() / RANKS)
        return done

    model.register_comm_hook(None, mean)
    loss = learner(model, method).backward(joined_batch()[:, share])
    return {"loss": loss, "gradient": method.backbone.conv1.weight.grad, "sent": sent.count(True)}


def learner(model, method):
    optimizer = make_optimizer("sgd", method, 0.05, 0.9, 1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Learner(model, optimizer, scaler, torch.float32, accumulate=2)


def heard(rank):
    """What a rank hears at each of six steps: rank 0 is due to save at the first two, rank 1, which does not
    count, at the others; a signal comes to rank 1 before the fourth."""
    flag = StopFlag(RANKS)
    answers = []
    for step in range(6):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        answers.append(flag.ask(due=(step < 2) == (rank == 0)))
    return answers, flag.exit_code()


def left_at(rank):
    """When a rank leaves after a signal, and when rank 0, which takes a while to save, was done."""
    flag, saved = StopFlag(RANKS), torch.zeros((), dtype=torch.float64)
    flag.caught.append(signal.SIGUSR1)
    if rank == 0:
        time.sleep(0.5)
        saved += time.time()
    with pytest.raises(SystemExit) as end:
        train_ssl.end_by_signal(flag, Path(), 0, 1, 0, 1)
    left = time.time()
    dist.broadcast(saved, 0)
    return left >= float(saved), end.value.code


def loss_of_all(rank):
    """What a checkpoint keeps of two steps, whose losses are 1 on rank 0 and 3 on rank 1."""
    losses = Losses(0.0, torch.device("cpu"), epoch=0, out=Path())
    for step in range(2):
        losses.add(torch.tensor(1.0 + 2 * rank), step)
    return mean_over_ranks(losses.total(), RANKS, torch.device("cpu"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder / "store"), str(folder)), nprocs=RANKS)
    return lambda name, rank: torch.load(folder / f"{name}-{rank}.pt")


@pytest.mark.parametrize("name", METHODS)
def test_gradient_of_two_ranks_is_that_of_one_process(name, ranks):
    method = build(name)
    whole = outcome(method, method, joined_batch())
    for rank in range(RANKS):
        share = ranks(name, rank)
        assert float(share["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-4)
        assert share["gradients"].keys() == whole["gradients"].keys()
        largest = max(float(g.norm()) for g in whole["gradients"].values())
        for key, gradient in whole["gradients"].items():
            difference = float((share["gradients"][key] - gradient).norm())
            assert difference < 1e-4 * float(gradient.norm()) + 1e-6 * largest, f"{key}: {difference}"
        for key, buffer in whole["buffers"].items():
            assert torch.allclose(share["buffers"][key].float(), buffer.float(), rtol=1e-4, atol=1e-4), key


def test_ranks_send_the_gradient_of_a_step_of_parts_once(ranks):
    method = build("simclr")
    quarter = BATCH // RANKS // 2
    order = [
        *range(quarter),
        *range(2 * quarter, 3 * quarter),
    ]  # the first part of each rank, then the second
    order += [row + quarter for row in order]
    loss = learner(method, method).backward(joined_batch()[:, order])
    whole = method.backbone.conv1.weight.grad
    for rank in range(RANKS):
        found = ranks("parts", rank)
        assert found["sent"] == 1
        assert float((found["gradient"] - whole).norm()) < 1e-4 * float(whole.norm())
    assert float(ranks("parts", 0)["loss"] + ranks("parts", 1)["loss"]) / 2 == pytest.approx(
        float(loss), rel=1e-4
    )


def test_all_ranks_stop_and_save_at_the_same_step(ranks):
    """The answer is a step old; rank 0 is heard once, and a signal from any rank until the end."""
    stop, save, nothing = (True, False), (False, True), (False, False)
    expected = [nothing, save, nothing, nothing, stop, stop], 128 + signal.SIGUSR1
    assert ranks("step", 0)["heard"] == ranks("step", 1)["heard"] == expected


def test_no_rank_leaves_before_the_checkpoint_is_written(ranks):
    assert ranks("step", 0)["left"] == ranks("step", 1)["left"] == (True, 128 + signal.SIGUSR1)


def test_a_checkpoint_keeps_the_mean_loss_of_all_ranks(ranks):
    assert ranks("step", 0)["loss"] == ranks("step", 1)["loss"] == 4.0


def test_the_test_would_see_a_gradient_of_half_the_size(ranks):
    """Barlow Twins with a plain all_reduce, a known bug of other libraries, gives gradient / ranks."""
    share = ranks("barlow", 0)["gradients"]
    method = build("barlow")
    whole = outcome(method, method, joined_batch())["gradients"]
    key = "backbone.conv1.weight"
    assert float(whole[key].norm()) > 1e-3 and float((share[key] / 2 - whole[key]).norm()) > 0.1 * float(
        whole[key].norm()
    )


def test_synchronised_norm_is_batch_norm_in_eval_mode():
    model = build("barlow").eval()
    converted = synchronise(copy.deepcopy(model), cuda=False).eval()
    x = joined_batch()[0]
    assert torch.allclose(model.backbone(x), converted.backbone(x), atol=1e-6)
    assert model.state_dict().keys() == converted.state_dict().keys()


@pytest.fixture
def alone(tmp_path):
    """A process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronised_norm_is_batch_norm_in_its_settings_and_any_dtype(dtype, alone):
    """In half precision, as inside autocast, statistics are float32 and the output is not."""
    norm = torch.nn.BatchNorm2d(3, eps=0.5, momentum=0.3)
    converted = synchronise(torch.nn.Sequential(copy.deepcopy(norm)), cuda=False)
    x = (torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 2).to(dtype)
    ours, theirs = converted(x), norm(x.float())
    assert isinstance(converted[0], SyncNorm) and ours.dtype == dtype
    assert torch.allclose(ours.float(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-5)
    for key, value in norm.state_dict().items():
        assert torch.allclose(converted[0].state_dict()[key], value, rtol=1e-4), key


def test_key_encoders_keep_their_own_norms():
    method = synchronise(build("moco"), cuda=False)
    kinds = {name.split(".")[0]: type(module) for name, module in method.named_modules() if "bn1" in name}
    assert kinds == {"backbone": SyncNorm, "key_backbone": torch.nn.BatchNorm2d}


def test_buffers_that_are_alike_are_not_sent_and_nothing_warns(alone):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        wrapped = train_ssl.distributed(torch.nn.BatchNorm1d(2))
    assert not wrapped.broadcast_buffers


def test_torchrun_with_two_ranks_trains_as_one_process(folder, tmp_path):
    flags = [
        "--method",
        "moco",
        "--data",
        folder,
        "--size",
        "32",
        "--subset",
        "0.667",
        "--batch-size",
        "18",
        "--epochs",
        "2",
        "--hidden",
        "32",
        "--out-dim",
        "16",
        "--queue-size",
        "72",
        "--bn-splits",
        "2",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--lr",
        "1e-4",
        "--cache",
        tmp_path / "cache",
    ]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_ssl.py"]
    pair = script(*run, *flags, "--out", tmp_path / "pair")
    alone = script("train_ssl.py", *flags, "--out", tmp_path / "alone")
    assert pair.returncode == 0 and alone.returncode == 0, pair.stderr[-2000:] + alone.stderr[-2000:]
    logs = [pd.read_csv(tmp_path / d / "log.csv") for d in ("pair", "alone")]
    pair_loss, alone_loss = (log.loss.tolist() for log in logs)
    assert pair_loss[0] == pytest.approx(alone_loss[0], rel=1e-3)
    assert pair_loss[1] == pytest.approx(alone_loss[1], rel=5e-3)  # fp32 rounding grows with every step
    a, b = (torch.load(tmp_path / d / "checkpoint.pt")["model"] for d in ("pair", "alone"))
    assert a.keys() == b.keys() and torch.equal(a["cursor"], b["cursor"])
    for key in ("backbone.bn1.running_mean", "backbone.layer4.1.bn2.running_var", "queue"):
        assert float((a[key] - b[key]).norm()) < 1e-2 * float(b[key].norm()), key

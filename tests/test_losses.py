"""Each loss against a literal transcription of its paper in float64, and the properties the papers rely
on."""

import contextlib
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from losses.barlow import barlow_twins_loss
from losses.moco import info_nce_loss
from losses.simclr import nt_xent_loss
from losses.simsiam import negative_cosine_loss
from models import METHODS, moco
from models.backbone import build_backbone
from models.heads import mlp

LOSSES = {
    "barlow": barlow_twins_loss,
    "simclr": nt_xent_loss,
    "simsiam": negative_cosine_loss,
    "moco": lambda q, k: info_nce_loss(q, k, torch.nn.functional.normalize(pair(64, 8, seed=9)[0], dim=1)),
}


def pair(n=16, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    z1 = torch.randn(n, d, generator=g, dtype=torch.float64) * 3 + 1
    return z1, z1 + torch.randn(n, d, generator=g, dtype=torch.float64)


def cosine(a, b):
    return float((a * b).sum() / (math.sqrt((a * a).sum()) * math.sqrt((b * b).sum())))


def test_barlow_is_algorithm_1():
    z1, z2 = pair()
    n, d = z1.shape
    a = (z1 - z1.mean(0)) / z1.std(0, correction=0)
    b = (z2 - z2.mean(0)) / z2.std(0, correction=0)
    expected = 0.0
    for i in range(d):
        for j in range(d):
            c = sum(float(a[k, i] * b[k, j]) for k in range(n)) / n
            expected += (1 - c) ** 2 if i == j else 0.02 * c**2
    assert float(barlow_twins_loss(z1, z2, lambda_=0.02)) == pytest.approx(expected, rel=1e-5)


def test_nt_xent_is_algorithm_1():
    z1, z2 = pair()
    n, z, t = len(z1), torch.cat(pair()), 0.3
    terms = []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = sum(math.exp(cosine(z[i], z[k]) / t) for k in range(2 * n) if k != i)
        terms.append(-math.log(math.exp(cosine(z[i], z[partner]) / t) / others))
    assert float(nt_xent_loss(z1, z2, temperature=t)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_info_nce_is_algorithm_1():
    q, k = pair()
    queue, t = torch.nn.functional.normalize(pair(32, 8, seed=5)[0], dim=1), 0.07
    terms = []
    for i in range(len(q)):
        positive = math.exp(cosine(q[i], k[i]) / t)
        terms.append(-math.log(positive / (positive + sum(math.exp(cosine(q[i], row) / t) for row in queue))))
    assert float(info_nce_loss(q, k, queue, temperature=t)) == pytest.approx(
        sum(terms) / len(terms), rel=1e-5
    )


def test_negative_cosine_is_equation_1():
    p, z = pair()
    expected = -sum(cosine(a, b) for a, b in zip(p, z)) / len(p)
    assert float(negative_cosine_loss(p, z)) == pytest.approx(expected, rel=1e-5)


def test_barlow_ignores_an_affine_map_of_each_column():
    z1, z2 = pair()
    scale, shift = torch.rand(8, dtype=torch.float64) * 5 + 0.2, torch.randn(8, dtype=torch.float64) * 10
    assert float(barlow_twins_loss(z1 * scale + shift, z2)) == pytest.approx(
        float(barlow_twins_loss(z1, z2)), rel=1e-4
    )


@pytest.mark.parametrize("name", ["simclr", "simsiam", "moco"])
def test_cosine_losses_ignore_the_length_of_a_row(name):
    z1, z2 = pair()
    length = torch.rand(16, 1, dtype=torch.float64) + 0.1
    assert float(LOSSES[name](z1 * length, z2)) == pytest.approx(float(LOSSES[name](z1, z2)), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_inside_autocast_and_for_any_input(name):
    z1, z2 = pair(64, 32)
    expected = float(LOSSES[name](z1.float(), z2.float())) if name != "moco" else None
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        a, b = (z1, z2) if name != "moco" else pair()
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSSES[name](a.to(dtype), b.to(dtype))
        assert loss.dtype == torch.float32 and loss.ndim == 0 and loss.isfinite()
        if expected is not None and dtype in (torch.float32, torch.float64):
            assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_gradients_stop_where_the_papers_stop_them():
    p, z = (t.requires_grad_() for t in pair())
    negative_cosine_loss(p, z).backward()
    assert z.grad is None and p.grad.abs().sum() > 0
    q, k = (t.requires_grad_() for t in pair())
    queue = torch.nn.functional.normalize(pair(32, 8, seed=5)[0], dim=1).requires_grad_()
    info_nce_loss(q, k, queue).backward()
    assert k.grad is None and queue.grad is None and q.grad.abs().sum() > 0


def test_gradients_are_finite_when_columns_or_rows_are_constant():
    for loss in LOSSES.values():
        z1, z2 = (torch.full((16, 8), 3.0, requires_grad=True) for _ in range(2))
        value = loss(z1, z2)
        value.backward()
        assert value.isfinite() and z1.grad.isfinite().all()


@pytest.fixture(scope="module")
def views():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(16, 3, 32, 32, generator=g) for _ in range(2)]


def method(name, **settings):
    torch.manual_seed(0)
    return METHODS[name](build_backbone(), hidden=32, out=16, **settings)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_symmetric_in_the_views(name, views):
    losses = [method(name)(*order).detach() for order in (views, views[::-1])]
    assert losses[0].isfinite() and float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)


def test_simsiam_predicts_the_other_view(views):
    model = method("simsiam").eval()
    z1, z2 = (model.projector(model.backbone(view)) for view in views)
    p1, p2 = model.predictor(z1), model.predictor(z2)
    expected = (negative_cosine_loss(p1, z2) + negative_cosine_loss(p2, z1)) / 2
    assert float(model(*views).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_moco_compares_a_query_with_the_key_of_the_other_view(symmetric, views):
    model = method("moco", symmetric=symmetric)  # both encoders are alike still
    q1, q2 = (model.projector(model.backbone(view)) for view in views)
    k1, k2 = (model.keys(view) for view in views)
    queue = model.queue.clone()
    terms = [info_nce_loss(q1, k2, queue), info_nce_loss(q2, k1, queue)]
    expected = sum(terms) / 2 if symmetric else terms[0]
    assert float(model(*views).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    new = torch.cat([k2, k1] if symmetric else [k2])  # after the loss: no key is its own negative
    assert torch.allclose(model.queue[: len(new)], new, atol=1e-5) and int(model.cursor) == len(new)


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_weight_gets_a_gradient(name, views):
    model = method(name)
    model(*views).backward()
    for key, p in model.named_parameters():
        assert (p.grad is None) == key.startswith("key_"), key


@pytest.mark.parametrize(
    "name, settings", [("barlow", {}), ("simclr", {}), ("moco", {"symmetric": False, "queue_size": 512})]
)
def test_chance_loss_is_what_unrelated_embeddings_give(name, settings):
    g = torch.Generator().manual_seed(3)
    z1, z2 = torch.randn(2, 2048, 16, generator=g)
    model = method(name, **settings)
    if name == "moco":  # similarities near 0: a uniform guess
        loss = info_nce_loss(z1, z2, model.queue, temperature=100)
    else:
        loss = barlow_twins_loss(z1, z2) if name == "barlow" else nt_xent_loss(z1, z2, temperature=100)
    assert float(loss) == pytest.approx(model.chance_loss(2048), rel=0.01)


def test_moco_queue_takes_keys_after_the_loss_and_only_in_training(views):
    model = method("moco", queue_size=40)
    before = model.queue.clone()
    loss = float(model(*views).detach())
    assert int(model.cursor) == 32 and not torch.equal(model.queue[:32], before[:32])
    assert torch.equal(model.queue[32:], before[32:]), "rows behind the cursor stay"
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(40), atol=1e-5)
    model(*views)
    assert int(model.cursor) == 64 % 40, "the queue is a ring"
    same = method("moco", queue_size=40).eval()
    kept = same.queue.clone()
    same(*views)
    assert torch.equal(same.queue, kept), "validation batches stay out"
    assert loss < model.chance_loss(16) + 5


def test_of_more_keys_than_the_queue_holds_the_last_stay():
    model, keys = method("moco", queue_size=6), torch.eye(16)[:10]
    model.enqueue(keys)
    assert torch.equal(model.queue, keys[4:])


def test_moco_keys_are_normalised_in_groups(views):
    model = method("moco", splits=4, key_momentum=0.9)
    keys = model.keys(views[0])
    changed = views[0].clone()
    changed[8:] = changed[8:] * 2 + 1  # other groups: the first two groups of four must not notice
    assert torch.allclose(model.keys(changed)[:8], keys[:8], atol=1e-5)
    assert not torch.allclose(
        model.projector(model.backbone(changed))[:8], model.projector(model.backbone(views[0]))[:8], atol=1e-3
    )


def test_every_weight_of_the_key_encoder_follows_slowly_and_only_in_training(views):
    model = method("moco", key_momentum=0.9)
    keys = [*model.key_backbone.parameters(), *model.key_projector.parameters()]
    before = [weight.clone() for weight in keys]
    with torch.no_grad():
        for weight in [*model.backbone.parameters(), *model.projector.parameters()]:
            weight += 1
    model.eval()(*views)
    assert all(map(torch.equal, keys, before))
    model.train()(*views)
    assert all(torch.allclose(weight, old + 0.1, atol=1e-5) for weight, old in zip(keys, before))


def test_ranks_share_the_groups_of_moco(monkeypatch):
    monkeypatch.setattr(moco.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(moco.dist, "get_world_size", lambda: 2)
    model, seen = method("moco", splits=4), []
    model.key_backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    model.eval().keys(torch.randn(16, 3, 32, 32))
    assert seen == [8, 8], "the two ranks make the other two"


def test_chance_loss_of_moco_counts_the_queue_and_the_positive():
    assert method("moco", queue_size=40).chance_loss(16) == pytest.approx(math.log(41))


@pytest.mark.parametrize(("images", "splits"), [(57, 8), (13, 4), (21, 16), (3, 8), (8, 2)])
def test_no_group_of_moco_is_smaller_than_four_or_than_it_must(images, splits):
    model, seen = method("moco", splits=splits), []
    model.key_backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    model.eval().keys(torch.randn(images, 3, 32, 32))
    assert sum(seen) == images and len(seen) == max(1, min(splits, images // 4))
    assert min(seen) >= min(4, images) and max(seen) - min(seen) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moco_casts_its_key_weights_once_a_step_and_to_the_same_loss(dtype, views, monkeypatch):
    class Casts(TorchDispatchMode):
        """Shapes of what operators copied into another dtype."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                shapes.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    losses, casts, states = [], [], []
    for once in (moco.cast_once, lambda *modules: contextlib.nullcontext()):
        monkeypatch.setattr(moco, "cast_once", once)
        model, shapes = method("moco", splits=4), []
        for _ in range(2):
            enabled = dtype != torch.float32
            with torch.autocast("cpu", dtype, enabled=enabled), Casts():
                losses.append(model(*views).detach())
        casts.append(shapes.count(tuple(model.backbone.conv1.weight.shape)))
        states.append(model.state_dict())
    assert torch.equal(losses[0], losses[2]) and torch.equal(losses[1], losses[3])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]) and value.dtype == states[1][key].dtype, key
    # of two steps: the query's one cast serves both views; the key's would be made for 4 groups of 2 views
    assert casts == ([0, 0] if dtype == torch.float32 else [2, 2 * (1 + 8)])


def test_simsiam_predictor_is_a_bottleneck():
    shapes = [
        tuple(m.weight.shape)
        for m in method("simsiam", predictor_hidden=4).predictor
        if isinstance(m, torch.nn.Linear)
    ]
    assert shapes == [(4, 16), (16, 4)]


@pytest.mark.parametrize(
    "file, use",
    [
        ("losses/barlow.py", "from barlow import *; barlow_twins_loss(torch.randn(8, 4), torch.randn(8, 4))"),
        ("losses/simclr.py", "from simclr import *; nt_xent_loss(torch.randn(8, 4), torch.randn(8, 4))"),
        (
            "losses/moco.py",
            "from moco import *; info_nce_loss(torch.randn(8, 4), torch.randn(8, 4), torch.eye(4))",
        ),
        (
            "losses/simsiam.py",
            "from simsiam import *; negative_cosine_loss(torch.randn(8, 4), torch.randn(8, 4))",
        ),
        ("models/heads.py", "from heads import *; mlp([4, 8, 2])(torch.randn(8, 4))"),
        (
            "data/augment.py",
            "from augment import *; g = torch.Generator(); x = torch.zeros(2, 3, 40, 50, dtype=torch.uint8); "
            "assert view(x, draw(2, 40, 50, g), 32, (0.5,) * 3, (0.2,) * 3).shape == (2, 3, 32, 32)",
        ),
    ],
)
def test_works_when_copied_alone(file, use, tmp_path):
    shutil.copy(ROOT / file, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; {use}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name, setting",
    [
        ("barlow", {"lambda_": 0.5}),
        ("simclr", {"temperature": 0.9}),
        ("moco", {"temperature": 0.9}),
        ("moco", {"temperature": 0.9, "symmetric": False}),
    ],
)
def test_the_settings_of_a_loss_reach_it(name, setting, views):
    usual = {"symmetric": False} if "symmetric" in setting else {}
    with torch.no_grad():
        first, second = (float(method(name, **about).eval()(*views)) for about in (usual, setting))
    assert first != pytest.approx(second, rel=1e-4)


def test_the_losses_have_the_defaults_of_their_papers():
    z1, z2 = pair()
    queue = torch.nn.functional.normalize(pair(32, 8, seed=5)[0], dim=1)
    assert barlow_twins_loss(z1, z2) == barlow_twins_loss(z1, z2, lambda_=0.005)
    assert nt_xent_loss(z1, z2) == nt_xent_loss(z1, z2, temperature=0.5)
    assert info_nce_loss(z1, z2, queue) == info_nce_loss(z1, z2, queue, temperature=0.2)


def test_a_norm_takes_the_bias_before_it_and_the_last_one_learns_nothing():
    def learned(**norms):
        return " ".join(name for name, _ in mlp([6, 5, 4], **norms).named_parameters())

    assert learned() == "0.weight 1.weight 1.bias 3.weight 3.bias"
    assert learned(last_norm=True) == "0.weight 1.weight 1.bias 3.weight"
    assert learned(norm=False) == "0.weight 0.bias 2.weight 2.bias"


def test_projectors_have_the_norms_of_their_papers():
    norms = {"barlow": "LBRLBRL", "moco": "LRL", "simclr": "LBRLB", "simsiam": "LBRLBRLB"}
    for name, layers in norms.items():
        assert "".join(type(layer).__name__[0] for layer in method(name).projector) == layers, name

"""The views: each operator against torchvision on the same parameters, and how they are drawn."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from data import augment
from data.augment import (
    Draw,
    Recipe,
    color_jitter,
    draw,
    gaussian_blur,
    pack,
    random_boxes,
    resized_crop,
    unpack,
    view,
)
from data.loader import Plan, TorchLoader

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.1, 0.15)


def images(n=8, height=48, width=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=g)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("height, width, size", [(64, 64, 64), (100, 80, 32), (40, 50, 64)])
def test_crop_resize_and_flip(height, width, size):
    x, d = images(8, height, width).float() / 255, draw(8, height, width, generator())
    ours = resized_crop(x, d.box, d.flip, size)
    for i in range(8):
        expected = TF.resized_crop(x[i], *d.box[i].tolist(), [size, size], antialias=True)
        expected = TF.horizontal_flip(expected) if d.flip[i, 0] else expected
        expected = TF.vertical_flip(expected) if d.flip[i, 1] else expected
        assert torch.allclose(ours[i], expected, atol=1e-4)
    assert d.flip.any() and not d.flip.all()


@pytest.mark.parametrize(
    "operator, adjust", list(enumerate([TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]))
)
@pytest.mark.parametrize("dark", [1.0, 0.2])
def test_each_jitter_operator(operator, adjust, dark):
    x = images().float() / 255 * dark
    factor = torch.ones(8, 3)
    factor[:, operator] = torch.linspace(0.2, 1.8, 8)
    ours = color_jitter(x, factor, torch.tensor([[0, 1, 2]] * 8))
    for i in range(8):
        assert torch.allclose(ours[i], adjust(x[i], factor[i, operator].item()), atol=1e-5)


def test_jitter_keeps_each_images_own_order():
    x, d = images().float() / 255, draw(8, 48, 40, generator(1), Recipe(jitter=0.8, jitter_probability=1))
    ours = color_jitter(x, d.factor, d.order)
    assert len({tuple(o) for o in d.order.tolist()}) > 1
    for i in range(8):
        expected = x[i]
        for k in d.order[i].tolist():
            expected = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation][k](
                expected, d.factor[i, k].item()
            )
        assert torch.allclose(ours[i], expected, atol=1e-5)


@pytest.mark.parametrize("size, taps", [(64, 7), (96, 23)])
def test_blur(size, taps):
    x = images(4, size, size).float() / 255
    sigma = torch.tensor([0.0, 0.1, 0.9, 2.0])
    ours = gaussian_blur(x, sigma, taps)
    assert torch.equal(ours[0], x[0])
    for i in range(1, 4):
        assert torch.allclose(ours[i], TF.gaussian_blur(x[i], [taps, taps], [sigma[i].item()] * 2), atol=1e-5)


def test_view_is_normalised_channels_last_and_untouched_by_autocast():
    x, d = images(), draw(8, 48, 40, generator())
    plain = view(x, d, 32, MEAN, STD)
    with torch.autocast("cpu", torch.bfloat16):
        inside = view(x, d, 32, MEAN, STD)
    assert torch.equal(plain, inside) and plain.dtype == torch.float32
    assert plain.is_contiguous(memory_format=torch.channels_last) and plain.shape == (8, 3, 32, 32)
    identity = d._replace(
        box=torch.tensor([[0, 0, 48, 40]] * 8),
        flip=torch.zeros(8, 2, dtype=torch.bool),
        factor=torch.ones(8, 3),
        sigma=torch.zeros(8),
    )
    flat = view(torch.full_like(x, 51), identity, 32, MEAN, STD)
    assert torch.allclose(flat[0, :, 0, 0], (0.2 - torch.tensor(MEAN)) / torch.tensor(STD), atol=1e-5)


def test_crops_are_distributed_as_torchvisions():
    n = 4000
    ours = random_boxes(n, 60, 90, generator()).double()
    torch.manual_seed(0)  # torchvision draws from torch's own generator
    crop, blank = RandomResizedCrop(32, (0.2, 1)), [torch.zeros(3, 60, 90)]
    theirs = [crop.make_params(blank) for _ in range(n)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).double()
    for k in range(4):
        a, b = ours[:, k].sort()[0].numpy(), theirs[:, k].sort()[0].numpy()
        grid = np.unique(np.concatenate([a, b]))
        ks = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / n
        assert ks < 1.95 * (2 / n) ** 0.5, f"column {k}: Kolmogorov-Smirnov distance {ks}"  # p < 0.001 each
    assert (ours[:, 0] + ours[:, 2] <= 60).all() and (ours[:, 1] + ours[:, 3] <= 90).all()


def test_probabilities_and_ranges_of_the_recipe():
    n, d = 20000, draw(20000, 64, 64, generator())
    jittered, blurred = (d.factor != 1).any(1), d.sigma > 0
    for share, expected in ((jittered, 0.8), (blurred, 0.5), (d.flip[:, 0], 0.5), (d.flip[:, 1], 0.5)):
        assert float(share.float().mean()) == pytest.approx(
            expected, abs=4 * (expected * (1 - expected) / n) ** 0.5
        )
    factors, sigmas = d.factor[jittered], d.sigma[blurred]
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4 and abs(factors.mean() - 1) < 0.005
    assert 0.1 <= sigmas.min() < 0.12 and 1.98 < sigmas.max() <= 2.0
    assert np.bincount(d.order[:, 0], minlength=3).min() > 0.32 * n


def test_turns_come_last_and_change_no_other_number():
    sequence = [generator(3), generator(3)]
    plain, turned = (
        draw(500, 60, 50, g, Recipe(quarter_turns=turns)) for g, turns in zip(sequence, (False, True))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain[:5], turned[:5]))
    assert not plain.turn.any() and 200 < turned.turn.sum() < 300
    # a run without turns draws what it drew before there were any: numbers of an earlier version
    old = draw(2, 64, 64, generator(7))
    assert old.box.tolist() == [[14, 1, 45, 57], [4, 10, 49, 54]] and old.sigma.tolist() == pytest.approx(
        [1.3085295, 0], abs=1e-6
    )
    assert torch.rand(1, generator=sequence[0]) != torch.rand(1, generator=sequence[1])


def test_a_turned_view_is_the_transposed_view():
    x, d = images(6), draw(6, 48, 40, generator(2), Recipe(quarter_turns=True))
    assert d.turn.any() and not d.turn.all()
    plain, turned = (view(x, drawn, 32, MEAN, STD) for drawn in (d._replace(turn=None), d))
    for i in range(6):
        expected = plain[i].mT if d.turn[i] else plain[i]
        assert torch.allclose(turned[i], expected, atol=1e-5), i  # the blur sums in another order
    assert turned.is_contiguous(memory_format=torch.channels_last)


def test_turns_and_flips_give_the_eight_symmetries_equally_often():
    n = 4000
    recipe = Recipe(jitter_probability=0, blur_probability=0, quarter_turns=True)
    d = draw(n, 2, 2, generator(5), recipe)._replace(box=torch.tensor([[0, 0, 2, 2]]).repeat(n, 1))
    square = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8).expand(n, 3, 2, 2)
    views = (view(square, d, 2, (0,) * 3, (1 / 255,) * 3)[:, 0].flatten(1) + 0.5).int()
    seen, counts = views.unique(dim=0, return_counts=True)
    assert len(seen) == 8
    assert ((counts - n / 8).square() / (n / 8)).sum() < 24.3  # chi-square, 7 degrees of freedom, p > 0.001


def test_jitter_that_changes_nothing_costs_nothing(monkeypatch):
    x, d = images(4), draw(4, 48, 40, generator(), Recipe(jitter_probability=0))
    whole = view(x, d, 32, MEAN, STD)
    monkeypatch.setattr(augment, "color_jitter", lambda *a: pytest.fail("three turns for nothing"))
    assert torch.equal(view(x, d, 32, MEAN, STD), whole)
    identity = color_jitter(resized_crop(x / 255, d.box, d.flip, 32), d.factor, d.order)
    assert torch.allclose(identity, resized_crop(x / 255, d.box, d.flip, 32), atol=1e-6)


def test_packed_numbers_hold_the_draws():
    draws = [draw(9, 48, 40, generator(seed), Recipe(quarter_turns=True)) for seed in (0, 1)]
    rows = torch.randperm(2**24, generator=generator())[:9]
    packed = pack(draws, rows)
    assert packed.shape == (2, 9, 16) and packed.dtype == torch.float32 and packed.is_contiguous()
    for numbers, drawn in zip(packed, draws):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(unpack(numbers), drawn))
        assert numbers[:, augment.ROW].long().tolist() == rows.tolist()
        order, blurred = numbers[:, augment.BLURRED].long(), drawn.sigma.nonzero()[:, 0]
        assert torch.equal(order[: len(blurred)], blurred) and sorted(order.tolist()) == list(range(9))
    assert pack(draws)[1, :, augment.ROW].tolist() == list(range(9))
    assert not pack([Draw(*draws[0][:5])])[0, :, augment.TURN].any(), "a draw of five fields turns nothing"
    with pytest.raises(ValueError, match="2\\^24"):
        pack(draws, rows * 0 + 2**24)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_view_from_packed_numbers_is_the_view(share):
    """What a GPU computes: all numbers from the packed buffer, what runs decided by the draw on the CPU."""
    recipe = Recipe(jitter_probability=share, blur_probability=share, quarter_turns=True)
    x, d = images(6), draw(6, 48, 40, generator(4), recipe)
    numbers = pack([d])[0]
    here, blurred = unpack(numbers), numbers[:, augment.BLURRED].long()[: int((d.sigma > 0).sum())]
    y = resized_crop(x / 255, here.box, here.flip, 32)
    y = color_jitter(torch.where(here.turn[:, None, None, None], y.mT, y), here.factor, here.order)
    y = gaussian_blur(y, here.sigma, 3, blurred)
    y = (y - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(view(x, d, 32, MEAN, STD), y, atol=2e-6)


@pytest.mark.parametrize("images, batch, ranks", [(100, 32, 1), (100, 32, 2), (99, 33, 3), (64, 64, 1)])
def test_plan_shows_every_image_at_most_once_an_epoch_in_a_new_order(images, batch, ranks):
    plans = [Plan(images, batch, 8, 8, seed=1, rank=r, ranks=ranks) for r in range(ranks)]
    epochs = [[np.concatenate([rows for rows, *_ in p.epoch(e)]) for p in plans] for e in range(20)]
    for parts in epochs:
        seen = np.concatenate(parts)
        assert len(seen) == len(set(seen.tolist())) == plans[0].shown()
        assert images - plans[0].shown() < plans[0].steps() * ranks
    assert not np.array_equal(*(np.concatenate(parts) for parts in epochs[:2]))
    assert len({int(row) for parts in epochs for rows in parts for row in rows}) == images, (
        "none waits for ever"
    )
    sizes = {len(rows) for plan in plans for rows, *_ in plan.epoch(0)}
    assert sizes == {plans[0].largest()}, "one size of batch: a GPU tunes and compiles once"
    assert plans[0].largest() <= -(-batch // ranks)
    assert len(list(plans[0].epoch(0))) == plans[0].steps() == -(-images // batch)


def test_ranks_together_are_one_process():
    whole = list(Plan(96, 32, 48, 40, seed=4).epoch(3))
    shares = [list(Plan(96, 32, 48, 40, seed=4, rank=r, ranks=2).epoch(3)) for r in range(2)]
    for one, *parts in zip(whole, *shares):
        assert np.array_equal(one[0], np.concatenate([p[0] for p in parts]))
        for k in (1, 2):
            for field, *halves in zip(one[k], *(p[k] for p in parts)):
                assert torch.equal(field, torch.cat(halves))


def test_loader_goes_on_exactly_and_gives_new_crops_every_epoch():
    loader = TorchLoader(images(24), Plan(24, 8, 48, 40), 32, MEAN, STD, torch.device("cpu"))
    whole, tail = list(loader.epoch(1)), list(loader.epoch(1, start=2))
    assert len(whole) == 3 and len(tail) == 1 and all(torch.equal(a, b) for a, b in zip(whole[2], tail[0]))
    assert not torch.equal(whole[0][0], whole[0][1]), "two views of an image differ"
    first = {
        e: {int(r): d.box[i].tolist() for rows, d, _ in loader.plan.epoch(e) for i, r in enumerate(rows)}
        for e in (0, 1)
    }
    assert sum(first[0][r] != first[1][r] for r in range(24)) > 20


def test_seed_epoch_and_step_each_draw_anew():
    def first(seed, epoch, step):
        rows, drawn, _ = next(Plan(24, 8, 48, 40, seed=seed).epoch(epoch, step))
        return tuple(rows), tuple(map(tuple, drawn.box.tolist()))

    places = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    assert [len(set(part)) for part in zip(*(first(*place) for place in places))] == [4, 4]


def test_parts_of_a_step_are_of_one_size():
    plan = Plan(100, 32, 8, 8, parts=3)  # 25 images a step, but for the parts
    assert plan.largest() == 24 and {len(rows) for rows, *_ in plan.epoch(0)} == {24}


@pytest.mark.parametrize("height, width", [(8, 100), (100, 8)])
def test_where_no_crop_fits_the_central_one_is_taken(height, width):
    p = RandomResizedCrop(32, (0.9, 1)).make_params([torch.zeros(3, height, width)])
    ours = random_boxes(3, height, width, generator(), Recipe(area=(0.9, 1)))
    assert ours.tolist() == 3 * [[p["top"], p["left"], p["height"], p["width"]]]

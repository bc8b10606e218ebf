"""The DALI loader: the views of the torch loader, every file once an epoch, exact at any step, no copies."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, picture
from PIL import Image
from scipy.stats import ks_2samp

from data import augment
from data.augment import BRIGHTNESS, CONTRAST, SATURATION, Draw, Recipe, draw, view
from data.loader import Plan, TorchLoader
from data.pixels import load_pixels

dali = pytest.importorskip("data.dali", reason="NVIDIA DALI is not installed", exc_type=ImportError)

CPU = torch.device("cpu")
LEVELS = {"mean": [0, 0, 0], "std": [1 / 255] * 3}  # views in grey levels, 0-255
ODD_NAMES = [
    "a b.png",
    "50%_(+1.5,-2).png",
    "Île-de-France, été.png",
    "北京 #1&2;'q'.png",
    "sub dir/x=y[0]{1}.png",
]


class Fixed:
    """A plan of one step: all the images, both views drawn alike."""

    def __init__(self, drawn, height, width):
        self.drawn, self.height, self.width = drawn, height, width

    def steps(self):
        return 1

    def largest(self):
        return len(self.drawn.box)

    def epoch(self, epoch, start=0):
        yield np.arange(self.largest()), self.drawn, self.drawn


def still(n, height=40, width=48):
    """A draw that leaves n images as they are."""
    return Draw(
        torch.tensor([[0, 0, height, width]]).repeat(n, 1),
        torch.zeros(n, 2, dtype=torch.bool),
        torch.ones(n, 3),
        torch.arange(3).repeat(n, 1),
        torch.zeros(n),
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small operators, many of them: torch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pngs(tmp_path_factory):
    """Twelve pictures of 40 x 48, each darker than the one before, and their pixels (12, 3, 40, 48)."""
    root, rng = tmp_path_factory.mktemp("pngs"), np.random.default_rng(0)
    pixels = np.stack([picture(rng, 48)[:40] * (1 - i / 14) for i in range(12)]).astype(np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"{i}.png")
    return root, [f"{i}.png" for i in range(12)], torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """240 dark pictures of 32 px, lighter to the right and to the bottom, as JPEGs with subsampled chroma."""
    root, rng = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(1)
    slope = np.add.outer(np.arange(32) * 0.3, np.arange(32) * 0.6)[..., None]
    files = [f"{i}.jpg" for i in range(240)]
    for file in files:
        Image.fromarray((picture(rng, 32) * 0.2 + slope).astype(np.uint8)).save(
            root / file, quality=90, subsampling=2
        )
    return root, files, load_pixels(root, files, 32, 32, cache=root)


def difference(pngs, drawn, size):
    """|DALI - torch| of the twelve pictures in grey levels (12, 3, size, size)."""
    root, files, pixels = pngs
    loader = dali.DaliLoader(root, files, Fixed(drawn, 40, 48), size, **LEVELS, device=CPU, workers=1)
    ((ours, _),) = loader.epoch(0)
    return (ours - view(pixels, drawn, size, **LEVELS)).abs()


def jittered(order=(0, 1, 2), **factor):
    drawn = still(12)
    for name, values in factor.items():
        drawn.factor[:, {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION}[name]] = (
            values
        )
    return drawn._replace(order=torch.tensor(order).repeat(12, 1))


FACTORS = torch.linspace(0.5, 1.6, 12)
random = draw(12, 40, 48, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "drawn, size",
    [
        pytest.param(still(12)._replace(box=random.box), 48, id="crop and resize"),
        pytest.param(
            still(12)._replace(flip=torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).bool().repeat(3, 1)),
            48,
            id="flips",
        ),
        pytest.param(
            still(12)._replace(box=random.box, flip=random.flip, turn=torch.arange(12) % 3 == 0),
            48,
            id="quarter turns",
        ),
        pytest.param(jittered(brightness=FACTORS), 48, id="brightness"),
        pytest.param(jittered(contrast=FACTORS), 48, id="contrast"),
        pytest.param(jittered(saturation=FACTORS), 48, id="saturation"),
        pytest.param(
            jittered((2, 0, 1), brightness=FACTORS, contrast=FACTORS.flip(0), saturation=1.6),
            48,
            id="order 2 0 1",
        ),
        pytest.param(
            jittered((1, 2, 0), brightness=FACTORS, contrast=FACTORS.flip(0), saturation=1.6),
            48,
            id="order 1 2 0",
        ),
        pytest.param(still(12)._replace(sigma=torch.linspace(0, 2, 12)), 48, id="blur 5 taps"),
        pytest.param(still(12)._replace(sigma=torch.linspace(0, 2, 12)), 112, id="blur 11 taps"),
    ],
)
def test_each_operator_agrees_within_a_hundredth_of_a_level(pngs, drawn, size):
    assert difference(pngs, drawn, size).max() < 0.01


def test_shrinking_differs_at_the_border_only(pngs):
    # DALI repeats the last pixel under the wider filter, torch leaves out what lies beyond
    error = difference(pngs, still(12)._replace(box=random.box), 24)
    assert error[..., 2:-2, 2:-2].max() < 0.01 and error.max() < 16 and error.mean() < 0.25


def test_both_loaders_give_the_same_views(jpegs):
    root, files, pixels = jpegs
    plan = Plan(240, 64, 32, 32, seed=5)
    pairs = zip(
        dali.DaliLoader(root, files, plan, 32, **LEVELS, device=CPU, workers=2).epoch(3),
        TorchLoader(pixels, plan, 32, **LEVELS, device=CPU).epoch(3),
        strict=True,
    )
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 0.01
        assert (ours[0] - ours[1]).abs().mean() > 5  # and the two views of an image are two


def statistics(loader):
    """What the views of two epochs are like: name -> one number a view, of which each operator moves one."""
    x = torch.cat([v for epoch in range(2) for pair in loader.epoch(epoch) for v in pair]).mean(1)
    half = x.shape[-1] // 2
    energy = x.diff(dim=1).square().mean((1, 2)) + x.diff(dim=2).square().mean((1, 2))  # of the gradient
    return {
        "mean": x.mean((1, 2)),
        "std": x.std((1, 2)),
        "roughness": energy / x.var((1, 2)),
        "left - right": (x[..., :half] - x[..., half:]).mean((1, 2)),
        "top - bottom": (x[:, :half] - x[:, half:]).mean((1, 2)),
    }


def p_values(a, b):
    return {name: ks_2samp(a[name], b[name]).pvalue for name in a}


def test_views_are_drawn_alike_and_the_test_would_notice(jpegs, monkeypatch):
    root, files, pixels = jpegs

    def theirs(**change):
        return statistics(
            TorchLoader(
                pixels, Plan(240, 80, 32, 32, seed=2, recipe=Recipe(**change)), 32, **LEVELS, device=CPU
            )
        )

    ours = statistics(
        dali.DaliLoader(root, files, Plan(240, 80, 32, 32, seed=1), 32, **LEVELS, device=CPU, workers=2)
    )
    assert min(p_values(ours, theirs()).values()) > 0.01
    for statistic, change in {
        "left - right": {"flip": 0},
        "top - bottom": {"flip": 0},
        "roughness": {"blur_probability": 0},
        "mean": {"jitter_probability": 0},
        "std": {"area": (0.8, 1.0)},
    }.items():
        assert p_values(ours, theirs(**change))[statistic] < 1e-4, change

    def pivot_on_128(x, factor, order):
        brightness, contrast, _ = factor[..., None, None, None].unbind(1)
        return ((x * brightness - 0.5) * contrast + 0.5).clamp(0, 1)

    monkeypatch.setattr(augment, "color_jitter", pivot_on_128)
    assert p_values(ours, theirs())["mean"] < 1e-4


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """41 images, the k-th all of level 6 k, so that a view tells its file."""
    root = tmp_path_factory.mktemp("greys")
    for k in range(41):
        Image.new("RGB", (16, 16), (6 * k,) * 3).save(root / f"{k}.png")
    return root, [f"{k}.png" for k in range(41)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_file_once_an_epoch_in_a_new_order_over_all_ranks(greys, ranks):
    plain = Recipe(jitter_probability=0, blur_probability=0)
    plans = [Plan(41, 12, 16, 16, seed=1, rank=rank, ranks=ranks, recipe=plain) for rank in range(ranks)]
    loaders = [dali.DaliLoader(*greys, plan, 16, **LEVELS, device=CPU, workers=1) for plan in plans]
    orders = []
    for epoch in range(2):
        steps = [
            [(a.mean((1, 2, 3)) / 6, b.mean((1, 2, 3)) / 6) for a, b in loader.epoch(epoch)]
            for loader in loaders
        ]
        assert all(len(s) == plan.steps() for s, plan in zip(steps, plans, strict=True))
        seen = [a.round().int().tolist() for s in steps for a, b in s if torch.allclose(a, b, atol=1e-3)]
        orders.append(sum(seen, []))
        assert len(orders[-1]) == len(set(orders[-1])) == plans[0].shown()
    assert orders[0] != orders[1]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_any_step_on_gives_the_tail_of_the_epoch_bit_for_bit(jpegs):
    root, files, _ = jpegs
    plan = Plan(100, 17, 32, 32, seed=4)
    loader = dali.DaliLoader(root, files[:100], plan, 32, **LEVELS, device=CPU, workers=2)
    full = list(loader.epoch(1))
    assert len(full) == 6
    for start in (0, 2, 5, 6):
        assert equal(list(loader.epoch(1, start)), full[start:])
    for taken in (0, 1, 3):  # epochs given up midway leave nothing behind
        given_up = loader.epoch(7)
        for _ in range(taken):
            next(given_up)
        assert equal(list(loader.epoch(1, 3)), full[3:])
    again = dali.DaliLoader(root, files[:100], plan, 32, **LEVELS, device=CPU, workers=1)
    assert equal(list(again.epoch(1, 1)), full[1:])


def test_names_of_any_kind_and_the_cache_knows_them(tmp_path):
    (tmp_path / "sub dir").mkdir()
    for k, name in enumerate(ODD_NAMES):
        Image.new("RGB", (16, 16), (40 * k,) * 3).save(tmp_path / name)
    for cache_mb in (0, 64):
        loader = dali.DaliLoader(
            tmp_path,
            ODD_NAMES,
            Fixed(still(5, 16, 16), 16, 16),
            16,
            **LEVELS,
            device=CPU,
            workers=1,
            cache_mb=cache_mb,
        )
        ((a, _),) = loader.epoch(0)
        assert a.mean((1, 2, 3)).tolist() == [0, 40, 80, 120, 160]

    @dali.pipeline_def(batch_size=5, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decoded():
        paths = dali.fn.external_source(name="paths")
        return dali.fn.decoders.image(dali.fn.io.file.read(paths, dont_use_mmap=True))

    (images,) = decoded().run(paths=loader.files.encoded)
    assert [image.source_info() for image in images] == [str(tmp_path / name) for name in ODD_NAMES]


@pytest.mark.parametrize("training", [torch.float32, torch.float16, torch.bfloat16])
def test_handed_over_in_channels_last_without_a_copy_and_kept_while_held(jpegs, training):
    dtype = torch.float16 if training == torch.float16 else torch.float32  # DALI has no bfloat16
    root, files, _ = jpegs
    loader = dali.DaliLoader(
        root, files, Plan(240, 24, 32, 32), 32, **LEVELS, device=CPU, workers=2, dtype=training
    )
    run, pointers = loader.run.pipeline.run, []

    def recorded():
        batch = run()
        pointers.append([v.as_tensor().data_ptr() for v in batch])
        return batch

    loader.run.pipeline.run = recorded
    held, copies = [], []
    for pair in loader.epoch(0):
        held.append(pair)
        copies.append([v.clone() for v in pair])
        for v, pointer in zip(pair, pointers[-1], strict=True):
            assert (
                v.data_ptr() == pointer
                and v.dtype == dtype
                and v.is_contiguous(memory_format=torch.channels_last)
            )
    assert len(held) == 10 and equal(held, copies)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Pictures of the plan's 32 x 32 px, of twice that, of another shape, and of another width alone."""
    root, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    small = picture(rng, 32)
    double = np.kron(small, np.ones((2, 2, 1), np.uint8))
    files = {"own.png": small, "double.png": double, "wide.png": double.repeat(2, axis=1)}
    files["broad.png"] = small.repeat(2, axis=1)
    for name, array in files.items():
        Image.fromarray(array).save(root / name)
    return root, list(files)


def test_bare_images_are_those_of_the_decoder_of_pixels(jpegs):
    root, files, pixels = jpegs
    decoder = dali.DaliImages(root, files, 32, 32, largest=100, device=CPU, workers=2)
    steps = [np.arange(100), np.arange(239, 199, -1), np.array([7])]
    for _ in range(2):
        for rows, images in zip(steps, decoder.batches(iter(steps)), strict=True):
            assert images.dtype == torch.uint8 and torch.equal(images, pixels[rows])
        next(decoder.batches(iter(steps)))  # given up
    assert list(decoder.batches(iter(()))) == []


def test_images_of_another_size_are_scaled_as_a_whole(mixed):
    root, files = mixed
    decoder = dali.DaliImages(root, files, 32, 32, largest=4, device=CPU, workers=1)
    (images,) = decoder.batches(iter([np.arange(4)]))
    assert torch.equal(images[0], load_pixels(root, np.array(files), 32, 32, cache=root)[0])
    for other in images[1:]:
        assert (other.float() - images[0].float())[:, 2:-2, 2:-2].abs().mean() < 8
    drawn = still(4, 32, 32)._replace(box=torch.tensor([[8, 4, 16, 16]]).repeat(4, 1))
    loader = dali.DaliLoader(root, files, Fixed(drawn, 32, 32), 16, **LEVELS, device=CPU, workers=1)
    ((views, _),) = loader.epoch(0)
    for other in views[1:]:
        assert (views[0] - other)[:, 1:-1, 1:-1].abs().mean() < 8
    assert (views[0] - views[0].flip(-1)).abs().mean() > 8


@pytest.mark.parametrize("harm", ["removed", "cut", "emptied", "another format"])
def test_a_file_that_is_harmed_after_the_check_is_named(harm, greys, tmp_path):
    files = [f"{k}.png" for k in range(12)]
    for file in files:
        shutil.copy(greys[0] / file, tmp_path)
    plan = Plan(12, 4, 16, 16)
    loader = dali.DaliLoader(tmp_path, files, plan, 16, **LEVELS, device=CPU, workers=1)
    assert len(list(loader.epoch(0))) == 3
    harmed = tmp_path / files[next(plan.rows(1))[0]]  # of the first step: DALI has then asked for others
    if harm == "removed":
        harmed.unlink()
    elif harm == "another format":
        Image.new("1", (16, 16)).save(harmed, format="TIFF")
    else:
        with harmed.open("r+b") as file:
            file.truncate(40 if harm == "cut" else 0)
    with pytest.raises(OSError) as raised:
        list(loader.epoch(1))
    assert raised.value.filename == str(harmed) and "since it was checked" in raised.value.strerror
    assert isinstance(raised.value, FileNotFoundError) == (harm == "removed")


def test_the_graph_for_a_gpu_can_be_put_together_without_one(greys):
    loader = dali.DaliLoader(
        *greys,
        Plan(41, 12, 16, 16),
        16,
        **LEVELS,
        device=torch.device("cuda", 0),
        dtype=torch.float16,
        cache_mb=8,
    )
    assert loader.run.pipeline.device_id == 0
    assert dali.Files(*greys, torch.device("cuda", 1), 0).device_id() == 1  # of the second rank


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("cache_mb", [0, 64])
def test_the_gpu_gives_the_views_of_the_cpu(jpegs, cache_mb):
    root, files, pixels = jpegs
    plan = Plan(240, 64, 32, 32, seed=5)
    loader = dali.DaliLoader(root, files, plan, 32, **LEVELS, device=torch.device("cuda"), cache_mb=cache_mb)
    for epoch in range(3):  # from the second on out of the cache
        pairs = list(loader.epoch(epoch))
        for ours, theirs in zip(
            pairs, TorchLoader(pixels, plan, 32, **LEVELS, device=CPU).epoch(epoch), strict=True
        ):
            for a, b in zip(ours, theirs, strict=True):
                assert a.is_cuda and a.is_contiguous(memory_format=torch.channels_last)
                # nvJPEG rounds otherwise
                assert (a.cpu() - b).abs().mean() < 1 and (a.cpu() - b).abs().max() < 24


def test_copies_alone(greys, tmp_path):
    shutil.copy(ROOT / "data" / "dali.py", tmp_path)
    (tmp_path / "use.py").write_text(f"""
import sys, numpy, torch
from dali import DaliLoader

class Plan:
    height = width = 16
    def steps(self): return 2
    def largest(self): return 3
    def epoch(self, epoch, start=0):
        for step in range(start, 2):
            n = 3 - step
            draw = (torch.tensor([[0, 0, 16, 16]] * n), torch.zeros(n, 2, dtype=torch.bool), torch.ones(n, 3),
                    torch.tensor([[0, 1, 2]] * n), torch.zeros(n))
            yield numpy.arange(n), draw, draw

files = ["1.png", "2.png", "3.png"]
root = {str(greys[0])!r}
loader = DaliLoader(root, files, Plan(), 8, [0] * 3, [1 / 255] * 3, torch.device("cpu"), workers=1)
print([a.mean((1, 2, 3)).tolist() for a, b in loader.epoch(0)], "data" in sys.modules)
""")
    run = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.strip() == "[[6.0, 12.0, 18.0], [6.0, 12.0]] False", run.stderr


def test_no_other_file_imports_dali():
    sources = [
        f
        for f in ROOT.rglob("*.py")
        if "tests" not in f.parts and not any(p.startswith(".") for p in f.parts)
    ]
    importing = [
        f.relative_to(ROOT).as_posix()
        for f in sources
        if re.search(r"^\s*(from|import) nvidia", f.read_text(), re.M)
    ]
    assert importing == ["data/dali.py"]

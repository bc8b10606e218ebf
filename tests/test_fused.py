"""The fused views: equal to torch's in Triton's interpreter, compiled for three kinds of GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data.augment import BRIGHTNESS, CONTRAST, SATURATION, Draw, Recipe, draw, pack, view

triton = pytest.importorskip("triton", reason="Triton is not installed")
from data import fused  # noqa: E402  (after the skip)

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.1, 0.15)
ALL = Recipe(jitter_probability=1, blur_probability=0.6, quarter_turns=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def interpreted():
    """data/fused.py once more, its kernels run by Triton's interpreter on the CPU."""
    spec = importlib.util.spec_from_file_location("data.fused_interpreted", ROOT / "data" / "fused.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
        module.TILE = 32  # fewer programs, each of which takes the interpreter as long as a small one
        yield module


def images(n, height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=g)


def drawn(n, height, width, recipe=ALL, seed=0):
    return draw(n, height, width, torch.Generator().manual_seed(seed), recipe)


def still(n, height, width):
    """A draw that leaves n images as they are."""
    return Draw(
        torch.tensor([[0, 0, height, width]]).repeat(n, 1),
        torch.zeros(n, 2, dtype=torch.bool),
        torch.ones(n, 3),
        torch.arange(3).repeat(n, 1),
        torch.zeros(n),
        torch.zeros(n, dtype=torch.bool),
    )


def agree(module, x, d, size, tolerance=1e-5):
    ours, expected = module.fused_view(x, d, size, MEAN, STD), view(x, d, size, MEAN, STD)
    assert ours.shape == expected.shape and ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(ours, expected, atol=tolerance, rtol=0), float((ours - expected).abs().max())


@pytest.mark.parametrize(
    "n, height, width, size",
    [
        pytest.param(4, 24, 24, 24, id="as large"),
        pytest.param(3, 16, 12, 40, id="enlarged"),
        pytest.param(2, 70, 45, 17, id="shrunk"),
        pytest.param(1, 20, 33, 16, id="one"),
    ],
)
def test_equals_torch_on_all_operators(interpreted, monkeypatch, n, height, width, size):
    monkeypatch.setattr(interpreted, "TILE", fused.TILE)
    d = drawn(n, height, width)
    assert (d.factor != 1).all() and len(d.order.unique(dim=0)) > min(n, 2) - 1
    agree(interpreted, images(n, height, width), d, size)


@pytest.mark.parametrize("blur", [0.0, 1.0])
@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_edges_of_the_recipe(interpreted, blur, jitter):
    recipe = Recipe(jitter_probability=jitter, blur_probability=blur, quarter_turns=True)
    d = drawn(3, 20, 24, recipe, seed=3)
    assert (d.sigma > 0).all() == bool(blur) and (d.factor != 1).any() == bool(jitter)
    agree(interpreted, images(3, 20, 24), d, 20)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("flip", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_eight_symmetries(interpreted, flip, turn):
    flips = torch.tensor([flip]).bool()
    d = still(1, 18, 18)._replace(flip=flips, turn=torch.tensor([turn]))
    x = images(1, 18, 18)
    expected = x.flip([3] * flip[0] + [2] * flip[1])
    expected = (expected.mT if turn else expected) / 255
    ours = interpreted.fused_view(x, d, 18, (0, 0, 0), (1, 1, 1))
    assert torch.allclose(ours, expected, atol=1e-6)


def test_every_order_of_the_jitter(interpreted):
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    factor = torch.tensor([[1.6, 0.5, 1.7]]).repeat(6, 1)
    factor[1, BRIGHTNESS], factor[2, CONTRAST], factor[3, SATURATION] = 1, 1, 1
    d = still(6, 12, 12)._replace(order=torch.tensor(orders), factor=factor)
    x = images(6, 12, 12)
    agree(interpreted, x, d, 12)
    same = interpreted.fused_view(x[:1].repeat(6, 1, 1, 1), d, 12, MEAN, STD)
    assert len(same.flatten(1).unique(dim=0)) == 6


def test_grey_sums_that_nobody_wrote_do_no_harm(interpreted, monkeypatch):
    """Of an image without contrast they are what the memory held before, and 0 times NaN is NaN."""
    empty, factor = torch.empty, torch.ones(2, 3)
    factor[0, CONTRAST] = 0.5
    monkeypatch.setattr(torch, "empty", lambda *shape, **about: empty(*shape, **about).fill_(torch.nan))
    agree(interpreted, images(2, 12, 12), still(2, 12, 12)._replace(factor=factor), 12)


def test_a_wide_blur_is_cut_where_torch_cuts_it(interpreted):
    """At 60 pixels the window has 7 taps, far less than sigma 2 asks for; at 0.1 nearly all is one tap."""
    d = still(2, 30, 30)._replace(sigma=torch.tensor([2.0, 0.1]), turn=torch.tensor([True, False]))
    agree(interpreted, images(2, 30, 30), d, 60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_training(interpreted, dtype):
    x, d = images(3, 20, 20), drawn(3, 20, 20)
    ours, expected = interpreted.fused_view(x, d, 20, MEAN, STD, dtype), view(x, d, 20, MEAN, STD)
    assert ours.dtype == dtype and (d.sigma > 0).any() and (d.sigma == 0).any()
    # the interpreter cuts where a GPU rounds: one step of the dtype instead of half
    step = torch.finfo(dtype).eps
    assert ((ours.float() - expected).abs() <= step * expected.abs() + 1e-5).all()


def test_rows_of_a_larger_tensor_of_any_strides(interpreted):
    pixels, rows, d = images(9, 12, 14), torch.tensor([7, 0]), drawn(2, 12, 14)
    expected = view(pixels[rows], d, 16, MEAN, STD)
    hwc = pixels.contiguous(memory_format=torch.channels_last)  # as decoders give them
    for source in (pixels, hwc):
        ours = interpreted.fused_view(source, d, 16, MEAN, STD, rows=rows)
        assert torch.allclose(ours, expected, atol=1e-5)
        packed = pack([d, d], rows)[1]
        assert torch.equal(interpreted.fused_view(source, d, 16, MEAN, STD, numbers=packed), ours)


def test_no_images_give_no_views(interpreted):
    empty = interpreted.fused_view(images(0, 8, 8), still(0, 8, 8), 8, MEAN, STD)
    assert empty.shape == (0, 3, 8, 8)


POINTERS = {"images": "*u8", "out": "*bf16"}
BLUR = {"SIZE": 224, "ROWS": fused.BLUR[0], "COLUMNS": fused.BLUR[1], "LIMIT": 11, "REACH": 5}
KERNELS = {
    "grey": ("grey_kernel", {"SIZE": 224, "TILE": fused.TILE}),
    "view": ("view_kernel", {"SIZE": 224, "TILE": fused.TILE, "PADDED": 256}),
    "blur down": ("blur_kernel", BLUR | {"FIRST": True}),
    "blur across": ("blur_kernel", BLUR | {"FIRST": False}),
}


def compiled(name, capability):
    """The machine code of a kernel for 224 pixels and bfloat16, made without a GPU."""
    function, constants = KERNELS[name]
    function = getattr(fused, function)
    signature = {}
    for parameter in function.arg_names:
        kind = POINTERS.get(parameter, "*fp32")
        kind = "*bf16" if name == "blur across" and parameter == "target" else kind
        kind = "i32" if parameter.startswith("stride") else kind
        kind = "fp32" if parameter.startswith(("mean", "scale")) else kind
        signature[parameter] = "constexpr" if parameter in constants else kind
    places = {(function.arg_names.index(key),): value for key, value in constants.items()}
    source = triton.compiler.ASTSource(function, signature, places)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": fused.BLUR[2] if function is fused.blur_kernel else fused.WARPS}
    try:
        return triton.compile(source, target=target, options=options).asm["cubin"]
    except Exception as error:
        if re.search("ptxas|gpu-name|not supported|unsupported", f"{error}"):
            pytest.skip(f"this Triton does not compile for sm_{capability}: {str(error).splitlines()[0]}")
        raise


@pytest.mark.parametrize("capability", [70, 80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_local_memory(name, capability, tmp_path):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(compiled(name, capability))
    done = subprocess.run(
        [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= 80, used  # of 65,536, so that at least 24 warps share a multiprocessor


def test_predicted_bytes_are_those_of_the_tensors():
    size, recipe = 32, Recipe(area=(1, 1), jitter_probability=1, blur_probability=1)
    cost = fused.costs(size, 20, 24, 2, recipe)
    pixels, scratch, views = images(1, 20, 24), torch.empty(3, size, size), torch.empty(3, size, size).half()
    assert cost["grey"].read == cost["view"].read - 4 * 4 == pixels.nbytes
    assert cost["view"].written == cost["blur down"].written == cost["blur across"].read == scratch.nbytes
    assert cost["blur across"].written == views.nbytes
    paper = fused.costs(224, 224, 224)
    assert sum(c.read + c.written for c in paper.values()) == pytest.approx(1.67e6, rel=0.01)
    assert sum(c.instructions for c in paper.values()) / 224**2 == pytest.approx(608, rel=0.02)


def test_not_available_without_cuda_or_where_it_fails(monkeypatch):
    assert not fused.available(CPU)
    monkeypatch.setattr(fused, "triton", None)
    fused.available.cache_clear()
    assert not fused.available(torch.device("cuda"))


def test_a_failure_or_a_wrong_view_is_said_and_torch_goes_on(monkeypatch):
    fused.available.cache_clear()

    def broken(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(fused, "check_driver", lambda: None)
    monkeypatch.setattr(fused, "disagreement", broken)
    with pytest.warns(UserWarning, match="no driver"):
        assert not fused.available(torch.device("cuda", 1))
    for worst, fine in ((1e-6, True), (0.01, False), (float("nan"), False)):
        fused.available.cache_clear()
        monkeypatch.setattr(fused, "disagreement", lambda device, worst=worst: worst)
        if fine:
            assert fused.available(torch.device("cuda", 1))
        else:
            with pytest.warns(UserWarning, match="off by"):
                assert not fused.available(torch.device("cuda", 1))
    fused.available.cache_clear()


def test_a_driver_that_would_crash_triton_is_not_tried(monkeypatch):
    fused.available.cache_clear()
    monkeypatch.setattr(fused.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(fused, "disagreement", lambda device: pytest.fail("a kernel was started"))
    with pytest.warns(UserWarning, match="cuLaunchKernelEx"):
        assert not fused.available(torch.device("cuda", 1))
    fused.available.cache_clear()


def test_the_first_call_sees_a_wrong_kernel(interpreted, monkeypatch):
    assert interpreted.disagreement(CPU) < 1e-5
    monkeypatch.setattr(interpreted, "REACH", 0.1)
    assert interpreted.disagreement(CPU) > 1e-3


def test_copies_alone_with_augment_beside_it_even_without_triton(tmp_path):
    for file in ("fused.py", "augment.py"):
        shutil.copy(ROOT / "data" / file, tmp_path)
    code = """
import sys, torch, fused
assert fused.triton and callable(fused.fused_view) and not fused.available(torch.device("cpu"))
del sys.modules["fused"]
sys.modules["triton"] = None  # as if it were not installed
import fused
assert fused.triton is None and not fused.available(torch.device("cuda"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side, size", [(64, 64), (64, 224), (600, 224)])
def test_on_a_gpu_the_kernels_give_the_views_of_the_cpu(side, size, dtype):
    device = torch.device("cuda")
    assert fused.available(device)
    x, d = images(16, side, side), drawn(16, side, side)
    first, second = (fused.fused_view(x.to(device), d, size, MEAN, STD, dtype) for _ in range(2))
    assert torch.equal(first, second), "the same draw gives the same bits"
    expected = view(x, d, size, MEAN, STD)
    step = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    # a position among 600 pixels is held to 6e-5 in float32; the differences of noise are divided by std
    assert ((first.cpu().float() - expected).abs() <= step * expected.abs() + 1e-3).all()

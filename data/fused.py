"""Random views on a GPU by three Triton kernels: those of `augment.view`, for a part of its memory traffic.

    from augment import draw, view
    from fused import available, fused_view

    make = fused_view if available(images.device) else view
    view1 = make(images, draw(len(images), *images.shape[-2:], generator), 224, mean, std)

The same arguments and draws give the same views, in the dtype of training if asked for. The first kernel
makes the grey means that contrast needs; the second gathers, crops, flips, resizes, jitters, normalises and
turns; the third blurs downwards and transposes, and so runs twice. Every number lies in the packed buffer of
`augment.pack`, so nothing here waits for the GPU, sums are taken in a fixed order, and the same draw gives
the same bits every time. Needs torch, Triton (without which `available` says no) and augment.py beside it.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # as on a machine without CUDA
    triton = tl = None

try:
    from .augment import CONTRAST, Draw, Recipe, draw, pack, view
except ImportError:  # copied alone, outside a package
    from augment import CONTRAST, Draw, Recipe, draw, pack, view

TILE = 16  # a program makes TILE x TILE pixels of one view
WARPS = 2  # of 32 threads a program, so that a thread makes four pixels and shares what they have in common
BLUR = (16, 32, 4)  # rows and columns that a program of the blur makes, and its warps: the fastest on an H100
REACH = 5  # of the blur, in sigmas: less than 1e-6 of the kernel lies beyond, and a grey level is 4e-3


@lru_cache(maxsize=8)
def available(device: torch.device) -> bool:
    """Whether `fused_view` works here: Triton and CUDA are there, and four views agree with those of torch.

    Tried once a device and process; where something fails, a warning says what, and the answer is no. It is
    no too under a TorchDispatchMode, as of fake tensors or operator counts: such a mode sees torch's
    operators alone.
    """
    if triton is None or device.type != "cuda" or torch._C._len_torch_dispatch_stack():
        return False
    try:
        check_driver()
        worst = disagreement(device)
    except Exception as error:  # a driver, a compiler or a card that does not work with this Triton
        warnings.warn(f"torch makes the views, as Triton fails on {device}: {error}", stacklevel=2)
        return False
    if not worst < 1e-4:
        warnings.warn(f"torch makes the views, as the fused ones are off by {worst:.2g}", stacklevel=2)
        return False
    return True


def check_driver() -> None:
    """RuntimeError if the driver lacks a call that Triton makes unchecked, and would crash in."""
    if not hasattr(ctypes.CDLL("libcuda.so.1"), "cuLaunchKernelEx"):
        raise RuntimeError("the driver has no cuLaunchKernelEx, which came with CUDA 11.8: update it")


def disagreement(device: torch.device) -> float:
    """Largest difference, in units of the range 0-1, between four fused views and torch's on the CPU."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 24, 20), dtype=torch.uint8, generator=generator)
    recipe = Recipe(jitter_probability=1, sigma=(1, 2), blur_probability=0.75, quarter_turns=True)
    drawn, plain = draw(4, 24, 20, generator, recipe), ((0.0,) * 3, (1.0,) * 3)
    fused = fused_view(images.to(device), drawn, 40, *plain)
    return float((fused.cpu() - view(images, drawn, 40, *plain)).abs().max())


def fused_view(
    images: torch.Tensor,
    draw: Draw,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    rows: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None,
) -> torch.Tensor:
    """One view of uint8 images (N, 3, H, W): (n, 3, size, size) of `dtype` in channels_last, normalised.

    mean and std are three numbers each, in units of the range 0-1. With `rows` (n,), the views are those of
    these rows of the images, which need no copy of their own; without, N = n. Any strides will do.

    `numbers` (n, 16) are the draw and the rows as `pack` laid them out, already on the images' device;
    without them they are packed and copied here. The draw itself, on the CPU, tells which kernels are needed
    and how many images are to be blurred.
    """
    if numbers is None:
        numbers = pack([draw], rows, pin=images.is_cuda)[0].to(images.device, non_blocking=True)
    n, tiles = len(numbers), triton.cdiv(size, TILE) ** 2
    contrasted = bool((draw.factor[:, CONTRAST] != 1).any())
    blurred = int((draw.sigma > 0).sum())
    out = torch.empty(n, size, size, 3, dtype=dtype, device=images.device)
    sums = torch.empty(n, tiles, device=images.device)  # of grey, a tile each
    scratch = torch.empty(2, blurred, 3, size, size, device=images.device)
    normal = [*(float(v) for v in mean), *(1 / float(v) for v in std)]
    with torch.cuda.device_of(images):
        if contrasted and n:
            grey_kernel[tiles, n](images, numbers, sums, *images.stride(), size, TILE, num_warps=WARPS)
        if n:
            view_kernel[tiles, n](
                images,
                numbers,
                sums,
                out,
                scratch,
                *normal,
                *images.stride(),
                size,
                TILE,
                triton.next_power_of_2(tiles),
                num_warps=WARPS,
            )
        if blurred:
            height, columns, warps = BLUR
            limit = size // 20  # of augment's window, which has size // 10 taps, or one more
            grid = triton.cdiv(size, height) * triton.cdiv(size, columns), blurred
            blur = partial(blur_kernel[grid], num_warps=warps)
            blur(scratch[0], numbers, scratch[1], size, height, columns, limit, REACH, True)
            blur(scratch[1], numbers, out, size, height, columns, limit, REACH, False)
    return out.permute(0, 3, 1, 2)


class Cost(NamedTuple):
    """What a kernel does for one view of one image, on average."""

    read: float  # bytes of memory, each counted once: what is read again comes from the caches
    written: float  # bytes
    instructions: float  # of a thread


def costs(
    size: int, height: int, width: int, itemsize: int = 2, recipe: Recipe = Recipe()
) -> dict[str, Cost]:
    """Predicted cost of each kernel for images of height x width and views of `itemsize` bytes a number.

    Instructions are counted in the machine code for sm_90, with crops no larger than the view, whose pixels
    take 2 x 2 taps; the numbers of bytes need no machine. None of it is a measured time.
    """
    pixels, tiles = size**2, -(-size // TILE) * -(-size // TILE)
    crop = 3 * height * width * sum(recipe.area) / 2
    contrast, blur = recipe.jitter_probability, recipe.blur_probability
    planes, sharp = 3 * 4 * pixels, 3 * itemsize * pixels
    low, high = recipe.sigma
    sigmas = torch.linspace(low, high, 1001)
    radius = float((REACH * sigmas).ceil().clamp(max=size // 20).mean())
    return {
        "grey": Cost(contrast * crop, contrast * 4 * tiles, contrast * 204 * pixels),
        "view": Cost(crop + contrast * 4 * tiles, (1 - blur) * sharp + blur * planes, 297 * pixels),
        "blur down": Cost(blur * planes, blur * planes, blur * (41 + 17 * radius) * pixels),
        "blur across": Cost(blur * planes, blur * sharp, blur * (59 + 17 * radius) * pixels),
    }


def kernel(function: Callable) -> Callable:
    """Compile a function for the GPU when it is first called; without Triton it is never called."""
    return function if triton is None else triton.jit(function)


# In the kernels `own` points to the 16 numbers of one image: box 0-3, flips 4-5, turn 6, factors 7-9,
# order 10-12, sigma 13, row 14. Column 15 is a list of all images that begins with those to be blurred:
# programs work for the place-th of the list, whose scratch is the place-th. `row` (TILE, 1) and `column`
# (1, TILE) count before the turn, so that neighbouring threads read neighbouring pixels; the store turns.


@kernel
def grey_kernel(
    images,
    numbers,
    sums,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum of each tile's grey at the contrast's turn; images without contrast are left out."""
    image = tl.program_id(1)
    own = numbers + image * 16
    if tl.load(own + 8) != 1:
        row, column, inside = pixels_of(SIZE, TILE, TILE)
        red, green, blue = resampled(images, own, row, column, stride_n, stride_c, stride_h, stride_w, SIZE)
        before = 1.0  # until the contrast's turn
        for turn in tl.static_range(3):
            operator = tl.load(own + 10 + turn).to(tl.int32)
            before = tl.where(operator == 1, 0.0, before)
            factor = before * tl.load(own + 7 + operator) + (1 - before)
            red, green, blue = blended(red, green, blue, operator, factor, 0.0)
        grey = 0.2989 * red + 0.587 * green + 0.114 * blue
        total = tl.reduce(tl.where(inside, grey, 0.0), None, added)
        tl.store(sums + image * tl.num_programs(0) + tl.program_id(0), total)


@kernel
def view_kernel(
    images,
    numbers,
    sums,
    out,
    scratch,
    mean_red,
    mean_green,
    mean_blue,
    scale_red,
    scale_green,
    scale_blue,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """All of the view but the blur: sharp images into `out`, those to be blurred unturned into `scratch`."""
    place = tl.program_id(1)
    image = tl.load(numbers + place * 16 + 15).to(tl.int32)
    own = numbers + image * 16
    row, column, inside = pixels_of(SIZE, TILE, TILE)
    red, green, blue = resampled(images, own, row, column, stride_n, stride_c, stride_h, stride_w, SIZE)

    tiles = tl.arange(0, PADDED)
    greys = tl.load(sums + image * tl.num_programs(0) + tiles, mask=tiles < tl.num_programs(0), other=0.0)
    mean_grey = tl.reduce(greys, 0, added) / (SIZE * SIZE)
    mean_grey = tl.where(tl.load(own + 8) == 1, 0.0, mean_grey)  # without contrast nobody wrote the sums
    for turn in tl.static_range(3):
        operator = tl.load(own + 10 + turn).to(tl.int32)
        factor = tl.load(own + 7 + operator)
        red, green, blue = blended(red, green, blue, operator, factor, mean_grey)

    red = (red - mean_red) * scale_red
    green = (green - mean_green) * scale_green
    blue = (blue - mean_blue) * scale_blue
    if tl.load(own + 13) > 0:
        store_planes(scratch, place, row, column, inside, red, green, blue, SIZE)
    else:
        store_view(out, image, tl.load(own + 6), row, column, inside, red, green, blue, SIZE)


@kernel
def blur_kernel(
    source,
    numbers,
    target,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LIMIT: tl.constexpr,
    REACH: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Blur downwards, reflected at the borders, and transpose: once into scratch, again into the view."""
    place = tl.program_id(1)
    image = tl.load(numbers + place * 16 + 15).to(tl.int32)
    own = numbers + image * 16
    sigma = tl.load(own + 13)
    if sigma > 0:
        row, column, inside = pixels_of(SIZE, ROWS, COLUMNS)
        plane = source + place.to(tl.int64) * (3 * SIZE * SIZE) + column
        red, green, blue = loaded(plane, row, inside, SIZE)
        total = 1.0
        slope = -0.5 * 1.4426950408889634 / (sigma * sigma)  # as exp2 is the exponential that a GPU has
        radius = tl.minimum(tl.ceil(REACH * sigma).to(tl.int32), LIMIT)
        for offset in range(1, radius + 1):
            weight = tl.exp2(slope * (offset * offset))
            above, below = tl.abs(row - offset), SIZE - 1 - tl.abs(SIZE - 1 - row - offset)
            red_above, green_above, blue_above = loaded(plane, above, inside, SIZE)
            red_below, green_below, blue_below = loaded(plane, below, inside, SIZE)
            red += weight * (red_above + red_below)
            green += weight * (green_above + green_below)
            blue += weight * (blue_above + blue_below)
            total += 2 * weight
        scale = 1 / total
        red, green, blue = red * scale, green * scale, blue * scale
        if FIRST:
            store_planes(target, place, column, row, inside, red, green, blue, SIZE)
        else:
            turned = tl.load(own + 6)
            store_view(target, image, turned, column, row, inside, red, green, blue, SIZE)


@kernel
def loaded(plane, row, inside, SIZE: tl.constexpr):
    """Red, green, blue of a row of each pixel's column, of float32 (3, SIZE, SIZE)."""
    pixel = plane + row * SIZE
    red = tl.load(pixel, mask=inside)
    green = tl.load(pixel + SIZE * SIZE, mask=inside)
    blue = tl.load(pixel + 2 * SIZE * SIZE, mask=inside)
    return red, green, blue


@kernel
def added(a, b):
    """How sums are joined in `tl.reduce`."""
    return a + b


@kernel
def pixels_of(SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row (ROWS, 1) and column (1, COLUMNS) of the program's pixels, and which of them lie in the view."""
    across = (SIZE + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < SIZE) & (column < SIZE)


@kernel
def resampled(images, own, row, column, stride_n, stride_c, stride_h, stride_w, SIZE: tl.constexpr):
    """Red, green, blue in 0-1, cropped, flipped and resized by the filter of `augment.resize_matrix`."""
    top, left = tl.load(own), tl.load(own + 1)
    bottom, right = top + tl.load(own + 2) - 1, left + tl.load(own + 3) - 1  # the last row and column
    y, reach_y = centre_of(row, top, bottom, tl.load(own + 5), SIZE)
    x, reach_x = centre_of(column, left, right, tl.load(own + 4), SIZE)
    first_y, first_x = tl.floor(y - reach_y) + 1, tl.floor(x - reach_x) + 1
    slope_y, slope_x = 1 / reach_y, 1 / reach_x
    image = images + tl.load(own + 14).to(tl.int64) * stride_n
    red = tl.full([row.shape[0], column.shape[1]], 0, tl.float32)
    green, blue, total = red, red, red
    for i in range(0, tl.ceil(2 * reach_y).to(tl.int32)):
        source_y, weight_y = tap_of(first_y + i, y, slope_y, top, bottom)
        for j in range(0, tl.ceil(2 * reach_x).to(tl.int32)):
            source_x, weight_x = tap_of(first_x + j, x, slope_x, left, right)
            weight = weight_y * weight_x
            pixel = image + (source_y * stride_h + source_x * stride_w)
            red += weight * tl.load(pixel).to(tl.float32)
            green += weight * tl.load(pixel + stride_c).to(tl.float32)
            blue += weight * tl.load(pixel + 2 * stride_c).to(tl.float32)
            total += weight
    scale = 1 / (255 * total)
    return red * scale, green * scale, blue * scale


@kernel
def centre_of(target, first, last, flip, SIZE: tl.constexpr):
    """Where the centre of `target` lies, in source pixels (whole: on one), and how far its triangle goes."""
    target = tl.minimum(target, SIZE - 1)  # in a tile that juts out of the view
    target = tl.where(flip > 0, SIZE - 1 - target, target)
    step = (last - first + 1) / SIZE
    return first + (target + 0.5) * step - 0.5, tl.maximum(step, 1.0)


@kernel
def tap_of(source, centre, slope, first, last):
    """Index of a source pixel, within the crop, and its weight, 0 outside the crop."""
    within = tl.minimum(tl.maximum(source, first), last)
    weight = tl.maximum(1 - tl.abs(source - centre) * slope, 0.0)
    return within.to(tl.int32), tl.where(within == source, weight, 0.0)


@kernel
def blended(red, green, blue, operator, factor, mean_grey):
    """One turn of the jitter: a blend with black (operator 0), the mean grey (1) or the pixel's grey (2)."""
    grey = 0.2989 * red + 0.587 * green + 0.114 * blue
    reference = tl.where(operator == 2, grey, tl.where(operator == 1, mean_grey, 0.0)) * (1 - factor)
    red = tl.minimum(tl.maximum(red * factor + reference, 0.0), 1.0)
    green = tl.minimum(tl.maximum(green * factor + reference, 0.0), 1.0)
    blue = tl.minimum(tl.maximum(blue * factor + reference, 0.0), 1.0)
    return red, green, blue


@kernel
def store_planes(target, place, row, column, inside, red, green, blue, SIZE: tl.constexpr):
    """Into float32 (m, 3, SIZE, SIZE), as neighbouring threads write neighbouring pixels."""
    pixel = target + place.to(tl.int64) * (3 * SIZE * SIZE) + (row * SIZE + column)
    tl.store(pixel, red, mask=inside)
    tl.store(pixel + SIZE * SIZE, green, mask=inside)
    tl.store(pixel + 2 * SIZE * SIZE, blue, mask=inside)


@kernel
def store_view(out, image, turned, row, column, inside, red, green, blue, SIZE: tl.constexpr):
    """Into (n, SIZE, SIZE, 3) of the training dtype, transposed where the image is turned."""
    pixel = tl.where(turned > 0, column * SIZE + row, row * SIZE + column)
    pixel = out + image.to(tl.int64) * (3 * SIZE * SIZE) + 3 * pixel
    tl.store(pixel, red.to(out.dtype.element_ty), mask=inside)
    tl.store(pixel + 1, green.to(out.dtype.element_ty), mask=inside)
    tl.store(pixel + 2, blue.to(out.dtype.element_ty), mask=inside)

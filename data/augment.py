"""Two random views of a batch of images, as a few large torch operators on the CPU or the GPU.

    from augment import draw, pack, view
    generator = torch.Generator().manual_seed(0)
    draws = [draw(len(images), *images.shape[-2:], generator) for _ in range(2)]
    view1, view2 = (view(images, d, 224, mean, std) for d in draws)

`draw` chooses the random numbers on the CPU, image by image as torchvision does; `view` applies them to the
whole batch. Crop, flip and antialiased resize are one pair of matrix products, and so is the blur: each
operator agrees with torchvision's on the same parameters, and the same generator gives the same views on
every device. Needs nothing but torch.

On a GPU a step needs one copy: `pack` lays the numbers of both views in one pinned buffer.

    packed = pack(draws, pin=True).to("cuda", non_blocking=True)
    view1, view2 = (view(images, d, 224, mean, std, numbers) for d, numbers in zip(draws, packed))
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision's rgb_to_grayscale
BRIGHTNESS, CONTRAST, SATURATION = range(3)

# The 16 columns of `pack`, all float32, which holds every whole number up to 2^24.
BOX = slice(0, 4)  # top, left, height, width
FLIP = slice(4, 6)  # horizontal, vertical: 0 or 1
TURN = 6  # 0 or 1
FACTOR = slice(7, 10)  # of brightness, contrast, saturation
ORDER = slice(10, 13)  # the operators 0, 1, 2 in the order in which they are applied
SIGMA = 13
ROW = 14  # of the image in the tensor of images
BLURRED = 15  # a list down the column: the images to be blurred, ascending, then all others
COLUMNS = 16


class Recipe(NamedTuple):
    """Distribution of the views; the defaults are the paper's (section IV-A3), no hue, no solarisation."""

    area: tuple[float, float] = (0.2, 1.0)  # of the crop, as a share of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width : height of the crop, uniform in its logarithm
    flip: float = 0.5  # probability, horizontal and vertical each
    jitter: float = 0.4  # brightness, contrast and saturation factors are uniform in 1 +- jitter
    jitter_probability: float = 0.8
    sigma: tuple[float, float] = (0.1, 2.0)  # of the Gaussian blur, pixels of the view
    blur_probability: float = 0.5
    # half of the views transposed: with both flips, the square's eight symmetries
    quarter_turns: bool = False


class Draw(NamedTuple):
    """Parameters of one view of n images, on the CPU."""

    box: torch.Tensor  # (n, 4) int64: top, left, height, width of the crop, pixels
    flip: torch.Tensor  # (n, 2) bool: horizontal, vertical
    factor: torch.Tensor  # (n, 3) float32: brightness, contrast, saturation; 1 leaves the image as it is
    order: torch.Tensor  # (n, 3) int64: the order in which the three are applied
    sigma: torch.Tensor  # (n,) float32: of the blur; 0 leaves the image sharp
    turn: torch.Tensor | None = None  # (n,) bool: transposed after crop, resize and flips; None turns nothing


def draw(n: int, height: int, width: int, generator: torch.Generator, recipe: Recipe = Recipe()) -> Draw:
    """Draw the parameters of one view of n images of height x width pixels."""

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    box = random_boxes(n, height, width, generator, recipe)
    flip = torch.rand(n, 2, generator=generator) < recipe.flip
    factor = uniform(max(0, 1 - recipe.jitter), 1 + recipe.jitter, n, 3)
    factor[torch.rand(n, generator=generator) >= recipe.jitter_probability] = 1
    order = torch.rand(n, 3, generator=generator).argsort(1)
    sigma = uniform(*recipe.sigma, n)
    sigma[torch.rand(n, generator=generator) >= recipe.blur_probability] = 0
    turn = torch.zeros(n, dtype=torch.bool)
    if recipe.quarter_turns:  # drawn last, so that all other numbers are those of a recipe without turns
        turn = torch.rand(n, generator=generator) < 0.5
    return Draw(box, flip, factor, order, sigma, turn)


def random_boxes(
    n: int, height: int, width: int, generator: torch.Generator, recipe: Recipe = Recipe()
) -> torch.Tensor:
    """Crops (n, 4) as torchvision draws them: the first of ten tries that fits, else the central one.

    Top, left, height and width, in pixels of the image.
    """
    area = torch.empty(n, 10).uniform_(*recipe.area, generator=generator) * height * width
    ratio = torch.empty(n, 10).uniform_(*torch.tensor(recipe.ratio).log().tolist(), generator=generator).exp()
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    first, rows = fits.int().argmax(1), torch.arange(n)
    low, high = recipe.ratio
    central = (round(min(height, width / low)), round(min(width, height * high)))
    h = torch.where(fits.any(1), h[rows, first], central[0])
    w = torch.where(fits.any(1), w[rows, first], central[1])
    place = torch.rand(2, n, generator=generator)
    top, left = (place[0] * (height - h + 1)).long(), (place[1] * (width - w + 1)).long()
    fallback = ~fits.any(1)
    top[fallback], left[fallback] = (height - central[0]) // 2, (width - central[1]) // 2
    return torch.stack([top, left, h, w], dim=1)


def pack(draws: Sequence[Draw], rows: torch.Tensor | None = None, pin: bool = False) -> torch.Tensor:
    """The numbers of all draws of a step in one buffer, so that one copy takes them to the GPU.

    `rows` (n,) are the images' rows in a larger tensor (for `fused_view`), 0 to n - 1 if not given. Returns
    (len(draws), n, 16) float32 on the CPU, in pinned memory if asked for; the columns are named at the top of
    this file. Raises ValueError for rows that float32 cannot hold.
    """
    n = len(draws[0].box)
    rows = torch.arange(n) if rows is None else rows
    if n and int(rows.max()) >= 2**24:
        raise ValueError(f"image {int(rows.max())}: rows of 2^24 and more are not exact in float32")
    packed = torch.empty(len(draws), n, COLUMNS, pin_memory=pin)
    for numbers, draw in zip(packed, draws):
        numbers[:, BOX] = draw.box
        numbers[:, FLIP] = draw.flip
        numbers[:, TURN] = 0 if draw.turn is None else draw.turn
        numbers[:, FACTOR] = draw.factor
        numbers[:, ORDER] = draw.order
        numbers[:, SIGMA] = draw.sigma
        numbers[:, ROW] = rows
        numbers[:, BLURRED] = (draw.sigma == 0).int().argsort(stable=True)
    return packed


def unpack(numbers: torch.Tensor) -> Draw:
    """The draw that `pack` laid into numbers (n, 16), on their device."""
    return Draw(
        numbers[:, BOX].long(),
        numbers[:, FLIP].bool(),
        numbers[:, FACTOR],
        numbers[:, ORDER].long(),
        numbers[:, SIGMA],
        numbers[:, TURN].bool(),
    )


def view(
    images: torch.Tensor,
    draw: Draw,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    numbers: torch.Tensor | None = None,
) -> torch.Tensor:
    """One view of uint8 images (n, 3, H, W): float32 (n, 3, size, size) in channels_last.

    Normalised by mean and std, three numbers each, in units of the range 0-1. `draw` is on the CPU and
    decides what runs, so that a GPU is never waited for. `numbers` (n, 16) are the same draw as `pack` laid
    it out, already on the images' device; without them it is packed and copied here.
    """
    here, blurred = draw, draw.sigma.nonzero()[:, 0]
    if images.device.type != "cpu":
        if numbers is None:
            numbers = pack([draw], pin=images.is_cuda)[0].to(images.device, non_blocking=True)
        here, blurred = unpack(numbers), numbers[: len(blurred), BLURRED].long()
    with torch.autocast(images.device.type, enabled=False):
        x = resized_crop(images.float().div_(255), here.box, here.flip, size)
        if draw.turn is not None and draw.turn.any():
            x = torch.where(here.turn[:, None, None, None], x.mT, x)
        if (draw.factor != 1).any():
            x = color_jitter(x, here.factor, here.order)
        x = gaussian_blur(x, here.sigma, size // 10 | 1, blurred)
        return (
            x.sub_(per_channel(mean, x))
            .div_(per_channel(std, x))
            .contiguous(memory_format=torch.channels_last)
        )


def resized_crop(x: torch.Tensor, box: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Crop, resize to size x size (bilinear with antialiasing) and flip images x (n, C, H, W)."""
    top, left, height, width = box.to(x.device, non_blocking=True).unbind(1)
    horizontal, vertical = flip.to(x.device, non_blocking=True).unbind(1)
    rows = resize_matrix(top, height, vertical, x.shape[2], size)  # (n, size, H)
    columns = resize_matrix(left, width, horizontal, x.shape[3], size)  # (n, size, W)
    x = x.flatten(1, 2) @ columns.mT  # (n, C * H, size)
    return rows[:, None] @ x.unflatten(1, (-1, rows.shape[2]))


def resize_matrix(
    start: torch.Tensor, length: torch.Tensor, flip: torch.Tensor, pixels: int, size: int
) -> torch.Tensor:
    """(n, size, pixels) matrices that resample [start, start + length) of a line of pixels to `size` values.

    The filter is the triangle of antialiased bilinear interpolation: one source pixel wide, more when
    shrinking.
    """
    step = length[:, None, None] / size
    target = torch.arange(size, device=start.device)[None, :, None]
    target = torch.where(flip[:, None, None], size - 1 - target, target)
    centre = start[:, None, None] + (target + 0.5) * step
    source = torch.arange(pixels, device=start.device)[None, None, :]
    distance = (source + 0.5 - centre).abs_().div_(step.clamp(min=1))
    inside = (source >= start[:, None, None]) & (source < (start + length)[:, None, None])
    weight = distance.neg_().add_(1).clamp_(min=0).mul_(inside)
    return weight.div_(weight.sum(2, keepdim=True))


def color_jitter(x: torch.Tensor, factor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation of x (n, 3, H, W) in 0-1, in each image's own order.

    All three blend the image with a reference, x <- factor x + (1 - factor) reference, which is black, the
    image's mean grey and the grey image.
    """
    x = x.clone()
    for turn in order.unbind(1):
        own = factor.gather(1, turn[:, None])[:, 0]  # the factor of each image's operator in this turn
        weights = torch.stack([own, (1 - own) * (turn == CONTRAST), (1 - own) * (turn == SATURATION)])
        keep, to_mean, to_grey = weights.to(x.device, x.dtype, non_blocking=True)[..., None, None, None]
        grey = to_greyscale(x)
        to_mean = to_mean * grey.mean((2, 3), keepdim=True)
        reference = grey.mul_(to_grey).add_(to_mean)
        x.mul_(keep).add_(reference).clamp_(0, 1)
    return x


def to_greyscale(x: torch.Tensor) -> torch.Tensor:
    """The grey image (n, 1, H, W) of x (n, 3, H, W)."""
    red, green, blue = x.split(1, dim=1)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def gaussian_blur(
    x: torch.Tensor, sigma: torch.Tensor, taps: int, blurred: torch.Tensor | None = None
) -> torch.Tensor:
    """Blur x (n, C, S, S) with a Gaussian of `taps` (odd) numbers, reflected at borders, where sigma > 0.

    `blurred` (m,) are the images whose sigma is above 0: with sigma on a GPU, looking for them would wait for
    it.
    """
    blurred = sigma.nonzero()[:, 0] if blurred is None else blurred
    if len(blurred) == 0:
        return x
    sigma = sigma[blurred].to(x.device, non_blocking=True)
    blurred = blurred.to(x.device, non_blocking=True)
    size, offset = x.shape[-1], torch.arange(taps, device=x.device) - taps // 2
    target = torch.arange(size, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]).square())
    kernel = kernel / kernel.sum(1, keepdim=True)  # (m, taps)
    source = (target + offset[:, None]).abs()
    source = size - 1 - (size - 1 - source).abs()  # (taps, size), reflected
    shift = (source[..., None] == target).to(x.dtype).flatten(1)  # (taps, size * size)
    matrix = (kernel @ shift).view(-1, size, size)
    rows = x[blurred].flatten(1, 2) @ matrix.mT  # (m, C * size, size)
    return x.index_copy(0, blurred, matrix[:, None] @ rows.unflatten(1, (-1, size)))


def per_channel(values: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    """Three numbers as a tensor (1, 3, 1, 1) like x, copied to its device once and then kept."""
    return channels(tuple(float(v) for v in values), x.dtype, x.device)


@lru_cache(maxsize=64)
def channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(1, 3, 1, 1) on the device; kept, as a copy a step would make a GPU wait."""
    return torch.tensor(values, dtype=dtype).view(1, 3, 1, 1).to(device)

"""Two random views of a batch of images, as a few large torch operators on the CPU or the GPU. Needs nothing but torch.

    from augment import draw, view
    generator = torch.Generator().manual_seed(0)
    view1, view2 = (view(images, draw(len(images), *images.shape[-2:], generator), 224, mean, std) for _ in range(2))

`draw` chooses the random numbers on the CPU, image by image as torchvision does; `view` applies them to the whole batch.
Crop, flip and antialiased resize are one pair of matrix products, and so is the blur: each operator agrees with
torchvision's on the same parameters, and the same generator gives the same views on every device.
"""

from typing import NamedTuple

import torch

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision's rgb_to_grayscale
BRIGHTNESS, CONTRAST, SATURATION = range(3)


class Recipe(NamedTuple):
    """Distribution of the views; the defaults are the paper's (section IV-A3): no hue, no greyscale, no solarisation."""

    area: tuple[float, float] = (0.2, 1.0)  # of the crop, as a share of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width : height of the crop, uniform in its logarithm
    flip: float = 0.5  # probability, horizontal and vertical each
    jitter: float = 0.4  # brightness, contrast and saturation factors are uniform in 1 -+ jitter
    jitter_probability: float = 0.8
    sigma: tuple[float, float] = (0.1, 2.0)  # of the Gaussian blur, pixels of the view
    blur_probability: float = 0.5


class Draw(NamedTuple):
    """Parameters of one view of n images, on the CPU."""

    box: torch.Tensor  # (n, 4) int64: top, left, height, width of the crop, pixels
    flip: torch.Tensor  # (n, 2) bool: horizontal, vertical
    factor: torch.Tensor  # (n, 3) float32: brightness, contrast, saturation; 1 leaves the image as it is
    order: torch.Tensor  # (n, 3) int64: the order in which the three are applied
    sigma: torch.Tensor  # (n,) float32: of the blur; 0 leaves the image sharp


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
    return Draw(box, flip, factor, order, sigma)


def random_boxes(
    n: int, height: int, width: int, generator: torch.Generator, recipe: Recipe = Recipe()
) -> torch.Tensor:
    """Crops as torchvision's RandomResizedCrop draws them: the first of ten tries that fits, else the central one."""
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


def view(images: torch.Tensor, draw: Draw, size: int, mean, std) -> torch.Tensor:
    """One view of uint8 images (n, 3, H, W): float32 (n, 3, size, size) in channels_last, normalised by mean and std
    (three numbers each, in units of the range 0-1)."""
    with torch.autocast(images.device.type, enabled=False):
        x = resized_crop(images.float() / 255, draw.box, draw.flip, size)
        x = color_jitter(x, draw.factor, draw.order)
        x = gaussian_blur(x, draw.sigma, size // 10 | 1)
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

    The filter is the triangle of antialiased bilinear interpolation: one source pixel wide, wider when shrinking.
    """
    step = length[:, None, None] / size
    target = torch.arange(size, device=start.device)[None, :, None]
    target = torch.where(flip[:, None, None], size - 1 - target, target)
    centre = start[:, None, None] + (target + 0.5) * step
    source = torch.arange(pixels, device=start.device)[None, None, :]
    weight = (1 - (source + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * ((source >= start[:, None, None]) & (source < (start + length)[:, None, None]))
    return weight / weight.sum(2, keepdim=True)


def color_jitter(x: torch.Tensor, factor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast (about the image's mean grey) and saturation of x (n, 3, H, W) in 0-1, in each image's order.

    All three blend the image with a reference, x <- factor x + (1 - factor) reference, which is black, the mean grey
    and the grey image.
    """
    grey_weight = per_channel(GREY, x)
    for turn in order.unbind(1):
        own = factor.gather(1, turn[:, None])[:, 0]  # the factor of each image's operator in this turn
        weights = torch.stack([own, (1 - own) * (turn == CONTRAST), (1 - own) * (turn == SATURATION)])
        keep, to_mean, to_grey = weights.to(x.device, x.dtype, non_blocking=True)[..., None, None, None]
        grey = (x * grey_weight).sum(1, keepdim=True)
        reference = to_mean * grey.mean((2, 3), keepdim=True) + to_grey * grey
        x = x.mul(keep).add_(reference).clamp_(0, 1)
    return x


def gaussian_blur(x: torch.Tensor, sigma: torch.Tensor, taps: int) -> torch.Tensor:
    """Blur x (n, C, S, S) with a Gaussian of `taps` (odd) coefficients, reflected at the borders, where sigma > 0."""
    blurred = sigma.nonzero()[:, 0]  # on the CPU, so the GPU is not waited for
    if len(blurred) == 0:
        return x
    sigma, blurred = (t.to(x.device, non_blocking=True) for t in (sigma[blurred], blurred))
    size, offset = x.shape[-1], torch.arange(taps, device=x.device) - taps // 2
    target = torch.arange(size, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]).square())
    kernel = kernel / kernel.sum(1, keepdim=True)  # (m, taps)
    source = (target + offset[:, None]).abs()
    source = size - 1 - (size - 1 - source).abs()  # (taps, size), reflected
    shift = (source[..., None] == target).to(x.dtype).flatten(1)  # (taps, size * size)
    matrix = (kernel @ shift).view(-1, 1, size, size)
    return x.index_copy(0, blurred, matrix @ x[blurred] @ matrix.mT)


def per_channel(values, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=x.dtype).view(1, 3, 1, 1).to(x.device, non_blocking=True)

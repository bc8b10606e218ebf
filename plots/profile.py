"""Where the time of a training step goes: operators of a profile in groups, and their picture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

import common
from plots.style import COLUMN, RC, STYLES

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEventAvg

# The first pattern that an operator's or a kernel's name holds, in upper or lower case, decides
GROUPS = {
    "norms": "norm|bn_",  # before the convolutions: cuDNN has norms of its own
    "convolutions, backward": "convolution_?backward|dgrad|wgrad|convolve_backward",
    "convolutions, forward": "convolution|conv2d|cudnn|implicit_gemm|xmma_fprop|fprop|nhwcAddPadding",
    "ReLU and pooling": "relu|threshold|clamp|pool",
    "matrix products": r"addmm|\bmm\b|bmm|matmul|gemm|linear",
    "copies and casts": r"copy|memcpy|memset|cat\b|clone|contiguous",
    "sums and optimiser": r"\badd\b|add_|_add<|AccumulateGrad|\bmul_|_foreach|multi_tensor|optimizer",
}
OTHER = "other"


def grouped(averages: Iterable[FunctionEventAvg], cuda: bool) -> dict[str, float]:
    """Seconds of a profile's operators (`key_averages()`) by group, without those that they call.

    On a GPU the time of kernels counts, on a CPU that of operators.
    """
    seconds = dict.fromkeys([*GROUPS, OTHER], 0.0)
    for event in averages:
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        seconds[group_of(event.key)] += own / 1e6
    return seconds


def group_of(name: str) -> str:
    """The group of an operator or kernel."""
    for group, pattern in GROUPS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return OTHER


def draw_times(seconds: dict[str, float], title: str, file: Path) -> None:
    """Bars of seconds by group, longest on top, with their shares, as a PNG that is written whole or not."""
    shown = sorted(seconds.items(), key=lambda item: item[1])
    total = sum(seconds.values())
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(1.4 * COLUMN, 2.1))
        axes = figure.subplots()
        bars = axes.barh([name for name, _ in shown], [1e3 * value for _, value in shown])
        for bar, (name, value) in zip(bars, shown):
            bar.set_color(STYLES["imagenet" if name.startswith("views") else "barlow"][0])
            axes.annotate(
                f" {100 * value / total:.1f} %",
                (bar.get_width(), bar.get_y() + bar.get_height() / 2),
                va="center",
            )
        axes.set(xlabel="ms a step", title=title)
        axes.margins(x=0.12)
        with common.replacing(file) as partial:
            figure.savefig(partial, format="png", dpi=200)

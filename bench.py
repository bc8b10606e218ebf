"""How fast pretraining is on this machine, what limits it, and what the data path gains.

    python bench.py                                                      # the whole table, under 8 minutes
    python bench.py --quick --size 224 --images 175381 --epochs 500      # one sentence, within a minute
    python bench.py --data PATCHES --size 64 --batch-size 256 --repeats 5
    python bench.py --size 64 --batch-size 64 --picture time.png         # where the time of a step goes

Measured are the machine's ceilings, the views alone, each loader alone, the model alone and both together,
and beside them the usual stack: PIL transforms in a DataLoader, once in fp32 as most code has it, and once
with our optimiser, memory format and precision, so that the ratios tell what the data path gains and what
the precision. All take turns, so that a noisy machine disturbs all alike; ratios are taken within a turn.
The table is printed and replaces results/bench-DEVICE.csv; docs/performance.md explains it.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import common
from common import number, say


def build_parser() -> common.Parser:
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--quick", action="store_true", help="one setting, one sentence, within a minute")
    images = "an epoch, for the estimated hours: the training images of --data if left out, else the paper's"
    group.add_argument("--images", type=number(int, 1), help=images)
    epochs = "for the estimated hours: 100 if left out, without --data the paper's"
    group.add_argument("--epochs", type=number(int, 1), help=epochs)
    group.add_argument("--data", help="folder of images; the built-in scenes if left out")
    group.add_argument(
        "--split", choices=["paper", "none"], default="paper", help="none: folders are no classes"
    )
    group.add_argument("--size", type=common.side, help="of the views, pixels: 64 and 224 if left out")
    group.add_argument("--batch-size", type=number(int, 2), help="images a step: by the device if left out")
    group.add_argument("--method", choices=["barlow", "moco", "simclr", "simsiam"], default="barlow")
    group.add_argument("--arch", choices=["resnet18", "resnet50"], default="resnet18")
    group.add_argument("--picture", metavar="PNG", help="only profile steps, and draw where the time goes")
    group = parser.add_argument_group("how")
    group.add_argument("--repeats", type=number(int, 1), default=3, help="turns of each contender")
    group.add_argument(
        "--minutes", type=number(float, above=0), default=8.0, help="budget: no turn starts after it"
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also compiled; on a GPU if left out",
    )
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument("--workers", type=number(int, 1, 1024), default=common.cores(), help="that decode")
    group.add_argument("--cache", default="runs/cache", help="directory of built-in scenes")
    group.add_argument("--config", help="YAML file of flags; what stands on the command line wins")
    group.add_argument("--print-config", action="store_true", help="print the flags as YAML, and stop")
    group.add_argument("--out", help="CSV file: results/bench-DEVICE.csv if left out")
    return parser


if __name__ == "__main__":  # torch takes seconds to import: --help and wrong flags do not wait for it
    with common.one_line_errors():
        build_parser().parse_args()
    common.interrupt_quietly()

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision import transforms

from data.check import check_files, manifest_of
from data.fused import available, costs
from data.loader import Loader, Plan, TorchLoader, choose_loader, dali_loader
from data.opening import Source, built_in_scenes
from data.pixels import common_size, load_pixels
from data.tables import load_table
from models import METHODS
from models.backbone import build_backbone, compile_backbones
from models.graph import WARMUP_STEPS, GraphedLearner
from models.optimisers import can_fuse, make_optimizer
from models.roofline import images_per_second, training_operations
from models.step import DTYPES, Learner
from models.timing import Timed, endless, peak_memory, timed_steps, wait_for
from plots.profile import draw_times, grouped
from plots.style import PAPER_EPOCHS, PAPER_IMAGES

MEAN, STD = (0.34, 0.38, 0.41), (0.20, 0.14, 0.12)  # of EuroSAT, range 0-1; any would do
SCENES = 116  # built-in ones, each of them seen several times an epoch
MOST_FILES = 1024  # of --data that are read
SHARE = (0.55, 0.74)  # of the roofline: what good implementations of ResNet reach on GPUs
PROFILED = 3  # steps
CALLS = 10  # of a copy or a matrix product, of which the fastest counts
RESERVED = {"cuda": 60, "cpu": 0}  # seconds of the whole for the tests on a GPU
TRAINING = ("both", "usual")  # parts that wait for a loader
HANDED = 16  # images that a worker of the usual stack hands over at once, at most
WARM = 10  # seconds that the usual stack may warm up, after its first step
STUCK = 120  # seconds without images from the usual stack's workers, which import torch first, till it fails
QUICK_STEP = 3.0  # seconds of a step of --quick, at most
QUICK_FILES = 256  # of --data that --quick reads, at most
TORCH_BYTES = 817  # that torch's operators move for a pixel of one view, see docs/performance.md


class Setting(NamedTuple):
    """A size of views, pixels, and a batch."""

    size: int
    batch_size: int


SETTINGS = {
    "cuda": [Setting(224, 512), Setting(64, 256)],
    "cpu": [Setting(64, 256), Setting(224, 32)],  # the larger one does not fit 8 minutes on two cores
}


class Row(NamedTuple):
    """A line of the table: the median of `n` turns, their extremes, and what was to be expected."""

    part: str  # ceiling, views, loader, model, both, usual, ratio, share, memory, syncs, tests
    what: str
    value: float
    unit: str
    size: int | None = None
    batch_size: int | None = None
    precision: str = ""
    mode: str = ""
    low: float | None = None
    high: float | None = None
    n: int = 1
    expected: str = ""
    note: str = ""


class Contender(NamedTuple):
    """Something that takes its turns."""

    part: str
    what: str
    run: Callable[[], Timed]
    precision: str = ""
    mode: str = ""
    expected: str = ""


class Effort(NamedTuple):
    """How long each measurement lasts: `steps`, or fewer when `seconds` are over."""

    steps: int
    seconds: float
    warmup: int


EFFORTS = {"cuda": Effort(20, 2.5, WARMUP_STEPS), "cpu": Effort(3, 6.0, 1)}


class Ceilings(NamedTuple):
    """What the machine reaches in a copy, bytes/s, and in a matrix product by precision, FLOP/s."""

    copy: float
    flops: dict[str, float]


class Images(NamedTuple):
    """Files of a data set, and their pixels, uint8 (n, 3, height, width)."""

    root: Path
    files: np.ndarray
    pixels: torch.Tensor
    of_all: int  # how many train: of the data set, --images, or the paper's


class Case(NamedTuple):
    """What is measured, and on what."""

    setting: Setting
    images: Images
    device: torch.device
    method: str
    arch: str
    workers: int


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = common.parse(parser, argv)
    common.print_config(args, parser)
    for flag, file in (("--out", args.out), ("--picture", args.picture)):
        if file:
            common.refuse_special(Path(file), flag)
    clock = Clock(60 * args.minutes)
    device, *_ = common.start_ranks(args.device)
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    about = common.about(device)
    say(f"{about['device_name']}, " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    say(busy())
    settings = settings_of(args, device)
    epochs = args.epochs or (100 if args.data else PAPER_EPOCHS)
    if args.quick:
        case = make_case(settings[0], args, device)
        return say(quick(case, case.images.of_all, epochs))

    if args.picture:
        file = Path(args.picture)
        file.parent.mkdir(parents=True, exist_ok=True)
        mode = "compiled" if args.compile else "eager"
        return say(picture(make_case(settings[0], args, device), mode, file))

    name = name_for_file(device, about["device_name"])
    out = Path(args.out or common.ROOT / "results" / f"bench-{name}.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    ceilings = measure_ceilings(device)
    rows = rows_of_ceilings(ceilings)
    for i, setting in enumerate(settings):
        say(f"{setting.size} px, batches of {setting.batch_size}")
        share = Clock((clock.left() - RESERVED[device.type]) / (len(settings) - i))
        case = make_case(setting, args, device)
        rows += measure(case, ceilings, args, share)
    rows += gpu_tests(clock) if device.type == "cuda" else []

    table = as_table(rows, about)
    say(shown(table))
    for line in summary(table, settings, case.images.of_all, epochs):
        say(line)
    common.write_csv(out, table)
    say(f"table: {out}")


def name_for_file(device: torch.device, name: str) -> str:
    """`cpu`, or which GPU, as `nvidia-h100-80gb-hbm3`: two of them must not replace each other's table."""
    return device.type if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def busy() -> str:
    """What to know of the load."""
    crowd = common.crowded()
    if not crowd:
        return f"load {os.getloadavg()[0]:.1f} on {common.counted(common.cores(), 'core')}"
    one = torch.get_num_threads() == 1
    best = "one thread is best" if one else "OMP_NUM_THREADS=1 may be many times faster"
    return f"busy: {crowd}, so nothing here holds for an idle machine, and {best}"


class Clock:
    """Seconds that are left of a budget."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        return self.end - time.perf_counter()


def settings_of(args: argparse.Namespace, device: torch.device) -> list[Setting]:
    """What to measure: the device's usual settings, or the one of the flags."""
    usual = SETTINGS[device.type]
    if args.size is None and args.batch_size is None:
        return usual
    size = args.size or usual[0].size
    nearest = min(usual, key=lambda setting: abs(setting.size - size))
    return [Setting(size, args.batch_size or nearest.batch_size)]


# Ceilings


def measure_ceilings(device: torch.device) -> Ceilings:
    """The best of several large copies and matrix products."""
    cuda = device.type == "cuda"
    source = torch.zeros((1 << 30) if cuda else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)
    side = 8192 if cuda else 1024
    flops = {}
    for precision in precisions_of(device):
        a = torch.randn(side, side, device=device).to(DTYPES[precision])
        multiply = functools.partial(torch.mm, a, a, out=torch.empty_like(a))
        with as_convolutions_do():
            flops[precision] = 2 * side**3 / best_seconds(multiply, device)
    return Ceilings(copy, flops)


@contextlib.contextmanager
def as_convolutions_do() -> Iterator[None]:
    """Matrix products of float32 in TF32 where a GPU has it, as cuDNN's convolutions are by default."""
    usual = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = usual


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of CALLS calls."""
    batch = ([0],)
    runs = [timed_steps([batch] * 2, lambda batch: call(), device, steps=2) for _ in range(CALLS)]
    return min(run.seconds / run.steps for run in runs)


def precisions_of(device: torch.device) -> list[str]:
    """The precision that `auto` takes, then the others that the device computes natively."""
    auto = common.resolve_precision("auto", device)
    others = ["fp16", "fp32"] if device.type == "cuda" and auto == "bf16" else ["fp32"]
    return list(dict.fromkeys([auto, *others]))


def rows_of_ceilings(ceilings: Ceilings) -> list[Row]:
    rows = [Row("ceiling", "copy, read and write", ceilings.copy / 1e9, "GB/s")]
    for precision, flops in ceilings.flops.items():
        rows.append(Row("ceiling", "matrix product", flops / 1e12, "TFLOP/s", precision=precision))
    for row in rows:
        say(f"{row.what} {row.precision} {row.value:.3g} {row.unit}")
    return rows


# Images


def make_case(setting: Setting, args: argparse.Namespace, device: torch.device) -> Case:
    images = open_images(args, setting.size, 4 * setting.batch_size)
    return Case(setting, images, device, args.method, args.arch, args.workers)


def open_images(args: argparse.Namespace, size: int, count: int) -> Images:
    """`count` images of --data, or built-in scenes of `size` px, some of them several times."""
    built_in = Source(None, "pure", SCENES, size, Path(args.cache), args.workers, skip_bad_files=False)
    root = Path(args.data) if args.data else built_in_scenes(built_in)
    table = load_table(root, split=args.split)
    step = -(-len(table.files) // (QUICK_FILES if args.quick else MOST_FILES))
    files = list(table.files[::step])
    checked = check_files(table.root, files, manifest_of(table.root, Path(args.cache)), args.workers)
    good = (checked.problem == "").to_numpy()
    if not good.any():
        raise common.DataError(f"{root}: none of {len(files)} files decodes (first: {checked.problem[0]})")
    height, width = common_size(checked[good])
    files = np.array(files)[good]
    pixels = load_pixels(table.root, files, height, width, cache=Path(args.cache), workers=args.workers)
    rows = np.resize(np.arange(len(files)), count)
    of_all = args.images or (int((table.split == "train").sum()) if args.data else PAPER_IMAGES)
    return Images(table.root, files[rows], pixels[torch.from_numpy(rows)], of_all)


# Measurements


def measure(case: Case, ceilings: Ceilings, args: argparse.Namespace, clock: Clock) -> list[Row]:
    """All rows of one case."""
    contenders = [
        *loader_contenders(case, ceilings),
        *training_contenders(case, ceilings, args.compile),
        *usual_contenders(case),
    ]
    results = take_turns(contenders, args.repeats, clock)
    rows = [row_of(c, case.setting, found) for c, found in zip(contenders, results, strict=True)]
    rows += shares(rows, case, ceilings)
    rows += ratios(contenders, results, case.setting)
    memory = peak_memory(case.device) / 1e9
    rows.append(Row("memory", "peak so far", memory, "GB", *case.setting))
    return rows + (count_syncs(case) if case.device.type == "cuda" else [])


def take_turns(contenders: list[Contender], repeats: int, clock: Clock) -> list[list[Timed | Exception]]:
    """What each contender's runs came to. One that fails is out; nothing starts that would end too late."""
    results: list[list[Timed | Exception]] = [[] for _ in contenders]
    last = 0.0  # seconds of the turn before; the first compiles, so it is longer than the others
    for turn in range(repeats):
        began = clock.left()
        if began <= last:
            say(f"  no time for another turn: {turn} of {repeats} were taken")
            break
        for contender, found in zip(contenders, results, strict=True):
            if clock.left() > 0 and not (found and isinstance(found[-1], Exception)):
                found.append(attempt(contender))
                say(f"  turn {turn + 1}: {told(contender, found[-1])}")
        last = began - clock.left()
    return results


def attempt(contender: Contender) -> Timed | Exception:
    """One run. A card may be too small for it, or a compiler missing: that is a result as well."""
    try:
        return contender.run()
    except common.DataError:
        raise
    except Exception as error:
        return error


def told(contender: Contender, result: Timed | Exception) -> str:
    """A line on one run."""
    name = " ".join(filter(None, [contender.part, contender.what, contender.precision, contender.mode]))
    if isinstance(result, Exception):
        return f"{name}: failed: {common.first_line(result)}"
    return f"{name}: {result.images_per_s:,.0f} images/s" + ", ".join(["", *waiting(contender, [result])])


def waiting(contender: Contender, results: list[Timed]) -> list[str]:
    """The share of the time spent waiting for data; nothing on a GPU, whose host may well wait while it
    computes."""
    share = np.median([result.data_wait for result in results])
    return [f"{100 * share:.1f} % waiting"] if contender.part in TRAINING and np.isfinite(share) else []


def row_of(contender: Contender, setting: Setting, results: list[Timed | Exception]) -> Row:
    """The row of a contender's turns."""
    good = [r for r in results if isinstance(r, Timed)]
    rates = [r.images_per_s for r in good]
    notes = waiting(contender, good) if good else []
    notes += [f"failed: {common.first_line(r)}" for r in results if isinstance(r, Exception)]
    notes += [] if results else ["no time was left"]
    return Row(
        part=contender.part,
        what=contender.what,
        value=float(np.median(rates)) if rates else float("nan"),
        unit="images/s",
        size=setting.size,
        batch_size=setting.batch_size,
        precision=contender.precision,
        mode=contender.mode,
        low=min(rates, default=None),
        high=max(rates, default=None),
        n=len(rates),
        expected=contender.expected,
        note="; ".join(notes),
    )


def timed(
    stream: Iterator,
    step: Callable,
    device: torch.device,
    warmup: int | None = None,
    patience: float = float("inf"),
) -> Timed:
    """Time a step over a stream, after steps that warm up, or as many of them as `patience` seconds allow."""
    effort = EFFORTS[device.type]
    found = timed_steps(
        stream,
        step,
        device,
        steps=effort.steps,
        seconds=effort.seconds,
        warmup=effort.warmup if warmup is None else warmup,
        patience=patience,
        name="measuring",
    )
    return found._replace(data_wait=float("nan")) if device.type == "cuda" else found


# Loaders


def loader_contenders(case: Case, ceilings: Ceilings) -> list[Contender]:
    """Loaders alone: views by torch, by the fused kernels where they work, and by DALI where it is there."""
    kinds = ["torch"] + ["fused"] * available(case.device) + ["dali"] * has_dali(case)
    return [
        Contender("loader", kind, functools.partial(load, case, kind), expected=bound(case, kind, ceilings))
        for kind in kinds
    ]


def load(case: Case, kind: str) -> Timed:
    dtype = DTYPES[precisions_of(case.device)[0]]
    return timed(endless(make_loader(case, kind, dtype)), lambda batch: None, case.device)


def bound(case: Case, kind: str, ceilings: Ceilings) -> str:
    """At most how many images a second: those at which the bytes of both views take all of the time. Blank
    for DALI, which decodes too, and for a CPU, where caches decide."""
    size, (height, width) = case.setting.size, case.images.pixels.shape[-2:]
    if kind == "dali" or case.device.type == "cpu":
        return ""
    kernels = costs(size, height, width).values()
    moved = TORCH_BYTES * size**2 if kind == "torch" else sum(cost.read + cost.written for cost in kernels)
    return f"at most {ceilings.copy / (2 * moved):,.0f}"


def has_dali(case: Case) -> bool:
    try:
        return choose_loader("dali", case.device, case.setting.size, 0)[0] == "dali"
    except common.ConfigError:
        return False


def best_kind(case: Case) -> str:
    """The loader that train_ssl.py's `--loader auto` takes for these images, and what makes its views."""
    kind, _why = choose_loader("auto", case.device, case.setting.size, bytes_of_all(case))
    return "fused" if kind == "torch" and available(case.device) else kind


def bytes_of_all(case: Case) -> int:
    """Of all training images, decoded: those that are measured are a sample of them."""
    return case.images.pixels[0].nbytes * case.images.of_all


def make_loader(case: Case, kind: str, dtype: torch.dtype) -> Loader:
    """A loader of train_ssl.py: views of pixels by torch or the fused kernels, or of files by DALI."""
    images, (size, batch_size) = case.images, case.setting
    plan = Plan(len(images.files), batch_size, *images.pixels.shape[-2:])
    if kind == "dali":
        options = {"dtype": dtype, "workers": case.workers}
        return dali_loader(images.root, images.files, plan, size, MEAN, STD, case.device, **options)
    about = {"dtype": dtype, "nbytes": bytes_of_all(case)}
    loader = TorchLoader(images.pixels, plan, size, MEAN, STD, case.device, **about)
    loader.fused = kind == "fused"
    return loader


# Training


def training_contenders(case: Case, ceilings: Ceilings, compiled: bool) -> list[Contender]:
    """The model alone, and with its loader: in each precision, and in that of `auto` in each mode."""
    precisions = precisions_of(case.device)
    auto = precisions[0]
    ways = [(precision, "eager") for precision in precisions] + [(auto, "compiled")] * compiled
    if case.device.type == "cuda" and auto != "fp16":
        ways += [(auto, "graph")] + [(auto, "compiled graph")] * compiled
    contenders = []
    for precision, mode in ways:
        learn = functools.cache(functools.partial(make_learner, case, precision, mode))
        loader = functools.cache(functools.partial(make_loader, case, best_kind(case), DTYPES[precision]))
        expected = expectation(case, ceilings, precision)
        for part, stream in (("model", first_again), ("both", endless)):
            run = functools.partial(train, stream, loader, learn, case.device)
            contenders.append(Contender(part, case.method, run, precision, mode, expected))
    return contenders


def make_learner(case: Case, precision: str, mode: str) -> Learner | GraphedLearner:
    """A step of pretraining, as train_ssl.py takes it."""
    torch.manual_seed(0)
    method = METHODS[case.method](build_backbone(case.arch))
    method.to(case.device, memory_format=torch.channels_last)
    if "compiled" in mode:
        compile_backbones(method)
    optimizer = make_optimizer("sgd", method, 1e-4, 0.9, 1e-5, can_fuse(case.device, precision))
    scaler = torch.amp.GradScaler(case.device.type, enabled=precision == "fp16")
    learn = Learner(method, optimizer, scaler, DTYPES[precision])
    return GraphedLearner(learn) if "graph" in mode else learn


def train(stream: Callable, loader: Callable, learn: Callable, device: torch.device) -> Timed:
    """Time steps of a learner on a stream of a loader; both are made when they are first asked for."""
    result = timed(stream(loader()), learn(), device)
    if isinstance(learn(), GraphedLearner) and learn().refused:
        raise RuntimeError("no CUDA graph could be captured, so these were eager steps")
    return result


def first_again(loader: object) -> Iterator[tuple]:
    """The loader's first batch, for ever."""
    views = next(loader.epoch(0))
    while True:
        yield views


def expectation(case: Case, ceilings: Ceilings, precision: str) -> str:
    """What good implementations reach of the roofline on a GPU; blank for a CPU, where caches decide."""
    if case.device.type == "cpu":
        return ""
    rate = roofline(case, ceilings, precision)
    return f"{SHARE[0] * rate:,.0f} to {SHARE[1] * rate:,.0f}"


def roofline(case: Case, ceilings: Ceilings, precision: str) -> float:
    """Images a second at the speed of this machine's copies and matrix products."""
    element = 4 if precision == "fp32" else 2
    operations = training_operations(build_backbone(case.arch), case.setting.size, element)
    return images_per_second(operations, ceilings.copy, ceilings.flops[precision])


def count_syncs(case: Case) -> list[Row]:
    """How often a step of training, in the precision of `auto`, makes the host wait for the GPU."""
    precision = precisions_of(case.device)[0]
    loader = make_loader(case, best_kind(case), DTYPES[precision])
    learn, stream = make_learner(case, precision, "eager"), endless(loader)
    for _ in range(3):
        learn(next(stream))
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(20):
            learn(next(stream))
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return [Row("syncs", "host waits for the GPU", waits / 20, "a step", *case.setting, precision)]


# The usual stack


class TwoViews(torch.utils.data.Dataset):
    """What most code does: open and augment an image with PIL, twice."""

    def __init__(self, files: list[Path], size: int):
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, (0.2, 1)),
                transforms.RandomHorizontalFlip(),
                transforms.RandomVerticalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4)], 0.8),
                transforms.RandomApply([transforms.GaussianBlur(size // 10 | 1, (0.1, 2.0))], 0.5),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.open(self.files[i]).convert("RGB")
        return self.transform(image), self.transform(image)


def usual_contenders(case: Case) -> list[Contender]:
    """The usual stack in fp32, and with our precision and memory format. Head and optimiser are ours."""
    contenders = []
    for precision in dict.fromkeys(["fp32", precisions_of(case.device)[0]]):
        learn = functools.cache(functools.partial(usual_learner, case, precision))
        run = functools.partial(train_usual, case, learn)
        contenders.append(Contender("usual", "PIL in a DataLoader", run, precision, "eager"))
    return contenders


def usual_learner(case: Case, precision: str) -> Learner:
    """The same model and optimiser; in fp32 as most code leaves it, channels first."""
    learn = make_learner(case, precision, "eager")
    if precision == "fp32":
        learn.model.to(memory_format=torch.contiguous_format)
    return learn


def train_usual(case: Case, learn: Callable) -> Timed:
    """Time the usual stack.

    On a GPU the loader limits it, so the images that wait at the start are used up first; on a CPU the model
    does, and they are there again after a step. Workers that each made a whole batch would all end at one
    time, and the next batches would come half a minute later: so they hand over small parts.
    """
    device, step = case.device, learn()
    cuda = device.type == "cuda"
    size, batch_size = case.setting
    part = math.gcd(batch_size, HANDED)
    waiting = 2 * case.workers * part  # images
    data = TwoViews([case.images.root / file for file in case.images.files], size)
    parts = torch.utils.data.DataLoader(
        data,
        part,
        sampler=torch.utils.data.RandomSampler(
            data, replacement=True, num_samples=waiting + 100 * batch_size
        ),
        num_workers=case.workers,
        multiprocessing_context="forkserver",  # a fork beside DALI's threads can hang for good
        pin_memory=cuda,
        drop_last=True,
        timeout=STUCK,
    )
    return timed(
        together(parts, batch_size // part, device),
        step,
        device,
        warmup=1 + -(-waiting // batch_size) if cuda else 1,
        patience=WARM,
    )


def together(parts: Iterable, many: int, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Batches on the device, each of them of `many` parts."""
    stream = iter(parts)
    while batch := list(itertools.islice(stream, many)):
        yield [torch.cat([view.to(device, non_blocking=True) for view in views]) for views in zip(*batch)]


# What it comes to


def shares(rows: list[Row], case: Case, ceilings: Ceilings) -> list[Row]:
    """Both together as a share of the model alone, and on a GPU the model as a share of the roofline."""
    rates = {(row.part, row.precision, row.mode): row.value for row in rows if row.part in ("model", "both")}
    found = []
    for (part, precision, mode), value in rates.items():
        if part == "both":
            share = value / rates["model", precision, mode]
            found.append(Row("share", "both of the model alone", share, "", *case.setting, precision, mode))
        elif case.device.type == "cuda":
            share = value / roofline(case, ceilings, precision)
            found.append(Row("share", "model of the roofline", share, "", *case.setting, precision, mode))
    return found


def ratios(contenders: list[Contender], results: list[list], setting: Setting) -> list[Row]:
    """How much faster than the usual stack: each way of training over each usual one, turn by turn."""
    pairs = list(zip(contenders, results, strict=True))
    both = [pair for pair in pairs if pair[0].part == "both"]
    usual = [pair for pair in pairs if pair[0].part == "usual"]
    found = []
    for (ours, our_turns), (theirs, their_turns) in itertools.product(both, usual):
        turns = [pair for pair in zip(our_turns, their_turns) if all(isinstance(t, Timed) for t in pair)]
        each = [fast.images_per_s / slow.images_per_s for fast, slow in turns]
        if not each:
            continue
        row = Row("ratio", f"both / usual stack in {theirs.precision}", float(np.median(each)), "")
        row = row._replace(size=setting.size, batch_size=setting.batch_size, n=len(each))
        row = row._replace(precision=ours.precision, mode=ours.mode, low=min(each), high=max(each))
        found.append(row)
    return found


def gpu_tests(clock: Clock) -> list[Row]:
    """What `pytest -m gpu` says, where pytest and the tests are there."""
    say("tests on the GPU")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(common.ROOT / "tests")]
    limit = max(60.0, clock.left())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return [Row("tests", "pytest -m gpu", float("nan"), "passed", note="no time left")]
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    passed = re.search(r"(\d+) passed", lines[-1])
    return [Row("tests", "pytest -m gpu", float(passed[1]) if passed else 0.0, "passed", note=lines[-1])]


def as_table(rows: list[Row], about: dict) -> pd.DataFrame:
    """The rows with the machine, the version of torch and the commit."""
    table = pd.DataFrame(rows).astype({"size": "Int64", "batch_size": "Int64"})
    versions = about["versions"]
    return table.assign(device=about["device_name"], torch=versions["torch"], commit=about["commit"])


def shown(table: pd.DataFrame) -> str:
    """The table, for people."""
    return table[list(Row._fields)].to_string(index=False, na_rep="", float_format="{:,.4g}".format)


def summary(table: pd.DataFrame, settings: list[Setting], images: int, epochs: int) -> Iterator[str]:
    """A sentence for each setting: the fastest way, what it gains, and the hours of a training."""
    whose = "the paper's " if (images, epochs) == (PAPER_IMAGES, PAPER_EPOCHS) else ""
    for setting in settings:
        own = table[(table["size"] == setting.size) & (table.batch_size == setting.batch_size)]
        both = own[(own.part == "both") & own.value.notna()]
        if both.empty:
            yield f"{setting.size} px: nothing was measured"
            continue
        best = both.loc[both.value.idxmax()]
        how = ", ".join(filter(None, [f"{best.precision} {best['mode']}", best.note]))
        text = f"{setting.size} px: {best.value:,.0f} images/s ({how})"
        same_way = (own.precision == best.precision) & (own["mode"] == best["mode"])
        for row in own[(own.part == "ratio") & same_way].itertuples():
            text += f"; {row.value:.2f} times the {row.what.removeprefix('both / ')}"
        yield f"{text}; {whose}{images:,} images in {epochs} epochs: {hours_of(images * epochs, best.value)}"


def hours_of(images: int, rate: float) -> str:
    """How long images take at a rate, images/s."""
    hours = images / rate / 3600
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours:.2g} hours"


# In a minute


def quick(case: Case, images: int, epochs: int) -> str:
    """The sentence a user wants: images a second, hours, and what limits them."""
    precision, kind = precisions_of(case.device)[0], best_kind(case)
    mode = "graph" if case.device.type == "cuda" and precision != "fp16" else "eager"
    learn = make_learner(case, precision, mode)
    asked = case.setting.batch_size
    case = shortened(case, learn)
    size, batch_size = case.setting
    fewer = f" ({asked} would take more than {QUICK_STEP:g} seconds a step)" if batch_size < asked else ""
    say(f"{size} px, batches of {batch_size}{fewer}, {precision}, {mode}, views by {kind}")
    loader = make_loader(case, kind, DTYPES[precision])
    parts = {
        "loader alone": (endless(loader), lambda batch: None),
        "model alone": (first_again(loader), learn),
        "both": (endless(loader), learn),
    }
    rates = {}
    for name, (stream, step) in parts.items():
        rates[name] = timed(stream, step, case.device).images_per_s
        say(f"  {name}: {rates[name]:,.0f} images/s")
    if mode == "graph" and learn.refused:
        say("no CUDA graph could be captured: these were eager steps")
    elif mode == "graph":
        say("these steps are those of train_ssl.py --graph; --compile, a minute of it, makes them faster yet")
    return sentence(rates, images, epochs)


def shortened(case: Case, learn: Callable) -> Case:
    """The case with no more images a step than QUICK_STEP allows, as nothing can end a step before its
    end."""
    size, asked = case.setting
    few = min(asked, 64 if case.device.type == "cuda" else 8)
    views = [torch.rand(few, 3, size, size, device=case.device) for _ in range(2)]
    again = itertools.repeat([view.to(memory_format=torch.channels_last) for view in views])
    rate = timed_steps(again, learn, case.device, steps=1, warmup=1).images_per_s
    return case._replace(setting=Setting(size, min(asked, max(few, int(QUICK_STEP * rate)))))


def sentence(rates: dict[str, float], images: int, epochs: int) -> str:
    """What the rates mean for a user's images and epochs, and which side limits them."""
    slower, faster = sorted(("loader alone", "model alone"), key=rates.get)
    limit = f"the {slower.split()[0]} limits it ({faster} {rates[faster] / rates[slower]:.1f} times as fast)"
    if rates["both"] < 0.8 * rates[slower]:
        limit = f"loader and model share the machine: {slower} reaches {rates[slower]:,.0f} images/s"
    what = f"{images:,} images in {epochs} epochs take {hours_of(images * epochs, rates['both'])}"
    return f"{rates['both']:,.0f} images/s: {what}; {limit}"


# Where the time goes


def picture(case: Case, mode: str, file: Path) -> str:
    """Profile the views and the step, each alone, and draw their operators in groups; what was drawn."""
    precision, kind = precisions_of(case.device)[0], best_kind(case)
    loader = make_loader(case, kind, DTYPES[precision])
    learn = make_learner(case, precision, mode)
    views = next(loader.epoch(0))
    for _ in range(EFFORTS[case.device.type].warmup):
        learn(views)
    wait_for(case.device)
    loaded = profiled(lambda: [next(loader.epoch(0)) for _ in range(PROFILED)], case.device)
    trained = profiled(lambda: [learn(views) for _ in range(PROFILED)], case.device)
    seconds = {f"views ({kind})": sum(loaded.values())} | trained
    seconds = {name: value / PROFILED for name, value in seconds.items()}
    size, batch_size = case.setting
    device = common.about(case.device)["device_name"]
    title = f"{case.method}, {size} px, batch {batch_size}, {precision}, {mode}\n{device}"
    draw_times(seconds, title, file)
    slowest_first = sorted(seconds, key=seconds.get, reverse=True)
    said = ", ".join(f"{name} {1e3 * seconds[name]:.0f} ms" for name in slowest_first)
    return f"{said}; picture: {file}"


def profiled(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of the operators of a run, by group."""
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as trace:
        run()
        wait_for(device)
    return grouped(trace.key_averages(), cuda)


if __name__ == "__main__":
    with common.one_line_errors():
        main()

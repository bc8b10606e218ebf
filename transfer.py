"""Linear probing and fine-tuning of any initialisation, on land-cover fractions or scenes.

    python transfer.py                                               # built-in scenes, random weights
    python transfer.py --data LAND --init random imagenet runs/barlow/backbone.pth --mode linear finetune
    python transfer.py --data LAND --init random imagenet runs/barlow/backbone.pth --protocol paper
    python transfer.py --data PATCHES --task scene --init runs/barlow/backbone.pth --ratios 100 --seeds 1
    torchrun --nproc_per_node=4 transfer.py --data LAND              # over machines, --out is a shared folder

One call makes a whole table. Each cell (initialisation, mode, ratio of the training images, seed) adds its
rows to results.csv in --out when it ends; summary.csv has the means over the seeds. Any number of
processes may fill one folder: none does a cell that is there or that another one is at, and a killed call,
started again, goes on with the cells that are missing. A seed redraws the training subset, the head and,
for `random`, the backbone: probing random weights varies over those too. The init `channels` (linear only)
has six numbers for features, the mean and standard deviation of each channel: what colour alone gives.
"""

import argparse
import contextlib
import hashlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import common
from common import ConfigError, DataError, harmless, number, say


def build_parser() -> common.Parser:
    parser = common.Parser(__doc__)
    common.common_flags(parser)
    parser.set_defaults(batch_size=64, lr=0.01, weight_decay=1e-4)
    cell_flags(parser.add_argument_group("cells of the table"))
    training_flags(parser.add_argument_group("how a cell is done"))
    group = parser.add_argument_group("files")
    add = group.add_argument
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--save-model", help="each init's best model on val, for predict.py", **switch)
    add("--share-pixels", help="decode into one file in --cache that several calls use", **switch)
    add("--save-embeddings", help="the test features of --mode linear, for plot.py", **switch)
    return parser


def cell_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    names = "random, imagenet, channels, or files of weights, named in results.csv by their run directory"
    add(
        "--task",
        choices=["fraction", "scene"],
        default="fraction",
        help="land-cover fractions, or classes of scenes",
    )
    add("--init", nargs="+", default=["random"], metavar="NAME_OR_FILE", help=names)
    add("--arch", choices=["resnet18", "resnet50"], default="resnet18")
    add(
        "--mode",
        nargs="+",
        choices=["linear", "finetune"],
        default=["linear"],
        help="a linear head on frozen features, or the whole network",
    )
    add(
        "--ratios",
        nargs="*",
        type=number(float, above=0, high=100),
        metavar="PERCENT",
        help="of the training images, the same share of each class (default: 5 10 25 50 100, none with "
        "--per-class)",
    )
    add(
        "--per-class",
        nargs="*",
        type=number(int, 1),
        default=[],
        metavar="N",
        help="N training images of each class; stands in results.csv's column ratio as N/class",
    )
    add(
        "--seeds",
        nargs="+",
        type=number(int, 0, 2**31),
        default=[5],
        metavar="N_OR_LIST",
        help="how many, from --seed on; or the seeds themselves",
    )


def training_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--protocol",
        choices=["default", "paper"],
        default="default",
        help="paper: the authors' settings, yaml/paper/transfer_TASK.yaml; --config and flags override them",
    )
    add("--loss", choices=["softmax", "bce"], default="softmax", help="on fractions; bce: sigmoid / row sum")
    add(
        "--probe",
        choices=["lbfgs", "sgd"],
        default="lbfgs",
        help="linear heads. lbfgs: solved for, penalty chosen on val; sgd: trained as in fine-tuning",
    )
    add("--linear-lr", type=number(float, above=0), help="of --probe sgd, where it is not --lr")
    add(
        "--epoch-choice",
        choices=["seed", "common"],
        default="seed",
        help="on val: each seed's best epoch, or the best mean over the seeds (keeps every epoch's rows)",
    )
    add(
        "--check-every",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="epochs between two looks at val, and at the end: with few labels most of the time goes there",
    )
    add(
        "--schedule",
        choices=["constant", "cosine"],
        default="cosine",
        help="of --lr: constant as in the paper, or falling to zero over the epochs",
    )
    add(
        "--statistics",
        choices=["backbone", "data"],
        default="backbone",
        help="mean and deviation that images are normalised by: of the pretraining, where they are known, or "
        "of the train split, as the authors did for every initialisation",
    )
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="fine-tune on random flips and quarter turns and, for scenes, crops",
    )
    add(
        "--start-head",
        choices=["random", "probe"],
        default="random",
        help="fine-tune from a random head, or from the one that --mode linear solves for; pretrained "
        "BatchNorm statistics then stay, and --lr is best low (0.0001)",
    )


if __name__ == "__main__":  # torch takes seconds to import: --help and wrong flags do not wait for it
    with common.one_line_errors():
        build_parser().parse_args()
    common.interrupt_quietly()

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data.augment import Recipe, draw, view
from data.names import some_of
from data.opening import Source, digest_of, open_table, stamp_of, statistics_of
from data.pixels import common_size, load_pixels
from data.subsets import training_subsets
from data.tables import Table, explain_empty
from models.backbone import backbone_width, build_backbone, extract_features, prepare
from models.diagnostics import votes_f1
from models.optimisers import learning_rate, make_optimizer, set_rate
from models.probe import VOTERS, Axes, linear_heads, nearest, principal_axes, probabilities
from models.saved import save_model, score_of, whole_state
from models.step import DTYPES, dtype_of_eval
from scores import TASKS, Metrics, Task, measure
from scores.choice import SETTING, is_solved
from scores.metrics import ALL, rows_of_a_cell
from scores.printed import FEW, exact, ratio_name, table
from scores.results import CELL, COLUMNS, Key, Results, write_confusion, write_embeddings

LOSSES = {"softmax": F.cross_entropy, "bce": F.binary_cross_entropy_with_logits}
SPLITS = ("train", "val", "test")
WITHOUT_WEIGHTS = ("random", "channels")  # names that --init knows
EVAL_BATCH = 256


class Diverged(ConfigError):
    """The numbers of a cell are not finite; the other cells go on."""


class Init(NamedTuple):
    name: str  # in results.csv, `harmless`
    source: str  # random, imagenet, channels or a file
    digest: str = ""  # of the weights
    mean: tuple[float, ...] | None = None  # of the images that it was pretrained on; None: not known
    std: tuple[float, ...] | None = None
    maxpool: bool = True  # in the stem


class Data(NamedTuple):
    name: str
    pixels: torch.Tensor  # (n, 3, H, W) uint8
    targets: torch.Tensor  # (n, K) float32: fractions, or one-hot labels
    classes: list[str]
    rows: dict[str, np.ndarray]  # split -> rows
    subsets: dict[tuple[float | str, int], np.ndarray]  # (ratio, seed) -> training rows
    mean: list[float]  # of the train split
    std: list[float]
    digest: str  # of files, splits and targets


class Training(NamedTuple):
    """How a head, or all of a model, is trained by SGD."""

    lr: float
    momentum: float
    weight_decay: float
    epochs: int
    batch_size: int
    loss: str  # a key of LOSSES
    schedule: str = "constant"  # of the rate; or cosine, to zero
    check_every: int = 1  # epochs between two looks at val

    def is_checked(self, epoch: int) -> bool:
        return epoch % self.check_every == 0 or epoch == self.epochs


class Study(NamedTuple):
    """What all cells of a call have in common."""

    task: str
    arch: str
    size: int  # side of the images that the network sees, pixels
    head: Training | None  # of --mode linear; None: solved for
    whole: Training  # of --mode finetune; its loss is that of every head
    augment: bool
    start: str  # where the head of --mode finetune starts: random, or the linear probe
    every_epoch: bool  # in results.csv, so that the seeds can share one; else each seed's best
    statistics: str  # that images are normalised by: the backbone's, where they are known, or the data's
    save_model: bool
    device: torch.device
    dtype: torch.dtype


class Cell(NamedTuple):
    init: Init
    mode: str
    ratio: float | str  # % of the training images, or "N/class"
    seed: int


class Unit(NamedTuple):
    """Cells that share one backbone: the probes of the same features, or one fine-tuning."""

    init: Init
    mode: str
    drawn: int | None  # seed of what is random in the backbone
    cells: list[Cell]


class Outcome(NamedTuple):
    records: list[tuple[float, Metrics, Metrics]]  # (step, val, test) of the best step, or of every epoch
    predicted: np.ndarray  # (test images, K) at the best step
    score: float  # headline metric on val there
    state: dict[str, torch.Tensor]  # of the trained module there; empty if not asked for


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = read_flags(parser, argv)
    device, rank, ranks = common.start_ranks(args.device)
    args.device, args.precision = device.type, common.resolve_precision(args.precision, device)
    if args.data is None:
        scenes = f"{args.scenes} built-in scenes of {args.size} px"
        say(f"no --data: {scenes}, {args.epochs} epochs, {len(args.seed_list)} seeds")
    out = Path(args.out)
    common.make_folder(out)
    results = Results(out)
    inits = open_inits(args.init, args.arch)
    if args.statistics == "data":
        inits = [init._replace(mean=None, std=None) for init in inits]
    with common.rank_zero_first(rank, ranks):
        source, report = Source.of(args, "mixed"), out / "bad_files.csv"
        amounts = {"ratios": args.ratios, "seeds": args.seed_list, "per_class": args.per_class}
        data = open_data(source, args.task, amounts, report, share=args.share_pixels or ranks > 1)
    if common.fits_on_gpu(data.pixels.nbytes, device):
        data = data._replace(pixels=data.pixels.to(device))
    study = study_of(args, device)
    refuse_one_name(results, data.name, inits)
    where = {name: getattr(args, name) for name in ("data", "splits", "split", "scenes")}
    results.check_settings(settings(inits, data, study, args.mode), {f"where {data.name}": where})
    if rank == 0:
        told = common.about(device) | {"val_images": len(data.rows["val"])}
        common.write_yaml(out / "config.yaml", common.flags_of(args, parser) | told)

    ratios = [*args.ratios, *(f"{count}/class" for count in args.per_class)]
    units = plan(inits, args.mode, ratios, args.seed_list)
    work = Work(results, units, data, study, out, show=rank == 0)
    images = ", ".join(f"{len(data.rows[split])} {split}" for split in SPLITS)
    place = f"{args.size} px, {device}, {args.precision}"
    models = notes_on_models(study, inits, data)
    say(f"{args.task}: {work.left()} on {data.name} ({images} images), {place}{models}")
    embedded = args.seed_list[0] if args.save_embeddings else None
    common.exit_on_signals(work.kept)
    # First what no other process is at, then what others have left
    for wait, unit in itertools.product((False, True), units):
        with results.claim(work.name(unit), wait) as mine:
            if mine and unit.mode == "linear":
                probe_all(unit, data, study, work, embedded)
            elif mine:
                finetune_all(unit, data, study, work)
    say(work.finish())
    if rank == 0 and len(work.rows()):
        results.write_summary()
        print(table(work.rows(), args.task))
    common.meet(ranks)  # torchrun ends all where one leaves with exit code 1
    common.end_ranks(ranks)
    if work.failed:
        first = next(iter(work.failed.values()))
        say(f"{len(work.failed)} of {len(work.keys)} cells failed, the first: {first}")
        raise SystemExit(1)


def notes_on_models(study: Study, inits: list[Init], data: Data) -> str:
    """Lines on what --save-model leaves; blank where there is nothing to say."""
    if not study.save_model:
        return ""
    lines = []
    if any(init.source == "channels" for init in inits):
        lines.append("\n--save-model: channels is no network: of it no model is left")
    count = len(data.rows["val"])
    if count < FEW:
        few = f"val has {common.counted(count, 'image')}, which is few"
        lucky = "which epoch or penalty is best there, and of which cell, is largely luck"
        lines.append(f"\n--save-model: {few}: {lucky}")
    return "".join(lines)


# What goes in


def read_flags(parser: common.Parser, argv: list[str] | None) -> argparse.Namespace:
    """Flags over --config over the file of --protocol over, without --data, the small built-in set's
    settings."""
    args = common.parse(parser, argv)
    if args.data is None:
        parser.set_defaults(size=64, epochs=10, scenes=1000, seeds=[3])
    if args.protocol == "paper":
        file = common.ROOT / "yaml" / "paper" / f"transfer_{args.task}.yaml"
        parser.set_defaults(**common.read_yaml(file, parser))
    args = common.parse(parser, argv)
    args.seed_list = args.seeds
    if len(args.seeds) == 1:
        args.seed_list = range(args.seed, args.seed + args.seeds[0])
    if args.ratios is None:
        args.ratios = [] if args.per_class else [5, 10, 25, 50, 100]
    for name in ("seed_list", "ratios", "mode", "per_class"):
        setattr(args, name, unique(getattr(args, name)))
    args.out = args.out or "runs/transfer"
    common.print_config(args, parser)
    if args.task == "scene" and args.loss == "bce":
        raise ConfigError("--loss bce is for --task fraction: an image of --task scene has one class")
    if not args.seed_list:
        raise ConfigError("--seeds 0 leaves nothing to do")
    if not args.ratios and not args.per_class:
        raise ConfigError("--ratios without a number leaves nothing to do: add one, or --per-class N")
    if args.save_embeddings and "linear" not in args.mode:
        raise ConfigError("--save-embeddings keeps the features of --mode linear: add it")
    if set(args.init) == {"channels"} and "linear" not in args.mode:
        raise ConfigError("--init channels has no backbone to fine-tune: add --mode linear")
    return args


def unique(values: Iterable) -> list:
    """Each value once, in their order."""
    return list(dict.fromkeys(values))


def study_of(args: argparse.Namespace, device: torch.device) -> Study:
    whole = Training(
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        epochs=args.epochs,
        batch_size=args.batch_size,
        loss=args.loss,
        schedule=args.schedule,
        check_every=args.check_every,
    )
    head = whole._replace(lr=args.linear_lr or args.lr) if args.probe == "sgd" else None
    return Study(
        task=args.task,
        arch=args.arch,
        size=args.size,
        head=head,
        whole=whole,
        augment=args.augment,
        start=args.start_head,
        every_epoch=args.epoch_choice == "common",
        statistics=args.statistics,
        save_model=args.save_model,
        device=device,
        dtype=DTYPES[args.precision],
    )


def open_inits(sources: list[str], arch: str) -> list[Init]:
    """The initialisations by their names in results.csv, all weights read and checked before anything
    runs."""
    inits = {}
    for source in sources:
        file = Path(source)
        ours = file.name in ("backbone.pth", "checkpoint.pt")
        name = harmless(file.resolve().parent.name if ours else file.stem)
        if name in inits:
            both = f"{inits[name].source} and {source}"
            raise ConfigError(
                f"--init {both} are both called {name} in results.csv: rename one, or its folder"
            )
        if name != source and name in WITHOUT_WEIGHTS:
            raise ConfigError(f"--init {source}: {name} means no weights in results.csv: rename its folder")
        plain = source in WITHOUT_WEIGHTS
        inits[name] = Init(name, source) if plain else open_weights(name, source, arch)
    return list(inits.values())


def open_weights(name: str, source: str, arch: str) -> Init:
    """Weights that fit the architecture, with the channel statistics of their pretraining."""
    backbone = build_backbone(arch, source)
    weights, known = backbone.state_dict(), backbone.pretraining
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values())).hexdigest()[:12]
    statistics = {key: tuple(known[key]) for key in ("mean", "std") if known.get(key)}
    return Init(name, source, digest, **statistics, maxpool=bool(known.get("maxpool", True)))


def open_data(source: Source, task: str, amounts: dict[str, list], report: Path, share: bool) -> Data:
    """Decoded pixels, targets, splits and training subsets of --data, or of the built-in mixed scenes.

    amounts: ratios, seeds and per_class of `training_subsets`. share: one decoded file for all processes.
    """
    opened, checked = open_table(source, report)
    # Built-in scenes are the same on every machine, whenever they were written
    digest = digest_of(opened, checked) if source.data else f"{source.scenes} scenes of {source.size} px"
    check_task(opened, task)
    if task == "scene":
        note_absent(opened)
    labelled = opened.labels >= 0 if task == "scene" else np.ones(len(opened), bool)
    for split in SPLITS:
        if not (opened.split[labelled] == split).any():
            raise DataError(explain_empty(opened, split))
    opened, checked = opened.rows(labelled), checked[labelled]
    rows = {split: np.flatnonzero(opened.split == split) for split in SPLITS}
    targets = opened.targets(task)
    subsets = training_subsets(opened, targets, **amounts)
    height, width = common_size(checked)
    pixels = load_pixels(
        opened.root,
        opened.files,
        height,
        width,
        cache=source.cache,
        workers=source.workers,
        stamp=stamp_of(opened.root, checked),
        share=share,
    )
    mean, std = statistics_of(pixels, rows["train"])
    name = Path(source.data).resolve().name if source.data else "built-in"
    return Data(name, pixels, torch.from_numpy(targets), opened.classes, rows, subsets, mean, std, digest)


def note_absent(opened: Table) -> None:
    """Say which classes have no image in test or val: their F1 is 0 there, and lowers the means."""
    for split in ("val", "test"):
        found = opened.labels[opened.split == split]
        absent = sorted(set(opened.labels[opened.labels >= 0]) - set(found))
        if absent and (found >= 0).any():
            names = some_of([opened.classes[k] for k in absent])
            say(f"note: {split} has no image of {names}: their F1 counts as 0 in macro F1")


def check_task(opened: Table, task: str) -> None:
    """DataError where the table has not what the task needs."""
    root, classes = opened.root, opened.classes
    if task == "fraction" and opened.fractions is None:
        raise DataError(f"{root}: has no class fractions (Land-1.0's CSV files); use --task scene")
    if task == "scene" and not classes:
        raise DataError(f"{root}: --task scene needs labels, class folders or Land-1.0's CSV files")
    if ALL in classes:
        raise DataError(f"{root}: a class is called {ALL}, which means every class: rename it")
    if len(classes) < 2:
        raise DataError(f"{root}: has one class, {classes[0]}: there is nothing to tell apart")


def refuse_one_name(results: Results, data: str, inits: list[Init]) -> None:
    """ConfigError where the files of two pairs of data and init would be called alike: eurosat-spatial with
    moco, and eurosat with spatial-moco."""
    rows = results.read()
    there = dict.fromkeys(zip(rows["data"], rows["init"], strict=True))
    pairs = [*there, *((harmless(data), init.name) for init in inits)]
    first: dict[str, tuple[str, str]] = {}
    for pair in pairs:
        before = first.setdefault("-".join(pair), pair)
        if before != pair:
            both = f"{before[1]} on {before[0]} and of {pair[1]} on {pair[0]}"
            raise ConfigError(
                f"{results.file}: the files of {both} would have one name: choose another --out"
            )


def settings(inits: list[Init], data: Data, study: Study, modes: list[str]) -> dict[str, dict]:
    """What results.csv has no column for, yet must be the same for all of its rows."""
    choice = "common" if study.every_epoch else "seed"
    precision = next(name for name, dtype in DTYPES.items() if dtype == study.dtype)
    shared = {"size": study.size, "arch": study.arch, "loss": study.whole.loss, "epoch_choice": choice}
    shared["precision"] = precision
    if study.statistics != "backbone":
        shared["statistics"] = study.statistics
    trained = {}  # of what is trained by SGD
    if study.whole.schedule != "constant":
        trained["schedule"] = study.whole.schedule
    if study.whole.check_every > 1:
        trained["check_every"] = study.whole.check_every
    extra = {"linear": trained if study.head else {}, "finetune": {"augment": study.augment} | trained}
    if study.start != "random":
        extra["finetune"]["start_head"] = study.start
    parts = {f"{study.task} {mode}": shared | extra[mode] for mode in modes}
    parts[f"data {data.name}"] = {"content": data.digest}
    for init in inits:
        if init.digest:
            parts[f"init {init.name}"] = {"weights": init.digest} | seen_otherwise(init, study)
    return parts


def seen_otherwise(init: Init, study: Study) -> dict:
    """How weights see images, where it is not as their own file of this project says."""
    seen = {}
    if study.statistics == "backbone" and init.mean is None:
        seen["statistics"] = "of the data"
    if not init.maxpool:
        seen["maxpool"] = False
    return seen


def plan(inits: list[Init], modes: list[str], ratios: list[float | str], seeds: list[int]) -> list[Unit]:
    """All cells in units, in the order in which they are done."""
    units = []
    for init in inits:
        for mode in modes:
            if mode == "finetune" and init.source != "channels":
                cells = [Cell(init, mode, ratio, seed) for seed in seeds for ratio in ratios]
                units += [Unit(init, mode, cell.seed, [cell]) for cell in cells]
            elif mode == "linear":
                units += linear_units(init, ratios, seeds)
    return units


def linear_units(init: Init, ratios: list[float | str], seeds: list[int]) -> list[Unit]:
    """One unit, as all cells probe the same weights; of random weights one a seed, which draws them."""
    drawn = {seed: [Cell(init, "linear", ratio, seed) for ratio in ratios] for seed in seeds}
    if init.source == "random":
        return [Unit(init, "linear", seed, cells) for seed, cells in drawn.items()]
    return [Unit(init, "linear", None, sum(drawn.values(), []))]


def statistics(init: Init, data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) that the backbone's images are normalised with: its own where they are known, else the
    data's."""
    return (init.mean or tuple(data.mean), init.std or tuple(data.std))


# Linear probing


class Frozen(NamedTuple):
    """What a frozen backbone makes of every image."""

    backbone: nn.Module | None
    features: torch.Tensor  # (n, D) float32, on the device
    targets: torch.Tensor  # (n, K)
    axes: Axes
    solved: dict[bytes, Outcome]  # training rows -> outcome: with all images, the seeds have one head

    def batch(self, rows: torch.Tensor, training: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of rows (on the device)."""
        return self.features[rows], self.targets[rows]


def probe_all(unit: Unit, data: Data, study: Study, work: "Work", embedded: int | None) -> None:
    """Every image goes once through the frozen backbone, in eval mode; the heads of all cells train on its
    features. `embedded`: the seed whose test features are kept; None keeps none."""
    cells = work.missing(unit)
    file = work.out / f"embeddings-{data.name}-{unit.init.name}.npz"
    wanted = embedded is not None and unit.drawn in (None, embedded) and (cells or not file.exists())
    if not cells and not wanted:
        return
    began = time.perf_counter()
    frozen = freeze(unit.init, unit.drawn, data, study, work.advance)
    if wanted:
        test = data.rows["test"]
        labels = data.targets[test].argmax(1).numpy()
        write_embeddings(
            file, frozen.features[test].cpu().numpy(), labels, data.classes, data.name, unit.init.name
        )
    share = (time.perf_counter() - began) / max(1, len(cells))
    for cell in cells:
        began = time.perf_counter()
        with work.at(cell):
            outcome = probe(cell, frozen, data, study)
            work.add(cell, outcome, share + time.perf_counter() - began)


def freeze(init: Init, drawn: int | None, data: Data, study: Study, advance: Callable[[int], None]) -> Frozen:
    """The features of all images; `drawn`: seed of random weights."""
    torch.manual_seed(drawn or 0)
    backbone = None
    if init.source == "channels":
        features = channel_features(data.pixels)
    else:
        backbone = build_backbone(study.arch, init.source)
        backbone = backbone.to(study.device, memory_format=torch.channels_last)
        mean, std = statistics(init, data)
        features = extract_features(
            backbone, data.pixels, study.size, mean, std, dtype=study.dtype, advance=advance
        )
    if not features.isfinite().all():
        raise ConfigError(f"--init {init.source}: its features are not finite: try --precision fp32")
    features, targets = features.to(study.device), data.targets.to(study.device)
    return Frozen(backbone, features, targets, principal_axes(features[data.rows["train"]]), {})


def channel_features(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 6): mean and standard deviation of each channel of uint8 images (n, 3, H, W)."""
    found = []
    for part in pixels.split(EVAL_BATCH):
        x = part.flatten(2).float()  # (m, 3, H * W)
        found.append(torch.cat([x.mean(2), x.std(2)], 1))
    return torch.cat(found)


def probe(cell: Cell, frozen: Frozen, data: Data, study: Study) -> Outcome:
    """The head of one cell, solved for or trained, and for scenes what the nearest neighbours say."""
    subset = data.subsets[cell.ratio, cell.seed]
    key = subset.tobytes()
    if study.head is None and key in frozen.solved:
        return frozen.solved[key]
    judge = Judge(frozen, data, study.task, study.whole.loss, torch.float32)
    if study.head is None:
        heads = linear_heads(frozen.features[subset], frozen.targets[subset], frozen.axes, study.whole.loss)
        outcome = choose(heads, judge, TASKS[study.task], keep_state=study.save_model)
    else:
        torch.manual_seed(cell.seed)
        head = nn.Linear(frozen.features.shape[1], len(data.classes)).to(study.device)
        epochs = train(head, frozen, subset, study.head, seed=cell.seed)
        outcome = choose(epochs, judge, TASKS[study.task], study.every_epoch, study.save_model)
    if study.task == "scene":
        val, test = (neighbours(frozen, subset, data, split) for split in ("val", "test"))
        outcome = outcome._replace(records=[(step, v | val, t | test) for step, v, t in outcome.records])
    outcome = outcome._replace(state=whole_state(frozen.backbone, outcome.state))
    if study.head is None:
        frozen.solved[key] = outcome
    return outcome


def neighbours(frozen: Frozen, subset: np.ndarray, data: Data, split: str) -> Metrics:
    """Macro F1 of the votes of the 20 nearest training images (`votes_f1`: over the classes that the split
    has, as in log.csv of train_ssl.py), and accuracy of those of the 5 nearest."""
    rows = nearest(frozen.features[subset], frozen.features[data.rows[split]], max(VOTERS))
    votes = frozen.targets[subset][rows].cpu().numpy()  # (m, 20, K)
    truth = data.targets[data.rows[split]].numpy().argmax(1)
    many, few = (votes[:, :k].sum(1).argmax(1) for k in VOTERS)
    return {
        ("knn_f1_macro", ALL): votes_f1(truth, many),
        ("knn5_accuracy", ALL): float((few == truth).mean()),
    }


# Fine-tuning


class Pictures(NamedTuple):
    """Decoded images as the network sees them. They lie on the device where they fit, else in memory."""

    pixels: torch.Tensor  # (n, 3, H, W) uint8
    targets: torch.Tensor  # (n, K), beside the pixels
    device: torch.device  # of the network
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    recipe: Recipe | None  # of random views while training
    generator: torch.Generator

    def batch(self, rows: torch.Tensor, training: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Network inputs (m, 3, size, size) and targets (m, K) of rows (where the pixels lie)."""
        images, targets = upload(self.pixels[rows], self.device), upload(self.targets[rows], self.device)
        if not training or self.recipe is None:
            return prepare(images, self.size, self.mean, self.std), targets
        drawn = draw(len(images), *images.shape[-2:], self.generator, self.recipe)
        return view(images, drawn, self.size, self.mean, self.std), targets


def finetune_all(unit: Unit, data: Data, study: Study, work: "Work") -> None:
    for cell in work.missing(unit):
        began = time.perf_counter()
        with work.at(cell):
            outcome = finetune(cell, data, study, work.advance)
            work.add(cell, outcome, time.perf_counter() - began)


def finetune(cell: Cell, data: Data, study: Study, advance: Callable[[int], None]) -> Outcome:
    """Backbone and head train together on the decoded images, the head from `study.start` on.

    From the probe on, pretrained weights keep their BatchNorm statistics: with those of each batch the
    accuracy swung by ten points from epoch to epoch (results/finetune_statistics.csv).
    """
    subset = data.subsets[cell.ratio, cell.seed]
    if len(subset) < 2:
        raise ConfigError("BatchNorm cannot train on one image: raise --ratios or use --mode linear")
    place = data.pixels.device
    recipe = random_views(study.task, *data.pixels.shape[-2:]) if study.augment else None
    generator = torch.Generator().manual_seed(cell.seed)
    views = (study.size, *statistics(cell.init, data), recipe, generator)
    pictures = Pictures(data.pixels, data.targets.to(place), study.device, *views)
    torch.manual_seed(cell.seed)
    backbone = build_backbone(study.arch, cell.init.source)
    model = nn.Sequential(backbone, nn.Linear(backbone_width(backbone), len(data.classes)))
    if study.start == "probe":
        model.load_state_dict(probed_state(cell, data, study, advance))
    model = model.to(study.device, memory_format=torch.channels_last)
    keep_statistics = study.start == "probe" and cell.init.source != "random"
    epochs = train(
        model,
        pictures,
        subset,
        study.whole,
        seed=cell.seed,
        dtype=study.dtype,
        keep_statistics=keep_statistics,
        advance=advance,
    )
    judge = Judge(pictures, data, study.task, study.whole.loss, dtype_of_eval(study.dtype))
    return choose(epochs, judge, TASKS[study.task], study.every_epoch, study.save_model)


def probed_state(
    cell: Cell, data: Data, study: Study, advance: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """The backbone and its linear probe. A random head's first gradients distort good features, which costs
    most on images from elsewhere (A. Kumar et al., ICLR 2022, LP-FT)."""
    solved = study._replace(head=None, save_model=True)
    return probe(cell, freeze(cell.init, cell.seed, data, study, advance), data, solved).state


def random_views(task: str, height: int, width: int) -> Recipe:
    """Flips and quarter turns and, for scenes alone, crops: a crop changes an image's fractions."""
    whole = Recipe(
        area=(1, 1),
        ratio=(width / height, width / height),
        jitter_probability=0,
        blur_probability=0,
        quarter_turns=True,
    )
    return whole._replace(area=(0.5, 1), ratio=(3 / 4, 4 / 3)) if task == "scene" else whole


# Training and choosing


def train(
    model: nn.Module,
    samples: Frozen | Pictures,
    subset: np.ndarray,
    training: Training,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    keep_statistics: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, nn.Module]]:
    """SGD on the rows `subset` of samples; (epoch, model) after every epoch that is checked.

    The model is the same object each time. The order of the images is drawn from `seed`, `dtype` is
    autocast's; with `keep_statistics` BatchNorm normalises by the statistics it came with, as in eval mode.
    Nothing in a step waits for a GPU, but for fp16's scaler. Diverged where the loss of an epoch is not
    finite.
    """
    device, place = next(model.parameters()).device, samples.targets.device
    optimizer = make_optimizer("sgd", model, training.lr, training.momentum, training.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    order = np.random.default_rng(seed)
    steps = -(-len(subset) // training.batch_size)
    steps = max(1, min(steps, len(subset) // 2))  # BatchNorm cannot train on one image
    for epoch in range(1, training.epochs + 1):
        model.train()
        if keep_statistics:
            fix_statistics(model)
        total = torch.zeros((), device=device)
        shuffled = upload(torch.from_numpy(order.permutation(subset)), place)
        for step, rows in enumerate(shuffled.tensor_split(steps), (epoch - 1) * steps):
            set_rate(optimizer, rate_of(training, step, training.epochs * steps), training.lr)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                inputs, targets = samples.batch(rows, training=True)
                logits = model(inputs).float()  # (m, K)
            loss = LOSSES[training.loss](logits, targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        if not total.isfinite():
            rate = f"lower the learning rate, now {training.lr:g}"
            raise Diverged(f"the loss is not finite in epoch {epoch}: {rate}")
        if advance:
            advance(3 * len(subset))
        if training.is_checked(epoch):
            yield epoch, model


def rate_of(training: Training, step: int, steps: int) -> float:
    """The learning rate of a step of all `steps`."""
    if training.schedule == "constant":
        return training.lr
    return learning_rate(step, steps, warmup=0, peak=training.lr)


def fix_statistics(model: nn.Module) -> None:
    """Put every BatchNorm into eval mode; its weights still train."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@torch.no_grad()
def predict(
    model: nn.Module,
    samples: Frozen | Pictures,
    rows: np.ndarray,
    loss: str,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """(len(rows), K) fractions or class probabilities, in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    found = []
    parts = -(-len(rows) // EVAL_BATCH)
    for part in upload(torch.from_numpy(rows), samples.targets.device).tensor_split(parts):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            inputs, _ = samples.batch(part)
            logits = model(inputs).float()
        found.append(probabilities(logits, loss))
    return torch.cat(found).cpu().numpy()


class Judge(NamedTuple):
    """Predictions of a model on a split, and their metrics."""

    samples: Frozen | Pictures
    data: Data
    task: str
    loss: str
    dtype: torch.dtype

    def __call__(self, model: nn.Module, split: str) -> tuple[np.ndarray, Metrics]:
        rows = self.data.rows[split]
        predicted = predict(model, self.samples, rows, self.loss, self.dtype)
        if not np.isfinite(predicted).all():
            why = "lower the learning rate, or try --precision fp32"
            raise Diverged(f"the predictions are not finite: {why}")
        return predicted, measure(self.task, self.data.targets[rows].numpy(), predicted, self.data.classes)


def choose(
    steps: Iterable[tuple[float, nn.Module]],
    judge: Callable[[nn.Module, str], tuple[np.ndarray, Metrics]],
    task: Task,
    every: bool = False,
    keep_state: bool = False,
) -> Outcome:
    """The step (epoch or penalty) that is best on val, with its metrics on test; those of `every` step if
    asked.

    steps: (step, model) pairs, the first of equals counts. judge(model, split): predictions (n, K) and
    metrics.
    """
    best, records = None, []
    for step, model in steps:
        _, val = judge(model, "val")
        score = val[task.metric, ALL]
        improved = best is None or task.sign * score > task.sign * best.score
        if improved or every:
            predicted, test = judge(model, "test")
            records.append((step, val, test))
        if improved:
            best = Outcome(records[-1:], predicted, score, copy_of(model) if keep_state else {})
    return best._replace(records=records) if every else best


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device, without waiting for it: from pinned memory where that is a GPU."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


# What comes out


class Work:
    """The cells of a call: which of them are missing, and what becomes of one that is done."""

    def __init__(self, results: Results, units: list[Unit], data: Data, study: Study, out: Path, show: bool):
        self.results, self.data, self.study, self.out = results, data, study, out
        self.keys, self.wanted, self.costs = {}, {}, {}
        self.failed: dict[Cell, str] = {}  # that diverged in this process, and what is said of them
        for unit in units:
            for cell in unit.cells:
                key = key_of(cell, study, data.name)
                self.keys[cell] = key
                self.wanted[key] = rows_wanted(cell, study, data)
                self.costs[key] = cost_of(cell, study, data, len(unit.cells))
        self.done = results.done(self.wanted)
        self.before = len(self.done)
        self.added = 0  # by this process
        self.began = time.perf_counter()
        self.damaged = len(results.damaged)
        self.commit = common.git_commit()
        self.bar = tqdm(
            total=sum(self.costs.values()),
            initial=self.spent(),
            smoothing=0,
            disable=None if show else True,
            bar_format="{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]",
        )

    def name(self, unit: Unit) -> str:
        """What a process claims while it is at a unit."""
        ratio = unit.cells[0].ratio if unit.mode == "finetune" else "all ratios"
        return f"{self.study.task} {self.data.name} {unit.init.name} {unit.mode} {unit.drawn} {ratio}"

    def left(self) -> str:
        again = f", {self.damaged} of them again, as results.csv was cut inside them" if self.damaged else ""
        return f"{len(self.keys)} cells{again}"

    def kept(self) -> str:
        self.bar.close()
        done = self.results.done(self.wanted)  # read anew: the signal may have come behind a cell's rows
        cells = f"{len(done)} of {len(self.keys)} cells"
        return f"{cells} are in {self.results.file}; the same command goes on"

    def missing(self, unit: Unit) -> list[Cell]:
        """The unit's cells that no process has done, and that have not failed here."""
        self.done = self.results.done(self.wanted)
        return [c for c in unit.cells if self.keys[c] not in self.done and c not in self.failed]

    @contextlib.contextmanager
    def at(self, cell: Cell) -> Iterator[None]:
        """Begin a ConfigError with the cell it came from. Of one that diverged it is said, and the others go
        on."""
        where = f"{cell.init.name}, {cell.mode}, {ratio_name(cell.ratio)}, seed {cell.seed}"
        try:
            yield
        except ConfigError as error:
            if not isinstance(error, Diverged) or len(self.keys) == 1:
                raise ConfigError(f"{where}: {error}") from None
            self.failed[cell] = f"{where}: {error}"
            self.bar.write(f"failed: {self.failed[cell]}", file=sys.stderr)

    def advance(self, images: int) -> None:
        self.bar.update(images)

    def spent(self) -> int:
        ended = self.done | {self.keys[cell] for cell in self.failed}
        return sum(self.costs[key] for key in ended)

    def add(self, cell: Cell, outcome: Outcome, seconds: float) -> None:
        """Write what a cell gave: the confusion of scenes and the model, both of its best epoch, then its
        rows."""
        data, key = self.data, self.keys[cell]
        if self.study.task == "scene":
            ratio = exact(cell.ratio).replace("/", "-per-")
            name = f"{data.name}-{cell.init.name}-{cell.mode}-{ratio}-{cell.seed}.csv"
            truth = data.targets[data.rows["test"]].argmax(1).numpy()
            write_confusion(self.out / "confusion" / name, truth, outcome.predicted.argmax(1), data.classes)
        if outcome.state:
            save_best_model(self.out, cell, outcome, data, self.study, self.results)
        rows = rows_of(key, outcome, data.subsets[cell.ratio, cell.seed].size, seconds, self.commit)
        self.results.add(key, rows)
        self.done.add(key)
        self.added += 1
        self.bar.set_postfix_str(f"{len(self.done)}/{len(self.keys)} cells", refresh=False)
        self.bar.update(max(0, self.spent() - self.bar.n))  # features were counted for all of their cells

    def rows(self) -> pd.DataFrame:
        """The rows of this call's cells, whichever process wrote them."""
        rows = self.results.read()
        return rows[self.results.keys(rows).isin(set(self.wanted))]

    def finish(self) -> str:
        self.bar.close()
        took = f"{self.added} cells in {time.perf_counter() - self.began:.0f} s"
        others = len(self.keys) - self.before - self.added - len(self.failed)
        came = f", {others} came from other processes" if others else ""
        return f"{took}, {self.before} were there already{came}: {self.results.file}"


def trained_by(cell: Cell, study: Study) -> Training | None:
    """How a cell's weights are found by SGD; None where its head is solved for."""
    return study.head if cell.mode == "linear" else study.whole


def key_of(cell: Cell, study: Study, data: str) -> Key:
    """A cell as the columns CELL and SETTING of results.csv name it; 0 where the head is solved for."""
    training = trained_by(cell, study)
    trained = [getattr(training, name) if training else 0 for name in SETTING]
    names = (study.task, harmless(data), cell.init.name, cell.mode)
    return (*names, *map(exact, (cell.ratio, cell.seed, *trained)))


def rows_wanted(cell: Cell, study: Study, data: Data) -> int:
    """How many rows of results.csv a whole cell has."""
    training = trained_by(cell, study)
    records = 1
    if training and study.every_epoch:
        records = sum(map(training.is_checked, range(1, training.epochs + 1)))
    return records * rows_of_a_cell(study.task, cell.mode, len(data.classes))


def cost_of(cell: Cell, study: Study, data: Data, sharing: int) -> int:
    """The time of a cell, in forward passes of one image: a backward pass takes two, a step of a head about
    1 %. `sharing`: cells that share one pass of all images."""
    training = trained_by(cell, study)
    seen = 3 * training.epochs * len(data.subsets[cell.ratio, cell.seed]) if training else 0
    if cell.mode == "linear":
        return len(data.targets) // sharing + seen // 100
    return seen + len(data.targets) * (study.start == "probe")


def rows_of(key: Key, outcome: Outcome, images: int, seconds: float, commit: str) -> pd.DataFrame:
    """A cell's rows of results.csv: on test every metric, on val those over all classes."""
    shared = dict(zip([*CELL, *SETTING], key, strict=True))
    shared |= {"images": images, "seconds": f"{seconds:.2f}", "commit": commit}
    solved = is_solved(shared)  # its steps are penalties, not epochs
    rows = []
    for step, val, test in outcome.records:
        counted = {"epoch": 0, "weight_decay": exact(step)} if solved else {"epoch": step}
        overall = {name: value for name, value in val.items() if name[1] == ALL}
        for split, found in (("val", overall), ("test", test)):
            for (metric, name), value in found.items():
                result = {"split": split, "metric": metric, "class": name, "value": f"{value:.6g}"}
                rows.append(shared | counted | result)
    return pd.DataFrame(rows, columns=COLUMNS)


def save_best_model(
    out: Path, cell: Cell, outcome: Outcome, data: Data, study: Study, results: Results
) -> None:
    """model-TASK-DATA-INIT.pth, of the cell with the best val metric."""
    file = out / f"model-{study.task}-{data.name}-{cell.init.name}.pth"
    sign = TASKS[study.task].sign
    with results.claim(file.name):
        best = score_of(file)
        if best is not None and sign * outcome.score <= sign * best:
            return
        mean, std = statistics(cell.init, data)
        save_model(
            file,
            outcome.state,
            task=study.task,
            classes=data.classes,
            loss=study.whole.loss,
            arch=study.arch,
            maxpool=cell.init.maxpool,
            size=study.size,
            tile=data.pixels.shape[-2:],
            mean=list(mean),
            std=list(std),
            data=data.name,
            init=cell.init.name,
            mode=cell.mode,
            ratio=cell.ratio,
            seed=cell.seed,
            score=float(outcome.score),
        )


if __name__ == "__main__":
    with common.one_line_errors():
        main()

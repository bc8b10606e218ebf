"""Linear probing and fine-tuning of any initialisation, on land-cover fractions or scenes: a whole table in one call.

    python transfer.py                                                       # built-in scenes, random weights
    python transfer.py --data LAND --init random imagenet runs/barlow/backbone.pth --mode linear finetune
    python transfer.py --data LAND --init random imagenet runs/barlow/backbone.pth --mode linear finetune --protocol paper
    python transfer.py --data PATCHES --task scene --init runs/barlow/backbone.pth --ratios 100 --seeds 1 --save-embeddings
    torchrun --nproc_per_node=4 transfer.py --data LAND                      # over machines, --out is a shared folder

Each cell (initialisation, mode, ratio of the training images, seed) adds its rows to results.csv in --out when it ends.
Any number of processes may fill one file: none does a cell that is there or that another one is at, and a killed call,
started again, goes on with the cells that are missing. A seed redraws the training subset, the head and, for `random`,
the backbone: probing random weights varies over those too. The init `channels` (linear only) has six numbers for
features, the mean and standard deviation of each channel: what colour alone gives.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
from common import ConfigError, number
from data.augment import Recipe, draw, view
from data.pixels import channel_statistics, common_size, load_pixels
from data.tables import DataError, training_subsets
from models import backbone as backbones
from models.backbone import WeightsError, build_backbone, extract_features, prepare, read_weights
from models.probe import linear_heads, neighbour_votes, principal_axes, probabilities
from scores import (
    CELL,
    COLUMNS,
    HEADLINE,
    OPTIMISATION,
    Metrics,
    Results,
    measure,
    summary,
    write_confusion,
    write_embeddings,
)

LOSSES = {"softmax": F.cross_entropy, "bce": F.binary_cross_entropy_with_logits}
EVAL_BATCH = 256


class Init(NamedTuple):
    name: str  # in results.csv
    source: str  # random, imagenet, channels or a file
    digest: str  # of the weights
    imagenet: bool  # trained on ImageNet: normalised with its statistics


class Data(NamedTuple):
    name: str
    pixels: torch.Tensor  # (n, 3, H, W) uint8
    targets: torch.Tensor  # (n, K) float32: fractions, or one-hot labels
    classes: list[str]
    rows: dict[str, np.ndarray]  # split -> rows
    subsets: dict[tuple, np.ndarray]  # (ratio, seed) -> training rows
    mean: list[float]  # of the train split
    std: list[float]
    digest: str  # of files, splits and targets


class Cell(NamedTuple):
    init: Init
    mode: str
    ratio: float  # % of the training images
    seed: int


class Outcome(NamedTuple):
    records: list[tuple[float, Metrics, Metrics]]  # (step, val, test) of the best step, or of every epoch
    predicted: np.ndarray  # (test images, K) at the best step
    score: float  # val headline metric there
    state: dict  # of the trained module there, for --save-model


def flags() -> common.Parser:
    parser = common.Parser(__doc__.split("\n", 1)[0])
    common.common_flags(parser)
    parser.set_defaults(batch_size=64, lr=0.01, weight_decay=1e-4)
    group = parser.add_argument_group("transfer")
    group.add_argument("--task", choices=list(HEADLINE), default="fraction")
    group.add_argument(
        "--init",
        nargs="+",
        default=["random"],
        metavar="NAME_OR_FILE",
        help="random, imagenet, channels, or files of weights, named in results.csv by their run directory",
    )
    group.add_argument("--arch", choices=list(backbones.ARCHITECTURES), default="resnet18")
    group.add_argument("--mode", nargs="+", choices=["linear", "finetune"], default=["linear"])
    group.add_argument(
        "--ratios",
        nargs="+",
        type=number(float, above=0, high=100),
        default=[5, 10, 25, 50, 100],
        metavar="PERCENT",
        help="of the training images, the same share of each class",
    )
    group.add_argument(
        "--seeds",
        nargs="+",
        type=number(int, 0, 2**31),
        default=[5],
        metavar="N_OR_LIST",
        help="how many, from --seed on; or the seeds themselves",
    )
    group.add_argument(
        "--protocol",
        choices=["default", "paper"],
        default="default",
        help="paper: the authors' settings, the file yaml/paper/transfer_TASK.yaml as --config",
    )
    group.add_argument(
        "--loss", choices=list(LOSSES), default="softmax", help="on fractions; bce predicts sigmoid / row sum"
    )
    group.add_argument(
        "--probe",
        choices=["lbfgs", "sgd"],
        default="lbfgs",
        help="linear heads. lbfgs: solved for, penalty chosen on val; sgd: trained as in fine-tuning",
    )
    group.add_argument(
        "--linear-lr", type=number(float, above=0), help="of --probe sgd, where it is not --lr"
    )
    group.add_argument(
        "--epoch-choice",
        choices=["seed", "common"],
        default="seed",
        help="on val: each seed's best epoch, or the best mean over the seeds (results.csv then holds every epoch)",
    )
    group.add_argument(
        "--augment", action="store_true", help="fine-tune on random flips and, for scenes, crops"
    )
    group.add_argument(
        "--save-model", action="store_true", help="keep each init's best model on val, for predict.py"
    )
    group.add_argument(
        "--save-embeddings", action="store_true", help="keep the test features of --mode linear, for plot.py"
    )
    return parser


def read_flags(parser: common.Parser, argv: list[str] | None):
    """Flags, with --protocol's file and, without --data, the small settings of the built-in scenes."""
    args = common.parse(parser, argv)
    if args.protocol == "paper" and not args.config:
        parser.set_defaults(
            config=str(Path(__file__).parent / "yaml" / "paper" / f"transfer_{args.task}.yaml")
        )
    if args.data is None:
        parser.set_defaults(size=64, epochs=10, scenes=1000, seeds=[3])
    args = common.parse(parser, argv)
    seeds = range(args.seed, args.seed + args.seeds[0]) if len(args.seeds) == 1 else args.seeds
    args.seed_list, args.ratios, args.mode = (
        list(dict.fromkeys(values)) for values in (seeds, args.ratios, args.mode)
    )
    args.loss = args.loss if args.task == "fraction" else "softmax"
    args.out = args.out or "runs/transfer"
    if not args.seed_list:
        raise ConfigError("--seeds 0 leaves nothing to do")
    if args.save_embeddings and "linear" not in args.mode:
        raise ConfigError("--save-embeddings keeps the features of --mode linear: add it")
    if set(args.init) == {"channels"} and "linear" not in args.mode:
        raise ConfigError("--init channels has no backbone to fine-tune: add --mode linear")
    return args


def main(argv: list[str] | None = None) -> None:
    parser = flags()
    args = read_flags(parser, argv)
    device, rank, ranks = common.start_ranks(args.device)
    say = print if rank == 0 else lambda *_: None
    args.device, args.precision = device.type, common.resolve_precision(args.precision, device)
    if args.data is None:
        say(
            f"no --data: {args.scenes} built-in scenes of {args.size} px, {args.epochs} epochs, {len(args.seed_list)} seeds"
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results, inits = Results(out), open_inits(args)
    with common.rank_zero_first(rank, ranks):
        data = open_data(args, out)
    results.check_settings(settings(inits, data, args))
    if rank == 0:
        common.write_yaml(out / "config.yaml", common.flags_of(args, parser) | common.about(device))

    # A unit of work shares one backbone: the probes of the same features, or one fine-tuning
    units = {}
    for init, mode in ((i, m) for i in inits for m in args.mode if (i.source, m) != ("channels", "finetune")):
        for seed, ratio in ((s, r) for s in args.seed_list for r in args.ratios):
            drawn = seed if init.source == "random" or mode == "finetune" else None
            units.setdefault((init, mode, drawn, ratio if mode == "finetune" else None), []).append(
                Cell(init, mode, ratio, seed)
            )
    keys = {cell: key_of(cell, data, args) for cells in units.values() for cell in cells}
    costs = {key: cost_of(cell, data, args) for cell, key in keys.items()}
    splits = ", ".join(f"{len(rows)} {split}" for split, rows in data.rows.items())
    say(
        f"{args.task}: {len(keys)} cells on {data.name} ({splits} images), {args.size} px, {device}, {args.precision}"
    )

    truth, commit = data.targets[data.rows["test"]].argmax(1).numpy(), common.git_commit()
    before, began = results.done() & costs.keys(), time.perf_counter()
    bar = tqdm(
        total=sum(costs.values()),
        initial=sum(costs[k] for k in before),
        smoothing=0,
        disable=None if rank == 0 else True,
        bar_format="{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]",
    )
    for wait in (False, True):  # first what no other process is at, then what others have left
        for (init, mode, drawn, ratio), cells in units.items():
            with results.claim(f"{args.task} {data.name} {init.name} {mode} {drawn} {ratio}", wait) as mine:
                if not mine:
                    continue
                done, work = results.done(), probe if mode == "linear" else finetune
                todo = [cell for cell in cells if keys[cell] not in done]
                for cell, outcome, seconds in work(init, drawn, todo, data, args, device, bar.update):
                    if args.task == "scene":
                        file = (
                            out
                            / "confusion"
                            / f"{data.name}-{init.name}-{mode}-{cell.ratio:g}-{cell.seed}.csv"
                        )
                        write_confusion(file, truth, outcome.predicted.argmax(1), data.classes)
                    if outcome.state:
                        save_best_model(out, cell, outcome, data, args, results)
                    results.add(rows_of(cell, outcome, data, args, seconds, commit))
                    done = results.done() & costs.keys()
                    bar.set_postfix_str(f"{len(done)}/{len(keys)} cells", refresh=False)
                    bar.update(sum(costs[k] for k in done) - bar.n)
    bar.close()
    rows = results.read()
    say(
        f"{len(keys) - len(before)} cells in {time.perf_counter() - began:.0f} s, {len(before)} were there: {results.file}"
    )
    say(summary(rows[results.keys(rows).isin(set(keys.values()))], args.task, args.epoch_choice == "common"))
    if ranks > 1:
        dist.destroy_process_group()


# What goes in


def open_inits(args) -> list[Init]:
    """The initialisations by their names in results.csv, all weights read and checked before anything runs."""
    inits = {}
    for source in args.init:
        file, digest, imagenet = Path(source), "", source == "imagenet"
        name = file.resolve().parent.name if file.name in ("backbone.pth", "checkpoint.pt") else file.stem
        if source not in ("random", "channels"):
            state = build_backbone(args.arch, source).state_dict()
            if wrong := [key for key, value in state.items() if not value.isfinite().all()]:
                raise WeightsError(f"{source}: {wrong[0]} holds numbers that are not finite")
            digest = hashlib.sha256(
                b"".join(value.numpy().tobytes() for value in state.values())
            ).hexdigest()[:12]
            imagenet = (
                imagenet or len(read_weights(source).get("fc.bias", ())) == 1000
            )  # torchvision's own file
        if name in inits:
            raise ConfigError(
                f"--init {inits[name].source} and {source} are both called {name} in results.csv: rename a folder"
            )
        inits[name] = Init(name, source, digest, imagenet)
    return list(inits.values())


def open_data(args, out: Path) -> Data:
    """Decoded pixels, targets, splits and training subsets of --data, or of the built-in mixed scenes."""
    table, checked = common.open_table(args, "mixed", out / "bad_files.csv")
    if args.task == "fraction" and table.fractions is None:
        raise DataError(
            f"{table.root}: has no class fractions (Land-1.0's CSV files); class folders do for --task scene"
        )
    if args.task == "scene":
        if not table.classes:
            raise DataError(f"{table.root}: --task scene needs labels, class folders or Land-1.0's CSV files")
        table, checked = table.rows(table.labels >= 0), checked[table.labels >= 0]
    rows = {split: np.flatnonzero(table.split == split) for split in ("train", "val", "test")}
    if empty := [split for split in rows if not len(rows[split])]:
        raise DataError(f"{table.root}: no image is in the {empty[0]} split")
    targets = table.targets(args.task)
    subsets = training_subsets(table, targets, args.ratios, args.seed_list)
    pixels = load_pixels(
        table.root,
        table.files,
        *common_size(checked),
        cache=Path(args.cache),
        workers=args.workers,
        stamp=str(checked.mtime_ns.max()),
    )
    name = Path(args.data).resolve().name if args.data else "built-in"
    labels = table.labels if table.fractions is None else table.fractions  # the same for both tasks
    digest = hashlib.sha256("\0".join([*table.files, *table.split]).encode() + labels.tobytes()).hexdigest()[
        :12
    ]
    return Data(
        name,
        pixels,
        torch.from_numpy(targets),
        table.classes,
        rows,
        subsets,
        *channel_statistics(pixels[rows["train"]]),
        digest,
    )


def settings(inits: list[Init], data: Data, args) -> dict[str, dict]:
    """What results.csv has no column for, and one file must not mix."""
    shared = {"size": args.size, "arch": args.arch, "loss": args.loss, "epoch_choice": args.epoch_choice}
    modes = {"linear": shared, "finetune": shared | {"augment": args.augment}}
    return (
        {f"{args.task} {mode}": modes[mode] for mode in args.mode}
        | {f"data {data.name}": {"content": data.digest}}
        | {f"init {init.name}": {"weights": init.digest} for init in inits if init.digest}
    )


def statistics(init: Init, data: Data) -> tuple:
    return (backbones.IMAGENET_MEAN, backbones.IMAGENET_STD) if init.imagenet else (data.mean, data.std)


# The two modes: (cell, outcome, seconds) of each cell of a unit


def probe(
    init: Init, drawn: int | None, cells: list[Cell], data: Data, args, device, _
) -> Iterator[tuple[Cell, Outcome, float]]:
    """Every image goes once through the frozen backbone, in eval mode; the heads of all cells train on its features.
    `drawn`: the seed of a random backbone."""
    embeddings = Path(args.out) / f"embeddings-{init.name}.npz"
    wanted = (
        args.save_embeddings and drawn in (None, args.seed_list[0]) and (cells or not embeddings.exists())
    )
    if not cells and not wanted:
        return
    began = time.perf_counter()
    torch.manual_seed(drawn or 0)
    if init.source == "channels":
        backbone, features = None, channel_features(data.pixels)
    else:
        backbone = build_backbone(args.arch, init.source).to(device, memory_format=torch.channels_last)
        features = extract_features(
            backbone, data.pixels, args.size, *statistics(init, data), dtype=common.DTYPES[args.precision]
        )
    if not features.isfinite().all():
        raise ConfigError(
            f"--init {init.source}: its features are not finite with --precision {args.precision}: try fp32"
        )
    if wanted:
        test = data.rows["test"]
        write_embeddings(
            embeddings, features[test].numpy(), data.targets[test].argmax(1).numpy(), data.classes, init.name
        )
    features, targets, solved = features.to(device), data.targets.to(device), {}
    axes = principal_axes(features[data.rows["train"]])
    share = (time.perf_counter() - began) / max(1, len(cells))

    def solve(subset):
        for penalty, weight, bias in linear_heads(features[subset], targets[subset], axes, args.loss):
            yield (
                penalty,
                lambda split: probabilities(F.linear(features[data.rows[split]], weight, bias), args.loss),
                lambda: {"weight": weight, "bias": bias},
            )

    for cell in cells:
        began, subset = time.perf_counter(), data.subsets[cell.ratio, cell.seed]
        if args.probe == "sgd":
            torch.manual_seed(cell.seed)
            head = nn.Linear(features.shape[1], len(data.classes)).to(device)
            epochs = train(head, lambda rows, _: features[rows], cell, data, args, torch.float32)
            outcome = choose(epochs, data, args, args.epoch_choice == "common")
        else:  # 100 % is the same head for every seed
            outcome = solved[subset.tobytes()] = solved.get(subset.tobytes()) or choose(
                solve(subset), data, args
            )
        if args.task == "scene":
            votes = {
                s: neighbour_votes(features[subset], targets[subset], features[data.rows[s]])
                for s in ("val", "test")
            }
            val, test = (
                {("knn_f1_macro", "all"): score(votes[s], data, s, "scene")["f1_macro", "all"]} for s in votes
            )
            outcome = outcome._replace(records=[(step, v | val, t | test) for step, v, t in outcome.records])
        if args.save_model:
            parts = {"0": backbone.state_dict(), "1": outcome.state} if backbone else {}
            outcome = outcome._replace(
                state={f"{i}.{key}": value for i, part in parts.items() for key, value in part.items()}
            )
        yield cell, outcome, share + time.perf_counter() - began


def channel_features(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 6): mean and standard deviation of each channel of uint8 images (n, 3, H, W)."""
    return torch.cat(
        [
            torch.cat([x.mean(2), x.std(2)], 1)
            for x in (p.flatten(2).float() for p in pixels.split(EVAL_BATCH))
        ]
    )


def finetune(
    init: Init, _, cells: list[Cell], data: Data, args, device, advance
) -> Iterator[tuple[Cell, Outcome, float]]:
    """Backbone and head train on the decoded images, which lie on the device where they fit."""
    pixels, scene = data.pixels, args.task == "scene"
    if device.type == "cuda" and pixels.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        pixels = pixels.to(device)
    recipe = Recipe(
        area=(0.5 if scene else 1, 1),
        ratio=(3 / 4, 4 / 3) if scene else (1, 1),  # a crop changes the fractions
        jitter_probability=0,
        blur_probability=0,
    )
    for cell in cells:
        began, generator = time.perf_counter(), torch.Generator().manual_seed(cell.seed)
        torch.manual_seed(cell.seed)
        backbone = build_backbone(args.arch, init.source)
        width = len([*backbone.parameters()][-1])  # the last norm's bias
        model = nn.Sequential(backbone, nn.Linear(width, len(data.classes))).to(
            device, memory_format=torch.channels_last
        )

        def batch(rows, training):
            images = pixels[torch.from_numpy(rows).to(pixels.device)].to(device)
            if training and args.augment:
                return view(
                    images,
                    draw(len(images), *images.shape[-2:], generator, recipe),
                    args.size,
                    *statistics(init, data),
                )
            return prepare(images, args.size, *statistics(init, data))

        epochs = train(model, batch, cell, data, args, common.DTYPES[args.precision], advance)
        yield cell, choose(epochs, data, args, args.epoch_choice == "common"), time.perf_counter() - began


# Training and choosing


def train(
    model: nn.Module, batch: Callable, cell: Cell, data: Data, args, dtype, advance=lambda images: None
) -> Iterator[tuple]:
    """SGD at a constant rate on batch(rows, training) -> inputs; (epoch, predict(split), state()) after every epoch."""
    device, subset, order = (
        next(model.parameters()).device,
        data.subsets[cell.ratio, cell.seed],
        np.random.default_rng(cell.seed),
    )
    targets, lr = data.targets.to(device), optimisation(cell.mode, args)["lr"]
    optimizer = common.make_optimizer("sgd", model, lr, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    steps = max(
        1, min(-(-len(subset) // args.batch_size), len(subset) // 2)
    )  # BatchNorm cannot train on one image

    def forward(rows, training=False):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(batch(rows, training)).float()

    @torch.no_grad()
    def predict(split):
        model.eval()
        rows = data.rows[split]
        return probabilities(
            torch.cat([forward(part) for part in np.array_split(rows, -(-len(rows) // EVAL_BATCH))]),
            args.loss,
        )

    for epoch in range(1, args.epochs + 1):
        model.train()
        total = torch.zeros((), device=device)
        for rows in np.array_split(order.permutation(subset), steps):
            loss = LOSSES[args.loss](forward(rows, True), targets[rows])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        if not total.isfinite():
            raise ConfigError(
                f"the loss of {cell.init.name}, {cell.mode}, {cell.ratio:g} %, seed {cell.seed} is not finite in epoch "
                f"{epoch}: lower the learning rate, now {lr:g}; the cells before it are kept"
            )
        advance(3 * len(subset) + len(data.rows["val"]))
        yield (
            epoch,
            predict,
            lambda: {key: value.detach().clone() for key, value in model.state_dict().items()},
        )


def choose(steps: Iterator[tuple], data: Data, args, every: bool = False) -> Outcome:
    """The step (epoch or penalty) that is best on val, with its metrics on test; those of `every` step if asked."""
    (metric, sign), best, records = HEADLINE[args.task], None, []
    for step, predict, state in steps:
        val = score(predict("val"), data, "val", args.task)
        improved = best is None or sign * val[metric, "all"] > sign * best.score
        if improved or every:
            predicted = predict("test")
            records.append((step, val, score(predicted, data, "test", args.task)))
        if improved:
            best = Outcome(
                records[-1:], predicted.cpu().numpy(), val[metric, "all"], state() if args.save_model else {}
            )
    return best._replace(records=records) if every else best


def score(predicted: torch.Tensor, data: Data, split: str, task: str) -> Metrics:
    return measure(task, data.targets[data.rows[split]].numpy(), predicted.cpu().numpy(), data.classes)


def optimisation(mode: str, args) -> dict[str, float]:
    """Columns of results.csv: how the head, or all of the model, was trained; 0 where the head was solved for."""
    if mode == "linear" and args.probe == "lbfgs":
        return dict.fromkeys(OPTIMISATION, 0)
    lr = args.linear_lr if mode == "linear" and args.linear_lr else args.lr
    return {name: getattr(args, name) for name in OPTIMISATION} | {"lr": lr}


def cost_of(cell: Cell, data: Data, args) -> int:
    """For the time left, in forward passes of an image: a backward pass takes two, a step of a head about 1 %."""
    images = args.epochs * (3 * len(data.subsets[cell.ratio, cell.seed]) + len(data.rows["val"]))
    if cell.mode == "finetune":
        return images
    sharing = len(args.ratios) * (1 if cell.init.source == "random" else len(args.seed_list))
    return len(data.targets) // sharing + (images // 100 if args.probe == "sgd" else 0)


# What comes out


def key_of(cell: Cell, data: Data, args) -> tuple[str, ...]:
    """A cell as the columns CELL and OPTIMISATION of results.csv name it."""
    trained = optimisation(cell.mode, args)
    return (
        args.task,
        data.name,
        cell.init.name,
        cell.mode,
        *(f"{v:g}" for v in (cell.ratio, cell.seed, *trained.values())),
    )


def rows_of(cell: Cell, outcome: Outcome, data: Data, args, seconds: float, commit: str) -> pd.DataFrame:
    """The cell's rows of results.csv: on test every metric, on val those over all classes."""
    columns = dict(zip([*CELL, *OPTIMISATION], key_of(cell, data, args)))
    columns |= {
        "images": len(data.subsets[cell.ratio, cell.seed]),
        "seconds": f"{seconds:.2f}",
        "commit": commit,
    }
    solved = columns["lr"] == "0"  # its steps are penalties, not epochs
    return pd.DataFrame(
        [
            columns
            | {
                "epoch": 0 if solved else step,
                "weight_decay": step if solved else columns["weight_decay"],
                "split": split,
                "metric": metric,
                "class": name,
                "value": f"{value:.6g}",
            }
            for step, val, test in outcome.records
            for split, found in (("val", val), ("test", test))
            for (metric, name), value in found.items()
            if split == "test" or name == "all"
        ],
        columns=COLUMNS,
    )


def save_best_model(out: Path, cell: Cell, outcome: Outcome, data: Data, args, results: Results) -> None:
    """model-TASK-INIT.pth, of the cell with the best val metric: all that predict.py needs. `tile`: height and width of
    the images in pixels, before they are resized to `size`."""
    mean, std = statistics(cell.init, data)
    model = {
        "task": args.task,
        "classes": data.classes,
        "loss": args.loss,
        "arch": args.arch,
        "size": args.size,
        "tile": list(data.pixels.shape[-2:]),
        "mean": list(mean),
        "std": list(std),
        "data": data.name,
        "init": cell.init.name,
        "mode": cell.mode,
        "ratio": cell.ratio,
        "seed": cell.seed,
        "score": float(outcome.score),
        "state": {key: value.cpu() for key, value in outcome.state.items()},
    }
    file, sign = out / f"model-{args.task}-{cell.init.name}.pth", HEADLINE[args.task][1]
    with results.claim(file.name):
        if not file.exists() or sign * model["score"] > sign * torch.load(file, weights_only=True)["score"]:
            with common.replacing(file) as partial:
                torch.save(model, partial)


if __name__ == "__main__":
    with common.one_line_errors():
        main()

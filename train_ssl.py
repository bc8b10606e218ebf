"""Self-supervised pretraining of a ResNet on a folder of satellite images.

    python train_ssl.py --method barlow                                             # built-in scenes
    python train_ssl.py --method simclr --data PATCHES --size 64 --epochs 100
    python train_ssl.py --method simclr --data PATCHES --size 32:64 --epochs 100    # small views first
    torchrun --nproc_per_node=4 train_ssl.py --method moco --data PATCHES --batch-size 1024
    python train_ssl.py --method barlow --data PATCHES --profile 50                 # where the time goes

The run directory (--out, runs/<method> by default) holds config.yaml, log.csv, checkpoint.pt (and the one
before), backbone.pth, views.png and curve.png. The same command on a directory that holds a checkpoint goes
on from it, with the same data and state, and on a CPU to the same bits. The recipe of the method,
yaml/METHOD.yaml, overrides the defaults listed above; --print-config prints the values in force.
"""

import argparse
import contextlib
import inspect
import time
from pathlib import Path

import common
from common import ConfigError, number, say


def build_parser() -> common.Parser:
    parser = common.Parser(__doc__)
    common.common_flags(parser, size=size_schedule)
    pretraining_flags(parser.add_argument_group("pretraining"))
    view_flags(parser.add_argument_group("views"))
    method_flags(parser.add_argument_group("method (default: what the method's module says)"))
    return parser


def pretraining_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--method", choices=["barlow", "moco", "simclr", "simsiam"], default="barlow")
    group.add_argument("--arch", choices=["resnet18", "resnet50"], default="resnet18")
    group.add_argument(
        "--init", default="random", help="random, imagenet, or a file of weights to start from"
    )
    flag(
        group, "--maxpool", True, "of the stem; without it features are twice as fine, at 2.3 times the cost"
    )
    group.add_argument("--optimizer", choices=["sgd", "lars", "adam", "adamw"], default="sgd")
    group.add_argument(
        "--warmup-epochs", type=number(float, 0, 1e6), default=1.0, help="linear, then a cosine, per step"
    )
    group.add_argument(
        "--subset", type=number(float, above=0, high=1), default=1.0, help="share of each class that trains"
    )
    group.add_argument("--loader", choices=["auto", "dali", "torch"], default="auto")
    group.add_argument(
        "--dali-cache",
        type=number(int, 0, 2**20),
        default=0,
        help="MiB of GPU memory for DALI's decoder cache",
    )
    group.add_argument("--knn-every", type=number(int, 1), default=5, help="epochs between k-NN checks")
    group.add_argument(
        "--stop-epoch", type=number(int, 1), help="stop there; without it the same command goes on"
    )
    group.add_argument(
        "--save-minutes", type=number(float, above=0), default=10.0, help="between checkpoints in an epoch"
    )
    group.add_argument(
        "--accumulate",
        type=number(int, 1, 1024),
        default=1,
        help="parts of a step, one at a time, on a small GPU: BatchNorm and negatives see one part",
    )
    flag(group, "--compile", False, "torch.compile the backbone")
    flag(group, "--graph", False, "replay each step's passes as one CUDA graph: for small images on one GPU")
    group.add_argument("--profile", type=number(int, 2), metavar="N", help="time N steps instead of training")


def view_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--min-area",
        type=number(float, above=0, high=1),
        default=0.2,
        help="smallest crop, share of the image",
    )
    group.add_argument(
        "--jitter", type=number(float, 0, 1), default=0.4, help="of brightness, contrast and saturation"
    )
    group.add_argument("--blur", type=number(float, 0, 1), default=0.5, help="probability of Gaussian blur")
    flag(group, "--quarter-turns", False, "turn half of the views by 90 degrees: a satellite image has no up")


def method_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hidden", type=number(int, 1, 2**16), help="width of the projector")
    group.add_argument("--out-dim", type=number(int, 2, 2**16), help="width of the embedding")
    group.add_argument(
        "--lambda",
        type=number(float, 0, 1e3),
        dest="lambda_",
        metavar="LAMBDA",
        help="barlow: off-diagonal weight",
    )
    group.add_argument("--temperature", type=number(float, above=0, high=100), help="moco, simclr")
    group.add_argument("--queue-size", type=number(int, 1, 2**22), help="moco")
    group.add_argument("--key-momentum", type=number(float, 0, 1), help="moco")
    group.add_argument(
        "--bn-splits", type=number(int, 1, 2**16), help="moco: groups of split-BN in the key encoder"
    )
    flag(group, "--symmetric", None, "moco: both views as queries")
    group.add_argument(
        "--predictor-hidden", type=number(int, 1, 2**16), help="simsiam: width of the bottleneck"
    )
    group.add_argument(
        "--predictor-rate",
        type=number(float, above=0, high=1e4),
        help="simsiam: constant rate of the predictor, times --lr",
    )


def flag(group: argparse._ArgumentGroup, name: str, default: bool | None, text: str) -> None:
    """A switch with its --no-NAME."""
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)


def size_schedule(text: str) -> int | str:
    """argparse type of --size: pixels, or SMALL:LARGE."""
    if ":" not in text:
        return common.side(text)
    parts = text.split(":")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not one size in pixels, nor two as in 32:64")
    small, large = map(common.side, parts)
    if small >= large:
        raise argparse.ArgumentTypeError(f"{text!r} does not grow: the small size comes first, as in 32:64")
    return f"{small}:{large}"


if __name__ == "__main__":  # torch takes seconds to import: --help and wrong flags do not wait for it
    with common.one_line_errors():
        build_parser().parse_args()
    common.interrupt_quietly()

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.augment import Recipe
from data.images import FEWEST, Images, make_loader, open_images
from data.loader import Loader, Plan, choose_loader
from data.opening import Source
from data.tables import explain_empty
from models import METHODS
from models.backbone import build_backbone, compile_backbones, extract_features, ripe_statistics
from models.checkpoint import PLACE, Parts, Progress, Saver, load_checkpoint
from models.diagnostics import COLLAPSED, DIAGNOSED, diagnose, has_collapsed
from models.graph import GraphedLearner
from models.optimisers import can_fuse, learning_rate, make_optimizer, set_rate
from models.step import DTYPES, Learner, Losses, StopFlag, dtype_of_eval, mean_over_ranks
from models.sync_norm import synchronise
from models.timing import Watch, profile_steps
from models.weights import save_backbone
from plots.run import draw_curve, save_views
from scores.printed import FEW

LARGE_FROM = 0.8  # --size SMALL:LARGE trains at LARGE from this share of the epochs on
BETWEEN_CHECKPOINTS = 30  # seconds: a checkpoint is 150 MB, so epochs that end faster share one
LEFT = {"backbone": "backbone.pth", "log": "log.csv", "views": "views.png", "curve": "curve.png"}


def main(argv: list[str] | None = None) -> None:
    # Flags and place
    parser = build_parser()
    args = read_flags(parser, argv)
    device, rank, ranks = common.start_ranks(args.device)
    chosen = resolve(args, device, ranks)
    lead, out = rank == 0, Path(args.out)
    with common.hold(out, "train_ssl.py") if lead else contextlib.nullcontext():
        method, model = build_model(args, device, ranks)  # refuses wrong weights before images are decoded

        # Data: a table, its training rows, and what each step sees of them
        with common.rank_zero_first(rank, ranks):
            source = Source.of(args, "pure")._replace(size=last_size(args.size))
            images = open_images(source, args.subset, args.seed, args.batch_size, out / "bad_files.csv")
            images = as_pretrained(images, method.backbone)
            plan = make_plan(args, images, rank, ranks)
            args.loader, why = choose_loader(args.loader, device, source.size, images.nbytes())
            loader = make_loader(args.loader, images, plan, device, source, **loader_options(args))

        # Optimiser and precision
        optimizer = build_optimizer(args, method, device)
        scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
        parts, dtype = Parts(method, optimizer, scaler), DTYPES[args.precision]
        config = common.flags_of(args, parser)
        learn = Learner(model, optimizer, scaler, dtype, args.accumulate)
        learn = GraphedLearner(learn) if args.graph else learn
        tell(config, images, plan, args, why)
        if args.profile:
            return profile(args, loader, learn, device, out)

        # Begin, or go on from the checkpoint
        about = about_backbone(args, images)
        progress, found = load_checkpoint(out, parts, config, chosen, images.digest, about)
        stop_epoch = min(args.stop_epoch or args.epochs, args.epochs)
        say_where_it_stands(progress, found, stop_epoch, args.epochs, out)
        save = Saver(out, parts, config, about, images.digest, found) if lead else lambda progress: None
        if lead:
            write_beginning(out, config | common.about(device), about, loader, images, fresh=not found)
        stop, steps, warmup = StopFlag(ranks), plan.steps(), round(args.warmup_epochs * plan.steps())
        bar = make_bar(args.epochs, plan.shown(), progress, steps, lead)
        for epoch in range(progress.epoch, stop_epoch):
            loader.size = size_at(args.size, epoch, args.epochs)
            watch, losses = Watch(progress), Losses(progress.loss, device, epoch, out)
            method.train()
            for step, views in enumerate(watch.waiting(loader.epoch(epoch, progress.step)), progress.step):
                rate = learning_rate(epoch * steps + step, args.epochs * steps, warmup, args.lr)
                set_rate(optimizer, rate, args.lr)
                losses.add(learn(views), step)
                bar.update(len(views[0]) * ranks)
                stopping, saving = stop.ask(watch.since_save() > 60 * args.save_minutes)
                if stopping or saving:
                    save(watch.progress(epoch, step + 1, mean_over_ranks(losses.total(), ranks, device)))
                if stopping:
                    bar.close()
                    end_by_signal(stop, out, epoch, args.epochs, step, steps)

            # Check: how healthy and how good the features are, then the row of the log
            loss = losses.total() / steps  # before the clock stops: it waits until a GPU is done
            watch.stop()
            checks = epoch + 1 == args.epochs or (epoch + 1) % args.knn_every == 0
            row = {
                "epoch": epoch + 1,
                "loss": mean_over_ranks(loss, ranks, device),
                "chance_loss": method.chance_loss(plan.shown() // steps // args.accumulate),
                "lr": learning_rate(epoch * steps + steps - 1, args.epochs * steps, warmup, args.lr),
                **check_features(method.backbone, images, args, dtype, checks and images.knn),
                "images_per_s": plan.shown() / watch.trained,
                "data_wait": watch.waited / watch.trained,
                "seconds": watch.seconds(),
            }
            progress = Progress(epoch + 1, 0, [*progress.log, row])
            if lead:
                finish_epoch(out, progress, method.backbone, about, save, checks or epoch + 1 == stop_epoch)
                bar.write(describe(row, args.epochs, device))
            progress.seconds = watch.seconds() - row["seconds"]  # of files: the next row's
        bar.close()
        if lead:
            finish_run(out, progress.log, method.backbone, about)
        say("\n".join(f"{name}: {out / file}" for name, file in LEFT.items()))
    common.end_ranks(ranks)


# Flags


def size_at(size: int | str, epoch: int, epochs: int) -> int:
    """Side of the views in an epoch, pixels: of SMALL:LARGE the small one until LARGE_FROM of the epochs are
    over."""
    small, _, large = str(size).partition(":")
    first = min(LARGE_FROM * epochs, epochs - 1)  # of few epochs the last one
    return int(large) if large and epoch >= first else int(small)


def last_size(size: int | str) -> int:
    return int(str(size).rpartition(":")[2])


def read_flags(parser: common.Parser, argv: list[str] | None) -> argparse.Namespace:
    """The flags. A flag of the method that is not given takes the default of the method's constructor.
    Without --data small settings stand in for the defaults; the command line and the YAML file still win."""
    args = common.parse(parser, argv, recipes=common.ROOT / "yaml")
    if args.data is None:
        parser.set_defaults(size=64, epochs=10, batch_size=128)
        args = common.parse(parser, argv, recipes=common.ROOT / "yaml")
    for name, default in own_settings(args).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.out = args.out or f"runs/{args.method}"
    common.print_config(args, parser)
    common.refuse_inside(Path(args.out), args.data, "--out")
    return args


def own_settings(args: argparse.Namespace) -> dict[str, object]:
    """`settings_of` the method; ConfigError where a flag is given that only other methods have."""
    own = settings_of(args.method)
    every = set().union(*map(settings_of, METHODS))
    for name in sorted(every - own.keys()):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.strip('_').replace('_', '-')} is no setting of {args.method}")
    return own


FLAG_OF = {"out": "out_dim", "splits": "bn_splits"}  # where a constructor's argument has another name


def settings_of(method: str) -> dict[str, object]:
    """Flag -> default of a method's settings, which are the arguments of its constructor."""
    arguments = inspect.signature(METHODS[method]).parameters
    return {
        FLAG_OF.get(name, name): argument.default
        for name, argument in arguments.items()
        if name != "backbone"
    }


def resolve(args: argparse.Namespace, device: torch.device, ranks: int) -> set[str]:
    """Replace `auto` by what this machine can do. Returns the flags that were `auto`: a later start may
    resolve them differently."""
    if args.batch_size % (ranks * args.accumulate):
        raise ConfigError(
            f"--batch-size {args.batch_size} does not divide among {ranks} ranks and {args.accumulate} parts"
        )
    chosen = {name for name in ("device", "precision", "loader") if getattr(args, name) == "auto"}
    args.precision = common.resolve_precision(args.precision, device)
    args.device = device.type
    one_part = ranks == args.accumulate == 1
    if args.graph and not (device.type == "cuda" and args.precision != "fp16" and one_part):
        raise ConfigError("--graph is for one GPU, bf16 or fp32, and steps of one part: leave it out")
    if args.compile and ranks > 1:
        raise ConfigError(
            "--compile is for one process: over ranks each SyncBatchNorm ends what is compiled: leave it out"
        )
    if args.profile and ranks > 1:
        raise ConfigError("--profile is for one process: leave torchrun out")
    if args.method == "moco" and args.bn_splits % ranks:
        raise ConfigError(f"--bn-splits {args.bn_splits} does not divide among {ranks} ranks")
    return chosen


# Data


def as_pretrained(images: Images, backbone: torch.nn.Module) -> Images:
    """The images, with the mean and std of the backbone's pretraining where they are known."""
    known = backbone.pretraining or {}
    mean, std = known.get("mean", images.mean), known.get("std", images.std)
    return images._replace(mean=list(mean), std=list(std))


def make_plan(args: argparse.Namespace, images: Images, rank: int, ranks: int) -> Plan:
    recipe = Recipe(
        area=(args.min_area, 1),
        jitter=args.jitter,
        blur_probability=args.blur,
        quarter_turns=args.quarter_turns,
    )
    plan = Plan(
        len(images.train),
        args.batch_size,
        images.height,
        images.width,
        seed=args.seed,
        rank=rank,
        ranks=ranks,
        recipe=recipe,
        parts=args.accumulate,
    )
    together = 1 if args.method == "moco" else ranks  # MoCo's key encoder normalises on each rank
    if plan.largest() * together // args.accumulate < 2:
        parts = f" of {args.accumulate} parts (--accumulate)" if args.accumulate > 1 else ""
        raise ConfigError(
            f"--batch-size {args.batch_size} cuts {plan.images} images into {plan.steps()} steps{parts}, "
            "and BatchNorm cannot train on one image: raise it"
        )
    return plan


def loader_options(args: argparse.Namespace) -> dict:
    first = size_at(args.size, 0, args.epochs)
    return {"size": first, "dtype": DTYPES[args.precision], "cache_mb": args.dali_cache}


# Model


def build_model(
    args: argparse.Namespace, device: torch.device, ranks: int
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(method, what is called in a step: the method, or DistributedDataParallel around it)."""
    refuse_too_large(args, device)
    torch.manual_seed(args.seed)
    method = build_method(args)
    if ranks > 1:
        synchronise(method, device.type == "cuda")
    method.to(device, memory_format=torch.channels_last)
    if args.compile:
        compile_backbones(method)
    return method, distributed(method) if ranks > 1 else method


def refuse_too_large(args: argparse.Namespace, device: torch.device) -> None:
    """ConfigError where weights, gradients and the optimiser's two moments need more memory than there is."""
    with torch.device("meta"):
        method = build_method(args, init="random")
    needed = 16 * sum(p.numel() for p in method.parameters()) + sum(4 * b.numel() for b in method.buffers())
    memory = common.memory()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    if needed > memory:
        raise ConfigError(
            f"not enough memory: this network takes {needed / 1e9:.1f} GB to train, and {device.type} has "
            f"{memory / 1e9:.1f} GB: lower --hidden, --out-dim or --queue-size"
        )


def build_method(args: argparse.Namespace, init: str | None = None) -> torch.nn.Module:
    """The method of the flags, on a backbone of the flags."""
    parameters = inspect.signature(METHODS[args.method]).parameters
    values = {name: getattr(args, FLAG_OF.get(name, name)) for name in parameters if name != "backbone"}
    if "key_momentum" in values:
        values["key_momentum"] **= 1 / args.accumulate  # the key encoder moves once a part
    backbone = build_backbone(args.arch, init or args.init, maxpool=args.maxpool)
    if args.maxpool and not (backbone.pretraining or {}).get("maxpool", True):
        raise ConfigError(f"--init {args.init} was pretrained without the stem's max-pool: add --no-maxpool")
    return METHODS[args.method](backbone, **values)


def distributed(method: torch.nn.Module) -> DistributedDataParallel:
    """DistributedDataParallel around a method whose buffers are alike on all ranks: none is sent."""
    known = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"  # torch 2.14 warns of the old name
    return DistributedDataParallel(method, **{new if new in known else old: False})


def build_optimizer(
    args: argparse.Namespace, method: torch.nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    fused = can_fuse(device, args.precision)
    return make_optimizer(args.optimizer, method, args.lr, args.momentum, args.weight_decay, fused)


# What is said


def tell(config: dict, images: Images, plan: Plan, args: argparse.Namespace, why: str) -> None:
    """Say the resolved flags, and what the run makes of its data."""
    say("\n".join(f"{key}: {value}" for key, value in config.items() if value is not None))
    if args.data is None:
        say(f"no --data: {args.scenes} built-in scenes of {last_size(args.size)} px")
    say(
        f"data: {len(images.train)} images of {images.width} x {images.height} px, "
        f"mean {images.mean}, std {images.std}"
    )
    say(size_line(args.size, images))
    if images.knn:
        few = ": few, so their F1 is a rough number" if images.held_out() < FEW else ""
        voted = f"{images.bank} training images vote on {images.held_out()} labelled ones held out"
        say(f"k-NN checks: {voted}{few}")
    else:
        say(f"k-NN checks: off: {why_no_votes(images)}")
    say(f"loader: {args.loader} ({why})")
    if args.accumulate > 1:
        part = plan.largest() * plan.ranks // args.accumulate
        say(f"accumulate: BatchNorm and negatives see {part} images at a time")
    if plan.shown() < 0.95 * plan.images:
        left = f"{plan.images - plan.shown():,} of {plan.images:,} images are left over in each epoch"
        say(f"note: {left}, other ones each time: all steps and parts are of one size")


def size_line(size: int | str, images: Images) -> str:
    """At which size the network sees the images, and what their own size is."""
    own, seen = max(images.height, images.width), last_size(size)
    text = (
        f"size: the network sees {size} x {size} px"
        if isinstance(size, int)
        else f"size: {size} px, small first"
    )
    text += f"; the images have {images.width} x {images.height}"
    if seen >= 1.5 * own:
        text += f": enlarging them costs {(seen / own) ** 2:.0f} times the time"
        text += f"; --size {own} is their own" if own >= common.SMALLEST else ""
    return text


def why_no_votes(images: Images) -> str:
    """Which split lacks labelled images for a k-NN check, why, and what to do."""
    table = images.table
    voters = int((table.labels[images.train] >= 0).sum())
    if 0 < voters < min(FEWEST, len(images.train)):
        return f"{voters} labelled training images among unlabelled ones are too few to vote"
    lacks_train = table.classes and not voters
    return explain_empty(table, "train" if lacks_train else "val")


# Where the time goes


def profile(
    args: argparse.Namespace, loader: Loader, learn: Learner, device: torch.device, out: Path
) -> None:
    """Time the loader alone, the model alone and both; say which one limits, and leave profile.csv and
    trace.json."""
    found = profile_steps(loader, learn, device, args.profile, out / "trace.json")
    about = {
        "loader": args.loader,
        "size": loader.size,
        "batch_size": args.batch_size,
        "precision": args.precision,
    }
    common.write_csv(out / "profile.csv", [about | found])
    if loader.size < last_size(args.size):
        large = last_size(args.size)
        say(f"these are views of {loader.size} px; the last fifth of the epochs sees {large} px")
    alone, model = found["loader_images_per_s"], found["model_images_per_s"]
    say(
        f"loader alone {alone:.0f} img/s, model alone {model:.0f} img/s, "
        f"both {found['images_per_s']:.0f} img/s, "
        f"{waiting(found['data_wait'], device)}, "
        f"peak memory {found['peak_memory_gb']:.2f} GB\n"
        f"bottleneck: {'the loader' if alone < model else 'the model'}; trace: {out / 'trace.json'}"
        f"{hint_of_load()}"
    )


# Going on, and stopping


def about_backbone(args: argparse.Namespace, images: Images) -> dict:
    """What travels with the backbone: how it saw images."""
    return {"mean": images.mean, "std": images.std, "size": last_size(args.size), "maxpool": args.maxpool}


def say_where_it_stands(progress: Progress, source: str, stop_epoch: int, epochs: int, out: Path) -> None:
    """That the run is complete, or from where it goes on."""
    if progress.epoch >= stop_epoch:
        goal = f" of {epochs}, as --stop-epoch asks" if stop_epoch < epochs else ""
        say(f"{out} is complete at epoch {progress.epoch}{goal}")
    elif source:
        where = f"epoch {progress.epoch + 1}/{epochs}, {progress.step} steps of it done"
        say(f"going on from {out / source}: {where}")


def write_beginning(
    out: Path, config: dict, about: dict, loader: Loader, images: Images, fresh: bool
) -> None:
    """Write config.yaml and views.png where they are missing or, the former, damaged; for a run that begins
    `fresh` also over those that a run without a checkpoint has left. For one that goes on, config.yaml says
    where its images are now."""
    file = out / "config.yaml"
    began = {} if fresh else common.read_quietly(file)
    if not began:
        told = {"mean": about["mean"], "std": about["std"], "collapsed_below": COLLAPSED}
        told["images"] = int((images.table.split == "train").sum())  # of which --subset takes a share
        told["val_images"] = images.held_out()
        common.write_yaml(file, config | told)
    else:
        common.write_yaml(file, began | {name: config[name] for name in PLACE})
    if fresh or not (out / "views.png").exists():
        view1, view2 = next(iter(loader.epoch(0)))
        save_views(view1, view2, images.mean, images.std, out / "views.png")


def make_bar(epochs: int, images: int, progress: Progress, steps: int, lead: bool) -> tqdm:
    done = int(images * (progress.epoch + progress.step / steps))
    silent_bar = None if lead else True  # None: silent where the output is no terminal
    return tqdm(
        total=epochs * images, initial=done, unit="img", unit_scale=True, smoothing=0.05, disable=silent_bar
    )


def end_by_signal(stop: StopFlag, out: Path, epoch: int, epochs: int, step: int, steps: int) -> None:
    """Leave together: torchrun kills, after 30 seconds, those that are left when the first has gone."""
    common.meet(stop.ranks)  # rank 0 has saved
    say(
        f"stopped by a signal in epoch {epoch + 1}/{epochs} after step {step + 1}/{steps}; "
        f"{out / 'checkpoint.pt'} is there: the same command goes on"
    )
    raise SystemExit(stop.exit_code())


# Checks, and what they leave


def check_features(
    backbone: torch.nn.Module, images: Images, args: argparse.Namespace, dtype: torch.dtype, knn: bool
) -> dict[str, float | None]:
    """`diagnose` the sample."""
    rows = np.arange(len(images.pixels) if knn else min(images.bank, DIAGNOSED))
    size = last_size(args.size)
    # To compile for evaluation takes longer than these few batches do.
    eager = torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()
    with eager, ripe_statistics(backbone):
        features = extract_features(
            backbone, images.pixels, size, images.mean, images.std, dtype=dtype_of_eval(dtype), rows=rows
        )
    features = features.to(next(backbone.parameters()).device)  # a GPU does the rest sooner as well
    return diagnose(features, images.table.labels[images.sample], images.bank, knn)


def finish_epoch(
    out: Path, progress: Progress, backbone: torch.nn.Module, about: dict, save: Saver, due: bool
) -> None:
    """Write log.csv; if `due`, or if the last checkpoint is older than BETWEEN_CHECKPOINTS, then backbone.pth
    and last the checkpoint: a run killed in between writes them again. ConfigError, and no weights are
    written, where they are not finite."""
    save.refuse_not_finite(progress.epoch)
    common.write_csv(out / "log.csv", progress.log)
    file = out / "checkpoint.pt"
    if due or not file.exists() or time.time() - file.stat().st_mtime > BETWEEN_CHECKPOINTS:
        with ripe_statistics(backbone):
            save_backbone(backbone, out / "backbone.pth", about)
        save(progress)


def finish_run(out: Path, log: list[dict], backbone: torch.nn.Module, about: dict) -> None:
    """Draw the curve, and write again what is no longer there."""
    draw_curve(log, out / "curve.png")
    if not (out / "log.csv").exists():
        common.write_csv(out / "log.csv", log)
    if not (out / "backbone.pth").exists():
        with ripe_statistics(backbone):
            save_backbone(backbone, out / "backbone.pth", about)


def describe(row: dict, epochs: int, device: torch.device) -> str:
    """A line on an epoch, for people."""
    shown = {name: f"  {name} {row[name]:.3g}" if row[name] is not None else "" for name in COLLAPSED}
    knn = "" if row["knn_macro_f1"] is None else f"  k-NN macro F1 {row['knn_macro_f1']:.3f}"
    knn += "" if row["knn5_accuracy"] is None else f", 5-NN accuracy {row['knn5_accuracy']:.3f}"
    text = (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f} (chance {row['chance_loss']:.4f})"
        f"{shown['feature_std']}{shown['effective_rank']}{knn}  "
        f"{row['images_per_s']:.0f} img/s, {waiting(row['data_wait'], device)}"
    )
    if has_collapsed(row):
        text += "\nwarning: the features have collapsed: every image looks the same; change the recipe"
    if row["feature_std"] is None:
        text += "\nwarning: the features are not finite, so they were not looked at; lower --lr"
    return text + hint_of_load()


def waiting(share: float, device: torch.device) -> str:
    """The share of its time that the host spends in the loader. On a GPU that is no lack of data: views are
    launched there, and the host waits there when its queue of launches is full."""
    percent = f"{100 * share:.0f} %"
    return f"host {percent} in the loader" if device.type == "cuda" else f"{percent} waiting"


def hint_of_load() -> str:
    """What helps a CPU whose cores are crowded; else blank."""
    crowd = common.crowded()
    if not crowd or torch.cuda.is_available() or torch.get_num_threads() == 1:
        return ""
    return f"\nhint: {crowd}: OMP_NUM_THREADS=1 may be faster"


if __name__ == "__main__":
    with common.one_line_errors():
        main()

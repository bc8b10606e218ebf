"""Self-supervised pretraining of a ResNet on a folder of satellite images.

    python train_ssl.py --method barlow                                             # built-in scenes
    python train_ssl.py --method simclr --data PATCHES --size 64 --epochs 100
    torchrun --nproc_per_node=4 train_ssl.py --method moco --data PATCHES --batch-size 1024
    python train_ssl.py --method barlow --data PATCHES --profile 50                 # where the time goes

The run directory (--out, runs/<method> by default) holds config.yaml, log.csv, checkpoint.pt, backbone.pth, views.png
and curve.png. The same command on a directory that holds a checkpoint goes on from it, exactly.
"""

import argparse
import importlib.util
import inspect
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
from common import ConfigError, number
from data.augment import Recipe
from data.loader import Plan, TorchLoader
from data.pixels import channel_statistics, common_size, load_pixels
from data.splits import stratified_subset
from data.tables import DataError
from models import METHODS
from models.backbone import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, build_backbone, extract_features
from models.diagnostics import effective_rank, feature_std, knn_macro_f1
from models.sync_norm import synchronise

BANK, QUERIES, DIAGNOSED = 5000, 2000, 1024  # images: k-NN neighbours, k-NN queries, collapse diagnostics
NO_EFFECT = {
    "out",
    "cache",
    "workers",
    "stop_epoch",
    "save_minutes",
    "profile",
    "dali_cache",
    "config",
}  # on the result


def flags() -> common.Parser:
    parser = common.Parser(__doc__.split("\n", 1)[0])
    common.common_flags(parser)
    group = parser.add_argument_group("pretraining")
    group.add_argument("--method", choices=list(METHODS), default="barlow")
    group.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet18")
    group.add_argument(
        "--init", default="random", help="random, imagenet, or a file of weights to start from"
    )
    group.add_argument("--optimizer", choices=["sgd", "adam", "adamw", "lars"], default="sgd")
    group.add_argument(
        "--warmup-epochs", type=number(float, 0), default=1.0, help="linear warm-up, then cosine, per step"
    )
    group.add_argument(
        "--subset", type=number(float, above=0, high=1), default=1.0, help="share of each class that trains"
    )
    group.add_argument("--loader", choices=["auto", "dali", "torch"], default="auto")
    group.add_argument(
        "--dali-cache", type=number(int, 0), default=0, help="MiB of GPU memory for DALI's decoder cache"
    )
    group.add_argument("--knn-every", type=number(int, 1), default=5, help="epochs between k-NN checks")
    group.add_argument(
        "--stop-epoch", type=number(int, 1), help="stop there; without it the same command goes on"
    )
    group.add_argument(
        "--save-minutes", type=number(float, above=0), default=10.0, help="between checkpoints in an epoch"
    )
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the backbone"
    )
    group.add_argument("--profile", type=number(int, 2), metavar="N", help="time N steps instead of training")
    group = parser.add_argument_group("views")
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
    group = parser.add_argument_group("method (default: what the method's module says)")
    group.add_argument("--hidden", type=number(int, 1), help="width of the projector")
    group.add_argument("--out-dim", type=number(int, 2), help="width of the embedding")
    group.add_argument(
        "--lambda",
        type=number(float, 0),
        dest="lambda_",
        metavar="LAMBDA",
        help="barlow: off-diagonal weight",
    )
    group.add_argument("--temperature", type=number(float, above=0), help="moco, simclr")
    group.add_argument("--queue-size", type=number(int, 1), help="moco")
    group.add_argument("--key-momentum", type=number(float, 0, 1), help="moco")
    group.add_argument("--splits", type=number(int, 1), help="moco: groups of split-BN in the key encoder")
    group.add_argument(
        "--symmetric", action=argparse.BooleanOptionalAction, default=None, help="moco: both views as queries"
    )
    group.add_argument("--predictor-hidden", type=number(int, 1), help="simsiam: width of the bottleneck")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = flags()
    args = common.parse(parser, argv, recipes=Path(__file__).parent / "yaml")
    if args.data is None:
        args = built_in_settings(parser, argv)
    device, rank, ranks = common.start_ranks(args.device)
    args.precision = common.resolve_precision(args.precision, device)
    lead = rank == 0
    say = print if lead else lambda *_: None
    out = Path(args.out or f"runs/{args.method}")
    if args.batch_size % ranks:
        raise ConfigError(f"--batch-size {args.batch_size} does not divide among {ranks} ranks")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file, not a directory")
    out.mkdir(parents=True, exist_ok=True)

    # Data: a table, its training rows, and a labelled sample for the k-NN check
    with common.rank_zero_first(rank, ranks):
        table, checked = common.open_table(args, "pure", out / "bad_files.csv")
        height, width = common_size(checked)
        train = np.flatnonzero(table.split == "train")
        train = train[stratified_subset(table.labels[train], args.subset, args.seed)]
        if len(train) < args.batch_size:
            raise DataError(
                f"{table.root}: {len(train)} images to train on are fewer than one batch of {args.batch_size}"
            )
        bank = np.sort(np.random.default_rng(0).permutation(train)[:BANK])
        queries = np.flatnonzero((table.split == "val") & (table.labels >= 0))
        queries = np.sort(np.random.default_rng(0).permutation(queries)[:QUERIES])
        cache, stamp = Path(args.cache), str(checked.mtime_ns.max())
        sample = np.concatenate([bank, queries])
        probe = load_pixels(
            table.root, table.files[sample], height, width, cache=cache, workers=args.workers, stamp=stamp
        )
        imagenet = args.init == "imagenet"
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else channel_statistics(probe[: len(bank)])
        args.loader, why = choose_loader(args.loader, device, args.size, len(train) * 3 * height * width)
        plan = Plan(
            len(train),
            args.batch_size,
            height,
            width,
            args.seed,
            rank,
            ranks,
            Recipe(area=(args.min_area, 1), jitter=args.jitter, blur_probability=args.blur),
        )
        files = table.files[train]
        if args.loader == "torch":
            pixels = load_pixels(
                table.root, files, height, width, cache=cache, workers=args.workers, stamp=stamp
            )
            loader = TorchLoader(pixels, plan, args.size, mean, std, device)
        else:
            from data.dali import DaliLoader

            loader = DaliLoader(
                table.root,
                files,
                plan,
                args.size,
                mean,
                std,
                device,
                workers=args.workers,
                dtype=common.DTYPES[args.precision],
                cache_mb=args.dali_cache,
            )

    # Model, optimiser, precision
    torch.manual_seed(args.seed)
    dtype = common.DTYPES[args.precision]
    method = build_method(args)
    if ranks > 1:
        synchronise(method, device.type == "cuda")
    method.to(device, memory_format=torch.channels_last)
    if args.compile:
        method.backbone.compile()
    model = DistributedDataParallel(method, broadcast_buffers=False) if ranks > 1 else method
    optimizer = common.make_optimizer(args.optimizer, method, args.lr, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    steps = plan.steps()
    warmup = round(args.warmup_epochs * steps)

    args.device, args.out = device.type, str(out)
    config = common.flags_of(args, parser)
    say("\n".join(f"{key}: {value}" for key, value in config.items() if value is not None))
    say(
        f"data: {len(train)} images of {width} x {height} px to train on, {len(queries)} labelled ones held out for k-NN, "
        f"mean {mean}, std {std}\nloader: {args.loader} ({why})"
    )

    def train_step(views, rate):
        for group in optimizer.param_groups:
            group["lr"] = args.lr if group["constant"] else rate
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(*views)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    if args.profile:
        return profile(args, loader, train_step, device, out, lead)

    # Begin, or go on from the checkpoint
    state = load_checkpoint(out / "checkpoint.pt", config, device)
    if state:
        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"].cpu())
        say(f"going on from {out / 'checkpoint.pt'}: epoch {state['epoch']}, step {state['step']}")
    else:
        state = {"epoch": 0, "step": 0, "log": [], "loss": 0.0, "waited": 0.0, "seconds": 0.0}
        if lead:
            common.write_yaml(
                out / "config.yaml", config | common.about(device) | {"mean": list(mean), "std": list(std)}
            )
            save_views(next(loader.epoch(0)), mean, std, out / "views.png")
    log, first_step = state["log"], state["step"]
    stop_epoch = min(args.stop_epoch or args.epochs, args.epochs)
    if state["epoch"] >= stop_epoch:
        say(f"{out} is complete at epoch {state['epoch']}")

    def save(epoch, step, loss=0.0, waited=0.0, seconds=0.0):
        if not lead:
            return
        with common.replacing(out / "checkpoint.pt") as partial:
            torch.save(
                {
                    "model": method.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "rng": torch.get_rng_state(),
                    "epoch": epoch,
                    "step": step,
                    "log": log,
                    "loss": loss,
                    "waited": waited,
                    "seconds": seconds,
                    "config": config,
                },
                partial,
            )

    def rate_at(epoch, step):
        return common.learning_rate(epoch * steps + step, args.epochs * steps, warmup, args.lr)

    def check_finite(first_bad, epoch):
        if (step := int(first_bad)) >= 0:
            raise ConfigError(
                f"the loss is not finite at epoch {epoch + 1}, step {step + 1}: lower --lr or raise "
                f"--warmup-epochs; the last good checkpoint stays in {out}"
            )

    signals = catch_signals()
    bar = tqdm(
        total=args.epochs * plan.images,
        initial=int(plan.images * (state["epoch"] + first_step / steps)),
        unit="img",
        unit_scale=True,
        smoothing=0.05,
        disable=None if lead else True,
    )
    for epoch in range(state["epoch"], stop_epoch):
        loss_sum = torch.tensor(state["loss"], dtype=torch.float64, device=device)
        first_bad = torch.tensor(-1, device=device)
        waited, began = state["waited"], time.perf_counter() - state["seconds"]
        saved = clock = time.perf_counter()
        method.train()
        for step, views in enumerate(loader.epoch(epoch, first_step), first_step):
            waited += time.perf_counter() - clock
            loss = train_step(views, rate_at(epoch, step))
            loss_sum += loss
            first_bad = torch.where(loss.isfinite() | (first_bad >= 0), first_bad, step)
            bar.update(len(views[0]) * ranks)
            if step % 50 == 49:
                check_finite(first_bad, epoch)
            stopping = any_rank(bool(signals), ranks)
            if stopping or time.perf_counter() - saved > 60 * args.save_minutes:
                check_finite(first_bad, epoch)
                save(epoch, step + 1, float(loss_sum), waited, time.perf_counter() - began)
                saved = time.perf_counter()
            if stopping:
                bar.close()
                say(
                    f"stopped by a signal; {out / 'checkpoint.pt'} is at epoch {epoch}, step {step + 1}: the same command goes on"
                )
                raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
            clock = time.perf_counter()
        check_finite(first_bad, epoch)
        seconds = time.perf_counter() - began
        knn = len(queries) > 0 and (epoch + 1 == args.epochs or (epoch + 1) % args.knn_every == 0)
        rows = np.arange(len(probe) if knn else min(len(bank), DIAGNOSED))
        features = extract_features(method.backbone, probe, args.size, mean, std, dtype=dtype, rows=rows)
        row = {
            "epoch": epoch + 1,
            "loss": mean_over_ranks(loss_sum / steps, ranks),
            "chance_loss": method.chance_loss(args.batch_size),
            "lr": rate_at(epoch, steps - 1),
            **diagnose(features, table.labels[sample], len(bank), knn),
            "images_per_s": plan.images / seconds,
            "data_wait": waited / seconds,
            "seconds": seconds,
        }
        log.append(row)
        if lead:  # before the checkpoint: a run killed in between writes them again
            common.write_csv(out / "log.csv", log)
            with common.replacing(out / "backbone.pth") as partial:
                torch.save(method.backbone.state_dict(), partial)
            bar.write(describe(row, args.epochs))
        save(epoch + 1, 0)
        state, first_step = {"loss": 0.0, "waited": 0.0, "seconds": 0.0}, 0
    bar.close()
    if lead:
        draw_curve(log, out / "curve.png")
    say(
        f"backbone: {out / 'backbone.pth'}\nlog: {out / 'log.csv'}\nviews: {out / 'views.png'}\ncurve: {out / 'curve.png'}"
    )


def built_in_settings(parser, argv):
    """Small settings for a run without --data; flags on the command line or in the YAML file still win."""
    parser.set_defaults(size=64, epochs=10, batch_size=128)
    args = common.parse(parser, argv, recipes=Path(__file__).parent / "yaml")
    print(
        f"no --data: {args.scenes} built-in scenes of {args.size} px, {args.epochs} epochs, batches of {args.batch_size}"
    )
    return args


def choose_loader(loader: str, device: torch.device, size: int, nbytes: int) -> tuple[str, str]:
    """(torch or dali, the reason) for views of `size` px from `nbytes` of decoded pixels."""
    try:
        dali = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        dali = False
    if loader == "dali" and not dali:
        raise ConfigError(
            "--loader dali: NVIDIA DALI is not installed (Linux only, see requirements.txt); --loader torch needs none"
        )
    if loader != "auto":
        return loader, "as asked"
    if not dali:
        return "torch", "DALI is not installed"
    if device.type == "cpu":
        large = (
            size >= 128
        )  # on one core, DALI's share of torch's CPU time is about 1.1 at 64 px and 0.5 at 224 px
        return (
            ("dali", "its operators are faster on large views")
            if large
            else ("torch", "as fast, and decodes only once")
        )
    if nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        return "torch", f"the decoded pixels, {nbytes / 1e9:.1f} GB, fit on the GPU"
    return "dali", "the decoded pixels do not fit on the GPU, which decodes faster than the CPU sends"


def build_method(args: argparse.Namespace) -> torch.nn.Module:
    """The method of the flags, each flag left out standing at the default of the method's constructor."""
    flag_of = {"out": "out_dim"}
    own = {
        n: p.default for n, p in inspect.signature(METHODS[args.method]).parameters.items() if n != "backbone"
    }
    others = {
        "hidden",
        "out",
        "lambda_",
        "temperature",
        "queue_size",
        "key_momentum",
        "splits",
        "symmetric",
        "predictor_hidden",
    }
    for name in others - own.keys():
        if getattr(args, flag_of.get(name, name)) is not None:
            raise ConfigError(f"--{name.strip('_').replace('_', '-')} is no setting of {args.method}")
    for name, default in own.items():
        if getattr(args, flag_of.get(name, name)) is None:
            setattr(args, flag_of.get(name, name), default)
    values = {name: getattr(args, flag_of.get(name, name)) for name in own}
    return METHODS[args.method](build_backbone(args.arch, args.init), **values)


def load_checkpoint(file: Path, config: dict, device: torch.device) -> dict | None:
    """The checkpoint, or None without one; another configuration and a damaged file are errors."""
    if not file.exists():
        return None
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        saved = state["config"]
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise ConfigError(
            f"{file}: damaged ({str(error).splitlines()[0][:100]}): remove it to start again"
        ) from None
    differ = [
        f"{key} was {saved.get(key)}, is {config.get(key)}"
        for key in sorted(saved.keys() | config.keys())
        if key not in NO_EFFECT and saved.get(key) != config.get(key)
    ]
    if differ:
        raise ConfigError(f"{file} is of another configuration ({'; '.join(differ)}): choose another --out")
    return state


def catch_signals() -> list[int]:
    """A list that fills with the SIGTERM and SIGINT that arrive; a second SIGINT interrupts at once."""
    caught = []

    def handle(number, _):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return caught


def any_rank(flag: bool, ranks: int) -> bool:
    if ranks == 1:
        return flag
    total = torch.tensor(int(flag))  # on the CPU: gloo, so the GPU is not waited for
    dist.all_reduce(total)
    return bool(total)


def mean_over_ranks(value: torch.Tensor, ranks: int) -> float:
    if ranks > 1:
        dist.all_reduce(value)
    return float(value) / ranks


def diagnose(features, labels, bank: int, knn: bool) -> dict:
    """Health of the features of `bank` training images and, if asked, k-NN of the held-out ones behind them."""
    some = features[: min(bank, DIAGNOSED)]
    f1 = knn_macro_f1(features[:bank], labels[:bank], features[bank:], labels[bank:]) if knn else None
    return {"feature_std": feature_std(some), "effective_rank": effective_rank(some), "knn_macro_f1": f1}


def describe(row: dict, epochs: int) -> str:
    knn = "" if row["knn_macro_f1"] is None else f"  k-NN macro F1 {row['knn_macro_f1']:.3f}"
    text = (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f} (chance {row['chance_loss']:.4f})  "
        f"feature_std {row['feature_std']:.3f}  effective_rank {row['effective_rank']:.1f}{knn}  "
        f"{row['images_per_s']:.0f} img/s, {100 * row['data_wait']:.0f} % waiting"
    )
    if row["feature_std"] < 0.02 or row["effective_rank"] < 2:
        text += "\nwarning: the features have collapsed: every image looks the same to the backbone; change the recipe"
    return text


def save_views(views, mean, std, file: Path) -> None:
    """Eight images, a row for each view, as the network sees them but for the normalisation."""
    grid = torch.cat([v[:8].float().cpu() for v in views])
    grid = grid * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    with common.replacing(file) as partial:
        torchvision.utils.save_image(grid.clamp(0, 1), partial, nrow=8, format="png")


def draw_curve(log: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    epochs = [row["epoch"] for row in log]
    figure, axes = plt.subplots(1, 4, figsize=(14, 3), layout="constrained")
    for axis, key in zip(axes, ("loss", "knn_macro_f1", "effective_rank", "images_per_s")):
        points = [(e, row[key]) for e, row in zip(epochs, log) if row[key] is not None]
        axis.plot(*zip(*points) if points else ([], []), marker="o", markersize=3)
        axis.set(xlabel="epoch", title=key)
    axes[0].axhline(log[-1]["chance_loss"], linestyle="--", color="grey", label="chance")
    axes[0].legend()
    with common.replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)


def profile(args, loader, train_step, device, out, lead) -> None:
    """Time the loader alone, the model alone and both; say which one limits, and leave profile.csv and trace.json."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    images = args.batch_size

    def batches(n):
        epoch = 0
        while True:
            yield from loader.epoch(epoch)
            epoch += 1

    def rate(steps):
        wait()
        began, waited, clock = time.perf_counter(), 0.0, time.perf_counter()
        for step in steps:
            waited += time.perf_counter() - clock
            step()
            clock = time.perf_counter()
        wait()
        return args.profile * images / (time.perf_counter() - began), waited / (time.perf_counter() - began)

    stream = batches(0)
    views = next(stream)
    for _ in range(3):
        train_step(views, args.lr)
    loader_rate, _ = rate((lambda: None) for _ in zip(range(args.profile), stream))
    model_rate, _ = rate((lambda: train_step(views, args.lr)) for _ in range(args.profile))
    both, waited = rate((lambda v=v: train_step(v, args.lr)) for _, v in zip(range(args.profile), stream))
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (
        device.type == "cuda"
    )
    with torch.profiler.profile(activities=kinds) as trace:
        for _, v in zip(range(3), stream):
            train_step(v, args.lr)
    if not lead:
        return
    trace.export_chrome_trace(str(out / "trace.json"))
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource_peak()
    row = {
        "loader": args.loader,
        "size": args.size,
        "batch_size": images,
        "precision": args.precision,
        "loader_images_per_s": loader_rate,
        "model_images_per_s": model_rate,
        "images_per_s": both,
        "data_wait": waited,
        "peak_memory_gb": memory / 1e9,
    }
    common.write_csv(out / "profile.csv", [row])
    print(
        f"loader alone {loader_rate:.0f} img/s, model alone {model_rate:.0f} img/s, both {both:.0f} img/s, "
        f"{100 * waited:.1f} % of the time waiting for data, peak memory {memory / 1e9:.2f} GB\n"
        f"bottleneck: {'the loader' if loader_rate < model_rate else 'the model'}; trace: {out / 'trace.json'}"
    )


def resource_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    with common.one_line_errors():
        main()

"""The whole paper in one command: four pretrainings, their linear probes, transfer of the best, one report.html.

    python paper.py --data FOLDER              # FOLDER holds Sentinel2GlobalLULC and Land-1.0, under any names
    python paper.py --data PATCHES --land LAND --recipes yaml --epochs 100
    python paper.py --small                    # built-in scenes of 64 px: minutes on two CPU cores
    python paper.py --small --data FOLDER      # the same small settings on real images
    python paper.py --data FOLDER --dry-run    # the plan, with the hours it takes here

Each step is one command of the other scripts. All of them go on where they stopped, so after any kill the same command
goes on: what is lost is at most the running epoch of pretraining and the running cell of transfer.
"""

import argparse
import ctypes
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml

import common
import train_ssl
from common import ConfigError, number
from data.loader import Plan, TorchLoader
from data.tables import DataError, load_table, training_subsets
from models import METHODS
from models.backbone import IMAGENET_MEAN, IMAGENET_STD, WeightsError, build_backbone, imagenet_weights
from plots.style import name_of, stem_of
from plots.report import write_report

ROOT = Path(__file__).resolve().parent
START = 10  # seconds until a script has begun
BEST = "BEST"  # stands for the best method until its F1 is known


class Settings(NamedTuple):
    size: int  # pixels
    recipes: str
    seen: int | None  # images each pretraining sees, where the recipe's epochs do not say
    ratios: list[int]  # % of the labels
    seeds: list[int]
    epochs: int  # of fine-tuning
    protocol: list[str]


PAPER = Settings(
    224, "yaml/paper", None, [1, 5, 10, 25, 50, 100], [42, 5, 97, 123, 256], 100, ["--protocol", "paper"]
)
SMALL = Settings(64, "yaml", 20_000, [5, 25, 100], [0, 1, 2], 4, [])


class Step(NamedTuple):
    name: str
    command: list[str]  # after `python`
    passes: float = 0  # of one image forward, for the estimated time: backward counts 2
    ranks: int = 1  # of torchrun
    copies: int = 1  # processes that share the cells of one table


def flags() -> argparse.ArgumentParser:
    parser = common.Parser(__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--data",
        type=Path,
        help="pretraining images, or a folder that holds them and the fractions' dataset; "
        "the built-in scenes if left out",
    )
    parser.add_argument(
        "--land",
        type=Path,
        help="the dataset with fractions (Land-1.0's layout), where --data does not hold it",
    )
    parser.add_argument(
        "--out", type=Path, help="where everything is written (runs/paper; with --small runs/paper-small)"
    )
    parser.add_argument("--small", action="store_true", help="64 px, few epochs, three ratios and seeds")
    parser.add_argument(
        "--tune", action="store_true", help="search each method's recipe first, by RECIPES/tune_ssl.yaml"
    )
    parser.add_argument(
        "--recipes",
        type=Path,
        help="folder with METHOD.yaml: yaml/paper for the paper's settings, "
        "yaml for those that learn in few epochs (yaml/paper; with --small yaml)",
    )
    parser.add_argument(
        "--epochs", type=number(int, 1), help="of pretraining, where the recipe's are not wanted"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and the estimated time, and stop"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    settings = SMALL if args.small else PAPER
    args.data, args.land, args.out, args.recipes = map(
        no_flag, (args.data, args.land, args.out, args.recipes)
    )
    args.recipes = args.recipes or Path(os.path.relpath(ROOT / settings.recipes))
    args.out = args.out or Path("runs/paper-small" if args.small else "runs/paper")
    for method in METHODS:  # now, not when its turn comes
        if not (args.recipes / f"{method}.yaml").is_file():
            raise ConfigError(f"--recipes {args.recipes}: has no {method}.yaml")
        common.read_yaml(args.recipes / f"{method}.yaml", train_ssl.flags())
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however it ends
        except BlockingIOError:
            raise ConfigError(f"--out {args.out}: another paper.py is at work there") from None
        work(args, settings)


def work(args, settings: Settings) -> None:
    data, land = (
        find_data(args.data, args.land)
        if args.data or args.land
        else [write_built_in(args.out / "scenes", layout) for layout in ("pure", "mixed")]
    )
    if data.resolve().name == land.resolve().name:
        raise ConfigError(
            f"{data} and {land} are both called {data.resolve().name} in results.csv: rename a folder"
        )
    notes, imagenet = [], ["imagenet"]
    try:
        imagenet_weights("resnet18")
    except WeightsError as error:
        notes, imagenet = [f"ImageNet-1k is left out: {error}"], []

    print("measuring for 30 seconds", flush=True)
    rate, device = images_per_second(settings.size, 30)
    steps = plan(args, settings, data, land, imagenet, BEST)
    hours = [(START + step.passes / (6 * rate)) / 3600 for step in steps]
    print(
        f"\n{rate:,.0f} images/s (two views each) at {settings.size} px on {device}: the plan takes about {shown(sum(hours))}"
    )
    for step, h in zip(steps, hours):
        print(f"{shown(h):>10}  {step.name}\n{'':12}{text_of(step)}")
    print("\n".join(["", *notes]), flush=True)
    if args.dry_run:
        return

    spent = args.out / "steps.csv"
    choice = next(i for i, step in enumerate(steps) if step.name.startswith("Table V:"))
    for step in steps[:choice]:
        run(step, spent)
    best = best_method(args.out / "probes" / "results.csv")
    print(f"\nbest macro F1 of the linear probes: {name_of(best)}", flush=True)
    for step in plan(args, settings, data, land, imagenet, best)[choice:]:
        text = run(step, spent)
    times = read_times(spent)
    undrawn = [line for line in text.splitlines() if line.startswith(("missing:", "not compared:"))]
    write_report(
        args.out / "report.html",
        "Self-supervised pretraining on satellite images: the whole protocol",
        findings(args.out, best, data, land, settings) + notes,
        args.out / "figures",
        {
            "Commands": [f"{command}    # {seconds:.0f} s" for command, seconds in times.items()],
            "Not drawn": undrawn or ["nothing is missing"],
            "Versions": yaml.safe_dump(common.about(torch.device(device)), sort_keys=False).splitlines(),
        },
    )
    print(f"\nreport: {args.out / 'report.html'}")


# What goes in


def no_flag(path: Path | None) -> Path | None:
    """The path in a form that no command takes for a flag."""
    return path.absolute() if path and str(path).startswith("-") else path


def find_data(data: Path | None, land: Path | None) -> tuple[Path, Path]:
    """(pretraining folder, fractions' folder): the two that are given, or both from below `data`."""
    if data is None:
        raise ConfigError("--land without --data: name the pretraining images too")
    if land:
        if load_table(land).fractions is None:
            raise DataError(f"--land {land}: has no class fractions (Land-1.0's CSV files)")
        return data, land
    if not data.is_dir():
        raise DataError(f"{data}: no such folder")
    tables = {}
    for folder in sorted(no_flag(f) for f in data.iterdir() if f.is_dir()):
        try:
            tables[folder] = load_table(folder)
        except DataError:
            continue  # something else than images
    lands = [folder for folder, table in tables.items() if table.fractions is not None]
    others = [folder for folder, table in tables.items() if table.fractions is None and table.classes]
    if len(lands) != 1 or len(others) != 1:
        found = f"{len(others)} folders of class folders and {len(lands)} with class fractions"
        raise DataError(
            f"{data}: one dataset of class folders and one in Land-1.0's layout are needed below it, found {found}: "
            "name them with --data and --land"
        )
    return others[0], lands[0]


def write_built_in(scenes: Path, layout: str) -> Path:
    """Built-in scenes of 64 px, written once."""
    if not (scenes / layout).exists():
        scenes.mkdir(parents=True, exist_ok=True)
        run(
            Step(
                f"{layout} scenes",
                [
                    "-m",
                    "data.synthetic",
                    str(scenes / layout),
                    "--layout",
                    layout,
                    "--count",
                    "2900" if layout == "pure" else "1500",
                    "--size",
                    "64",
                ],
            )
        )
    return scenes / layout


def images_per_second(size: int, seconds: float) -> tuple[float, str]:
    """Rate of Barlow Twins steps on random pixels, views included, and the device's type."""
    device, _, _ = common.start_ranks("auto")
    images = 512 if device.type == "cuda" else 64
    dtype = common.DTYPES[common.resolve_precision("auto", device)]
    method = METHODS["barlow"](build_backbone()).to(device, memory_format=torch.channels_last)
    optimizer = common.make_optimizer("sgd", method, 1e-3, 0.9, 0.0)
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    loader = TorchLoader(pixels, Plan(images, images, size, size), size, IMAGENET_MEAN, IMAGENET_STD, device)

    def step(epoch):
        (views,) = loader.epoch(epoch)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = method(*views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device

    step(0)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        steps += 1
        step(steps)
    return steps * images / (time.perf_counter() - began) * max(1, torch.cuda.device_count()), device.type


# The plan


def plan(args, settings: Settings, data: Path, land: Path, imagenet: list[str], best: str) -> list[Step]:
    """Every command in its order. `best`: the method that goes on to transfer."""
    pre, down = load_table(data), load_table(land)
    for table in (pre, down):  # now, not after the pretraining
        if empty := {"train", "val", "test"} - set(table.split[table.labels >= 0]):
            raise DataError(
                f"{table.root}: no labelled image is in the {empty.pop()} split ({len(table)} images)"
            )
    training_subsets(pre, pre.targets("scene"), [100], [0])
    training_subsets(down, down.targets("scene"), settings.ratios, settings.seeds)
    subsets = training_subsets(down, down.targets("fraction"), settings.ratios, settings.seeds)
    passes = settings.epochs * sum(
        3 * len(rows) + (down.split == "val").sum() for rows in subsets.values()
    ) + len(down)
    checks = [
        Step(
            f"check {folder.name}",
            [
                "-m",
                "data.check",
                str(folder),
                "--manifest",
                str(common.manifest_of(table.root, Path("runs/cache"))),
            ],
        )
        for folder, table in ((data, pre), (land, down))
    ]
    results = [str(args.out / part / "results.csv") for part in ("probes", "transfer")]
    draw = [
        "plot.py",
        "--runs",
        *(str(args.out / m) for m in METHODS),
        "--results",
        *results,
        "--out",
        str(args.out / "figures"),
        "--compare-paper",
    ]
    return [
        *checks,
        *pretraining(args, settings, data, int((pre.split == "train").sum())),
        *transfers(args, settings, data, len(pre), land, passes, imagenet, best),
        Step("figures and tables", draw),
    ]


def pretraining(args, settings: Settings, data: Path, images: int) -> Iterator[Step]:
    """Of each method, after a search for its recipe with --tune. `images`: to train on."""
    size, grid = ["--size", str(settings.size)], args.recipes / "tune_ssl.yaml"
    if args.tune:
        epochs = search_epochs(grid)
        seen = images * epochs * yaml.safe_load(grid.read_text(encoding="utf-8")).get("subset", 1)
    for method in METHODS:
        recipe, subset = args.recipes / f"{method}.yaml", 1.0
        epochs = args.epochs or yaml.safe_load(recipe.read_text(encoding="utf-8")).get("epochs", 100)
        if settings.seen and not args.epochs:
            epochs = max(4, round(settings.seen / images))
            subset = min(1.0, round(settings.seen / epochs / images, 3))
        if args.tune:
            recipe = args.out / "tune" / method / "best.yaml"
            search = [
                "tune.py",
                "--method",
                method,
                "--data",
                str(data),
                *size,
                "--grid",
                str(grid),
                "--out",
                str(recipe.parent),
            ]
            yield Step(f"tune {name_of(method)}", search, 6 * seen)
        command = [
            "train_ssl.py",
            "--method",
            method,
            "--config",
            str(recipe),
            "--data",
            str(data),
            *size,
            "--epochs",
            str(epochs),
            "--subset",
            f"{subset:g}",
            "--knn-every",
            str(max(1, epochs // 20)),
            "--out",
            str(args.out / method),
        ]
        yield Step(
            f"pretrain {name_of(method)}",
            command,
            6 * images * subset * epochs,
            max(1, torch.cuda.device_count()),
        )


def transfers(
    args, settings: Settings, data: Path, images: int, land: Path, passes: int, imagenet: list[str], best: str
) -> Iterator[Step]:
    """Linear probes of all methods on the pretraining set, then the best one's transfer to fractions and scenes.

    `images`: to probe; `passes`: of one initialisation's transfer to one task.
    """
    copies = torch.cuda.device_count() or os.cpu_count() or 1  # one core a cell is the fastest on a CPU
    size, weights = (
        ["--size", str(settings.size)],
        {m: str(args.out / m / "backbone.pth") for m in [*METHODS, BEST]},
    )
    inits = [*(weights[m] for m in METHODS), "random", *imagenet]
    probe = [
        "transfer.py",
        "--task",
        "scene",
        "--mode",
        "linear",
        "--data",
        str(data),
        *size,
        "--ratios",
        "100",
        "--seeds",
        "1",
        "--init",
        *inits,
        "channels",
        "--save-embeddings",
        "--out",
        str(args.out / "probes"),
    ]
    yield Step("Table IV and Fig. 3: linear probes", probe, len(inits) * images, copies=copies)
    inits = ["random", *imagenet, weights[best]]
    for task, table in (("fraction", "Table V"), ("scene", "Table VI")):
        command = [
            "transfer.py",
            "--task",
            task,
            *settings.protocol,
            "--mode",
            "linear",
            "finetune",
            "--data",
            str(land),
            *size,
            "--init",
            *inits,
            "--ratios",
            *map(str, settings.ratios),
            "--seeds",
            *map(str, settings.seeds),
            "--epochs",
            str(settings.epochs),
            "--out",
            str(args.out / "transfer"),
        ]
        yield Step(f"{table}: {task}s", command, len(inits) * passes, copies=copies)


def search_epochs(grid: Path) -> int:
    """Epochs that tune.py trains in all with `grid`, as its --dry-run says."""
    answer = subprocess.run(
        [sys.executable, ROOT / "tune.py", "--grid", grid, "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        common.fail(answer.stderr.strip().removeprefix("error: "))
    return int(re.search(r"(\d+) epochs on", answer.stdout)[1])


def best_method(results: Path) -> str:
    """The method whose linear probe has the highest macro F1 on test."""
    rows = pd.read_csv(results)
    rows = rows[(rows.split == "test") & (rows.metric == "f1_macro") & rows.init.isin(list(METHODS))]
    return rows.groupby("init").value.mean().idxmax()


# Running it


def shown(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def text_of(step: Step) -> str:
    start = "python" if step.ranks == 1 else f"torchrun --nproc_per_node={step.ranks}"
    return f"{start} {shlex.join(step.command)}"


def run(step: Step, spent: Path | None = None) -> str:
    """Run a step to its end and return what plot.py printed; any failure ends this process too.

    Further `copies` are silent: what they would say, the first one says too.
    """
    print(f"\n{step.name}: {text_of(step)}", flush=True)
    first, *rest = step.command
    script = [str(ROOT / first), *rest] if first.endswith(".py") else step.command
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={step.ranks}"] if step.ranks > 1 else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    }
    if step.copies > 1 and not torch.cuda.is_available():
        environment |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // step.copies))}
    libc, began = ctypes.CDLL(None) if sys.platform == "linux" else None, time.perf_counter()

    def process(copy):
        place = {"LOCAL_RANK": str(copy)} if step.copies > 1 else {}  # the GPU
        return subprocess.Popen(
            [sys.executable, *start, *script],
            env=environment | place,
            text=True,
            stdout=subprocess.PIPE if first == "plot.py" else subprocess.DEVNULL if copy else None,
            stderr=subprocess.DEVNULL if copy else None,
            preexec_fn=libc and (lambda: libc.prctl(1, signal.SIGTERM)),
        )  # ends with this one (PR_SET_PDEATHSIG)

    processes = [process(copy) for copy in range(step.copies)]
    try:
        printed = processes[0].communicate()[0] or ""
        code = processes[0].returncode
    finally:  # where it failed, or was interrupted, the training saves
        for p in processes:
            if processes[0].returncode != 0:
                p.terminate()
            p.wait()
    if code == 2:
        raise SystemExit(2)  # it has said why
    if code:
        common.fail(
            f"{step.name} ended with code {code}; mend what it says above and start the same command again"
        )
    print(printed, end="")
    if spent:
        times = read_times(spent)
        times[text_of(step)] = (
            times.get(text_of(step), 0) + time.perf_counter() - began
        )  # of calls that ended
        common.write_csv(
            spent, pd.DataFrame({"command": times.keys(), "seconds": np.round([*times.values()], 1)})
        )
    return printed


def read_times(file: Path) -> dict[str, float]:
    """Command -> seconds. They are only told, so a damaged file begins anew."""
    try:
        rows = pd.read_csv(file)
        return dict(zip(rows.command, rows.seconds.astype(float)))
    except (OSError, ValueError, AttributeError):
        return {}


def findings(out: Path, best: str, data: Path, land: Path, settings: Settings) -> list[str]:
    """What the numbers say, in sentences."""
    lines = [
        f"ResNet-18 at {settings.size} px, pretrained without labels on {data.name}, transferred to {land.name}."
    ]
    probes = pd.read_csv(out / "probes" / "results.csv")
    f1 = (
        probes[(probes.split == "test") & (probes.metric == "f1_macro")]
        .groupby("init")
        .value.mean()
        .sort_values(ascending=False)
    )
    lines.append(
        "Linear probe on the pretraining classes, macro F1: "
        + ", ".join(f"{name_of(i)} {v:.3f}" for i, v in f1.items())
        + "."
    )
    for task, measure in (("fraction", "RMSE"), ("scene", "macro F1")):
        table = pd.read_csv(out / "figures" / (stem_of(f"comparison-{task}-{land.resolve().name}") + ".csv"))
        table = table[(table.ratio.astype(str) == "mean") & (table.init == best)]
        lines += [
            f"{name_of(best)} against {name_of(r.baseline)} on {task}s, {name_of(r['mode'])}: mean {measure} {r.value:.3f} against "
            f"{r.baseline_value:.3f} (improvement {r.improvement:+.1f} %), ahead in {r.wins} of {r.cells} class and ratio cells, "
            f"n = {r.n} seeds."
            for _, r in table.iterrows()
        ]
    return lines


if __name__ == "__main__":
    with common.one_line_errors():
        main()

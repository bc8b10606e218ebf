"""The whole paper in one command: four pretrainings, linear probes, transfer of the best, a report.html.

    python paper.py --data FOLDER              # FOLDER holds Sentinel2GlobalLULC and Land-1.0, by any name
    python paper.py --data PATCHES --land LAND --recipes yaml --epochs 100
    python paper.py --small                    # built-in scenes of 64 px: minutes on two CPU cores
    python paper.py --small --data FOLDER      # the same small settings on real images
    python paper.py --data FOLDER --dry-run    # the plan, with the hours it takes here; writes nothing

Each step is one command of the other scripts, which hand on files: the resolved flags of a recipe, the plan
of a search, results.csv, missing.csv. All of them go on where they stopped, so after any kill the same
command goes on: what is lost is at most the running epoch of pretraining and the running cell of transfer.
"""

import argparse
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import yaml

import common
from common import ConfigError, DataError, WeightsError, number
from data.splits import split_counts
from data.subsets import training_subsets
from data.tables import Table, explain_empty, load_table
from plots.report import write_report
from plots.style import MEAN, METHODS, PAPER_MEAN, name_of, stem_of

if TYPE_CHECKING:
    import torch

START = 10  # seconds until a script has begun
FEW = 10  # images of a class, below which its F1 on val is a rough number
MEASURED = 30  # seconds of training, for the estimated time
BEST = "BEST"  # stands for the best method until its F1 is known
BUILT_IN = {"pure": 2900, "mixed": 1500}  # layout → scenes, for --small without --data
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # of prctl(2)


class Settings(NamedTuple):
    """What --small changes."""

    size: int  # pixels
    recipes: str
    out: str
    seen: int | None  # images each pretraining sees, where the recipe's epochs do not say
    ratios: list[int]  # % of the labels
    seeds: list[int]
    epochs: int  # of fine-tuning
    protocol: list[str]
    probe: str | None  # recipe of the linear probes that choose the best method; None: heads are solved for


PAPER = Settings(
    size=224,
    recipes="yaml/paper",
    out="runs/paper",
    seen=None,
    ratios=[1, 5, 10, 25, 50, 100],
    seeds=[42, 5, 97, 123, 256],
    epochs=100,
    protocol=["--protocol", "paper"],
    probe="yaml/paper/transfer_probe.yaml",
)
SMALL = Settings(
    size=64,
    recipes="yaml",
    out="runs/paper-small",
    seen=20_000,
    ratios=[5, 25, 100],
    seeds=[0, 1, 2],
    epochs=4,
    protocol=[],
    probe=None,
)


class Dataset(NamedTuple):
    """A folder of images, and how many there are, for the estimated time."""

    folder: Path
    images: int
    train: int
    val: int
    test: int
    rarest: int  # images that the rarest class has in val
    split: list[str] = []  # --splits or --split, as the other commands take it
    table: Table | None = None  # of scenes that are not written yet

    def flags(self) -> list[str]:
        return ["--data", str(self.folder), *self.split]


class Study(NamedTuple):
    """What is asked for."""

    settings: Settings
    patches: Dataset  # to pretrain on and to probe
    land: Dataset  # with fractions, to transfer to
    recipes: Path
    epochs: int | None  # of pretraining, in place of the recipe's
    tune: bool
    metric: str | None  # that ranks the trials of tune, where the grid's is not wanted
    out: Path


class Step(NamedTuple):
    """One command."""

    name: str
    command: list[str]  # after `python`
    passes: float = 0  # of one image forward, for the estimated time: backward counts 2
    ranks: int = 1  # of torchrun
    copies: int = 1  # processes that share the cells of one table
    may_lack: bool = False  # whether exit code 1, done but for what it lists, is enough to go on


def build_parser() -> common.Parser:
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="pretraining images, or a folder that holds them and the fractions' dataset; "
        "the built-in scenes if left out",
    )
    add(
        "--land",
        type=Path,
        metavar="FOLDER",
        help="the dataset with fractions (Land-1.0's layout), where --data does not hold it",
    )
    add("--splits", type=Path, metavar="FOLDER", help="lists of names that split the pretraining images")
    add("--split", choices=["paper", "spatial"], help="spatial: by blocks of a degree, not as the folder is")
    add("--out", type=Path, help="where everything is written (runs/paper; with --small runs/paper-small)")
    add("--small", action="store_true", help="64 px, few epochs, three ratios and seeds")
    add("--tune", action="store_true", help="search each method's recipe first, by RECIPES/tune_ssl.yaml")
    add("--metric", help="of --tune: what ranks the trials, in place of the grid's (of yaml/paper the loss)")
    add(
        "--recipes",
        type=Path,
        metavar="FOLDER",
        help="folder with METHOD.yaml: yaml/paper for the paper's settings, "
        "yaml for those that learn in few epochs (yaml/paper; with --small yaml)",
    )
    add("--epochs", type=number(int, 1), help="of pretraining, where the recipe's are not wanted")
    add("--dry-run", action="store_true", help="print the plan and the estimated time, and stop")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    study = read_study(args)
    check_subsets(study)
    recipes = resolved_recipes(study)
    if args.dry_run:
        note = "ImageNet-1k takes part if its weights can be had."
        first = first_steps(study, recipes, ["imagenet"])
        return show_plan(study, first, ["imagenet"], [note], *images_per_second(study.settings.size))

    with common.hold(study.out, "paper.py"):
        for step in scenes_to_write(study):
            run(step)
        reason = without_imagenet()
        notes = [f"ImageNet-1k is left out: {reason}"] if reason else []
        imagenet = [] if reason else ["imagenet"]
        first = first_steps(study, recipes, imagenet)
        rate, device = images_per_second(study.settings.size)
        show_plan(study, first, imagenet, notes, rate, device)

        spent = study.out / "steps.csv"
        for step in first:
            run(step, spent)
        best = best_method(study.out / "probes" / "summary.csv")
        print(f"\nbest macro F1 of the linear probes on val: {name_of(best)}", flush=True)
        lacking = [step.name for step in last_steps(study, imagenet, best) if not run(step, spent)]
        write_page(study, best, notes, spent, device)
        print(f"\nreport: {study.out / 'report.html'}")
    if lacking:
        print(f"not all is there, see above: {', '.join(lacking)}", file=sys.stderr)
        raise SystemExit(1)


# What goes in


def read_study(args: argparse.Namespace) -> Study:
    """The flags as a study; every folder is looked at now, not when its turn comes."""
    settings = SMALL if args.small else PAPER
    recipes = no_flag(args.recipes) or Path(os.path.relpath(common.ROOT / settings.recipes))
    out = no_flag(args.out) or Path(settings.out)
    for folder in (args.data, args.land):
        common.refuse_inside(out, folder, "--out")
    if args.metric and not args.tune:
        raise ConfigError("--metric without --tune: nothing is searched")
    for method in METHODS:
        if not (recipes / f"{method}.yaml").is_file():
            raise ConfigError(f"--recipes {recipes}: has no {method}.yaml")
    split = []
    if args.splits:
        split += ["--splits", str(no_flag(args.splits))]
    if args.split:
        split += ["--split", args.split]
    if args.data or args.land:
        data, land = find_data(no_flag(args.data), no_flag(args.land))
        patches = dataset_of(load_table(data, args.splits, args.split or "paper"), data, split)
        fractions = dataset_of(load_table(land), land, [])
    elif split:
        raise ConfigError(f"{split[0]} without --data: the built-in scenes have a split of their own")
    else:
        patches, fractions = built_in(out / "scenes")
    name = patches.folder.resolve().name
    if name == fractions.folder.resolve().name:
        both = f"{patches.folder} and {fractions.folder}"
        raise ConfigError(f"{both} are both called {name} in results.csv: rename a folder")
    return Study(settings, patches, fractions, recipes, args.epochs, args.tune, args.metric, out)


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
    lands, others, refused = [], [], []
    for folder in sorted(no_flag(entry) for entry in data.iterdir() if entry.is_dir()):
        try:
            table = load_table(folder)
        except DataError as error:  # something else than images, or images that need a word
            refused.append(str(error))
            continue
        if table.fractions is not None:
            lands.append(folder)
        elif table.classes:
            others.append(folder)
    if not others:
        refuse_dataset(data)
    if len(lands) != 1 or len(others) != 1:
        found = f"{len(others)} folders of class folders and {len(lands)} with class fractions"
        why = f" (not read: {'; '.join(refused[:3])})" if refused else ""
        raise DataError(
            f"{data}: one dataset of class folders and one in Land-1.0's layout are needed below it, "
            f"found {found}: name them with --data and --land{why}"
        )
    return others[0], lands[0]


def refuse_dataset(folder: Path) -> None:
    """DataError where a folder that should hold the datasets is one itself."""
    try:
        table = load_table(folder)
    except DataError:
        return
    both = "--data PATCHES --land LAND, or --data with a folder that holds both"
    if table.fractions is not None:
        raise DataError(f"{folder}: is itself the dataset with class fractions: give {both}")
    if table.classes:
        raise DataError(f"{folder}: is itself a dataset of class folders: give {both}")


def dataset_of(table: Table, folder: Path, split: list[str]) -> Dataset:
    """How many images there are; each split must have labelled ones."""
    for name in ("train", "val", "test"):
        if not (table.split[table.labels >= 0] == name).any():
            raise DataError(explain_empty(table, name))
    counts = [int((table.split == name).sum()) for name in ("train", "val", "test")]
    labels = table.labels[(table.split == "val") & (table.labels >= 0)]
    rarest = int(np.bincount(labels, minlength=len(table.classes)).min())
    return Dataset(folder, len(table), *counts, rarest, split, table)


def built_in(scenes: Path) -> tuple[Dataset, Dataset]:
    """The built-in scenes, as they are or will be written: 29 classes by the paper's rule, and 70/10/20."""
    pure, mixed = BUILT_IN["pure"], BUILT_IN["mixed"]
    counts = split_counts(pure // 29)
    return (
        Dataset(scenes / "pure", pure, *(29 * count for count in counts), rarest=counts[1]),
        Dataset(scenes / "mixed", mixed, *(int(part * mixed) for part in (0.7, 0.1, 0.2)), rarest=0),
    )


def scenes_to_write(study: Study) -> list[Step]:
    """The built-in scenes that are asked for and not there; folders of the user's are."""
    steps = []
    for layout, dataset in zip(BUILT_IN, (study.patches, study.land)):
        if not dataset.folder.exists():
            words = [str(dataset.folder), "--layout", layout, "--count", str(dataset.images), "--size", "64"]
            steps.append(Step(f"{layout} scenes", ["-m", "data.synthetic", *words]))
    return steps


def resolved_recipes(study: Study) -> dict[str, dict]:
    """method → the flags that train_ssl.py makes of its recipe; a recipe that it refuses ends this
    process."""
    commands = []
    for method in METHODS:
        recipe = study.recipes / f"{method}.yaml"
        words = ["--method", method, "--config", str(recipe), "--data", str(study.patches.folder)]
        commands.append(["train_ssl.py", *words, "--print-config"])
    return dict(zip(METHODS, map(yaml.safe_load, answers(commands))))


def answers(commands: list[list[str]]) -> list[str]:
    """What commands print, run side by side; where some are refused, their lines end this process."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(common.ROOT / script), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for script, *words in commands
    ]
    printed = [process.communicate() for process in processes]
    refused = []
    for process, (script, *_), (_, error) in zip(processes, commands, printed):
        if process.returncode:
            said = error.strip().removeprefix("error: ")
            refused.append(said or f"{script} ended with code {process.returncode}")
    if refused:
        common.fail("; ".join(refused))
    return [text for text, _ in printed]


def check_subsets(study: Study) -> None:
    """DataError where a share of the labels lacks a class: now, not after the pretraining."""
    patches, land, settings = study.patches.table, study.land.table, study.settings
    if patches:
        training_subsets(patches, patches.targets("scene"), [100], [0])
    if land:
        for task in ("scene", "fraction"):
            training_subsets(land, land.targets(task), settings.ratios, settings.seeds)


def without_imagenet() -> str:
    """Why there are no ImageNet weights; blank where they are here now."""
    from models.weights import imagenet_weights  # torch takes seconds to import

    try:
        imagenet_weights("resnet18")
    except WeightsError as error:
        return str(error)
    return ""


def images_per_second(size: int, seconds: float = MEASURED) -> tuple[float, str]:
    """Rate of Barlow Twins steps, views included, on all GPUs together; and the device's type."""
    import torch  # takes seconds, and --help needs none of this

    print(f"measuring for {seconds:g} seconds", flush=True)
    device, _, _ = common.start_ranks("auto")
    rate = rate_of_steps(device, size, seconds)
    torch.cuda.empty_cache()  # this process stays while its steps train on the same GPU
    return rate * max(1, torch.cuda.device_count()), device.type


def rate_of_steps(device: "torch.device", size: int, seconds: float) -> float:
    """Images a second of Barlow Twins on random pixels."""
    import torch

    from data.loader import Plan, TorchLoader
    from models.backbone import build_backbone
    from models.barlow import BarlowTwins
    from models.optimisers import can_fuse, make_optimizer
    from models.step import DTYPES, Learner
    from models.timing import endless, timed_steps
    from models.weights import IMAGENET_MEAN, IMAGENET_STD

    images = 512 if device.type == "cuda" else 8  # a step that has begun is waited for
    precision = common.resolve_precision("auto", device)
    method = BarlowTwins(build_backbone()).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer("sgd", method, 1e-3, 0.9, 0.0, can_fuse(device, precision))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    learn = Learner(method, optimizer, scaler, DTYPES[precision])
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    plan = Plan(images, images, size, size)
    loader = TorchLoader(pixels, plan, size, IMAGENET_MEAN, IMAGENET_STD, device, learn.dtype)
    many = {"steps": 10**6, "seconds": seconds, "warmup": 1}
    return timed_steps(endless(loader), learn, device, name="measuring", **many).images_per_s


# The plan


def show_plan(
    study: Study, first: list[Step], imagenet: list[str], notes: list[str], rate: float, device: str
) -> None:
    """Every command, and the time it takes here; `first`: of `first_steps`."""
    steps = [*scenes_to_write(study), *first, *last_steps(study, imagenet, BEST)]
    hours = [(START + step.passes / (6 * rate)) / 3600 for step in steps]
    speed = f"{rate:,.0f} images/s (two views each) at {study.settings.size} px on {device}"
    print(f"\n{speed}: the plan takes about {shown(sum(hours))}")
    for step, time_taken in zip(steps, hours):
        print(f"{shown(time_taken):>10}  {step.name}\n{'':12}{text_of(step)}")
    print("\n".join(["", *notes]), flush=True)


def first_steps(study: Study, recipes: dict[str, dict], imagenet: list[str]) -> list[Step]:
    """Everything up to the linear probes, which choose the best method."""
    checks = [
        Step(f"check {dataset.folder.name}", ["-m", "data.check", str(dataset.folder)])
        for dataset in (study.patches, study.land)
    ]
    return [*checks, *pretraining(study, recipes), probes(study, imagenet)]


def last_steps(study: Study, imagenet: list[str], best: str) -> list[Step]:
    """Everything that needs the best method: its transfer to fractions and scenes, then all figures."""
    steps = [transfer(study, task, imagenet, best) for task in ("fraction", "scene")]
    runs = [str(study.out / method) for method in METHODS]
    results = [str(study.out / part / "results.csv") for part in ("probes", "transfer")]
    words = ["--runs", *runs, "--results", *results, "--out", str(study.out / "figures"), "--compare-paper"]
    return [*steps, Step("figures and tables", ["plot.py", *words], may_lack=True)]


def pretraining(study: Study, recipes: dict[str, dict]) -> Iterator[Step]:
    """The steps of every method's pretraining, each after a search for its recipe with --tune."""
    images = study.patches.train
    seen = images * search_passes(study.recipes / "tune_ssl.yaml") if study.tune else 0
    for method in METHODS:
        recipe = study.recipes / f"{method}.yaml"
        epochs, subset = length(study, recipes[method])
        if study.tune:
            best = study.out / "tune" / method / "best.yaml"
            yield Step(f"tune {name_of(method)}", search(study, method, recipe, best.parent), 6 * seen)
            recipe = best
        words = training_flags(study, method, recipe)
        words += ["--epochs", str(epochs), "--subset", f"{subset:g}"]
        words += ["--knn-every", str(max(1, epochs // 20))]
        if study.tune:  # best.yaml holds the short warm-up of the trials
            words += ["--warmup-epochs", f"{recipes[method]['warmup_epochs']:g}"]
        command = ["train_ssl.py", *words, "--out", str(study.out / method)]
        cost = 6 * images * subset * epochs
        yield Step(f"pretrain {name_of(method)}", command, cost, ranks=ranks_for(recipes[method]))


def training_flags(study: Study, method: str, recipe: Path) -> list[str]:
    """What a pretraining and the trials of its search have in common."""
    size = ["--size", str(study.settings.size)]
    return ["--method", method, "--config", str(recipe), *study.patches.flags(), *size]


def search(study: Study, method: str, recipe: Path, out: Path) -> list[str]:
    """The command that searches `recipe` by the grid beside it: what the grid does not name stays the
    recipe's."""
    words = [*training_flags(study, method, recipe), "--grid", str(study.recipes / "tune_ssl.yaml")]
    if study.metric:
        words += ["--metric", study.metric]
    return ["tune.py", *words, "--out", str(out)]


def ranks_for(recipe: dict) -> int:
    """GPUs among which a step's images and MoCo's groups of split-BN divide."""
    groups = recipe.get("bn_splits") or 0
    counts = range(1, max(1, gpus()) + 1)
    return max(n for n in counts if (recipe.get("batch_size") or 0) % n == 0 and groups % n == 0)


def length(study: Study, recipe: dict) -> tuple[int, float]:
    """(epochs, share of the images) of a pretraining: as asked, or by the images it shall see, or the
    recipe's."""
    seen, images = study.settings.seen, study.patches.train
    if study.epochs or not seen:
        return study.epochs or recipe["epochs"], recipe["subset"]
    epochs = max(4, round(seen / images))
    return epochs, min(1.0, round(seen / epochs / images, 3))


def search_passes(grid: Path) -> float:
    """Epochs of all images that tune.py trains in all with `grid`, whose trials may see a share of them."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.yaml"
        answers([["tune.py", "--grid", str(grid), "--dry-run", "--plan-to", str(plan)]])
        epochs = yaml.safe_load(plan.read_text(encoding="utf-8"))["epochs"]
    subset = yaml.safe_load(grid.read_text(encoding="utf-8")).get("subset", 1)
    if isinstance(subset, (list, dict)):  # it is searched: at most all images
        subset = 1
    return epochs * float(subset)


def weights_of(study: Study, method: str) -> str:
    return str(study.out / method / "backbone.pth")


def probes(study: Study, imagenet: list[str]) -> Step:
    """Linear probes of all methods on the pretraining set."""
    inits = [*(weights_of(study, method) for method in METHODS), "random", *imagenet]
    how = ["--ratios", "100", "--seeds", "1"]
    seeds, epochs = 1, 0
    if study.settings.probe:
        file = common.ROOT / study.settings.probe
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        how = ["--config", os.path.relpath(file)]
        seeds, epochs = len(recipe["seeds"]), recipe["epochs"]
    words = ["--task", "scene", "--mode", "linear", *how, *study.patches.flags()]
    words += ["--size", str(study.settings.size), "--init", *inits, "channels", "--save-embeddings"]
    words += ["--share-pixels"]  # the copies decode once
    command = ["transfer.py", *words, "--out", str(study.out / "probes")]
    looks = len(inits) + seeds - 1  # each seed draws random weights anew
    seen = seeds * (len(inits) + 1) * epochs * study.patches.train
    passes = looks * study.patches.images + 3 * seen / 100  # a head costs 1 % of a backbone
    return Step("Table IV and Fig. 3: linear probes", command, passes, copies=copies())


def transfer(study: Study, task: str, imagenet: list[str], best: str) -> Step:
    """Linear probing and fine-tuning of the best method beside the baselines, on every share of the
    labels."""
    settings, land = study.settings, study.land
    inits = ["random", *imagenet, weights_of(study, best)]
    words = ["--task", task, *settings.protocol, "--mode", "linear", "finetune", *land.flags()]
    words += ["--size", str(settings.size), "--init", *inits, "--ratios", *map(str, settings.ratios)]
    words += ["--seeds", *map(str, settings.seeds), "--epochs", str(settings.epochs)]
    words += ["--share-pixels"]
    command = ["transfer.py", *words, "--out", str(study.out / "transfer")]
    seeds = len(settings.seeds)
    seen = seeds * land.train * sum(settings.ratios) / 100  # images of all cells in one epoch
    tested = land.test if settings.protocol else 0  # every epoch, so that the seeds can share one
    checked = seeds * len(settings.ratios) * (land.val + tested)
    passes = len(inits) * (settings.epochs * (3 * seen + checked) + land.images)
    name = {"fraction": "Table V: fractions", "scene": "Table VI: scenes"}[task]
    # At the paper's rates a cell may diverge, which costs none of the others
    return Step(name, command, passes, copies=copies(), may_lack=True)


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def copies() -> int:
    """Processes that share the cells of a table: one a GPU, or one a core, the fastest on a CPU."""
    return gpus() or common.cores()


def best_method(summary: Path) -> str:
    """The method whose linear probe has the highest macro F1 on val: test tiles choose nothing."""
    f1 = macro_f1(summary, "val")
    return f1[f1.index.isin(METHODS)].idxmax()


def macro_f1(summary: Path, split: str) -> pd.Series:
    """Initialisation → macro F1 of its linear probe, the mean over the seeds at the chosen epoch. ConfigError
    where one was probed in several settings."""
    rows = pd.read_csv(summary)
    f1 = rows[(rows.split == split) & (rows.metric == "f1_macro")].set_index("init")["mean"]
    if not f1.index.is_unique:
        twice = f1.index[f1.index.duplicated()][0]
        raise ConfigError(
            f"{summary}: {twice} was probed in several settings, and one of them has to choose the method: "
            f"move {summary.parent} away"
        )
    return f1


# Running it


def shown(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def text_of(step: Step) -> str:
    """The command as a shell takes it in the folder where this one was started."""
    start = "python" if step.ranks == 1 else f"torchrun --nproc_per_node={step.ranks}"
    home = os.path.relpath(common.ROOT)
    first, *rest = step.command
    if first.endswith(".py"):
        return f"{start} {shlex.join([os.path.normpath(os.path.join(home, first)), *rest])}"
    path = "" if home == "." else f"PYTHONPATH={shlex.quote(home)} "
    return f"{path}{start} {shlex.join(step.command)}"


def run(step: Step, spent: Path | None = None) -> bool:
    """Run a step to its end and add its seconds to the CSV `spent`; any failure ends this process too. False
    where the step lacks some of what it was to make, and may."""
    print(f"\n{step.name}: {text_of(step)}", flush=True)
    began = time.perf_counter()
    processes = [start(step, copy) for copy in range(step.copies)]
    code = None
    try:
        code = processes[0].wait()
    finally:  # where it failed, or was interrupted, the training saves
        for process in processes:
            if code != 0:
                process.terminate()
            process.wait()
    if code == 2:
        raise SystemExit(2)  # it has said why
    if code and not (code == 1 and step.may_lack):
        again = "mend what it says above and start the same command again"
        common.fail(f"{step.name} ended with code {code}; {again}")
    if spent:
        add_time(spent, text_of(step), time.perf_counter() - began)
    return code == 0


def start(step: Step, copy: int) -> subprocess.Popen:
    """One process of a step. It ends with this one. Copies but the first are silent: they would say the
    same."""
    first, *rest = step.command
    script = [str(common.ROOT / first), *rest] if first.endswith(".py") else step.command
    ranks = ["-m", "torch.distributed.run", f"--nproc_per_node={step.ranks}"] if step.ranks > 1 else []
    paths = [str(common.ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if step.copies > 1:
        environment["LOCAL_RANK"] = str(copy)  # the GPU
        if not gpus():
            environment["OMP_NUM_THREADS"] = str(max(1, common.cores() // step.copies))
    silence = subprocess.DEVNULL if copy else None
    command = [sys.executable, *ranks, *script]
    return subprocess.Popen(
        command, env=environment, stdout=silence, stderr=silence, preexec_fn=end_with_parent
    )


def end_with_parent() -> None:
    """Ask Linux to stop this process when the one that began it dies, however it dies."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def add_time(file: Path, command: str, seconds: float) -> None:
    """Add the seconds of a call that has ended to those of its command."""
    times = read_times(file)
    times[command] = round(times.get(command, 0) + seconds, 1)
    common.write_csv(file, pd.DataFrame({"command": times.keys(), "seconds": times.values()}))


def read_times(file: Path) -> dict[str, float]:
    """Command → seconds. They are only shown, so a damaged file counts as empty."""
    try:
        rows = pd.read_csv(file)
        return dict(zip(rows.command, rows.seconds.astype(float)))
    except (OSError, ValueError, AttributeError):
        return {}


# The report


def write_page(study: Study, best: str, notes: list[str], spent: Path, device: str) -> None:
    """report.html: what was found, every figure and table, and how it was made."""
    import torch

    figures = study.out / "figures"
    about = common.about(torch.device(device))
    appendix = {
        "Commands": [f"{command}    # {seconds:.0f} s" for command, seconds in read_times(spent).items()],
        "Not drawn": not_drawn(figures / "missing.csv") or ["nothing is missing"],
        "Versions": yaml.safe_dump(about, sort_keys=False).splitlines(),
    }
    title = "Self-supervised pretraining on satellite images: the whole protocol"
    write_report(study.out / "report.html", title, findings(study, best) + notes, figures, appendix)


def not_drawn(missing: Path) -> list[str]:
    """The lines of plot.py's missing.csv."""
    rows = pd.read_csv(missing, keep_default_na=False)
    return [": ".join(filter(None, row)) for row in zip(rows.figures, rows.missing, rows.command)]


def findings(study: Study, best: str) -> list[str]:
    """What the numbers say, in sentences."""
    patches, land = (dataset.folder.resolve().name for dataset in (study.patches, study.land))
    where = f"pretrained without labels on {patches}, transferred to {land}"
    lines = [f"ResNet-18 at {study.settings.size} px, {where}."]
    f1 = macro_f1(study.out / "probes" / "summary.csv", "test").sort_values(ascending=False)
    probed = ", ".join(f"{name_of(init)} {value:.3f}" for init, value in f1.items())
    lines.append(f"Linear probe on the pretraining classes, macro F1: {probed}.")
    lines.append(why_chosen(study, best))
    for task, measure in (("fraction", "RMSE"), ("scene", "macro F1")):
        file = study.out / "figures" / f"{stem_of(f'comparison-{task}-{land}')}.csv"
        if not file.exists():  # no cell of the task could be done: "Not drawn" says so
            continue
        table = pd.read_csv(file)
        over = PAPER_MEAN if study.settings.protocol and (table.ratio == PAPER_MEAN).any() else MEAN
        lines += compared(table[table.ratio == over], best, f"{task}s", measure)
    return lines


def why_chosen(study: Study, best: str) -> str:
    """Which method was transferred, by what, and on how many images that was measured."""
    f1 = macro_f1(study.out / "probes" / "summary.csv", "val")
    others = f1[f1.index.isin(METHODS)].drop(best)
    line = f"{name_of(best)} was transferred: its probe has the highest macro F1 on val, {f1[best]:.3f}"
    if len(others):
        line += f" (next: {name_of(others.idxmax())}, {others.max():.3f})"
    line += f", on {study.patches.val:,} images."
    rarest = study.patches.rarest
    if rarest < FEW:
        line += f" The rarest class has {rarest} of them: its F1, and so their mean, is a rough number."
    return line


def compared(means: pd.DataFrame, best: str, what: str, measure: str) -> list[str]:
    """A sentence for each mode and baseline of the rows of plot.py's comparison that average ratios."""
    lines = []
    for _, row in means[means.init == best].iterrows():
        pair = f"{name_of(best)} against {name_of(row.baseline)} on {what}, {name_of(row['mode'])}"
        values = f"mean {measure} over {shares(row.ratios)} {row.value:.3f} against {row.baseline_value:.3f}"
        gain = f"improvement {row.improvement:+.1f} %"
        won = f"ahead in {row.wins} of {row.cells} class and ratio cells, equal in {row.ties}"
        lines.append(f"{pair}: {values} ({gain}), {won}, n = {row.n} seeds.")
    return lines


def shares(ratios: str) -> str:
    """`5 10 100` as words: 5, 10 and 100 % of the labels."""
    *first, last = ratios.split()
    return f"{', '.join(first)} and {last} % of the labels"


if __name__ == "__main__":
    with common.one_line_errors():
        main()

"""Grid, random and successive-halving search over the flags of a script; every trial is a subprocess.

    python tune.py --method barlow --data ../data/eurosat --grid yaml/tune_ssl.yaml --out runs/tune/barlow
    python tune.py --script transfer.py --data ../data/land --grid yaml/tune_transfer.yaml --out runs/land
    torchrun --nproc_per_node=4 tune.py ...    # ranks share the trials; on machines, --out is a shared folder

Flags that are not listed here go to the script unchanged. The YAML names the script's flags: a list such as
`lr: [1e-3, 1e-2]` is a grid, `subset: 0.4` is fixed; one `{log_uniform: [1e-4, .1]}`, `{uniform: [a, b]}` or
`{choice: [a, b]}` makes it a random search of --trials draws. It may set trials, eta, min_epochs, max_epochs,
metric, seeds_per_trial and budget_minutes too; the command line wins. A flag of the script that has a name of
this list (--seed, --workers) is set in the YAML.

Synchronous successive halving (Jamieson and Talwalkar 2016): all trials train min-epochs, the best 1/eta of
them eta times as many in all, and so on up to max-epochs; equal numbers make a plain search. A promoted trial
goes on from its own checkpoint (--stop-epoch; the schedule is planned for max-epochs from the start), so the
survivor equals an uninterrupted run. A script without --stop-epoch, such as transfer.py, trains each rung
afresh with --epochs RUNG.

The metric is log.csv's at the rung, of a script without --stop-epoch the mean of summary.csv's val rows (so
tune one init, mode and ratio at a time). Less is better for loss, rmse, mae, error and seconds. With
--seeds-per-trial N a trial is N runs, of the script's --seed and those after it, and counts by their mean
(transfer.py has --seeds of its own: set it to 1, or leave --seeds-per-trial out). Features that collapse end
a trial (`collapsed_below` in its config.yaml). --budget-minutes M stops a run that has trained for M minutes
over all its rungs: it is marked `over budget` beside the metric of its last check (`knn_every: 1` checks
every epoch), and is neither ranked nor promoted; the search goes on.

OUT/trials.csv is the leaderboard (`front`: no other row is both better and cheaper), OUT/best.yaml the winner
for --config, OUT/importance.csv how much each flag matters, OUT/search.png the picture; OUT/trials/ holds the
run directories. After any kill the same command goes on and tries failed trials again. More trials, values,
seeds or minutes train what is new and keep the rest. Several workers split the CPU cores; rounding depends on
a trial's threads: for the same bits with any --workers, set OMP_NUM_THREADS. Exit code 1: trials failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import fcntl
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.distributed import Store

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # of prctl(2)
POLL = 0.1  # seconds between two looks at the running trials
GRACE = 30  # seconds that a script has to save after SIGTERM

OWN_FLAGS = {"out": "--out", "epochs": "--max-epochs", "stop_epoch": "--min-epochs and --max-epochs"}
SETTINGS = ("trials", "eta", "min_epochs", "max_epochs", "metric", "seeds_per_trial", "budget_minutes")
MACHINE = {"out", "stop_epoch", "config", "help", "device", "workers", "cache"}  # no part of best.yaml
CHOSEN = {"loader", "precision"}  # nor these, where the searching machine chose them
BUDGET = ("epochs", "subset", "ratios", "per_class", "seeds")  # what a search has less of than a long run
DISTRIBUTIONS = ("list", "choice", "uniform", "log_uniform")
MINIMISED = re.compile("loss|rmse|mae|error|seconds")
MOST = 100_000  # trials of a search: more are a slip, and take hours to draw
FEW = 100  # val images below which a metric is rough: an accuracy of 0.8 has a standard error of 0.04
RESULT = re.compile(r"(\d+)(?:-seed(\d+))?-(\d+)")  # the name of a finished run's file


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--grid", type=Path, required=True, help="YAML of the flags to sweep")
    add("--out", type=Path, default=Path("runs/tune"), help="where everything is written")
    add("--script", type=Path, default=Path(__file__).with_name("train_ssl.py"), help="the script to run")
    add("--trials", type=number(int, 1, MOST), help="how many to draw; a grid without it is run whole")
    add("--seed", type=number(int), default=0, help="of the draws; the trials keep the script's own")
    add("--eta", type=number(int, 2), default=3, help="one in eta trials is promoted")
    add("--min-epochs", type=number(int, 1), default=1, help="the first rung")
    add("--max-epochs", type=number(int, 1), default=9, help="the last rung; the schedule is planned for it")
    add("--workers", type=number(int, 1), help="trials at a time: one a GPU or rank, or one")
    add("--metric", help="column of log.csv or metric of summary.csv: knn_macro_f1; rmse, of scenes f1_macro")
    add("--seeds-per-trial", type=number(int, 1), default=1, help="runs a trial, each with a seed of its own")
    add("--budget-minutes", type=number(float, 0), help="of training a run; past it a run is stopped")
    add("--seconds-per-epoch", type=number(float, 0), help="for the time left, in place of measured ones")
    add("--dry-run", action="store_true", help="print the plan and the estimated time, and stop")
    add("--plan-to", type=Path, metavar="FILE", help="write the plan as YAML: epochs, trials and rungs")
    return parser


def main(argv: list[str] | None = None) -> None:
    args, search = read_arguments(argv)
    results: dict[Run, dict] = {}
    if RANK == 0:
        if not args.dry_run:
            check_directory(search)
            collect(search, results)
        show_plan(search, time_left(search, results, args.seconds_per_epoch), args.plan_to)
    if args.dry_run:
        return
    exit_on_signals()
    results.clear()  # of what is tried again
    with contextlib.ExitStack() as stack:
        store = prepare(search, stack)
        collect(search, results)
        progress = Progress(search, results, args.seconds_per_epoch)
        entrants = list(range(len(search.trials)))
        for rung in search.rungs:
            runs = [Run(trial, seed, rung) for trial in entrants for seed in range(search.seeds)]
            run_all(search, runs, results, store, progress)
            entrants = promote(search, entrants, rung, results)
            if not entrants:
                break
        failed = 0
        if RANK == 0:
            failed = report(search, results)
        part(store)
    if failed:
        raise SystemExit(1)


# What is searched


class Run(NamedTuple):
    """One training: a trial, which of its seeds (0, 1, ...), and the epoch that it goes to."""

    trial: int
    seed: int
    rung: int


@dataclass
class Search:
    """What is searched: `trials` holds each trial's swept flags, `fixed` the words that every trial gets."""

    script: Path
    options: dict[str, str]
    fixed: list[str]
    trials: list[dict]
    rungs: list[int]
    eta: int
    metric: str
    out: Path
    workers: int
    first_seed: int | None = None  # the script's --seed; None: it has none, or it is swept
    seeds: int = 1  # runs a trial
    budget: float = math.inf  # seconds a run, over all its rungs
    check_every: int = 0  # epochs between the script's checks of the metric; 0: not known

    @property
    def resumes(self) -> bool:
        return "stop_epoch" in self.options

    @property
    def columns(self) -> list[str]:
        """The metric, and the one of the report's second ranking."""
        second = "knn_macro_f1" if self.metric == "loss" else "loss"
        return [self.metric, second] if self.resumes else [self.metric]

    def name(self, run: Run) -> str:
        return f"{run.trial:03d}" + (f"-seed{run.seed}" if run.seed else "")

    def directory(self, run: Run) -> Path:
        """Where the run trains; a script that cannot go on starts each rung in a directory of its own."""
        name = self.name(run) if self.resumes else f"{self.name(run)}-{run.rung}"
        return self.out / "trials" / name

    def result_file(self, run: Run) -> Path:
        return self.out / "trials" / f"{self.name(run)}-{run.rung}.json"

    def plan(self) -> list[tuple[int, int, int]]:
        """(rung, trials, epochs that each of their runs trains there) of every rung."""
        before = [0, *self.rungs[:-1]] if self.resumes else [0] * len(self.rungs)
        counts = [max(1, len(self.trials) // self.eta**i) for i in range(len(self.rungs))]
        return [(rung, count, rung - old) for rung, count, old in zip(self.rungs, counts, before)]


# Flags, grid and draws


def read_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Search]:
    parser = build_parser()
    grid_file = parser.parse_known_args(argv)[0].grid
    grid = read_yaml(grid_file)
    for name in set(grid) & set(SETTINGS):
        value = grid.pop(name)
        if value is None:
            raise ConfigError(f"{grid_file}: {name} has no value")
        parser.set_defaults(**{name: str(value)})  # a text, which argparse checks as if it had been typed
    args, passed = parser.parse_known_args(argv)
    if args.max_epochs < args.min_epochs:
        raise ConfigError(f"--max-epochs is {args.max_epochs}, must be at least {args.min_epochs}")
    search = build_search(args, passed, grid)
    refuse_wrong_flags(search)
    return args, search


def build_search(args: argparse.Namespace, passed: list[str], grid: dict) -> Search:
    options, defaults, switches = script_options(args.script)
    flags = [word[2:].split("=")[0] for word in passed if word.startswith("--")]
    given = {flag_name(flag, options, "command line") for flag in flags}
    swept, fixed = read_grid(grid, str(args.grid), options, defaults, given)
    refuse_switched(swept, fixed, switches, str(args.grid))
    rungs = rung_levels(args.min_epochs, args.max_epochs, args.eta)
    if "knn_every" in options and "knn_every" not in given | set(swept):
        fixed.setdefault("knn_every", math.gcd(*rungs))  # so that every rung has its check
    check_every = fixed.get("knn_every", 0)
    first_seed = None
    if "seed" in options and "seed" not in swept:
        first_seed = fixed.pop("seed", in_config("seed", passed, fixed, 0))
    if args.seeds_per_trial > 1 and type(first_seed) is not int:
        raise ConfigError(
            f"--seeds-per-trial: {args.script} has no --seed of its own, or {args.grid} sweeps it"
        )
    if args.seeds_per_trial > 1 and "seeds" in options and set_to("seeds", passed, fixed) != ["1"]:
        raise ConfigError(f"--seeds-per-trial: {args.script} has --seeds of its own: add --seeds 1")
    return Search(
        script=args.script,
        options=options,
        fixed=words(fixed, options) + passed,
        trials=draw_trials(swept, args.trials, args.seed),
        rungs=rungs,
        eta=args.eta,
        metric=args.metric or default_metric(options, passed, fixed),
        out=args.out,
        workers=args.workers or (1 if WORLD > 1 else max(1, len(visible_gpus()))),
        first_seed=first_seed,
        seeds=args.seeds_per_trial,
        budget=math.inf if args.budget_minutes is None else 60 * args.budget_minutes,
        check_every=check_every if type(check_every) is int else 0,
    )


def default_metric(options: dict[str, str], passed: list[str], fixed: dict) -> str:
    """What ranks the trials of train_ssl.py, or of the task of transfer.py."""
    if "stop_epoch" in options:
        return "knn_macro_f1"
    task = set_to("task", passed, fixed) or [in_config("task", passed, fixed, "")]
    return "f1_macro" if task == ["scene"] else "rmse"


def refuse_wrong_flags(search: Search) -> None:
    """ConfigError, in the script's words, where it refuses the flags of the first trial: of a draw between
    64 and 128 all others would fail as well where it wants whole numbers."""
    command = [*command_of(search, Run(0, 0, search.rungs[-1])), "--help"]  # read after the others
    run = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if run.returncode == 2:
        why = last_lines(run.stderr, 1).removeprefix("error: ")
        raise ConfigError(f"{search.script} refuses the first trial: {why}")


def in_config(name: str, passed: list[str], fixed: dict, default: object) -> object:
    """The value of a flag in the YAML file that the script's --config names; else `default`."""
    files = set_to("config", passed, fixed)
    return read_yaml(Path(files[-1])).get(name, default) if files else default


def set_to(name: str, passed: list[str], fixed: dict) -> list[str]:
    """The values that the command line, else the grid, gives to a flag of the script. The last counts where
    a flag is given twice, as in argparse."""
    value = fixed.get(name)
    found = []
    if value is not None:
        found = list(map(str, value if isinstance(value, list) else [value]))
    own = False  # whether the words belong to this flag
    for word in passed:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            own = flag == f"--{name}"
            if own:
                found = [value] if equals else []
        elif own:
            found.append(word)
    return found


def script_options(script: Path) -> tuple[dict[str, str], set[str], set[str]]:
    """The script's flags as --help lists them, {"batch_size": "--batch-size", ...}; which show a default;
    which are switches, and take no value."""
    if not script.is_file():
        raise ConfigError(f"--script {script}: no such file")
    command = [sys.executable, str(script), "--help"]
    settings = {"PYTHON_COLORS": "0", "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | settings)
    if run.returncode:
        raise ConfigError(f"{script} --help failed: {last_lines(run.stderr, 1)}")
    options, defaults, switches = {}, set(), set()
    names = []
    for line in run.stdout.splitlines():
        if re.match(" {1,4}-", line):
            head = re.split(r"\s{2,}", line.strip())[0]
            flags = re.findall(r"--([A-Za-z][\w-]*)", head)
            names = [flag.replace("-", "_") for flag in flags]
            options |= {name: f"--{flag}" for name, flag in zip(names, flags)}
            if all(word.startswith("-") for word in head.split()):
                switches |= set(names)
        if "(default:" in line:
            defaults |= set(names)
    return options, defaults, switches


def read_grid(
    grid: dict, source: str, options: dict[str, str], defaults: set[str], given: set[str]
) -> tuple[dict[str, tuple[str, list]], dict]:
    """(swept flags, fixed flags) of the YAML; what is `given` on the command line wins over the latter."""
    swept, fixed = {}, {}
    for key, entry in grid.items():
        name = flag_name(str(key), options, source)
        if isinstance(entry, (list, dict)):
            swept[name] = read_entry(f"{source}: {name}", entry, name in defaults)
        elif entry is None and name in defaults or entry == "":
            raise ConfigError(f"{source}: {name} has no value")
        elif name not in given:
            fixed[name] = entry
    if not swept:
        raise ConfigError(f"{source} sweeps nothing: give a flag a list of values")
    for name in sorted(given & set(swept)):
        both = f"{options[name]} is swept by {source} and also given on the command line"
        raise ConfigError(f"{both}: remove one of them")
    return swept, fixed


def refuse_switched(swept: dict, fixed: dict, switches: set[str], source: str) -> None:
    """ConfigError where a flag that takes a value has true or false, which YAML reads in yes and off too."""
    values = fixed | {name: entry for name, (_, entry) in swept.items()}
    for name in set(values) - switches:
        found = values[name] if isinstance(values[name], list) else [values[name]]
        if any(isinstance(value, bool) for value in found):
            raise ConfigError(
                f"{source}: {name} takes a value: true, false, yes, no, on, off are for switches"
            )


def flag_name(name: str, options: dict[str, str], source: str) -> str:
    key = name.replace("-", "_")
    if key in OWN_FLAGS:
        raise ConfigError(f"{source}: {name} is set by the tuner: use {OWN_FLAGS[key]}")
    if key not in options and key in {action.dest for action in build_parser()._actions}:
        raise ConfigError(f"{source}: {name} is a flag of tune.py: give it on the command line")
    if key not in options:
        raise ConfigError(f"{source}: the script has no flag {name}; the nearest is {nearest(key, options)}")
    return key


def read_entry(where: str, entry: list | dict, has_default: bool) -> tuple[str, list]:
    """(how, values) of a grid entry: a list, or {distribution: values}.

    An empty value stands for the script's default, and is refused where that default is a number or a name.
    """
    how, values = "list", entry
    if isinstance(entry, dict):
        how = ", ".join(map(str, entry)) or "{}"
        values = next(iter(entry.values()), None)
    if how not in DISTRIBUTIONS:
        raise ConfigError(f"{where}: {how} is no distribution; the nearest is {nearest(how, DISTRIBUTIONS)}")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: no value can be drawn from {how} {values}")
    if "" in values or [] in values or None in values and has_default:
        raise ConfigError(f"{where}: an empty value in {values}: fill it in or leave it out")
    meant = [sense(value) for value in values]
    if how in ("list", "choice") and any(value in meant[:i] for i, value in enumerate(meant)):
        raise ConfigError(f"{where}: a value stands twice in {values}")
    try:
        draw(how, values, random.Random(0))
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: no value can be drawn from {how} {values}") from None
    return how, values


def sense(value: object) -> object:
    """The number that a text of YAML, 1e-3, is for the script; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def draw(how: str, values: list, rng: random.Random) -> object:
    """A value of the list, or of three digits between the bounds, so that it is read and typed easily."""
    if how in ("list", "choice"):
        return rng.choice(values)
    low, high = sorted(map(float, values))
    if not math.isfinite(high - low):
        raise ValueError(f"{values} are no bounds")
    if how == "log_uniform":
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    else:
        value = rng.uniform(low, high)
    return min(max(float(f"{value:.3g}"), low), high)


def draw_trials(entries: dict[str, tuple[str, list]], count: int | None, seed: int) -> list[dict]:
    """All combinations of lists or `count` of them; with a distribution among them, `count` draws.

    The first trials are the same whatever the count, so that a search can grow.
    """
    drawn = [name for name, (how, _) in entries.items() if how != "list"]
    if not drawn:
        lists = [values for _, values in entries.values()]
        if (points := math.prod(map(len, lists))) > MOST:
            raise ConfigError(f"the grid has {points:,} points, more than {MOST:,}: draw values by choice")
        grid = [dict(zip(entries, point)) for point in itertools.product(*lists)]
        if count:
            random.Random(seed).shuffle(grid)
        return grid[:count]
    if not count:
        raise ConfigError(f"{drawn[0]} is drawn at random: say how many trials with --trials")
    return [draw_trial(entries, f"{seed}/{i}") for i in range(count)]


def draw_trial(entries: dict[str, tuple[str, list]], place: str) -> dict:
    """Each flag from a stream of its own: seed, trial number and the flag's name decide, nothing else."""
    return {name: draw(*entry, random.Random(f"{place}/{name}")) for name, entry in entries.items()}


def rung_levels(low: int, high: int, eta: int) -> list[int]:
    """low, low * eta, ..., high."""
    rungs = []
    while low < high:
        rungs.append(low)
        low *= eta
    return [*rungs, high]


def words(flags: dict, options: dict[str, str]) -> list[str]:
    """{"lr": 0.1, "seeds": [1, 2], "compile": True} as --lr 0.1 --seeds 1 2 --compile; False as --no-NAME."""
    out = []
    for name, value in flags.items():
        if isinstance(value, bool):
            switch = name if value else f"no_{name}"
            if switch in options:
                out.append(options[switch])
        elif value is not None:
            out += [options[name], *map(str, value if isinstance(value, list) else [value])]
    return out


def visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(len(re.findall("^GPU ", listed, re.MULTILINE)))]


# The plan and the directory


def show_plan(search: Search, left: str, file: Path | None) -> None:
    """Prints the whole search, and writes it to `file` for other programs."""
    rungs = [{"epoch": rung, "trials": count, "new_epochs": new} for rung, count, new in search.plan()]
    epochs = search.seeds * sum(rung["trials"] * rung["new_epochs"] for rung in rungs)
    steps = [f"{r['trials']} trials to epoch {r['epoch']} ({r['new_epochs']} epochs each)" for r in rungs]
    seeds = f" of {search.seeds} seeds" if search.seeds > 1 else ""
    workers = f"{search.workers * WORLD} worker(s)"
    plan = f"{', '.join(steps)}{seeds}: {epochs} epochs on {workers}, ranked by {search.metric}; {left}"
    print(plan, flush=True)
    if search.metric == "loss":
        warning = "the loss as metric rewards collapse and narrow heads; it is here to reproduce the paper"
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if file:
        plan = {"epochs": epochs, "trials": len(search.trials), "seeds_per_trial": search.seeds}
        write(file, yaml.safe_dump(plan | {"rungs": rungs}, sort_keys=False))


def describe(search: Search) -> dict:
    """What makes two searches the same, for search.yaml; the trials may grow."""
    return {
        "script": search.script.name,
        "flags": search.fixed,
        "metric": search.metric,
        "eta": search.eta,
        "rungs": search.rungs,
        "first_seed": search.first_seed,
        "trials": search.trials,
    }


def check_directory(search: Search) -> None:
    """Refuses the directory of another search, and one with other files; takes up its trials' numbers."""
    path, ours = search.out / "search.yaml", describe(search)
    if not path.exists():
        found = search.out.is_dir() and [name for name in os.listdir(search.out) if name[0] != "."]
        if found:
            raise ConfigError(f"{search.out} holds other files ({found[0]}): choose another --out")
        return
    theirs = read_yaml(path)
    for name in [*ours][:-1]:
        if theirs.get(name) != ours[name]:
            differs = f"{name} is {theirs.get(name)} there and {ours[name]} here"
            raise ConfigError(f"{search.out} holds another search: {differs}; choose another --out")
    search.trials = grown(theirs.get("trials") or [], search.trials, search.out)


def grown(before: list[dict], now: list[dict], out: Path) -> list[dict]:
    """The trials of this start; those of earlier starts keep their numbers."""
    new = list(now)
    for i, trial in enumerate(before):
        if trial not in new:
            lost = f"trial {i} there, {trial}, is none of the {len(now)} here"
            raise ConfigError(f"{out} holds another search: {lost}; choose another --out")
        new.remove(trial)
    return before + new


def prepare(search: Search, stack: contextlib.ExitStack) -> Store | None:
    """Makes and holds the directory, removes what is to run again, and returns torchrun's store, if any."""
    store = None
    if WORLD > 1:
        from torch.distributed import rendezvous

        store = next(rendezvous("env://"))[0]
    if RANK > 0:
        store.wait(["ready"])
        check_directory(search)
        return store
    search.out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(hold(search.out))
    check_directory(search)  # again: another tuner may have grown it since
    write(search.out / "search.yaml", yaml.safe_dump(describe(search), sort_keys=False))
    (search.out / "trials").mkdir(exist_ok=True)
    remove_temporaries(search.out)
    files = [path for path in (search.out / "trials").glob("*.json") if RESULT.fullmatch(path.stem)]
    for path in files:
        row = read_row(search, path)
        over = row and row["status"] == "over budget" and row["total_seconds"] < search.budget
        if row is None:
            print(f"{path} is damaged: its run is done again", file=sys.stderr, flush=True)
        if row is None or over or row["status"] == "failed":
            path.unlink()
    if store:
        store.set("ready", "")
    return store


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """One tuner a directory: the second is refused with host and process of the first."""
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(f"{folder} is in use by {file.read()}: wait, or choose another --out") from None
        file.truncate(0)
        try:
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
        except OSError as error:  # a full disk does not say where
            raise ConfigError(f"{folder}: {error.strerror}") from None
        yield


def remove_temporaries(folder: Path) -> None:
    """What killed tuners were writing: this one holds the directory, so none of them lives."""
    for path in [*folder.glob(".*"), *folder.glob("trials/.*")]:
        if re.fullmatch(r"\..+\.\d+", path.name):
            path.unlink()


def part(store: Store | None) -> None:
    """Rank 0 ends last, as the store may live in its process."""
    if store:
        store.add("ended", 1)
        while RANK == 0 and store.add("ended", 0) < WORLD:
            time.sleep(0.2)


def exit_on_signals() -> None:
    """SIGTERM, SIGINT, SIGHUP and SLURM's SIGUSR1 end the tuner in order: its trials get SIGTERM and save."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, leave)


# Running the trials


@dataclass
class Job:
    run: Run
    process: subprocess.Popen
    began: float  # on the clock
    spent: float  # seconds of training before this process
    epochs: int = 0  # as far as its log has been judged
    reason: str = ""  # why its features count as collapsed
    tries: int = 1
    said: int = 0  # bytes of its log that earlier processes wrote


def run_all(search: Search, runs: list[Run], results: dict, store: Store | None, progress: Progress) -> None:
    """Trains the runs of a rung; returns when all ranks have finished theirs."""
    todo = take(runs, results, store)
    jobs: dict[int, Job] = {}
    try:
        while any(run not in results for run in runs):
            for slot in set(range(search.workers)) - set(jobs):
                run = next(todo, None)
                if run is not None:
                    jobs[slot] = start(search, run, slot)
                    progress.began(jobs[slot])
            time.sleep(POLL if jobs else 1)
            known = len(results)
            for slot in list(jobs):
                settle(search, jobs, slot, results, progress)
            if WORLD > 1:
                collect(search, results)
            if len(results) > known and RANK == 0:
                write_tables(search, results)
            progress.show(jobs.values())
    finally:
        stop(jobs.values())


def take(runs: list[Run], results: dict, store: Store | None) -> Iterator[Run]:
    """The runs that this process trains: all, or under torchrun the next one that no rank has taken."""
    for place in itertools.count():
        if store:
            place = store.add(f"rung {runs[0].rung}", 1) - 1
        if place >= len(runs):
            return
        if runs[place] not in results:
            yield runs[place]


def settle(search: Search, jobs: dict[int, Job], slot: int, results: dict, progress: Progress) -> None:
    """Keeps the row of a run that has ended and frees its slot; one killed by the system starts again."""
    job = jobs[slot]
    row = judge(search, job)
    if row is None:
        return
    del jobs[slot]
    if row["reason"].startswith("killed") and job.tries == 1:
        jobs[slot] = start(search, job.run, slot)
        jobs[slot].tries = 2
        return
    results[job.run] = row
    write(search.result_file(job.run), json.dumps(row))
    progress.ended(row)


def start(search: Search, run: Run, slot: int) -> Job:
    """Starts a run, or goes on with it.

    Its processes hold a lock while one of them lives, so that no two write one run directory, and on Linux
    they end with the tuner, even by kill -9.
    """
    directory = search.directory(run)
    with open(f"{directory}.lock", "w") as lock, open(f"{directory}.log", "ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for what an earlier tuner may have left running
        said = os.fstat(log.fileno()).st_size
        process = subprocess.Popen(
            command_of(search, run),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(search.workers, slot),
            preexec_fn=die_with_the_tuner if LIBC else None,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
    return Job(run, process, time.time(), spent_before(search, run), said=said)


def spent_before(search: Search, run: Run) -> float:
    """Seconds of a run before this process: of its last rung in all, and of the epochs since that log.csv
    holds."""
    if not search.resumes:
        return 0.0
    since, spent = 0, 0.0
    for rung in search.rungs[: search.rungs.index(run.rung)]:
        file = search.result_file(run._replace(rung=rung))
        if file.exists():
            since, spent = rung, json.loads(file.read_text())["total_seconds"]
    log = read_log(search.directory(run), run.rung)
    return spent + (float(log["seconds"][since:].sum()) if "seconds" in log else 0.0)


def command_of(search: Search, run: Run) -> list[str]:
    own = {"epochs": search.rungs[-1] if search.resumes else run.rung, "out": str(search.directory(run))}
    if search.first_seed is not None:
        own["seed"] = search.first_seed + run.seed if run.seed else search.first_seed
    if search.resumes and run.rung < search.rungs[-1]:
        own["stop_epoch"] = run.rung
    flags = search.trials[run.trial] | own
    return [sys.executable, str(search.script), *search.fixed, *words(flags, search.options)]


def die_with_the_tuner() -> None:
    """Asks the kernel, in a trial's process before its script starts."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment(workers: int, slot: int) -> dict[str, str]:
    """A GPU of its own, an even share of the cores, and nothing of torchrun's: a trial is one process."""
    launcher = re.compile("TORCHELASTIC|MASTER_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$")
    env = {name: value for name, value in os.environ.items() if not launcher.match(name)}
    env["PYTHONUNBUFFERED"] = "1"
    place = int(os.environ.get("LOCAL_RANK", 0)) * workers + slot
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * workers
    gpus = visible_gpus()
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    if here > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // here)))
    return env


def stop(jobs: Iterable[Job]) -> None:
    """SIGTERM first, so that a script can save."""
    for job in jobs:
        job.process.terminate()
    for job in jobs:
        try:
            job.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


# Judging them by their files


def judge(search: Search, job: Job) -> dict | None:
    """The run's row at this rung, or None while it trains."""
    code, directory = job.process.poll(), search.directory(job.run)
    log = read_log(directory, job.run.rung) if search.resumes else pd.DataFrame()
    seconds = time.time() - job.began
    times = {"seconds": round(seconds, 1), "total_seconds": round(job.spent + seconds, 1)}
    row = job.run._asdict() | dict.fromkeys(search.columns, math.nan) | {"epochs": job.run.rung} | times
    row |= {"status": "done", "reason": ""}
    if len(log) > job.epochs:
        job.epochs = len(log)
        check_metric(search, log, directory)
        epoch, job.reason = collapse(log, collapsed_below(directory))
        if epoch and (search.metric != "loss" or job.reason.startswith("loss")):
            stop([job])  # not killed: half a checkpoint would stay
            return row | {"epochs": epoch, "status": "collapsed", "reason": job.reason}
    row["reason"] = job.reason
    if code is None and row["total_seconds"] <= search.budget:
        return None
    if code is None:
        stop([job])
        return row | reached(search, read_log(directory, job.run.rung))
    if code:
        return row | {"epochs": len(log), "status": "failed", "reason": failure(directory, code, job.said)}
    try:
        found = numbers(search, directory, job.run.rung)
    except (OSError, IndexError, KeyError, ValueError) as error:
        reason = f"ended without numbers for epoch {job.run.rung}: {error}"
        return row | {"status": "failed", "reason": reason}
    must_log(search, found.index, directory)
    row |= {name: float(found.get(name, math.nan)) for name in search.columns}
    if not math.isfinite(row[search.metric]):
        row |= {"status": "failed", "reason": f"{search.metric} is not finite at epoch {job.run.rung}"}
    return row


def read_log(directory: Path, rung: int) -> pd.DataFrame:
    """The first `rung` rows (epochs) of log.csv, without a last one that is still being written."""
    path = directory / "log.csv"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    text = text[: text.rfind("\n") + 1]
    try:
        return pd.read_csv(io.StringIO(text), nrows=rung)
    except ValueError:  # nothing yet, or rows that do not fit together
        return pd.DataFrame()


def check_metric(search: Search, log: pd.DataFrame, directory: Path) -> None:
    """Stops the search as soon as a trial shows that its metric will not come: no column, or a blank."""
    must_log(search, log.columns, directory)
    epoch = search.check_every if 0 < search.check_every < len(log) else len(log)
    row = log.iloc[epoch - 1]
    due = epoch == search.check_every or epoch in search.rungs
    healthy = math.isfinite(row.get("loss", 0)) and math.isfinite(row.get("feature_std", 0))
    if due and healthy and math.isnan(row[search.metric]):
        why = f"are there labels in val (see {directory}.log), and does --knn-every check that epoch?"
        raise ConfigError(f"{directory}: {search.metric} is blank in epoch {epoch}: {why}")


def must_log(search: Search, names: Iterable[str], directory: Path) -> None:
    if search.metric not in names:
        near = nearest(search.metric, names)
        raise ConfigError(f"{directory} logs no {search.metric} (--metric); the nearest is {near}")


def collapsed_below(directory: Path) -> dict[str, float]:
    """The script's thresholds, {column of log.csv: value}, from its config.yaml; none where it names none."""
    return config_of(directory).get("collapsed_below") or {}


def config_of(directory: Path) -> dict:
    """What the script's config.yaml says; nothing where there is none."""
    path = directory / "config.yaml"
    return read_yaml(path) if path.exists() else {}


def collapse(log: pd.DataFrame, least: dict[str, float]) -> tuple[int, str]:
    """(epoch, reason) of the first epoch whose loss is not finite or whose features collapsed, or (0, "")."""
    for epoch, row in enumerate(log.to_dict("records"), 1):
        broken = [] if math.isfinite(row.get("loss", 0)) else ["loss"]
        broken += [name for name, value in least.items() if not row.get(name, value) >= value]  # blank too
        if broken:
            return epoch, f"{broken[0]} is {row[broken[0]]:.3g} in epoch {epoch}"
    return 0, ""


def reached(search: Search, log: pd.DataFrame) -> dict:
    """What a run past its budget had come to: its last checked epoch."""
    row = {"epochs": len(log), "status": "over budget", "reason": f"past {search.budget / 60:g} minutes"}
    checked = log.dropna(subset=[search.metric]) if search.metric in log else log[:0]
    if len(checked):
        row |= {name: float(checked.iloc[-1].get(name, math.nan)) for name in search.columns}
        row["epochs"] = int(checked.index[-1]) + 1
    return row


def failure(directory: Path, code: int, said: int) -> str:
    """Why a run failed: its last lines, without the `said` bytes of earlier tries."""
    if code < 0:
        return f"killed by signal {-code}"
    output = Path(f"{directory}.log").read_bytes()[said:].decode(errors="replace")
    return f"exit code {code}: {last_lines(output, 3)}"


def numbers(search: Search, directory: Path, rung: int) -> pd.Series:
    """Every metric's value at the rung: log.csv's row, or the means of summary.csv's val rows (over init,
    mode and ratio)."""
    if search.resumes:
        return read_log(directory, rung).iloc[rung - 1]
    if (directory / "summary.csv").exists():
        table = pd.read_csv(directory / "summary.csv")
        means = table[table["split"] == "val"].groupby("metric")["mean"].mean()
    elif not (directory / "results.csv").exists():
        raise OSError("there is no summary.csv, and log.csv is read of scripts that have --stop-epoch")
    else:
        table = pd.read_csv(directory / "results.csv", dtype={"class": str})
        means = best_epoch(table[(table["split"] == "val") & (table["class"] == "all")])
    return means


def best_epoch(table: pd.DataFrame) -> pd.Series:
    """Of a script without summary.csv: each metric's mean over all cells, at their best common epoch."""
    means = table.groupby(["metric", "epoch"])["value"].mean().unstack()
    return pd.Series({name: sign_of(name) * (sign_of(name) * row).max() for name, row in means.iterrows()})


# The leaderboard


def collect(search: Search, results: dict) -> None:
    """Adds what earlier runs and other ranks have finished: one small file a run, written once."""
    for path in sorted((search.out / "trials").glob("*.json")):
        match = RESULT.fullmatch(path.stem)
        if match:
            run = Run(int(match[1]), int(match[2] or 0), int(match[3]))
            row = None if run in results else read_row(search, path)
            if row:
                results[run] = row


def read_row(search: Search, path: Path) -> dict | None:
    """A finished run's row, or None where the file is damaged."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        measured = [float(row[name]) for name in (*search.columns, "epochs", "seconds", "total_seconds")]
        whole = row["status"] != "done" or math.isfinite(measured[0])
        return row if whole and isinstance(row["reason"], str) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def sign_of(metric: str) -> int:
    """1 where more is better, -1 where less is."""
    return -1 if MINIMISED.search(metric) else 1


def trial_rows(search: Search, results: dict) -> list[dict]:
    """A row a trial and rung of which all seeds have ended: their means, and the worst status among them."""
    rows = []
    for trial, rung in sorted({(run.trial, run.rung) for run in results}):
        runs = [results.get(Run(trial, seed, rung)) for seed in range(search.seeds)]
        if trial < len(search.trials) and rung in search.rungs and all(runs):
            rows.append(runs[0] if search.seeds == 1 else mean_row(search, runs))
    return [{name: value for name, value in row.items() if name != "seed"} for row in rows]


def mean_row(search: Search, runs: list[dict]) -> dict:
    order = ("failed", "collapsed", "over budget", "done")
    worst = min(runs, key=lambda row: order.index(row["status"]))
    table = pd.DataFrame(runs)
    means = table[[*search.columns, "seconds", "total_seconds"]].mean(skipna=False)
    spread = {f"{search.metric}_std": float(table[search.metric].std()), "seeds": len(runs)}
    return worst | means.to_dict() | spread | {"epochs": int(table["epochs"].min())}


def ranked(search: Search, rows: list[dict]) -> list[dict]:
    """Rows with a rank, the last rung's first, then best first; ties go to the lower trial number."""
    good = [row for row in rows if row["status"] == "done"]
    sign = sign_of(search.metric)
    return sorted(good, key=lambda row: (-row["rung"], -sign * row[search.metric], row["trial"]))


def promote(search: Search, entrants: list[int], rung: int, results: dict) -> list[int]:
    """The best 1/eta of the rung's entrants, at least one, in trial order; none after the last rung."""
    if rung == search.rungs[-1]:
        return []
    rows = [row for row in trial_rows(search, results) if row["rung"] == rung and row["trial"] in entrants]
    best = ranked(search, rows)[: max(1, len(entrants) // search.eta)]
    return sorted(row["trial"] for row in best)


def leaderboard(search: Search, results: dict) -> pd.DataFrame:
    """A row a trial and rung, best first; rank and rank_loss count from 1 within a rung."""
    rows = trial_rows(search, results)
    good = ranked(search, rows)
    rest = [row for row in rows if row["status"] != "done"]
    ranks = {"rank": search.metric} | {f"rank_{name}": name for name in search.columns[1:]}
    head = {"trial": 0, "rung": 0, **dict.fromkeys(ranks)}  # sets the order of the columns
    table = pd.DataFrame([head | search.trials[row["trial"]] | row for row in good + rest])
    if table.empty:
        return table
    for name in search.trials[0]:  # as they are: a column of floats would change whole numbers
        table[name] = pd.Series([search.trials[trial][name] for trial in table["trial"]], dtype=object)
    for column, name in ranks.items():
        places = table[: len(good)].groupby("rung")[name].rank(method="min", ascending=sign_of(name) < 0)
        table[column] = places.reindex(table.index).astype("Int64")
    went_on = table.groupby("trial")["rung"].transform("max") > table["rung"]
    table.loc[went_on & (table["status"] == "done"), "status"] = "promoted"
    table.insert(table.columns.get_loc("status"), "front", front(search, table))
    return table


def front(search: Search, table: pd.DataFrame) -> pd.Series:
    """True where no other row is both better and cheaper in seconds over all rungs."""
    quality = sign_of(search.metric) * table[search.metric].astype(float)
    order = pd.DataFrame({"seconds": table["total_seconds"], "worse": -quality}).dropna()
    best = quality[order.sort_values(["seconds", "worse"]).index].cummax()
    on = best[~best.duplicated()].index  # where the best so far has just risen
    return table.index.to_series().isin(on)


def write_tables(search: Search, results: dict) -> None:
    """trials.csv, and best.yaml: the winner's resolved flags but for those of this machine."""
    write(search.out / "trials.csv", leaderboard(search, results).to_csv(index=False))
    for best in ranked(search, trial_rows(search, results))[:1]:
        run = Run(best["trial"], 0, best["rung"])
        config = config_of(search.directory(run))
        given = {word.split("=")[0] for word in search.fixed}
        chosen = {name for name in CHOSEN & set(search.options) if search.options[name] not in given}
        names = set(search.options) - MACHINE - chosen
        flags = {name: value for name, value in config.items() if name in names and value is not None}
        value = f"{search.metric} {best[search.metric]:.4f} after {best['rung']} epochs"
        place = f"--config {search.out / 'best.yaml'} --out {search.out / 'best'}"
        header = f"# python {search.script.name} {place}\n"
        header += f"# trial {run.trial} of {len(search.trials)}: {value}\n"
        budget = [f"{name} {flags[name]}" for name in BUDGET if name in flags]
        if budget:
            header += f"# the search's own, for a long run to overrule: {', '.join(budget)}\n"
        text = yaml.safe_dump(search.trials[run.trial] | flags, sort_keys=False, allow_unicode=True)
        write(search.out / "best.yaml", header + text)


# Progress and report


class Progress:
    """A line when a run begins and when it ends; on a terminal, one below them that is written over."""

    def __init__(self, search: Search, results: dict, seconds: float | None):
        self.search, self.results, self.seconds = search, results, seconds
        self.live = sys.stderr.isatty() and RANK == 0
        self.status = ""

    def began(self, job: Job) -> None:
        flags = " ".join(words(self.search.trials[job.run.trial], self.search.options))
        name = self.search.name(job.run)
        self.line(f"trial {name} to epoch {job.run.rung}: {flags} (see {self.search.directory(job.run)}.log)")

    def ended(self, row: dict) -> None:
        search, run = self.search, Run(row["trial"], row["seed"], row["rung"])
        value = f"{search.metric} {row[search.metric]:.4f}"
        text = f"trial {search.name(run)} at epoch {row['epochs']}: {value}, {row['seconds']:.0f} s"
        if row["status"] != "done":
            text += f", {row['status']}: {row['reason']}"
        for best in ranked(search, trial_rows(search, self.results))[:1]:
            text += f"; best {best[search.metric]:.4f} (trial {best['trial']:03d})"
        self.line(f"{text}; {time_left(search, self.results, self.seconds)}")

    def show(self, jobs: Iterable[Job]) -> None:
        running = [f"{self.search.name(job.run)} (epoch {job.epochs} of {job.run.rung})" for job in jobs]
        seconds = max((time.time() - job.began for job in jobs), default=0)
        text = f"training {', '.join(running)}, {seconds:.0f} s" if running else ""
        self.write(text[: shutil.get_terminal_size().columns - 1])

    def line(self, text: str) -> None:
        self.write("")
        print(text, file=sys.stderr, flush=True)

    def write(self, status: str) -> None:
        if self.live and status != self.status:
            print("\r" + " " * len(self.status) + "\r" + status, end="", file=sys.stderr, flush=True)
            self.status = status


def time_left(search: Search, results: dict, given: float | None = None) -> str:
    """From measured seconds an epoch, process start included, or the given ones; as if no trial collapsed."""
    new = {rung: epochs for rung, _, epochs in search.plan()}
    done = [row for row in results.values() if row["status"] == "done" and row["rung"] in new]
    if not done and not given:
        return "time unknown until a trial has ended (or give --seconds-per-epoch)"
    seconds = given or sum(row["seconds"] for row in done) / sum(new[row["rung"]] for row in done)
    ended = [run.rung for run in results]
    left = sum(max(0, n * search.seeds - ended.count(rung)) * epochs for rung, n, epochs in search.plan())
    left *= seconds / (search.workers * WORLD)
    shown = f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.1f} min"
    return f"{shown} left at {seconds:.3g} s an epoch"


def report(search: Search, results: dict) -> int:
    """Says and writes what the search has found; returns how many trials failed."""
    write_tables(search, results)  # again: another rank's last rung may have come before the promotions to it
    table = leaderboard(search, results)
    flags = {name: str for name in search.trials[0]}
    top = table.head(12).drop(columns="reason")
    print(top.to_string(index=False, float_format=lambda x: f"{x:.4g}", formatters=flags))
    compare_rankings(search, table)
    for _, row in table[table["reason"] != ""].head(5).iterrows():
        print(f"trial {row['trial']} {row['status']}: {row['reason']}")
    say_if_few(search, results)
    good = table[table["rank"].notna()]
    if good.empty:
        raise SystemExit(f"error: no trial ended with a {search.metric}; see {search.out / 'trials.csv'}")
    shares = flag_importance(search, good)
    draw_picture(search, table, shares)
    print(f"see trials.csv, best.yaml and search.png in {search.out}", flush=True)
    return int((table["status"] == "failed").sum())


def say_if_few(search: Search, results: dict) -> None:
    """That the metric is of few val images, where the script's config.yaml says so (`val_images`)."""
    counts = [config_of(search.directory(run)).get("val_images") for run in results]
    known = [count for count in counts if type(count) is int and count > 0 and search.metric != "loss"]
    if known and min(known) < FEW:
        print(f"val has {min(known)} images, which are few: trials that lie close differ by luck")


def compare_rankings(search: Search, table: pd.DataFrame) -> None:
    """How far the metric and the second column agree at each rung."""
    for rung, rows in table[table["rank"].notna()].dropna(subset=search.columns).groupby("rung"):
        ranks = {name: rows[name].rank(ascending=sign_of(name) < 0) for name in search.columns}
        chosen = [rows.loc[rank.idxmin()] for rank in ranks.values()]
        said = [
            f"{name} chooses trial {row['trial']} ({search.metric} {row[search.metric]:.4f})"
            for name, row in zip(ranks, chosen)
        ]
        print(f"epoch {rung}, {len(rows)} trials: {', '.join(said)}")
        if len(rows) > 2 and len(ranks) > 1:
            print(f"  Spearman correlation of the two rankings: {pd.DataFrame(ranks).corr().iloc[0, 1]:.2f}")


def flag_importance(search: Search, table: pd.DataFrame) -> pd.DataFrame:
    """importance.csv: how much worse a random forest predicts trials that it has not seen when one flag's
    values are shuffled, as a share of the metric's variance; mean and std over 20 splits of the trials."""
    rung = table["rung"].mode().min()  # where most trials ended
    rows = table[table["rung"] == rung]
    x = pd.DataFrame({name: as_numbers(rows[name]) for name in search.trials[0]}).to_numpy()
    y = rows[search.metric].astype(float).to_numpy()
    if len(y) < 8 or y.std() == 0:
        print(f"no importance of the flags: it takes 8 trials that differ; {len(y)} ended at epoch {rung}")
        return pd.DataFrame()
    try:
        from sklearn.ensemble import RandomForestRegressor
        from sklearn.inspection import permutation_importance
        from sklearn.model_selection import ShuffleSplit
    except ImportError:
        print("no importance of the flags: scikit-learn is not installed")
        return pd.DataFrame()
    shares, explained = [], []
    for train, test in ShuffleSplit(20, test_size=1 / 3, random_state=0).split(x):
        forest = RandomForestRegressor(30, random_state=0).fit(x[train], y[train])
        error = "neg_mean_squared_error"
        found = permutation_importance(forest, x[test], y[test], scoring=error, n_repeats=3, random_state=0)
        shares.append(found.importances_mean / y.var())
        explained.append(1 - ((forest.predict(x[test]) - y[test]) ** 2).mean() / y.var())
    shares = pd.DataFrame(shares, columns=list(search.trials[0]))
    out = pd.DataFrame({"importance": shares.mean(), "std": shares.std()}).rename_axis("flag").reset_index()
    out = out.sort_values("importance", ascending=False)
    out = out.assign(epoch=rung, trials=len(y), explained=sum(explained) / len(explained))
    write(search.out / "importance.csv", out.to_csv(index=False))
    said = [f"{row.flag} {row.importance:.2f} (+-{row.std:.2f})" for row in out.itertuples(index=False)]
    print(f"importance at epoch {rung}, {len(y)} trials: {', '.join(said)}")
    if out["explained"].iloc[0] <= 0:
        print("  but the forest predicts no trial that it has not seen: too few trials, or no flag matters")
    return out


def as_numbers(values: pd.Series) -> pd.Series:
    """A column for the forest and the picture: numbers as they are, others by their alphabetical place."""
    found = pd.to_numeric(values.astype(str), errors="coerce")
    if found.isna().any():
        return values.astype(str).astype("category").cat.codes.astype(float)
    return found.astype(float)


def draw_picture(search: Search, table: pd.DataFrame, shares: pd.DataFrame) -> None:
    """search.png: the metric against each flag, a colour a rung; below, curves, importance and the front."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # a $ in a value is a $
    names = list(search.trials[0])
    columns = max(3, len(names))
    size = (3.2 * columns, 6)
    figure, axes = plt.subplots(2, columns, figsize=size, layout="constrained", squeeze=False)
    good = table[table["rank"].notna()]
    for axis, name in zip(axes[0], names):
        draw_flag(axis, search, good, name)
    draw_curves(axes[1, 0], search, good)
    draw_importance(axes[1, 1], shares)
    draw_front(axes[1, 2], search, table)
    for axis in [*axes[0, len(names) :], *axes[1, 3:]]:
        axis.set_axis_off()
    for axis in (axes[0, 0], axes[1, 0], axes[1, 2]):
        axis.set_ylabel(search.metric.replace("_", " "))
    axes[0, 0].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write(search.out / "search.png", picture.getvalue())
    plt.close(figure)


def draw_flag(axis: Axes, search: Search, table: pd.DataFrame, name: str) -> None:
    values = as_numbers(table[name])
    for rung, rows in table.groupby("rung"):
        axis.plot(values[rows.index], rows[search.metric], "o", alpha=0.7, label=f"epoch {rung}")
    texts = table[name].astype(str)
    numeric = pd.to_numeric(texts, errors="coerce").notna().all()
    if numeric and 0 < 20 * values.min() < values.max():
        axis.set_xscale("log")
    if numeric and values.nunique() > 4:
        axis.xaxis.set_major_formatter("{x:g}")
    else:
        places = values.drop_duplicates()
        axis.set_xticks(places, texts[places.index])
    axis.minorticks_off()
    axis.set_xlabel(name.replace("_", " "))


def draw_curves(axis: Axes, search: Search, table: pd.DataFrame) -> None:
    for _, rows in table.sort_values("rung").groupby("trial"):
        colour = None if search.rungs[-1] in set(rows["rung"]) else "0.75"
        axis.plot(rows["rung"], rows[search.metric], "o-", color=colour)
    axis.set(xlabel="epoch", xticks=search.rungs)


def draw_importance(axis: Axes, shares: pd.DataFrame) -> None:
    if shares.empty:
        axis.set_axis_off()
        return
    flags = shares[::-1]
    axis.barh(flags["flag"].str.replace("_", " "), flags["importance"], xerr=flags["std"])
    axis.set_xlabel("importance, share of the variance")


def draw_front(axis: Axes, search: Search, table: pd.DataFrame) -> None:
    axis.plot(table["total_seconds"], table[search.metric], "o", color="0.75")
    rows = table[table["front"]].sort_values("total_seconds")
    axis.plot(rows["total_seconds"], rows[search.metric], "o-", drawstyle="steps-post", label="front")
    axis.set(xlabel="seconds of training")
    axis.legend()


# What a script that is copied alone has to bring along


class ConfigError(ValueError):
    """Flags, YAML or a directory that do not go together."""


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the docstring as it is written, and defaults where there is one."""

    def _get_help_string(self, action):
        if isinstance(action.default, Path) and action.default.is_absolute():
            return f"{action.help} (default: {action.default.name})"
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, doc: str):
        head, rest = doc.split("\n", 1)
        usage = "%(prog)s --grid FILE [options] [the script's flags]"
        options = {"formatter_class": Formatter, "allow_abbrev": False}
        super().__init__(usage=usage, description=head, epilog=rest, **options)

    def error(self, message: str) -> None:
        raise ConfigError(message)


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """argparse type: a finite int or float of at least `low` and at most `high`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number")
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text} must be at most {high}")
        return value

    return convert


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what the user can mend into one line and exit code 2; prints in any terminal's encoding."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ConfigError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        if RANK > 0:
            time.sleep(3)  # rank 0 says the same first, and torchrun then ends the others
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def cores() -> int:
    """CPU cores that this process may use: SLURM and taskset leave fewer than the machine has, and so do
    containers."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


class FlagLoader(yaml.SafeLoader):
    """YAML as a command line has it: 010, 0x10, 32:48, 1_0 and dates, which YAML 1.1 reads as 8, 16, 1968,
    10 and dates, stay text, and a key that stands twice is refused. As in common.py, which this file, copied
    alone, does not have."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [str(key.value).replace("-", "_") for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} stands twice")
        return super().construct_mapping(node, deep)


NUMBER = "tag:yaml.org,2002:int"
POINT = "tag:yaml.org,2002:float"
ODD = {NUMBER, POINT, "tag:yaml.org,2002:timestamp"}
FlagLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ODD]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
DECIMAL = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
FlagLoader.add_implicit_resolver(NUMBER, WHOLE, list("-+0123456789"))
FlagLoader.add_implicit_resolver(POINT, DECIMAL, list("-+0123456789."))


def read_yaml(path: Path) -> dict:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), FlagLoader)
    except RecursionError:
        raise ConfigError(f"{path}: not readable as YAML: nested too deep") from None
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:  # of !!bool x, !!timestamp x too
        raise ConfigError(f"{path}: not readable as YAML: {last_lines(str(error), 9)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold names and values")
    return content


def write(path: Path, content: str | bytes) -> None:
    """Whole or not at all; never in the place of a folder, a device or a pipe."""
    if (path.exists() and not path.is_file()) or str(path.absolute().parent) in ("/dev", "/dev/fd"):
        raise ConfigError(f"{path} is a folder or a device: name a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say where
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"{path}: {error.strerror}") from None


def last_lines(text: str, count: int) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    return " | ".join([line for line in lines if line][-count:])


def nearest(name: str, names: Iterable[str]) -> str:
    return (difflib.get_close_matches(name, list(names), 1, 0) or ["none"])[0]


if __name__ == "__main__":
    with one_line_errors():
        main()

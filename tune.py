"""Grid, random and successive-halving search over the flags of a script; every trial is a subprocess.

    python tune.py --method barlow --data ../data/eurosat --size 64 --grid yaml/tune_ssl.yaml --out runs/tune/barlow
    python tune.py --script transfer.py --data ../data/land --grid yaml/tune_transfer.yaml --out runs/tune/fractions
    torchrun --nproc_per_node=4 tune.py ...    # trials shared over the ranks; over machines, --out is a shared folder

Flags that --help does not list go to the script unchanged. The YAML names the script's flags: `lr: [1e-3, 1e-2]` is a
grid, `subset: 0.4` is fixed; a single `{log_uniform: [1e-4, 1e-1]}`, `{uniform: [a, b]}` or `{choice: [a, b]}` makes it
a random search of --trials draws. It may set trials, eta, min_epochs, max_epochs and metric too; the command line wins.

Synchronous successive halving (Jamieson and Talwalkar 2016): all trials train min-epochs, the best 1/eta of them eta
times as many in all, and so on up to max-epochs; equal numbers make a plain search. A promoted trial goes on from its
own checkpoint (--stop-epoch; the schedule is planned for max-epochs from the start), so the survivor equals an
uninterrupted run. A script without --stop-epoch, such as transfer.py, trains each rung afresh with --epochs RUNG.

The metric is read from log.csv's row at the rung, or is the mean of results.csv's val rows of class `all` (so tune one
init, mode and ratio at a time; several seeds are averaged). Less is better for loss, rmse, mae, error and seconds.
The script's own --seed, --workers or --trials, if it has them, are set in the YAML.

OUT/trials.csv is the leaderboard, OUT/best.yaml the winner for --config, OUT/search.png the picture; OUT/trials/ holds
the run directories. After any kill the same command goes on, and tries failed trials again. Several workers split the
CPU cores. Rounding depends on a trial's threads: for the same bits with any --workers, set OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

try:
    import fcntl
except ImportError:  # Windows: no locks; end orphaned trials by hand
    fcntl = None

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
OWN_FLAGS = {"out": "--out", "epochs": "--max-epochs", "stop_epoch": "--min-epochs and --max-epochs"}
GRID_SETTINGS = ("trials", "eta", "min_epochs", "max_epochs", "metric")
MINIMISED = re.compile("loss|rmse|mae|error|seconds")
COLLAPSED = {"feature_std": 0.02, "effective_rank": 2.0}  # train_ssl.py warns below these
DRAWS = {
    "list": lambda rng, values: rng.choice(values),
    "choice": lambda rng, values: rng.choice(values),
    "uniform": lambda rng, bounds: float(f"{rng.uniform(*map(float, bounds)):.3g}"),
    "log_uniform": lambda rng, bounds: float(
        f"{math.exp(rng.uniform(*(math.log(float(b)) for b in bounds))):.3g}"
    ),
}


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

    def __post_init__(self):
        self.resumes = "stop_epoch" in self.options
        self.columns = [self.metric]  # and the report's second ranking
        if self.resumes:
            self.columns += ["knn_macro_f1" if self.metric == "loss" else "loss"]

    def directory(self, trial: int, rung: int) -> Path:
        return self.out / "trials" / (f"{trial:03d}" if self.resumes else f"{trial:03d}-{rung}")

    def plan(self) -> list[tuple[int, int, int]]:
        """(rung, trials, epochs that each of them trains there) of every rung."""
        before = [0, *self.rungs[:-1]] if self.resumes else [0] * len(self.rungs)
        return [
            (rung, max(1, len(self.trials) // self.eta**i), rung - before[i])
            for i, rung in enumerate(self.rungs)
        ]


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        fail(f"{path}: {last_lines(str(error), 9)}")
    return content if isinstance(content, dict) else fail(f"{path} does not hold names and values")


def last_lines(text: str, count: int) -> str:
    return " | ".join([line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()][-count:])


def nearest(name: str, names: Iterable[str]) -> str:
    return (difflib.get_close_matches(name, list(names), 1, 0) or ["none"])[0]


def script_options(script: Path) -> dict[str, str]:
    """The script's flags as its --help lists them: {"batch_size": "--batch-size", ...}."""
    if not script.is_file():
        fail(f"--script {script}: no such file")
    command, env = [sys.executable, str(script), "--help"], os.environ | {"PYTHON_COLORS": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    if run.returncode:
        fail(f"{script} --help failed: {last_lines(run.stderr, 1)}")
    heads = [
        re.split(r"\s{2,}", line.strip())[0] for line in run.stdout.splitlines() if re.match(" {1,4}-", line)
    ]
    return {
        name.replace("-", "_"): f"--{name}"
        for head in heads
        for name in re.findall(r"--([A-Za-z][\w-]*)", head)
    }


def flag_name(name: str, options: dict[str, str], source: str) -> str:
    key = name.replace("-", "_")
    if key in OWN_FLAGS:
        fail(f"{source}: {name} is set by the tuner: use {OWN_FLAGS[key]}")
    if key not in options:
        fail(f"{source}: the script has no flag {name}; the nearest is {nearest(key, options)}")
    return key


def read_entry(name: str, entry, source: str) -> tuple[str, list]:
    """(how, values) of a grid entry: a list, {distribution: [...]}, or one fixed value."""
    if not isinstance(entry, (list, dict)):
        return "fixed", [entry]
    how, values = (
        ("list", entry) if isinstance(entry, list) else (", ".join(map(str, entry)), [*entry.values(), 0][0])
    )
    if how not in DRAWS:
        fail(f"{source}: {name}: {how or '{}'} is no distribution; the nearest is {nearest(how, DRAWS)}")
    try:
        DRAWS[how](random.Random(0), values if isinstance(values, list) else None)
    except (TypeError, ValueError, IndexError):
        fail(f"{source}: {name}: no value can be drawn from {how} {values}")
    return how, values


def draw_trials(entries: dict[str, tuple[str, list]], count: int | None, seed: int) -> list[dict]:
    """All combinations of lists or `count` of them; with a distribution among them, `count` independent draws."""
    rng = random.Random(seed)
    if drawn := [name for name, (how, _) in entries.items() if how != "list"]:
        if not count:
            fail(f"{drawn[0]} is drawn at random: say how many trials with --trials")
        return [
            {name: DRAWS[how](rng, values) for name, (how, values) in entries.items()} for _ in range(count)
        ]
    grid = [
        dict(zip(entries, point)) for point in itertools.product(*(values for _, values in entries.values()))
    ]
    return [grid[i] for i in sorted(rng.sample(range(len(grid)), min(count or len(grid), len(grid))))]


def rung_levels(low: int, high: int, eta: int) -> list[int]:
    """low, low * eta, ..., high."""
    return [*itertools.takewhile(lambda rung: rung < high, (low * eta**i for i in itertools.count())), high]


def words(flags: dict, options: dict[str, str]) -> list[str]:
    """{"lr": 0.1, "seeds": [1, 2], "compile": True} as --lr 0.1 --seeds 1 2 --compile; False as --no-NAME, if any."""
    out = []
    for name, value in flags.items():
        if isinstance(value, bool):
            name = name if value else f"no_{name}"
            out += [options[name]] if name in options else []
        elif value is not None:
            out += [options[name], *map(str, value if isinstance(value, list) else [value])]
    return out


def visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1")]
    listed = subprocess.run("nvidia-smi -L", shell=True, capture_output=True, text=True).stdout
    return [str(i) for i in range(len(re.findall("^GPU ", listed, re.MULTILINE)))]


def trial_environment(search: Search, slot: int) -> dict[str, str]:
    """A GPU of its own, an even share of the cores, and nothing of torchrun's: a trial is one process."""
    launcher = re.compile("TORCHELASTIC|MASTER_|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$")
    env = {name: value for name, value in os.environ.items() if not launcher.match(name)} | {
        "PYTHONUNBUFFERED": "1"
    }
    worker = int(os.environ.get("LOCAL_RANK", 0)) * search.workers + slot
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * search.workers
    if gpus := visible_gpus():
        env["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]
    if workers > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    return env


@dataclass
class Job:
    trial: int
    rung: int
    process: subprocess.Popen
    began: float


def start(search: Search, trial: int, rung: int, slot: int) -> Job:
    """Starts a trial, or goes on with it. Its processes hold a lock while one of them lives, so that no two write one
    run directory, and on Linux they end with the tuner, even by kill -9 (prctl's PR_SET_PDEATHSIG is 1)."""
    directory, last = search.directory(trial, rung), search.rungs[-1]
    budget = ["--epochs", str(last if search.resumes else rung), "--out", str(directory)]
    if search.resumes and rung < last:
        budget += ["--stop-epoch", str(rung)]
    command = [
        sys.executable,
        str(search.script),
        *search.fixed,
        *words(search.trials[trial], search.options),
        *budget,
    ]
    with open(f"{directory}.lock", "w") as lock, open(f"{directory}.log", "ab") as log:
        posix = {}
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for what an earlier tuner may have left running
            posix = {
                "pass_fds": [lock.fileno()],
                "start_new_session": True,
                "preexec_fn": LIBC and (lambda: LIBC.prctl(1, signal.SIGKILL)),
            }
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=trial_environment(search, slot),
            **posix,
        )
    return Job(trial, rung, process, time.time())


def stop(jobs: Iterable[Job]) -> None:
    """SIGTERM first, so that a script can save."""
    for job in jobs:
        job.process.terminate()
    for job in jobs:
        try:
            job.process.wait(30)
        except subprocess.TimeoutExpired:
            job.process.kill()


def read_log(directory: Path, rung: int) -> pd.DataFrame:
    """The first `rung` rows (epochs) of log.csv, without a last one that is still being written."""
    path = directory / "log.csv"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text = text[: text.rfind("\n") + 1]
    return pd.read_csv(io.StringIO(text), nrows=rung) if text else pd.DataFrame()


def collapse(log: pd.DataFrame) -> tuple[int, str]:
    """(epoch, reason) of the first epoch whose loss is not finite or whose features have collapsed, or (0, "")."""
    for epoch, row in enumerate(log.to_dict("records"), 1):
        broken = ["loss"] if not math.isfinite(row.get("loss", 0)) else []
        for name in broken + [name for name, least in COLLAPSED.items() if row.get(name, least) < least]:
            return epoch, f"{name} is {row[name]:.3g} in epoch {epoch}"
    return 0, ""


def numbers(search: Search, directory: Path, rung: int) -> pd.Series:
    """Every metric's value at the rung: log.csv's row, or the means of results.csv over the trial's cells."""
    if search.resumes:
        return read_log(directory, rung).iloc[rung - 1]
    table = pd.read_csv(directory / "results.csv", dtype={"class": str})
    table = table[(table["split"] == "val") & (table["class"] == "all")]
    cells = [name for name in ("metric", "init", "mode", "ratio", "seed") if name in table]
    if not table.duplicated(cells).any():
        return table.groupby("metric")["value"].mean()
    means = table.groupby(["metric", "epoch"])[
        "value"
    ].mean()  # every epoch is there: the best for all cells together
    return pd.Series(
        {name: v.min() if MINIMISED.search(name) else v.max() for name, v in means.groupby("metric")}
    )


def must_log(search: Search, names: Iterable[str], directory: Path) -> None:
    if search.metric not in names:
        fail(
            f"{directory} logs no {search.metric} (--metric); the nearest is {nearest(search.metric, names)}"
        )


def judge(search: Search, job: Job) -> dict | None:
    """The trial's row at this rung, or None while it runs. Collapse ends a trial, unless the loss is the metric."""
    code, directory = job.process.poll(), search.directory(job.trial, job.rung)
    log = read_log(directory, job.rung) if search.resumes else pd.DataFrame()
    epoch, reason = collapse(log)
    row = {
        "trial": job.trial,
        "rung": job.rung,
        **dict.fromkeys(search.columns, math.nan),
        "epochs": job.rung,
        "seconds": round(time.time() - job.began, 1),
        "status": "done",
        "reason": reason,
    }
    if len(log):
        must_log(search, list(log), directory)
    if epoch and (search.metric != "loss" or reason.startswith("loss")):
        job.process.kill()
        job.process.wait()
        return row | {"epochs": epoch, "status": "collapsed"}
    if code is None:
        return None
    if code:
        output = Path(f"{directory}.log").read_text(encoding="utf-8", errors="replace")
        reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}: {last_lines(output, 3)}"
        status = (
            "collapsed" if "not finite" in reason else "failed"
        )  # train_ssl.py stops at such a loss by itself
        return row | {"epochs": len(log), "status": status, "reason": reason}
    try:
        found = numbers(search, directory, job.rung)
    except (OSError, IndexError, KeyError, ValueError) as error:
        return row | {"status": "failed", "reason": f"ended without numbers for epoch {job.rung}: {error}"}
    must_log(search, list(found.index), directory)
    row |= {name: float(found.get(name, math.nan)) for name in search.columns}
    if not math.isfinite(row[search.metric]):
        return row | {
            "status": "failed",
            "reason": f"no {search.metric} at epoch {job.rung}: labels? --knn-every?",
        }
    return row


def collect(search: Search, results: dict) -> None:
    """Adds what earlier runs and other ranks have finished: one small file a trial and rung, written once."""
    for path in sorted((search.out / "trials").glob("*.json")):
        trial, rung = map(int, path.stem.split("-"))
        if (trial, rung) not in results:
            results[trial, rung] = json.loads(path.read_text())


def draw_next(entrants: list[int], rung: int, results: dict, store) -> Iterator[int]:
    """The trials that this process runs: all, or under torchrun the next one that no rank has drawn."""
    draws = itertools.count() if store is None else iter(lambda: store.add(f"rung{rung}", 1) - 1, None)
    for i in itertools.takewhile(lambda i: i < len(entrants), draws):
        if (entrants[i], rung) not in results:
            yield entrants[i]


def run_rung(search: Search, entrants: list[int], rung: int, results: dict, store) -> None:
    """Trains every entrant to epoch `rung`; returns when all ranks have finished theirs."""
    todo, running, killed, line = draw_next(entrants, rung, results, store), {}, set(), ""
    try:
        while any((trial, rung) not in results for trial in entrants):
            for slot in set(range(search.workers)) - set(running):
                if (trial := next(todo, None)) is not None:
                    running[slot] = start(search, trial, rung, slot)
            line, known = show_progress(search, entrants, rung, results, line), len(results)
            time.sleep(0.1 if running else 1)
            for slot, job in list(running.items()):
                if (row := judge(search, job)) is None:
                    continue
                del running[slot]
                if row["reason"].startswith("killed") and job.trial not in killed:  # by the system: once more
                    killed.add(job.trial)
                    running[slot] = start(search, job.trial, rung, slot)
                    continue
                results[job.trial, rung] = row
                write(search.out / "trials" / f"{job.trial:03d}-{rung}.json", json.dumps(row))
            if WORLD > 1:
                collect(search, results)
            if len(results) > known and RANK == 0:
                write_tables(search, results)
        show_progress(search, entrants, rung, results, line)
    finally:
        stop(running.values())


def ranked(search: Search, results: dict) -> list[dict]:
    """Rows with a number, the last rung's first, then best first; ties go to the lower trial number."""
    sign = 1 if MINIMISED.search(search.metric) else -1
    good = [row for row in results.values() if row["status"] in ("done", "promoted")]
    return sorted(good, key=lambda row: (-row["rung"], sign * row[search.metric], row["trial"]))


def promote(search: Search, entrants: list[int], rung: int, results: dict) -> list[int]:
    """The best 1/eta of the rung's entrants, at least one, in trial order."""
    best = ranked(search, {trial: results[trial, rung] for trial in entrants})[
        : max(1, len(entrants) // search.eta)
    ]
    for row in best:
        row["status"] = "promoted"
    return sorted(row["trial"] for row in best)


def leaderboard(search: Search, results: dict) -> pd.DataFrame:
    """A row a trial and rung, best first; rank and rank_loss count from 1 within a rung."""
    good = ranked(search, results)
    bad = [row for _, row in sorted(results.items()) if row["status"] in ("collapsed", "failed")]
    ranks = {"rank": search.metric} | {f"rank_{name}": name for name in search.columns[1:]}
    head = {"trial": 0, "rung": 0, **dict.fromkeys(ranks)}  # sets the order of the columns
    table = pd.DataFrame([head | search.trials[row["trial"]] | row for row in good + bad])
    for column, name in ranks.items():
        places = (
            table[: len(good)]
            .groupby("rung")[name]
            .rank(method="min", ascending=bool(MINIMISED.search(name)))
        )
        table[column] = places.reindex(table.index).astype("Int64")
    return table


def write_tables(search: Search, results: dict) -> None:
    """trials.csv, and best.yaml: the winner's resolved flags but for those of this machine."""
    write(search.out / "trials.csv", leaderboard(search, results).to_csv(index=False))
    for best in ranked(search, results)[:1]:
        path = search.directory(best["trial"], best["rung"]) / "config.yaml"
        config = read_yaml(path) if path.exists() else {}
        names = set(search.options) - {"out", "stop_epoch", "config", "help", "device", "workers", "cache"}
        flags = {name: value for name, value in config.items() if name in names and value is not None}
        header = (
            f"# python {search.script.name} --config {search.out / 'best.yaml'}\n# trial {best['trial']} of "
            f"{len(search.trials)}: {search.metric} {best[search.metric]:.4f} after {best['rung']} epochs\n"
        )
        write(
            search.out / "best.yaml",
            header + yaml.safe_dump(search.trials[best["trial"]] | flags, sort_keys=False),
        )


def time_left(search: Search, results: dict, given: float | None = None) -> str:
    """From the measured seconds an epoch, process start included, or the given ones; as if no trial will collapse."""
    plan, rows, ended = search.plan(), ranked(search, results), [rung for _, rung in results]
    if not rows and not given:
        return "time unknown until a trial has ended (or give --seconds-per-epoch)"
    new = {rung: epochs for rung, _, epochs in plan}
    seconds = given or sum(row["seconds"] for row in rows) / sum(new[row["rung"]] for row in rows)
    left = sum(max(0, count - ended.count(rung)) * new for rung, count, new in plan)
    left *= seconds / (search.workers * WORLD)
    return (
        f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.1f} min"
    ) + f" left at {seconds:.3g} s an epoch"


def show_progress(search: Search, entrants: list[int], rung: int, results: dict, previous: str) -> str:
    """One line, overwritten on a terminal; elsewhere a line at each change."""
    done, promoted = (
        sum((trial, rung) in results for trial in entrants),
        "promoted " * (rung > search.rungs[0]),
    )
    line = f"epoch {rung}: {done} of {len(entrants)} {promoted}trials done, "
    line += f"{min(len(entrants) - done, search.workers * WORLD)} running, {time_left(search, results)}"
    for best in ranked(search, results)[:1]:
        line += f", best {search.metric} {best[search.metric]:.4f} (trial {best['trial']})"
    if RANK == 0 and line != previous:
        begin, end = ("\r", "\n" if done == len(entrants) else "") if sys.stderr.isatty() else ("", "\n")
        print(begin + line.ljust(len(previous)), end=end, file=sys.stderr, flush=True)
    return line


def report(search: Search, results: dict) -> None:
    """The top of the leaderboard, how far the two rankings agree at each rung, what broke, and the picture."""
    table = leaderboard(search, results)
    print(table.head(12).drop(columns="reason").to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    for rung, rows in table.dropna(subset=search.columns).groupby("rung"):
        ranks = {name: rows[name].rank(ascending=bool(MINIMISED.search(name))) for name in search.columns}
        best = [(name, rows.loc[rank.idxmin()]) for name, rank in ranks.items()]
        print(
            f"epoch {rung}, {len(rows)} trials: "
            + ", ".join(
                f"{name} chooses trial {row['trial']} ({search.metric} {row[search.metric]:.4f})"
                for name, row in best
            )
        )
        if len(rows) > 2 and len(ranks) > 1:
            print(f"  Spearman correlation of the two rankings: {pd.DataFrame(ranks).corr().iloc[0, 1]:.2f}")
    for _, row in table[table["reason"] != ""].head(5).iterrows():
        print(f"trial {row['trial']} {row['status']}: {row['reason']}")
    if not ranked(search, results):
        sys.exit(f"error: no trial ended with a {search.metric}; see {search.out / 'trials.csv'}")
    draw_picture(search, table[table["rank"].notna()])
    print(f"see trials.csv, best.yaml and search.png in {search.out}")


def draw_picture(search: Search, table: pd.DataFrame) -> None:
    """search.png: the metric against each swept flag, a colour a rung, and the trials' curves over the rungs."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture: matplotlib is not installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(search.trials[0])
    figure, axes = plt.subplots(
        1, len(names) + 1, figsize=(3 * len(names) + 4, 3), sharey=True, layout="constrained"
    )
    for axis, name in zip(axes, names):
        values = pd.to_numeric(table[name].astype(str), errors="coerce")
        values = table[name].astype(str) if values.isna().any() else values
        for rung, rows in table.groupby("rung"):
            axis.plot(values[rows.index], rows[search.metric], "o", alpha=0.7, label=f"epoch {rung}")
        if values.dtype.kind in "if" and 0 < 20 * values.min() < values.max():
            axis.set_xscale("log")
        axis.set_xlabel(name)
    for _, rows in table.sort_values("rung").groupby("trial"):
        color = None if search.rungs[-1] in set(rows["rung"]) else "0.75"
        axes[-1].plot(rows["rung"], rows[search.metric], "o-", color=color)
    axes[-1].set(xlabel="epoch", xticks=search.rungs)
    axes[0].set_ylabel(search.metric)
    axes[0].legend()
    figure.savefig(search.out / "search.png", dpi=150)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s [options] [script's flags]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error, add = fail, parser.add_argument
    add("--grid", type=Path, required=True, help="YAML of the flags to sweep")
    add("--out", type=Path, default=Path("runs/tune"), help="where everything is written")
    add("--script", type=Path, default=Path(__file__).with_name("train_ssl.py"), help="the script to run")
    add("--trials", type=int, help="how many to draw; a grid without it is run whole")
    add("--seed", type=int, default=0, help="of the draws; the trials keep the script's own")
    add("--eta", type=int, default=3, help="one in eta trials is promoted")
    add("--min-epochs", type=int, default=1, help="the first rung")
    add("--max-epochs", type=int, default=9, help="the last rung, and what the schedule is planned for")
    add("--workers", type=int, help="trials at a time: one a GPU, or one; under torchrun one a rank")
    add("--metric", help="column of log.csv or metric of results.csv: knn_macro_f1, or rmse")
    add("--seconds-per-epoch", type=float, help="for the estimated time, in place of measured ones")
    add("--dry-run", action="store_true", help="print the plan and the estimated time, and stop")
    add("--plan-to", type=Path, metavar="FILE", help="write the plan as YAML: epochs, trials and rungs")
    return parser


def build_search(args: argparse.Namespace, passed: list[str], grid: dict) -> Search:
    options, source = script_options(args.script), str(args.grid)
    given = {
        flag_name(word[2:].split("=")[0], options, "command line") for word in passed if word.startswith("--")
    }
    entries = {
        flag_name(str(name), options, source): read_entry(name, entry, source) for name, entry in grid.items()
    }
    swept = {name: entry for name, entry in entries.items() if entry[0] != "fixed"}
    fixed = {
        name: values[0] for name, (how, values) in entries.items() if how == "fixed" and name not in given
    }
    if not swept:
        fail(f"{source} sweeps nothing: give a flag a list of values")
    if twice := sorted(given & set(swept)):
        fail(
            f"{options[twice[0]]} is swept by {source} and also given on the command line: remove one of them"
        )
    rungs = rung_levels(args.min_epochs, args.max_epochs, args.eta)
    if "knn_every" in options and "knn_every" not in given | set(fixed):
        fixed["knn_every"] = math.gcd(*rungs)  # so that every rung has its check
    metric = args.metric or ("knn_macro_f1" if "stop_epoch" in options else "rmse")
    workers = args.workers or (1 if WORLD > 1 else max(1, len(visible_gpus())))
    trials, fixed = draw_trials(swept, args.trials, args.seed), words(fixed, options) + passed
    return Search(args.script, options, fixed, trials, rungs, args.eta, metric, args.out, workers)


def read_arguments() -> tuple[argparse.Namespace, Search]:
    parser = build_parser()
    grid = read_yaml(parser.parse_known_args()[0].grid)
    parser.set_defaults(**{name: str(grid.pop(name)) for name in GRID_SETTINGS if name in grid})
    args, passed = parser.parse_known_args()
    for name, low in {
        "min_epochs": 1,
        "max_epochs": args.min_epochs,
        "eta": 2,
        "trials": 1,
        "workers": 1,
    }.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be at least {low}")
    return args, build_search(args, passed, grid)


def show_plan(search: Search, results: dict, seconds: float | None) -> None:
    steps = [f"{count} trials to epoch {rung} ({new} epochs each)" for rung, count, new in search.plan()]
    total = sum(count * new for _, count, new in search.plan())
    print(
        f"{', '.join(steps)}: {total} epochs on {search.workers * WORLD} worker(s), ranked by {search.metric}; "
        + time_left(search, results, seconds),
        flush=True,
    )
    if search.metric == "loss":
        print(
            "warning: ranking by training loss rewards collapse and narrow heads; it is here to reproduce the paper",
            file=sys.stderr,
        )


def plan_file(search: Search) -> dict:
    """What --plan-to writes: the epochs that the search trains in all, its trials, and what each rung does."""
    rungs = [{"epoch": rung, "trials": count, "new_epochs": new} for rung, count, new in search.plan()]
    epochs = sum(rung["trials"] * rung["new_epochs"] for rung in rungs)
    return {"epochs": epochs, "trials": len(search.trials), "rungs": rungs}


def describe(search: Search) -> dict:
    """What makes two searches the same, for search.yaml."""
    trials = {f"trial {i}": trial for i, trial in enumerate(search.trials)}
    return {
        "script": search.script.name,
        "flags": " ".join(search.fixed),
        "metric": search.metric,
        "eta": search.eta,
        "rungs": search.rungs,
        **trials,
    }


def check_directory(search: Search) -> None:
    """Refuses the directory of another search, and one with other files."""
    path, ours = search.out / "search.yaml", describe(search)
    found = [name for name in os.listdir(search.out) if name[0] != "."] if search.out.is_dir() else []
    theirs = read_yaml(path) if path.exists() else {} if found else ours
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            fail(
                f"{search.out} holds another search: {name} is {theirs.get(name)} there and {ours.get(name)} here; "
                "choose another --out"
            )


def prepare(search: Search, results: dict):
    """Makes the directory, forgets failed trials so that they run again, and returns torchrun's store, if any."""
    store = None
    if WORLD > 1:
        from torch.distributed import rendezvous

        store = next(rendezvous("env://"))[0]
    if RANK == 0:
        try:
            search.out.mkdir(parents=True, exist_ok=True)
            write(search.out / "search.yaml", yaml.safe_dump(describe(search), sort_keys=False))
            (search.out / "trials").mkdir(exist_ok=True)
        except OSError as error:
            fail(f"--out {search.out}: {error.strerror}")
        for trial, rung in [key for key, row in results.items() if row["status"] == "failed"]:
            (search.out / "trials" / f"{trial:03d}-{rung}.json").unlink()
    if store:
        store.set("ready", "") if RANK == 0 else store.wait(["ready"])
    return store


def main() -> None:
    args, search = read_arguments()
    results = {}
    if RANK == 0:
        if not args.dry_run:
            check_directory(search)
            collect(search, results)
        show_plan(search, results, args.seconds_per_epoch)
        if args.plan_to:
            write(args.plan_to, yaml.safe_dump(plan_file(search), sort_keys=False))
    if args.dry_run:
        return
    for number in signal.valid_signals() & {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", 1)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    store, results, entrants = prepare(search, results), {}, list(range(len(search.trials)))
    collect(search, results)
    for rung in search.rungs:
        run_rung(search, entrants, rung, results, store)
        if rung == search.rungs[-1] or not (entrants := promote(search, entrants, rung, results)):
            break
    if store:
        store.add("ended", 1)
    if RANK == 0:
        write_tables(search, results)  # another rank's last rung may have come before the promotions to it
        report(search, results)
        while store and store.add("ended", 0) < WORLD:  # the store may live in this process
            time.sleep(0.2)


if __name__ == "__main__":
    main()

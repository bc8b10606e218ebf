"""Attack every script with random kills, flags, YAML, pictures, tables and epochs, and count what fails.

    python tests/soak.py                             # 20 minutes on two cores
    python tests/soak.py --minutes 3                 # the same attacks, fewer of them
    python tests/soak.py --seed 7 --only kills       # one part, with the same dice again

Every part runs in a process of its own, whose memory is limited, so that a crash counts as a failure and ends
nothing else. The table (part, attack, tries, failures) is printed and left in OUT/soak.csv, what failed in
OUT/failures.txt. Exit code 1: something failed.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny images; and a forked process must not wait for threads
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from conftest import picture  # noqa: E402
from odd_pictures import make_corpus  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402
from data import pixels  # noqa: E402
from data.check import check_files  # noqa: E402
from data.tables import load_table  # noqa: E402
from models import METHODS  # noqa: E402

SHARES = {"flags": 0.14, "trainings": 0.16, "pictures": 0.1, "tables": 0.06, "epochs": 0.14, "kills": 0.4}
COMMANDS = ["train_ssl", "transfer", "tune", "predict", "plot", "paper", "bench", "data.check"]
FULL = 20  # minutes, in which 2,000 pictures are tried and 500 epochs run
PATIENCE = 1800  # seconds after its end that a part may take for what it has begun
MEMORY = 6 << 30  # bytes of private memory of one process
Try = tuple[str, str]  # (kind of attack, what went wrong: '' where nothing did)


class Bout(NamedTuple):
    """What a part is given."""

    place: Path  # a folder of its own
    dice: random.Random
    end: float  # time.time() after which nothing new is begun
    scale: float  # share of the full counts

    def on(self) -> bool:
        return time.time() < self.end


def build_parser() -> common.Parser:
    parser = common.Parser(__doc__)
    parser.add_argument("--minutes", type=common.number(float, above=0), default=FULL)
    parser.add_argument("--seed", type=common.number(int, 0), help="of all dice; the clock's if left out")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    seed = int(time.time()) if args.seed is None else args.seed
    print(
        f"seed {seed}, {args.minutes:g} minutes, {common.cpu_name()}, torch {torch.__version__}", flush=True
    )
    for name in COMMANDS:  # before the parts begin, so that none has to
        importlib.import_module(name)
    out = args.out.resolve()
    with common.hold(out, "soak.py"):
        rows, failures = [], []
        whole = sum(SHARES[name] for name in args.only)
        for name in args.only:
            place = out / name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            seconds = 60 * args.minutes * SHARES[name] / whole
            bout = Bout(
                place, random.Random(f"{seed} {name}"), time.time() + seconds, seconds / scale_of(name)
            )
            found = fought(name, bout)
            rows += counted(name, found)
            failures += [f"{name}: {kind}: {problem}" for kind, problem in found if problem]
            if not failures:
                shutil.rmtree(place, ignore_errors=True)
        table = pd.DataFrame(rows, columns=["part", "attack", "tries", "failures"])
        common.write_csv(out / "soak.csv", table)
        (out / "failures.txt").write_text("\n".join(failures), errors="backslashreplace")
        print(table.to_string(index=False))
        print(f"{table.tries.sum():,} tries, {table.failures.sum()} failures; table: {out / 'soak.csv'}")
    raise SystemExit(int(bool(failures)))


def scale_of(name: str) -> float:
    """Seconds that a part has in a full soak."""
    return 60 * FULL * SHARES[name]


def fought(name: str, bout: Bout) -> list[Try]:
    """All tries of a part, which runs in a process of its own and tells of each at once."""
    log, begun = bout.place / "tries.jsonl", time.time()
    child = fork(lambda: fight(name, bout, log), bout.place / "printed.txt")
    code = ended(child, bout.end - begun + PATIENCE)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    if code != 0:
        last = (bout.place / "printed.txt").read_text(errors="replace").strip().splitlines()[-1:]
        found.append((name, "the part hangs" if code is None else f"the part ended with {code}: {last}"))
    for kind, problem in found:
        if problem:
            print(f"FAILED {name}: {kind}: {problem}".encode(errors="backslashreplace").decode(), flush=True)
    print(f"{name}: {len(found):,} tries in {time.time() - begun:.0f} s", flush=True)
    return found


def fight(name: str, bout: Bout, log: Path) -> None:
    os.chdir(bout.place)
    with open(log, "a") as stream:
        for kind, problem in PARTS[name](bout):
            stream.write(json.dumps([kind, problem]) + "\n")
            stream.flush()


def counted(name: str, found: list[Try]) -> list[tuple[str, str, int, int]]:
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    of = {kind: [problem for k, problem in found if k == kind] for kind in kinds}
    return [(name, kind, len(of[kind]), sum(map(bool, of[kind]))) for kind in kinds] or [(name, "none", 0, 0)]


# Processes


def fork(work: Callable[[], None], printed: Path) -> int:
    """The id of a copy of this process that does the work, with its memory limited and its words in a file.

    A copy has torch imported already: where a start takes seconds, the kills would mostly meet imports.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
        torch.set_num_threads(1)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """The exit code of a process, minus its signal, or None if it runs on after so many seconds."""
    until = time.time() + seconds
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def command(script: str, words: list[str]) -> None:
    """What `python SCRIPT.py WORDS` does; tune.py, which copies alone, has errors of its own."""
    module = importlib.import_module(script)
    with getattr(module, "one_line_errors", common.one_line_errors)():
        code = module.main(words)
    if isinstance(code, int):
        raise SystemExit(code)


def judged(code: int | None, said: str, codes: tuple[int, ...] = (0, 1, 2)) -> str:
    """What is wrong with how a command ended."""
    if "Traceback (most recent" in said:
        return f"traceback: {said.strip().splitlines()[-1][:200]}"
    if code not in codes:
        return f"exit code {code}: {said.strip()[-200:]}"
    lines = [line for line in said.strip().splitlines() if not line.startswith("warning: ")]
    if code == 2 and (not lines or not lines[-1].startswith("error: ") or len(lines) > 1):
        return f"exit code 2 with {len(lines)} lines: {said.strip()[:300]}"
    return ""


def attempt(script: str, words: list[str]) -> str:
    """What is wrong with how a command ends that is run here: '' where nothing is."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command(script, words)
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno}); {words}"
    wrong = judged(code, err.getvalue())
    return f"{wrong}; {words}" if wrong else ""


# Data


def write_classes(root: Path, each: int = 12, size: int = 32) -> Path:
    """Three splits of three classes of tiny pictures."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in ("1_Water (deep)", "2_Fields, 50%", "10_Café"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(each):
                Image.fromarray(picture(rng, size)).save(folder / f"{split} {i}.jpg", quality=95)
    return root


NAMES = ["Water", "Forest", "Crops", "Urban"]


def write_land(root: Path, each: int = 8) -> Path:
    """Land-1.0's layout: pictures with the fractions of four classes."""
    rng = np.random.default_rng(1)
    for split in ("train", "val", "test"):
        (root / "RGB Images" / split).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(picture(rng, 32)).save(root / "RGB Images" / split / f"{split}{i}.png")
        write_cells(root, split, land_rows(split, each, rng))
    return root


def land_rows(split: str, each: int, rng: np.random.Generator) -> list[list[str]]:
    shares = rng.dirichlet([1] * len(NAMES), each).round(4)
    shares[:, -1] = 1 - shares[:, :-1].sum(1)
    header = ["ID", "Latitude", "Longitude", "Filename", "Level", *NAMES, "Class_max"]
    rows = [
        [str(i), "1.5", "-2", f"{split}{i}.png", "N2", *map("{:.4f}".format, row), "Water"]
        for i, row in enumerate(shares)
    ]
    return [header, *rows]


def write_cells(root: Path, split: str, rows: list[list[str]], separator: str = ",") -> Path:
    (root / "CSV").mkdir(exist_ok=True)
    file = root / "CSV" / f"csv_{split}.csv"
    file.write_text("\n".join(separator.join(row) for row in rows) + "\n", encoding="utf-8")
    return file


# Flags and YAML


NUMBERS = ["0", "1", "2", "3", "5", "8", "24", "32", "64", "100", "0.5", "0.1", "0.9", "1e-3", "1e-5"]
ODD = ["", " ", "-1", "nan", "inf", "-inf", "1e39", "1e400", "0x10", "1_000", "２", "true", "None", "null",
       "a b", "é", "-", "--", "%s", "%(prog)s", "{x}", "1:2", "32:64", "24:24:24", "9" * 25, "=1+1", "[1]",
       "\n", "a\nb", "\x1b[31m", "random", "imagenet", "1,5", "+3", "1e3", "--lr", "\udcff"]  # fmt: skip
PATHS = {"data", "out", "cache", "config", "splits", "grid", "runs", "results", "embeddings", "land",
         "recipes", "plan_to", "manifest", "script", "picture", "init", "model", "folder"}  # fmt: skip
PLACES = ["nowhere", "é ü", "file.txt", "empty", "empty/deep/new", "", "data", "land", "half.csv",
          "flags.yaml", "half.jpg", "/dev/null", "file.txt/below", "noise.pth", "a" * 300]  # fmt: skip


def flags(bout: Bout) -> Iterator[Try]:
    """Random flags and YAML for every command, up to where the work would begin."""
    write_odd_places(bout.place)
    prepare_commands()
    attacks: list[Callable[[random.Random], Try]] = [
        lambda dice: flag_attack("train_ssl", ["--print-config"], dice),
        lambda dice: flag_attack("transfer", ["--print-config"], dice),
        lambda dice: yaml_attack("train_ssl", "--config", ["--print-config"], dice),
        lambda dice: yaml_attack("transfer", "--config", ["--print-config"], dice),
        lambda dice: yaml_attack("tune", "--grid", ["--dry-run"], dice),
        lambda dice: flag_attack("tune", ["--grid", "grid.yaml", "--dry-run"], dice),
        lambda dice: flag_attack("paper", ["--small", "--dry-run"], dice),
        lambda dice: parser_attack("bench", dice),
        lambda dice: flag_attack("data.check", ["--workers", "1"], dice, first=PLACES),
        lambda dice: flag_attack("predict", ["--device", "cpu"], dice, first=PLACES),
    ]
    rare = [lambda dice: flag_attack("plot", ["--out", "figures", "--format", "png"], dice)]
    while bout.on():
        for attack in attacks * 10:
            yield attack(bout.dice)
            if not bout.on():
                return
        for attack in rare:
            yield attack(bout.dice)


def prepare_commands() -> None:
    """Leave out what takes seconds and has nothing to do with flags."""
    import paper
    import train_ssl
    import tune

    text = train_ssl.build_parser().format_help()
    answer = subprocess.CompletedProcess([], 0, stdout=text, stderr="")
    tune.subprocess = types.SimpleNamespace(run=lambda *words, **options: answer)
    paper.images_per_second = lambda size: (100.0, "cpu")
    paper.resolved_recipes = lambda study: dict.fromkeys(
        METHODS, {"epochs": 3, "subset": 1.0, "warmup_epochs": 1.0}
    )
    paper.answers = answered_here


def answered_here(commands: list[list[str]]) -> list[str]:
    """What commands print that are run here, one after another."""
    printed = []
    for script, *words in commands:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            command(script.removesuffix(".py"), words)
        printed.append(out.getvalue())
    return printed


def write_odd_places(place: Path) -> None:
    write_classes(place / "data", 3)
    write_land(place / "land", 3)
    (place / "empty").mkdir()
    (place / "file.txt").write_text("text")
    (place / "grid.yaml").write_text("lr: [0.1, 0.01]\n")
    (place / "flags.yaml").write_text("lr: 0.1\n")
    (place / "half.csv").write_text("task,data,init\nscene,a")
    (place / "noise.pth").write_bytes(random.Random(0).randbytes(1000))
    (place / "half.jpg").write_bytes(next((place / "data").rglob("*.jpg")).read_bytes()[:300])


def word_for(action, dice: random.Random) -> str:
    """A value that a flag may or may not take; no path leads out of the folder."""
    if action.dest in PATHS:
        return dice.choice(PLACES)
    if action.choices and dice.random() < 0.7:
        return str(dice.choice(list(action.choices)))
    return dice.choice(NUMBERS if dice.random() < 0.6 else ODD)


def random_words(parser: common.Parser, dice: random.Random) -> list[str]:
    words = []
    for action in dice.choices([a for a in parser._actions if a.option_strings], k=dice.randint(1, 6)):
        name = dice.choice(action.option_strings)
        if "--help" in action.option_strings:
            continue
        count = {None: 1, 0: 0, "+": dice.randint(0, 3), "*": dice.randint(0, 3)}.get(action.nargs, 1)
        if dice.random() < 0.03:
            name, count = name[:-1] + dice.choice("xyz"), dice.randint(0, 2)
        words += [name, *(word_for(action, dice) for _ in range(count))]
    return words + ([dice.choice(ODD)] if dice.random() < 0.05 else [])


def flag_attack(script: str, last: list[str], dice: random.Random, first: list[str] | None = None) -> Try:
    parser = importlib.import_module(script).build_parser()
    before = dice.sample(first, dice.randint(1, 3)) if first else []
    return f"flags of {script}", attempt(script, [*before, *random_words(parser, dice), *last])


def parser_attack(script: str, dice: random.Random) -> Try:
    """The parser alone, where a command has nothing that stops before the work."""
    parser, err = importlib.import_module(script).build_parser(), io.StringIO()
    words, code = random_words(parser, dice), 0
    try:
        with contextlib.redirect_stderr(err), common.one_line_errors():
            parser.parse_args(words)
    except SystemExit as stopped:
        code = stopped.code
    except Exception as error:
        return f"flags of {script}", f"{type(error).__name__}: {error}; {words}"
    wrong = judged(code, err.getvalue())
    return f"flags of {script}", f"{wrong}; {words}" if wrong else ""


VALUES = ["", "null", "~", "[]", "{}", "true", "no", "on", "1", "0", "-1", "0.1", "1e-3", "1e3", ".nan",
          ".inf", "0x1F", "0o17", "1:30", "1_000", "2020-01-01", "text", "é", "[1, 2]", "[null, 1]",
          "[[1]]", "{a: 1}", "[0.1, x]", "{log_uniform: [1e-4, 0.1]}", "{log_uniform: [0, 1]}",
          "{uniform: [1]}",
          "{choice: []}", "{choice: [1, 2]}", "!!python/object:os.system x", "!!binary aGk=", "&a [*a]", "*b",
          "'\\x00'", "9" * 30, "- 1", "|\n  block", "[true, false]", "[1e-3, 1e-2]", "\"\\ud800\"", "<<: 3",
          "random", "fp32", "cpu", "[a, b, c]", "{1: 2}", "? x", "@x", "`x`", "%x"]  # fmt: skip


def yaml_text(parser: common.Parser, dice: random.Random) -> bytes:
    keys = [*common.flag_actions(parser), "versions", "commit", "mean", "lrr", "1", "null", "trials",
            "eta", "metric", "min_epochs", "max_epochs", "seeds_per_trial", "budget_minutes", "[a]",
            "é"]  # fmt: skip
    lines = [f"{dice.choice(keys)}: {dice.choice(VALUES)}" for _ in range(dice.randint(0, 4))]
    data = "\n".join(lines).encode(errors="surrogatepass")
    damage = dice.random()
    if damage < 0.04:
        return data.decode(errors="replace").encode("utf-16")
    if damage < 0.08:
        return b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")
    if damage < 0.12:
        return data[: len(data) // 2]
    if damage < 0.16:
        return bytes(dice.randrange(256) for _ in range(40))
    return data


def yaml_attack(script: str, flag: str, last: list[str], dice: random.Random) -> Try:
    parser = importlib.import_module("train_ssl" if script == "tune" else script).build_parser()
    text = yaml_text(parser, dice)
    Path("attack.yaml").write_bytes(text)
    wrong = attempt(script, [flag, "attack.yaml", *last])
    return f"YAML of {script}", f"{wrong}: {text!r}" if wrong else ""


# Trainings of a few steps with settings that may not go together


SETTINGS = {
    "train_ssl": {
        "--method": "barlow moco simclr simsiam", "--batch-size": "2 3 8 16 27 64", "--size": "24 32 24:32",
        "--lr": "1e-6 0.1 1 100 1000", "--momentum": "0 0.9", "--hidden": "1 8",
        "--out-dim": "2 8", "--optimizer": "sgd lars adam adamw", "--queue-size": "1 8 64",
        "--loader": "auto torch dali", "--subset": "0.01 0.3 1", "--accumulate": "1 2 3",
        "--precision": "fp32 bf16 auto fp16", "--temperature": "0.001 0.5 100",
        "--warmup-epochs": "0 1 5", "--knn-every": "1 3", "--stop-epoch": "1 2 9",
        "--bn-splits": "1 2 8", "--min-area": "1e-6 0.2 1", "--weight-decay": "0 10",
        "--profile": "2", "--blur": "0 1", "--jitter": "0 1", "--save-minutes": "1e-9",
        "--quarter-turns": "", "--no-maxpool": "", "--symmetric": "", "--skip-bad-files": "",
        "--lambda": "0 1000", "--predictor-hidden": "1 8", "--predictor-rate": "1 30",
        "--key-momentum": "0 1",
        "--data": "few flat one-class half-bad land no-train",
    },
    "transfer": {
        "--task": "fraction scene", "--mode": "linear finetune", "--init": "random channels",
        "--batch-size": "2 3 8 64", "--size": "24 32", "--lr": "1e-6 0.1 1000",
        "--ratios": "0.001 1 50 100", "--seeds": "0 1 2", "--per-class": "1 2 100",
        "--loss": "softmax bce", "--probe": "lbfgs sgd", "--epoch-choice": "seed common",
        "--augment": "", "--save-model": "", "--save-embeddings": "", "--skip-bad-files": "",
        "--linear-lr": "1e-9 1e9", "--precision": "fp32 bf16 fp16", "--share-pixels": "",
        "--data": "few flat one-class half-bad land no-train",
    },
}  # fmt: skip


def trainings(bout: Bout) -> Iterator[Try]:
    """Short runs with settings and data that may not go together."""
    write_hard_data(bout.place)
    turn = 0
    while bout.on():
        script = list(SETTINGS)[turn % 2]
        turn += 1
        yield f"runs of {script}", training_attack(script, bout.dice, turn)
        shutil.rmtree("run", ignore_errors=True)


def training_attack(script: str, dice: random.Random, turn: int) -> str:
    choices = SETTINGS[script]
    words = ["--data", dice.choice(["data", "land"]), "--size", "32", "--device", "cpu", "--epochs", "2"]
    words += ["--workers", "1", "--cache", "cache", "--out", "run"]
    words += ["--hidden", "8", "--out-dim", "8"] if script == "train_ssl" else ["--seeds", "1"]
    for flag in dice.sample(list(choices), dice.randint(1, 5)):
        values = choices[flag].split()
        words += [flag, dice.choice(values)] if values else [flag]
    printed = Path(f"said-{turn}.txt")
    child = fork(lambda: apart(script, words, printed), printed.with_suffix(".out"))
    code = ended(child, 300)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    wrong = judged(code, printed.read_text(errors="replace"))
    if not wrong:
        printed.unlink()
        printed.with_suffix(".out").unlink()
    return f"{wrong}; {script}.py {' '.join(words)}" if wrong else ""


def apart(script: str, words: list[str], errors: Path) -> None:
    """The command with its stderr in a file of its own, which a traceback reaches too."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    command(script, words)


def write_hard_data(place: Path) -> None:
    write_classes(place / "data")
    write_land(place / "land")
    write_classes(place / "few", 1)
    write_classes(place / "half-bad", 4)
    for i, file in enumerate(sorted((place / "half-bad").rglob("*.jpg"))):
        if i % 2:
            file.write_bytes(file.read_bytes()[:200])
    shutil.copytree(place / "data" / "train" / "10_Café", place / "flat")
    shutil.copytree(place / "data" / "train" / "10_Café", place / "one-class" / "train" / "10_Café")
    shutil.copytree(place / "data" / "val", place / "no-train" / "val")


# Pictures


def pictures(bout: Bout) -> Iterator[Try]:
    """Odd and damaged pictures: what the check calls good decodes to the size it says, what it calls bad is
    refused in the same words, or is a JPEG of which libjpeg complains."""
    seed, count = bout.dice.randrange(10**6), max(100, int(2000 * bout.scale))
    files = make_corpus(bout.place / "corpus", seed, count)
    checked = check_files(bout.place / "corpus", [f.name for f in files], bout.place / "m.csv", 1)
    for row, file in zip(checked.itertuples(), files, strict=True):
        kind = "whole odd pictures" if " whole " in f" {file.name} " else "damaged pictures"
        yield kind, decoded_as_checked(file, row.problem, row.height, row.width)


def decoded_as_checked(file: Path, problem: str, height: int, width: int) -> str:
    try:
        found = pixels.read_picture(file)
    except common.DataError as error:
        return "" if problem else f"{file}: the check calls it good, and {error}"
    except Exception as error:
        return f"{file}: {type(error).__name__}: {error}"
    if problem:
        complained = file.read_bytes().startswith(b"\xff\xd8")
        return "" if complained else f"{file}: decodes, and the check says {problem}"
    scaled = pixels.decode(file, 16, 24)
    right = found.shape == (3, height, width) and scaled.shape == (3, 16, 24) and found.dtype == np.uint8
    return "" if right else f"{file}: {found.shape}, and the check says {height} x {width}"


# Tables of Land-1.0


def harmless_bom(data: bytes, dice: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + data


def harmless_crlf(data: bytes, dice: random.Random) -> bytes:
    return data.replace(b"\n", b"\r\n")


def harmless_semicolons(data: bytes, dice: random.Random) -> bytes:
    return data.replace(b",", b";")


def harmless_decimal_commas(data: bytes, dice: random.Random) -> bytes:
    return data.replace(b",", b";").replace(b".", b",").replace(b",png", b".png")


def harmless_utf16(data: bytes, dice: random.Random) -> bytes:
    return data.decode().encode("utf-16")


def harmless_quotes(data: bytes, dice: random.Random) -> bytes:
    lines = data.decode().split("\n")
    return "\n".join(
        ",".join(f'"{cell}"' for cell in line.split(",")) if line else "" for line in lines
    ).encode()


def harmless_blank_lines(data: bytes, dice: random.Random) -> bytes:
    return data.replace(b"\n", b"\n\n")


def harmless_repeat(data: bytes, dice: random.Random) -> bytes:
    lines = data.splitlines(True)
    return data + dice.choice(lines[1:])


def harmless_no_suffix(data: bytes, dice: random.Random) -> bytes:
    return data.replace(b".png", b"")


def harmless_other_suffix(data: bytes, dice: random.Random) -> bytes:
    return data.replace(b".png", b".TIF")


def harmless_spaces(data: bytes, dice: random.Random) -> bytes:
    return data.replace(b",", b", ")


def harmless_no_last_line_end(data: bytes, dice: random.Random) -> bytes:
    return data.rstrip(b"\n")


def harmful_cell(data: bytes, dice: random.Random) -> bytes:
    """A cell of one line replaced: by no number, a path that leads out, a formula, another number."""
    lines = data.decode().splitlines()
    row = dice.randrange(1, len(lines))
    cells = lines[row].split(",")
    odd = ["", "nan", "NaN", "inf", "-0.5", "7", "1e400", "text", "../../x.png", "/etc/passwd", "=1+1", "..",
           "\\..\\x.png", "train0.png", "007.png", "\0", '"', "0,5", "é", "x" * 5000]  # fmt: skip
    cells[dice.randrange(3, len(cells) - 1)] = dice.choice(odd)
    lines[row] = ",".join(cells)
    return "\n".join(lines).encode()


def harmful_header(data: bytes, dice: random.Random) -> bytes:
    lines = data.decode().splitlines()
    cells = lines[0].split(",")
    cells[dice.randrange(len(cells))] = dice.choice(
        ["", "=HYPERLINK(1)", "Forest", "../x", "\x1b[31m", "é", '"']
    )
    return "\n".join([",".join(cells), *lines[1:]]).encode()


def harmful_bytes(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(1, 5)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def harmful_cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def harmful_columns(data: bytes, dice: random.Random) -> bytes:
    """A column left out, or one more in one line."""
    lines = [line.split(",") for line in data.decode().splitlines()]
    if dice.random() < 0.5:
        place = dice.randrange(len(lines[0]))
        lines = [line[:place] + line[place + 1 :] for line in lines]
    else:
        lines[dice.randrange(len(lines))].append("1")
    return "\n".join(map(",".join, lines)).encode()


def tables(bout: Bout) -> Iterator[Try]:
    """Tables that mean the same load to the same fractions; others load to fractions of files that are there,
    or are refused."""
    root = write_land(bout.place / "land")
    files = {split: root / "CSV" / f"csv_{split}.csv" for split in ("train", "val", "test")}
    right = {split: file.read_bytes() for split, file in files.items()}
    truth = load_table(root)
    changes = [change for name, change in sorted(globals().items()) if name.startswith("harm")]
    while bout.on():
        for change in changes:
            split = bout.dice.choice(list(files))
            files[split].write_bytes(change(right[split], bout.dice))
            yield change.__name__.replace("_", " "), table_problem(root, truth, change.__name__, files[split])
            files[split].write_bytes(right[split])


def table_problem(root: Path, truth, change: str, file: Path) -> str:
    try:
        found = load_table(root)
    except common.DataError as error:
        harmless = change.startswith("harmless")
        return f"refused: {error}" if harmless or not str(error).strip() else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}: {file.read_bytes()!r}"
    inside = all(
        (root / name).resolve().is_relative_to(root) and (root / name).exists() for name in found.files
    )
    sound = np.isfinite(found.fractions).all() and np.allclose(found.fractions.sum(1), 1) and inside
    if not sound:
        return f"loads wrongly: {file.read_bytes()!r}"
    if change.startswith("harmless"):
        order, same = np.argsort(found.files), np.argsort(truth.files)
        equal = found.files[order].tolist() == truth.files[same].tolist()
        equal = equal and np.allclose(found.fractions[order], truth.fractions[same], atol=1e-6)
        return "" if equal and found.classes == truth.classes else f"other numbers: {file.read_bytes()!r}"
    return ""


# Hundreds of epochs


def epochs(bout: Bout) -> Iterator[Try]:
    """Memory and open files of a long run stay as they are after its first fifth."""
    write_classes(bout.place / "data", 3)
    count = max(25, int(500 * bout.scale))
    words = "--data data --size 24 --batch-size 9 --hidden 8 --out-dim 8 --device cpu --workers 1 --lr 0.01"
    words += f" --method simclr --precision fp32 --loader torch --out run --cache cache --epochs {count}"
    words += " --knn-every 25"  # a checkpoint each time
    child = fork(lambda: command("train_ssl", words.split()), bout.place / "epochs.txt")
    sizes, code = [], None
    while code is None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            sizes.append((logged_epochs(Path("run/log.csv")), *size_of(child)))
        code = ended(child, 0.2)
    yield "ends well", "" if code == 0 else f"exit code {code}"
    late = [s for s in sizes if s[0] >= count // 5]
    (bout.place / "sizes.csv").write_text("\n".join(",".join(map(str, s)) for s in sizes))
    for name, column, most in (("memory, MB", 1, 40), ("open files", 2, 2)):
        grown = late[-1][column] - late[0][column] if len(late) > 1 else 10**6
        kind = f"{name}: {late[0][column] if late else 0} after a fifth of {count} epochs, grown by {grown}"
        yield kind, f"grown by {grown}" if grown > most else ""


def logged_epochs(log: Path) -> int:
    return len(log.read_text().splitlines()) - 1


def size_of(process: int) -> tuple[int, int]:
    """(resident memory in MB, open files) of a process."""
    resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident >> 20, len(os.listdir(f"/proc/{process}/fd"))


# Kills


class Job(NamedTuple):
    """A command that must come to the same end however often it is killed."""

    name: str
    script: str
    words: str
    least: float = 0  # seconds that must be left to begin it


def jobs() -> list[Job]:
    tiny = "--size 32 --device cpu --workers 1 --cache cache"
    some = f"--data ../data {tiny} --epochs 3 --batch-size 9 --hidden 16 --out-dim 8 --out run"
    some += " --save-minutes 1e-9"
    found = [
        Job(f"train_ssl.py {method} {loader}", "train_ssl", f"--method {method} --loader {loader} {some}")
        for method in METHODS
        for loader in ("torch", "dali")
        if loader == "torch" or importlib.util.find_spec("nvidia")
    ]
    probes = "--init random channels --ratios 50 100 --seeds 2 --epochs 2 --batch-size 8 --precision fp32"
    probes += f" --data ../land --save-model --out run {tiny}"
    found.append(Job("transfer.py linear", "transfer", f"{probes} --mode linear --save-embeddings"))
    found.append(Job("transfer.py finetune", "transfer", f"{probes} --mode finetune"))
    search = "--grid ../grid.yaml --out run --min-epochs 1 --max-epochs 3 --method simclr --data ../data"
    search += f" {tiny} --batch-size 9 --hidden 16 --out-dim 8 --precision fp32".replace("--workers 1", "")
    found.append(Job("tune.py", "tune", search, 120))
    whole = "--small --data ../data --land ../land --recipes ../recipes --out run --epochs 2"
    return [*found, Job("paper.py", "paper", whole, 300)]


def kills(bout: Bout) -> Iterator[Try]:
    """SIGKILL at random moments, start again: the same weights and tables as without."""
    write_classes(bout.place / "data", 9)
    write_land(bout.place / "land", 12)
    (bout.place / "grid.yaml").write_text("lr: [0.001, 0.0003, 0.0001]\n")
    write_recipes(bout.place / "recipes")
    shrink_paper()
    waiting = jobs()
    bout.dice.shuffle(waiting)
    waiting.sort(key=lambda job: job.least)
    whole: dict[str, tuple[float, dict[str, str]]] = {}
    while bout.on():
        for job in waiting:
            if bout.end - time.time() > job.least:
                yield from killed(job, bout, whole)


def write_recipes(folder: Path) -> None:
    folder.mkdir()
    recipe = {"batch_size": 9, "hidden": 16, "out_dim": 8, "lr": 0.01, "workers": 1, "precision": "fp32"}
    for method in METHODS:
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(recipe))


def shrink_paper() -> None:
    """Tiny settings, and nothing that is measured or asked of the network."""
    import paper

    paper.SMALL = paper.SMALL._replace(size=32, ratios=[50, 100], seeds=[0, 1], epochs=1)
    paper.images_per_second = lambda size: (100.0, "cpu")
    paper.without_imagenet = lambda: "no network"


def killed(job: Job, bout: Bout, whole: dict) -> Iterator[Try]:
    """One run with one to three kills; a try for each kill, of which the last tells how it ended."""
    if job.name not in whole:
        begun = time.time()
        code = ended(started(job, bout.place / "whole"), 900)
        if code != 0:
            yield job.name, f"exit code {code} without a kill: {tail(bout.place / 'whole' / 'printed.txt')}"
            return
        whole[job.name] = time.time() - begun, traces(bout.place / "whole" / "run")
        shutil.rmtree(bout.place / "whole")
    seconds, right = whole[job.name]
    place, count = bout.place / "killed", bout.dice.randint(1, 3)
    for i in range(count):
        process = started(job, place)
        if ended(process, bout.dice.uniform(0, 0.9 * seconds)) is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        if i < count - 1:
            yield job.name, ""
    yield job.name, how_it_ended(job, place, right)


def how_it_ended(job: Job, place: Path, right: dict[str, str]) -> str:
    code = ended(started(job, place), 900)
    if code != 0:
        shutil.rmtree(f"{place} {job.name}", ignore_errors=True)
        shutil.move(place, f"{place} {job.name}")
        return f"exit code {code} after kills: {tail(Path(f'{place} {job.name}') / 'printed.txt')}"
    found = traces(place / "run")
    other = sorted(name for name in {*found, *right} if found.get(name) != right.get(name))
    left = [f.name for f in place.rglob(".*.*.[0-9]*")]
    if other or left:
        shutil.rmtree(f"{place} {job.name}", ignore_errors=True)
        shutil.move(place, f"{place} {job.name}")
        return f"other than without kills: {other[:5]}; left behind: {left[:3]}"
    shutil.rmtree(place)
    return ""


def started(job: Job, place: Path) -> int:
    place.mkdir(exist_ok=True)

    def work() -> None:
        os.chdir(place)
        command(job.script, job.words.split())

    return fork(work, place / "printed.txt")


def tail(file: Path) -> str:
    return file.read_text(errors="replace").strip()[-300:] if file.exists() else ""


TIMED = {"seconds", "total_seconds", "commit", "images_per_s", "data_wait", "front", "hours", "duration"}
UNLIKE = {"steps.csv", "plan.yaml", "importance.csv"}  # of times, or of what is known at the moment


def traces(run: Path) -> dict[str, str]:
    """File -> digest of what must not depend on when and how often it was begun."""
    found = {}
    for file in sorted(run.rglob("*")):
        name = file.relative_to(run).as_posix()
        if file.suffix in (".pt", ".pth") and "prev" not in file.name:
            digest = hashlib.sha256()
            add_tensors(torch.load(file, weights_only=True, map_location="cpu"), digest)
            found[name] = digest.hexdigest()
        elif file.suffix == ".csv" and file.name not in UNLIKE:
            table = pd.read_csv(file, dtype=str, keep_default_na=False)
            table = table[[column for column in table if column not in TIMED]]
            found[name] = table.sort_values(list(table)).to_csv(index=False)
        elif file.name in ("best.yaml", "settings.yaml"):
            found[name] = file.read_text()
    return found


def add_tensors(value: object, digest) -> None:
    """The bytes of all tensors in a nest of dicts and lists; other values, such as times, are left out."""
    if isinstance(value, torch.Tensor):
        digest.update(value.reshape(-1).numpy().tobytes())
    elif isinstance(value, dict):
        for key, inside in value.items():
            digest.update(str(key).encode())
            add_tensors(inside, digest)
    elif isinstance(value, (list, tuple)):
        for inside in value:
            add_tensors(inside, digest)


PARTS = {
    "flags": flags,
    "trainings": trainings,
    "pictures": pictures,
    "tables": tables,
    "epochs": epochs,
    "kills": kills,
}


if __name__ == "__main__":
    with common.one_line_errors():
        main()

"""What the scripts share: configuration, errors, ranks, precision, schedule, optimisers and files written whole."""

import argparse
import contextlib
import difflib
import hashlib
import math
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
import yaml

from data.check import check_files
from data.synthetic import write_scenes
from data.tables import DataError, Table, load_table
from models.backbone import WeightsError

PACKAGES = ["torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy", "scikit-learn"]
ABOUT = {"versions", "commit", "device_name", "mean", "std"}  # what config.yaml says beside the flags


class ConfigError(ValueError):
    """Flags, YAML or a run directory that do not go together."""


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line_errors():
    """Turn what the user can mend into one line on stderr and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ConfigError, DataError, WeightsError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# Configuration: flag default < YAML < command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that names the nearest valid flag."""

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        unknown = (
            [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        )
        near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1, 0.4) if unknown else []
        fail(message + (f" (the nearest valid flag is {near[0]})" if near else ""))


def number(kind, low=None, high=None, above=None):
    """argparse type: a finite int or float with low <= value <= high, value > above."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number")
        if (
            low is not None
            and value < low
            or above is not None
            and value <= above
            or high is not None
            and value > high
        ):
            bounds = {"at least": low, "above": above, "at most": high}
            said = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
            raise argparse.ArgumentTypeError(f"{text} must be {said}")
        return value

    convert.kind = kind
    return convert


def common_flags(parser: Parser) -> None:
    """The flags of train_ssl.py and transfer.py alike."""
    group = parser.add_argument_group("data and output")
    group.add_argument(
        "--data", help="folder of images (see README, layouts); the built-in scenes if left out"
    )
    group.add_argument("--config", help="YAML file of flags; what stands on the command line wins")
    group.add_argument("--out", help="output directory")
    group.add_argument(
        "--cache", default="runs/cache", help="directory of manifests, decoded pixels and built-in scenes"
    )
    group.add_argument(
        "--scenes", type=number(int, 60), default=2900, help="how many built-in scenes, without --data"
    )
    group.add_argument(
        "--size", type=number(int, 16), default=224, help="side of the images the network sees, pixels"
    )
    group.add_argument(
        "--workers", type=number(int, 1), default=os.cpu_count() or 1, help="threads that read and decode"
    )
    group.add_argument(
        "--skip-bad-files",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out files that do not decode instead of stopping",
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=number(int, 1), default=100)
    group.add_argument(
        "--batch-size", type=number(int, 2), default=256, help="images per step, of all ranks together"
    )
    group.add_argument("--lr", type=number(float, above=0), default=0.1, help="learning rate after warm-up")
    group.add_argument(
        "--momentum", type=number(float, 0, 0.9999), default=0.9, help="of SGD and LARS; Adam's beta1"
    )
    group.add_argument(
        "--weight-decay", type=number(float, 0), default=1e-5, help="not applied to norms and biases"
    )
    group.add_argument("--seed", type=number(int, 0, 2**31), default=0)
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "fp16", "bf16"],
        default="auto",
        help="auto: bf16 where the device computes it natively, else fp16 on a GPU, else fp32",
    )


def parse(parser: Parser, argv: list[str] | None = None, recipes: Path | None = None) -> argparse.Namespace:
    """Flags from the command line over those of --config, or of recipes/<method>.yaml, over the defaults."""
    args = parser.parse_args(argv)
    file = Path(args.config) if args.config else recipes and recipes / f"{args.method}.yaml"
    if file and (args.config or file.exists()):
        parser.set_defaults(**read_yaml(file, parser))
        args = parser.parse_args(argv)
        args.config = str(file)
    return args


def flag_actions(parser: Parser) -> dict[str, argparse.Action]:
    """YAML key -> action: the flag's name with underscores."""
    return {
        action.option_strings[0].lstrip("-").replace("-", "_"): action
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    }


def read_yaml(file: Path, parser: Parser) -> dict:
    """Checked values of a YAML file of flags, by the parser's destinations."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: holds no `key: value` lines")
    actions, checked = flag_actions(parser), {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in ABOUT or name == "config":
            continue
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1, 0.0)
            raise ConfigError(f"{file}: unknown key {key!r} (the nearest valid key is {near[0]!r})")
        checked[actions[name].dest] = check_value(value, actions[name], f"{file}: {key}")
    return checked


def check_value(value, action, where):
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {value!r} is not true or false")
        return value
    if action.nargs in ("+", "*"):
        return [check_one(v, action, where) for v in (value if isinstance(value, list) else [value])]
    return None if value is None else check_one(value, action, where)


def check_one(value, action, where):
    kind = getattr(action.type, "kind", None)
    if kind and (isinstance(value, bool) or not isinstance(value, (int, kind))):
        hint = (
            f"; YAML reads {value} as text, write it with a point and a sign: {float(value):.1e}"
            if looks_numeric(value)
            else ""
        )
        raise ConfigError(f"{where}: {value!r} is not a {'whole ' if kind is int else ''}number{hint}")
    if not kind and not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where}: {value!r} is not a name")
    try:
        value = action.type(str(value)) if action.type else str(value)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{where}: {error}") from None
    if action.choices and value not in action.choices:
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(action.choices)}")
    return value


def looks_numeric(value):
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def flags_of(args: argparse.Namespace, parser: Parser) -> dict:
    """Resolved flags by their YAML keys."""
    return {key: getattr(args, action.dest) for key, action in flag_actions(parser).items()}


def about(device: torch.device) -> dict:
    """Versions, git commit and device, for config.yaml and results."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    return {"versions": versions, "commit": git_commit(), "device_name": name}


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def git_commit() -> str:
    answer = (
        subprocess.run(
            ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
        )
        if (Path(__file__).parent / ".git").exists()
        else None
    )
    return answer.stdout.strip() if answer else ""


# Files written whole or not at all


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary name in the same folder that becomes `path` when the block ends well."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_csv(path: Path, rows: list[dict] | pd.DataFrame) -> None:
    with replacing(path) as partial:
        pd.DataFrame(rows).to_csv(partial, index=False)


def write_yaml(path: Path, values: dict) -> None:
    with replacing(path) as partial:
        partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


# Device, ranks, precision


def start_ranks(device: str) -> tuple[torch.device, int, int]:
    """(device, rank, ranks): one process alone, or the place that torchrun gave this one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here")
    cuda = device != "cpu" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return place, 0, 1
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return place, dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def rank_zero_first(rank: int, ranks: int):
    """Rank 0 runs the block alone, so that the others find its caches ready."""
    if rank:
        dist.barrier()
    yield
    if ranks > 1 and not rank:
        dist.barrier()


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where it is native (GPUs since Ampere, CPUs with AVX512-BF16 or AMX): elsewhere it is emulated."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# Schedule and optimisers


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then a cosine to zero that the last step does not reach."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class LARS(torch.optim.Optimizer):
    """SGD whose step is scaled, weight by weight, to the weight's norm (Y. You et al., 2017); biases and norms are not."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = p.grad.add(p, alpha=group["weight_decay"])
                if p.ndim > 1:
                    weight, gradient = p.norm(), update.norm()
                    update = update * torch.where(
                        (weight > 0) & (gradient > 0), group["trust"] * weight / gradient, 1.0
                    )
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(buffer.mul_(group["momentum"]).add_(update), alpha=group["lr"])


def make_optimizer(
    name: str, model: torch.nn.Module, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Optimiser over the trainable weights; no decay on norms and biases, and a `predictor` in groups of its own, marked
    `constant`: its rate does not follow the schedule (SimSiam, section 4.2)."""
    groups = {}
    for key, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((p.ndim > 1, key.startswith("predictor.")), []).append(p)
    groups = [
        {"params": ps, "weight_decay": weight_decay if decay else 0.0, "constant": constant}
        for (decay, constant), ps in groups.items()
    ]
    if name in ("adam", "adamw"):
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](
            groups, lr=lr, betas=(momentum, 0.999)
        )
    return {"sgd": torch.optim.SGD, "lars": LARS}[name](groups, lr=lr, momentum=momentum)


# Data


def open_table(args: argparse.Namespace, layout: str, report: Path) -> tuple[Table, pd.DataFrame]:
    """The table of --data, or of built-in scenes, without files that do not decode, and what the check says of each file.

    Bad files are listed in `report`; they stop the run unless --skip-bad-files is given.
    """
    table = load_table(args.data or built_in_scenes(args, layout))
    Path(args.cache).mkdir(parents=True, exist_ok=True)
    checked = check_files(
        table.root, list(table.files), manifest_of(table.root, Path(args.cache)), args.workers
    )
    bad = (checked.problem != "").to_numpy()
    if bad.any():
        write_csv(report, checked[bad])
        first = checked[bad].iloc[0]
        message = f"{table.root}: {bad.sum()} of {len(bad)} files do not decode (first: {first.file}: {first.problem}; all in {report})"
        if not args.skip_bad_files:
            raise DataError(f"{message}: mend or remove them, or add --skip-bad-files")
        print(f"left out: {message}")
    return table.rows(~bad), checked[~bad].reset_index(drop=True)


def manifest_of(root: Path, cache: Path) -> Path:
    return cache / f"manifest-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}.csv"


def built_in_scenes(args: argparse.Namespace, layout: str) -> Path:
    root = Path(args.cache) / f"scenes-{layout}-{args.scenes}-{args.size}"
    if not root.exists():
        try:
            write_scenes(root, layout=layout, count=args.scenes, size=args.size, seed=0)
        except OSError:
            if not root.exists():  # else another process was faster
                raise
    return root

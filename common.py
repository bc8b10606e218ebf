"""What every command shares: errors, flags and YAML, ranks and precision, files written whole. Knows nothing
of ours.

One rule each: what a user can mend ends with one line on stderr and exit code 2 (`one_line_errors`); a flag
is its default, over it the YAML file, over it the command line (`parse`); a file is written whole or not at
all (`replacing`); a directory belongs to one process at a time (`hold`).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import difflib
import errno
import fcntl
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pandas as pd
import yaml

if TYPE_CHECKING:
    import torch  # takes seconds, and a command that only reads files or shows its flags needs none

ORPHANS = 20  # seconds: the worker processes of a killed process have noticed by then, and let its lock go
STALE = 3600  # seconds since a file was written to, until nobody is at it any more
ROOT = Path(__file__).resolve().parent
PACKAGES = ["torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy", "scikit-learn"]
# Keys of config.yaml beside the flags
NOT_FLAGS = {"versions", "commit", "device_name", "mean", "std", "collapsed_below", "images", "val_images"}


# Errors


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do."""


class ConfigError(UserError):
    """Flags, YAML or a run directory that do not go together."""


class DataError(UserError):
    """Data that cannot be used as it is."""


class WeightsError(UserError):
    """Weights that cannot be had, read or matched."""


def say(text: str) -> None:
    """Print a line once, not once a rank."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def fail(message: str) -> NoReturn:
    """End with one line on stderr and exit code 2."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(3)  # what all ranks have to say, rank 0 says first, and torchrun then ends the others
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit code 2; anything else keeps its traceback.

    Output goes out line by line, so that a log file shows an epoch when it ends, and in any terminal's
    encoding.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # after `interrupt_quietly`
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        yield
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except UserError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        fail(
            f"not enough memory ({first_line(error)}): lower --batch-size, --size or "
            "the width of the heads; in pretraining, --accumulate 4 takes a step in four parts"
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def interrupt_quietly() -> None:
    """Until the next `one_line_errors` Ctrl-C ends the process without a traceback: imports take seconds."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # it is ignored under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def exit_on_signals(kept: Callable[[], str]) -> None:
    """SIGTERM, Ctrl-C and SLURM's SIGUSR1 end the process at once, with exit code 128 + signal and a line
    that says what is `kept`."""

    def leave(number: int, frame: object) -> None:
        print(f"{signal.Signals(number).name}: {kept()}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        if signal.getsignal(each) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(each, leave)


def is_memory_error(error: BaseException) -> bool:
    """Whether numpy, torch's CPU allocator or CUDA ran out of memory: three types, one meaning."""
    words = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(w in str(error) for w in words)


def first_line(error: BaseException, width: int = 120) -> str:
    """The first line of an error's text: libraries add stack traces and advice below it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(filter(str.isprintable, line))[:width]


# Configuration: flag default < YAML < command line


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as they are written, and names a default only where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        silent = default in (None, argparse.SUPPRESS, []) or isinstance(default, bool)
        if silent or not action.option_strings:
            return text
        if isinstance(default, list):
            return f"{text} (default: {' '.join(map(str, default))})"
        return f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser made from a command's docstring: its first line says what the command does, the rest
    stands under the flags. Errors are one line that names the nearest valid flag."""

    def __init__(self, doc: str, usage: str = "%(prog)s [flags]"):
        first, _, rest = doc.partition("\n")
        super().__init__(
            description=first,
            epilog=rest.strip("\n"),
            usage=usage,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        words = message.split() if "unrecognized" in message else []
        unknown = [word.partition("=")[0] for word in words if word.startswith("--")]
        near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1, 0.4) if unknown else []
        hint = f" (the nearest valid flag is {near[0]})" if near else ""
        fail(f"{message}{hint}; {self.prog.rpartition('/')[2]} --help lists the flags")


def number(
    kind: type, low: float | None = None, high: float | None = None, above: float | None = None
) -> Callable:
    """argparse type: a finite int or float with low <= value <= high and value > above."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):  # the latter of a whole number beyond all floats
            finite = False
        if not finite:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number")
        too_low = (low is not None and value < low) or (above is not None and value <= above)
        if too_low or (high is not None and value > high):
            bounds = {"at least": low, "above": above, "at most": high}
            said = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
            raise argparse.ArgumentTypeError(f"{text} must be {said}")
        return value

    convert.kind = kind
    return convert


# Below this the last stage of a ResNet sees one pixel, and the weight gradient that torch 2.14 computes
# there in bf16 on a CPU holds uninitialised memory
SMALLEST = 24
side = number(int, SMALLEST, 2048)  # argparse type of --size, pixels


def common_flags(parser: Parser, size: Callable = side) -> None:
    """The flags of train_ssl.py and transfer.py alike. `size`: argparse type of --size."""
    data_flags(parser.add_argument_group("data and output"), size)
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=number(int, 1, 10**6), default=100, help="times through the images")
    group.add_argument(
        "--batch-size",
        type=number(int, 2, 65535),  # blocks that a CUDA grid has along its second axis
        default=256,
        help="images per step, of all ranks together",
    )
    group.add_argument("--lr", type=number(float, above=0, high=1000), default=0.1, help="rate after warm-up")
    group.add_argument(
        "--momentum", type=number(float, 0, 0.9999), default=0.9, help="of SGD and LARS; Adam's beta1"
    )
    group.add_argument(
        "--weight-decay", type=number(float, 0, 10), default=1e-5, help="not applied to norms and biases"
    )
    group.add_argument("--seed", type=number(int, 0, 2**31), default=0)
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "fp16", "bf16"],
        default="auto",
        help="auto: bf16 where the device computes it natively, else fp16 on a GPU, else fp32 (on GPUs since "
        "Ampere, fp32 means TF32 convolutions)",
    )


def data_flags(group: argparse._ArgumentGroup, size: Callable) -> None:
    """What `data.opening.Source` is made of, and where things are written."""
    group.add_argument(
        "--data", help="folder of images (see README, layouts); the built-in scenes if left out"
    )
    group.add_argument(
        "--splits", metavar="FOLDER", help="lists of names, *train*.txt, *val*.txt and *test*.txt"
    )
    group.add_argument(
        "--split",
        choices=["paper", "spatial", "none"],
        default="paper",
        help="the authors' random one, where the folder brings none; spatial: blocks of a degree; none: all "
        "images at any depth train, and folders are no classes",
    )
    group.add_argument("--config", help="YAML file of flags; what stands on the command line wins")
    group.add_argument(
        "--print-config", action="store_true", help="print the resolved flags as YAML, and stop"
    )
    group.add_argument("--out", help="output directory")
    group.add_argument(
        "--cache", default="runs/cache", help="directory of manifests, decoded pixels and built-in scenes"
    )
    group.add_argument(
        "--scenes", type=number(int, 60, 10**6), default=2900, help="how many built-in scenes, without --data"
    )
    group.add_argument("--size", type=size, default=224, help="side of the images the network sees, pixels")
    group.add_argument(
        "--workers", type=number(int, 1, 1024), default=cores(), help="threads or processes that read"
    )
    group.add_argument(
        "--skip-bad-files",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out files that do not decode instead of stopping",
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


def print_config(args: argparse.Namespace, parser: Parser) -> None:
    """With --print-config: the resolved flags as YAML on stdout, and the end of the process."""
    if args.print_config:
        print(yaml.safe_dump(flags_of(args, parser), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)


def flag_actions(parser: Parser) -> dict[str, argparse.Action]:
    """YAML key -> action: the flag's name with underscores."""
    silent = {"help", "print_config"}
    actions = [action for action in parser._actions if action.option_strings and action.dest not in silent]
    return {action.option_strings[0].lstrip("-").replace("-", "_"): action for action in actions}


class FlagLoader(yaml.SafeLoader):
    """YAML as a command line has it: 010, 0x10, 32:48, 1_0 and dates, which YAML 1.1 reads as 8, 16, 1968,
    10 and dates, stay text, and a key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [str(key.value).replace("-", "_") for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} stands twice")
        return super().construct_mapping(node, deep)


NUMBER = "tag:yaml.org,2002:int"
ODD = {NUMBER, "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
FlagLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ODD]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
FlagLoader.add_implicit_resolver(NUMBER, re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
FlagLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_yaml(file: Path, loader: type = yaml.SafeLoader) -> object:
    """What a YAML file holds; OSError where it cannot be read, ValueError where it is no YAML."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except (KeyError, AttributeError):  # of !!bool x, !!timestamp x
        raise ValueError("a value is not of the kind that its tag says") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_yaml(file: Path, parser: Parser) -> dict:
    """Checked values of a YAML file of flags, by the parser's destinations."""
    try:
        values = load_yaml(file, FlagLoader)
    except ValueError as error:
        raise ConfigError(f"{file}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: holds no `key: value` lines")
    actions, checked = flag_actions(parser), {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name == "config" or name in NOT_FLAGS - set(actions):  # bench.py has a flag --images
            continue
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1, 0.0)
            raise ConfigError(f"{file}: unknown key {key!r} (the nearest valid key is {near[0]!r})")
        checked[actions[name].dest] = check_value(value, actions[name], f"{file}: {key}")
    return checked


def check_value(value: object, action: argparse.Action, where: str) -> object:
    """The YAML value of a flag as the command line would give it."""
    if value is None and action.default is None:
        return None
    if value is None:
        raise ConfigError(f"{where}: has no value; leave the line out for the default, {action.default}")
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):  # a switch
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {value!r} is not true or false")
        return value
    if action.nargs in ("+", "*"):
        values = value if isinstance(value, list) else [value]
        if not values and action.nargs == "+":
            raise ConfigError(f"{where}: the list is empty")
        return [check_one(v, action, where) for v in values]
    return check_one(value, action, where)


def check_one(value: object, action: argparse.Action, where: str) -> object:
    """One value of a flag, by its type and choices; a ConfigError about it begins with `where`."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        kind = {int: "whole number", float: "number"}.get(getattr(action.type, "kind", None), "name")
        raise ConfigError(f"{where}: {value!r} is not a {kind}")
    if not action.type and isinstance(value, float):  # 1.10 would be the name 1.1
        raise ConfigError(f"{where}: YAML reads {value} as a number: put the name in quotes")
    try:
        value = action.type(str(value)) if action.type else str(value)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{where}: {error}") from None
    if action.choices and value not in action.choices:
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(action.choices)}")
    return value


def flags_of(args: argparse.Namespace, parser: Parser) -> dict:
    """Resolved flags by their YAML keys."""
    return {key: getattr(args, action.dest) for key, action in flag_actions(parser).items()}


def about(device: torch.device) -> dict:
    """Versions, git commit and device, for config.yaml and results."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}, {counted(torch.get_num_threads(), 'thread')}"
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    name = f"{ranks} x {name}" if ranks > 1 else name
    return {"versions": versions, "commit": git_commit(), "device_name": name}


def counted(number: int, word: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """`git describe` of this checkout, blank where there is no checkout or no git."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


# Files written whole or not at all, and directories that belong to one process


def refuse_special(path: Path, flag: str) -> None:
    """ConfigError if `flag` names a folder, a device or a pipe: a file would be put in its place."""
    if is_special(path):
        raise ConfigError(f"{flag} {path} is a folder or a device: name a file")


def refuse_inside(place: Path, data: str | Path | None, flags: str) -> None:
    """ConfigError where what a command writes would lie among the images, and count as one or as a class at
    the next start. `flags` name another place."""
    if data and place.resolve().is_relative_to(Path(data).resolve()):
        raise ConfigError(f"{place} lies inside the data: name another place, by {flags}")


def is_special(path: Path) -> bool:
    """Whether it is a folder, a device or a pipe, or `/dev/stdout`, a link that may lead to a file."""
    odd = os.path.exists(path) and not os.path.isfile(path)  # a name that is too long does not exist
    return odd or str(path.absolute().parent) in ("/dev", "/dev/fd")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder that becomes `path` when the block ends well.

    What a killed process left of the same file is removed first. A full disk is an OSError that names the
    file, and so is a `path` that is a folder or a device.
    """
    if is_special(path):
        raise OSError(errno.EINVAL, "is a folder or a device, not a file", str(path))
    sweep(path.parent, path.name)
    partial = temporary(path)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.filename not in (None, str(partial)):  # another file, which the block reads
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except RuntimeError as error:  # torch.save meets a full disk inside its zip writer
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "cannot be written: is the disk full?", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes it when the block ends well.

    What a killed process left of the same folder is removed first. FileExistsError as `refuse_filled`; a
    full disk is an OSError that names a file.
    """
    refuse_filled(path)
    sweep(path.parent, path.name)
    part = temporary(path)
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_filled(path: Path) -> None:
    """FileExistsError where no new folder can stand."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already and not empty: name a new folder, or remove it first")
    if not path.name or path.is_symlink() or path.is_mount():
        raise FileExistsError(f"{path} is a link, a mount point or this folder itself: name a new one in it")


def temporary(path: Path) -> Path:
    """A name beside `path` that says which process writes there."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def sweep(folder: Path, name: str = "*") -> None:
    """Remove the temporary files and folders whose process, on this machine, is no more."""
    host = socket.gethostname()
    escaped = name if name == "*" else name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")
    for file in folder.glob(f".{escaped}.{host}.*"):
        pid = file.name.rpartition(".")[2]
        if pid.isdecimal() and not is_alive(int(pid)):
            remove(file)


def sweep_other_hosts(folder: Path) -> None:
    """Remove what processes on other machines have left half written STALE seconds ago, of a folder that
    this process holds: a requeued job may go on elsewhere."""
    for file in folder.glob(".*.*.*"):
        written, _, pid = file.name.rpartition(".")  # .NAME.HOST and the process, as in `temporary`
        with contextlib.suppress(OSError):  # another process was faster
            old = time.time() - file.stat().st_mtime > STALE
            if old and pid.isdecimal() and not written.endswith(f".{socket.gethostname()}"):
                remove(file)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it can be."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True


def write_csv(path: Path, rows: list[dict] | pd.DataFrame) -> None:
    """Write rows as a CSV, whole or not at all, that reads back whatever the names in it hold."""
    with replacing(path) as partial:
        save_csv(partial, pd.DataFrame(rows))


def save_csv(path: Path, table: pd.DataFrame) -> None:
    """File names that are not UTF-8 keep their bytes. A carriage return in a name would end the line, as
    Python's csv leaves it bare: then all texts are quoted."""
    table.to_csv(path, index=False, errors="surrogateescape")
    if b"\r" in path.read_bytes():
        table.to_csv(path, index=False, errors="surrogateescape", quoting=csv.QUOTE_NONNUMERIC)


def harmless(text: str) -> str:
    """A name that a spreadsheet shows, and does not compute: `=1+1` becomes `'=1+1`."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def untaken(name: str, taken: set[str]) -> str:
    """The name, with a number where `taken` has it, in upper or lower case; it is added to `taken`."""
    own, number = name, 1
    while own.lower() in taken:
        number += 1
        own = f"{name}-{number}"
    taken.add(own.lower())
    return own


def write_yaml(path: Path, values: dict) -> None:
    """Write values as YAML in their order, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_quietly(file: Path) -> dict:
    """The values of a YAML file; empty where it is not there or not readable."""
    try:
        return read_values(file)
    except (OSError, ValueError):
        return {}


def read_values(file: Path) -> dict:
    """The values of a YAML file; OSError or ValueError where it has none."""
    values = load_yaml(file)
    if not isinstance(values, dict):
        raise ValueError("holds no `key: value` lines")
    return values


@contextlib.contextmanager
def hold(folder: Path, what: str) -> Iterator[None]:
    """Let this process alone write `folder`: a lock that ends with the process, however that ends.

    Raises ConfigError, with the host and process of the holder, where another process has it. `what` names
    the user of the folder in that message. Temporary files of dead processes are removed.
    """
    make_folder(folder)
    file = folder / ".running"
    lock, until = take_lock(file), time.monotonic() + ORPHANS
    while lock is None and is_orphaned(file) and time.monotonic() < until:
        time.sleep(0.2)
        lock = take_lock(file)
    if lock is None:
        holder = file.read_text(errors="replace").strip() if file.exists() else "another process"
        raise ConfigError(
            f"{folder}: {what} is at work there ({holder or 'just started'}): wait, or choose another --out"
        )
    try:
        os.write(lock, f"{socket.gethostname()}, process {os.getpid()}".encode())
        sweep(folder)
        sweep_other_hosts(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(lock)


def is_orphaned(file: Path) -> bool:
    """Whether the holder that a lock file names was on this machine and is no more: its workers still have
    the lock."""
    with contextlib.suppress(OSError, ValueError):
        host, _, pid = file.read_text(errors="replace").strip().rpartition(", process ")
        return host == socket.gethostname() and not is_alive(int(pid))
    return False


def take_lock(file: Path) -> int | None:
    """An open, locked descriptor of `file`, or None where another process holds it."""
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(file).st_ino == os.fstat(lock).st_ino:  # else its last holder has just removed it
                os.truncate(lock, 0)
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:  # a network drive without locks
            os.close(lock)
            raise OSError(error.errno, f"cannot be locked ({error.strerror})", str(file)) from None
        os.close(lock)


def make_folder(folder: Path) -> None:
    """Create an output directory; a file of that name is refused."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file, not a directory")
    folder.mkdir(parents=True, exist_ok=True)


# Memory, device, ranks, precision


def memory() -> int:
    """Bytes of memory that this process may use: a container's limit, or what the machine has."""
    count = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        count = min(count, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return count


def cores() -> int:
    """CPU cores that this process may use: SLURM and taskset leave fewer than the machine has, and so do
    containers."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def crowded() -> str:
    """`9 threads compete for 2 cores` where they do, else blank: threads that wait for those of others are
    many times slower than one alone."""
    load = os.getloadavg()[0]
    return f"{load:.0f} threads compete for {counted(cores(), 'core')}" if load >= 1.5 * cores() else ""


def start_ranks(device: str) -> tuple[torch.device, int, int]:
    """(device, rank, ranks): one process alone, or the place that torchrun gave this one."""
    import torch
    import torch.distributed as dist

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here")
    cuda = device != "cpu" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            there = counted(torch.cuda.device_count(), "GPU")
            why = f"has no GPU, torch sees {there}: lower --nproc_per_node"
            raise ConfigError(f"torchrun: rank {local} {why}")
        refuse_old_gpu(place)
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return place, 0, 1
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    patience = datetime.timedelta(hours=12)  # the others wait while rank 0 checks; torchrun sees deaths
    dist.init_process_group(backend, timeout=patience, device_id=place if cuda else None)
    return place, dist.get_rank(), dist.get_world_size()


def refuse_old_gpu(place: torch.device) -> None:
    """ConfigError where torch was built for newer GPUs alone, and would end in the middle of a step."""
    import torch

    built_for = [int(re.sub(r"\D", "", arch)) for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_"]
    major, minor = torch.cuda.get_device_capability(place)
    if built_for and 10 * major + minor < min(built_for):
        raise ConfigError(
            f"{torch.cuda.get_device_name(place)} (sm_{major}{minor}) is older than what torch "
            f"{torch.__version__} is built for (sm_{min(built_for)} and newer): install requirements-v100.txt"
        )


@contextlib.contextmanager
def rank_zero_first(rank: int, ranks: int) -> Iterator[None]:
    """Rank 0 runs the block alone, so that the others find its caches ready."""
    import torch.distributed as dist

    if rank:
        dist.barrier()
    yield
    if ranks > 1 and not rank:
        dist.barrier()


def meet(ranks: int) -> None:
    """Wait until all ranks have come here."""
    import torch.distributed as dist

    if ranks > 1:
        dist.barrier()


def end_ranks(ranks: int) -> None:
    """Leave the group that `start_ranks` entered."""
    import torch.distributed as dist

    if ranks > 1:
        dist.destroy_process_group()


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where it is native (GPUs since Ampere, CPUs with AVX512-BF16 or AMX): elsewhere it is
    emulated."""
    import torch

    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "--precision fp16: a CPU only emulates it, at less than an image a second: use bf16 or fp32"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def fits_on_gpu(nbytes: int, device: torch.device) -> bool:
    """Whether pixels stay on the GPU: at most half of its memory, all of it and not what is free just now, so
    that a restart beside another job chooses the same."""
    import torch

    return device.type == "cuda" and nbytes < 0.5 * torch.cuda.get_device_properties(device).total_memory

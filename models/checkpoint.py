"""What a run directory keeps to go on from: checkpoint.pt and the one before it, and which run they
belong to."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from common import ConfigError, first_line, read_quietly, replacing, say

# Where the images lie and what splits them. That they are the same images, the digest of the data checks.
PLACE = ("data", "splits", "split")
# Flags that do not change what is learned: a run may go on with others
NO_EFFECT = {
    *PLACE,
    "out",
    "knn_every",
    "cache",
    "workers",
    "stop_epoch",
    "save_minutes",
    "profile",
    "dali_cache",
    "config",
    "skip_bad_files",
    "compile",
    "graph",
}
KEPT = {"model", "optimizer", "scaler", "rng", "progress", "config", "digest"}  # in a whole checkpoint
LOWER = "lower --lr (or, of SimSiam, --predictor-rate) or raise --warmup-epochs"  # where numbers overflow


class Parts(NamedTuple):
    """Everything that learns or counts, and so belongs in a checkpoint."""

    method: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the epoch that runs
    log: list[dict] = field(default_factory=list)  # a row for each finished epoch
    loss: float = 0.0  # sum over the finished steps of the epoch
    waited: float = 0.0  # seconds that they waited for data
    trained: float = 0.0  # seconds of training
    seconds: float = 0.0  # seconds since the epoch began, checks and files included


class Saver:
    """Writes out/checkpoint.pt; the one that was there becomes checkpoint.prev.pt, if it is a good one.

    config: resolved flags; about: mean, std, size and maxpool of the backbone; digest: of the data; found:
    the file that the run goes on from, "" for none.
    """

    def __init__(self, out: Path, parts: Parts, config: dict, about: dict, digest: str, found: str):
        self.file, self.parts = out / "checkpoint.pt", parts
        self.good = found == self.file.name  # else what is there, if anything, could not be read
        self.identity = {"config": config, "about": about, "digest": digest}

    def refuse_not_finite(self, epoch: int) -> None:
        """ConfigError, and a row without a loss in log.csv, where a step of `epoch` (from 1), whose loss may
        have been finite, has left weights that are not."""
        tensors = [value for value in self.parts.method.state_dict().values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in tensors]).all():
            leave_blank_row(self.file.with_name("log.csv"), epoch)
            raise ConfigError(f"the weights are not finite in epoch {epoch}: {LOWER}; {kept(self.file)}")

    def __call__(self, progress: Progress) -> None:
        """Write the checkpoint. ConfigError, and none is written, where the weights are not finite."""
        self.refuse_not_finite(progress.epoch + (progress.step > 0))
        state = {
            "model": self.parts.method.state_dict(),
            "optimizer": self.parts.optimizer.state_dict(),
            "scaler": self.parts.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "progress": vars(progress),
        }
        with replacing(self.file) as partial:
            torch.save(state | self.identity, partial)
            if self.good and self.file.exists():
                os.replace(self.file, previous_of(self.file))
        self.good = True


def leave_blank_row(log: Path, epoch: int) -> None:
    """Add the epoch's row, without a loss, for tune.py to read. A run that goes on rewrites it."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    head, *rows = log.read_text(encoding="utf-8").splitlines() if log.exists() else ["epoch,loss"]
    earlier = {str(before) for before in range(epoch)}
    rows = [row for row in rows if row.split(",")[0] in earlier]
    lines = [head, *rows, f"{epoch}" + "," * head.count(",")]
    with replacing(log) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def kept(file: Path) -> str:
    """What a run that diverges leaves to go on from."""
    what = "the last good checkpoint stays" if file.exists() else "there is no checkpoint yet"
    return f"{what} in {file.parent}"


def previous_of(file: Path) -> Path:
    """Where the checkpoint before `file` lies."""
    return file.with_name("checkpoint.prev.pt")


def load_checkpoint(
    out: Path, parts: Parts, config: dict, chosen: set[str], digest: str, about: dict
) -> tuple[Progress, str]:
    """(where the run of `out` stands, which file said so): a new Progress and "" where there is none.

    Fills `parts` and sets torch's random state. ConfigError names the difference where the run had other
    flags, other data or, in `about`, other statistics; flags in `chosen`, which this machine and not the user
    chose, do not count.
    """
    file, state = read_checkpoint(out)
    if state is None:
        refuse_other(out, config, chosen)
        return Progress(), ""
    saved = state["config"]
    differ = differences(saved, config, chosen)
    if differ:
        raise ConfigError(f"{file} is of another configuration ({differ}): choose another --out")
    if state["digest"] != digest:
        raise ConfigError(
            f"{file} began with other data ({saved.get('data')}): names, sizes, dates, splits or labels "
            f"differ now (were {state['digest']}, are {digest}): bring them back, or choose another --out"
        )
    began = state.get("about", about)
    for name in ("mean", "std"):
        if began[name] != about[name]:
            raise ConfigError(
                f"{file} began with another {name} ({began[name]}, now {about[name]}): the file of --init "
                "has changed: bring it back, or choose another --out"
            )
    try:
        parts.method.load_state_dict(state["model"])
        load_optimizer(parts.optimizer, state["optimizer"])
        if state["scaler"]:  # blank of a run in another precision than fp16
            parts.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"{file} does not fit this model ({first_line(error)}): remove it") from None
    torch.set_rng_state(state["rng"].cpu())
    return Progress(**state["progress"]), file.name


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load `state`, but for whether a step is fused: that goes by the device, which may be another now."""
    for saved, own in zip(state["param_groups"], optimizer.param_groups):
        if "fused" in own:
            saved["fused"] = own["fused"]
    optimizer.load_state_dict(state)


def refuse_other(out: Path, config: dict, chosen: set[str]) -> None:
    """ConfigError where `out` holds the backbone of another run, whose checkpoints are gone: people remove
    them when a training is done."""
    file = out / "backbone.pth"
    if not file.exists():
        return
    began = read_quietly(out / "config.yaml")
    differ = differences({key: began.get(key) for key in config}, config, chosen)
    if differ:
        raise ConfigError(f"{file} is of another run, without a checkpoint ({differ}): choose another --out")


def differences(saved: dict, config: dict, chosen: set[str]) -> str:
    """The flags that differ and change what is learned, `chosen` aside; blank where there are none."""
    counts = (saved.keys() | config.keys()) - NO_EFFECT - chosen
    return "; ".join(
        f"{k} was {saved.get(k)}, is {config.get(k)}" for k in sorted(counts) if saved.get(k) != config.get(k)
    )


def read_checkpoint(out: Path) -> tuple[Path, dict | None]:
    """(file, content) of the newest checkpoint that can be read; content is None where there is no file at
    all."""
    newest = out / "checkpoint.pt"
    damage = ""
    for file in (newest, previous_of(newest)):
        if not file.exists():
            continue
        try:
            if not file.stat().st_size:
                raise ValueError("it is empty")
            state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not state.keys() >= KEPT:
                raise ValueError("holds no checkpoint of train_ssl.py")
        except OSError:
            raise
        except Exception as error:  # torch.load raises whatever the damaged bytes lead to
            damage = damage or f"{file}: damaged ({first_line(error)})"
            continue
        if file != newest:
            say(f"{damage or f'{newest} is missing'}: going back to {file.name}")
        return file, state
    if damage:
        raise ConfigError(f"{damage}: remove it to start again")
    return newest, None

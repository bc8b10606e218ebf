"""One step of learning, what its losses come to, and whether somebody asks to stop after it."""

import contextlib
import signal
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import ConfigError
from models.checkpoint import LOWER, kept, leave_blank_row

CHECK_STEPS = 50  # between looks at whether the loss is finite
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of --precision


def dtype_of_eval(dtype: torch.dtype) -> torch.dtype:
    """That in which a training in `dtype` looks at its model: in eval mode, and in fp16, features overflow
    while the running statistics are young."""
    return torch.float32 if dtype == torch.float16 else dtype


class Learner(NamedTuple):
    """One step of learning; it waits for no device."""

    model: torch.nn.Module  # (view1, view2) -> loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype  # of autocast
    accumulate: int = 1

    def __call__(self, views: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Train on view1, view2 (n, 3, size, size); the mean loss of the step's parts, on the device."""
        loss = self.backward(views)
        self.update()
        return loss

    def backward(self, views: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Compute the gradients; the mean loss of the step's parts."""
        device, total = views[0].device.type, 0.0
        parts = list(zip(*(view.chunk(self.accumulate) for view in views)))
        for part in parts:
            gradients = contextlib.nullcontext() if part is parts[-1] else unsent(self.model)
            with gradients:
                with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
                    loss = self.model(*part)
                self.scaler.scale(loss / self.accumulate).backward()
            total = total + loss.detach() / self.accumulate
        return total

    def update(self) -> None:
        """Take the optimiser's step, and drop the gradients."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def unsent(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """Where gradients stay on their rank: all parts of a step are sent with its last one."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


class Losses:
    """Sum of an epoch's losses and the first step whose loss is not finite, kept where the losses are: to
    look at each would make the host wait for the GPU in every step."""

    def __init__(self, total: float, device: torch.device, epoch: int, out: Path):
        self.sum = torch.tensor(total, dtype=torch.float64, device=device)
        self.first_bad = torch.tensor(-1, device=device)
        self.seen = torch.tensor(-1, pin_memory=device.type == "cuda")  # a copy on the host, some steps old
        self.epoch, self.out = epoch, out

    def add(self, loss: torch.Tensor, step: int) -> None:
        """Raises ConfigError within 2 x CHECK_STEPS steps of a loss that is not finite."""
        self.sum += loss
        bad = ~loss.isfinite() & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step, self.first_bad)
        if step % CHECK_STEPS == CHECK_STEPS - 1:
            self.refuse(int(self.seen))
            self.seen.copy_(self.first_bad, non_blocking=True)

    def total(self) -> float:
        """The sum; ConfigError where it is not finite."""
        self.refuse(int(self.first_bad))
        return float(self.sum)

    def refuse(self, step: int) -> None:
        """ConfigError, and a row without a loss in log.csv, where `step` is that of a loss that is not
        finite."""
        if step < 0:
            return
        leave_blank_row(self.out / "log.csv", self.epoch + 1)
        raise ConfigError(
            f"the loss is not finite at epoch {self.epoch + 1}, step {step + 1}: {LOWER}; "
            f"{kept(self.out / 'checkpoint.pt')}"
        )


def mean_over_ranks(value: float, ranks: int, device: torch.device) -> float:
    """The mean of the ranks' values, the same on every rank."""
    if ranks == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / ranks


class StopFlag:
    """Whether to stop: a signal has reached any rank. Whether to save: rank 0 says that it is time.

    The signals are SIGTERM, SIGINT (a second one interrupts at once) and SIGUSR1, SLURM's warning before the
    time is up. All ranks get the answer at the same step, one step later, so that nobody waits.
    """

    def __init__(self, ranks: int):
        self.ranks, self.caught = ranks, []
        self.told = False  # that rank 0 is due, until it has saved
        # The signal's number and whether to save, over all ranks; on the CPU: gloo, so no GPU is waited for
        self.work, self.most = None, torch.zeros(2, dtype=torch.int64)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: object) -> None:
        """Note the signal; Ctrl-C after it interrupts at once."""
        self.caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask(self, due: bool) -> tuple[bool, bool]:
        """(whether to stop after this step, whether to save). Every rank has to ask at the same steps; `due`:
        whether this one is to save, which counts on rank 0."""
        if self.ranks == 1:
            return bool(self.caught), due
        number = saving = 0
        if self.work:
            self.work.wait()
            number, saving = self.most.tolist()
        if number and not self.caught:
            self.caught.append(number)  # another rank's
        due = due and dist.get_rank() == 0
        self.most = torch.tensor([max(self.caught, default=0), due and not self.told])
        self.told = due
        self.work = dist.all_reduce(self.most, dist.ReduceOp.MAX, async_op=True)
        return number > 0, saving > 0

    def exit_code(self) -> int:
        """128 + the signal that was heard, of this rank or of another."""
        return 128 + self.caught[0]

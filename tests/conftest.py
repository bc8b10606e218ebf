import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny images: the workers of pytest-xdist share the cores


def picture(rng, size):
    """A smooth random picture with a texture, uint8 (size, size, 3)."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three classes of 30 images of 32 px, with names that break file lists."""
    root, rng = tmp_path_factory.mktemp("data set"), np.random.default_rng(0)
    for label in ("1_Water (deep)", "2_Fields, 50%", "10_Café"):
        (root / label).mkdir()
        for i in range(30):
            Image.fromarray(picture(rng, 32)).save(root / label / f"{i}_a b%_(+1.5,-2)_é.jpg", quality=95)
    return root


@pytest.fixture
def tiny(folder, tmp_path):
    """Flags of a run of seconds: 81 training images of 32 px in batches of 27."""
    return [
        "--data",
        str(folder),
        "--size",
        "32",
        "--batch-size",
        "27",
        "--epochs",
        "2",
        "--hidden",
        "32",
        "--out-dim",
        "16",
        "--device",
        "cpu",
        "--workers",
        "1",
        "--out",
        str(tmp_path / "run"),
        "--cache",
        str(tmp_path / "cache"),
    ]


def script(*command, timeout=240, **environment):
    """Run a script of the project as a user would; returns the finished process with its text."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


class Reads(TorchDispatchMode):
    """Counts where a number is read out of a tensor: on a GPU, each is a wait."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*args, **(kwargs or {}))


def refused(capsys, main, *flags):
    """The one line on stderr of a run that must end with exit code 2."""
    import common

    with pytest.raises(SystemExit) as stopped, common.one_line_errors():
        main([str(f) for f in flags])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and error.startswith("error: ") and "\n" not in error, error
    return error

"""Images per second of pretraining: each loader alone, the model alone, both, and the usual stack beside them.

    python bench.py --data PATCHES --size 64 --batch-size 256 --steps 12 --out results/throughput.csv
    python bench.py --scenes 600 --size 224 --batch-size 512 --loaders torch dali --repeats 3

Each figure comes from a process of its own: `train_ssl.py --profile` for the loaders, and this script again for the usual
stack (PIL transforms in a DataLoader, fp32, one decode per view). They take turns, so that a noisy machine disturbs
all alike; ratios are taken within a turn. Rows are appended to --out, one for each process.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torchvision import transforms

import common
from common import number
from data.tables import load_table
from models import METHODS
from models.backbone import build_backbone


def flags() -> common.Parser:
    parser = common.Parser(__doc__.split("\n", 1)[0])
    common.common_flags(parser)
    parser.set_defaults(out="results/throughput.csv")
    group = parser.add_argument_group("benchmark")
    group.add_argument("--method", choices=list(METHODS), default="barlow")
    group.add_argument(
        "--loaders", nargs="+", choices=["torch", "dali", "usual"], default=["torch", "dali", "usual"]
    )
    group.add_argument("--steps", type=number(int, 2), default=12, help="timed steps of each measurement")
    group.add_argument("--repeats", type=number(int, 1), default=3, help="turns")
    group.add_argument(
        "--only-usual", action="store_true", help="measure the usual stack in this process, as a turn does"
    )
    return parser


def main() -> None:
    parser = flags()
    args = common.parse(parser)
    if args.data is None:
        args.data = str(common.built_in_scenes(args, "pure"))
    if args.only_usual:
        return common.write_csv(Path(args.out), [usual_stack(args)])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats):
            for loader in args.loaders:
                rows.append(measure(args, loader, Path(folder) / f"{loader}{turn}") | {"turn": turn})
                print(
                    "  ".join(
                        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()
                    ),
                    flush=True,
                )
    device, *_ = common.start_ranks(args.device)
    about = common.about(device)
    rows = pd.DataFrame(rows).assign(
        method=args.method,
        data=Path(args.data).name,
        steps=args.steps,
        device=about["device_name"],
        torch=about["versions"]["torch"],
        commit=about["commit"],
    )
    report(rows)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    common.write_csv(out, pd.concat([pd.read_csv(out), rows]) if out.exists() else rows)


def measure(args, loader: str, out: Path) -> dict:
    command = [
        "--data",
        args.data,
        "--method",
        args.method,
        "--size",
        args.size,
        "--batch-size",
        args.batch_size,
        "--cache",
        args.cache,
        "--workers",
        args.workers,
        "--device",
        args.device,
    ]
    if loader == "usual":
        command = [__file__, *command, "--only-usual", "--steps", args.steps, "--out", out]
    else:
        command = [
            Path(__file__).with_name("train_ssl.py"),
            *command,
            "--loader",
            loader,
            "--precision",
            args.precision,
            "--profile",
            args.steps,
            "--out",
            out,
        ]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise common.ConfigError(f"{loader}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return pd.read_csv(out if loader == "usual" else out / "profile.csv").iloc[0].to_dict()


class TwoViews(torch.utils.data.Dataset):
    """What most code does: open and augment an image with PIL, twice."""

    def __init__(self, files, size):
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, (0.2, 1)),
                transforms.RandomHorizontalFlip(),
                transforms.RandomVerticalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4)], 0.8),
                transforms.RandomApply([transforms.GaussianBlur(size // 10 | 1, (0.1, 2.0))], 0.5),
                transforms.ToTensor(),
                transforms.Normalize((0.34, 0.38, 0.41), (0.2, 0.14, 0.12)),
            ]
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = Image.open(self.files[i]).convert("RGB")
        return self.transform(image), self.transform(image)


def usual_stack(args) -> dict:
    device, *_ = common.start_ranks(args.device)
    table = load_table(args.data)
    data = TwoViews([table.root / f for f in table.files], args.size)
    torch.manual_seed(args.seed)
    model = METHODS[args.method](build_backbone()).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    sampler = torch.utils.data.RandomSampler(
        data, replacement=True, num_samples=args.batch_size * (args.steps + 3)
    )
    batches = torch.utils.data.DataLoader(
        data,
        args.batch_size,
        sampler=sampler,
        num_workers=args.workers,
        drop_last=True,
        pin_memory=device.type == "cuda",
    )
    waited, stream = 0.0, iter(batches)
    for step in range(args.steps + 3):
        if step == 3:  # the loader's queue has filled and the operators are warm
            began, waited = time.perf_counter(), 0.0
        clock = time.perf_counter()
        view1, view2 = next(stream)
        waited += time.perf_counter() - clock
        loss = model(view1.to(device, non_blocking=True), view2.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    float(loss.detach())  # waits for the device
    seconds = time.perf_counter() - began
    return {
        "loader": "usual",
        "size": args.size,
        "batch_size": args.batch_size,
        "precision": "fp32",
        "images_per_s": args.steps * args.batch_size / seconds,
        "data_wait": waited / seconds,
    }


def report(rows: pd.DataFrame) -> None:
    columns = ["loader_images_per_s", "model_images_per_s", "images_per_s", "data_wait", "peak_memory_gb"]
    table = rows.groupby("loader", sort=False)[[c for c in columns if c in rows]].agg(
        ["median", "min", "max"]
    )
    print(table.to_string(float_format="{:.3g}".format))
    rates = rows.pivot(index="turn", columns="loader", values="images_per_s")
    if "usual" in rates:
        for loader in rates.columns.drop("usual"):
            ratio = rates[loader] / rates["usual"]
            print(
                f"{loader} / usual stack: {ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f}, n = {len(ratio)})"
            )


if __name__ == "__main__":
    with common.one_line_errors():
        main()

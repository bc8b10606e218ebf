"""paper.py: the data it finds, the plan it makes, and the whole road on tiny images."""

import base64
import html.parser
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, picture, refused
from matplotlib import pyplot as plt
from PIL import Image
from test_readme import options

import paper
from data.synthetic import write_scenes
from models import METHODS
from models.backbone import WeightsError
from plots import tables
from plots.report import write_report

TINY = paper.Settings(32, "yaml", 100, [50, 100], [0, 1], 1, [])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder that holds tiny class folders (129, 3 and 12 images), tiny mixed scenes and something else."""
    root, rng = tmp_path_factory.mktemp("both sets"), np.random.default_rng(0)
    for k in range(3):
        (root / "patches 1" / f"{k} é%").mkdir(parents=True)
        for i in range(48):
            Image.fromarray(picture(rng, 32)).save(root / "patches 1" / f"{k} é%" / f"{i}.jpg", quality=95)
    write_scenes(root / "mixed é%", layout="mixed", count=60, size=32, seed=0)
    (root / "notes").mkdir()
    return root


@pytest.fixture
def quick(monkeypatch):
    """Tiny settings, no measurement, no ImageNet weights."""

    def no_weights(arch):
        raise WeightsError("no network")

    monkeypatch.setattr(paper, "SMALL", TINY)
    monkeypatch.setattr(paper, "images_per_second", lambda size, seconds: (100.0, "cpu"))
    monkeypatch.setattr(paper, "imagenet_weights", no_weights)


# Data


def test_finds_both_datasets(both, folder):
    assert paper.find_data(both, None) == (both / "patches 1", both / "mixed é%")
    assert paper.find_data(folder, both / "mixed é%") == (folder, both / "mixed é%")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--data", "{both}/nowhere"], "no such folder"),
        (["--data", "{both}/mixed é%"], "found 0 folders of class folders"),
        (["--land", "{both}/mixed é%"], "--land without --data"),
        (["--data", "{both}/mixed é%", "--land", "{both}/patches 1"], "has no class fractions"),
        (["--data", "{folder}", "--land", "{both}/mixed é%"], "no labelled image is in the val split"),
        (["--recipes", "{both}"], "has no barlow.yaml"),
        (["--data", "{both}/mixed é%", "--land", "{both}/mixed é%"], "are both called mixed é%"),
        (["--epochs", "0"], "--epochs"),
    ],
)
def test_refuses(flags, said, both, folder, tmp_path, capsys, quick):
    assert said in refused(
        capsys, paper.main, "--small", "--out", tmp_path, *(f.format(both=both, folder=folder) for f in flags)
    )


@pytest.mark.parametrize(
    "text, said",
    [("epochs: [1", "not readable as YAML"), ("epochs: abc", "not a whole number"), ("lrr: 0.1", "nearest")],
)
def test_names_a_broken_recipe_before_it_begins(text, said, both, tmp_path, capsys, quick):
    for method in METHODS:
        (tmp_path / f"{method}.yaml").write_text(text if method == "simsiam" else f"method: {method}\n")
    error = refused(capsys, paper.main, "--small", "--data", both, "--recipes", tmp_path, "--out", tmp_path)
    assert "simsiam.yaml" in error and said in error


def test_refuses_a_class_without_training_images_before_it_begins(both, tmp_path, capsys, quick):
    for split, classes in (("train", "ab"), ("val", "ab"), ("test", "abc")):
        for name in classes:
            (tmp_path / "odd" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32)).save(tmp_path / "odd" / split / name / f"{i}.png")
    error = refused(
        capsys,
        paper.main,
        "--small",
        "--data",
        tmp_path / "odd",
        "--land",
        both / "mixed é%",
        "--out",
        tmp_path,
    )
    assert "none of them with class c" in error


def test_damaged_times_begin_anew(tmp_path):
    for text in ("", "garbage", 'command,seconds\n"a', "command,seconds\na,b\n"):
        (tmp_path / "steps.csv").write_text(text)
        assert paper.read_times(tmp_path / "steps.csv") == {}


def test_only_one_at_a_time(both, tmp_path, capsys, quick):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, time; f = open(r'{tmp_path}/.lock', 'w'); "
            "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    try:
        assert "another paper.py" in refused(capsys, paper.main, "--small", "--data", both, "--out", tmp_path)
    finally:
        holder.kill()


# The plan


@pytest.mark.parametrize("flags", [[], ["--tune"], ["--small"], ["--epochs", "3"]])
def test_commands_parse_and_cost_what_they_do(flags, both, tmp_path):
    args = paper.flags().parse_args([*flags, "--out", str(tmp_path)])
    settings = (paper.SMALL if args.small else paper.PAPER)._replace(ratios=[50, 100])  # of few images
    args.recipes = ROOT / settings.recipes
    steps = paper.plan(args, settings, both / "patches 1", both / "mixed é%", ["imagenet"], "simclr")
    for step in steps:
        name, *words = step.command
        if name.endswith(".py"):
            script = name.removesuffix(".py")
            parsed, rest = options(script).parse_known_args(words)
            if script == "tune":
                options("train_ssl").parse_args(rest)
            assert script == "tune" or not rest
            if script == "train_ssl":
                assert step.passes == pytest.approx(6 * 129 * parsed.epochs * parsed.subset, rel=1e-3)
    text = "\n".join(map(paper.text_of, steps))
    assert text.count("train_ssl.py") == 4 and text.count("tune.py") == 4 * ("--tune" in flags)
    assert "imagenet" in text and shlex.quote(str(tmp_path / "simclr" / "backbone.pth")) in text
    if not flags:
        assert (
            "--epochs 500" in text
            and "--protocol paper" in text
            and "--ratios 50 100 --seeds 42 5 97 123 256" in text
        )
    if flags == ["--tune"]:  # the grid's 40 % of the images, 1,616 epochs
        assert next(s for s in steps if s.name.startswith("tune")).passes == pytest.approx(
            6 * 129 * 0.4 * 1616
        )


def test_best_is_by_macro_f1_on_test_among_the_methods(tmp_path):
    rows = [
        ("barlow", "test", "f1_macro", 0.5),
        ("moco", "test", "f1_macro", 0.6),
        ("simclr", "test", "f1_macro", 0.4),
        ("simclr", "val", "f1_macro", 0.9),
        ("barlow", "test", "f1_micro", 0.9),
        ("imagenet", "test", "f1_macro", 0.8),
    ]
    pd.DataFrame(rows, columns=["init", "split", "metric", "value"]).to_csv(tmp_path / "r.csv")
    assert paper.best_method(tmp_path / "r.csv") == "moco"


# The report


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_holds_everything_itself(tmp_path):
    figure = plt.figure(figsize=(1, 1))
    figure.savefig(tmp_path / "curves.png")
    plt.close(figure)
    shown = pd.DataFrame({"Name": ["a|b <i>", "c"], "Score": ["0.5 ± 0.1", "−0.2"]})
    table = tables.Sheet(shown, np.array([[False, True], [False, False]]), shown)
    (tmp_path / "table5-x.md").write_text(tables.markdown(table, "Caption"))
    (tmp_path / "index.csv").write_text(
        'stem,kind,caption\ntable5-x,table,"RMSE, p < .05"\ncurves,figure,Curves & more\n'
    )
    write_report(tmp_path / "report.html", "Title", ["one & two"], tmp_path, {"Commands": ["python <x>"]})
    page = Page((tmp_path / "report.html").read_text())
    assert (
        page.open == []
        and "one & two" in page.text
        and "python <x>" in page.text
        and "RMSE, p < .05" in page.text
    )
    (source,) = page.sources
    assert (
        base64.b64decode(source.removeprefix("data:image/png;base64,"))
        == (tmp_path / "curves.png").read_bytes()
    )
    text = (tmp_path / "report.html").read_text()
    assert text.index("<h2>Pretraining") < text.index("<h2>Land-cover") < text.index("<h2>Commands")
    assert '<td class="left">a|b &lt;i&gt;</td><td><b>0.5 ± 0.1</b></td>' in text


# The whole road


def test_whole_paper_on_tiny_images(both, tmp_path, quick, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--small", "--data", str(both), "--epochs", "1", "--out", "small"]
    paper.main(flags)
    printed = capfd.readouterr().out
    assert "ImageNet-1k is left out: no network" in printed
    plan = printed[: printed.index("left out")]
    assert re.search(r"takes about [\d.]+ min", plan) and all(
        f"train_ssl.py --method {m}" in plan for m in METHODS
    )
    best = paper.best_method(Path("small/probes/results.csv"))
    text = Path("small/report.html").read_text()
    page = Page(text)
    assert (
        page.open == []
        and len(page.sources) >= 6
        and all(s.startswith("data:image/png") for s in page.sources)
    )
    assert (
        "ImageNet-1k is left out" in page.text
        and f"small/{best}/backbone.pth" in page.text
        and "torch" in page.text
    )
    rows = pd.read_csv("small/transfer/results.csv")
    assert (
        set(rows.init) == {"random", best}
        and set(rows.task) == {"fraction", "scene"}
        and set(rows.ratio) == {50, 100}
    )


def test_a_killed_call_takes_its_step_with_it(both, tmp_path):
    """SIGKILL of paper.py: the training it began saves and ends, so that the next call finds no other at work."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import paper; paper.images_per_second = lambda *_: (100.0, 'cpu'); "
        f"paper.SMALL = paper.Settings(32, 'yaml', 100, [50, 100], [0, 1], 1, []); paper.main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--small", "--data", str(both), "--epochs", "5000", "--out", "small"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, until = tmp_path / "small" / "barlow" / "log.csv", time.time() + 120
    while not log.exists():
        assert process.poll() is None and time.time() < until
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines, until = None, time.time() + 60
    while lines != (lines := len(log.read_text().splitlines())):  # stands still once the training has ended
        assert time.time() < until
        time.sleep(2)
    assert 1 < lines < 5000 and (tmp_path / "small" / "barlow" / "checkpoint.pt").exists()

"""paper.py: the data it finds, the plan it makes, and the whole road on tiny images."""

import base64
import contextlib
import dataclasses
import html.parser
import importlib
import io
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, picture, refused
from matplotlib import pyplot as plt
from PIL import Image
from test_readme import options

import common
import paper
import train_ssl
import transfer
import tune
from common import ConfigError, DataError
from data.synthetic import write_scenes
from data.tables import Table
from models import METHODS
from plots import style, tables
from plots.report import write_report

TINY = paper.SMALL._replace(size=32, seen=100, ratios=[50, 100], seeds=[0, 1], epochs=1)
RECIPE = {"epochs": 3, "subset": 1.0}


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
    """Tiny settings, no measurement, no ImageNet weights, recipes that are not asked for."""
    monkeypatch.setattr(paper, "SMALL", TINY)
    monkeypatch.setattr(paper, "images_per_second", lambda size: (100.0, "cpu"))
    monkeypatch.setattr(paper, "without_imagenet", lambda: "no network")
    monkeypatch.setattr(paper, "resolved_recipes", lambda study: dict.fromkeys(METHODS, RECIPE))


def in_this_process(commands):
    """`paper.answers` without new processes: the scripts' main, called here."""
    printed = []
    for script, *words in commands:
        module = importlib.import_module(script.removesuffix(".py"))
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            module.main(words)
        printed.append(out.getvalue())
    return printed


def study_of(*flags):
    return paper.read_study(paper.build_parser().parse_args([str(flag) for flag in flags]))


# Data


def test_finds_both_datasets(both, folder):
    assert paper.find_data(both, None) == (both / "patches 1", both / "mixed é%")
    assert paper.find_data(folder, both / "mixed é%") == (folder, both / "mixed é%")


def test_one_of_several_datasets_is_not_taken(both, tmp_path):
    for name, folder in (("a", "patches 1"), ("b", "patches 1"), ("land", "mixed é%")):
        (tmp_path / name).symlink_to(both / folder)
    with pytest.raises(DataError, match="found 2 folders of class folders and 1 with class fractions"):
        paper.find_data(tmp_path, None)


def test_scenes_that_are_there_are_not_written_again(tmp_path):
    study = study_of("--small", "--out", tmp_path)
    assert [step.name for step in paper.scenes_to_write(study)] == ["pure scenes", "mixed scenes"]
    (tmp_path / "scenes" / "pure").mkdir(parents=True)
    assert [step.name for step in paper.scenes_to_write(study)] == ["mixed scenes"]


def test_no_command_takes_a_folder_for_a_flag():
    assert paper.no_flag(Path("-x")) == Path("-x").absolute() and paper.no_flag(Path("x")) == Path("x")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--data", "{both}/nowhere"], "no such folder"),
        (["--data", "{both}/notes"], "found 0 folders of class folders"),
        (["--data", "{both}/mixed é%"], "is itself the dataset with class fractions: give --data PATCHES"),
        (["--data", "{folder}"], "is itself a dataset of class folders: give --data PATCHES --land LAND"),
        (["--land", "{both}/mixed é%"], "--land without --data"),
        (["--data", "{both}/mixed é%", "--land", "{both}/patches 1"], "has no class fractions"),
        (["--data", "{folder}", "--land", "{both}/mixed é%"], "no labelled image is in the val split"),
        (["--recipes", "{both}"], "has no barlow.yaml"),
        (["--data", "{both}/mixed é%", "--land", "{both}/mixed é%"], "are both called mixed é%"),
        (["--split", "spatial"], "--split without --data"),
        (["--data", "{both}", "--splits", "{both}/notes"], "notes"),
        (["--epochs", "0"], "--epochs"),
        (["--data", "{both}", "--out", "{both}/out"], "lies inside the data: name another place, by --out"),
    ],
)
def test_refuses(flags, said, both, folder, tmp_path, capsys, quick):
    words = [flag.format(both=both, folder=folder) for flag in flags]
    assert said in refused(capsys, paper.main, "--small", "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_names_every_broken_recipe_before_it_begins(both, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper, "SMALL", TINY)
    texts = {"barlow": "epochs: [1", "moco": "epochs: abc", "simclr": "lrr: 0.1", "simsiam": "epochs: 2"}
    for method, text in texts.items():
        (tmp_path / f"{method}.yaml").write_text(text)
    words = ["--small", "--data", both, "--recipes", tmp_path, "--out", tmp_path / "out"]
    error = refused(capsys, paper.main, *words)
    for method, said in (
        ("barlow", "not readable as YAML"),
        ("moco", "not a whole number"),
        ("simclr", "nearest"),
    ):
        assert f"{method}.yaml" in error and said in error
    assert "simsiam" not in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "gpus", "ranks"),
    [
        ({"batch_size": 512, "bn_splits": None}, 0, 1),
        ({"batch_size": 512, "bn_splits": None}, 3, 2),
        ({"batch_size": 512, "bn_splits": None}, 8, 8),
        ({"batch_size": 512, "bn_splits": 1}, 8, 1),
        ({"batch_size": 128, "bn_splits": 4}, 8, 4),
    ],
)
def test_a_pretraining_takes_the_gpus_that_its_recipe_divides_among(monkeypatch, recipe, gpus, ranks):
    monkeypatch.setattr(paper, "gpus", lambda: gpus)
    assert paper.ranks_for(recipe) == ranks


def test_refuses_a_class_without_training_images_before_it_begins(both, tmp_path, capsys, quick):
    for split, classes in (("train", "ab"), ("val", "ab"), ("test", "abc")):
        for name in classes:
            (tmp_path / "odd" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "odd" / split / name / f"{i}.png")
    words = ["--small", "--data", tmp_path / "odd", "--land", both / "mixed é%", "--out", tmp_path]
    assert "no training image has class c" in refused(capsys, paper.main, *words)


def test_a_share_of_the_labels_that_lacks_a_class_is_refused_before_it_begins(both, tmp_path):
    """One training image holds some of it."""
    study = study_of("--data", both, "--out", tmp_path)
    table, fractions = study.land.table, study.land.table.fractions.copy()
    fractions[:, 0] = np.arange(len(table)) == np.flatnonzero(table.split == "train")[0]
    rare = study.land._replace(table=dataclasses.replace(table, fractions=fractions))
    with pytest.raises(DataError, match=r"--ratios 1 leaves \d+ training images .* none of them with class"):
        paper.check_subsets(study._replace(land=rare))
    paper.check_subsets(study._replace(land=rare, settings=TINY._replace(ratios=[100])))


def test_a_dataset_counts_labelled_images_of_every_class():
    labels, split = np.array([0, 1, 0, 0, 1]), np.array(["train", "train", "val", "val", "test"])
    table = Table(ROOT, np.array(list("abcde")), labels, split, ["a", "b"])
    found = paper.dataset_of(table, ROOT, [])
    assert found[1:6] == (5, 2, 2, 1, 0), "val has none of class b"
    with pytest.raises(DataError, match="val"):
        paper.dataset_of(dataclasses.replace(table, labels=np.array([0, 1, -1, -1, 1])), ROOT, [])


def test_damaged_times_begin_anew(tmp_path):
    for text in ("", "garbage", 'command,seconds\n"a', "command,seconds\na,b\n"):
        (tmp_path / "steps.csv").write_text(text)
        assert paper.read_times(tmp_path / "steps.csv") == {}
    for seconds in (1.26, 2.5):
        paper.add_time(tmp_path / "steps.csv", "python x.py 'a b'", seconds)
    assert paper.read_times(tmp_path / "steps.csv") == {"python x.py 'a b'": 3.8}


def test_only_one_at_a_time(both, tmp_path, capsys, quick):
    code = (
        f"import sys, time, pathlib; sys.path.insert(0, {str(ROOT)!r}); import common\n"
        f"with common.hold(pathlib.Path({str(tmp_path)!r}), 'x'): print(flush=True); time.sleep(300)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        error = refused(capsys, paper.main, "--small", "--data", both, "--out", tmp_path)
        assert "paper.py is at work" in error and str(holder.pid) in error
    finally:
        holder.kill()


# The plan


@pytest.mark.parametrize("flags", [[], ["--tune"], ["--small"], ["--epochs", "3"], ["--split", "paper"]])
def test_commands_parse_and_cost_what_they_do(flags, both, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "answers", in_this_process)
    monkeypatch.setattr(paper, "PAPER", paper.PAPER._replace(ratios=[50, 100]))  # of few images
    study = study_of(*flags, "--data", both, "--out", tmp_path)
    recipes = paper.resolved_recipes(study)
    steps = [
        *paper.first_steps(study, recipes, ["imagenet"]),
        *paper.last_steps(study, ["imagenet"], "simclr"),
    ]
    for step in steps:
        name, *words = step.command
        if not name.endswith(".py"):
            continue
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
        assert "--epochs 500" in text and "--protocol paper" in text
        assert "--ratios 50 100 --seeds 42 5 97 123 256" in text
    if flags == ["--tune"]:  # the grid's 40 % of the images, 1,616 epochs
        (search, *_) = [step for step in steps if step.command[0] == "tune.py"]
        assert search.passes == pytest.approx(6 * 129 * 0.4 * 1616)
        check_search(steps)
    if "--split" in flags:  # of the pretraining images, which transfer.py probes too
        split = [step for step in steps if "--split" in step.command]
        assert [step.command[0] for step in split] == ["train_ssl.py"] * 4 + ["transfer.py"]


def check_search(steps):
    """Trials are of the paper's recipe, ranked by the loss; the 500 epochs have the recipe's warm-up."""
    search, training = steps[2:4]  # after the checks of two folders
    _, tried = tune.read_arguments(search.command[1:])
    words = ["--method", "barlow", *tried.fixed]
    trial = train_ssl.read_flags(train_ssl.build_parser(), words)
    assert tried.metric == "loss" and trial.config == str(Path(paper.PAPER.recipes) / "barlow.yaml")
    assert (trial.jitter, trial.blur, trial.lambda_, trial.quarter_turns) == (0.4, 0.5, 0.005, False)
    assert (trial.warmup_epochs, trial.subset) == (1, 0.4)
    trained = options("train_ssl").parse_args(training.command[1:])
    assert trained.warmup_epochs == 10 and trained.config.endswith("tune/barlow/best.yaml")


def test_the_probes_of_table_4_are_the_papers_but_for_small(both, tmp_path):
    """Fifty epochs of SGD over five seeds, which cost more than solved heads."""
    steps = []
    for flags in ([], ["--small"]):
        study = study_of(*flags, "--data", both, "--out", tmp_path)
        steps.append(paper.probes(study, []))
    args, small = (transfer.read_flags(transfer.build_parser(), step.command[1:]) for step in steps)
    assert (args.probe, args.epochs, args.lr, args.momentum, args.weight_decay) == ("sgd", 50, 0.001, 0, 0)
    assert (args.schedule, args.epoch_choice, args.statistics) == ("constant", "common", "data")
    assert args.seed_list == [42, 5, 97, 123, 256] and small.seed_list == [0]
    assert (small.probe, small.statistics) == ("lbfgs", "backbone")
    for one in (args, small):
        assert (one.task, one.mode, one.ratios) == ("scene", ["linear"], [100])
        assert "channels" in one.init and one.save_embeddings
    assert steps[1].passes == 5 * 144
    assert steps[0].passes == 9 * 144 + 5 * 6 * 50 * 3 * 129 / 100


def test_the_papers_transfer_costs_the_test_images_of_every_epoch(both, tmp_path):
    study = study_of("--data", both, "--out", tmp_path)
    settings = study.settings._replace(ratios=[50, 100])
    land = study.land
    assert (land.train, land.val, land.test) == (42, 6, 12)
    with_test, without = (
        paper.transfer(study._replace(settings=one), "scene", [], "moco").passes
        for one in (settings, settings._replace(protocol=[]))
    )
    assert with_test - without == 2 * 100 * 5 * 2 * land.test  # inits, epochs, seeds, ratios
    seen = 5 * (0.5 + 1) * land.train
    assert without == 2 * (100 * (3 * seen + 5 * 2 * land.val) + land.images)


def test_a_search_is_ranked_as_the_user_says(both, tmp_path, capsys):
    study = study_of("--tune", "--metric", "knn_macro_f1", "--data", both, "--out", tmp_path)
    words = paper.search(study, "moco", study.recipes / "moco.yaml", tmp_path)
    assert tune.read_arguments(words[1:])[1].metric == "knn_macro_f1"
    assert "--metric without --tune" in refused(capsys, paper.main, "--data", both, "--metric", "loss")


def test_a_dry_run_of_the_built_in_scenes_writes_nothing(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.chdir(tmp_path)
    paper.main(["--small", "--dry-run"])
    printed = capsys.readouterr().out
    assert "ImageNet-1k takes part if its weights can be had" in printed and " imagenet " in printed
    assert printed.count("data.synthetic") == 2 and "BEST/backbone.pth" in printed
    assert list(tmp_path.iterdir()) == []
    lines = [line.strip() for line in printed.splitlines() if " python " in line]
    modules = [line for line in lines if " -m " in line]
    assert modules and all(line.startswith("PYTHONPATH=") for line in modules)
    command = (
        modules[0].split(" --layout")[0].replace(" python ", f" {shlex.quote(sys.executable)} ") + " --help"
    )
    said = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode == 0 and "usage" in said.stdout, said.stderr
    scripts = [line.split()[1] for line in lines if line.startswith("python ")]
    assert len(scripts) == 8 and all(
        (tmp_path / script).samefile(ROOT / Path(script).name) for script in scripts
    )


def test_commands_are_plain_in_the_folder_of_the_scripts(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert paper.text_of(paper.Step("", ["tune.py", "a b"])) == "python tune.py 'a b'"
    assert paper.text_of(paper.Step("", ["-m", "data.check"], ranks=2)).startswith("torchrun --nproc")
    assert paper.text_of(paper.Step("", ["-m", "data.check", "x"])) == "python -m data.check x"


def test_the_built_in_scenes_are_as_many_as_the_plan_says(tmp_path):
    """The rule that the plan uses, on fewer scenes."""
    from data.tables import load_table

    write_scenes(tmp_path / "pure", layout="pure", count=29 * 40, size=16)
    table = load_table(tmp_path / "pure")
    counts = paper.split_counts(40)
    assert [int((table.split == name).sum()) for name in ("train", "val", "test")] == [29 * n for n in counts]
    patches, land = paper.built_in(tmp_path)
    assert (patches.images, patches.train, patches.val) == (2900, 2610, 58)
    assert (land.images, land.train, land.val, land.test) == (1500, 1050, 150, 300)


def test_the_rate_is_measured():
    rate, device = paper.images_per_second(32, seconds=0.5)
    assert rate > 0 and device in ("cpu", "cuda")


def test_best_is_by_macro_f1_on_val_among_the_methods(tmp_path):
    rows = [
        ("barlow", "val", "f1_macro", 0.5),
        ("moco", "val", "f1_macro", 0.6),
        ("simclr", "val", "f1_macro", 0.4),
        ("simclr", "test", "f1_macro", 0.9),
        ("barlow", "val", "f1_micro", 0.9),
        ("imagenet", "val", "f1_macro", 0.8),
    ]
    columns = ["init", "split", "metric", "mean"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "s.csv", index=False)
    assert paper.best_method(tmp_path / "s.csv") == "moco"
    pd.DataFrame([*rows, ("moco", "val", "f1_macro", 0.7)], columns=columns).to_csv(
        tmp_path / "s.csv", index=False
    )
    with pytest.raises(ConfigError, match="moco was probed in several settings.*move .* away"):
        paper.best_method(tmp_path / "s.csv")


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
        "stem,kind,caption,number,part\n"
        'table5-x,table,"RMSE, p < .05",Table V,\ncurves,figure,Curves & more,,\n'
    )
    write_report(tmp_path / "report.html", "Title", ["one & two"], tmp_path, {"Commands": ["python <x>"]})
    page = Page((tmp_path / "report.html").read_text())
    assert (
        page.open == []
        and "one & two" in page.text
        and "python <x>" in page.text
        and "Table V. RMSE, p < .05" in page.text
    )
    (source,) = page.sources
    assert (
        base64.b64decode(source.removeprefix("data:image/png;base64,"))
        == (tmp_path / "curves.png").read_bytes()
    )
    text = (tmp_path / "report.html").read_text()
    assert text.index("<h2>Pretraining") < text.index("<h2>Land-cover") < text.index("<h2>Commands")
    assert '<td class="left">a|b &lt;i&gt;</td><td><b>0.5 ± 0.1</b></td>' in text


def test_sentences_average_the_ratios_of_the_papers_tables(both, tmp_path):
    study = study_of("--data", both, "--out", tmp_path)
    pair = {"init": "moco", "baseline": "random", "mode": "linear", "baseline_value": 0.2, "improvement": 50}
    pair |= {"wins": 1, "ties": 2, "cells": 4, "n": 5}
    means = {"mean": (0.1, "1 5 100"), "mean without 1 %": (0.3, "5 100"), "5": (0.4, "5")}
    rows = [pair | {"ratio": name, "value": value, "ratios": over} for name, (value, over) in means.items()]
    for part in ("probes", "figures"):
        (tmp_path / part).mkdir()
    for task in ("fraction", "scene"):
        pd.DataFrame(rows).to_csv(tmp_path / "figures" / f"comparison-{task}-mixed_é_.csv", index=False)
    columns = ["init", "split", "metric", "mean"]
    rows = [("moco", split, "f1_macro", 0.5) for split in ("val", "test")]
    rows += [("barlow", "test", "f1_macro", 0.4), ("simclr", "test", "f1_macro", 0.6)]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "probes" / "summary.csv", index=False)
    said = "\n".join(paper.findings(study, "moco"))
    assert "macro F1: SimCLR 0.600, MoCo v2 0.500, Barlow Twins 0.400." in said
    assert said.count("over 5 and 100 % of the labels 0.300 against 0.200") == 2 and "0.100" not in said
    assert said.count("ahead in 1 of 4 class and ratio cells, equal in 2") == 2
    said = "\n".join(paper.findings(study._replace(settings=paper.SMALL), "moco"))
    assert said.count("over 1, 5 and 100 % of the labels 0.100 against 0.200") == 2 and "0.300" not in said
    (tmp_path / "figures" / "comparison-scene-mixed_é_.csv").unlink()  # as where every cell has failed
    said = "\n".join(paper.findings(study, "moco"))
    assert "on fractions" in said and "on scenes" not in said


def test_the_report_says_why_a_method_was_chosen(both, tmp_path):
    study = study_of("--data", both, "--out", tmp_path)
    assert (study.patches.val, study.patches.rarest) == (3, 1)
    (tmp_path / "probes").mkdir()
    f1 = {"moco": 0.6, "barlow": 0.5, "imagenet": 0.9}
    rows = [(init, "val", "f1_macro", value) for init, value in f1.items()]
    columns = ["init", "split", "metric", "mean"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "probes" / "summary.csv", index=False)
    said = paper.why_chosen(study, "moco")
    assert said.startswith("MoCo v2 was transferred: its probe has the highest macro F1 on val, 0.600")
    assert "(next: Barlow Twins, 0.500), on 3 images. The rarest class has 1 of them" in said
    many = study._replace(patches=study.patches._replace(val=4861, rarest=10))
    assert paper.why_chosen(many, "moco").endswith("on 4,861 images.")


# The whole road


def test_whole_paper_on_tiny_images(both, tmp_path, quick, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(style.RC, "savefig.dpi", 100)
    paper.main(["--small", "--data", str(both), "--epochs", "1", "--out", "small"])
    printed = capfd.readouterr().out
    assert "ImageNet-1k is left out: no network" in printed
    plan = printed[: printed.index("left out")]
    assert re.search(r"takes about [\d.]+ min", plan)
    assert all(f"train_ssl.py --method {method}" in plan for method in METHODS)
    best = paper.best_method(Path("small/probes/summary.csv"))
    page = Page(Path("small/report.html").read_text(encoding="utf-8"))
    assert page.open == [] and len(page.sources) >= 6
    assert all(source.startswith("data:image/png") for source in page.sources)
    for text in ("ImageNet-1k is left out", f"small/{best}/backbone.pth", "torch", "--init imagenet"):
        assert text in page.text
    pretraining = page.text[page.text.index("Pretraining: loss") : page.text.index("Land-cover fractions")]
    assert "F1 of linear probes on patches 1" in pretraining and "Differences on patches 1" in pretraining
    assert "F1 of linear probes on mixed" not in page.text
    rows = pd.read_csv("small/transfer/results.csv")
    assert set(rows.init) == {"random", best}
    assert set(rows.task) == {"fraction", "scene"} and set(rows.ratio) == {50, 100}
    times = paper.read_times(Path("small/steps.csv"))
    assert len(times) == 10 and all(command in page.text for command in times)


KILLED = """
import sys; sys.path.insert(0, {root!r})
import paper
paper.SMALL = paper.SMALL._replace(size=32, seen=100, ratios=[50, 100], seeds=[0, 1], epochs=1)
paper.images_per_second = lambda *_: (100.0, "cpu")
paper.without_imagenet = lambda: "no network"
paper.resolved_recipes = lambda study: dict.fromkeys(paper.METHODS, dict(epochs=1, subset=1.0))
paper.first_steps = lambda study, recipes, imagenet: list(paper.pretraining(study, recipes))  # no checks
paper.main(sys.argv[1:])
"""


def test_a_killed_call_takes_its_step_with_it(both, tmp_path):
    """SIGKILL of paper.py: the training it began saves and ends; the next call finds no other at work."""
    words = ["--small", "--data", str(both), "--epochs", "5000", "--out", "small"]
    said = tmp_path / "said.txt"
    with open(said, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED.format(root=str(ROOT)), *words],
            cwd=tmp_path,
            stdout=file,
            stderr=file,
        )
    log, until = tmp_path / "small" / "barlow" / "log.csv", time.time() + 900
    try:
        while not log.exists():
            assert process.poll() is None and time.time() < until, said.read_text()
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lines, until = None, time.time() + 300
    while lines != (lines := len(log.read_text().splitlines())):  # stands still once the training has ended
        assert time.time() < until
        time.sleep(5)
    assert 1 < lines < 5000 and (tmp_path / "small" / "barlow" / "checkpoint.pt").exists()


@pytest.mark.parametrize("subset, share", [("0.4", 0.4), ("4e-1", 0.4), ("[0.2, 0.4]", 1)])
def test_the_passes_of_a_search_are_those_of_its_share_of_the_images(subset, share, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "answers", in_this_process)
    (tmp_path / "grid.yaml").write_text(f"lr: [0.1, 0.2]\nsubset: {subset}\nmin_epochs: 9\n")
    trials = 4 if subset.startswith("[") else 2
    assert paper.search_passes(tmp_path / "grid.yaml") == pytest.approx(9 * trials * share)


@pytest.mark.parametrize("share", [0.3, 3.9, 9.4, 9.9])
def test_a_small_pretraining_sees_as_many_images_whatever_the_folder_holds(share):
    images = round(paper.SMALL.seen / share)
    study = types.SimpleNamespace(
        settings=paper.SMALL, patches=types.SimpleNamespace(train=images), epochs=None
    )
    epochs, subset = paper.length(study, {"epochs": 1, "subset": 1.0})
    assert epochs * subset * images == pytest.approx(paper.SMALL.seen, rel=0.05)
    assert epochs >= 4 and 0 < subset <= 1


def test_the_plan_tells_the_hours_of_its_steps(monkeypatch, capsys):
    """Two views of an image, forward and backward, are six passes."""
    monkeypatch.setattr(paper, "START", 0)
    monkeypatch.setattr(paper, "scenes_to_write", lambda study: [])
    first, last = (
        paper.Step(name, ["plot.py"], 6 * 100 * 3600 * hours) for name, hours in (("first", 2), ("last", 1))
    )
    monkeypatch.setattr(paper, "last_steps", lambda *words: [last])
    paper.show_plan(types.SimpleNamespace(settings=paper.SMALL), [first], [], [], 100.0, "cpu")
    said = capsys.readouterr().out
    assert "takes about 3.0 h" in said and " 2.0 h  first" in said and " 1.0 h  last" in said


@pytest.mark.parametrize(
    "code, may_lack, end", [(0, True, True), (1, True, False), (1, False, 2), (2, True, 2)]
)
def test_a_step_that_lacks_some_and_may_is_no_failure(code, may_lack, end, tmp_path, capfd):
    step = paper.Step("x", ["-c", f"raise SystemExit({code})"], may_lack=may_lack)
    if end in (True, False):
        assert paper.run(step, tmp_path / "steps.csv") is end
        assert list(paper.read_times(tmp_path / "steps.csv")) == [paper.text_of(step)]
        return
    with pytest.raises(SystemExit) as stop:
        paper.run(step)
    assert stop.value.code == end


def test_copies_of_a_step_share_the_cores_and_one_of_them_speaks(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "cores", lambda: 8)
    for gpus, copies in ((0, 8), (3, 3)):
        monkeypatch.setattr(paper, "gpus", lambda: gpus)
        assert paper.copies() == copies
    monkeypatch.setattr(paper, "gpus", lambda: 0)
    code = "import losses, os; print('sp' + 'oken'); open(os.environ['LOCAL_RANK'] + os.environ['{}'], 'w')"
    paper.run(paper.Step("x", ["-c", code.format("OMP_NUM_THREADS")], copies=2))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["04", "14"]
    assert capfd.readouterr().out.count("spoken") == 1


def test_what_was_not_drawn_has_its_command_where_there_is_one(tmp_path):
    (tmp_path / "missing.csv").write_text("figures,missing,command\nfig3,Random,\nfig4,SimCLR,python x.py\n")
    assert paper.not_drawn(tmp_path / "missing.csv") == ["fig3: Random", "fig4: SimCLR: python x.py"]

"""plot.py: aggregates against hand-made numbers, its files, and what it says of incomplete input."""

import csv
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, refused
from test_readme import options

import common
import plot
import transfer
from plots import figures, numbers, pretraining, reading, style, tables
from plots.beside_paper import TRANSFERS, compare_paper, facts_of_training, rows_of, unlike_paper
from plots.embeddings import flatten, spread
from plots.missing import (
    Studies,
    cell_flags,
    command_like,
    data_flags,
    find_gaps,
    missing_inits,
    missing_probes,
    setting_flags,
    shown,
)
from plots.pretraining import duration
from plots.report import by_section
from scores import TASKS

matplotlib.use("Agg")
HEADER = [
    "task",
    "data",
    "init",
    "mode",
    "ratio",
    "seed",
    "epoch",
    "split",
    "metric",
    "class",
    "value",
    "lr",
    "momentum",
    "weight_decay",
    "epochs",
    "batch_size",
    "images",
    "seconds",
    "commit",
]
PAPER = ROOT / "results" / "paper"
LONG = [
    "Combinations of Croplands and Natural Vegetation, or Greenhouses among Woody Croplands",
    *(f"Dense Evergreen Needleleaf Forests {i}" for i in range(28)),
]


def row(
    task, init, mode, ratio, seed, metric, name, value, split="test", epoch=1, data="land", images=100, lr=0.1
):
    return [
        task,
        data,
        init,
        mode,
        ratio,
        seed,
        epoch,
        split,
        metric,
        name,
        value,
        lr,
        0.9,
        0,
        1,
        64,
        images,
        1.0,
        "abc",
    ]


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return path


def read(path):
    return numbers.at_chosen_epoch(reading.read_results([path], []))


def results(tmp_path, rows):
    return read(write_rows(tmp_path / "results.csv", rows))


def scene_rows(inits, ratios, seeds, classes, modes=("linear", "finetune")):
    """Scene results whose value is a known function of its cell; the macro F1 is the mean of the classes."""
    rows = []
    for mode, (k, init), ratio, seed in (
        (m, i, r, s) for m in modes for i in enumerate(inits) for r in ratios for s in seeds
    ):
        f1 = [
            round(0.3 + 0.1 * k + 0.001 * ratio + 0.01 * seed + 0.02 * (c % 5) - 0.03 * (seed * c % 3), 5)
            for c in range(len(classes))
        ]
        for metric in TASKS["scene"].tabled:
            rows.append(row("scene", init, mode, ratio, seed, metric, "all", np.mean(f1)))
        rows += [row("scene", init, mode, ratio, seed, "f1", name, value) for name, value in zip(classes, f1)]
    return rows


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small study on disk: both tasks, two seeds with a hole, one pretraining run and its embeddings."""
    root = tmp_path_factory.mktemp("study")
    rows = scene_rows(["random", "imagenet", "barlow"], [5, 100], [1, 2], ["a & b", "c_d", "50%"])
    rows = [r for r in rows if not (r[2] == "barlow" and r[3] == "finetune" and r[4] == 5 and r[5] == 2)]
    fractions = [
        row(
            "fraction",
            init,
            "finetune",
            ratio,
            seed,
            "rmse",
            name,
            0.1 + 0.01 * k + 0.001 * seed * k + ratio / 1e4,
        )
        for k, init in enumerate(["random", "barlow"])
        for ratio in (5, 100)
        for seed in (1, 2)
        for name in ("all", "x", "y")
    ]
    write_rows(root / "results.csv", rows + fractions)
    run = root / "runs" / "barlow"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        yaml.safe_dump({"method": "barlow", "size": 224, "device": "auto", "device_name": "H200"})
    )
    (run / "log.csv").write_text(
        "epoch,loss,chance_loss,effective_rank,knn_macro_f1,images_per_s,seconds\n"
        "1,20,128,5,,1000,90\n2,10,128,9,0.5,1000,90\n"
    )
    rng = np.random.default_rng(0)
    for k, init in enumerate(["barlow", "random"]):
        labels = np.arange(60) % 3
        np.savez(
            root / f"embeddings_{k}.npz",
            features=rng.normal(size=(60, 8)) + 5 * k * labels[:, None],
            labels=labels,
            classes=np.array(["a & b", "c_d", "50%"]),
            init=np.array(init),
        )
    return root


@pytest.fixture(scope="module")
def drawn(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.RC, "savefig.dpi", 100)
        flags = [
            "--runs",
            study / "runs" / "barlow",
            "--results",
            study / "results.csv",
            "--out",
            study / "figures",
        ]
        plot.main([str(flag) for flag in flags])
    return study / "figures"


# The paper's numbers


def paper(number):
    return pd.read_csv(PAPER / f"table{number}.csv", dtype={"class": str})


@pytest.mark.parametrize("number, metric, per_class", [(5, "rmse", "rmse"), (6, "f1_macro", "f1")])
def test_the_papers_means_are_the_means_of_its_classes(number, metric, per_class):
    table = paper(number)
    cells = table[(table.metric == per_class) & (table["class"] != "all")].groupby(["ratio", "init"])["mean"]
    overall = table[(table.metric == metric) & (table["class"] == "all")].set_index(["ratio", "init"])["mean"]
    gap = (cells.mean() - overall).abs()
    assert (cells.count() == 10).all() and len(gap) == 15
    # Both sides are rounded to .0005. One row of Table VI is further off in the paper's text itself.
    assert set(gap.index[gap > 0.001 + 1e-9]) == ({(25, "imagenet")} if number == 6 else set())


def test_the_paper_tables_give_what_its_text_quotes(tmp_path):
    """Section V-C: fine-tuning averages .083/.099/.078 and .643/.530/.653; Barlow Twins beats random."""
    for number, task, quoted in ((5, "fraction", (0.083, 0.099, 0.078)), (6, "scene", (0.643, 0.530, 0.653))):
        rows = [
            row(task, init, mode, ratio, 1, metric, name, mean)
            for init, mode, ratio, metric, name, mean, _ in paper(number).to_numpy()
        ]
        lines = numbers.comparison(results(tmp_path, rows), task, "imagenet").set_index(
            ["ratio", "init", "baseline"]
        )
        line, other = lines.loc[("mean", "barlow", "random")], lines.loc[("mean", "barlow", "imagenet")]
        assert np.round([line.value, line.baseline_value, other.baseline_value], 3) == pytest.approx(quoted)
        assert line.cells == 50 and (task != "fraction" or line.wins == 50)
        gap = {"fraction": 0.0053, "scene": 0.0308}[task]  # of rounded numbers
        assert other.class_difference == pytest.approx(gap, abs=2e-4)


def test_means_say_which_ratios_they_average_and_leave_1_out_as_the_paper(tmp_path):
    rows = [
        row("fraction", init, "finetune", ratio, 1, "rmse", "all", start + ratio / 1000)
        for init, start in (("random", 0.2), ("barlow", 0.1))
        for ratio in (1, 5, 10)
    ]
    lines = numbers.comparison(results(tmp_path, rows), "fraction", None).set_index("ratio")
    assert lines.ratios.to_dict() == {1: "1", 5: "5", 10: "10", "mean": "1 5 10", "mean without 1 %": "5 10"}
    assert lines.loc["mean without 1 %"].value == pytest.approx(0.1075)
    assert lines.loc["mean"].value == pytest.approx(0.1 + 0.016 / 3)
    said = plot.averages(lines.reset_index())
    assert said == "; mean: over 1, 5, 10 %; mean without 1 %: over 5, 10 %"
    assert (
        tables.comparison_sheet(lines.reset_index(), "fraction").shown["Ratio (%)"].iloc[-1]
        == lines.index[-1]
    )
    few = numbers.comparison(results(tmp_path, rows)[lambda r: r.ratio < 10], "fraction", None)
    assert list(few.ratio) == [1, 5, "mean"]


def test_the_paper_beside_itself_differs_by_nothing(tmp_path):
    rows = [
        row(
            "fraction",
            init,
            mode,
            ratio,
            1,
            metric,
            name,
            mean,
            data="any/name",
            images=15_038 * ratio // 100,
        )
        for init, mode, ratio, metric, name, mean, _ in paper(5).to_numpy()
    ]
    configs = {
        "bt": {"method": "barlow", "data": "/data/Sentinel2GlobalLULC_full", "lr": 2e-4, "hidden": 256}
    }
    pairs, gaps = compare_paper(results(tmp_path, rows), configs)
    found = {pair.stem: tables.beside_paper(pair.ours, pair.paper).numbers for pair in pairs}
    assert len(found["compare-table5"]) == 165 and (found["compare-table5"].difference == 0).all()
    flags = found["compare-table3"]
    assert dict(zip(flags.hyperparameter, flags.difference)) == pytest.approx({"hidden": 0, "lr": 1e-4})
    assert [gap.figures for gap in gaps] == ["compare-table4", "compare-table6"]


def test_other_classes_are_not_compared_and_captions_say_what_is_unlike(tmp_path):
    """Land-1.0's table of four classes has as many images as that of ten."""

    def rows(classes):
        about = {"data": "Level_N", "images": 15_038}
        names = ["all", *map(str, range(classes))]
        return [row("fraction", "bt", "finetune", 100, 1, "rmse", name, 0.1, **about) for name in names]

    configs = {"bt": {"method": "barlow", "size": 224, "epochs": 3, "split": "spatial", "subset": 1.0}}
    assert compare_paper(results(tmp_path, rows(4)), configs)[0] == []
    settings = {"fraction finetune": {"size": 64, "statistics": "data"}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "config.yaml").write_text("data: /some/Level_N\nsplits: lists\n")
    (pair,), _ = compare_paper(results(tmp_path, rows(10)), configs)
    assert pair.unlike == [
        "split by lists (there paper)",
        "size in px 64 (there 224)",
        "epochs 1 (there 100)",
        "seeds 1 (there 5)",
        "pretraining split spatial (there paper)",
        "pretraining epochs 3 (there 500)",
    ]
    words = ["--runs", "--results", str(tmp_path / "results.csv"), "--compare-paper", "--format", "png"]
    plot.main([*words, "--out", str(tmp_path / "figures")])
    caption = pd.read_csv(tmp_path / "figures" / "index.csv").set_index("stem").caption["compare-table5"]
    assert "Not as in the paper: split by lists (there paper); size in px 64 (there 224)" in caption


def test_captions_say_how_else_training_was_unlike_the_papers(tmp_path):
    rows = [row("fraction", "bt", "finetune", 100, 1, "rmse", name, 0.1, images=15_038, lr=0.03)
            for name in ["all", *map(str, range(10))]]  # fmt: skip
    odd = {"arch": "resnet50", "loss": "softmax", "epoch_choice": "seed", "schedule": "cosine",
           "augment": True, "start_head": "probe", "statistics": "data"}  # fmt: skip
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"fraction finetune": odd}))
    recipe = yaml.safe_load((ROOT / "yaml/paper/moco.yaml").read_text())
    configs = {"bt": recipe | {"temperature": 0.1, "jitter": 0.4, "quarter_turns": True, "lr": 1}}
    (pair,), _ = compare_paper(results(tmp_path, rows), configs)
    assert pair.unlike == [
        "arch resnet50 (there resnet18)",
        "epochs 1 (there 100)",
        "seeds 1 (there 5)",
        "loss softmax (there bce)",
        "schedule cosine (there constant)",
        "augment yes (there no)",
        "head at the start probe (there random)",
        "epoch chosen by seed (there common)",
        "rate 0.03 (there 0.1)",
        "pretraining temperature 0.1 (there 0.5)",
        "pretraining quarter_turns yes (there no)",
    ]


@pytest.mark.parametrize("number, file", [("IV", "probe"), ("V", "fraction"), ("VI", "scene")])
def test_what_captions_call_the_papers_is_what_its_protocol_sets(number, file):
    table = TRANSFERS[number]
    parser = transfer.build_parser()
    args = common.parse(parser, ["--config", str(ROOT / f"yaml/paper/transfer_{file}.yaml")])
    made = {name: getattr(args, name) for name in (*reading.UNSAID, "loss", "arch", "epoch_choice", "size")}
    names = ("lr", "momentum", "weight_decay", "batch_size")
    rows = pd.DataFrame([{name: getattr(args, name) for name in names}])
    assert made["size"] == 224 and args.epochs == table.epochs and args.task == table.task
    assert unlike_paper(facts_of_training(rows, [made], table)) == []


def test_a_run_on_the_papers_data_is_known_by_name_or_by_its_images(tmp_path):
    runs = {
        "name": {"method": "barlow", "data": "/x/Sentinel2GlobalLULC", "lr": 1e-4},
        "count": {"method": "barlow", "data": "/x/patches", "images": 175_381, "lr": 1e-4},
        "other": {"method": "barlow", "data": "/x/patches", "images": 81, "lr": 1e-4},
    }
    (pair,), _ = compare_paper(results(tmp_path, []), runs)
    assert list(pair.ours.run) == ["name", "count"]


def test_other_data_is_not_compared(tmp_path):
    rows = [
        row("fraction", "random", "finetune", 100, 1, "rmse", "all", 0.1, data="eurosat_mixed", images=2100)
    ]
    configs = {"barlow": {"method": "barlow", "lr": 1e-4, "data": None}}
    pairs, gaps = compare_paper(results(tmp_path, rows), configs)
    assert not pairs and len(gaps) == 4


# Aggregates


def test_the_epoch_is_chosen_by_the_mean_validation_over_the_seeds(tmp_path):
    # seed 1 alone would take epoch 3, the mean takes epoch 2
    val = {1: (0.2, 0.5), 2: (0.3, 0.3), 3: (0.1, 0.9)}
    rows = [
        row("fraction", "random", "linear", 5, seed, "rmse", "all", value, "val", epoch)
        for epoch, values in val.items()
        for seed, value in enumerate(values)
    ]
    rows += [
        row("fraction", "random", "linear", 5, seed, "rmse", "all", 0.1 * epoch + 0.01 * seed, "test", epoch)
        for epoch in val
        for seed in (0, 1)
    ]
    rows += [
        row("fraction", "random", "linear", 5, 0, "rmse", "all", 0.01, split, 4) for split in ("val", "test")
    ]  # one seed only
    assert sorted(results(tmp_path, rows).value) == pytest.approx([0.2, 0.21])


def test_without_validation_the_last_epoch_counts(tmp_path):
    rows = [
        row("scene", "random", "linear", 5, seed, "f1_macro", "all", epoch / 10, epoch=epoch)
        for seed in (0, 1)
        for epoch in (1, 7 + seed)
    ]
    assert sorted(results(tmp_path, rows).value) == [0.7, 0.8]


def test_an_epoch_of_its_own_for_each_seed_is_kept(tmp_path):
    rows = [
        row("scene", "random", "linear", 5, seed, "f1_macro", "all", epoch / 10, split, epoch)
        for seed, epoch in enumerate((4, 4, 9))
        for split in ("val", "test")
    ]
    assert sorted(results(tmp_path, rows).value) == [0.4, 0.4, 0.9]


def test_of_several_settings_one_counts(tmp_path, capsys):
    """Three seeds at rate .1, two better ones at .2: never a mixture; equally many: the better on val."""

    def cells(lr, value, seeds):
        return [
            row("scene", "random", "linear", 5, seed, "f1_macro", "all", value, split, 1, lr=lr)
            for seed in seeds
            for split in ("val", "test")
        ]

    assert set(results(tmp_path, cells(0.1, 0.5, (1, 2, 3)) + cells(0.2, 0.6, (1, 2))).value) == {0.5}
    assert "1 cell run with several settings" in capsys.readouterr().err
    assert set(results(tmp_path, cells(0.1, 0.5, (1, 2)) + cells(0.2, 0.6, (1, 2))).value) == {0.6}


def test_mean_std_and_n_over_the_seeds(tmp_path):
    rows = [
        row("scene", "random", "linear", 5, seed, "f1_macro", "all", value)
        for seed, value in enumerate((0.1, 0.2, 0.6))
    ]
    line = numbers.over_seeds(results(tmp_path, rows)).iloc[0]
    assert (line["mean"], line["std"], line.n) == pytest.approx((0.3, math.sqrt((0.04 + 0.01 + 0.09) / 2), 3))


def test_results_without_classes_are_drawn(tmp_path):
    rows = [
        row("scene", init, "finetune", ratio, seed, "f1_macro", "all", 0.5 + 0.1 * seed)
        for init in ("random", "barlow")
        for ratio in (5, 100)
        for seed in (0, 1)
    ]
    write_rows(tmp_path / "results.csv", rows)
    words = [
        "--runs",
        "--results",
        tmp_path / "results.csv",
        "--format",
        "png",
        "--out",
        tmp_path / "figures",
    ]
    plot.main(list(map(str, words)))
    assert list((tmp_path / "figures").glob("fig6-*.png"))
    assert not list((tmp_path / "figures").glob("fig7*"))


def test_names_that_lead_to_one_file_get_two(tmp_path, monkeypatch):
    """And a caption tells how many seeds there are where initialisations have not as many."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for folder in ("eu 1", "eu_1"):
        for init, seeds in (("random", 3), ("barlow", 1)):
            for seed in range(seeds):
                value = 0.5 + 0.1 * seed
                rows.append(row("scene", init, "linear", 100, seed, "f1_macro", "all", value, data=folder))
    write_rows(tmp_path / "results.csv", rows)
    plot.main(["--runs", "--results", "results.csv", "--format", "png", "--out", "figures"])
    index = pd.read_csv("figures/index.csv")
    assert not index.duplicated(["stem", "kind"]).any() and index.stem.str.startswith("table4").sum() == 2
    assert {"table4-eu_1", "table4-eu_1-2"} <= set(index.stem)
    assert index.caption.str.contains("over 1 to 3 seeds").any()
    assert index.caption.str.contains("heads by SGD in 1 epoch").any()
    assert plot.how_found(pd.DataFrame({"lr": [0.0, 0.1], "epochs": [0.0, 50.0]})).endswith(
        "or heads solved for"
    )


def test_a_caption_counts_the_seeds_of_what_it_shows(tmp_path):
    seeds = [("linear", 5, 1), ("linear", 100, 2), ("finetune", 100, 3)]
    rows = [
        row("scene", init, mode, ratio, seed, "f1_macro", name, 0.1 * seed)
        for mode, ratio, count in seeds
        for seed in range(count)
        for init in ("random", "barlow")
        for name in ("all", "a")
    ]
    write_rows(tmp_path / "results.csv", rows)
    figures = tmp_path / "figures"
    plot.main(
        ["--runs", "--results", str(tmp_path / "results.csv"), "--format", "png", "--out", str(figures)]
    )
    captions = pd.read_csv(figures / "index.csv").set_index("stem").caption
    assert "over 2 seeds" in captions["table4-land"] and "over 1 to 3 seeds" in captions["fig6-land"]
    assert "over 3 seeds" in captions["table6-land-finetune"]
    assert "over 1 to 2 seeds" in captions["table6-land-linear"]


def test_comparison_by_hand(tmp_path):
    """Two classes, two ratios, a seed that the baseline lacks; the t of one degree of freedom by hand."""
    ours = {
        (5, 1): (0.10, 0.20),
        (5, 2): (0.12, 0.22),
        (5, 3): (0.9, 0.9),
        (10, 1): (0.08, 0.10),
        (10, 2): (0.08, 0.12),
    }
    base = {(5, 1): (0.14, 0.20), (5, 2): (0.20, 0.22), (10, 1): (0.10, 0.12), (10, 2): (0.06, 0.20)}
    rows = [
        row("fraction", init, "finetune", ratio, seed, "rmse", name, value)
        for init, cells in (("barlow", ours), ("imagenet", base))
        for (ratio, seed), (x, y) in cells.items()
        for name, value in (("all", (x + y) / 2), ("x", x), ("y", y))
    ]
    lines = numbers.comparison(results(tmp_path, rows), "fraction", None).set_index("ratio")
    five, mean = lines.loc[5], lines.loc["mean"]
    assert (five.n, five.value, five.baseline_value) == pytest.approx((2, 0.16, 0.19))
    assert (five.difference, five.improvement) == pytest.approx((-0.03, 100 * 0.03 / 0.19))
    t = 0.03 / (np.std([-0.02, -0.04], ddof=1) / math.sqrt(2))
    assert five.p == pytest.approx(1 - 2 / math.pi * math.atan(t))
    assert (mean.n, mean.cells) == (2, 4)
    assert mean.difference == pytest.approx(((0.12 - 0.14) + (0.135 - 0.17)) / 2)
    assert (mean.wins, mean.ties) == (2, 2)  # of the common seeds: 5 % x and 10 % y win, the others tie
    assert mean.class_difference == pytest.approx((0.06 + 0 + 0 + 0.05) / 4)


def test_linear_probing_stands_before_fine_tuning(tmp_path):
    rows = scene_rows(["random", "barlow"], [100], [1], ["x", "y"], ["finetune", "linear"])
    lines = numbers.comparison(results(tmp_path, rows), "scene", None)
    assert list(lines["mode"]) == ["linear", "finetune"]


@pytest.mark.parametrize("a, b", [([0.1], [0.2]), ([0.1, 0.2], [0.2, 0.3])])
def test_p_is_undefined_for_one_pair_or_equal_differences(a, b):
    assert math.isnan(numbers.paired_p(np.array(a), np.array(b)))


def test_class_differences_use_the_seeds_both_have(study):
    test = read(study / "results.csv")
    test = test[(test.task == "scene") & (test["mode"] == "finetune")]
    cells = numbers.class_differences(test, "scene", "barlow", "imagenet")
    assert list(cells["class"].unique()) == ["a & b", "c_d", "50%"]
    assert dict(cells.groupby("ratio").n.max()) == {5: 1, 100: 2}
    assert cells.difference.to_numpy() == pytest.approx(0.1)


def test_the_best_of_each_ratio_is_bold(tmp_path):
    rows = scene_rows(["random", "barlow"], [5, 100], [1, 2], ["x", "y"], ["finetune"])
    table = tables.class_sheet(numbers.over_seeds(results(tmp_path, rows)), "scene", "finetune")
    assert list(table.shown.columns) == [
        "Ratio (%)",
        "Initialisation",
        "n",
        "Micro F1",
        "Macro F1",
        "Weighted F1",
        "0",
        "1",
    ]
    assert (
        table.bold[:, 3:].all(axis=1).tolist() == [False, True, False, True] and not table.bold[:, :3].any()
    )
    fraction = [
        row("fraction", init, "finetune", 5, 1, "rmse", "all", value)
        for init, value in (("random", 0.2), ("barlow", 0.1), ("moco", 0.1001))
    ]
    table = tables.class_sheet(numbers.over_seeds(results(tmp_path, fraction)), "fraction", "finetune")
    assert table.bold[:, 3].tolist() == [False, True, True] and table.shown.RMSE.tolist() == [
        "0.200",
        "0.100",
        "0.100",
    ]


def test_training_times(study):
    configs, logs = reading.read_runs([study / "runs" / "barlow"], [])
    line = numbers.training_times(logs, configs, images=3_600_000).iloc[0]
    assert (line.hours, line.scaled_hours, line.device) == (pytest.approx(0.05), pytest.approx(1.0), "H200")
    assert [duration(h) for h in (64, 1431, 0.5, 0)] == ["2 d 16 h", "59 d 15 h", "30 min 0 s", "0 s"]


LOG = "epoch,loss,chance_loss,effective_rank,knn_macro_f1,images_per_s,seconds\n"


def run_folder(folder, lines):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("method: simclr\n")
    (folder / "log.csv").write_text(LOG + "".join(f"{line}\n" for line in lines))
    return folder


def test_time_to_quality_by_hand(tmp_path):
    """Seconds add up over the epochs; a level counts from the first measured epoch that has reached it."""
    old = ["1,5,6,9,.5,100,100", "2,4,6,9,,100,100", "3,3,6,9,.65,100,150"]
    new = ["1,5,6,9,.62,100,40", "2,4,6,9,.81,100,60.5", "3,3,6,9,.79,100,50"]
    lost = ["1,5,6,9,.9,100,", "2,4,6,9,.95,100,10"]  # its time is not known
    runs = [
        run_folder(tmp_path / name, lines) for name, lines in (("old", old), ("new", new), ("lost", lost))
    ]
    _, logs = reading.read_runs(runs, [])
    column, timed = numbers.quality_over_time(logs)
    assert column == "knn_macro_f1" and set(timed.run) == {"old", "new"}
    assert timed.seconds[timed.run == "old"].tolist() == [100, 350]
    lines = numbers.time_to_quality(timed).set_index(["run", "level"])
    seconds = {key: line.seconds for key, line in lines.iterrows()}
    assert (seconds["old", 0.6], seconds["new", 0.6], seconds["new", 0.7]) == (350, 40, 100.5)
    assert seconds["new", 0.8] == 100.5 and math.isnan(seconds["old", 0.7])
    assert tuple(lines.loc[("new", 0.6), ["best", "seconds_to_best", "total_seconds"]]) == (
        0.81,
        100.5,
        150.5,
    )
    plot.main(["--runs", *map(str, runs), "--results", "--out", str(tmp_path / "figures"), "--format", "png"])
    table = pd.read_csv(tmp_path / "figures" / "time_to_quality.csv")
    assert list(table.columns[:3]) == ["run", "level", "seconds"] and len(table) == 6
    assert "| – |" in (tmp_path / "figures" / "time_to_quality.md").read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "time_to_quality.png").exists()


def test_time_to_quality_shows_what_most_runs_have(capsys):
    """Logs of before 5-NN was written stand beside newer ones by what both have."""
    logs = pd.DataFrame({"run": ["old", "new", "bare"], "epoch": 1, "seconds": 10.0})
    logs["knn_macro_f1"] = [0.5, 0.6, float("nan")]
    logs["knn5_accuracy"] = [float("nan"), 0.7, float("nan")]
    column, timed = numbers.quality_over_time(logs)
    assert column == "knn_macro_f1" and timed.set_index("run").quality.to_dict() == {"old": 0.5, "new": 0.6}
    assert "bare: log.csv has no knn_macro_f1" in capsys.readouterr().err
    column, timed = numbers.quality_over_time(logs[logs.run == "new"])
    assert column == "knn5_accuracy" and timed.quality.tolist() == [0.7]


@pytest.mark.parametrize("longest", [500, 500_000])
def test_logarithmic_axes_have_numbers_that_people_read(longest):
    timed = pd.DataFrame({"run": "barlow", "seconds": [100.0, longest], "quality": [0.5, 0.75]})
    times = pd.DataFrame(
        {
            "run": ["barlow"],
            "device": "CPU",
            "size": "64",
            "epochs": 2,
            "hours": longest / 3600,
            "scaled_hours": 2.0,
        }
    )
    drawn = [
        pretraining.quality_figure(timed, "knn_macro_f1", style.STYLES),
        pretraining.time_figure(times, style.STYLES),
    ]
    for figure in drawn:
        with plt.rc_context(style.RC):
            figure.canvas.draw()
        (axes,) = figure.axes
        low, high = axes.get_xlim()  # older matplotlibs put labels beyond, where nobody sees them
        ticks = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
        labels = [t.get_text() for t in ticks if low <= t.get_position()[0] <= high]
        numbers_shown = [float(label.replace(",", "")) for label in labels if label]
        assert 2 <= len(numbers_shown) <= 12
        plt.close(figure)


def test_nearest_neighbours_accuracy_is_the_quality_where_it_is_logged(tmp_path):
    folder = run_folder(tmp_path / "run", [])
    (folder / "log.csv").write_text("epoch,knn_macro_f1,knn5_accuracy,seconds\n1,.5,.6,9\n")
    column, timed = numbers.quality_over_time(reading.read_runs([folder], [])[1])
    assert (column, timed.quality.tolist()) == ("knn5_accuracy", [0.6])


# Files


def test_everything_is_drawn_and_no_figure_is_blank(drawn):
    stems = {
        "curves",
        "fig9",
        "time_to_quality",
        "fig3",
        "fig4-land",
        "fig5-land-barlow",
        "fig8a-land-barlow",
        "fig6-land",
        "fig7-land-barlow",
        "fig8b-land-barlow",
    }
    assert {p.stem for p in drawn.glob("*.png")} == {p.stem for p in drawn.glob("*.pdf")} == stems
    for path in drawn.glob("*.png"):
        pixels = plt.imread(path)[..., :3]
        colours = np.unique((pixels * 9).astype(int) @ [100, 10, 1])
        assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.9 and len(colours) > 5, path
        assert pixels.shape[1] in (350, 716), path  # one and two columns at 100 dpi
    made = {p.stem for p in drawn.glob("*.tex")}
    assert {
        "table3",
        "table4-land",
        "table5-land-finetune",
        "table6-land-linear",
        "table6-land-finetune",
        "comparison-scene-land",
    } <= made
    assert made == {p.stem for p in drawn.glob("*.md")} and not list(drawn.glob(".*"))
    assert set(pd.read_csv(drawn / "index.csv").stem) == stems | made


def test_the_settings_of_runs_are_a_table():
    first = {"method": "barlow", "size": "32:64", "epochs": 500, "lr": 1e-4, "images": 175_381}
    sheet = tables.settings_sheet({"a": first | {"optimizer": "sgd"}, "b": {"method": ["odd"], "lr": None}})
    shown = sheet.shown.set_index("Run")
    assert shown.loc["a", ["Method", "Size (px)", "Epochs", "Rate", "Images", "Optimiser"]].tolist() == [
        "Barlow Twins", "32:64", "500", "0.0001", "175,381", "sgd",
    ]  # fmt: skip
    assert shown.loc["b", ["Rate", "Hidden"]].tolist() == ["–", "–"]


def test_captions_say_what_is_drawn(study, tmp_path):
    path = study / "results.csv"
    embeddings = ["--embeddings", str(study / "embeddings_0.npz")]
    words = ["--runs", "--results", str(path), *embeddings, "--points", "50", "--format", "png"]
    plot.main([*words, "--out", str(tmp_path)])
    captions = pd.read_csv(tmp_path / "index.csv").groupby("stem").caption.first()
    for stem in ("table6-land-finetune", "fig7-land-barlow", "fig8b-land-barlow"):
        assert "; F1, higher is better" in captions[stem] and "macro" not in captions[stem]
    assert "macro F1" in captions["fig6-land"]
    assert "bars and whiskers: mean ± standard deviation over 1 to 2 seeds" in captions["fig7-land-barlow"]
    assert "RMSE: the mean of those of the classes" in captions["table5-land-finetune"]
    assert "of at most 50 test images" in captions["fig3"]


def test_what_the_paper_has_too_has_its_number(drawn):
    index = pd.read_csv(drawn / "index.csv", keep_default_na=False)
    numbered = dict(zip(index.stem, index.number))
    assert numbered.pop("table6-land-linear") == numbered.pop("curves") == ""
    assert numbered["comparison-scene-land"] == numbered["time_to_quality"] == ""
    for stem, number in plot.NUMBERS.items():
        assert number in {got for name, got in numbered.items() if name.startswith(stem)}, stem


def test_table_5_has_both_rmses_where_they_are(tmp_path):
    rows = [
        row("fraction", "random", "finetune", 5, 1, metric, name, value)
        for metric, name, value in (("rmse", "all", 0.2), ("rmse", "x", 0.2), ("rmse_pooled", "all", 0.3))
    ]
    table = tables.class_sheet(numbers.over_seeds(results(tmp_path, rows)), "fraction", "finetune")
    assert list(table.shown.columns[3:]) == ["RMSE", "Pooled RMSE", "0"]
    assert list(table.shown.iloc[0, 3:]) == ["0.200", "0.300", "0.200"]


def test_probes_on_the_pretraining_data_stand_under_pretraining(tmp_path):
    """Table IV is of that data alone; where it is not known, of all."""
    rows = [
        [*one[:1], data, *one[2:]]
        for data in ("pure", "land")
        for one in scene_rows(["random", "barlow"], [100], [1, 2], ["x", "y"], ["linear"])
    ]
    path, run = write_rows(tmp_path / "results.csv", rows), run_folder(tmp_path / "barlow", [])

    def index():
        words = ["--results", str(path), "--format", "png", "--out", str(tmp_path / "figures")]
        plot.main(["--runs", str(run), *words])
        found = pd.read_csv(tmp_path / "figures" / "index.csv", keep_default_na=False)
        return {name: [*found.stem[found.part == name]] for name in ("pretraining", "")}, found

    parts, _ = index()
    assert {"table4-pure", "table4-land"} <= set(parts[""]) and not parts["pretraining"]
    (run / "config.yaml").write_text("method: barlow\ndata: /some/pure/\n")
    parts, found = index()
    stems = ["table4-pure", "table6-pure-linear", "comparison-scene-pure"]
    assert parts["pretraining"] == stems and "table4-land" not in parts[""]
    sections = by_section(found)
    assert [stem for stem in sections["Pretraining"].stem if "pure" in stem] == stems
    assert not sections["Scene classes"].stem.str.contains("pure").any()


def test_latex_is_balanced_and_escaped(drawn):
    for path in drawn.glob("*.tex"):
        text = path.read_text(encoding="utf-8")
        bare = re.sub(r"\\[&%$#_{}]", "", text)
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and text.isascii(), path
        assert re.findall(r"\\begin{(.*?)}", text) == re.findall(r"\\end{(.*?)}", text)[::-1]
        body = bare[bare.index(r"\toprule") : bare.index(r"\bottomrule")]
        columns = len(re.search(r"begin{tabular}{(l+)}", text)[1])
        assert {line.count("&") for line in body.splitlines() if line.endswith(r"\\")} == {columns - 1}, path
        assert not re.search("[_#%]", bare.split(r"\label")[0].split(r"\caption")[1])
    assert r"0 a \& b; 1 c\_d; 2 50\%" in (drawn / "table6-land-finetune.tex").read_text()


def test_special_characters_in_latex():
    assert (
        tables.escape("a&b_c%{~}^\\ 1 ± 2 − x")
        == r"a\&b\_c\%\{\textasciitilde{}\}\textasciicircum{}\textbackslash{} 1 $\pm$ 2 $-$ x"
    )


def test_the_same_input_gives_the_same_bytes_without_torch(study, drawn):
    code = (
        "import sys, plot; plot.RC['savefig.dpi'] = 100; plot.main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules"
    )
    again = study / "again"
    flags = ["--runs", study / "runs" / "barlow", "--results", study / "results.csv", "--out", again]
    subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=600,
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"},
    )
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in drawn.iterdir())
    assert [p.name for p in drawn.iterdir() if p.read_bytes() != (again / p.name).read_bytes()] == []


# Layout


def boxes(figure):
    """Corners (x0, y0, x1, y1) of every text that is drawn, in pixels, and the page."""
    figure.canvas.draw()
    axis = [a for axes in figure.axes for a in (axes.xaxis, axes.yaxis)]
    inside = {id(tick) for a in axis for tick in a._update_ticks()}  # the ticks that matplotlib draws
    beyond = {
        label
        for a in axis
        for tick in a.get_major_ticks() + a.get_minor_ticks()
        if id(tick) not in inside
        for label in (tick.label1, tick.label2)
    }
    found = [
        t.get_window_extent()
        for t in figure.findobj(matplotlib.text.Text)
        if t.get_visible() and t.get_text().strip() and t not in beyond
    ]
    return np.array([[b.x0, b.y0, b.x1, b.y1] for b in found]), figure.bbox


@pytest.mark.parametrize("kind", ["classes", "differences", "ratios"])
def test_no_text_is_cut_or_overlaps_with_29_long_classes(tmp_path, kind):
    inits = ["random", "imagenet", "barlow", "moco", "simclr", "simsiam"]
    test = results(
        tmp_path,
        scene_rows(inits, [1, 5, 10, 25, 50, 100] if kind == "differences" else [5, 100], [1, 2], LONG),
    )
    summary, styles = numbers.over_seeds(test), style.styles_of(inits, {})
    with plt.rc_context(style.RC):
        if kind == "classes":
            tuned = summary[summary["mode"] == "finetune"]
            figure = figures.class_figure(tuned, "scene", "barlow", ["random", "imagenet"], styles)
        elif kind == "differences":
            cells = numbers.class_differences(test[test["mode"] == "finetune"], "scene", "barlow", "imagenet")
            figure = figures.difference_figure(cells, "scene", "barlow", "imagenet")
        else:
            figure = figures.ratio_figure(summary, "scene", "f1_macro", styles)
        found, page = boxes(figure)
    x0, y0, x1, y1 = found.T
    assert (
        len(found) > 8 and min(x0.min(), y0.min()) > -1 and x1.max() < page.x1 + 1 and y1.max() < page.y1 + 1
    )
    wide = np.minimum.outer(x1, x1) - np.maximum.outer(x0, x0)
    high = np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0)
    overlap = np.triu((wide > 1) & (high > 2), 1)  # pixels at 100 dpi; line boxes may touch
    assert not overlap.any(), [found[i].round() for i in np.argwhere(overlap)[:3]]
    plt.close(figure)


@pytest.mark.parametrize("letters", [12, 25, 40, 150])
def test_long_names_of_initialisations_are_not_cut(tmp_path, letters):
    inits = ["random", *("x" * (letters - 2) + f"-{i}" for i in range(3))]
    test = results(tmp_path, scene_rows(inits, [5, 100], [1, 2], ["a", "b"]))
    with plt.rc_context(style.RC):
        figure = figures.ratio_figure(
            numbers.over_seeds(test), "scene", "f1_macro", style.styles_of(inits, {})
        )
        found, page = boxes(figure)
    assert found[:, 0].min() > -1 and found[:, 2].max() < page.x1 + 1
    assert len({text.get_text() for text in figure.legends[0].texts if "x" in text.get_text()}) == 3
    plt.close(figure)


def test_the_label_of_the_classes_stands_beside_their_panels(tmp_path):
    test = results(tmp_path, scene_rows(["random", "barlow"], [5, 100], [1], LONG, ["finetune"]))
    styles = style.styles_of(["random", "barlow"], {})
    with plt.rc_context(style.RC):
        figure = figures.class_figure(numbers.over_seeds(test), "scene", "barlow", ["random"], styles)
        figure.canvas.draw()
    panels = [axes.get_window_extent() for axes in figure.axes]
    middle = (max(box.y1 for box in panels) + min(box.y0 for box in panels)) / 2
    label = figure._supylabel.get_window_extent()
    assert abs((label.y0 + label.y1) / 2 - middle) < 0.05 * figure.bbox.height
    plt.close(figure)


def test_spread_keeps_29_labels_on_one_point_apart():
    places = spread(np.full((29, 2), 0.5), 0.085, 0.065)
    gaps = np.abs(places[:, None] - places[None])
    apart = (gaps[..., 0] >= 0.085 - 1e-9) | (gaps[..., 1] >= 0.065 - 1e-9)
    assert apart[~np.eye(29, dtype=bool)].all() and places.min() > 0 and places.max() < 1


def test_an_initialisation_keeps_its_colour(study):
    few = style.styles_of(["barlow"], {})
    configs = {"long": {"method": "barlow"}, "moco": {"method": "moco"}}
    many = style.styles_of(["random", "imagenet", "barlow", "moco", "long"], configs)
    assert few["barlow"] == many["barlow"] and len(set(map(str, many.values()))) == 5
    assert style.styles_of(["bt"], {"bt": {"method": "barlow"}})["bt"] == few["barlow"]


def test_many_initialisations_are_told_apart():
    runs = [f"run-{i}" for i in range(16)]
    assert len({look[:2] for look in style.styles_of(runs, {}).values()}) == 16


def test_a_collapsed_network_is_drawn_as_one_point():
    assert (flatten(np.ones((10, 4))) == 0.5).all()


# Incomplete input


def test_missing_runs_and_initialisations_come_with_their_command(study):
    test = read(study / "results.csv")
    configs, logs = reading.read_runs([study / "runs" / "barlow"], [])
    gaps = find_gaps(Studies(test, configs, logs, []), plot.STEMS)
    methods = [shlex.split(gap.command)[3] for gap in gaps if "train_ssl" in gap.command]
    assert methods == ["moco", "simclr", "simsiam"]
    by_figure = {gap.figures: gap.command for gap in gaps}
    probe = by_figure["fig3"]  # as the probes that are there were made
    assert f"--init {study}/runs/barlow/backbone.pth --mode linear --ratios " in probe
    assert probe.endswith(f"--save-embeddings --out {study}")
    tuned = by_figure["fig4, fig5, fig8a, table5"]
    assert "--init imagenet --mode finetune --ratios " in tuned and tuned.endswith(f"--out {study}")
    assert len(gaps) == 6
    nothing = find_gaps(Studies(test[:0], configs, logs, []), plot.STEMS)
    by_figure = {gap.figures: gap.command for gap in nothing}
    command = by_figure["fig4, fig5, fig8a, table5"]
    assert command.startswith("python transfer.py --task fraction --mode linear finetune --data DATA --init ")
    assert command.endswith(f" random imagenet {study}/runs/barlow/backbone.pth"), "and a method"


def hole(out, tasks):
    """results.csv of several tasks in `out`, each without one cell of random weights; returns it read."""
    rows = []
    for task, metric, data, lr in tasks:
        for init in ("random", "imagenet"):
            for seed in (1, 20240101):
                for ratio in (5, 33.333333):
                    if (init, seed, ratio) != ("random", 20240101, 33.333333):
                        rows.append(
                            row(task, init, "finetune", ratio, seed, metric, "all", 0.5, data=data, lr=lr)
                        )
    return read(write_rows(out / "results.csv", rows))


def test_the_command_of_a_missing_cell_makes_that_cell(tmp_path):
    """After two tasks in one --out: config.yaml is of the last call, the cell of the first."""
    out = tmp_path / "two tasks"
    out.mkdir()
    (out / "config.yaml").write_text("task: scene\ndata: /somewhere/patches\nsplits: /lists\nlr: 9\n")
    settings = {"size": 48, "arch": "resnet50", "loss": "bce", "epoch_choice": "common", "augment": True}
    other = {"size": 64, "arch": "resnet18", "loss": "softmax", "epoch_choice": "seed", "augment": False}
    other["schedule"] = "cosine"
    (out / "settings.yaml").write_text(
        yaml.safe_dump({"fraction finetune": settings, "scene finetune": other})
    )
    test = hole(out, [("fraction", "rmse", "land", 0.003), ("scene", "f1_macro", "patches", 1e-5)])
    gaps = [
        gap
        for gap in find_gaps(Studies(test, {}, test.iloc[:0].assign(method=""), []), plot.STEMS)
        if "cells" in gap.figures
    ]
    assert [gap.figures for gap in gaps] == [
        f"1 of 4 cells of Random, fine-tuning, {name}" for name in ("land", "patches")
    ]
    parsed = []
    for gap in gaps:
        python, script, *words = shlex.split(gap.command)
        assert (python, script) == ("python", "transfer.py")
        parsed.append(options("transfer").parse_args(words))
    fraction, scene = parsed
    assert (fraction.schedule, scene.schedule) == ("constant", "cosine")
    for args in parsed:
        assert (args.init, args.mode, args.ratios, args.seeds, args.seed) == (
            ["random"],
            ["finetune"],
            [33.333333],
            [1],
            20240101,
        )
        assert Path(args.out) == out and (args.momentum, args.epochs, args.batch_size) == (0.9, 1, 64)
    assert (fraction.task, fraction.data, fraction.lr, fraction.splits) == (
        "fraction",
        "PATH/land",
        0.003,
        None,
    )
    assert {name: getattr(fraction, name) for name in settings} == settings
    assert (scene.task, scene.data, scene.lr, scene.splits) == ("scene", "/somewhere/patches", 1e-5, "/lists")
    assert {name: getattr(scene, name) for name in other} == other


def test_the_command_of_a_missing_cell_finds_the_images_of_an_earlier_call(tmp_path):
    (tmp_path / "config.yaml").write_text("task: fraction\ndata: /somewhere/patches\n")
    where = {"data": "/elsewhere/land", "splits": "/lists", "split": "spatial", "scenes": 1500}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"where land": where}))
    test = hole(tmp_path, [("fraction", "rmse", "land", 0.003)])
    gaps = find_gaps(Studies(test, {}, test.iloc[:0].assign(method=""), []), plot.STEMS)
    (command,) = [gap.command for gap in gaps if "cells" in gap.figures]
    args = options("transfer").parse_args(shlex.split(command)[2:])
    assert (args.data, args.splits, args.split) == ("/elsewhere/land", "/lists", "spatial")


def test_the_command_of_a_missing_probe_says_how_heads_were_found(tmp_path):
    for lr, probe in ((0, "lbfgs"), (0.02, "sgd")):
        rows = [
            row("scene", init, "linear", 5, seed, "f1_macro", "all", 0.5, lr=lr, data="")
            for init, seeds in (("random", (1, 2)), ("barlow", (1,)))
            for seed in seeds
        ]
        test = results(tmp_path, rows)
        (gap,) = [
            g
            for g in find_gaps(Studies(test, {}, test.iloc[:0].assign(method=""), []), plot.STEMS)
            if "cells" in g.figures
        ]
        args = options("transfer").parse_args(shlex.split(gap.command)[2:])
        assert (args.probe, args.mode, args.data, args.seed) == (probe, ["linear"], None, 2)
        assert probe == "lbfgs" or args.lr == 0.02


def test_folders_of_other_settings_are_not_averaged(tmp_path, capsys):
    """Two seeds of one start of the head and three of another: the three count, and it is said."""
    paths = []
    for start, seeds, value in (("probe", (0, 1), 0.9), ("random", (2, 3, 4), 0.5)):
        out = tmp_path / start
        out.mkdir()
        (out / "settings.yaml").write_text(yaml.safe_dump({"scene finetune": {"start_head": start}}))
        rows = [row("scene", "moco", "finetune", 5, seed, "f1_macro", "all", value) for seed in seeds]
        paths.append(write_rows(out / "results.csv", rows))
    kept = numbers.at_chosen_epoch(reading.read_results(paths, []))
    assert sorted(kept.seed) == [2, 3, 4] and set(kept.value) == {0.5}
    assert "1 cell run with several settings" in capsys.readouterr().err


def test_like_is_compared_with_like(tmp_path):
    """Random weights with more seeds at a rate that nothing else has: SimCLR's rate counts for both."""
    rows = [
        row("scene", init, "finetune", 5, seed, "f1_macro", "all", value, lr=rate)
        for init, seeds, value, rate in (
            ("random", (1, 2, 3), 0.1, 0.0001),
            ("random", (1, 2), 0.3, 0.01),
            ("simclr", (1, 2), 0.5, 0.01),
        )
        for seed in seeds
    ]
    test = results(tmp_path, rows)
    assert dict(test.groupby("init").value.mean()) == pytest.approx({"random": 0.3, "simclr": 0.5})


def test_initialisations_that_were_trained_unlike_are_told(tmp_path, capsys):
    paths = []
    for folder, inits, lr, arch in (("a", ("random", "moco"), 0.1, 18), ("b", ("barlow",), 0.01, 50)):
        out = tmp_path / folder
        out.mkdir()
        schedule = {"schedule": "cosine"} if arch == 50 else {}  # constant, where it is not there
        made = {"scene finetune": {"arch": f"resnet{arch}", "augment": True} | schedule}
        (out / "settings.yaml").write_text(yaml.safe_dump(made))
        rows = [row("scene", init, "finetune", 5, 1, "f1_macro", "all", 0.5, lr=lr) for init in inits]
        paths.append(write_rows(out / "results.csv", rows))
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    rows = [row("scene", "simclr", "finetune", 5, 1, "f1_macro", "all", 0.5)]
    of_before = write_rows(unknown / "results.csv", rows)  # without settings.yaml
    numbers.at_chosen_epoch(reading.read_results([paths[0], of_before], []))
    assert not capsys.readouterr().err
    numbers.at_chosen_epoch(reading.read_results(paths, []))
    said = "scene land finetune: initialisations side by side were trained unlike: lr 0.1 and 0.01; "
    assert said + "arch resnet18 and resnet50; schedule constant and cosine\n" in capsys.readouterr().err


def test_sizes_of_images_are_not_mixed_in_a_table_or_a_test(tmp_path, capsys):
    """SimCLR at 32 px beside random weights at 64: the difference would be one of sizes as well."""
    paths = []
    for folder, size, inits in (("a", 64, ("random", "moco")), ("b", 32, ("random", "simclr"))):
        out = tmp_path / folder
        out.mkdir()
        (out / "settings.yaml").write_text(yaml.safe_dump({"scene linear": {"size": size}}))
        rows = [
            row("scene", init, "linear", ratio, seed, "f1_macro", "all", 0.01 * seed + 0.001 * size)
            for init in inits
            for ratio in (5, 10)
            for seed in (1, 2)
        ]
        paths.append(write_rows(out / "results.csv", rows))
    test = numbers.at_chosen_epoch(reading.read_results(paths, []))
    assert dict(test.groupby("data")["init"].unique().map(sorted)) == {
        "land-32px": ["random", "simclr"],
        "land-64px": ["moco", "random"],
    }
    assert "the images of land were seen at 32 and 64 px: drawn apart" in capsys.readouterr().err
    figures = tmp_path / "figures"
    plot.main(["--runs", "--results", *map(str, paths), "--out", str(figures), "--format", "png"])
    assert (figures / "comparison-scene-land-32px.csv").exists()
    assert not (figures / "comparison-scene-land.csv").exists()


def test_backbones_of_one_name_and_other_weights_are_not_averaged(tmp_path, capsys):
    """Of two runs both called moco the one with more seeds counts; other data of one name is told."""
    paths = []
    for folder, seeds, value in (("a", (0, 1), 0.9), ("b", (2, 3, 4), 0.5)):
        out = tmp_path / folder
        out.mkdir()
        made = {"scene linear": {"size": 64}, "data d": {"content": folder}, "init moco": {"weights": folder}}
        (out / "settings.yaml").write_text(yaml.safe_dump(made))
        rows = [row("scene", "moco", "linear", 5, seed, "f1_macro", "all", value) for seed in seeds]
        rows += [row("scene", "random", "linear", 5, seed, "f1_macro", "all", value) for seed in seeds]
        paths.append(write_rows(out / "results.csv", rows))
    kept = numbers.at_chosen_epoch(reading.read_results(paths, []))
    assert sorted(kept[kept.init == "moco"].seed) == [2, 3, 4]
    assert sorted(kept[kept.init == "random"].seed) == [0, 1, 2, 3, 4]
    said = capsys.readouterr().err
    assert "1 cell run with several settings" in said and "d differs in files" in said
    assert "moco on land stands for other weights" in said and "random" not in said
    rows = [row("scene", "moco", "linear", 10, seed, "f1_macro", "all", 0.9) for seed in (0, 1)]
    write_rows(tmp_path / "a" / "results.csv", rows)  # a curve of two backbones
    numbers.at_chosen_epoch(reading.read_results(paths, []))
    assert re.search("moco on land stands for other weights in .*/a than in .*/b,", capsys.readouterr().err)


def test_malformed_rows_are_named_and_the_rest_is_read(tmp_path, capsys):
    rows = [row("scene", "random", "linear", 5, seed, "f1_macro", "all", 0.5) for seed in range(6)]
    rows[1][10] = "oops"
    rows[2] = rows[2][:9]
    rows[3] += ["one", "too many"]
    rows[4][5] = ""
    path = write_rows(tmp_path / "results.csv", rows)
    path.write_text(path.read_text() + "\n")  # a blank line is no row
    problems = []
    assert reading.read_results([path], problems).seed.tolist() == [0, 5]
    said = capsys.readouterr().err.splitlines()
    assert said == [f"warning: {problem}" for problem in problems]
    assert [line.split(": ")[1] for line in said] == [f"{path}:{n}" for n in (3, 4, 5, 6)]
    assert (
        "value 'oops' is not a number" in said[0]
        and "has 21 fields, the first line 19" in said[2]
        and "seed is empty" in said[3]
    )


def test_images_a_class_stand_beside_shares_and_are_never_mixed_with_them(tmp_path):
    """`10/class` and 10 % are two amounts: other means, other figures, other commands."""
    rows = []
    for ratio, value in ((10, 0.5), (50, 0.6), ("10/class", 0.7), ("50/class", 0.8)):
        for init, seeds in (("random", (1, 2)), ("barlow", (1,))):
            rows += [
                row("scene", init, "linear", ratio, seed, metric, "all", value)
                for seed in seeds
                for metric in ("f1_macro", "accuracy")
            ]
    path = write_rows(tmp_path / "results.csv", rows)
    means = numbers.over_seeds(read(path)).query("metric == 'f1_macro' and init == 'random'")
    assert dict(zip(zip(means.ratio, means.unit), means["mean"])) == {
        (10, "%"): 0.5,
        (50, "%"): 0.6,
        (10, "/class"): 0.7,
        (50, "/class"): 0.8,
    }
    plot.main(["--runs", "--results", str(path), "--out", str(tmp_path / "figures"), "--format", "png"])
    drawn = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    assert drawn == {
        f"fig6-land{unit}{metric}" for unit in ("", "-per-class") for metric in ("", "-accuracy")
    }
    missing = pd.read_csv(tmp_path / "figures" / "missing.csv", keep_default_na=False)
    commands = [words for words in missing.command if "--seed 2" in words]
    assert ["--ratios 10 50" in words for words in commands] == [True, False]
    assert "--per-class 10 50" in commands[1]
    for words in commands:
        options("transfer").parse_args(shlex.split(words)[2:])


@pytest.mark.parametrize("kind", ["bom", "crlf", "spreadsheet", "told", "commas", "nan", "inf"])
def test_csv_files_that_other_programs_have_saved(tmp_path, kind):
    rows = [row("scene", "random", "linear", 5, seed, "f1_macro", "all", 0.25 * seed) for seed in (1, 2)]
    if kind in ("nan", "inf"):
        rows.append(row("scene", "random", "linear", 5, 3, "f1_macro", "all", kind))
    path = write_rows(tmp_path / "results.csv", rows)
    text = path.read_text()
    if kind == "bom":
        text = "\ufeff" + text
    if kind == "crlf":
        text = text.replace("\n", "\r\n")
    if kind in ("spreadsheet", "told"):
        text = text.replace(",", ";").replace(".", ",")
    if kind == "told":
        text = "sep=;\n" + text
    if kind == "commas":
        text = text.replace("\n", ",\n")  # an empty column behind the last
    path.write_bytes(text.encode())
    problems = []
    assert reading.read_results([path], problems).value.dropna().tolist() == [0.25, 0.5]
    assert len(problems) == (kind == "inf")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: text.replace("0.25", "0,25").replace("0.5", "0,5"), "has 20 fields, the first line 19"),
        (lambda text: text.replace("0.25", "250000").replace("0.5", "-0.5"), "can be no f1_macro"),
        (lambda text: text.replace("images", "value"), "column 'value' stands twice"),
        (lambda text: text.replace(",100,", ',"1,000",'), "images '1,000' is not a number"),
        (lambda text: text.replace(",", ";").replace(".", ",").replace(";100;", ";1.000;"), "'1.000' is not"),
        (lambda text: "a,b\n" + text, "no column task"),
        (lambda text: "sep=", "no column task"),
        (lambda text: text.replace("random", "'random").replace("'", '"', 1), "unexpected end of data"),
    ],
)
def test_csv_files_that_would_be_read_wrongly_are_left_out(tmp_path, change, said, capsys):
    """Numbers that a spreadsheet of another country has rewritten, and columns that have moved."""
    rows = [row("scene", "random", "linear", 5, seed, "f1_macro", "all", 0.25 * seed) for seed in (1, 2)]
    path = write_rows(tmp_path / "results.csv", rows)
    path.write_text(change(path.read_text()))
    problems = []
    assert reading.read_results([path], problems).empty
    assert said in problems[0] and str(path) in problems[0]


@pytest.mark.parametrize("encoding, begins", [("utf-16", ""), ("latin-1", "#é\n")])
def test_csv_files_in_other_encodings_are_named(tmp_path, encoding, begins, capsys):
    rows = [row("scene", "random", "linear", 5, 1, "f1_macro", "all", 0.25)]
    path = write_rows(tmp_path / "results.csv", rows)
    path.write_bytes((begins + path.read_text()).encode(encoding))
    problems = []
    assert reading.read_results([path], problems).empty
    assert "is not UTF-8 text" in problems[0]


def test_repeated_rows_count_once(tmp_path, capsys):
    rows = [row("scene", "random", "linear", 5, 1, "f1_macro", "all", v) for v in (0.5, 0.7)]
    assert results(tmp_path, [rows[1], rows[1]]).value.tolist() == [0.7]
    assert capsys.readouterr().err == "note: 1 results stand more than once: the last one counts\n"
    assert results(tmp_path, rows).value.tolist() == [0.7]
    assert (
        f"warning: 2 rows in {tmp_path.as_posix()} differ in nothing but the value, as scene "
        in capsys.readouterr().err
    )
    few = [row("scene", "random", "linear", "5/class", 1, "f1_macro", "all", v) for v in (0.5, 0.7)]
    results(tmp_path, few)
    assert "f1_macro, 5 images a class: the last counts" in capsys.readouterr().err


def test_a_folder_without_a_readable_config_is_still_drawn(tmp_path, capsys):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "log.csv").write_text("epoch,loss\n1,2\n")
    (tmp_path / "odd" / "config.yaml").write_text("a: [1\n")
    plot.main(
        ["--runs", str(tmp_path / "odd"), "--results", "--out", str(tmp_path / "figures"), "--format", "png"]
    )
    assert (tmp_path / "figures" / "curves.png").exists() and "config.yaml" in capsys.readouterr().err


def damaged_npz(folder, good):
    """Files that are no embeddings, each in its own way."""
    data = good.read_bytes()
    arrays = dict(np.load(good))
    for name, content in (
        ("empty", b""),
        ("cut", data[: len(data) // 2]),
        ("text", b"hello"),
        ("flip", None),
    ):
        if name == "flip":
            content = bytearray(data)
            content[len(data) // 3] ^= 0xFF
        (folder / f"embeddings-{name}.npz").write_bytes(content)
    locked = bytearray(data)
    for entry in re.finditer(b"PK\x01\x02", data):  # the directory at the end of a zip
        locked[entry.start() + 8] |= 1  # its flag of a password
    (folder / "embeddings-locked.npz").write_bytes(locked)
    with open(folder / "embeddings-array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    np.savez(folder / "embeddings-names.npz", features=np.zeros((2, 2)))
    for name, change in (
        ("shape", {"labels": np.zeros(3, int)}),
        ("labels", {"labels": arrays["labels"] + 9}),
        ("none", {"labels": arrays["labels"] * 0 - 1}),
        ("infinite", {"features": arrays["features"] * np.inf}),
        ("words", {"labels": np.array(["a"] * len(arrays["labels"]))}),
    ):
        np.savez(folder / f"embeddings-{name}.npz", **{**arrays, **change})


def test_damaged_files_cost_one_line_each_and_none_of_the_others(study, tmp_path, capsys):
    """A good results.csv and good embeddings beside a bad CSV, a bad log and every kind of bad .npz."""
    good = tmp_path / "embeddings-good.npz"
    good.write_bytes((study / "embeddings_1.npz").read_bytes())
    damaged_npz(tmp_path, good)
    results = write_rows(
        tmp_path / "results.csv", scene_rows(["random"], [5, 100], [1], ["a", "b"], ["linear"])
    )
    (tmp_path / "bad.csv").write_bytes(b"\x00\xff\xfe,garbage\n1")
    run = run_folder(tmp_path / "run", ["1,x,6,9,.5,100,100", "2,4,6,9,.6,100,100"])
    flags = ["--runs", run, "--results", results, tmp_path / "bad.csv", tmp_path / "gone.csv"]
    with pytest.raises(SystemExit) as ended:
        plot.main([*map(str, flags), "--out", str(tmp_path / "figures"), "--format", "png"])
    assert ended.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    for name in [
        *(file.name for file in tmp_path.glob("embeddings-*") if file != good),
        "bad.csv",
        "gone.csv",
    ]:
        assert sum(name in line for line in said) == 1, (name, said)
    assert sum("log.csv:2" in line for line in said) == 1 and not any("pickle" in line for line in said)
    drawn = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    assert {"fig3", "fig6-land", "curves", "time_to_quality"} <= drawn


def test_names_that_would_be_formulas_or_paths_are_text(tmp_path):
    names = ["=HYPERLINK(1)", "../../x.jpg", "+1|2", "a\nb", "$x$ {"]
    path = write_rows(
        tmp_path / "results.csv", scene_rows(["random", "../up"], [5, 10], [1, 2], names, ["finetune"])
    )
    out = tmp_path / "deep" / "figures"
    plot.main(["--runs", "--results", str(path), "--out", str(out), "--format", "png"])
    assert {file.parent for file in tmp_path.rglob("*.png")} == {out}
    tables_of_text = [pd.read_csv(file, dtype=str, keep_default_na=False) for file in out.glob("*.csv")]
    cells = [cell for table in tables_of_text for cell in table.to_numpy().ravel()]
    assert any("HYPERLINK" in cell for cell in cells) and not [
        c for c in cells if c.startswith(("=", "+", "@"))
    ]
    text = (out / "fig8b-land-.._up.md").read_text(encoding="utf-8")
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines()[2:]}) == 1


def test_figures_that_cannot_be_drawn_are_listed(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise ValueError("no way")

    monkeypatch.setattr(plot.figures, "ratio_figure", broken)
    path = write_rows(tmp_path / "results.csv", scene_rows(["random"], [5, 100], [1], ["a", "b"], ["linear"]))
    with pytest.raises(SystemExit) as ended:
        plot.main(["--runs", "--results", str(path), "--out", str(tmp_path / "figures")])
    assert (
        ended.value.code == 1 and "fig6-land: cannot be drawn (ValueError: no way)" in capsys.readouterr().err
    )
    assert "table4-land" in set(pd.read_csv(tmp_path / "figures" / "index.csv").stem)


def test_any_encoding_of_the_terminal(study, tmp_path):
    flags = ["--runs", study / "runs" / "barlow", "--results", "--out", tmp_path / "größe", "--format", "png"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "plot.py", *flags], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and (tmp_path / "größe" / "curves.png").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--runs", "nowhere", "--results", "nothing.csv"], "nothing to draw"),
        (["--points", "many"], "--points"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, plot.main, *flags) and not Path("figures").exists()


def test_an_unknown_reference_is_refused(study, capsys):
    assert "random, imagenet, barlow" in refused(
        capsys, plot.main, "--results", study / "results.csv", "--reference", "byol"
    )


def test_hours_of_the_papers_images_are_of_its_size_and_of_the_mean_time_of_an_epoch():
    logs = pd.DataFrame({"run": "a", "images_per_s": [1000.0, 500.0], "seconds": [90.0, 180.0]})
    (line,) = numbers.training_times(logs, {"a": {"size": 224}}, 2_400_000).itertuples()
    assert line.scaled_hours == pytest.approx(1)
    (line,) = numbers.training_times(logs, {"a": {"size": 64}}, 2_400_000).itertuples()
    assert math.isnan(line.scaled_hours) and line.hours == pytest.approx(0.075)


def test_of_equally_many_settings_the_smaller_error_counts(tmp_path):
    rows = [
        row("fraction", "random", "linear", 5, seed, "rmse", "all", value, split, lr=lr)
        for lr, value in ((0.1, 0.3), (0.2, 0.5))
        for seed in (1, 2)
        for split in ("val", "test")
    ]
    assert set(results(tmp_path, rows).value) == {0.3}


def test_no_two_initialisations_are_compared_twice(tmp_path):
    rows = scene_rows(["random", "imagenet", "barlow"], [100], [1], ["x"], ["finetune"])
    lines = numbers.comparison(results(tmp_path, rows), "scene", None)
    found = sorted(zip(lines.init, lines.baseline))
    assert found == [("barlow", "imagenet"), ("barlow", "random"), ("random", "imagenet")]


def test_a_line_says_the_least_number_of_seeds_of_its_columns(tmp_path):
    rows = scene_rows(["random"], [100], [1, 2, 3], ["x", "y"], ["finetune"])
    rows = [r for r in rows if not (r[9] == "y" and r[5] > 1)]
    table = tables.class_sheet(numbers.over_seeds(results(tmp_path, rows)), "scene", "finetune")
    assert table.shown.n.tolist() == ["1"] and not table.bold.any(), "the best of one is none"


def test_table_4_is_of_linear_probes_on_most_labels_and_no_table_mixes_modes(tmp_path):
    summary = numbers.over_seeds(results(tmp_path, scene_rows(["random", "barlow"], [5, 100], [1], ["x"])))
    assert tables.f1_sheet(summary).shown["Ratio (%)"].tolist() == ["100", "100"]
    for mode in ("linear", "finetune"):
        assert len(tables.class_sheet(summary, "scene", mode).shown) == 4


def test_a_comparison_shows_true_minus_signs_and_the_classes_won_of_all():
    line = {
        "mode": "finetune",
        "ratio": 5,
        "unit": "%",
        "init": "barlow",
        "baseline": "random",
        "n": 2,
        "p": 0.2,
    }
    line |= {"value": 0.2, "baseline_value": 0.3, "difference": -0.1, "improvement": 12.5}
    line |= {"wins": 3, "ties": 1, "cells": 10, "class_difference": -0.01}
    sheet = tables.comparison_sheet(pd.DataFrame([line]), "fraction")
    assert "{table*}" in tables.latex(sheet, "Caption", "x"), "13 columns are as wide as the page"
    shown = sheet.shown.iloc[0, 4:].tolist()
    assert shown == ["0.200", "0.300", "−0.1000", "2", "0.200", "+12.50", "3 / 10", "1", "−0.0100"]


def test_times_to_quality_are_of_levels_in_per_cent():
    times = {"level": [0.9, 0.95], "seconds": [1234.0, math.nan], "best": 0.8, "seconds_to_best": 2000.0}
    shown = tables.quality_sheet(pd.DataFrame(times | {"run": "a", "total_seconds": 3000.0}), "knn").shown
    assert shown["Seconds to 90 %"].tolist() == ["1,234"] and shown["Seconds to 95 %"].tolist() == ["–"]
    assert shown["Seconds to the best"].tolist() == ["2,000"]


def test_p_is_shown_to_three_places_and_no_smaller_than_it_is():
    shown = [tables.shown_p(p) for p in (0.0004, 0.001, 0.0049, 0.2, float("nan"))]
    assert shown == ["< 0.001", "0.001", "0.005", "0.200", "–"]


def test_of_several_sizes_the_papers_is_compared(tmp_path):
    paths = []
    for size, value in ((64, 0.3), (224, 0.1)):
        out = tmp_path / str(size)
        out.mkdir()
        (out / "settings.yaml").write_text(yaml.safe_dump({"fraction finetune": {"size": size}}))
        names = ["all", *map(str, range(10))]
        rows = [
            row("fraction", "random", "finetune", 100, 1, "rmse", name, value, images=15_038)
            for name in names
        ]
        paths.append(write_rows(out / "results.csv", rows))
    (pair,), _ = compare_paper(numbers.at_chosen_epoch(reading.read_results(paths, [])), {})
    assert set(pair.ours["mean"]) == {0.1}


def test_classes_stand_beside_the_papers_in_the_order_of_the_file(tmp_path):
    rows = []
    for init, mode, ratio, metric, name, mean, _ in paper(5).to_numpy():
        ours = name if name == "all" else f"{9 - int(name)} class"  # the alphabet would turn them around
        images = 15_038 * ratio // 100
        rows.append(row("fraction", init, mode, ratio, 1, metric, ours, mean, images=images))
    (pair,), _ = compare_paper(results(tmp_path, rows), {})
    found = tables.beside_paper(pair.ours, pair.paper).numbers
    assert len(found) == 165 and (found.difference == 0).all()


def test_of_an_epoch_that_stands_twice_in_a_log_the_last_row_counts(tmp_path):
    folder = run_folder(tmp_path / "run", ["1,5,6,9,.5,100,100", "2,4,6,9,.6,100,90", "2,3,6,9,.7,100,50"])
    _, logs = reading.read_runs([folder], [])
    assert logs.seconds.tolist() == [100, 50] and logs.loss.tolist() == [5, 3]


@pytest.mark.parametrize("task, better", [("fraction", 0), ("scene", 1)])
def test_blue_is_better_whichever_way_a_metric_goes_and_bold_is_below_a_twentieth(task, better):
    gaps = pd.DataFrame({"class": ["a", "b"], "difference": [-0.1, 0.1], "p": [0.04, 0.06]})
    gaps = gaps.assign(ratio=5, n=5, unit="%")
    axes = figures.difference_figure(gaps, task, "barlow", "random").axes[0]
    shown = axes.images[0].get_array()
    assert shown[better] > 0 > shown[1 - better]
    assert [text.get_fontweight() for text in axes.texts] == ["bold", "normal"]


def test_a_line_goes_up_the_ratios_in_a_band_of_one_deviation():
    cells = {"init": "barlow", "mode": "finetune", "metric": "rmse", "class": "all", "unit": "%"}
    summary = pd.DataFrame({"ratio": [100, 5, 25], "mean": [0.1, 0.3, 0.2], "std": [0.01, 0.03, 0.02]})
    styles = style.styles_of(["barlow"], {})
    axes = figures.ratio_figure(summary.assign(**cells), "fraction", "rmse", styles).axes[0]
    assert [list(side) for side in axes.lines[0].get_data()] == [[5, 25, 100], [0.3, 0.2, 0.1]]
    edges = axes.collections[0].get_paths()[0].vertices
    assert {round(y, 6) for x, y in edges if x == 5} == {0.27, 0.33}


def test_bars_stand_in_the_order_of_the_classes_key():
    cells = {"task": "scene", "mode": "finetune", "metric": "f1", "ratio": 5, "unit": "%", "std": 0.0}
    values = {("barlow", "sea"): 0.1, ("barlow", "ice"): 0.2, ("random", "sea"): 0.3, ("random", "ice"): 0.4}
    rows = [{"init": init, "class": name, "mean": mean} | cells for (init, name), mean in values.items()]
    styles = style.styles_of(["barlow", "random"], {})
    axes = figures.class_figure(pd.DataFrame(rows), "scene", "barlow", ["random"], styles).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.1, 0.2, 0.3, 0.4]


def test_of_several_sizes_the_papers_is_compared_and_no_numbers_of_images_a_class():
    cells = {"task": "fraction", "mode": "finetune", "metric": "rmse", "folder": "Land-1.0", "images": 15_038}
    names = ["all", *map(str, range(10))]
    made = [("64", "%"), ("224", "%"), ("224", "/class")]
    rows = [{"class": name, "size": size, "unit": unit} for size, unit in made for name in names]
    rows = pd.DataFrame(rows).assign(**cells)
    kept = rows_of(rows.assign(data="Land-1.0-" + rows["size"] + "px"), TRANSFERS["V"])
    assert set(zip(kept["size"], kept.unit)) == {("224", "%")} and len(kept) == 11


def test_a_missing_cell_may_be_of_images_a_class_and_of_the_built_in_scenes(tmp_path):
    assert cell_flags([(10, 0), (5, 0)], "/class") == [
        "--per-class",
        "5",
        "10",
        "--seeds",
        "1",
        "--seed",
        "0",
    ]
    assert cell_flags([(10, 3), (5, 0)], "%") == ["--ratios", "5", "10", "--seeds", "0", "3"]
    (tmp_path / "settings.yaml").write_text("where built-in: {data: null, scenes: 1500}\n")
    assert data_flags(tmp_path, "built-in") == ["--scenes", "1500"]
    (tmp_path / "settings.yaml").unlink()
    (tmp_path / "config.yaml").write_text("{data: /patches, scenes: 2900}\n")  # of a later call
    assert data_flags(tmp_path, "built-in") == []


def test_a_missing_probe_has_the_cells_of_one_data_set(tmp_path):
    cells = (("a", 5), ("b", 50))
    rows = [row("scene", "random", "linear", n, 1, "f1_macro", "all", 0.5, data=data) for data, n in cells]
    rows.append(row("scene", "random", "linear", "10/class", 1, "f1_macro", "all", 0.5, data="a"))
    words = shlex.split(command_like(results(tmp_path, rows), "scene", ["linear"], ["barlow"], {}))
    assert options("transfer").parse_args(words[2:]).ratios == [5]


def test_probes_on_other_data_and_linear_cells_stand_for_nothing(tmp_path):
    rows = scene_rows(["random", "barlow"], [5], [1], ["x"], ["linear"])
    rows += scene_rows(["random"], [5], [1], ["x"], ["finetune"])
    there = Studies(results(tmp_path, rows), {"barlow": {"data": "/of/land"}}, None, [{"init": "barlow"}])
    assert missing_probes(there) == []
    (gap,) = missing_probes(there._replace(configs={"barlow": {"data": "/of/patches"}}))
    assert gap.figures == "table4" and gap.missing == "Barlow Twins"
    (gap,) = missing_inits(there, {"scene": ("fig6",)})
    assert "--init imagenet --mode finetune" in gap.command


def test_the_first_missing_cells_are_named_and_the_others_counted():
    said = shown([(5.0, seed) for seed in range(8)], "%")
    assert said.endswith("of seed 5 and 2 more") and "seed 6" not in said
    assert shown([(5.0, 1)], "%").endswith("of seed 1")


def test_a_setting_that_a_cell_does_not_tell_is_no_flag(tmp_path):
    cell = {"task": "scene", "mode": "finetune", "out": str(tmp_path), "lr": 0.1, "momentum": float("nan")}
    words = setting_flags(pd.Series(cell | {"weight_decay": 0.0, "epochs": 3, "batch_size": 64}))
    assert words == ["--lr", "0.1", "--weight-decay", "0", "--epochs", "3", "--batch-size", "64"]


def test_points_keep_their_labels_where_images_without_any_are_left_out(tmp_path):
    arrays = {"features": np.arange(6.0).reshape(3, 2), "labels": [-1, 1, 0], "classes": ["a", "b"]}
    np.savez(tmp_path / "e.npz", **arrays, init="x")
    (found,) = reading.read_embeddings([tmp_path / "e.npz"], [])
    assert found["labels"].tolist() == [1, 0] and found["features"].tolist() == [[2, 3], [4, 5]]

"""The paper's figures and tables from files already written; nothing is trained or measured here.

    python plot.py --runs runs/* --results results.csv --out figures
    python plot.py --results results.csv --reference random --format pdf --compare-paper

Reads run directories (config.yaml, log.csv), results.csv and the embeddings of `transfer.py --save-embeddings`. What a
number belongs to stands in its columns, never in a file name. Draws what is there and lists what is missing, with the
command that makes it. Needs neither torch nor a GPU; the same input gives the same bytes.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from plots import figures, numbers, tables
from plots.numbers import METHODS, name_of, stem_of
from plots.tables import Table

# Stems of the ratio, class and difference figures and of the class-wise table, by the paper's numbers.
STEMS = {"fraction": ("fig4", "fig5", "fig8a", "table5"), "scene": ("fig6", "fig7", "fig8b", "table6")}
# The paper's datasets are known by a part of the folder's name or by the number of training images at ratio 100.
PRETRAINING_DATA, TRANSFER_DATA = (r"sentinel2\w*lulc", 175_381), (r"land-?1|andalunmixing", 15_038)
PAPER_TABLES = {"III": "table3", "IV": "table4", "V": "table5", "VI": "table6"}
PAPER_FOLDER = Path(__file__).parent / "results" / "paper"
NOT_PRETRAINED = ("random", "imagenet", "channels")  # what transfer.py's --init knows by name
Item = tuple[str, str, Figure | Table]  # file stem, caption, what to save


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def draw_pretraining(logs: pd.DataFrame, configs: dict, styles: dict) -> Iterator[Item]:
    """The learning curves and Fig. 9."""
    caption = "Pretraining: loss, k-NN macro F1, effective rank and throughput per epoch."
    yield "curves", caption, figures.curves_figure(logs, styles)
    times = numbers.training_times(logs, configs, images=500 * 175_381)
    if len(times):
        caption = "Pretraining time per run and device; the hatched white bars are the paper's."
        yield "fig9", caption, figures.time_figure(times, styles)


def draw_embeddings(embeddings: list[dict], points: int) -> Iterator[Item]:
    """Fig. 3, one for each set of classes."""
    for k, classes in enumerate(dict.fromkeys(tuple(item["classes"]) for item in embeddings)):
        group = [item for item in embeddings if tuple(item["classes"]) == classes]
        caption = "t-SNE of the embeddings, with the silhouette score of the features before t-SNE."
        yield "fig3" + f"-{k + 1}" * bool(k), caption, figures.embeddings_figure(group, points)


def draw_transfer(
    test: pd.DataFrame, task: str, data: str, reference: str | None, styles: dict
) -> Iterator[Item]:
    """One task on one dataset: Figs. 4, 5, 8a and Table V, or Table IV, Figs. 6, 7, 8b and Table VI."""
    summary, (curve, bars, gaps, table) = numbers.over_seeds(test), STEMS[task]
    n = test.seed.nunique()
    label, seeds = figures.LABELS[task], f"mean ± standard deviation over {n} seeds" if n > 1 else "one seed"
    if task == "scene" and (test["mode"] == "linear").any():
        yield (
            f"table4-{data}",
            f"F1 of linear probes on {data}, higher is better; {seeds}.",
            tables.f1_table(summary),
        )
    if test.ratio.nunique() > 1:
        caption = f"Train ratio on {data}; {label}; {seeds}."
        yield f"{curve}-{data}", caption, figures.ratio_figure(summary, task, styles)
    key = "; ".join(
        f"{i} {name}" for i, name in enumerate(numbers.class_names(numbers.headline(summary, task)))
    )
    for mode in test["mode"].unique():
        caption = f"Per class on {data}, {name_of(mode)}; {label}; {seeds}. Classes: {key}."
        yield f"{table}-{data}-{mode}", caption, tables.class_table(summary, task, mode)
    yield from draw_classes(test[test["mode"] == "finetune"], task, data, reference, styles, (bars, gaps))
    if len(lines := numbers.comparison(test, task, reference)):
        caption = (
            f"Differences on {data} over the n seeds both have; p of a paired t-test, unadjusted; {label}."
        )
        yield f"comparison-{task}-{data}", caption, tables.comparison_table(lines, task)


def draw_classes(
    test: pd.DataFrame, task: str, data: str, reference: str | None, styles: dict, stems: tuple[str, str]
) -> Iterator[Item]:
    """Figs. 5 and 8a, or 7 and 8b: each pretrained initialisation, fine-tuned, against the baselines."""
    baselines, label = numbers.baselines_of(test.init, reference), figures.LABELS[task]
    summary = numbers.over_seeds(test)
    for init in (
        i for i in numbers.ordered(test.init) if baselines and i not in (*NOT_PRETRAINED, reference)
    ):
        against = " and ".join(name_of(b) for b in baselines[::-1])
        caption = (
            f"{name_of(init)} beside {against} per class and train ratio on {data}, fine-tuning; {label}."
        )
        yield (
            f"{stems[0]}-{data}-{init}",
            caption,
            figures.class_figure(summary, task, init, baselines[::-1], styles),
        )
        cells = numbers.class_differences(test, task, init, baselines[0])
        if len(cells):
            pair = f"{name_of(init)} minus {name_of(baselines[0])}"
            caption = (
                f"{pair} per class and train ratio on {data}, fine-tuning; "
                f"p of a paired t-test over n seeds, unadjusted; {label}."
            )
            yield (
                f"{stems[1]}-{data}-{init}",
                caption,
                figures.difference_figure(cells, task, init, baselines[0]),
            )
            yield f"{stems[1]}-{data}-{init}", caption, tables.difference_table(cells)


def compare_paper(test: pd.DataFrame, configs: dict) -> Iterator[Item]:
    """Our cells beside Tables III-VI, where the paper's datasets were used."""
    flags = ["hidden", "lr", "momentum", "out_dim", "weight_decay"]
    used = {run: c for run, c in configs.items() if re.search(PRETRAINING_DATA[0], str(c.get("data")), re.I)}
    ours = {
        "III": pd.DataFrame(
            [
                {"method": c["method"], "hyperparameter": flag, "run": run, "mean": float(c[flag])}
                for run, c in used.items()
                for flag in flags
                if c.get(flag) is not None
            ]
        )
    }
    for number, task, mode, (name, images) in (
        ("IV", "scene", "linear", PRETRAINING_DATA),
        ("V", "fraction", "finetune", TRANSFER_DATA),
        ("VI", "scene", "finetune", TRANSFER_DATA),
    ):
        rows = test[(test.task == task) & (test["mode"] == mode)]
        same = rows.data.str.contains(name, case=False) | (
            rows.groupby("data").images.transform("max") == images
        )
        rows = numbers.over_seeds(rows[same])
        place = {"all": "all"} | {
            c: str(i) for i, c in enumerate(numbers.class_names(numbers.headline(rows, task)))
        }
        methods = [configs.get(init, {}).get("method", init) for init in rows.init]
        ours[number] = rows.assign(run=rows.init, init=methods, **{"class": rows["class"].map(place)})
    for number, rows in ours.items():
        paper = pd.read_csv(
            PAPER_FOLDER / f"{PAPER_TABLES[number]}.csv", dtype={"class": str, "ratio": float}
        )
        if len(rows):
            both = tables.beside_paper(rows, paper.rename(columns={"value": "mean"}))
            yield f"compare-{PAPER_TABLES[number]}", f"Table {number} of the paper, cell by cell.", both
        else:
            print(f"not compared: Table {number}: nothing here is on the paper's dataset")


def missing(test: pd.DataFrame, configs: dict, logs: pd.DataFrame, embeddings: list[dict]) -> Iterator[str]:
    """What could not be drawn, or stands on fewer cells than the rest, and the command that makes it."""

    def weights(inits: list[str]) -> str:
        folders = {init: configs.get(init, {}).get("folder", f"runs/{init}") for init in inits}
        files = (i if i in NOT_PRETRAINED else f"{folders[i]}/backbone.pth" for i in inits)
        return shlex.join(files)

    for method in (m for m in METHODS if m not in set(logs.method)):
        yield f"curves, fig9: {name_of(method)}: python train_ssl.py --method {method} --data DATA --out runs/{method}"
    probe = "python transfer.py --task scene --mode linear --data DATA --init"
    embedded = [item["init"] for item in embeddings]
    probed = list(test.init[(test.task == "scene") & (test["mode"] == "linear")])
    for item, have, extra in (("fig3", embedded, " --save-embeddings"), ("table4", probed, "")):
        if absent := [run for run in configs or ["barlow"] if run not in have]:
            yield f"{item}: {', '.join(map(name_of, absent))}: {probe} {weights(absent)}{extra}"
    for task, stems in STEMS.items():
        have = set(test.init[(test.task == task) & (test["mode"] == "finetune")])
        if absent := [i for i in ("random", "imagenet") if i not in have] + ["barlow"] * (not have):
            yield (
                f"{', '.join(stems)}: {', '.join(map(name_of, absent))}: python transfer.py --task {task} "
                f"--mode linear finetune --data DATA --init {weights(absent)}"
            )
    for (task, data), rows in test.groupby(["task", "data"]):
        ratios, seeds = sorted(rows.ratio.unique()), sorted(rows.seed.unique())
        for (init, mode), part in rows.groupby(["init", "mode"], sort=False):
            have = set(zip(part.ratio, part.seed))
            if holes := [(r, s) for r in ratios for s in seeds if (r, s) not in have]:
                r, s = (" ".join(f"{v:g}" for v in sorted(set(side))) for side in zip(*holes))
                s = s if " " in s else f"1 --seed {s}"  # one number is how many
                cells = f"{len(holes)} of {len(ratios) * len(seeds)} cells of {name_of(init)}, {name_of(mode)}, {data}"
                where, folder = (
                    shlex.quote(part.out.iloc[0]),
                    "" if data == "built-in" else f" --data PATH/{data}",
                )
                yield (
                    f"{cells}: python transfer.py --config {where}/config.yaml --out {where} --task {task}{folder} "
                    f"--init {weights([init])} --mode {mode} --ratios {r} --seeds {s}"
                )


def write(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def save(out: Path, stem: str, caption: str, thing: Figure | Table, formats: list[str]) -> None:
    """A table as CSV, Markdown and LaTeX; a figure in each format, without a date so that the bytes repeat."""
    if isinstance(thing, Table):
        write(out / f"{stem}.csv", thing.numbers.to_csv(index=False, lineterminator="\n"))
        write(out / f"{stem}.md", tables.markdown(thing, caption))
        write(out / f"{stem}.tex", tables.latex(thing, caption, stem))
        return
    thing.draw_without_rendering()
    thing.set_layout_engine("none")  # laid out once, for all formats
    for form in formats:
        temporary = out / f".{stem}.{form}"
        thing.savefig(temporary, format=form, metadata={"CreationDate": None} if form == "pdf" else None)
        os.replace(temporary, out / f"{stem}.{form}")
    plt.close(thing)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", nargs="*", type=Path, default=sorted(Path("runs").glob("*")), help="(runs/*)"
    )
    parser.add_argument(
        "--results", nargs="*", type=Path, help="of transfer.py (results.csv and runs/*/results.csv)"
    )
    parser.add_argument(
        "--embeddings", nargs="*", type=Path, help="npz files (embeddings*.npz beside the results)"
    )
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--format", nargs="+", choices=["png", "pdf"], default=["png", "pdf"])
    parser.add_argument("--reference", metavar="INIT", help="initialisation to measure against (imagenet)")
    parser.add_argument(
        "--compare-paper", action="store_true", help="our numbers beside the paper's Tables III-VI"
    )
    parser.add_argument("--points", type=int, default=2000, help="images per t-SNE")
    parser.error = fail
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    args = flags().parse_args(argv)
    if args.results is None:
        args.results = [Path("results.csv"), *sorted(Path("runs").glob("*/results.csv"))]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    configs, logs = numbers.read_runs(args.runs)
    test = numbers.at_chosen_epoch(numbers.read_results([path for path in args.results if path.exists()]))
    beside = sorted({file for path in args.results for file in path.parent.glob("embeddings*.npz")})
    embeddings = numbers.read_embeddings(beside if args.embeddings is None else args.embeddings)
    if logs.empty and test.empty and not embeddings:
        fail(
            f"nothing to draw: no log.csv in --runs, no test rows in {' '.join(map(str, args.results))}, "
            "no embeddings; begin with: python train_ssl.py --method barlow --data DATA"
        )
    if args.reference and args.reference not in set(test.init):
        fail(
            f"--reference {args.reference}: not in the results, which hold {', '.join(numbers.ordered(test.init))}"
        )

    plt.switch_backend("Agg")  # no screen
    plt.rcParams.update(figures.RC)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {error.filename}: {error.strerror}")
    inits = numbers.ordered([*test.init, *configs, *(item["init"] for item in embeddings)])
    styles, index = figures.styles_of(inits, configs), []

    def items() -> Iterator[Item]:
        yield from draw_pretraining(logs, configs, styles) if len(logs) else ()
        yield from draw_embeddings(embeddings, args.points)
        for (task, data), rows in test.groupby(["task", "data"]):
            yield from draw_transfer(rows, task, data, args.reference, styles)
        yield from compare_paper(test, configs) if args.compare_paper else ()

    for stem, caption, thing in items():
        stem, kind = stem_of(stem), "table" if isinstance(thing, Table) else "figure"
        save(args.out, stem, caption, thing, args.format)
        index.append({"stem": stem, "kind": kind, "caption": caption})
        print(f"{kind} {args.out / stem}")
    write(args.out / "index.csv", pd.DataFrame(index).to_csv(index=False, lineterminator="\n"))
    for line in missing(test, configs, logs, embeddings):
        print(f"missing: {line}")


if __name__ == "__main__":
    main()

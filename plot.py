"""The paper's figures and tables from files already written; nothing is trained or measured here.

    python plot.py --runs runs/* --results results.csv --out figures
    python plot.py --results results.csv --reference random --format pdf --compare-paper
    python plot.py --runs runs/old runs/new --results    # learning curves, and quality against seconds

Reads run directories (config.yaml, log.csv), results.csv and the embeddings of `transfer.py
--save-embeddings`. What a number belongs to stands in its columns, never in a file name. Draws what is there;
index.csv lists what was drawn, and missing.csv what was not, with the command that makes it. What cannot be
read is named and left out, and the exit code is then 1. Needs neither torch nor a GPU; the same input gives
the same bytes.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

import common
from common import harmless
from plots import figures, numbers, tables
from plots.beside_paper import compare_paper
from plots.embeddings import embeddings_figure
from plots.missing import Gap, Studies, find_gaps
from plots.pretraining import curves_figure, quality_figure, time_figure
from plots.reading import pretraining_data, read_embeddings, read_results, read_runs, warn
from plots.style import (
    AXIS_NAMES,
    NOT_PRETRAINED,
    PAPER_EPOCHS,
    PAPER_IMAGES,
    RC,
    SHARE,
    name_of,
    ordered,
    ordered_modes,
    stem_of,
    styles_of,
)
from plots.tables import Sheet
from scores import TASKS


class Stems(NamedTuple):
    """What the figures and tables of a task are called, by the paper's numbers."""

    curve: str  # the metric against the ratio
    classes: str
    differences: str  # of the classes, to a baseline
    table: str  # a row a class


STEMS = {
    "fraction": Stems("fig4", "fig5", "fig8a", "table5"),
    "scene": Stems("fig6", "fig7", "fig8b", "table6"),
}
# What the paper has too: of fine-tuning, and of shares of the labels.
NUMBERS = {
    "fig3": "Fig. 3",
    "table3": "Table III",
    "fig9": "Fig. 9",
    "table4": "Table IV",
    "fig4": "Fig. 4",
    "fig5": "Fig. 5",
    "fig8a": "Fig. 8a",
    "table5": "Table V",
    "fig6": "Fig. 6",
    "fig7": "Fig. 7",
    "fig8b": "Fig. 8b",
    "table6": "Table VI",
}
# Metrics that other papers give: ratio curves of their own, where they are there.
PUBLISHED = ["accuracy", "knn5_accuracy"]
# What the columns over all classes are, in a class-wise table.
OVERALL = {
    "fraction": "; RMSE: the mean of those of the classes, as in the paper; pooled: over all entries at once",
    "scene": "",
}


class Item(NamedTuple):
    """Something to draw."""

    stem: str  # file name without its ending
    caption: str
    draw: Callable[[], Figure | Sheet]
    number: str = ""  # in the paper
    part: str = ""  # of the report, where it is not that of its stem


class Group(NamedTuple):
    """Test rows of one task on one dataset, whose ratios are all meant in one way."""

    task: str
    data: str
    unit: str  # SHARE or PER_CLASS
    test: pd.DataFrame
    pretraining: bool | None = None  # whether runs were pretrained on this data; None: not known

    def place(self) -> str:
        """The part of a file's name that tells this group from the others of its task."""
        return self.data if self.unit == SHARE else f"{self.data}-per-class"

    def number(self, stem: str) -> str:
        """Under which number the paper has it; blank where it has no such thing."""
        same = not self.pretraining or stem == "table4"
        return NUMBERS[stem] if same and self.unit == SHARE else ""


def build_parser() -> common.Parser:
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="*", type=Path, metavar="FOLDER", help="of train_ssl.py; runs/* if left out")
    add(
        "--results",
        nargs="*",
        type=Path,
        metavar="CSV",
        help="of transfer.py; results.csv and runs/*/results.csv",
    )
    add(
        "--embeddings",
        nargs="*",
        type=Path,
        metavar="NPZ",
        help="embeddings*.npz beside the results if left out",
    )
    add("--out", type=Path, default=Path("figures"))
    add("--format", nargs="+", choices=["png", "pdf"], default=["png", "pdf"])
    add("--reference", metavar="INIT", help="initialisation to measure against; imagenet if left out")
    add("--compare-paper", action="store_true", help="our numbers beside the paper's Tables III-VI")
    add("--points", type=common.number(int, 3), default=2000, help="images per t-SNE")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    problems: list[str] = []
    absent = [path for path in [*args.runs, *args.results, *args.embeddings] if not path.exists()]
    there = read_all(args, problems)
    check(args, there)
    for path in absent:
        warn(f"{path}: no such file or folder", problems)
    plt.switch_backend("Agg")  # no screen
    plt.rcParams.update(RC)
    common.make_folder(args.out)

    inits = [*there.test.init, *there.configs, *(item["init"] for item in there.embeddings)]
    styles = styles_of(ordered(inits), there.configs)
    items, gaps = plan_items(there, args, styles)
    index = save_items(items, args.out, args.format, problems)
    gaps = [*find_gaps(there, STEMS), *gaps]
    for gap in gaps:
        print(f"missing: {gap.figures}: {gap.missing}: {gap.command}".removesuffix(": "))
    common.write_csv(args.out / "index.csv", index)
    common.write_csv(args.out / "missing.csv", pd.DataFrame(gaps, columns=Gap._fields))
    if problems:
        print(f"{len(index)} figures and tables in {args.out}; {len(problems)} problems, named above")
        raise SystemExit(1)


# What goes in


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """The flags, with the files that are read where none are named."""
    args = build_parser().parse_args(argv)
    if args.runs is None:
        args.runs = sorted(Path("runs").glob("*"))
    if args.results is None:
        args.results = [Path("results.csv"), *sorted(Path("runs").glob("*/results.csv"))]
        args.results = [path for path in args.results if path.exists()]
    if args.embeddings is None:
        args.embeddings = sorted(
            {file for path in args.results for file in path.parent.glob("embeddings*.npz")}
        )
    return args


def read_all(args: argparse.Namespace, problems: list[str]) -> Studies:
    configs, logs = read_runs(args.runs, problems)
    results = read_results(list(filter(Path.exists, args.results)), problems)
    embeddings = read_embeddings(list(filter(Path.exists, args.embeddings)), problems)
    return Studies(numbers.at_chosen_epoch(results), configs, logs, embeddings)


def check(args: argparse.Namespace, there: Studies) -> None:
    """Refuse what leaves nothing to draw, or nothing to measure against."""
    if there.logs.empty and there.test.empty and not there.embeddings:
        results = " ".join(map(str, args.results)) or "results.csv"
        raise common.DataError(
            f"nothing to draw: no log.csv in --runs, no test rows in {results}, no embeddings; "
            "begin with: python train_ssl.py --method barlow --data DATA"
        )
    if args.reference and args.reference not in set(there.test.init):
        known = ", ".join(ordered(there.test.init))
        raise common.ConfigError(f"--reference {args.reference}: not in the results, which hold {known}")


# What is drawn


def plan_items(
    there: Studies, args: argparse.Namespace, styles: dict[str, tuple]
) -> tuple[list[Item], list[Gap]]:
    """Everything that these files give, in the report's order, and the paper's tables that they lack."""
    items = [*draw_pretraining(there.logs, there.configs, styles)]
    items += draw_embeddings(there.embeddings, args.points)
    known = pretraining_data(there.configs)
    for (task, data, unit), rows in there.test.groupby(["task", "data", "unit"]):
        group = Group(task, data, unit, rows, rows.folder.iloc[0] in known if known else None)
        part = "pretraining" if group.pretraining else ""
        items += [item._replace(part=part) for item in draw_transfer(group, args.reference, styles)]
    if not args.compare_paper:
        return items, []
    pairs, gaps = compare_paper(there.test, there.configs)
    for number, stem, ours, paper, unlike in pairs:
        other = f" Not as in the paper: {'; '.join(unlike)}." if unlike else ""
        caption = f"Table {number} of the paper, cell by cell.{other}"
        items.append(Item(stem, caption, partial(tables.beside_paper, ours, paper)))
    return items, gaps


def draw_pretraining(
    logs: pd.DataFrame, configs: dict[str, dict], styles: dict[str, tuple]
) -> Iterator[Item]:
    """The learning curves, Fig. 9, and how good a backbone is after how many seconds."""
    if logs.empty:
        return
    caption = "Pretraining: loss, k-NN macro F1, effective rank and throughput per epoch."
    yield Item("curves", caption, partial(curves_figure, logs, styles))
    caption = "How each run was pretrained."
    yield Item("table3", caption, partial(tables.settings_sheet, configs), NUMBERS["table3"])
    times = numbers.training_times(logs, configs, PAPER_EPOCHS * PAPER_IMAGES)
    if len(times):
        caption = "Pretraining time per run and device; the hatched white bars are the paper's."
        yield Item("fig9", caption, partial(time_figure, times, styles), NUMBERS["fig9"])
    column, timed = numbers.quality_over_time(logs)
    if len(timed):
        caption = f"{name_of(column)} on held-out images against the seconds of training, checks included."
        yield Item("time_to_quality", caption, partial(quality_figure, timed, column, styles))
        reached = numbers.time_to_quality(timed)
        caption = f"Seconds of training until {name_of(column)} on held-out images reached a level."
        yield Item("time_to_quality", caption, partial(tables.quality_sheet, reached, column))


def draw_embeddings(embeddings: list[dict], points: int) -> Iterator[Item]:
    """Fig. 3, one for each dataset and set of classes."""
    groups: dict[tuple, list[dict]] = {}
    for item in embeddings:
        groups.setdefault((item["data"], *item["classes"]), []).append(item)
    for number, ((data, *_), group) in enumerate(groups.items()):
        stem = "fig3" if number == 0 else f"fig3-{number + 1}"
        where = f" on {data}" if data else ""
        some = f"of at most {points:,} test images, drawn at random"
        caption = (
            f"t-SNE of the embeddings{where} {some}, with the silhouette score of their features before it."
        )
        yield Item(stem, caption, partial(embeddings_figure, group, points), NUMBERS["fig3"])


def draw_transfer(group: Group, reference: str | None, styles: dict[str, tuple]) -> Iterator[Item]:
    """Figs. 4, 5, 8a and Table V, or Table IV, Figs. 6, 7, 8b and Table VI."""
    task, data, test = group.task, group.data, group.test
    summary, curve, table = numbers.over_seeds(test), STEMS[task].curve, STEMS[task].table
    probed = summary[summary["mode"] == "linear"]
    if task == "scene" and len(probed) and group.unit == SHARE and group.pretraining is not False:
        heads = how_found(test[test["mode"] == "linear"])
        seeds = how_many(probed.n[probed.ratio == probed.ratio.max()])
        caption = f"F1 of linear probes on {data}, {heads}; higher is better; {seeds}."
        yield Item(f"table4-{data}", caption, partial(tables.f1_sheet, summary), group.number("table4"))
    yield from draw_ratios(group, summary, curve, styles)
    classes = enumerate(numbers.class_names(numbers.headline(summary, task)))
    key = "; ".join(f"{i} {name}" for i, name in classes)
    for mode in ordered_modes(test["mode"]):
        what = f"{figures.CLASS_LABELS[task]}{OVERALL[task]}"
        seeds = how_many(summary.n[summary["mode"] == mode])
        caption = f"Per class on {data}, {name_of(mode)}; {what}; {seeds}. Classes: {key}."
        draw = partial(tables.class_sheet, summary, task, mode)
        number = group.number(table) if mode == "finetune" else ""
        yield Item(f"{table}-{group.place()}-{mode}", caption, draw, number)
    yield from draw_classes(group, reference, styles)
    lines = numbers.comparison(test, task, reference)
    if len(lines):
        what = "over the n seeds both have; p of a paired t-test, unadjusted"
        caption = f"Differences on {data} {what}; {figures.LABELS[task]}{averages(lines)}."
        draw = partial(tables.comparison_sheet, lines, task)
        yield Item(f"comparison-{task}-{group.place()}", caption, draw)


def averages(lines: pd.DataFrame) -> str:
    """For a caption, which ratios the means of a comparison are over; blank where there is no mean."""
    names = numbers.averaged_ratios(lines).items()
    unit = lines.unit.iloc[0]
    listed = {name: " or ".join(one.replace(" ", ", ") for one in ratios) for name, ratios in names}
    return "".join(f"; {name}: over {ratios} {unit}" for name, ratios in listed.items())


def how_found(rows: pd.DataFrame) -> str:
    """For a caption, how the heads of linear probes were found."""
    epochs = sorted(rows.epochs[rows.lr != 0].dropna().unique())
    ways = [f"heads by SGD in {common.counted(int(count), 'epoch')}" for count in epochs]
    if (rows.lr == 0).any():
        ways.append("heads solved for")
    return " or ".join(ways)


def how_many(n: pd.Series) -> str:
    """For a caption, over how many seeds its numbers are."""
    low, high = n.min(), n.max()
    if high == 1:
        return "one seed"
    return f"mean ± standard deviation over {high if low == high else f'{low} to {high}'} seeds"


def draw_ratios(group: Group, summary: pd.DataFrame, curve: str, styles: dict[str, tuple]) -> Iterator[Item]:
    """Fig. 4 or 6, of the task's own metric and of those that other papers give."""
    own, stem = TASKS[group.task].metric, f"{curve}-{group.place()}"
    axis = AXIS_NAMES[group.unit].capitalize()
    for metric in [own, *PUBLISHED]:
        rows = summary[(summary.metric == metric) & (summary["class"] == "all")]
        if rows.ratio.nunique() > 1:
            name, number = (stem, group.number(curve)) if metric == own else (f"{stem}-{metric}", "")
            label = figures.label_of(metric, group.task)
            caption = f"{axis} on {group.data}; {label}; {how_many(rows.n)}."
            draw = partial(figures.ratio_figure, summary, group.task, metric, styles)
            yield Item(name, caption, draw, number)


def draw_classes(group: Group, reference: str | None, styles: dict[str, tuple]) -> Iterator[Item]:
    """Figs. 5 and 8a, or 7 and 8b: each pretrained initialisation, fine-tuned, against the baselines."""
    task, classes, gaps = group.task, STEMS[group.task].classes, STEMS[group.task].differences
    tuned = group.test[group.test["mode"] == "finetune"]
    baselines, summary = numbers.baselines_of(tuned.init, reference), numbers.over_seeds(tuned)
    if not numbers.class_names(numbers.headline(summary, task)):
        return
    what = f"per class and {AXIS_NAMES[group.unit]} on {group.data}, fine-tuning"
    label, seeds = figures.CLASS_LABELS[task], how_many(summary.n)
    bars = f"bars: {seeds}" if summary.n.max() == 1 else f"bars and whiskers: {seeds}"
    for init in ordered(tuned.init):
        if not baselines or init in (*NOT_PRETRAINED, reference):
            continue
        others = baselines[::-1]
        against = " and ".join(map(name_of, others))
        caption = f"{name_of(init)} beside {against} {what}; {label}; {bars}."
        draw = partial(figures.class_figure, summary, task, init, others, styles)
        yield Item(f"{classes}-{group.place()}-{init}", caption, draw, group.number(classes))
        cells = numbers.class_differences(tuned, task, init, baselines[0])
        if len(cells):
            pair = f"{name_of(init)} minus {name_of(baselines[0])}"
            caption = f"{pair} {what}; p of a paired t-test over n seeds, unadjusted; {label}."
            stem, number = f"{gaps}-{group.place()}-{init}", group.number(gaps)
            draw = partial(figures.difference_figure, cells, task, init, baselines[0])
            yield Item(stem, caption, draw, number)
            yield Item(stem, caption, partial(tables.difference_sheet, cells), number)


# What comes out


def save_items(items: list[Item], out: Path, formats: list[str], problems: list[str]) -> pd.DataFrame:
    """Draw and save each item; index.csv's rows. One that cannot be drawn does not cost the others."""
    index, taken = [], {"figure": set(), "table": set()}  # two names may lead to one stem
    for item in items:
        stem = stem_of(item.stem)
        try:
            thing = item.draw()
            kind = "table" if isinstance(thing, Sheet) else "figure"
            stem = common.untaken(stem, taken[kind])
            save(out, stem, item.caption, thing, formats)
        except (ValueError, KeyError, IndexError, ArithmeticError) as error:
            warn(f"{stem}: cannot be drawn ({type(error).__name__}: {error})", problems)
            plt.close("all")
            continue
        about = {"caption": item.caption, "number": item.number, "part": item.part}
        index.append({"stem": stem, "kind": kind} | about)
        print(f"{kind} {out / stem}")
    return pd.DataFrame(index, columns=["stem", "kind", "caption", "number", "part"])


def save(out: Path, stem: str, caption: str, thing: Figure | Sheet, formats: list[str]) -> None:
    """A sheet as CSV, Markdown and LaTeX; a figure in each format, without a date, for the same bytes."""
    if isinstance(thing, Sheet):
        common.write_csv(out / f"{stem}.csv", without_formulas(thing.numbers))
        write_text(out / f"{stem}.md", tables.markdown(thing, caption))
        write_text(out / f"{stem}.tex", tables.latex(thing, caption, stem))
        return
    thing.draw_without_rendering()
    thing.set_layout_engine("none")  # laid out once, for all formats
    for form in formats:
        metadata = {"CreationDate": None} if form == "pdf" else None
        with common.replacing(out / f"{stem}.{form}") as partial_file:
            thing.savefig(partial_file, format=form, metadata=metadata)
    plt.close(thing)


def write_text(path: Path, content: str) -> None:
    with common.replacing(path) as partial_file:
        partial_file.write_text(content, encoding="utf-8")


def without_formulas(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows, with names that a spreadsheet shows and does not compute."""
    texts = rows.select_dtypes(include=["object", "string"]).columns
    return rows.assign(**{name: rows[name].map(shown_as_text) for name in texts})


def shown_as_text(value: object) -> object:
    return harmless(value) if isinstance(value, str) else value


if __name__ == "__main__":
    with common.one_line_errors():
        main()

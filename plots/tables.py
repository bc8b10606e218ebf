"""Numbers → the paper's tables, as CSV, Markdown and LaTeX (booktabs)."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from plots.numbers import class_names
from plots.style import TITLES, name_of, ordered
from scores import TASKS

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "×": r"$\times$",
    **{mark: "\\" + mark for mark in "&%$#_{}"},
}


# Keys of config.yaml, as the table of pretrainings has them
TRAINED = {
    "method": "Method",
    "images": "Images",
    "size": "Size (px)",
    "epochs": "Epochs",
    "batch_size": "Batch",
    "optimizer": "Optimiser",
    "lr": "Rate",
    "momentum": "Momentum",
    "weight_decay": "Weight decay",
    "hidden": "Hidden",
    "out_dim": "Output",
}


class Sheet(NamedTuple):
    """A table of the report."""

    shown: pd.DataFrame  # strings, as printed
    bold: np.ndarray  # same shape, the cells to stress
    numbers: pd.DataFrame  # tidy, for the CSV


def signed(value: float, form: str) -> str:
    """A number with a true minus sign; a dash where there is none."""
    return "–" if np.isnan(value) else format(value, form).replace("-", "−")


def shown_p(p: float) -> str:
    """`0.012`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else signed(p, ".3f")


def with_std(mean: float, std: float, form: str = ".3f") -> str:
    """`0.500 ± 0.010`; without the second part where there is one seed."""
    return signed(mean, form) + ("" if np.isnan(std) else f" ± {std:.3f}")


def as_text(value: object) -> str:
    """`175,381`, a name, or a dash where there is none."""
    if value is None or value != value:
        return "–"
    return f"{value:,.12g}" if isinstance(value, (int, float)) else name_of(str(value))


def title_of(rows: pd.DataFrame) -> str:
    """The column of the ratios, which are all meant in one way."""
    return TITLES[rows.unit.iloc[0]]


def plain(shown: pd.DataFrame, numbers: pd.DataFrame) -> Sheet:
    """A sheet without stressed cells."""
    return Sheet(shown, np.zeros(shown.shape, bool), numbers)


# The sheets


def score_sheet(rows: pd.DataFrame, columns: dict[tuple[str, str], str], sign: int) -> Sheet:
    """Mean ± std of the (metric, class) `columns`, a line per ratio and initialisation, each ratio's best in
    bold."""
    wide = rows.pivot(index=["ratio", "init"], columns=["metric", "class"], values=["mean", "std", "n"])
    order = [(ratio, init) for ratio in sorted(rows.ratio.unique()) for init in ordered(rows.init)]
    lines = [line for line in order if line in wide.index]
    mean, std, n = (wide[part].reindex(index=lines, columns=list(columns)) for part in ("mean", "std", "n"))
    score = sign * mean.round(3)
    blocks = score.groupby(level=0)
    best = (score == blocks.transform("max")) & (blocks.transform("count") > 1)
    shown = pd.DataFrame(
        {
            title_of(rows): [f"{ratio:g}" for ratio, _ in lines],
            "Initialisation": [name_of(init) for _, init in lines],
            "n": [f"{least:.0f}" for least in n.min(axis=1)],
        }
    )
    scores = {title: map(with_std, mean[key], std[key]) for key, title in columns.items()}
    shown = pd.concat([shown, pd.DataFrame(scores)], axis=1)
    return Sheet(shown, np.hstack([np.zeros((len(lines), 3), bool), best.to_numpy()]), rows)


def settings_sheet(configs: dict[str, dict]) -> Sheet:
    """Table III: how each run was pretrained, by its config.yaml; a dash where that does not say."""
    numbers = pd.DataFrame([{"run": run} | config for run, config in configs.items()])
    numbers = numbers.reindex(columns=["run", *TRAINED])
    shown = numbers.map(as_text)
    return plain(shown.rename(columns={"run": "Run"} | TRAINED), numbers)


def f1_sheet(summary: pd.DataFrame) -> Sheet:
    """Table IV: micro, macro and weighted F1 of linear probes at the largest train ratio."""
    metrics = TASKS["scene"].tabled
    rows = summary[(summary.task == "scene") & (summary["mode"] == "linear") & summary.metric.isin(metrics)]
    rows = rows[(rows["class"] == "all") & (rows.ratio == rows.ratio.max())]
    return score_sheet(rows, {(metric, "all"): name_of(metric) for metric in metrics}, +1)


def class_sheet(summary: pd.DataFrame, task: str, mode: str) -> Sheet:
    """Tables V and VI: overall numbers, then one column per class under its number."""
    goal = TASKS[task]
    rows = summary[(summary.task == task) & (summary["mode"] == mode)]
    rows = rows[rows.metric.isin([*goal.tabled, goal.per_class])]
    overall = [metric for metric in goal.tabled if (rows.metric == metric).any()]
    columns = {(metric, "all"): name_of(metric) for metric in overall}
    columns |= {(goal.per_class, name): str(i) for i, name in enumerate(class_names(rows))}
    return score_sheet(rows, columns, goal.sign)


def comparison_sheet(lines: pd.DataFrame, task: str) -> Sheet:
    """`comparison` as printed; p below .05 in bold."""
    metric = name_of(TASKS[task].metric)
    shown = pd.DataFrame(
        {
            "Mode": lines["mode"].map(name_of),
            title_of(lines): [ratio if isinstance(ratio, str) else f"{ratio:g}" for ratio in lines.ratio],
            "Initialisation": lines.init.map(name_of),
            "Baseline": lines.baseline.map(name_of),
            metric: [signed(value, ".3f") for value in lines.value],
            f"Baseline {metric}": [signed(value, ".3f") for value in lines.baseline_value],
            "Difference": [signed(value, "+.4f") for value in lines.difference],
            "n": lines.n.map(str),
            "p": lines.p.map(shown_p),
            "Improvement (%)": [signed(value, "+.2f") for value in lines.improvement],
            "Classes won": [f"{wins} / {cells}" for wins, cells in zip(lines.wins, lines.cells)],
            "Equal": lines.ties.map(str),
            "Mean class difference": [signed(value, ".4f") for value in lines.class_difference],
        }
    )
    return Sheet(shown, bold_p(shown, lines.p), lines)


def difference_sheet(cells: pd.DataFrame) -> Sheet:
    """`class_differences` as printed; p below .05 in bold."""
    shown = pd.DataFrame(
        {
            "Class": cells["class"],
            title_of(cells): cells.ratio.map("{:g}".format),
            "n": cells.n.map(str),
            "Difference": [signed(value, "+.4f") for value in cells.difference],
            "p": cells.p.map(shown_p),
        }
    )
    return Sheet(shown, bold_p(shown, cells.p), cells)


def bold_p(shown: pd.DataFrame, p: pd.Series) -> np.ndarray:
    """(rows, columns) bool: column p, where p (rows,) is below 0.05."""
    return (p.to_numpy() < 0.05)[:, None] & (shown.columns == "p")


def quality_sheet(reached: pd.DataFrame, column: str) -> Sheet:
    """`time_to_quality` as printed: a line per run, the seconds to each level in a column."""
    wide = reached.pivot(index="run", columns="level", values="seconds")
    runs = reached.drop_duplicates("run").set_index("run")
    wide = wide.reindex(runs.index)
    shown = pd.DataFrame({"Run": [name_of(run) for run in runs.index]})
    for level in wide:
        shown[f"Seconds to {100 * level:g} %"] = [signed(seconds, ",.0f") for seconds in wide[level]]
    shown[f"Best {name_of(column)}"] = [f"{best:.3f}" for best in runs.best]
    shown["Seconds to the best"] = [f"{seconds:,.0f}" for seconds in runs.seconds_to_best]
    shown["Seconds in all"] = [f"{seconds:,.0f}" for seconds in runs.total_seconds]
    return plain(shown, reached.assign(metric=column))


def beside_paper(ours: pd.DataFrame, paper: pd.DataFrame) -> Sheet:
    """Every cell of a table of the paper that `ours` has too, with the difference ours − paper."""
    keys = [column for column in paper if column not in ("mean", "std")]
    paper, ours = (side.reindex(columns=dict.fromkeys([*side, "std"])) for side in (paper, ours))
    both = paper.merge(ours, on=keys, suffixes=("_paper", "_ours"))
    both["difference"] = both.mean_ours - both.mean_paper
    form = ".3f" if "class" in keys else "g"  # scores have three decimals, hyperparameters their own
    shown = pd.DataFrame({key: both[key].map(text_of) for key in keys})
    shown["run"] = both.run
    for side in ("paper", "ours"):
        values = zip(both[f"mean_{side}"], both[f"std_{side}"])
        shown[side] = [with_std(mean, std, form) for mean, std in values]
    shown["ours − paper"] = [signed(value, f"+{form}") for value in both.difference]
    return plain(shown, both)


def text_of(value: float | str) -> str:
    """A number without needless digits; a name as the tables show it."""
    return f"{value:g}" if isinstance(value, float) else name_of(value)


# The forms


def markdown(sheet: Sheet, caption: str) -> str:
    """The caption and a table of GitHub's Markdown."""
    lines = [list(sheet.shown.columns), ["---"] * sheet.shown.shape[1]]
    for row, marks in zip(sheet.shown.to_numpy(), sheet.bold):
        lines.append([f"**{cell}**" if bold else cell for cell, bold in zip(row, marks)])
    rows = ["| " + " | ".join(map(one_cell, line)) + " |\n" for line in lines]
    return f"{caption}\n\n" + "".join(rows)


def one_cell(text: str) -> str:
    """Text that neither a bar nor a line end takes out of its cell of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def escape(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(LATEX.get(mark, mark) for mark in text)


def latex(sheet: Sheet, caption: str, label: str) -> str:
    """A booktabs table one column wide, or as wide as the page where it has more than six columns."""
    columns = sheet.shown.shape[1]
    kind, width = ("table*", r"\textwidth") if columns > 6 else ("table", r"\columnwidth")
    rows = []
    for row, marks in zip(sheet.shown.to_numpy(), sheet.bold):
        cells = [escape(" ".join(cell.split())) for cell in row]
        stressed = [f"\\textbf{{{cell}}}" if bold else cell for cell, bold in zip(cells, marks)]
        rows.append(" & ".join(stressed) + r" \\")
    head = " & ".join(map(escape, sheet.shown.columns)) + r" \\"
    lines = [
        r"% needs \usepackage{booktabs, graphicx}",
        f"\\begin{{{kind}}}",
        r"\centering",
        f"\\caption{{{escape(caption)}}}",
        f"\\label{{tab:{label}}}",
        f"\\resizebox{{{width}}}{{!}}{{%",
        f"\\begin{{tabular}}{{{'l' * columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}}",
        f"\\end{{{kind}}}",
    ]
    return "\n".join(lines) + "\n"

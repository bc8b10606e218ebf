"""Numbers → the paper's tables, as CSV, Markdown and LaTeX (booktabs)."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from plots.numbers import F1, TASKS, class_names, name_of, ordered


class Table(NamedTuple):
    shown: pd.DataFrame  # strings, as printed
    bold: np.ndarray  # same shape, the cells to stress
    numbers: pd.DataFrame  # tidy, for the CSV


def signed(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form).replace("-", "−")


def shown_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else signed(p, ".3f")


def score_table(rows: pd.DataFrame, columns: dict[tuple[str, str], str], sign: int) -> Table:
    """Mean ± std of the (metric, class) `columns`, a line per ratio and initialisation, each ratio's best in bold."""
    wide = rows.pivot(index=["ratio", "init"], columns=["metric", "class"], values=["mean", "std", "n"])
    lines = [(r, i) for r in sorted(rows.ratio.unique()) for i in ordered(rows.init) if (r, i) in wide.index]
    mean, std, n = (wide[part].reindex(index=lines, columns=list(columns)) for part in ("mean", "std", "n"))
    score = sign * mean.round(3)
    blocks = score.groupby(level=0)
    best = (score == blocks.transform("max")) & (blocks.transform("count") > 1)
    shown = pd.DataFrame(
        {
            "Ratio (%)": [f"{r:g}" for r, _ in lines],
            "Initialisation": [name_of(i) for _, i in lines],
            "n": [f"{least:.0f}" for least in n.min(axis=1)],
        }
    )
    for key, title in columns.items():
        shown[title] = [
            signed(m, ".3f") + ("" if np.isnan(s) else f" ± {s:.3f}") for m, s in zip(mean[key], std[key])
        ]
    return Table(shown, np.hstack([np.zeros((len(lines), 3), bool), best.to_numpy()]), rows)


def f1_table(summary: pd.DataFrame) -> Table:
    """Table IV: micro, macro and weighted F1 of linear probes at the largest train ratio."""
    rows = summary[(summary.task == "scene") & (summary["mode"] == "linear") & summary.metric.isin(F1)]
    rows = rows[(rows["class"] == "all") & (rows.ratio == rows.ratio.max())]
    return score_table(rows, {(metric, "all"): name_of(metric) for metric in F1}, +1)


def class_table(summary: pd.DataFrame, task: str, mode: str) -> Table:
    """Tables V and VI: overall numbers, then one column per class under its number."""
    goal = TASKS[task]
    rows = summary[(summary.task == task) & (summary["mode"] == mode)]
    rows = rows[rows.metric.isin([*goal.overall, goal.per_class])]
    columns = {(metric, "all"): name_of(metric) for metric in goal.overall}
    columns |= {(goal.per_class, name): str(i) for i, name in enumerate(class_names(rows))}
    return score_table(rows, columns, goal.sign)


def comparison_table(lines: pd.DataFrame, task: str) -> Table:
    """`comparison` as printed; p below .05 in bold."""
    metric = name_of(TASKS[task].metric)
    shown = pd.DataFrame(
        [
            {
                "Mode": name_of(x["mode"]),
                "Ratio (%)": x.ratio if x.ratio == "mean" else f"{x.ratio:g}",
                "Initialisation": name_of(x.init),
                "Baseline": name_of(x.baseline),
                metric: signed(x.value, ".3f"),
                f"Baseline {metric}": signed(x.baseline_value, ".3f"),
                "Difference": signed(x.difference, "+.4f"),
                "n": str(x.n),
                "p": shown_p(x.p),
                "Improvement (%)": signed(x.improvement, "+.2f"),
                "Classes won": f"{x.wins} / {x.cells}",
                "Mean class difference": signed(x.class_difference, ".4f"),
            }
            for _, x in lines.iterrows()
        ]
    )
    return Table(shown, (lines.p.to_numpy() < 0.05)[:, None] & (shown.columns == "p"), lines)


def difference_table(cells: pd.DataFrame) -> Table:
    """`class_differences` as printed; p below .05 in bold."""
    shown = pd.DataFrame(
        {
            "Class": cells["class"],
            "Ratio (%)": cells.ratio.map("{:g}".format),
            "n": cells.n.map(str),
            "Difference": [signed(d, "+.4f") for d in cells.difference],
            "p": [shown_p(p) for p in cells.p],
        }
    )
    return Table(shown, (cells.p.to_numpy() < 0.05)[:, None] & (shown.columns == "p"), cells)


def beside_paper(ours: pd.DataFrame, paper: pd.DataFrame) -> Table:
    """Every cell of a table of the paper that `ours` has too, with the difference ours − paper."""
    keys = [column for column in paper if column not in ("mean", "std")]
    paper, ours = (
        table.reindex(columns=dict.fromkeys([*table, "std"])) for table in (paper, ours)
    )  # some have no std
    both = paper.merge(ours, on=keys, suffixes=("_paper", "_ours"))
    both["difference"] = both.mean_ours - both.mean_paper
    form = ".3f" if "class" in keys else "g"  # scores have three decimals, hyperparameters their own
    shown = pd.DataFrame(
        {key: [f"{v:g}" if isinstance(v, float) else name_of(v) for v in both[key]] for key in keys}
    )
    shown["run"] = both.run
    for side in ("paper", "ours"):
        std = both[f"std_{side}"].map(lambda s: "" if np.isnan(s) else f" ± {s:.3f}")
        shown[side] = both[f"mean_{side}"].map(lambda m: format(m, form)) + std
    shown["ours − paper"] = [signed(d, f"+{form}") for d in both.difference]
    return Table(shown, np.zeros(shown.shape, bool), both)


def markdown(table: Table, caption: str) -> str:
    lines = [
        [f"**{cell}**" if bold else cell for cell, bold in zip(row, marks)]
        for row, marks in zip(table.shown.to_numpy(), table.bold)
    ]
    lines = [list(table.shown.columns), ["---"] * table.shown.shape[1], *lines]
    rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return f"{caption}\n\n" + "".join(rows)


def escape(text: str) -> str:
    """Plain text for LaTeX."""
    marks = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "<": "$<$",
        ">": "$>$",
        "×": r"$\times$",
        **{c: "\\" + c for c in "&%$#_{}"},
    }
    return "".join(marks.get(c, c) for c in text)


def latex(table: Table, caption: str, label: str) -> str:
    """A booktabs table one column wide, or as wide as the page where it has more than six columns."""
    columns = table.shown.shape[1]
    kind, width = ("table*", r"\textwidth") if columns > 6 else ("table", r"\columnwidth")
    cells = [
        [f"\\textbf{{{escape(cell)}}}" if bold else escape(cell) for cell, bold in zip(row, marks)]
        for row, marks in zip(table.shown.to_numpy(), table.bold)
    ]
    lines = [" & ".join(row) + r" \\" for row in cells]
    head = " & ".join(map(escape, table.shown.columns)) + r" \\"
    return "\n".join(
        [
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
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            f"\\end{{{kind}}}",
            "",
        ]
    )

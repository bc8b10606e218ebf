"""How scores are shown: numbers and ratios as text, and the table that transfer.py prints at its end."""

import sys

import pandas as pd

from common import counted
from scores.choice import summarise
from scores.metrics import TASKS, sign_of

FEW = 100  # images below which a score is a rough number: an accuracy of 0.8 has a standard error of 0.04
BOLD = "\033[1m{}\033[0m"


def exact(number: float | str) -> str:
    """The shortest text that reads back as the same number: 20240101, 0.1, 33.333333; text stays as it is."""
    if isinstance(number, str):
        return number
    return str(int(number)) if float(number).is_integer() else repr(float(number))


def ratio_name(ratio: float | str) -> str:
    """`25 %` of the training images, or `10/class`, as the column ratio has it."""
    return str(ratio) if "/" in str(ratio) else f"{float(ratio):g} %"


def ratio_rank(ratio: float | str) -> tuple[bool, float]:
    """A key to sort ratios by: numbers of images a class first, then shares."""
    count, _, per_class = str(ratio).partition("/")
    return not per_class, float(count)


def table(rows: pd.DataFrame, task: str) -> str:
    """Mean ± standard deviation over the seeds on test: the headline metric with a column a ratio or, of a
    single ratio, a column a metric. The best of a column is bold on a terminal. `rows`: of results.csv, as
    text."""
    found = summarise(rows)
    found = found[found.split == "test"]
    several = found.ratio.nunique() > 1
    others = [metric for metric in found.metric.unique() if metric != TASKS[task].metric]
    if several:
        found = found[found.metric == TASKS[task].metric]
    found = found.assign(column=found.ratio.map(ratio_name) if several else found.metric)
    columns = found.column.unique()
    if several:
        columns = [ratio_name(ratio) for ratio in sorted(found.ratio.unique(), key=ratio_rank)]
    signs = {column: TASKS[task].sign if several else sign_of(column) for column in columns}
    known = found.dropna(subset=["mean"])
    best = {c: (signs[c] * cells["mean"]).idxmax() for c, cells in known.groupby("column")}

    shown = TASKS[task].metric if several else task
    seeds = ("at least " if found.n.nunique() > 1 else "") + counted(found.n.min(), "seed")
    title = f"{shown} on test, mean ± standard deviation over {seeds}"
    longest = max(13, *found.init.str.len())
    lines = [title, " " * (longest + 11) + "".join(f"{column:>18}" for column in columns)]
    for (init, mode), cells in found.groupby(["init", "mode"], sort=False):
        winners = cells.index.isin(best.values())
        entries = {c.column: entry(c, winner) for c, winner in zip(cells.itertuples(), winners)}
        lines.append(f"{init:{longest}} {mode:10}" + "".join(entries.get(c, " " * 18) for c in columns))
    if several and others:
        lines.append(f"in summary.csv also {', '.join(others)}")
    return "\n".join(lines)


def entry(cell: tuple, best: bool) -> str:
    """`0.1234 ± 0.0012`, 18 characters wide; without the spread where there is none: of one seed, or of a
    solved head on all labels, where nothing is drawn."""
    spread = f" ± {cell.std:.4f}" if cell.n > 1 and cell.std > 0 else ""
    text = f"{cell.mean:.4f}{spread}".rjust(18)
    return BOLD.format(text) if best and sys.stdout.isatty() else text

"""The table that transfer.py prints at its end."""

import sys

import pandas as pd

from common import counted
from scores.choice import ratio_name, ratio_rank, summarise
from scores.metrics import TASKS, sign_of

BOLD = "\033[1m{}\033[0m"


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
    title = f"{shown} on test, mean ± standard deviation over {counted(found.n.min(), 'seed')}"
    lines = [title, " " * 24 + "".join(f"{column:>18}" for column in columns)]
    for (init, mode), cells in found.groupby(["init", "mode"], sort=False):
        winners = cells.index.isin(best.values())
        entries = {c.column: entry(c, winner) for c, winner in zip(cells.itertuples(), winners)}
        lines.append(f"{init[:13]:13} {mode:10}" + "".join(entries.get(c, " " * 18) for c in columns))
    if several and others:
        lines.append(f"in summary.csv also {', '.join(others)}")
    return "\n".join(lines)


def entry(cell: tuple, best: bool) -> str:
    """`0.1234 ± 0.0012`, 18 characters wide; without the spread where there is none: of one seed, or of a
    solved head on all labels, where nothing is drawn."""
    spread = f" ± {cell.std:.4f}" if cell.n > 1 and cell.std > 0 else ""
    text = f"{cell.mean:.4f}{spread}".rjust(18)
    return BOLD.format(text) if best and sys.stdout.isatty() else text

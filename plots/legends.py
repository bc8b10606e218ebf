"""Legends that stand below a figure."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots.style import name_of

LONG = 20  # letters of a name, of which two stand side by side on a column's width
LONGER = 32  # with nothing else beside it
LONGEST = 56  # that the width of a column holds
BLANK = {"ls": "none", "label": " "}


def class_key(figure: Figure, classes: list[str], handles: list | None = None) -> float:
    """The numbered class names under the figure, in as many columns as fit; returns the height they take in
    inches."""
    labels = [f"{i}  {name}" for i, name in enumerate(classes)]
    fitting = int(21 * figure.get_figwidth() / (6 + max(map(len, labels))))
    columns = min(5, len(classes), max(1, fitting))
    figure.legend(
        handles or [Line2D([], [], ls="none") for _ in classes],
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=5.5,
        handlelength=1,
        handletextpad=0.3,
        columnspacing=1,
        labelspacing=0.3,
    )
    return 0.105 * -(-len(classes) // columns)


def run_keys(runs: list[str], styles: dict[str, tuple], dashed: bool = True) -> list[Line2D]:
    """A handle for each run or initialisation: its colour and marker, and its dashes where lines have
    them."""
    keys = []
    for run in runs:
        colour, marker, dashes, _ = styles[run]
        look = {"ls": dashes} if dashed else {}
        keys.append(Line2D([], [], color=colour, marker=marker, label=fitting(name_of(run)), **look))
    return keys


def fitting(name: str) -> str:
    """The name, without its middle where it is too long for a column: names differ most at their ends."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def in_columns(first: list[Line2D], second: list[Line2D]) -> tuple[list[Line2D], int]:
    """(handles, columns): `first` in two columns, in one where a name is long, then `second` in columns of
    its own, filled up with blanks; all in one column where a name is longer still."""
    longest = max((len(str(key.get_label())) for key in first), default=0)
    if longest > LONGER:
        return [*first, *second], 1
    height = max(2, len(first) if longest > LONG else -(-len(first) // 2))
    keys = []
    for part in (first, second):
        keys += [*part, *(Line2D([], [], **BLANK) for _ in range(-len(part) % height))]
    return keys, len(keys) // height

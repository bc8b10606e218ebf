"""The files of plot.py → one HTML page that needs no other file."""

import base64
import html
import re
from pathlib import Path

import pandas as pd

SECTIONS = {
    "Pretraining": "curves|fig9|fig3|table4",
    "Land-cover fractions": "fig4|table5|fig5|fig8a|comparison-fraction",
    "Scene classes": "fig6|table6|fig7|fig8b|comparison-scene",
    "Beside the paper": "compare-",
    "More": "",
}
LONG = 25  # rows; a longer table opens on a click
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 80rem; margin: 0 auto; padding: 1.5rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; }
figcaption, summary { color: #444; font-size: .9rem; margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; }
th { border-top: 2px solid #333; border-bottom: 1px solid #333; }
tbody tr:nth-child(even) { background: #f4f4f4; }
tbody tr:last-child td { border-bottom: 2px solid #333; }
.left { text-align: left; }
pre { background: #f4f4f4; padding: .8rem; font-size: .78rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def write_report(
    file: Path, title: str, findings: list[str], figures: Path, appendix: dict[str, list[str]]
) -> None:
    """A page with the `findings` on top, every figure and table of plot.py's folder `figures` by section, and the
    `appendix` (heading → lines, printed as they are) at the end."""
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in findings)]
    left = pd.read_csv(figures / "index.csv")
    for heading, stems in SECTIONS.items():
        here = left.stem.str.match(stems)
        if here.any():
            order = left[here].iloc[
                left.stem[here].map(lambda stem: place(stem, stems)).argsort(kind="stable")
            ]
            parts += [f"<h2>{heading}</h2>", *(item(figures, *row) for row in order.itertuples(index=False))]
        left = left[~here]
    for heading, lines in appendix.items():
        text = html.escape("\n".join(lines))
        parts += [f"<h2>{html.escape(heading)}</h2>", f"<pre>{text}</pre>"]
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(file)


def place(stem: str, stems: str) -> int:
    return next(i for i, start in enumerate(stems.split("|")) if stem.startswith(start))


def item(figures: Path, stem: str, kind: str, caption: str) -> str:
    caption = html.escape(caption)
    if kind == "figure":
        picture = (figures / f"{stem}.png").read_bytes()
        width = int.from_bytes(picture[16:20]) // 2  # of 300 dots an inch: the same size of type in all
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        return f'<figure><img width="{width}" alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'
    head, _, *rows = [
        re.split(r"(?<!\\) \| ", line[2:-2])
        for line in (figures / f"{stem}.md").read_text(encoding="utf-8").splitlines()[2:]
    ]
    words = [not re.match(r"[\d±+−–*< ]", cell) for cell in rows[0]]  # columns of text stand to the left

    def line(tag: str, cells: list[str]) -> str:
        classes = (' class="left"' if word else "" for word in words)
        return (
            "<tr>"
            + "".join(f"<{tag}{c}>{cell_html(cell)}</{tag}>" for c, cell in zip(classes, cells))
            + "</tr>"
        )

    body = "\n".join(line("td", row) for row in rows)
    table = (
        f'<div class="scroll"><table><thead>{line("th", head)}</thead>\n<tbody>{body}</tbody></table></div>'
    )
    if len(rows) > LONG:
        return f"<details><summary>{caption} ({len(rows)} rows)</summary>{table}</details>"
    return f"<figure><figcaption>{caption}</figcaption>{table}</figure>"


def cell_html(text: str) -> str:
    """A cell of Markdown: bold, and the escaped bar."""
    return re.sub(r"^\*\*(.*)\*\*$", r"<b>\1</b>", html.escape(text.strip().replace("\\|", "|")))

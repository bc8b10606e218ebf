"""The files of plot.py → one HTML page that needs no other file."""

import base64
import html
import re
from pathlib import Path

import pandas as pd

import common

# Heading → starts of the stems below it, in their order
SECTIONS = {
    "Pretraining": ["curves", "table3", "fig9", "time_to_quality", "fig3", "table4"],
    "Land-cover fractions": ["fig4", "table5", "fig5", "fig8a", "comparison-fraction"],
    "Scene classes": ["fig6", "table6", "fig7", "fig8b", "comparison-scene"],
    "Beside the paper": ["compare-"],
    "More": [""],
}
LAST = 100  # more than any section has starts
LONG = 25  # rows; a longer table opens on a click
STYLE = """
body {
  font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 80rem; margin: 0 auto; padding: 1.5rem;
}
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
pre { background: #f4f4f4; padding: .8rem; font-size: .78rem; white-space: pre-wrap; overflow-wrap: anywhere;
}
"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
{body}
</html>
"""


def write_report(
    file: Path, title: str, findings: list[str], figures: Path, appendix: dict[str, list[str]]
) -> None:
    """A page with the `findings` on top, every figure and table of plot.py's folder `figures` by section, and
    the `appendix` (heading → lines, printed as they are) at the end. Written whole or not at all."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in findings]
    index = pd.read_csv(figures / "index.csv", keep_default_na=False)
    for heading, rows in by_section(index).items():
        parts.append(f"<h2>{heading}</h2>")
        for row in rows.itertuples():
            caption = f"{row.number}. {row.caption}" if row.number else row.caption
            parts.append(item(figures, row.stem, row.kind, caption))
    for heading, lines in appendix.items():
        text = html.escape("\n".join(lines))
        parts += [f"<h2>{html.escape(heading)}</h2>", f"<pre>{text}</pre>"]
    page = PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(parts))
    with common.replacing(file) as partial:
        partial.write_text(page, encoding="utf-8")


def by_section(index: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of index.csv below each heading that has any, in the section's order."""
    places = [place_of(*row) for row in zip(index.stem, index.part)]
    ordered = index.iloc[sorted(range(len(index)), key=lambda row: places[row])]
    section = [place_of(*row)[0] for row in zip(ordered.stem, ordered.part)]
    headings = list(SECTIONS)
    return {headings[number]: ordered[[s == number for s in section]] for number in sorted(set(section))}


def place_of(stem: str, part: str = "") -> tuple[int, int]:
    """(section, place in it) of the first start that fits; the last section takes everything. What belongs to
    the part `pretraining` comes to the end of the first section."""
    for section, starts in enumerate(SECTIONS.values()):
        for place, start in enumerate(starts):
            if stem.startswith(start):
                return (0, LAST * section + place) if part == "pretraining" else (section, place)
    raise AssertionError("the last section has an empty start")


def item(figures: Path, stem: str, kind: str, caption: str) -> str:
    """A figure or a table of plot.py, with its caption."""
    caption = html.escape(caption)
    if kind == "figure":
        return picture_html(figures / f"{stem}.png", caption)
    table, rows = table_html(figures / f"{stem}.md")
    if rows > LONG:
        return f"<details><summary>{caption} ({rows} rows)</summary>{table}</details>"
    return f"<figure><figcaption>{caption}</figcaption>{table}</figure>"


def picture_html(file: Path, caption: str) -> str:
    """A PNG inside the page, at half of its 300 dots an inch: the same size of type in all."""
    picture = file.read_bytes()
    width = int.from_bytes(picture[16:20]) // 2
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    image = f'<img width="{width}" alt="{caption}" src="{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def table_html(file: Path) -> tuple[str, int]:
    """The table of a Markdown file that plot.py wrote, and its number of rows."""
    lines = file.read_text(encoding="utf-8").splitlines()[2:]
    head, _, *rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines]
    words = [not re.match(r"[\d±+−–*< ]", cell) for cell in (rows[0] if rows else head)]
    left = [' class="left"' if word else "" for word in words]
    body = "\n".join(row_html("td", row, left) for row in rows)
    inside = f"<thead>{row_html('th', head, left)}</thead>\n<tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inside}</table></div>', len(rows)


def row_html(tag: str, cells: list[str], looks: list[str]) -> str:
    """One row; columns of words stand to the left."""
    inside = [f"<{tag}{look}>{cell_html(cell)}</{tag}>" for look, cell in zip(looks, cells)]
    return f"<tr>{''.join(inside)}</tr>"


def cell_html(text: str) -> str:
    """A cell of Markdown: bold, and the escaped bar."""
    return re.sub(r"^\*\*(.*)\*\*$", r"<b>\1</b>", html.escape(text.strip().replace("\\|", "|")))

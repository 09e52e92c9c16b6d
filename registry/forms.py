"""The tables of a comparison as Markdown, LaTeX, HTML, CSV or JSON."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from .comparison import Comparison
from .contract import PublishedResult
from .errors import InputError, printable, unknown
from .runs import finite
from .side_by_side import Table, tables_of
from .tables import Best, Rows


def render(comparison: Comparison, form: str, published: Sequence[PublishedResult] = (), name: str = "") -> str:
    """Return the tables as text.

    Args:
        comparison: the rows.
        form: `markdown`, `latex`, `html`, `csv` or `json`; the last two have figures at full precision.
        published: results of others to stand beside.
        name: sets LaTeX's labels apart from those of other tables in a document.

    Raises:
        InputError: there is no such form.
    """
    if form not in FORMS:
        raise InputError(unknown("format", form, FORMS))
    text = FORMS[form](comparison, published, name)
    return text if form == "json" else printable(text)  # JSON has escapes of its own


_FIGURE = re.compile(r"([+-]?\d+\.\d+) (± \d+\.\d+|\[[^;]*, [^;]*\])")
"""a mean with its spread or interval"""


def split(table: Table, fits: Callable[[Rows], bool]) -> list[Rows]:
    """Return a table's rows in pieces of as many columns as fit, those that tell which row it is in each."""
    columns = list(table.rows[0])
    keys, others = columns[: table.keys], columns[table.keys :]
    pieces: list[list[str]] = [[]]
    for column in others:
        if pieces[-1] and not fits([{name: row[name] for name in (*keys, *pieces[-1], column)} for row in table.rows]):
            pieces.append([])
        pieces[-1].append(column)
    return [[{name: row[name] for name in (*keys, *piece)} for row in table.rows] for piece in pieces]


def is_figures(cells: Sequence[str]) -> bool:
    """Whether the cells of a column are numbers, as far as there are any."""
    return any(cells) and all(cell[:1] in "+-0123456789<–" for cell in cells)


def _parts(text: str) -> Sequence[str]:
    """Return a mean and its spread or interval; other text has none."""
    figure = _FIGURE.fullmatch(text)
    return figure.groups() if figure else (text, "")


def _with_minus(text: str) -> str:
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def _markdown(comparison: Comparison, published: Sequence[PublishedResult], name: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(text: str) -> str:
        escaped = " ".join(text.split())
        escaped = re.sub(r"([\\`*\[\]|])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", escaped)
        escaped = escaped.replace("&", "&amp;").replace("<", "&lt;")
        if _FIGURE.fullmatch(text):
            escaped = _with_minus(text)
        return f"**{escaped}**" if isinstance(text, Best) else escaped

    parts = []
    for table in tables_of(comparison, published):
        columns = {column: is_figures([row[column] for row in table.rows]) for column in table.rows[0]}
        lines = [line([*map(cell, columns)]), line(["---:" if right else "---" for right in columns.values()])]
        lines += [line([cell(row[column]) for column in columns]) for row in table.rows]
        notes = "\n".join(f"- {cell(note)}" for note in table.notes)
        parts.append(f"**{cell(table.heading)}**\n\n" + "\n".join(lines) + f"\n\n{notes}\n")
    return "\n".join(parts)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"},
    **{"±": r"$\pm$", "–": "--", "†": r"$\dagger$", "≥": r"$\ge$", "≤": r"$\le$", "[": "{[}", "|": r"\textbar{}"},
    **{"−": "$-$", "…": r"\ldots{}", "²": "$^2$", "³": "$^3$", "√": r"$\surd$"},
}
_TEXT_WIDTH = 343.0
"""Points that a table may take: the text of LaTeX's own classes is 345 wide."""
_MOST_LINES = 50
"""Lines of `\\scriptsize` that a float may have, notes not counted"""


def _latex(comparison: Comparison, published: Sequence[PublishedResult], name: str) -> str:
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables_of(comparison, published):
        label = "tab:" + "-".join("".join(c if c.isalnum() else " " for c in f"{name} {table.title}").split())
        pieces = split(table, lambda piece: _points(piece) < _TEXT_WIDTH)
        starts = range(0, len(table.rows), _MOST_LINES)
        tabulars = [_tabular(piece[start : start + _MOST_LINES]) for piece in pieces for start in starts]
        a_float = max(1, _MOST_LINES // (len(table.rows) + 3))
        for start in range(0, len(tabulars), a_float):
            caption = f"{table.heading}. {table.notes[0]}" if start == 0 else f"{table.heading}, continued."
            lines = [
                "\\begin{table}[t]",
                f"\\caption{{{_escaped(caption)}}}",
                *[f"\\label{{{label}}}"] * (start == 0),
                "\\smallskip",
            ]
            lines += ["\\centering\\scriptsize\\setlength{\\tabcolsep}{3pt}"]
            lines += ["\n\\par\\medskip\n".join(tabulars[start : start + a_float])]
            if start + a_float >= len(tabulars):
                lines += ["\\par\\medskip\\raggedright", *map(_escaped, table.notes[1:])]
            parts.append("\n".join([*lines, "\\end{table}\n"]))
    if not all(part.isascii() for part in parts):
        parts.insert(1, "% has letters beyond ASCII: compile with xelatex or lualatex")
    return "\n".join(parts)


def _tabular(rows: Rows) -> str:
    def cell(text: str) -> str:
        mean, spread = _parts(text)
        mean = f"\\textbf{{{_escaped(mean)}}}" if isinstance(text, Best) else _escaped(mean)
        return f"{mean}{{\\tiny\\,{_escaped(spread)}}}" if spread else mean

    frame = pd.DataFrame([{_escaped(column): cell(text) for column, text in row.items()} for row in rows])
    return frame.to_latex(index=False, escape=False, column_format="".join(_columns(rows).values())).strip()


def _columns(rows: Rows) -> dict[str, str]:
    """Return how LaTeX sets each column: long text in lines."""
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    long = {column for column, cells in columns.items() if max(map(_points_of, cells)) > _TEXT_WIDTH / 2}
    return {
        column: "p{0.5\\linewidth}" if column in long else "r" if is_figures(cells) else "l"
        for column, cells in columns.items()
    }


def _points(rows: Rows) -> float:
    """Return about how wide LaTeX sets a table."""
    widths = [max(_points_of(text) for text in (column, *(row[column] for row in rows))) for column in rows[0]]
    return sum(min(width, _TEXT_WIDTH / 2) + 6 for width in widths)


def _points_of(text: str) -> float:
    mean, spread = _parts(text)
    return 4.15 * len(mean) + 3.1 * len(spread)


def _escaped(text: str) -> str:
    """Return text for LaTeX; two hyphens would become a dash."""
    text = re.sub("-(?=-)", "-\0", _with_minus(printable(" ".join(text.split()))))
    return "".join(_LATEX.get(character, character) for character in text).replace("\0", "{}")


TABLE_STYLE = """
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.87rem; }
th { text-align: left; border-bottom: 2px solid #1a1a1a; } td { border-bottom: 1px solid #ddd; }
th, td { padding: 0.3rem 0.6rem; vertical-align: top; white-space: nowrap; }
.figure { text-align: right; }
.text { white-space: normal; min-width: 16rem; max-width: 40rem; overflow-wrap: anywhere; }
.name { white-space: normal; min-width: 13rem; overflow-wrap: anywhere; }
th:first-child, td:first-child { position: sticky; left: 0; background: white; }
small { display: block; color: #555; font-size: 0.8em; }
.notes { max-width: 60rem; color: #444; padding-left: 1.2rem; font-size: 0.93rem; }
@media print {
  .table { overflow: visible; } table { font-size: 6.5pt; }
  th, td { padding: 1px 3px; } .text, .name { min-width: 8em; }
  th { white-space: normal; overflow-wrap: anywhere; }
  th:first-child, td:first-child { position: static; }
}
"""
_STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1a1a1a; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
@page {{ size: A4 landscape; margin: 1cm; }}
@media print {{ body {{ margin: 0; }} }}
{TABLE_STYLE}"""


def html_table(table: Table) -> str:
    """Return a table with its notes as HTML, without its heading; all text in it is escaped."""

    def cell(text: str, column: str) -> str:
        if column in keys:  # a name or an id stays as it is, also where it begins with a hyphen
            return html.escape(text)
        mean, spread = (html.escape(_with_minus(part)) for part in _parts(text))
        mean = f"<b>{mean}</b>" if isinstance(text, Best) else mean
        return f"{mean}<small>{spread}</small>" if spread else mean

    def row_of(tag: str, cells: Sequence[str]) -> str:
        tags = [f"<{tag}{looks[column]}>{text}</{tag}>" for column, text in zip(looks, cells, strict=True)]
        return f"<tr>{''.join(tags)}</tr>"

    columns = {column: [row[column] for row in table.rows] for column in table.rows[0]}
    keys = [*columns][: table.keys]
    looks = {column: _look(cells, column in keys) for column, cells in columns.items()}
    parts = [
        f'<div class="table" tabindex="0" role="region" aria-label="{html.escape(table.heading)}"><table>',
        f"<thead>{row_of('th', [*map(html.escape, columns)])}</thead>\n<tbody>",
        *(row_of("td", [cell(text, column) for column, text in row.items()]) for row in table.rows),
        "</tbody></table></div>",
    ]
    if table.notes:
        notes = [f"<li>{html.escape(_with_minus(note))}</li>" for note in table.notes]
        parts += ['<ul class="notes">', *notes, "</ul>"]
    return "\n".join(parts)


_NAME, _LONG = 18, 50
"""Characters that a name has, and any text, without being set in lines"""


def _look(cells: Sequence[str], is_key: bool) -> str:
    """Return the attributes of a column's cells."""
    longest = max(map(len, cells))
    if longest > _LONG:
        return ' class="text" dir="auto"'
    if is_key:
        return ' class="name"' if longest > _NAME else ""
    return ' class="figure"' if is_figures(cells) else ""


def _html(comparison: Comparison, published: Sequence[PublishedResult], name: str) -> str:
    title = html.escape(f"Models on {comparison.dataset}")
    parts = [
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>',
        f"<h1>{title}</h1>",
    ]
    for table in tables_of(comparison, published):
        parts += [f"<h2>{html.escape(table.heading)}</h2>", html_table(table)]
    return "\n".join([*parts, "</html>"]) + "\n"


def _csv(comparison: Comparison, published: Sequence[PublishedResult], name: str) -> str:
    frame = comparison.frame()
    if published:
        rows = [
            {"source": r.source, "model": r.model, "data": r.data_setting, "seeds": r.seeds, "note": r.note}
            | dict(r.metrics)
            | {f"{name} sd": spread for name, spread in r.std.items()}
            for r in published
        ]
        frame = pd.concat([frame.assign(source="this comparison"), pd.DataFrame(rows)])
        frame = frame[["source", *(column for column in frame if column != "source")]]
    # Such text of a foreign run would be a formula to a spreadsheet; a figure is a number, and stays one.
    formula = ("=", "+", "-", "@", "\t")
    return frame.map(lambda v: f"'{v}" if isinstance(v, str) and v.startswith(formula) else v).to_csv(index=False)


def _json(comparison: Comparison, published: Sequence[PublishedResult], name: str) -> str:
    rows: list[dict[str, Any]] = comparison.to_json()
    for row, of_row in zip(comparison.rows, rows, strict=True):
        if published:
            of_row["published"] = [asdict(result) for result in published if result.model == row.model]
    return json.dumps(finite(rows), indent=2, allow_nan=False) + "\n"


FORMS: dict[str, Callable[[Comparison, Sequence[PublishedResult], str], str]] = {
    "markdown": _markdown,
    "latex": _latex,
    "html": _html,
    "csv": _csv,
    "json": _json,
}

"""A comparison as tables for people: on a terminal, in Markdown, LaTeX, HTML, CSV or JSON."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from .comparison import PRIMARY, Comparison, Row
from .contract import PublishedResult
from .errors import InputError, unknown
from .plugins import Plugins
from .runs import finite
from .statistics import DRAWS
from .tables import Best, Rows

NOT_A_GAP = "–"
KINDS = {"paper": "the paper", "upstream": "upstream's table", "re-run": "independent re-runs"}
_OWN_COLUMN = {"text encoder", "tuned for", "data"}
"""keys of the protocol that a table has a column for"""


@dataclass(frozen=True)
class Table:
    """Rows of text by column, with what must be said of them."""

    title: str
    rows: Rows
    caption: str


def tables_of(comparison: Comparison, published: Sequence[PublishedResult] = ()) -> list[Table]:
    """Return the results, the differences from the reference and, if there are any, the published figures."""
    tables = [_results(comparison)]
    if comparison.differences:
        tables.append(_differences(comparison))
    if published and (beside := _published(comparison, published)).rows:
        tables.append(beside)
    return tables


def render(comparison: Comparison, form: str, published: Sequence[PublishedResult] = ()) -> str:
    """Return the tables as text.

    Args:
        comparison: the rows.
        form: `markdown`, `latex`, `html`, `csv` or `json`; the last two have figures at full precision.
        published: results of others to stand beside.

    Raises:
        InputError: there is no such form.
    """
    if form not in FORMS:
        raise InputError(unknown("format", form, FORMS))
    return FORMS[form](comparison, published)


def of_interest(comparison: Comparison, results: Sequence[PublishedResult]) -> list[PublishedResult]:
    """Return the regression results of the models that are compared, on their dataset."""
    models = {row.model for row in _plain(comparison)}
    on_dataset = [r for r in results if (r.task, r.dataset) == ("regression", comparison.dataset)]
    return [r for r in on_dataset if r.model in models and r.metrics.keys() & set(comparison.metrics)]


def _plain(comparison: Comparison) -> list[Row]:
    """Return the rows of models without hooks of others: what is published is of these."""
    return [row for row in comparison.ok if "+" not in row.runs[0].settings["model"]]


# --- what stands in the tables


def _results(comparison: Comparison) -> Table:
    best = {name: _best([row.mean[name] for row in comparison.ok], name) for name in comparison.metrics}
    rows: Rows = []
    for row in comparison.rows:
        figures = {}
        for name in comparison.metrics:
            text = _figure(row, name) if row.runs else ""
            figures[name] = Best(text) if row.runs and row.mean[name] == best[name] else text
        seconds = row.seconds_per_epoch
        cells = {
            "model": row.name,
            "text": row.text if row.runs else "",
            "tuned for": row.protocol.get("tuned for", ""),
            "data": row.protocol.get("data", ""),
            "seeds": str(len(row.runs)),
            **figures,
            "parameters": f"{row.parameters:,}" if row.parameters is not None else "",
            "s/epoch": "" if seconds is None else f"{seconds:.2f}",
            "note": row.note,
        }
        rows.append(cells)
    if not any(cells["note"] for cells in rows):
        for cells in rows:
            del cells["note"]
    caption = [
        f"Test split of {comparison.dataset}; mean ± sample standard deviation over seeds; best in bold.",
        *_protocol(comparison.ok),
        "text: whether the text encoder was frozen or fine-tuned.",
        "tuned for: the text encoder that the hyper-parameters were published for.",
        "parameters: the trainable ones of the network, without heads that only training has.",
        f"s/epoch: seconds of training an epoch, later than the first, {_where(comparison.ok)}.",
    ]
    if comparison.reference is None and len(comparison.ok) > 1:
        caption.append(f"No differences: the first row, {comparison.rows[0].name}, has no finished run.")
    return Table(f"results on {comparison.dataset}", rows, " ".join(caption))


def _where(rows: Sequence[Row]) -> str:
    """Return what times were taken on."""
    places: dict[str, None] = {}
    for environment in (run.environment for row in rows for run in row.runs):
        device, threads = environment.get("device", "an unknown device"), environment.get("threads", 0)
        places[_count(threads, "CPU thread") if device == "cpu" else device] = None
    return f"on {', '.join(places)}, perhaps beside other work" if places else "which none has"


def _best(values: Sequence[float], name: str) -> float:
    known = [value for value in values if not math.isnan(value)]
    choose = min if name == "MAE" else max
    return choose(known) if known else math.nan


def _figure(row: Row, metric: str) -> str:
    """Return a metric as `mean ± sd`."""
    mean = row.mean[metric]
    if math.isnan(mean):
        return "undefined"
    return f"{mean:.4f}" if row.std is None else f"{mean:.4f} ± {row.std[metric]:.4f}"


def _protocol(rows: Sequence[Row]) -> list[str]:
    """Return what holds for the runs, a sentence each; what differs between rows names them."""
    sentences = []
    keys = dict.fromkeys(key for row in rows for key in row.protocol if key not in _OWN_COLUMN)
    for key in ["text encoder", *keys]:
        by_value: dict[str, list[str]] = {}
        for row in rows:
            value = row.protocol.get(key, "none")
            value = value.removesuffix(f", {row.text}") if key == "text encoder" else value  # that has a column
            by_value.setdefault(value, []).append(row.name)
        if by_value.keys() == {"none"}:
            continue
        most = max(by_value, key=lambda value: len(by_value[value]))
        others = [f"{value} for {', '.join(names)}" for value, names in by_value.items() if value != most]
        sentences.append(f"{key}: {most}{', but ' if others else ''}{'; '.join(others)}.")
    return sentences


def _differences(comparison: Comparison) -> Table:
    reference = comparison.reference
    assert reference is not None
    rows: Rows = []
    for name, difference in comparison.differences.items():
        cells = {
            metric: "undefined"
            if math.isnan(difference.mean[metric])
            else f"{difference.mean[metric]:+.4f} [{difference.low[metric]:+.4f}, {difference.high[metric]:+.4f}]"
            for metric in comparison.metrics
        }
        rows.append({"model": name, PRIMARY: cells.pop(PRIMARY), "p": _p_value(difference.p_mae), **cells})
    clips, videos = len(comparison.videos), len(set(comparison.videos))
    single = [row.name for row in comparison.ok if len(row.runs) == 1]
    caption = (
        f"Row minus {reference.name} on the test split, over seeds; a lower MAE is better, everything else higher. "
        f"In brackets 95 % intervals of {DRAWS:,} bootstrap draws that resample "
        + (
            f"the {_count(videos, 'video')} of {clips} clips (clips of a video belong together)"
            if videos < clips
            else f"the {clips} clips (the data does not tell their videos)"
        )
        + " and, for each model on its own, its seeds. p: two-sided, for MAE alone, Holm-corrected over "
        + f"{_count(len(rows), 'row')}; the other metrics have intervals only."
        + (f" One seed only, so that its spread is unknown: {', '.join(single)}." if single else "")
    )
    return Table(f"differences from {reference.name}", rows, caption)


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _published(comparison: Comparison, results: Sequence[PublishedResult]) -> Table:
    """One row a model and metric; a gap only where setting, encoder and the metric's definition agree."""
    sources = list(dict.fromkeys((result.source, result.second_hand) for result in results))
    numbers = {source: number for number, source in enumerate(sources, 1)}
    rows: Rows = []
    gaps = False
    for row in _plain(comparison):
        of_row = [result for result in results if result.model == row.model]
        names = [name for name in comparison.metrics if any(name in result.metrics for result in of_row)]
        for name in names:
            cells: dict[str, str] = {"model": row.name, "metric": name}
            gap = []
            for kind, header in KINDS.items():
                found = [result for result in of_row if result.kind == kind and name in result.metrics]
                cells[header] = "; ".join(_cited(result, name, numbers) for result in found)
                gap += [_gap(row, result, name, numbers) for result in found if _agree(row, result)]
            cells["here"] = _figure(row, name)
            cells["gap"] = "; ".join(filter(None, gap)) or NOT_A_GAP
            gaps |= cells["gap"] != NOT_A_GAP
            rows.append(cells)
    listed = [f"[{number}] {source}" for (source, _), number in numbers.items()]
    notes = _notes(results, numbers)
    caption = (
        f"Published figures on {comparison.dataset} beside those here. "
        "gap: here minus published in standard errors of the means, from two seeds on, and only for a model as it "
        "was published, whose data setting, text encoder and metric's definition are known and the same"
        f"{'' if gaps else ': there is none here'}; a published spread, or number of seeds, that is not known counts "
        "as no error. † marks second-hand figures. "
        f"Sources: {'; '.join(listed)}." + (f" Notes: {'; '.join(notes)}." if notes else "")
    )
    return Table("published results", rows, caption)


def _notes(results: Sequence[PublishedResult], numbers: Mapping[tuple[str, bool], int]) -> list[str]:
    """Return the notes of each source; one that does not hold for all of its models names those it is of."""
    noted: dict[tuple[int, str], list[str]] = {}
    for result in results:
        noted.setdefault((numbers[result.source, result.second_hand], result.note), []).append(result.model)
    several = Counter(number for number, _ in noted)
    return [
        f"[{number}]{', ' + ', '.join(models) if several[number] > 1 else ''}: {note}"
        for (number, note), models in noted.items()
        if note
    ]


def _cited(result: PublishedResult, name: str, numbers: Mapping[tuple[str, bool], int]) -> str:
    spread = f" ± {result.std[name]:.4f}" if name in result.std else ""
    mark = "†" if result.second_hand else ""
    return f"{result.metrics[name]:.4f}{spread}{mark} [{numbers[result.source, result.second_hand]}]"


def _agree(row: Row, result: PublishedResult) -> bool:
    """Whether a published figure is of a row's model and was made under its conditions, as far as both are known."""
    settings = row.runs[0].settings
    if row.protocol.get("changed settings", "none") not in ("none", "finetune_text=true"):
        return False
    encoder, _, mode = row.protocol.get("text encoder", "").rpartition(", ")
    with suppress(InputError):  # MMSA's published files hold BERT-base's features
        if settings["data"]["sha256"] in Plugins().load("dataset", settings["dataset"]).sha256.values():
            encoder = encoder.replace("the file's text features", "bert-base")
    name, _, published_mode = result.text_encoder.partition(", ")
    same_encoder = name == "BERT-base" and encoder.startswith("bert-base") and mode == published_mode
    usual_labels = ", not" not in row.protocol.get("labels", "")
    return same_encoder and usual_labels and row.protocol.get("data") == result.data_setting


def _gap(row: Row, result: PublishedResult, name: str, numbers: Mapping[tuple[str, bool], int]) -> str:
    if row.std is None:
        return ""
    variance = row.std[name] ** 2 / len(row.runs)
    if result.seeds and name in result.std:
        variance += result.std[name] ** 2 / result.seeds
    if not variance > 0:
        return ""
    gap = (row.mean[name] - result.metrics[name]) / variance**0.5
    return f"{gap:+.1f} [{numbers[result.source, result.second_hand]}]"


# --- how they are written


def _markdown(comparison: Comparison, published: Sequence[PublishedResult]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(text: str) -> str:
        escaped = text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
        return f"**{escaped}**" if isinstance(text, Best) else escaped

    parts = []
    for table in tables_of(comparison, published):
        columns = list(table.rows[0])
        lines = [line(columns), line(["---"] * len(columns))]
        lines += [line([cell(row[column]) for column in columns]) for row in table.rows]
        parts.append(f"**{table.title}**\n\n" + "\n".join(lines) + f"\n\n{cell(table.caption)}\n")
    return "\n".join(parts)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"},
    **{"±": r"$\pm$", "–": "--", "†": r"$\dagger$", "≥": r"$\ge$", "≤": r"$\le$", "[": "{[}", "|": r"\textbar{}"},
    **{"−": "$-$", "…": r"\ldots{}", "²": "$^2$", "³": "$^3$"},
}


def _latex(comparison: Comparison, published: Sequence[PublishedResult]) -> str:
    def cell(text: str) -> str:
        escaped = "".join(_LATEX.get(character, character) for character in text.replace("--", "-\0-"))
        escaped = escaped.replace("\0", "{}")  # or two hyphens would become a dash
        return f"\\textbf{{{escaped}}}" if isinstance(text, Best) else escaped

    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables_of(comparison, published):
        frame = pd.DataFrame([{cell(k): cell(v) for k, v in row.items()} for row in table.rows])
        label = "tab:" + "-".join("".join(c if c.isalnum() else " " for c in table.title).split())
        text = frame.to_latex(index=False, escape=False, caption=cell(table.caption), label=label, position="t")
        text = text.replace("\\begin{tabular}", "\\scriptsize\n\\setlength{\\tabcolsep}{3pt}\n\\begin{tabular}")
        parts.append(text)
    if not all(part.isascii() for part in parts):
        parts.insert(1, "% has letters beyond ASCII: compile with xelatex or lualatex")
    return "\n".join(parts)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.87rem; }
th { text-align: left; border-bottom: 2px solid #1a1a1a; } td { border-bottom: 1px solid #ddd; }
th, td { padding: 0.3rem 0.7rem; vertical-align: top; white-space: nowrap; } td:last-child { white-space: normal; }
p { max-width: 60rem; color: #444; }
"""


def _html(comparison: Comparison, published: Sequence[PublishedResult]) -> str:
    def cell(text: str) -> str:
        return f"<b>{html.escape(text)}</b>" if isinstance(text, Best) else html.escape(text)

    title = html.escape(f"Models on {comparison.dataset}")
    parts = [
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>',
        f"<h1>{title}</h1>",
    ]
    for table in tables_of(comparison, published):
        frame = pd.DataFrame([{cell(k): cell(v) for k, v in row.items()} for row in table.rows])
        parts.append(f"<h2>{html.escape(table.title)}</h2>")
        parts.append(f"<div>{frame.to_html(index=False, escape=False, border=0)}</div>")
        parts.append(f"<p>{html.escape(table.caption)}</p>")
    return "\n".join([*parts, "</html>"]) + "\n"


def _csv(comparison: Comparison, published: Sequence[PublishedResult]) -> str:
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
    return frame.to_csv(index=False)


def _json(comparison: Comparison, published: Sequence[PublishedResult]) -> str:
    rows: list[dict[str, Any]] = comparison.to_json()
    for row, of_row in zip(comparison.rows, rows, strict=True):
        if published:
            of_row["published"] = [asdict(result) for result in published if result.model == row.model]
    return json.dumps(finite(rows), indent=2, allow_nan=False) + "\n"


FORMS: dict[str, Callable[[Comparison, Sequence[PublishedResult]], str]] = {
    "markdown": _markdown,
    "latex": _latex,
    "html": _html,
    "csv": _csv,
    "json": _json,
}

"""`report`: a self-contained page of finished runs, and its figures as files for a paper.

registry.report(["runs/"], "report.html", dataset="mosi", data="unaligned_50.pkl", figures="figures/")
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comparison import PRIMARY, Comparison, Row, collect
from ..errors import InputError, unknown
from ..forms import TABLE_STYLE, html_table
from ..labels import MEANINGS, GeneratedLabels, read_labels
from ..runs import Run, finished, require_file, write_file
from ..side_by_side import Table, of_interest, published_results, ranges, tables_of
from . import clips as of_clips
from . import figures as draw
from .clips import Clips
from .pictures import FORMATS, Panel, Picture, svg, write_pictures

if TYPE_CHECKING:
    from ..contract import PublishedResult

Tell = Callable[[str], Any]
"""is told what is being made"""


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a sentence that says what is seen, and what there is to see."""

    key: str
    heading: str
    sentence: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Panel | Picture] = ()
    notes: Sequence[str] = ()
    unfolded: int = 100
    """how many of the tables are open; the others unfold where they are asked for"""


def report(
    folders: Sequence[str | Path],
    target: str | Path = "report.html",
    *,
    reference: str | None = None,
    dataset: str | None = None,
    metrics: Sequence[str] = (),
    published: bool = False,
    data: str | Path | None = None,
    figures: str | Path | None = None,
    figure_format: str = "pdf",
    plugins: Sequence[str] = (),
    tell: Tell = lambda what: None,
) -> Comparison:
    """Write a page of the runs in folders, with everything in it; what was there is replaced.

    Args:
        folders: of seeds, of configurations, or any above them.
        target: the page.
        reference: the row that the others are compared with; the first one by default.
        dataset: the one whose runs are meant, where there are several.
        metrics: those to show besides MAE; all in tables and MAE alone in the figure by default.
        published: whether results of others stand beside.
        data: the feature file of the runs, for the clips' texts; a dataset that makes its own data needs none.
        figures: a folder that gets each figure as a file.
        figure_format: `pdf`, `png` or `svg`.
        plugins: files or modules of hooks and datasets that are not packaged.
        tell: is called with a line for each part that is made.

    Returns:
        What is on the page; a row's `note` says what failed.

    Raises:
        InputError: as for `registry.comparison.collect`, or the data or a name of a file is wrong.
    """
    page = Path(os.path.expanduser(target))
    folder = None if figures is None else Path(os.path.expanduser(figures))
    _check_places(page, folder, figure_format)
    tell("reading runs")
    comparison = collect(folders, reference, dataset=dataset, metrics=metrics, plugins=plugins)
    _check_tables(run for row in comparison.ok for run in row.runs)
    results = of_interest(comparison, published_results(plugins)) if published else []
    if published and not results:
        warnings.warn(f"nothing is published of these models on {comparison.dataset}", stacklevel=2)
    tell("reading clips")
    clips = of_clips.read_clips(comparison, data, plugins)
    tell("comparing models")
    sections = sections_of(comparison, results, clips)
    text = render(comparison, sections, tell)
    write_file(page, lambda path: path.write_text(text, "utf-8", errors="replace"))
    if folder is not None:
        for section in sections:
            if section.pictures:
                tell(f"{section.heading}, as {figure_format}")
                write_pictures(folder, section.key, section.pictures, figure_format)
    return comparison


def _check_places(page: Path, folder: Path | None, form: str) -> None:
    require_file(page, "--out")
    if form not in FORMATS:
        raise InputError(unknown("figure format", form, FORMATS))
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"--figures {folder} is not a folder")
    for option, place in (("--out", page.parent), ("--figures", folder)):
        if place is not None and finished(place):
            raise InputError(f"{option} would write into {place}, the folder of a run, which stays as it is")


_COLUMNS = {"predictions": ("label", "prediction"), "history": ("epoch", "valid_mae", "train_loss")}


def _check_tables(runs: Iterable[Run]) -> None:
    """See that the tables that are drawn hold numbers; one that somebody has edited may not."""
    for run in runs:
        for name, columns in _COLUMNS.items():
            if name == "history" and run.best_epoch is None:
                continue
            table = run.table(name)
            for column in columns:
                if column not in table.select_dtypes("number"):
                    raise InputError(f"the table {name!r} of {run.folder} has no numbers {column!r}")
                if name == "predictions" and not np.isfinite(table[column]).all():
                    raise InputError(f"the table {name!r} of {run.folder} has a {column} that is no finite number")


def render(comparison: Comparison, sections: Sequence[Section], tell: Tell) -> str:
    """Return the page as HTML; all text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = {}
    for section in sections:
        if section.pictures:
            tell(section.heading)
        drawn[section.key] = [
            Markup(svg(picture, f"{section.key}-{number}")) for number, picture in enumerate(section.pictures)
        ]
    return environment.get_template("page.html.j2").render(
        title=f"Models on {comparison.dataset}",
        facts=_facts(comparison),
        failed=[(row.name, row.note) for row in comparison.rows if row.note],
        sections=sections,
        drawn=drawn,
        table=lambda made: Markup(html_table(made)),
        table_style=Markup(TABLE_STYLE),
    )


# --- what stands in the page


def sections_of(comparison: Comparison, published: Sequence[PublishedResult], clips: Clips) -> list[Section]:
    """Return the sections that have something to show."""
    labels = [(row, found) for row in comparison.ok if (found := _generated(row))]
    sections = [
        *(_table(table) for table in tables_of(comparison, published)),
        _seeds(comparison),
        _curves(comparison),
        _predictions(comparison),
        _confusion(comparison),
        _distributions(labels),
        _movements(labels),
        _disagreements(comparison, labels, clips),
        _errors(comparison, clips),
        _settings(comparison),
    ]
    return [section for section in sections if section.tables or section.pictures]


def _facts(comparison: Comparison) -> dict[str, str]:
    """Return what the head of the page says."""
    rows = comparison.ok
    first = rows[0].runs[0]
    sizes = first.settings["data"].get("sizes", {})
    seeds = {tuple(row.seeds) for row in rows}
    several = [row for row in rows if len(row.runs) > 1] or rows
    best = min(several, key=lambda row: row.mean[PRIMARY])
    spread = f" ± {best.std[PRIMARY]:.4f}" if best.std else ""
    runs = sum(len(row.runs) for row in rows)
    facts = {
        "Data": f"{comparison.dataset}, {', '.join(f'{size:,} {name}' for name, size in sizes.items())} clips, "
        f"labels within ±{first.settings['data']['label_range']:g}",
        "Models": f"{len(rows)} in {runs} {'run' if runs == 1 else 'runs'}"
        + (f", seeds {ranges(next(iter(seeds)))} each" if len(seeds) == 1 and any(seeds) else ""),
        "Lowest MAE": f"{best.name}: {best.mean[PRIMARY]:.4f}{spread} on test, "
        f"{len(best.runs)} {'seed' if len(best.runs) == 1 else 'seeds'}",
        "Protocol": rows[0].protocol.get("selection", ""),
        "Note": rows[0].protocol.get("note", ""),
    }
    return {name: text for name, text in facts.items() if text}


def _generated(row: Row) -> list[GeneratedLabels]:
    """Return the labels that a row's runs generated, of the epochs that are shown: all would fill the memory."""
    runs = [run for run in row.runs if {"labels", "label_movement"} <= set(run.summary["artifacts"])]
    found = [read_labels(run) for run in runs if run.best_epoch is not None]
    return [replace(one, labels=one.labels[one.labels["epoch"].isin(one.shown_epochs)]) for one in found]


def _table(table: Table) -> Section:
    key = table.title.partition(" ")[0]
    return Section(key, table.heading, table.notes[0], [replace(table, notes=table.notes[1:])])


def _seeds(comparison: Comparison) -> Section:
    shown = comparison.metrics if comparison.only else [PRIMARY]
    return Section(
        "seeds",
        f"{', '.join(shown)} by seed",
        "A point is a seed, the bar a model's mean over its seeds; the dashed line is the mean of the first row.",
        pictures=draw.strips(comparison, shown),
    )


def _curves(comparison: Comparison) -> Section:
    pictures, cut = draw.curves(comparison)
    notes = [
        "The axis of validation MAE is the same for all models, that of the train loss each model's own: losses of "
        "models are not comparable, since each has terms of its own.",
        *([f"The axis of validation MAE ends at {cut:.3g}; what lies higher is cut off."] if cut else []),
    ]
    sentence = "A line is a seed; the dot is its best epoch, whose weights were tested."
    return Section("learning-curves", "Learning curves", sentence, pictures=pictures, notes=notes)


def _predictions(comparison: Comparison) -> Section:
    pictures, counted, outside = draw.scatters(comparison)
    what = "Hexagons, the darker the more" if counted else "Points are"
    several = any(len(row.runs) > 1 for row in comparison.ok)
    sentence = (
        f"{what} test clips{', those of all seeds together' if several else ''}; on the line a prediction is right."
    )
    notes = [f"{outside} predictions beyond the axes are drawn at their edge."] if outside else []
    return Section("predictions", "Predicted against true labels", sentence, pictures=pictures, notes=notes)


def _confusion(comparison: Comparison) -> Section:
    family = comparison.ok[0].runs[0].settings["data"]["metrics"]
    what = (
        "five classes, those of Mult_acc_5, cut at −0.7, −0.1, 0.1 and 0.7"
        if family == "sims"
        else "seven classes, those of Mult_acc_7: values rounded to whole numbers within ±3"
    )
    sentence = (
        "A row is a true class; the darker a cell, the more of the row's clips were predicted to be of its class. "
        f"There are {what}."
    )
    notes = ["Numbers are test clips, summed over seeds."]
    return Section("confusion", "Confusion by class", sentence, pictures=draw.confusions(comparison), notes=notes)


_Labels = Sequence[tuple[Row, list[GeneratedLabels]]]


def _distributions(labels: _Labels) -> Section:
    """Show the run whose MAE is the median of its row's."""
    shown = []
    for _, found in labels:
        in_order = sorted(found, key=lambda one: one.run.metrics.get(PRIMARY, 0.0))
        shown.append(in_order[(len(in_order) - 1) // 2])
    return Section(
        "label-distributions",
        "Distributions of generated labels",
        "Unimodal labels of the train clips at the end of some epochs, beside the human multimodal label; "
        "of several seeds, the one with the median MAE.",
        pictures=draw.distributions(shown),
    )


def _movements(labels: _Labels) -> Section:
    pictures = draw.movements(labels)
    found = {column for _, of_row in labels for one in of_row for column in one.movement}
    notes = [f"{column}: {MEANINGS[column]}." for column in draw.MOVEMENTS if column in found]
    if "Corr true" in found:
        true = MEANINGS["Corr true"].partition(";")[0]
        notes[-1] = f"Corr true: {true}; the thin level lines are those of the multimodal label."
    sentence = "How the generated labels of the train split changed from epoch to epoch; a line is a seed."
    return Section("label-movement", "Movement of generated labels", sentence, pictures=pictures, notes=notes)


def _disagreements(comparison: Comparison, labels: _Labels, clips: Clips) -> Section:
    tested = of_clips.most_disagreeing_tested(comparison, clips)
    trained = [of_clips.most_disagreeing(row, found, clips) for row, found in labels]
    tables = [table for table in (tested, *trained) if table]
    notes = ["by MODEL: its prediction, the mean over seeds."] if tested else []
    if any(trained):
        notes.append("Generated labels are of train clips alone: those of the best epoch's end, means over seeds.")
    return Section(
        "disagreement",
        "Where modalities disagree",
        "The clips whose labels of text, audio and vision lie farthest apart.",
        tables,
        notes=notes + [clips.why_none] * bool(clips.why_none),
        unfolded=2,
    )


def _errors(comparison: Comparison, clips: Clips) -> Section:
    table = of_clips.most_wrong(comparison, clips)
    shown = of_clips.shown_models(comparison)
    notes = ["by MODEL: its prediction, the mean over seeds."]
    if len(shown) < len(comparison.ok):
        notes.append(f"Columns: the first row and the {len(shown) - 1} others with the lowest MAE.")
    return Section(
        "errors",
        "Largest errors on test",
        f"The {len(table.rows)} test clips that were predicted worst, by the mean error of all models.",
        [table],
        notes=notes + [clips.why_none] * bool(clips.why_none),
    )


def _settings(comparison: Comparison) -> Section:
    """Show what is the same for all rows once, and of each row what is left."""
    of_rows = {row.name: _made_with(row) for row in comparison.ok}
    first, *others = of_rows.values()
    same = {key for key, value in first.items() if others and all(other.get(key) == value for other in others)}
    tables = [_listed("The same in all rows", {key: first[key] for key in first if key in same})] if same else []
    for name, values in of_rows.items():
        tables.append(_listed(name, {key: value for key, value in values.items() if key not in same}))
    sentence = "What each row was made with; values that differ between its seeds stand side by side."
    return Section("settings", "Settings and environment", sentence, tables, unfolded=0)


def _listed(title: str, values: Mapping[str, str]) -> Table:
    return Table(title, [{"setting": key, "value": value} for key, value in values.items()], [], keys=2)


def _made_with(row: Row) -> dict[str, str]:
    """Return everything that can change a row's result, and what it was made with."""
    values: dict[str, dict[str, None]] = {}
    for run in row.runs:
        settings, encoder = run.settings, run.settings["text_encoder"] or {}
        parts = {
            "": {
                "run folder": str(run.folder),
                **{key: settings.get(key) for key in ("model", "seed", "preset", "version", "hooks", "precision")},
                "best epoch": run.best_epoch,
            },
            "protocol": run.summary.get("protocol", {}),
            "config": settings["config"],
            "data": settings["data"],
            "text encoder": {key: value for key, value in encoder.items() if key != "config"},
            "environment": run.environment,
        }
        for part, of_part in parts.items():
            for key, value in _flat(of_part, part):
                values.setdefault(key, {})[value] = None
    return {key: "; ".join(found) for key, found in values.items()}


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield what is in a value of JSON, by the keys that lead there."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name} {key}".strip())
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name, "none" if value is None else str(value)

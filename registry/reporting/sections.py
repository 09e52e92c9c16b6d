"""What stands in a report: its sections, each with a sentence that says what is seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..comparison import PRIMARY, Comparison, Row
from ..labels import MEANINGS, GeneratedLabels, read_labels
from ..side_by_side import Table, ranges, tables_of
from . import clips as of_clips
from . import figures as draw
from .clips import Clips
from .pictures import Panel, Picture

if TYPE_CHECKING:
    from ..contract import PublishedResult


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


def facts_of(comparison: Comparison) -> dict[str, str]:
    """Return what the head of the page says."""
    rows = comparison.ok
    first = rows[0].runs[0]
    sizes = first.settings["data"].get("sizes", {})
    seeds = {tuple(row.seeds) for row in rows}
    best = min(rows, key=lambda row: row.mean[PRIMARY])
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
    found = (read_labels(run) for run in runs if run.best_epoch is not None)
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
    notes = _by_model(comparison) if tested else []
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
    return Section(
        "errors",
        "Largest errors on test",
        f"The {len(table.rows)} test clips that were predicted worst, by the mean error of all models.",
        [table],
        notes=_by_model(comparison) + [clips.why_none] * bool(clips.why_none),
    )


def _by_model(comparison: Comparison) -> list[str]:
    """Return what is to be said of the columns of models among clips."""
    shown = of_clips.shown_models(comparison)
    notes = ["by MODEL: its prediction, the mean over seeds."]
    if len(shown) < len(comparison.ok):
        notes.append(f"Columns: the first row and the {len(shown) - 1} others with the lowest MAE.")
    return notes


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

"""A comparison as tables for people: rows of text, and what must be said of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from .comparison import PRIMARY, Comparison, Row
from .contract import PublishedResult
from .errors import InputError
from .plugins import Plugins
from .statistics import DRAWS, FEWEST_VIDEOS, Difference
from .tables import Best, Rows

NOTHING = "–"
BEST = "The best mean of a metric is bold"
FEW_SEEDS = 5
LOWER = "A lower MAE is better, everything else higher."
KINDS = {"paper": "papers", "upstream": "upstream's table", "re-run": "independent re-runs"}
_OWN_COLUMN = {"text encoder", "tuned for", "data"}
"""keys of the protocol that a table has a column for"""
_UNSAID = {"there are none"}
"""values of the protocol that say nothing"""


@dataclass(frozen=True)
class Table:
    """Rows of text by column, with what must be said of them, a sentence each."""

    title: str
    rows: Rows
    notes: list[str]
    keys: int = 1
    """how many columns tell which row it is"""

    @property
    def heading(self) -> str:
        """The title as a document has it."""
        return self.title[0].upper() + self.title[1:]


def tables_of(comparison: Comparison, published: Sequence[PublishedResult] = ()) -> list[Table]:
    """Return the results and, where known: differences from the reference, what hooks add, published figures."""
    tables = [_results(comparison)]
    if comparison.differences:
        tables.append(_differences(comparison))
    if comparison.effects:
        tables.append(_effects(comparison))
    if published and (beside := _published(comparison, published)).rows:
        tables.append(beside)
    return tables


def published_results(plugins: Sequence[str] = ()) -> list[PublishedResult]:
    """Return everything that is registered of what others have published."""
    found = Plugins(plugins)
    specs = [found.load("published", entry.name) for entry in found.entries("published")]
    return [result for spec in specs for result in spec.results]


def of_interest(comparison: Comparison, results: Sequence[PublishedResult]) -> list[PublishedResult]:
    """Return the regression results of the models that are compared, on their dataset."""
    models = {row.model for row in _plain(comparison)}
    on_dataset = [r for r in results if (r.task, r.dataset) == ("regression", comparison.dataset)]
    return [r for r in on_dataset if r.model in models and r.metrics.keys() & set(comparison.metrics)]


def _plain(comparison: Comparison) -> list[Row]:
    """Return the row of each model that is nearest to what is published: without hooks of others, least changed."""
    rows: dict[str, Row] = {}
    for row in comparison.ok:
        if "+" not in row.runs[0].settings["model"] and _changes(row) < _changes(rows.get(row.model)):
            rows[row.model] = row
    return [*rows.values()]


def _changes(row: Row | None) -> float:
    """Return how many settings of a row are not the preset's."""
    if row is None:
        return math.inf
    changed = row.protocol.get("changed settings", "none")
    return 0 if changed == "none" else 1 + changed.count(", ")


# --- what stands in the tables


def _results(comparison: Comparison) -> Table:
    several = [row for row in comparison.ok if len(row.runs) > 1] or comparison.ok
    alone = len(several) < 2  # then nothing is better than anything
    best = {name: None if alone else _best([row.mean[name] for row in several], name) for name in comparison.metrics}
    rows: Rows = []
    for row in comparison.rows:
        figures = {}
        for name in comparison.metrics:
            text = _figure(row, name) if row.runs else ""
            figures[name] = Best(text) if row in several and row.mean[name] == best[name] else text
        seconds = row.seconds_per_epoch
        cells = {
            "model": row.name,
            "text": row.text if row.runs else "",
            **figures,
            "seeds": ranges(row.seeds),
            "parameters": f"{row.parameters:,}" if row.parameters is not None else "",
            "s/epoch": "" if seconds is None else f"{seconds:.2f}",
            "data": row.protocol.get("data", ""),
            "tuned for": row.protocol.get("tuned for", ""),
            "note": row.note,
        }
        rows.append(cells)
    if not any(cells["note"] for cells in rows):
        for cells in rows:
            del cells["note"]
    some = len(several) < len(comparison.ok)
    seeds = {tuple(row.seeds) for row in comparison.ok}
    notes = [
        f"Test split of {comparison.dataset}{_over(seeds)}.",
        BEST + (", of rows with more than one seed." if some else "."),
        *_protocol(comparison.ok),
        "Columns: text, whether the text encoder was trained with the model; tuned for, the text encoder that the "
        "hyper-parameters were published for; parameters, those of the network that are trained, without heads that "
        f"only training has; s/epoch, seconds of training an epoch, the first left out where there are more, "
        f"{_where(comparison.ok)}.",
        *_in_vain(comparison.ok),
    ]
    if comparison.reference is None and comparison.ok:
        notes.append(f"No differences: the first row, {comparison.rows[0].name}, has no finished run.")
    return Table(f"results on {comparison.dataset}", rows, notes)


def _over(seeds: set[tuple[int, ...]]) -> str:
    """Return what the figures are of, by the seeds of the rows."""
    if max(map(len, seeds), default=0) < 2:
        return f", seed {ranges(next(iter(seeds)))}" if len(seeds) == 1 and any(seeds) else ""
    what = f" {ranges(next(iter(seeds)))}" if len(seeds) == 1 else ", which are not the same in all rows"
    return f": mean ± sample standard deviation over seeds{what}"


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text, with those that follow one another as a range.

    >>> ranges([1111, 1112, 1113, 7])
    '7, 1111-1113'
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _in_vain(rows: Sequence[Row]) -> list[str]:
    """Return a note on the rows whose generated labels did nothing yet at the chosen epoch."""
    found = {row.name: row.generated_in_vain for row in rows if row.generated_in_vain}
    if not found:
        return []
    of_rows = [f"{name} (seed {ranges([run.settings['seed'] for run in runs])})" for name, runs in found.items()]
    return [
        f"No generated label had moved before the chosen epoch, which has seen human labels only: {', '.join(of_rows)}."
    ]


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
            if value not in _UNSAID:
                by_value.setdefault(value, []).append(row.name)
        if by_value.keys() <= {"none"}:
            continue
        most = max(by_value, key=lambda value: len(by_value[value]))
        said = [f"{value} for {', '.join(names)}" for value, names in by_value.items() if value != most]
        if not said and len(by_value[most]) < len(rows):
            most += f" for {', '.join(by_value[most])}"
        said.append(f"{most} for all others" if said else most)
        sentences.append(f"{key[0].upper()}{key[1:]}: {'; '.join(said)}.")
    return sentences


def _differences(comparison: Comparison) -> Table:
    reference = comparison.reference
    assert reference is not None
    rows: Rows = [{"model": name, **_compared(comparison, found)} for name, found in comparison.differences.items()]
    notes = [
        f"Row minus {reference.name} on the test split.",
        LOWER,
        *_method(comparison, comparison.differences, dict.fromkeys(comparison.differences, reference.name)),
    ]
    return Table(f"differences from {reference.name}", rows, notes)


def _effects(comparison: Comparison) -> Table:
    controls = {name: comparison.controls[name][1] for name in comparison.effects}
    hooks = list(dict.fromkeys(comparison.controls[name][0] for name in comparison.effects))
    rows: Rows = [
        {"model": f"{name} − {controls[name]}", **_compared(comparison, found)}
        for name, found in comparison.effects.items()
    ]
    notes = [
        f"A model with {' or '.join(hooks)} minus its control on the test split. A pair that stands among the "
        "differences too has its p there corrected over other rows.",
        LOWER,
        *_method(comparison, comparison.effects, controls),
    ]
    return Table(f"what {' and '.join(hooks)} {'adds' if len(hooks) == 1 else 'add'}", rows, notes)


def _compared(comparison: Comparison, difference: Difference) -> dict[str, str]:
    """Return the cells of a difference, its p-value behind that of MAE."""
    cells: dict[str, str] = {}
    for metric in comparison.metrics:
        mean, low, high = (values[metric] for values in (difference.mean, difference.low, difference.high))
        interval = "" if math.isnan(low) else f" [{low:+.4f}, {high:+.4f}]"
        cells[metric] = "undefined" if math.isnan(mean) else f"{mean:+.4f}{interval}"
        if metric == PRIMARY:
            cells["p"] = _p_value(difference.p_mae)
    return cells


def _method(comparison: Comparison, found: Mapping[str, Difference], references: Mapping[str, str]) -> list[str]:
    """Return how differences were judged, and which could not be."""
    clips, videos = len(comparison.videos), len(set(comparison.videos))
    drawn = f"the {clips} clips (the data does not tell their videos)"
    if videos < clips:
        drawn = f"the {_count(videos, 'video')} of {clips} clips (clips of a video belong together)"
    if videos < FEWEST_VIDEOS:
        return [f"No intervals and no p: the test split has {_count(videos, 'video')}, fewer than {FEWEST_VIDEOS}."]
    judged = sum(not math.isnan(difference.p_mae) for difference in found.values())
    notes = [
        f"In brackets 95 % intervals of {DRAWS:,} bootstrap draws that resample {drawn} and, for each model on its "
        "own, its seeds (their spread stretched by √(S/(S−1)) for S seeds).",
        f"p: two-sided, for MAE alone, Holm-corrected over {_count(judged, 'row')}; other metrics have intervals only.",
    ]
    seeds = {row.name: len(row.runs) for row in comparison.ok}
    single = dict.fromkeys(name for pair in references.items() for name in pair if seeds[name] == 1)
    if any(1 < seeds[name] < FEW_SEEDS for pair in references.items() for name in pair):
        notes.append(f"With fewer than {FEW_SEEDS} seeds intervals are somewhat too narrow and p too small.")
    if single:
        notes.append(f"One seed only, so that an interval leaves training out and there is no p: {', '.join(single)}.")
    return notes


def _p_value(p: float) -> str:
    return NOTHING if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


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
            cells["gap"] = "; ".join(filter(None, gap)) or NOTHING
            gaps |= cells["gap"] != NOTHING
            rows.append(cells)
    notes = [
        f"Published figures on {comparison.dataset} beside those here.",
        "gap: here minus published in standard errors of the means, from two seeds on, and only for a model as it "
        "was published, whose data setting, text encoder and metric's definition are known and the same"
        f"{'' if gaps else ': there is none here'}; a published spread, or number of seeds, that is not known counts "
        "as no error.",
    ]
    if any(result.second_hand for result in results):
        notes.append("† marks second-hand figures.")
    notes += [f"[{number}] {source.rstrip('.')}." for (source, _), number in numbers.items()]
    notes += [f"On {note.rstrip('.')}." for note in _notes(results, numbers)]
    return Table("published results", rows, notes, keys=2)


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

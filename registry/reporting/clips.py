"""The clips that a report shows: their text, and those where modalities disagree or models err most."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ..comparison import Comparison, Row
from ..data.feature_file import read_feature_file
from ..data.splits import FeatureFile
from ..data.store import Store
from ..errors import InputError, blaming
from ..labels import GeneratedLabels
from ..plugins import Plugins
from ..side_by_side import Table
from ..tables import Rows
from .pictures import printable, shortened

MOST_DISAGREEING, MOST_WRONG = 10, 15
"""clips in a table"""
MOST_MODELS = 8
"""with a column of their own"""
_MOST_LETTERS, _LONGEST_ID = 300, 60
_MODALITIES = {"T": "text", "A": "audio", "V": "vision"}


@dataclass(frozen=True)
class Clips:
    """What the data says of clips that the run folders do not hold."""

    texts: Mapping[str, str] = field(default_factory=dict)
    """by id"""
    unimodal: pd.DataFrame | None = None
    """labels of the test clips, by id: `text`, `audio`, `vision`, as far as they are known"""
    why_none: str = ""
    """a sentence where there are no texts"""

    def columns(self, clip: str) -> dict[str, str]:
        """Return the cells that tell which clip it is."""
        return {"id": shortened(clip, _LONGEST_ID), **({"text": _cut(self.texts.get(clip, ""))} if self.texts else {})}

    @property
    def keys(self) -> int:
        """How many they are."""
        return 2 if self.texts else 1


def read_clips(
    comparison: Comparison,
    data: str | Path | None,
    plugins: Sequence[str] = (),
    data_root: str | Path | None = None,
) -> Clips:
    """Return the texts and unimodal labels of the clips, from the feature file or from a dataset that makes its own.

    Without `data` it is the registered file that the runs were trained on, if there is one below `data_root`.

    Raises:
        InputError: the file cannot be read, is of other clips, or the dataset needs none.
    """
    run = comparison.ok[0].runs[0]
    generate = None
    with suppress(InputError):  # its plugin is not installed any more
        generate = Plugins(plugins).load("dataset", comparison.dataset).generate
    if generate and data is not None:
        raise InputError(f"dataset {comparison.dataset!r} makes its own data; leave out --data")
    limit, store = run.settings["data"]["label_range"], Store(data_root)
    if data is not None and os.path.lexists(place := Path(os.path.expanduser(data))):
        file = read_feature_file(place, label_range=limit)
    elif data is not None:
        file = store.find(comparison.dataset, str(data)).read(label_range=limit)
    elif generate:
        with blaming(f"generate of dataset {comparison.dataset!r}"):
            file = generate()
    elif same := store.same(comparison.dataset, run.settings["data"]["sha256"]):
        file = same.read(label_range=limit)
    else:
        return Clips(why_none="Run folders hold no texts: --data FILE, the feature file of the runs, adds them here.")
    if not _are_tested(file, run.predictions):
        if data is None:
            return Clips(why_none=f"No texts: the dataset {comparison.dataset} makes other clips by now.")
        raise InputError(f"--data {data} is not of these runs: its test clips or their labels are others")
    texts: dict[str, str] = {}
    for split in file.splits.values():
        texts.update(zip(split.ids, split.raw_text or [], strict=False))
    test = file.splits["test"]
    known = {name: test.labels[task] for task, name in _MODALITIES.items() if task in test.labels}
    unimodal = pd.DataFrame(known, index=test.ids) if len(known) > 1 else None
    return Clips(texts, unimodal, "" if texts else f"No texts: {file.name} has no key raw_text.")


def _are_tested(file: FeatureFile, predictions: pd.DataFrame) -> bool:
    test = file.splits["test"]
    same = list(predictions["id"]) == list(test.ids)
    return same and bool(np.allclose(predictions["label"], test.labels["M"], atol=1e-4))


def _cut(text: str) -> str:
    """Return text of a clip in one line that a page has room for."""
    line = printable(text)
    return line if len(line) <= _MOST_LETTERS else f"{line[:_MOST_LETTERS]}… ({len(line):,} characters)"


def _label(value: float) -> str:
    return "" if not np.isfinite(value) else f"{round(float(value), 2) + 0.0:.2f}"


def predictions_of(row: Row) -> pd.DataFrame:
    """Return `id`, `label` and the mean `prediction` over seeds of every test clip."""
    tables = [run.predictions for run in row.runs]
    mean = np.mean([table["prediction"] for table in tables], axis=0)
    return tables[0][["id", "label"]].assign(prediction=mean)


def shown_models(comparison: Comparison) -> list[Row]:
    """Return the rows that have a column among clips: all, or the reference and those with the lowest MAE."""
    rows = comparison.ok
    best = sorted(rows[1:], key=lambda row: row.mean["MAE"])[: MOST_MODELS - 1]
    return [row for row in rows if row is rows[0] or row in best]


def most_wrong(comparison: Comparison, clips: Clips) -> Table:
    """Return the test clips whose predictions lie farthest from the label, on the average over all models."""
    tables = {row.name: predictions_of(row) for row in comparison.ok}
    errors = np.mean([abs(table["prediction"] - table["label"]) for table in tables.values()], axis=0)
    first = next(iter(tables.values()))
    rows: Rows = [
        {
            **clips.columns(first["id"][place]),
            "label": _label(first["label"][place]),
            **{f"by {row.name}": _label(tables[row.name]["prediction"][place]) for row in shown_models(comparison)},
            "mean error": _label(errors[place]),
        }
        for place in np.argsort(-errors, kind="stable")[:MOST_WRONG]
    ]
    return Table("largest errors on test", rows, [], clips.keys)


def most_disagreeing_tested(comparison: Comparison, clips: Clips) -> Table | None:
    """Return the test clips whose known unimodal labels differ most, with predictions; None where they do not."""
    if clips.unimodal is None:
        return None
    spread = (clips.unimodal.max(axis=1) - clips.unimodal.min(axis=1)).fillna(0).to_numpy()
    tables = {row.name: predictions_of(row) for row in shown_models(comparison)}
    label = next(iter(tables.values()))["label"]
    rows: Rows = [
        {
            **clips.columns(clips.unimodal.index[place]),
            **{f"{name} label": _label(clips.unimodal[name].iloc[place]) for name in clips.unimodal},
            "multimodal label": _label(label[place]),
            **{f"by {name}": _label(table["prediction"][place]) for name, table in tables.items()},
        }
        for place in np.argsort(-spread, kind="stable")[:MOST_DISAGREEING]
        if spread[place] > 0
    ]
    return Table("Test clips whose modalities disagree most", rows, [], clips.keys) if rows else None


def most_disagreeing(row: Row, labels: Sequence[GeneratedLabels], clips: Clips) -> Table | None:
    """Return the train clips whose generated labels differ most at the best epoch; None where they do not.

    Labels are means over the seeds.
    """
    modalities = labels[0].modalities
    table = (
        pd.concat([found.by_clip(found.best_epoch) for found in labels]).groupby("id", sort=False).mean().reset_index()
    )
    spread = (table[modalities].max(axis=1) - table[modalities].min(axis=1)).to_numpy()
    true = [name for name in modalities if f"true {name}" in table]
    rows: Rows = [
        {
            **clips.columns(table["id"][place]),
            **{f"{name} label": _label(table[name][place]) for name in modalities},
            "multimodal label": _label(table["multimodal"][place]),
            **{f"true {name} label": _label(table[f"true {name}"][place]) for name in true},
        }
        for place in np.argsort(-spread, kind="stable")[:MOST_DISAGREEING]
        if spread[place] > 0
    ]
    return Table(f"Train clips whose labels by {row.name} disagree most", rows, [], clips.keys) if rows else None

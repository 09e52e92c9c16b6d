"""How a finished run bears it when parts of its test clips are missing: metrics by the rate of what is missing.

found = evaluate_missing("runs/self_mm/mosi/3f2a…", "unaligned_50.pkl", kind="steps")
found.values, found.rows(), draw(found)
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .benchmark import checked_seeds
from .comparison import check_metrics
from .contract import MODALITIES
from .data.absence import Part, Rules, lose_modalities, lose_steps
from .errors import InputError, unknown
from .labels import FORMATS, STYLE, find_runs
from .metrics import names_of, regression
from .prediction import Clips, Features, Predictor
from .runs import require_file, write_file
from .training import Watcher

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .tables import Rows

KINDS = ("steps", "modality")
RATES = tuple(round(0.1 * step, 1) for step in range(10))
AREA = "area"
"""the mean of a metric over rates, each weighed by the trapezoids beside it: AUILC in the literature, over the width"""
_WHAT = {"steps": "words and steps that are missing", "modality": "modalities that are missing"}


@dataclass(frozen=True)
class Missing:
    """Metrics on the test split under missing rates."""

    model: str
    dataset: str
    kind: str
    modalities: tuple[str, ...]
    """what can be missing"""
    values: pd.DataFrame
    """`seed` of the run, `rate`, `mask_seed` (none at rate 0, where nothing is drawn), and each metric"""

    @property
    def title(self) -> str:
        """What was measured."""
        return f"{self.model} on {self.dataset}, test split, rate of {_WHAT[self.kind]} ({', '.join(self.modalities)})"

    @property
    def counted(self) -> str:
        """What means are over."""
        runs, masks = self.values["seed"].nunique(dropna=False), self.values["mask_seed"].nunique()
        return f"{runs} run{'s' * (runs > 1)} and {masks} mask seed{'s' * (masks != 1)}"

    @property
    def metrics(self) -> list[str]:
        """The metrics' names."""
        return [str(name) for name in self.values if name not in ("seed", "rate", "mask_seed")]

    def summary(self) -> pd.DataFrame:
        """Return, by rate and metric, `mean` and `sd` (sample, NaN of a single value) over runs and mask seeds.

        With several rates a row `AREA` follows: the area under each run's and mask seed's curve, over the rates' width.
        """
        by_rate = self.values.groupby("rate")[self.metrics].agg(["mean", "std"])
        by_rate.index = [f"{rate:g}" for rate in by_rate.index]
        if len(by_rate) > 1:
            by_rate.loc[AREA] = self._areas().agg(["mean", "std"]).T.stack()
        return by_rate.rename(columns={"std": "sd"}, level=1)

    def _areas(self) -> pd.DataFrame:
        """Return the area under every curve, a row each."""
        whole = self.values[self.values["mask_seed"].isna()]
        drawn = self.values[self.values["mask_seed"].notna()]
        rows = []
        for (seed, _), curve in drawn.groupby(["seed", "mask_seed"], dropna=False):
            same = whole["seed"].isna() if pd.isna(seed) else whole["seed"] == seed
            points = pd.concat([whole[same], curve]).sort_values("rate")
            rates = points["rate"].to_numpy()
            steps = np.diff(rates)[:, None]
            heights = points[self.metrics].to_numpy()
            rows.append(((heights[1:] + heights[:-1]) / 2 * steps).sum(axis=0) / (rates[-1] - rates[0]))
        return pd.DataFrame(rows, columns=self.metrics)

    def rows(self) -> Rows:
        """Return a row a rate, each metric as mean ± standard deviation."""
        table = self.summary()
        return [
            {"rate": str(rate), **{name: _figure(row[name, "mean"], row[name, "sd"]) for name in self.metrics}}
            for rate, row in table.iterrows()
        ]


def _figure(mean: float, deviation: float) -> str:
    return "-" if math.isnan(mean) else f"{mean:.4f}" + ("" if math.isnan(deviation) else f" ± {deviation:.4f}")


def evaluate_missing(
    folder: str | Path,
    data: Features = None,
    *,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = (1, 2, 3),
    kind: Literal["steps", "modality"] = "steps",
    modalities: Sequence[str] = (),
    metrics: Sequence[str] = (),
    data_root: str | Path | None = None,
    text_encoder: str | None = None,
    device: str = "auto",
    plugins: Sequence[str] = (),
    watcher: Watcher | None = None,
    before: Callable[[str], Any] = lambda _: None,
) -> Missing:
    """Return the metrics of finished runs on the test split while parts of it are missing.

    Nothing is trained, and validation is not looked at. At rate 0 the metrics are the run's own. The same seed gives
    the same masks to every run.

    Args:
        folder: of one seed, or of a configuration's seeds.
        data: the feature file, or the name of a registered one; None for the runs' own data, which their dataset makes
            or which is registered.
        rates: of what is missing, 0…1.
        seeds: of masks, each drawn once for all rates.
        kind: `"steps"`: each word becomes the unknown token, each step of audio and vision zeros (the train mean in a
            run with `standardize`), as TFR-Net is evaluated; `"modality"`: each clip loses each modality whole, and
            keeps one.
        modalities: what can be missing; all that the model reads by default.
        metrics: the ones that are wanted; all by default.
        data_root, text_encoder, device, plugins, watcher: as for `registry.predict`.
        before: is told of each rate before its turn.

    Raises:
        InputError: an argument is wrong, or the data does not fit the runs or has no labelled test split.
    """
    ordered, seeds = _checked_rates(rates), checked_seeds(seeds)
    if kind not in KINDS:
        raise InputError(unknown("kind", kind, KINDS))
    runs = find_runs(folder, plugins=plugins)
    watcher = watcher or Watcher()
    predictors = [Predictor(run, text_encoder=text_encoder, device=device, watcher=watcher) for run in runs]
    first = predictors[0]
    chosen = _checked_modalities(modalities, first, kind)
    settings = first.run.settings
    family = settings["data"]["metrics"]
    check_metrics(metrics, family)
    wanted = list(dict.fromkeys(metrics)) or names_of(family)
    clips = first.read(data, data_root)
    part = _test_of(clips, first)
    if clips.file.sha256 != settings["data"]["sha256"]:
        watcher.note(f"{clips.file.name} is not the file that {first.name} was trained and tested on")
    truth, rules, rows = part[0].labels["M"], _rules(first), []
    for rate in ordered:
        before(f"rate {rate:g}")
        for mask_seed in seeds if rate else [None]:
            lacking = part
            if mask_seed is not None and kind == "steps":
                lacking = lose_steps(part, rate, mask_seed, chosen, rules)
            elif mask_seed is not None:
                lacking = lose_modalities(part, rate, mask_seed, chosen, rules, first.reads)
            arrays, tokens = first.encoded(*lacking), lacking[1]
            for predictor in predictors:
                found = regression(predictor.output(arrays, tokens)["prediction"], truth, family)
                of = {"seed": predictor.run.settings["seed"], "rate": rate, "mask_seed": mask_seed}
                rows.append({**of, **found})
    values = pd.DataFrame(rows, columns=["seed", "rate", "mask_seed", *wanted])
    values = values.astype({"seed": "Int64", "mask_seed": "Int64"})
    return Missing(str(settings["model"]), str(settings["dataset"]), kind, chosen, values)


def _checked_rates(rates: Sequence[float]) -> list[float]:
    if not rates or len({*rates}) != len(rates) or not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"rates must be numbers from 0 to 1, at least one and each once, got {list(rates)}")
    return sorted(map(float, rates))


def _checked_modalities(given: Sequence[str], predictor: Predictor, kind: str) -> tuple[str, ...]:
    reads = predictor.reads
    for name in given:
        if name not in reads:
            raise InputError(f"{predictor.name} reads {', '.join(reads)}, so that no {name!r} can be missing")
    if kind == "modality" and len(reads) == 1:
        raise InputError(f"{predictor.name} reads {reads[0]} only, of which kind 'modality' leaves all: take 'steps'")
    return tuple(name for name in MODALITIES if name in (given or reads))


def _test_of(clips: Clips, predictor: Predictor) -> Part:
    test = clips.file.splits.get("test")
    if test is None or "M" not in test.labels:
        raise InputError(f"{clips.file.name} has no test split with labels, on which {predictor.name} could be tested")
    return test, clips.tokens["test"] if clips.tokens else None


def _rules(predictor: Predictor) -> Rules:
    """Return what stands for what is missing, in the vocabulary and on the scale of a run."""
    scale, aligned = predictor.run.scale, "alignment" in predictor.plan.needs
    fills = {name: scale.mean(name) for name in scale.names} if scale else {}
    if predictor.encoder is None:
        return Rules(fills=fills, keeps_lengths=aligned)
    tokenizer = predictor.encoder.tokenizer()
    stand_in = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.mask_token_id
    if stand_in is None:
        raise InputError(f"text encoder {predictor.encoder.name!r} has no token for a word that is missing")
    made = tokenizer([""], return_token_type_ids=True, return_attention_mask=True, return_tensors="np")
    nothing = np.concatenate([made[key] for key in ("input_ids", "attention_mask", "token_type_ids")])
    return Rules(stand_in, tokenizer.all_special_ids, nothing.astype(np.int64), fills, aligned)


# --- the figure


def draw(found: Missing) -> Figure:
    """Return a curve a metric: the mean over the rates, and a band of one standard deviation."""
    from matplotlib.figure import Figure

    summary = found.summary().drop(index=AREA, errors="ignore")
    columns = min(4, len(found.metrics))
    lines = -(-len(found.metrics) // columns)
    made = Figure(figsize=(0.5 + 1.9 * columns, 0.5 + 1.6 * lines), layout="constrained")
    grid = made.subplots(lines, columns, sharex=True, squeeze=False)
    for axes, name in zip(grid.flat, found.metrics, strict=False):
        _curve(axes, summary[name])
        axes.set_title(name, fontsize=8)
    for axes in grid.flat[len(found.metrics) :]:
        axes.set_axis_off()
    label = f"rate of {_WHAT[found.kind]} ({', '.join(found.modalities)})"
    made.supxlabel("\n".join(textwrap.wrap(label, 32 * columns)), fontsize=8)
    return made


def _curve(axes: Axes, table: pd.DataFrame) -> None:
    rates, mean = table.index.astype(float).to_numpy(), table["mean"].to_numpy()
    deviation = table["sd"].fillna(0).to_numpy()
    axes.fill_between(rates, mean - deviation, mean + deviation, color="#8fb3d4", alpha=0.5, linewidth=0)
    axes.plot(rates, mean, color="#333333", linewidth=1, marker="o", markersize=2.5)
    axes.spines[["top", "right"]].set_visible(False)


# --- files


def require_files(figure: Path | None, csv: Path | None) -> None:
    """See that both can be written, before anything is computed; raises InputError."""
    for path, option, kinds in ((figure, "--figure", FORMATS), (csv, "--out", ("csv",))):
        if path is not None:
            require_file(path, option)
            if path.suffix[1:].lower() not in kinds:
                raise InputError(f"{option} {path} must end in {', '.join(f'.{kind}' for kind in kinds)}")


def write_files(found: Missing, *, figure: Path | None = None, csv: Path | None = None) -> None:
    """Write the curves, and every value with what it is of.

    Raises:
        InputError: a name is wrong, or a file cannot be written.
    """
    from matplotlib import rc_context

    require_files(figure, csv)
    if csv is not None:
        of = {"model": found.model, "dataset": found.dataset, "kind": found.kind, "missing": ",".join(found.modalities)}
        table = found.values.assign(**of)[[*of, *found.values]]
        write_file(csv, partial(table.to_csv, index=False))
    if figure is not None:
        with rc_context(STYLE):
            write_file(figure, partial(draw(found).savefig, format=figure.suffix[1:].lower(), dpi=300))

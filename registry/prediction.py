"""What a finished run's model says of clips: those of a feature file, labelled or not, or a single one.

table = registry.predict("runs/self_mm/mosi/3f2a…/1111", "clips.pkl")
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .benchmark import find_device
from .contract import MODALITIES
from .data.absence import silenced
from .data.batches import Split, arrays_of, output_on
from .data.feature_file import read_clips
from .data.splits import CLIPS, FeatureFile, SplitArrays
from .data.store import Registered, Store
from .data.text import TextEncoder, find_text_encoder, tokenise, with_frozen_text
from .errors import InputError, RunFailed, unknown
from .isolation import isolated
from .labels import find_runs
from .metrics import regression
from .runs import Run, finite, load_run, require_file, write_file
from .training import Watcher

Features = str | Path | Mapping[str, Any] | None
FORMATS = (".csv", ".json")


@dataclass(frozen=True)
class Clips:
    """Clips as a run's model reads them, but for the states of a frozen text encoder; by split, or all as `CLIPS`."""

    file: FeatureFile
    tokens: Mapping[str, np.ndarray] | None
    """(N, 3, L) by split, for a model that reads text through an encoder"""


class Predictor:
    """A finished run's model on a device, with the run's own settings, text encoder and statistics.

    Args:
        run: the run.
        text_encoder: where the run's text encoder lies now, if its name does not say.
        device: `"cpu"`, `"cuda"` or `"auto"`.
        watcher: is told what you should know of the clips.

    Raises:
        InputError: the model or its text encoder cannot be had.
    """

    def __init__(
        self, run: Run, *, text_encoder: str | None = None, device: str = "auto", watcher: Watcher | None = None
    ) -> None:
        self.run = replace(run)  # with modules of its own, which are moved
        self.plan = self.run.plan
        self.device = find_device(device)
        self.watcher = watcher or Watcher()
        self.encoder = self._find_encoder(text_encoder)
        self.model = self.run.model.to(self.device)
        try:
            self.hooks = [hook.to(self.device) for hook in self.run.hooks.values()]
        except InputError as error:
            self.hooks = []
            self.watcher.note(f"{error}; unimodal predictions of hooks are left out")

    @property
    def name(self) -> str:
        """Which run it is."""
        return f"the run {self.run.folder} ({self.plan.name})"

    @property
    def reads(self) -> tuple[str, ...]:
        """The modalities that the model reads."""
        needs = [need.removesuffix("_features") for need in self.plan.needs]
        return tuple(name for name in MODALITIES if name in needs and name not in self.plan.config.model.without)

    def _find_encoder(self, name: str | None) -> TextEncoder | None:
        known = self.run.settings["text_encoder"]
        if not {"text", "text_features"} & {*self.plan.needs} or known is None:
            if name:
                raise InputError(f"--text-encoder {name}: {self.name} has none; leave it out")
            return None
        try:
            found = find_text_encoder(name or known["name"])
        except InputError as error:
            if name:
                raise
            own = f"it is that of {self.name}; where it lies elsewhere now, say --text-encoder FOLDER"
            raise InputError(f"{error} ({own})") from error
        if found.sha256 != known["sha256"]:
            differs = f"text encoder {found.name!r} has other weights than {known['name']!r} had, that of {self.name}"
            trained = "text" in self.plan.needs  # the weights are in the checkpoint, so the vocabulary must do
            if not trained or any(found.config.get(k) != known["config"].get(k) for k in ("model_type", "vocab_size")):
                raise InputError(f"{differs}: pass the same one as --text-encoder")
            self.watcher.note(f"{differs}: only its vocabulary is used")
        return found

    def read(self, features: Features, data_root: str | Path | None = None) -> Clips:
        """Read clips and check that they fit the model; text is tokenised with the run's encoder.

        Args:
            features: a feature file, the name of a registered one, its content, or None for the run's own data, which
                its dataset makes or which is registered.
            data_root: the folder of registered files.

        Raises:
            InputError: the file has faults, lacks what the model needs, or has features of other widths.
        """
        if isinstance(features, Mapping):
            file = read_clips(features, label_range=self.plan.label_range)
        elif features is None and self.plan.dataset.generate:
            file = self.plan.dataset.generate()
        elif features is not None and os.path.lexists(path := os.path.expanduser(features)):
            file = read_clips(Path(path), label_range=self.plan.label_range)
        else:
            file = self._registered(features, data_root).read(label_range=self.plan.label_range)
        file = silenced(file, self.plan.config.model.without, self.run.info.dims)
        self._check(file)
        notes, tokens = list(file.notes), None
        if self.encoder:
            # Without raw text ids are trusted where they were in training: with the dataset's own encoder.
            names = (self.run.settings["text_encoder"]["name"], self.plan.dataset.text_encoder or "")
            trusted = self.encoder.name if len({Path(name).name for name in names}) == 1 else None
            aligned = "alignment" in self.plan.needs
            tokens, more = tokenise(file, self.encoder, default_encoder=trusted, keep_alignment=aligned)
            notes += more
        for note in notes:
            self.watcher.note(note)
        return self._fit(file, tokens)

    def _registered(self, name: str | Path | None, data_root: str | Path | None) -> Registered:
        """Return the registered file of a name or, without one, that which the run was trained on."""
        store, dataset = Store(data_root), self.plan.dataset.name
        if name is not None:
            return store.find(dataset, str(name))
        found = store.same(dataset, self.run.settings["data"]["sha256"])
        if found is None:
            raise InputError(f"{self.name} needs a feature file: that which it was trained on is not registered")
        return found

    def _check(self, file: FeatureFile) -> None:
        needs, arrays, faults = self.plan.needs, next(iter(file.splits.values())), []
        if "alignment" in needs and not file.aligned:
            faults.append("word-aligned features, and they are not aligned")
        if self.encoder and arrays.text_bert is None and arrays.raw_text is None:
            faults.append("text, and there is no key text_bert or raw_text")
        for name in arrays_of(needs):
            width, found = self.run.info.dims[name], getattr(arrays, name)
            if name == "text" and self.encoder:
                continue
            if found is None:
                faults.append(f"{name} of width {width}, and there is no key {name}")
            elif found.shape[2] != width:
                faults.append(f"{name} of width {width}, and it has width {found.shape[2]}")
        if faults:
            raise InputError(f"{file.name} does not fit {self.name}, which needs {'; '.join(faults)}")

    def _fit(self, file: FeatureFile, tokens: dict[str, np.ndarray] | None) -> Clips:
        """Return clips no longer than those the model was made for and, where padding counts, as long."""
        longest, pads, cut = self.run.info.max_lengths, "padding" in self.plan.needs, dict.fromkeys(MODALITIES, 0)
        is_own = file.sha256 == self.run.settings["data"]["sha256"]
        if tokens and "text" in longest:
            cut["text"] = sum(int((made[:, 1].sum(axis=1) > longest["text"]).sum()) for made in tokens.values())
            tokens = {name: _first_tokens(made, longest["text"]) for name, made in tokens.items()}
            if pads:
                tokens = {name: _padded(made, longest["text"], 2) for name, made in tokens.items()}
        splits = dict(file.splits)
        for name in arrays_of(self.plan.needs):
            if is_own or name not in longest or (name == "text" and self.encoder):
                continue
            for split, arrays in splits.items():
                array, lengths = getattr(arrays, name)[:, : longest[name]], getattr(arrays, f"{name}_lengths")
                if lengths is not None:
                    cut[name] += int((lengths > longest[name]).sum())
                    lengths = lengths.clip(max=longest[name])
                array = _padded(array, longest[name], 1) if pads else array
                splits[split] = replace(arrays, **{name: array, f"{name}_lengths": lengths})
        for name, clips in cut.items():
            if clips:
                most = f"more than the {longest[name]} steps of {name} that {self.name} was made for"
                self.watcher.note(f"{clips} clips have {most}; the rest was cut")
        return Clips(replace(file, splits=splits), tokens)

    def encoded(self, arrays: SplitArrays, tokens: np.ndarray | None) -> SplitArrays:
        """Return a split of `read`'s with the states of the frozen text encoder, if the model has one.

        Args:
            arrays: the split.
            tokens: (N, 3, L) of the same clips, if the model reads text through an encoder.
        """
        if tokens is None or self.encoder is None or "text_features" not in self.plan.needs:
            return arrays
        file = FeatureFile("", {CLIPS: arrays}, aligned=False, sha256="")
        arrays = with_frozen_text(file, {CLIPS: tokens}, self.encoder, self.device, None).splits[CLIPS]
        if "padding" in self.plan.needs:
            assert arrays.text is not None
            arrays = replace(arrays, text=_padded(arrays.text, self.run.info.max_lengths.get("text", 0), 1))
        return arrays

    def output(self, arrays: SplitArrays, tokens: np.ndarray | None) -> dict[str, np.ndarray]:
        """Return `"prediction"` and, where the model or a hook predicts it, each modality's sentiment: (N) each.

        Args:
            arrays: a split that is `encoded`.
            tokens: as there.

        Raises:
            RunFailed: a prediction is not finite.
        """
        needs = self.plan.needs
        precision = self.run.settings["precision"]
        if self.device.type == "cpu" and precision == "tf32":
            precision = "fp32"
        with isolated(0, self.device, precision), torch.no_grad():
            read = tokens if "text" in needs else None
            split = Split(arrays, read, self.device, train=False, needs=needs, scale=self.run.scale)
            output = output_on(self.model, split)
            unimodal = {name: value for hook in self.hooks for name, value in hook.unimodal(output).items()}
            unimodal |= output.unimodal
            ordered = [name for name in MODALITIES if name in unimodal]
            ordered += [name for name in unimodal if name not in MODALITIES]
            columns = {"prediction": output.prediction, **{name: unimodal[name] for name in ordered}}
        found = {name: values.float().cpu().numpy() for name, values in columns.items()}
        if wrong := int((~np.isfinite(found["prediction"])).sum()):
            raise RunFailed(f"{wrong} of {len(arrays.ids)} predictions of {self.name} are not finite")
        return found

    def table(self, clips: Clips, split: str | None = None) -> pd.DataFrame:
        """Return `id`, `split` and `label` where there are such, `prediction`, and unimodal sentiments, a row a clip.

        Raises:
            InputError: there is no such split.
        """
        splits = clips.file.splits
        if split is not None and split not in splits:
            there = [name for name in splits if name != CLIPS]
            raise InputError(f"{clips.file.name}: {unknown('split', split, there)}")
        parts = []
        for name in splits if split is None else [split]:
            arrays = splits[name]
            columns: dict[str, Any] = {"id": arrays.ids}
            if name != CLIPS:
                columns["split"] = name
            if "M" in arrays.labels:
                columns["label"] = arrays.labels["M"]
            tokens = clips.tokens[name] if clips.tokens else None
            output = self.output(self.encoded(arrays, tokens), tokens)
            parts.append(pd.DataFrame({**columns, **output}))
        table = pd.concat(parts, ignore_index=True)
        first = [name for name in ("id", "split", "label", "prediction") if name in table]
        return table[[*first, *(name for name in table if name not in first)]]


def predict(
    run: str | Path | Run,
    features: Features = None,
    *,
    split: str | None = None,
    data_root: str | Path | None = None,
    text_encoder: str | None = None,
    device: str = "auto",
    plugins: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> pd.DataFrame:
    """Return a finished run's predictions of clips; for arguments and columns see `Predictor`.

    Args:
        run: a run, or the folder of one seed.
        features: a feature file with any of the splits, or with the clips of none; its content as a dict, such as
            MMSA-FET returns; the name of a registered file; None for the run's own data, which its dataset makes or
            which is registered. Labels may be missing.
        split: the only one that is wanted.
        data_root: the folder of registered files.
        text_encoder: where the run's text encoder lies now, if its name does not say.
        device: `"cpu"`, `"cuda"` or `"auto"`.
        plugins: files or modules of models that are not packaged.
        watcher: is told what you should know; a Python warning by default.

    Raises:
        InputError: the run, the file, or their fit has a fault.
    """
    found = run if isinstance(run, Run) else load_run(run, plugins=plugins)
    predictor = Predictor(found, text_encoder=text_encoder, device=device, watcher=watcher)
    return predictor.table(predictor.read(features, data_root), split)


def find_run(folder: str | Path, *, plugins: Sequence[str] = ()) -> Run:
    """Return the run in a folder of one seed, or of a configuration that has no other.

    Raises:
        InputError: it is the folder of neither.
    """
    found = find_runs(folder, plugins=plugins)
    if len(found) > 1:
        raise InputError(f"{folder} holds {len(found)} seeds, expected one: name {found[0].folder} or another")
    return found[0]


def metrics_of(run: Run, table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return the metrics of predictions by split, where it has labels; of clips without splits as `CLIPS`."""
    if "label" not in table:
        return {}
    labelled = table[table["label"].notna()]
    groups = labelled.groupby("split", sort=False) if "split" in table else [(CLIPS, labelled)]
    family = run.settings["data"]["metrics"]
    return {str(name): regression(rows["prediction"], rows["label"], family) for name, rows in groups if len(rows)}


def require_format(path: Path) -> None:
    """See that predictions can be written there; raises InputError."""
    require_file(path, "--out")
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--out {path} must end in {' or '.join(FORMATS)}")


def write_predictions(run: Run, table: pd.DataFrame, path: Path) -> None:
    """Write predictions as CSV or, with the metrics and what run they are of, as JSON.

    Raises:
        InputError: the file's name ends in neither, or it cannot be written.
    """
    require_format(path)
    if path.suffix.lower() == ".csv":
        write_file(path, partial(table.to_csv, index=False))
        return
    value = {name: run.settings[name] for name in ("model", "dataset", "seed")}
    value |= {"metrics": metrics_of(run, table), "predictions": table.to_dict("records")}
    write_file(path, lambda place: place.write_text(json.dumps(finite(value), indent=2) + "\n", "utf-8"))


def _first_tokens(tokens: np.ndarray, longest: int) -> np.ndarray:
    """Return tokens (N, 3, L) of at most `longest`; a clip that is cut keeps its last one, which ends it."""
    real = tokens[:, 1].sum(axis=1)
    over = real > longest
    if over.any():
        tokens = tokens.copy()
        tokens[over, :, longest - 1] = tokens[over, :, real[over] - 1]
    return tokens[:, :, :longest]


def _padded(array: np.ndarray, steps: int, axis: int) -> np.ndarray:
    """Return an array with zeros behind it along an axis, up to so many steps."""
    missing = max(steps - array.shape[axis], 0)
    return np.pad(array, [(0, missing if dim == axis else 0) for dim in range(array.ndim)]) if missing else array

"""What a run is made of: a `Plan` is a model, a dataset and a configuration that fit; a `Job` is a plan with its data.

plan = make_plan("self_mm", "mosi", config={"epochs": 20})
job = plan.read("unaligned_50.pkl", text_encoder=None, watcher=Watcher())
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .config import RunConfig, as_typed, resolve
from .contract import Config, DataInfo, DatasetSpec, HookSpec, ModelSpec
from .data.absence import silenced
from .data.batches import Split, arrays_of
from .data.feature_file import read_feature_file
from .data.modality_files import Paths, checked_paths, with_features
from .data.splits import FeatureFile
from .data.standardize import Scale
from .data.store import Registered, Store
from .data.text import TextEncoder, find_text_encoder, tokenise, with_frozen_text
from .errors import InputError, blaming
from .plugins import Plugins
from .runs import identity
from .training import Watcher

NEEDS = ("text", "text_features", "audio", "vision", "alignment", "padding", "T", "A", "V")
CPU = torch.device("cpu")
PRECISIONS = {
    "fp32": "float32",
    "tf32": "float32, matrix products in TF32",
    "bf16": "text encoder in bf16, weights float32",
}
"""what a run computes in, by the name that `--precision` takes; with bf16 a GPU does the rest as with tf32"""
SELECTION = "the epoch with the lowest validation MAE; test is read once"


def needs_of(spec: ModelSpec, config: Config) -> tuple[str, ...]:
    """Return what a model needs of the data, under a configuration; raises InputError for what is none of `NEEDS`."""
    with blaming(f"needs of model {spec.name!r}"):
        needs = spec.needs(config) if callable(spec.needs) else spec.needs
    is_list = isinstance(needs, (tuple, list))
    if not is_list or (wrong := [need for need in needs if need not in NEEDS]):
        given = ", ".join(map(str, wrong)) if is_list else needs
        raise InputError(f"{spec.name}: needs must be a tuple of {', '.join(NEEDS)}, got {given!r}")
    if {"text", "text_features"} <= set(needs):
        raise InputError(f"{spec.name}: needs may have text or text_features, not both")
    return tuple(needs)


@dataclass(frozen=True)
class Plan:
    """A model with its hooks, a dataset and a configuration that fit together; no data is read yet."""

    name: str
    """`NAME`, or `NAME+HOOK` with the hooks that the model does not always have"""
    spec: ModelSpec
    hooks: list[HookSpec]
    dataset: DatasetSpec
    config: RunConfig
    label_range: float
    versions: Mapping[str, str]
    """of `model NAME`, of each `hook NAME`, and of `dataset NAME` where it makes its own data; what is not packaged
    has its source for one"""
    sources: Mapping[str, str]
    """hashes of the source of the same"""

    @property
    def needs(self) -> tuple[str, ...]:
        """What the model needs of the data, under this configuration."""
        return needs_of(self.spec, self.config.model)

    @property
    def metrics(self) -> Literal["mosi", "sims"]:
        """The family of metrics: the dataset's, or by the range of its labels."""
        return self.dataset.metrics or ("sims" if self.label_range <= 1 else "mosi")

    def having(self, values: Mapping[str, Any]) -> Plan:
        """Return the plan with other values of some keys; raises InputError where the configuration has faults."""
        with blaming(f"the configuration of model {self.spec.name!r}"):
            config = resolve(
                self.spec,
                self.hooks,
                self.dataset,
                preset=self.config.preset,
                overrides={**self.config.as_dict(), **values},
                defaults=_defaults_of(self.dataset),
            )
        return replace(self, config=config)

    def find_encoder(self, name: str | None) -> TextEncoder | None:
        """Return the text encoder by name, or the dataset's own; None for a model that reads no text."""
        if not {"text", "text_features"} & set(self.needs):
            return None
        chosen = name or self.dataset.text_encoder
        if chosen is None:
            raise InputError(f"dataset {self.dataset.name!r} needs --text-encoder: minilm, a hub name or a folder")
        return find_text_encoder(chosen)

    def read(
        self,
        data: str | Path | None,
        text_encoder: str | None,
        watcher: Watcher,
        *,
        data_root: str | Path | None = None,
        features: Paths | None = None,
        device: torch.device = CPU,
        cache: Path | None = None,
        precision: str = "fp32",
    ) -> Job:
        """Read the feature file, check it against what the model needs, and tokenise its text.

        `data` and `data_root` are as for `place_of`, `features` as for `with_features`.
        Text features of a frozen encoder are computed on `device` and kept below the folder `cache`.
        """
        place = self.place_of(data, data_root)
        parts = checked_paths(features)
        encoder = self.find_encoder(text_encoder) if "text" in self.needs or text_encoder else None
        known = self.dataset.sha256
        if isinstance(place, Registered):
            file = place.read(label_range=self.label_range, known_sha256=known)
            if data is None:
                file.notes.insert(0, f"the data is {place.name}, as it was registered on {place.added[:10]}")
        elif place is not None:
            file = read_feature_file(place, label_range=self.label_range, known_sha256=known, cache=cache)
        else:
            with blaming(f"generate of dataset {self.dataset.name!r}"):
                file = self.dataset.generate()  # type: ignore[misc]
            if not isinstance(file, FeatureFile):
                raise InputError(f"generate of dataset {self.dataset.name!r} must return a registry.FeatureFile")
        if parts:
            file = with_features(file, parts, label_range=self.label_range)
        config = self.config.model
        file = silenced(file, config.without, {})
        _check_needs(self, file)
        notes = [*file.notes, *_oddities(self, file)]
        tokens = None
        if "text_features" in self.needs and file.splits["train"].text is None:
            encoder = encoder or self.find_encoder(None)
        if encoder:
            default = self.dataset.text_encoder
            tokens, more = tokenise(file, encoder, default_encoder=default, keep_alignment="alignment" in self.needs)
            notes += more
            if "padding" in self.needs:
                tokens = _of_one_length(tokens)
        if encoder and tokens and "text_features" in self.needs:
            file = with_frozen_text(file, tokens, encoder, device, cache)
        arrays = file.splits["train"]
        read = arrays_of(self.needs)
        dims = {name: getattr(arrays, name).shape[2] for name in read}
        lengths = {name: max(getattr(split, name).shape[1] for split in file.splits.values()) for name in read}
        if tokens and encoder and "text" in self.needs:
            dims["text"] = encoder.width
            lengths["text"] = max(made.shape[2] for made in tokens.values())
        for note in notes:
            watcher.note(note)
        info = DataInfo(
            name=self.dataset.name,
            dims=dims,
            max_lengths=lengths,
            n_train=len(arrays.ids),
            label_range=self.label_range,
            tasks=tuple(arrays.labels),
            aligned=file.aligned,
            text_encoder=encoder,
        )
        scale = Scale.of(arrays, read) if config.standardize else None
        return Job(self, info, file, tokens, notes, precision, scale)

    def place_of(self, data: str | Path | None, data_root: str | Path | None = None) -> Path | Registered | None:
        """Return the feature file or the registered one that is meant, None where the dataset makes its own data.

        Args:
            data: a path, or the name of a registered file where there is no such path; None for the registered file
                that fits the model.
            data_root: the folder of registered files.

        Raises:
            InputError: there is none, or several could be meant.
        """
        if self.dataset.generate and data is not None:
            raise InputError(f"dataset {self.dataset.name!r} makes its own data; leave out --data")
        if self.dataset.generate:
            return None
        place = Path(os.path.expanduser(data)) if data is not None else None
        if place is None or not os.path.lexists(place):
            name = None if data is None else str(data)
            return Store(data_root).find(self.dataset.name, name, aligned="alignment" in self.needs)
        if not place.is_file():  # said before an encoder is fetched
            raise InputError(f"{place} is a folder, expected a file" if place.is_dir() else f"{place} does not exist")
        return place


@dataclass(frozen=True)
class Job:
    """A plan with the facts of its data and, unless it is only about weights, the data itself."""

    plan: Plan
    info: DataInfo
    file: FeatureFile | None = None
    tokens: Mapping[str, np.ndarray] | None = None
    notes: Sequence[str] = ()
    """what the user should know of the data"""
    precision: str = "fp32"
    """one of `PRECISIONS`"""
    scale: Scale | None = None
    """what audio and vision are standardised by, where they are"""

    def split(self, name: str, device: torch.device) -> Split:
        """Return the split "train", "valid" or "test" on a device."""
        assert self.file is not None
        tokens = self.tokens[name] if self.tokens and "text" in self.plan.needs else None
        return Split(
            self.file.splits[name], tokens, device, train=name == "train", needs=self.plan.needs, scale=self.scale
        )

    def settings(self) -> dict[str, Any]:
        """Everything that can change a result apart from the seed, as it is written to `config.json`."""
        plan, encoder = self.plan, self.info.text_encoder
        splits = self.file.splits if self.file else {}
        return {
            "model": plan.name,
            "dataset": plan.dataset.name,
            "config": plan.config.as_dict(),
            "version": plan.versions[f"model {plan.spec.name}"],
            "hooks": {hook.name: plan.versions[f"hook {hook.name}"] for hook in plan.hooks},
            "precision": self.precision,
            "data": {
                **{key: value for key, value in vars(self.info).items() if key != "text_encoder"},
                "sha256": self.file.sha256 if self.file else None,
                "version": plan.versions.get(f"dataset {plan.dataset.name}"),
                "metrics": plan.metrics,
                "sizes": {name: len(split.ids) for name, split in splits.items()},
            },
            "text_encoder": encoder
            and {"name": encoder.name, "sha256": encoder.sha256, "config": dict(encoder.config)},
        }

    def identity(self) -> str:
        """Return the config hash; names and paths do not enter it, contents do."""
        settings, tokens = self.settings(), hashlib.sha256()
        for name, made in (self.tokens or {}).items():
            tokens.update(f"{name}{made.shape}".encode() + made.tobytes())
        if settings["text_encoder"]:
            settings["text_encoder"]["name"] = tokens.hexdigest()
        return identity(settings)

    def protocol(self, *, tuned: bool = True) -> dict[str, str]:
        """What every table of these results must say; `tuned` is whether the text encoder was trained."""
        encoder, config, dataset = self.info.text_encoder, self.plan.config, self.plan.dataset
        published = dataset.label_range in (None, self.plan.label_range)
        without = "the file's text features, frozen" if "text_features" in self.plan.needs else "none"
        borrowed = f" (its values for {dataset.presets_of})" if dataset.presets_of else ""
        others = [f"{name} of {file}" for name, file in self.file.parts.items()] if self.file else []
        caption = {"note": dataset.caption} if dataset.caption else {}
        return {
            **caption,
            "selection": SELECTION,
            "metrics": f"as defined for {'CH-SIMS' if self.plan.metrics == 'sims' else 'CMU-MOSI'}",
            "labels": f"within ±{self.plan.label_range:g}" + ("" if published else f", not ±{dataset.label_range:g}"),
            "data": ", ".join(["aligned" if self.info.aligned else "unaligned", *others]),
            "text encoder": f"{encoder.name}, {'fine-tuned' if tuned else 'frozen'}" if encoder else without,
            "precision": PRECISIONS[self.precision],
            "preset": f"{config.preset}{borrowed}" if config.preset else "none",
            "tuned for": self.plan.spec.tuned_for or "none",
            "changed settings": ", ".join(f"{k}={as_typed(v)}" for k, v in config.changed.items()) or "none",
            "micro-batches that fill no group at an epoch's end": self._tail(),
        }

    def _tail(self) -> str:
        training = self.plan.config.model
        micro_batches = -(-self.info.n_train // training.batch_size)
        if micro_batches % training.update_epochs == 0:
            return "there are none"
        kept = training.tail == "step" or micro_batches < training.update_epochs
        return "used" if kept else "dropped"


def make_plan(
    model: str,
    dataset: str,
    *,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    config_file: str | Path | None = None,
    hooks: Sequence[str] = (),
    label_range: float | None = None,
    plugins: Sequence[str] = (),
    data: str | Path | None = None,
    data_root: str | Path | None = None,
) -> Plan:
    """Find the plugins and resolve the configuration; arguments as for `registry.run`.

    `data` and `data_root` are asked for the label range alone, where neither the user nor the dataset says it.

    Raises:
        InputError: a name is unknown, a hook is given twice, or the configuration has faults.
    """
    found = Plugins(plugins)
    name, spec, hook_specs = found.load_model(model, hooks)
    dataset_spec = found.load("dataset", dataset)
    with blaming(f"the configuration of model {spec.name!r}"):
        resolved = resolve(
            spec,
            hook_specs,
            dataset_spec,
            preset=preset,
            file=None if config_file is None else Path(os.path.expanduser(config_file)),
            overrides=config,
            defaults=_defaults_of(dataset_spec),
        )
    limit = dataset_spec.label_range if label_range is None else label_range
    if limit is None and (data is None or not os.path.lexists(os.path.expanduser(data))):
        limit = Store(data_root).label_range(dataset, None if data is None else str(data))
    if limit is None:
        raise InputError(f"dataset {dataset!r} needs --label-range: 3 where labels lie between -3 and 3")
    if not 0 < limit <= float(np.finfo(np.float32).max):
        raise InputError(f"--label-range must be a positive number, got {limit:g}")
    parts: list[tuple[str, ModelSpec | HookSpec | DatasetSpec]] = [("model", spec), *(("hook", h) for h in hook_specs)]
    if dataset_spec.generate:
        parts.append(("dataset", dataset_spec))
    versions, sources = {}, {}
    for kind, part in parts:
        entry, key = found.entry(kind, part.name), f"{kind} {part.name}"
        sources[key] = entry.source_sha256
        versions[key] = part.version if entry.is_packaged else f"{part.version}+{entry.source_sha256}"
    return Plan(name, spec, hook_specs, dataset_spec, resolved, float(limit), versions, sources)


def _defaults_of(dataset: DatasetSpec) -> dict[str, Any] | None:
    return {"epochs": dataset.epochs} if dataset.epochs else None


def _of_one_length(tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every split's tokens (N, 3, L) with one L; what is added is padding that no mask shows."""
    longest = max(made.shape[2] for made in tokens.values())
    return {name: np.pad(made, ((0, 0), (0, 0), (0, longest - made.shape[2]))) for name, made in tokens.items()}


def _oddities(plan: Plan, file: FeatureFile) -> list[str]:
    """Return what is no fault, and yet may not be meant: other sizes than published, a modality that says nothing."""
    published = plan.dataset.splits.items()
    found = [(name, len(file.splits[name].ids), size) for name, size in published]
    notes = [
        f"{file.name} has {clips} {name} clips, {plan.dataset.name} as published has {size}"
        for name, clips, size in found
        if clips != size
    ]
    read = [name for name in arrays_of(plan.needs) if name not in plan.config.model.without]
    arrays = {name: getattr(file.splits["train"], name) for name in read}
    # Clip by clip: a large file is mapped into memory, and its first clips tell.
    of_one_value = {
        name: all((clip == array.flat[0]).all() for clip in array)
        for name, array in arrays.items()
        if array is not None
    }
    silent = [name for name, is_so in of_one_value.items() if is_so]
    return notes + [f"{name} says nothing: train has one value throughout" for name in silent]


def _check_needs(plan: Plan, file: FeatureFile) -> None:
    train, name = file.splits["train"], plan.spec.name
    for need in plan.needs:
        if need == "alignment":
            if plan.config.model.without:
                raise InputError(
                    f"{name} needs word-aligned features, of which none can be silent: leave out without=…"
                )
            if not file.aligned or ("text_features" in plan.needs and train.text_lengths is None):
                raise InputError(f"{name} needs word-aligned features, and {file.name} is not aligned")
        elif need in ("text", "text_features", "audio", "vision"):
            has_text = train.text_bert is not None or train.raw_text is not None
            has_text |= need == "text_features" and train.text is not None
            if not has_text if need.startswith("text") else getattr(train, need) is None:
                leaves_out = "modalities" in plan.spec.config.model_fields
                setting = "modalities=…" if leaves_out else f"without={need.removesuffix('_features')}"
                hint = f" (leave it out with --set {setting})"
                key = {"text": "text_bert or raw_text", "text_features": "text, text_bert or raw_text"}.get(need, need)
                raise InputError(f"{name} needs {need}, and {file.name} has no key {key}{hint}")
        elif need != "padding" and need not in train.labels:
            raise InputError(f"{name} needs labels {need!r}, and {file.name} has only {', '.join(train.labels)}")

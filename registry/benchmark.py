"""`run`: one model on one dataset, over seeds, from a feature file to a finished run folder.

result = registry.run("self_mm", "mosi", data="unaligned_50.pkl", seeds=[1111, 1112], config={"epochs": 20})
result.mean["MAE"], result.runs[0].folder
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .config import RunConfig, resolve
from .contract import DataInfo, DatasetSpec, HookSpec, ModelSpec, TrainingData, TrainingHook
from .data.batches import Split, predict
from .data.feature_file import FeatureFile, SplitArrays, read_feature_file
from .data.text import TextEncoder, find_text_encoder, tokenise
from .errors import InputError, RunFailed
from .metrics import regression
from .plugins import Plugins, split_model_name
from .runs import environment, finished, identity, load_run, write_run
from .training import Watcher, train

SELECTION = "the epoch with the lowest validation MAE; test is read once"


@dataclass(frozen=True)
class SeedRun:
    """One seed: `status` "ok" or "failed" (with its `reason`), test metrics as fractions."""

    seed: int
    status: str
    reason: str | None
    best_epoch: int | None
    metrics: dict[str, float]
    folder: Path | None


@dataclass(frozen=True)
class Result:
    """A model on a dataset over seeds; `mean` and `std` (sample, None below two) are over the runs that are ok."""

    model: str
    dataset: str
    runs: list[SeedRun]
    folder: Path
    protocol: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> list[SeedRun]:
        """The runs that finished."""
        return [run for run in self.runs if run.status == "ok"]

    @property
    def mean(self) -> dict[str, float]:
        """Mean of each test metric."""
        return {name: float(np.mean([run.metrics[name] for run in self.ok])) for name in self._names()}

    @property
    def std(self) -> dict[str, float] | None:
        """Sample standard deviation of each test metric."""
        if len(self.ok) < 2:
            return None
        return {name: float(np.std([run.metrics[name] for run in self.ok], ddof=1)) for name in self._names()}

    def _names(self) -> list[str]:
        return list(self.ok[0].metrics) if self.ok else []

    def to_json(self) -> str:
        """Return the fields that `run --json` prints; a metric that is not defined is null."""
        value = {
            "model": self.model,
            "dataset": self.dataset,
            "runs": [{**asdict(run), "folder": run.folder and str(run.folder)} for run in self.runs],
            "mean": self.mean,
            "std": self.std,
            "folder": str(self.folder),
        }
        return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(
    model: str,
    dataset: str = "demo",
    *,
    data: str | Path | None = None,
    text_encoder: str | None = None,
    seeds: Sequence[int] = (1111,),
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    config_file: str | Path | None = None,
    hooks: Sequence[str] = (),
    label_range: float | None = None,
    device: str = "auto",
    runs: str | Path = "runs",
    plugins: Sequence[str] = (),
    force: bool = False,
    watcher: Watcher | None = None,
) -> Result:
    """Train and test a model, once for each seed; a finished run is found and not repeated.

    Args:
        model: a registered name, or `NAME+HOOK` to train it with a hook.
        dataset: a registered name; `"custom"` for any file in the same layout, with `label_range`.
        data: the feature file; the dataset `"demo"` needs none.
        text_encoder: `"minilm"`, a hub name or a folder; the dataset's own by default.
        seeds: one run each.
        preset: published hyper-parameters to start from; the model's first by default.
        config: keys that override the preset and `config_file`.
        config_file: a JSON or TOML file of keys, or a run's `config.json`.
        hooks: hooks besides the model's own.
        label_range: labels lie in ± this.
        device: `"cpu"`, `"cuda"`, or `"auto"`.
        runs: the folder that holds run folders; nothing is written outside it.
        plugins: files or modules of plugins that are not packaged.
        force: train again where a finished run exists.
        watcher: is told of progress.

    Raises:
        InputError: something given is wrong; nothing has been written.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds must be at least one number, each once, got {list(seeds)}")
    watcher = watcher or Watcher()
    job = prepare(
        model,
        dataset,
        preset=preset,
        config=config or {},
        config_file=config_file,
        hooks=hooks,
        label_range=label_range,
        plugins=plugins,
    )
    place = _device(device)
    job.read(data, text_encoder, watcher)
    folder = Path(runs) / job.name / job.dataset.name / job.identity()
    done = []
    for number, seed in enumerate(seeds, 1):
        if finished(folder / str(seed)) and not force:
            watcher.note(f"seed {seed} is finished already: {folder / str(seed)} (--force trains it again)")
        else:
            watcher.start(seed, number, len(seeds), job.config.model)
            try:
                _train_seed(job, seed, place, folder / str(seed), watcher)
            except RunFailed as failure:
                done.append(SeedRun(seed, "failed", str(failure), None, {}, None))
                continue
        saved = load_run(folder / str(seed))
        done.append(SeedRun(seed, "ok", None, saved.best_epoch, saved.metrics, saved.folder))
    return Result(job.name, job.dataset.name, done, folder, job.protocol())


@dataclass
class Job:
    """A model, a dataset and a configuration that fit together; `read` adds the data."""

    name: str
    spec: ModelSpec
    hooks: list[HookSpec]
    dataset: DatasetSpec
    config: RunConfig
    label_range: float
    file: FeatureFile | None = None
    tokens: Mapping[str, np.ndarray] | None = None
    info: DataInfo | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """What the model needs of the data, under this configuration."""
        return self.spec.needs(self.config.model) if callable(self.spec.needs) else self.spec.needs

    def read(self, path: str | Path | None, text_encoder: str | None, watcher: Watcher) -> None:
        """Read the feature file, check it against what the model needs, and tokenise its text."""
        if self.dataset.generate:
            if path is not None:
                raise InputError(f"dataset {self.dataset.name!r} makes its own data; leave out --data")
            encoder = self.find_encoder(text_encoder)
            file = self.dataset.generate()
        else:
            if path is None:
                raise InputError(
                    f"dataset {self.dataset.name!r} needs --data FILE, its features in MMSA's pickle layout"
                )
            encoder = self.find_encoder(text_encoder)
            file = read_feature_file(Path(path), label_range=self.label_range, known_sha256=self.dataset.sha256)
        _check_needs(self.spec, self.needs, file)
        for note in file.notes:
            watcher.note(note)
        train_arrays = file.splits["train"]
        sequences = {name: getattr(train_arrays, name) for name in ("text", "audio", "vision")}
        present = {name: array for name, array in sequences.items() if array is not None}
        dims = {name: array.shape[2] for name, array in present.items()}
        lengths = {name: max(getattr(s, name).shape[1] for s in file.splits.values()) for name in present}
        if encoder:
            self.tokens, notes = tokenise(file, encoder, default_encoder=self.dataset.text_encoder)
            for note in notes:
                watcher.note(note)
            dims["text"] = encoder.width
            lengths["text"] = max(tokens.shape[2] for tokens in self.tokens.values())
        self.file = file
        self.info = DataInfo(
            name=self.dataset.name,
            dims=dims,
            max_lengths=lengths,
            n_train=len(train_arrays.ids),
            label_range=self.label_range,
            tasks=tuple(train_arrays.labels),
            aligned=file.aligned,
            text_encoder=encoder,
        )

    def find_encoder(self, name: str | None) -> TextEncoder | None:
        """Return the text encoder by name, or the dataset's own; None for a model that reads no text."""
        if "text" not in self.needs:
            return None
        chosen = name or self.dataset.text_encoder
        if chosen is None:
            raise InputError(f"dataset {self.dataset.name!r} needs --text-encoder: minilm, a hub name or a folder")
        return find_text_encoder(chosen)

    def settings(self) -> dict[str, Any]:
        """Everything that can change a result apart from the seed, as it is written to `config.json`."""
        assert self.info is not None
        encoder = self.info.text_encoder
        return {
            "model": self.name,
            "dataset": self.dataset.name,
            "config": self.config.as_dict(),
            "hooks": [hook.name for hook in self.hooks],
            "versions": {spec.name: spec.version for spec in (self.spec, *self.hooks)},
            "precision": "fp32",
            "data": {
                **{k: v for k, v in vars(self.info).items() if k != "text_encoder"},
                "sha256": self.file and self.file.sha256,
                "metrics": self.dataset.metrics,
                "sizes": {name: len(split.ids) for name, split in self.file.splits.items()} if self.file else {},
            },
            "text_encoder": encoder
            and {"name": encoder.name, "sha256": encoder.sha256, "config": dict(encoder.config)},
        }

    def identity(self) -> str:
        """Return the config hash; names and paths do not enter it, contents do."""
        settings = self.settings()
        settings["text_encoder"] = settings["text_encoder"] and settings["text_encoder"]["sha256"]
        return identity(settings)

    def protocol(self) -> dict[str, str]:
        """What every table of these results must say."""
        assert self.info is not None
        encoder = self.info.text_encoder
        tail = {"step": "stepped", "drop": "dropped"}[self.config.model.tail]
        return {
            "selection": SELECTION,
            "data": "aligned" if self.info.aligned else "unaligned",
            "text encoder": f"{encoder.name}, fine-tuned" if encoder else "none",
            "preset": self.config.preset or "none",
            "incomplete last group": tail,
        }


def prepare(
    model: str,
    dataset: str,
    *,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    config_file: str | Path | None = None,
    hooks: Sequence[str] = (),
    label_range: float | None = None,
    plugins: Sequence[str] = (),
) -> Job:
    """Find the plugins and resolve the configuration; reads no data."""
    found = Plugins(plugins)
    name, borrowed = split_model_name(model)
    spec = found.load("model", name)
    dataset_spec = found.load("dataset", dataset)
    extra = (*borrowed, *hooks)
    for hook in extra:
        if [*spec.hooks, *extra].count(hook) > 1:
            reason = f"{name} is always trained with it" if hook in spec.hooks else "it is named twice"
            raise InputError(f"hook {hook!r} cannot be added to {name!r}: {reason}")
    hook_specs = [found.load("hook", hook) for hook in (*spec.hooks, *extra)]
    defaults = {"epochs": dataset_spec.epochs} if dataset_spec.epochs else {}
    resolved = resolve(
        spec,
        hook_specs,
        dataset_spec,
        preset=preset,
        file=None if config_file is None else Path(config_file),
        overrides=config or {},
        defaults=defaults,
    )
    limit = dataset_spec.label_range if label_range is None else label_range
    if math.isnan(limit):
        raise InputError(f"dataset {dataset!r} needs --label-range: 3 where labels lie between -3 and 3")
    if not 0 < limit < math.inf:
        raise InputError(f"--label-range must be a positive number, got {limit:g}")
    return Job("+".join([name, *extra]), spec, hook_specs, dataset_spec, resolved, float(limit))


def _check_needs(spec: ModelSpec, needs: Sequence[str], file: FeatureFile) -> None:
    train = file.splits["train"]
    for need in needs:
        if need == "alignment":
            if not file.aligned:
                raise InputError(f"{spec.name} needs word-aligned features, and {file.name} is not aligned")
        elif need in ("text", "text_features", "audio", "vision"):
            has_tokens = train.text_bert is not None or train.raw_text is not None
            absent = not has_tokens if need == "text" else getattr(train, need.removesuffix("_features")) is None
            if absent:
                hint = " (leave it out with --set modalities=…)" if "modalities" in spec.config.model_fields else ""
                key = {"text": "text_bert or raw_text", "text_features": "text"}.get(need, need)
                raise InputError(f"{spec.name} needs {need}, and {file.name} has no key {key}{hint}")
        elif need not in train.labels:
            raise InputError(f"{spec.name} needs labels {need!r}, and {file.name} has only {sorted(train.labels)}")


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or auto, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device that torch can use; pass --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _train_seed(job: Job, seed: int, device: torch.device, folder: Path, watcher: Watcher) -> None:
    """Train one seed and write its folder; the global random state is left as it was."""
    assert job.file is not None
    assert job.info is not None
    started = time.perf_counter()
    tokens = job.tokens or {}
    splits = {
        name: Split(arrays, tokens.get(name), device, train=name == "train", text_features="text_features" in job.needs)
        for name, arrays in job.file.splits.items()
    }
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = job.spec.build(job.config.model, job.info).to(device)
        labels = TrainingData(splits["train"].labels, job.info)
        hooks: dict[str, TrainingHook] = {
            hook.name: hook.build(job.config.hooks[hook.name], labels, model.feature_dims).to(device)
            for hook in job.hooks
        }
        outcome = train(
            model,
            hooks,
            job.config.model,
            splits,
            per_sample=job.spec.per_sample,
            generator=torch.Generator().manual_seed(seed),
            watcher=watcher,
        )
        predictions = predict(model, splits["test"]).cpu().numpy()
    if not np.isfinite(predictions).all():
        raise RunFailed("the best epoch's predictions on the test split are not finite")
    metrics = regression(predictions, job.file.splits["test"].labels["M"], job.dataset.metrics)
    tables = _artifacts(hooks, job.file.splits["train"].ids)
    summary = {
        "metrics": metrics,
        "best_epoch": outcome.best_epoch,
        "valid_mae": outcome.history[outcome.best_epoch - 1].valid_mae,
        "protocol": job.protocol(),
        "artifacts": list(tables),
    }
    tables["predictions"] = prediction_table(job.file.splits["test"], predictions)
    tables["history"] = pd.DataFrame([vars(record) for record in outcome.history])
    write_run(
        folder,
        settings={**job.settings(), "seed": seed, "preset": job.config.preset},
        summary=summary,
        environment=environment(device, job.file.sha256, time.perf_counter() - started),
        tables=tables,
        modules={"model": model, **{f"hook.{name}": hook for name, hook in hooks.items()}},
        log=[str(record) for record in outcome.history],
    )


def prediction_table(split: SplitArrays, predictions: np.ndarray) -> pd.DataFrame:
    """Return `id`, `label` and `prediction` of every clip."""
    return pd.DataFrame({"id": split.ids, "label": split.labels["M"], "prediction": predictions})


def _artifacts(hooks: Mapping[str, TrainingHook], train_ids: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the hooks' tables, with the clips' ids in place of train rows."""
    tables = {}
    for hook in hooks.values():
        for name, columns in hook.artifacts().items():
            table = pd.DataFrame(columns)
            if "index" in table:
                table["index"] = np.array(train_ids)[table["index"]]
                table = table.rename(columns={"index": "id"})
            tables[name] = table
    return tables

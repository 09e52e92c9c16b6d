"""Run folders made of another project's checkpoints."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .benchmark import evaluate
from .contract import DataInfo, TrainingData
from .data.feature_file import file_sha256
from .data.store import Store
from .errors import InputError, blaming
from .isolation import isolated
from .jobs import Job, make_plan
from .plugins import Plugins
from .runs import Run, environment, load_run, require_writable, write_run
from .training import Watcher

CPU = torch.device("cpu")


def import_checkpoint(
    model: str,
    file: str | Path,
    dataset: str,
    *,
    data: str | Path | None = None,
    data_root: str | Path | None = None,
    text_encoder: str | None = None,
    label_range: float | None = None,
    runs: str | Path = "runs",
    plugins: Sequence[str] = (),
) -> Run:
    """Make a run folder of a checkpoint, and test it where its data is given.

    Args:
        model: a model whose spec has `import_checkpoint`.
        file: a state dict that `torch.save` wrote; it is read with weights only.
        dataset: the registered dataset that it was trained on.
        data: a feature file to test it on, or the name of one that is registered; by default the registered file that
            fits the model, where there is one.
        data_root: as for `registry.run`.
        text_encoder: the encoder it was trained with, for its configuration and its tokenizer.
        label_range, runs, plugins: as for `registry.run`.

    Raises:
        InputError: the file is not such a checkpoint, or does not fit the data.
    """
    path = Path(os.path.expanduser(file))
    importer = Plugins(plugins).load_model(model)[1].import_checkpoint
    if importer is None:
        raise InputError(f"model {model!r} cannot import checkpoints: its spec has no import_checkpoint")
    state = _read_weights(path)
    with blaming(f"importing {path} as a checkpoint of {model}"):
        found = importer(state)
    plan = make_plan(
        model,
        dataset,
        config=found["config"],
        label_range=label_range,
        plugins=plugins,
        data=data,
        data_root=data_root,
    )
    if data is not None or (not plan.dataset.generate and Store(data_root).files(dataset)):
        job = plan.read(data, text_encoder, Watcher(), data_root=data_root)
        if wrong := {k: v for k, v in found["dims"].items() if job.info.dims.get(k) != v}:
            name = data or (job.file and job.file.name)
            raise InputError(f"{path} was trained on features of width {wrong}, {name} has {dict(job.info.dims)}")
    else:
        info = DataInfo(
            name=dataset,
            dims=found["dims"],
            max_lengths={},
            n_train=0,
            label_range=plan.label_range,
            tasks=("M",),
            aligned=False,
            text_encoder=plan.find_encoder(text_encoder),
        )
        job = Job(plan, info)
    encoder = job.info.text_encoder
    if encoder is not None and encoder.width != found["dims"].get("text", encoder.width):
        raise InputError(
            f"{path} has a text encoder of width {found['dims']['text']}, {encoder.name} has {encoder.width}; "
            "pass the one it was trained with as --text-encoder"
        )
    with isolated(0, CPU):
        return _write(job, found, path, Path(os.path.expanduser(runs)))


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message is advice to load it all the same
        reason = "it holds more than weights, or is no file that torch.save wrote"
        raise InputError(f"{path} cannot be read as a checkpoint of weights: {reason}") from error
    except Exception as error:  # a damaged file can make any operation of the unpickler fail
        strange = "it is damaged, cut short, or no file that torch.save wrote"
        reason = (error.strerror if isinstance(error, OSError) else None) or strange
        raise InputError(f"{path} cannot be read as a checkpoint of weights: {reason}") from error
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named:
        raise InputError(f"{path} is not a state dict: it must hold named tensors and nothing else")
    return state


def _write(job: Job, found: dict[str, Any], path: Path, runs: Path) -> Run:
    plan = job.plan
    network = plan.spec.build(plan.config.model, job.info)
    labels = TrainingData({"M": torch.zeros(1)}, job.info)
    hooks = {spec.name: spec.build(plan.config.hooks[spec.name], labels, network.feature_dims) for spec in plan.hooks}
    try:
        network.load_state_dict(found["model"])
        for name, state in found["hooks"].items():
            # Parameters must be there; what a hook knows of its training clips is not in the file.
            loaded = hooks[name].load_state_dict(state, strict=False)
            parameters = {parameter for parameter, _ in hooks[name].named_parameters()}
            if wrong := [*loaded.unexpected_keys, *parameters.intersection(loaded.missing_keys)]:
                raise RuntimeError(f"{', '.join(sorted(wrong)[:3])} is missing or unknown")
    except RuntimeError as error:
        raise InputError(f"{path} does not fit {plan.name}: {str(error).splitlines()[-1].strip()}") from error
    digest = file_sha256(path)
    metrics: dict[str, float] = {}
    require_writable(runs)
    folder = runs / plan.name / plan.dataset.name / job.identity() / f"imported-{digest[:12]}"
    tables = {}
    if job.file is not None:
        metrics, tables["predictions"] = evaluate(network, job, job.split("test", CPU))
    write_run(
        folder,
        settings={**job.settings(), "seed": None, "imported_from": path.name, "checkpoint_sha256": digest},
        summary={
            "metrics": metrics,
            "best_epoch": None,
            "protocol": {**job.protocol(), "selection": "none: an imported checkpoint", "preset": "none"},
            "artifacts": [],
        },
        environment=environment(CPU, job, datetime.now(timezone.utc)),
        tables=tables,
        modules={"model": network, **{f"hook.{name}": hook for name, hook in hooks.items()}},
        log=[f"imported from {path.name}", *job.notes],
    )
    return load_run(folder)

"""Run folders made of another project's checkpoints."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .benchmark import evaluate
from .contract import DataInfo, TrainingData
from .data.feature_file import file_sha256
from .data.safe_pickle import RefusedError, Unpickler
from .data.store import Store
from .errors import InputError, blaming
from .isolation import isolated
from .jobs import Job, Plan, make_plan
from .plugins import Plugins
from .runs import Run, environment, load_run, require_fit, require_writable, write_run
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
    job = None
    if data is not None:
        job = _read_data(plan, data, text_encoder, data_root, path, found["dims"])
    elif not plan.dataset.generate and Store(data_root).files(dataset):
        try:
            job = _read_data(plan, None, text_encoder, data_root, path, found["dims"])
        except InputError as error:
            Watcher().note(f"the checkpoint is not tested on registered data: {error}")
    if job is None:
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


def _read_data(
    plan: Plan,
    data: str | Path | None,
    text_encoder: str | None,
    data_root: str | Path | None,
    path: Path,
    dims: Mapping[str, int],
) -> Job:
    """Return the job of a checkpoint and the data that it is tested on; raises InputError where they do not fit."""
    job = plan.read(data, text_encoder, Watcher(), data_root=data_root)
    if wrong := {name: width for name, width in dims.items() if job.info.dims.get(name) != width}:
        name = data or (job.file and job.file.name)
        raise InputError(f"{path} was trained on features of width {wrong}, {name} has {dict(job.info.dims)}")
    return job


class _Survey(Unpickler):
    """Reads the pickles of a checkpoint for what they ask of torch, and makes nothing of it.

    torch too loads weights only, but of any kind (tensors that lie nowhere, or point wherever they like), takes any
    object for a name, and unpacks whatever was packed.
    """

    _TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
    _STORAGES = ("Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double", "Bool")
    admitted = {  # noqa: RUF012
        "collections.OrderedDict": lambda *_: {},
        **{name: lambda *_: None for name in (*_TENSORS, *(f"torch.{kind}Storage" for kind in _STORAGES))},
    }

    def persistent_load(self, pid: Any) -> None:
        """See that a storage is called by text."""
        _, _, key, place, numel, *view = pid
        if not (isinstance(key, str) and isinstance(place, str) and isinstance(numel, int)) or any(view):
            raise pickle.UnpicklingError("not a storage")

    def load_build(self) -> None:
        self.stack.pop()  # the versions of modules, which a state dict carries

    def _fill(self, items: list[Any]) -> None:
        if not all(isinstance(key, str) for key in items[::2]):
            raise pickle.UnpicklingError("not a table of names")
        super()._fill(items)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _survey(path: Path) -> None:
    """See that a file asks torch for plain tensors only, and unpacks to no more than it is.

    Raises:
        pickle.UnpicklingError: it does not.
        Exception: it is damaged.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as torch decides
        file.seek(0)
        if not is_zip:  # a file of before torch 1.6: four pickles, and the storages' names
            for _ in range(5):
                _Survey(file, size).load()
            return
        with zipfile.ZipFile(file) as members:
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist())
            if packed or sum(member.file_size for member in members.infolist()) > size:
                raise pickle.UnpicklingError("a packed archive, as torch writes none")
            for member in members.infolist():
                if member.filename.endswith(".pkl"):
                    _Survey(io.BytesIO(members.read(member)), size).load()


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        _survey(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RefusedError) as error:  # torch's message is advice to load it all the same
        reason = "it holds more than weights, or is no file that torch.save wrote"
        raise InputError(f"{path} cannot be read as a checkpoint of weights: {reason}") from error
    except Exception as error:  # a damaged file can make any operation of the unpickler fail
        strange = "it is damaged, cut short, or no file that torch.save wrote"
        reason = (error.strerror if isinstance(error, OSError) else None) or strange
        raise InputError(f"{path} cannot be read as a checkpoint of weights: {reason}") from error
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named:
        raise InputError(f"{path} is not a state dict: it must hold named tensors and nothing else")
    for name, tensor in state.items():
        if not 0 < tensor.nbytes <= tensor.untyped_storage().nbytes():
            raise InputError(
                f"{path} is not a state dict: {name[:100]!r} is empty, or larger than what the file holds of it"
            )
    return state


def _write(job: Job, found: dict[str, Any], path: Path, runs: Path) -> Run:
    plan = job.plan
    try:
        require_fit(plan.spec, plan.config.model, job.info, found["model"])
        network = plan.spec.build(plan.config.model, job.info)
        labels = TrainingData({"M": torch.zeros(1)}, job.info)
        hooks = {
            hook.name: hook.build(plan.config.hooks[hook.name], labels, network.feature_dims) for hook in plan.hooks
        }
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

"""`run`: one model on one dataset, over seeds, from a feature file to a finished run folder.

result = registry.run("self_mm", "mosi", data="unaligned_50.pkl", seeds=[1111, 1112], config={"epochs": 20})
result.mean["MAE"], result.runs[0].folder
"""

from __future__ import annotations

import gc
import json
import operator
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from .contract import TrainingData, TrainingHook
from .data.batches import Split, predict
from .data.text_model import set_precision
from .errors import BenchmarkError, InputError, RunFailed, one_line
from .isolation import isolated
from .jobs import PRECISIONS, Job, Plan, make_plan
from .labels import generated_in_vain
from .metrics import regression
from .plugins import NAME
from .runs import environment, fault_of, finished, finite, load_run, require_no_strangers, require_writable, write_run
from .tracking import FOLDER as TRACKED
from .tracking import TensorBoard, require_tracker
from .training import Epoch, Watcher, text_sums, train
from .unfinished import Busy, Unfinished, claim

FAILED_LOG = ".failed.log"


@dataclass(frozen=True)
class SeedRun:
    """One seed: `status` "ok" or "failed" (with its `reason`), test metrics as fractions."""

    seed: int | None
    """None of a checkpoint that was imported"""
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

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that `run --json` prints."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "runs": [{**asdict(run), "folder": run.folder and str(run.folder)} for run in self.runs],
            "mean": self.mean,
            "std": self.std,
            "folder": str(self.folder),
        }

    def to_json(self) -> str:
        """Return them as JSON; a metric that is not defined is null."""
        return json.dumps(finite(self.as_dict()), indent=2, allow_nan=False)


def run(
    model: str,
    dataset: str = "demo",
    *,
    data: str | Path | None = None,
    data_root: str | Path | None = None,
    features: Mapping[str, str | Path] | None = None,
    text_encoder: str | None = None,
    seeds: Sequence[int] = (1111,),
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    config_file: str | Path | None = None,
    hooks: Sequence[str] = (),
    label_range: float | None = None,
    device: str = "auto",
    precision: str | None = None,
    graph: bool = True,
    deterministic: bool = False,
    runs: str | Path = "runs",
    plugins: Sequence[str] = (),
    force: bool = False,
    track: str | None = None,
    watcher: Watcher | None = None,
) -> Result:
    """Train and test a model, once for each seed; a finished run is found and not repeated.

    Args:
        model: a registered name, or `NAME+HOOK` to train it with a hook.
        dataset: a registered name; `"custom"` for any file in the same layout, with `label_range`.
        data: the feature file, or the name of one that is registered; by default the registered file that fits the
            model. The dataset `"demo"` needs none.
        data_root: the folder of registered files; `$MMSA_DATA` or the user's own by default.
        features: other files for `"text"`, `"audio"` or `"vision"`, joined to the data by the clips' ids.
        text_encoder: `"minilm"`, a hub name or a folder; the dataset's own by default.
        seeds: one run each.
        preset: published hyper-parameters to start from; the model's first by default.
        config: keys that override the preset and `config_file`.
        config_file: a JSON or TOML file of keys, or a run's `config.json`.
        hooks: hooks besides the model's own.
        label_range: labels lie in ± this.
        device: `"cpu"`, `"cuda"`, or `"auto"`.
        precision: `"fp32"`, `"tf32"` (matrix products, on a GPU), or `"bf16"` (a text encoder that is trained, with
            float32 weights); tf32 on a GPU, fp32 on a CPU by default.
        graph: on a GPU, record training steps as CUDA graphs where they can be; but for rounding and for what dropout
            draws, a result does not depend on it.
        deterministic: on a GPU, sum in one order, so that a seed gives the same to the last bit each time on one
            machine; slower. A CPU does so anyway.
        runs: the folder that holds run folders; nothing is written outside it.
        plugins: files or modules of plugins that are not packaged.
        force: train again where a finished run exists.
        track: `"tensorboard"` also writes event files, while it trains, below `RUNS/.tensorboard`.
        watcher: is told of progress; without one, what you should know is a Python warning.

    Returns:
        Every seed, also those that failed: by a loss that is not finite or by an exception of the model's.

    Raises:
        InputError: something given is wrong; nothing has been written.
    """
    seeds = checked_seeds(seeds)
    watcher = watcher or Watcher()
    if track is not None:
        require_tracker(track)
    plan = make_plan(
        model,
        dataset,
        preset=preset,
        config=config,
        config_file=config_file,
        hooks=hooks,
        label_range=label_range,
        plugins=plugins,
        data=data,
        data_root=data_root,
    )
    place = find_device(device)
    if deterministic and place.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch asks for, before its first product
    asked, precision = precision, checked_precision(precision, place, trains_text="text" in plan.needs)
    if asked not in (None, precision):
        watcher.note(f"{plan.name} trains no text encoder, for which {asked} is: it is trained in {precision}")
    if precision == "bf16" and place.type == "cpu" and _lacks_bf16():
        watcher.note("this processor has no bf16 arithmetic: --precision fp32 is faster on it")
    root = Path(os.path.expanduser(runs))
    if not (root / plan.name / plan.dataset.name).is_dir():  # else what is wanted may be there, and only read
        require_writable(root)
    job = plan.read(
        data,
        text_encoder,
        watcher,
        data_root=data_root,
        features=features,
        device=place,
        cache=root / ".cache",
        precision=precision,
    )
    place_of_config = Path(plan.name, plan.dataset.name, job.identity())
    folder = root / place_of_config
    if track is not None:
        watcher = TensorBoard(watcher, root / TRACKED / place_of_config, plan.config.as_dict())
    wanted = [folder / str(seed) for seed in seeds]
    faults = {target: fault_of(target) for target in wanted}
    require_no_strangers(target for target, fault in faults.items() if force or fault)
    done: list[SeedRun] = []
    busy: list[Busy] = []
    ways = _ways(_Way(graph, deterministic), plan)
    protocol = job.protocol()
    made_of = {"sources": dict(plan.sources), "selfmm-plugin": metadata.version("selfmm-plugin")}
    kept = [seed for seed, fault in zip(seeds, faults.values(), strict=True) if fault is None and not force]
    if kept:
        watcher.note(_kept_note(kept, folder, plan.sources))
    for target, fault in faults.items():
        if fault and target.exists() and not force:
            watcher.note(f"{target} is trained again: {fault}")
    for number, seed in enumerate(seeds, 1):
        target, log = folder / str(seed), failure_log(folder, seed)
        if force or not finished(target):
            history: list[Epoch] = []
            try:
                with claim(target, made_of, again=force) as unfinished:
                    if force or not finished(target):  # perhaps by another process, meanwhile
                        of = f"{number} of {len(seeds)}"
                        while not _train_seed(job, seed, place, target, watcher, of, history, ways, unfinished):
                            del ways[0]
                            history.clear()
                            gc.collect()  # the model, and its recorded steps
                    unfinished.discard()
            except (Exception, SystemExit) as error:  # the model's, mostly; other seeds may do better
                if isinstance(error, InputError) and not isinstance(error, Busy) and not done and not history:
                    raise
                reason = reason_of(error)
                if isinstance(error, Busy):
                    busy.append(error)
                else:
                    _write_failure(log, [" ".join(reason.split()), *map(str, history)], error)
                watcher.failed(seed, f"{reason} (more in {log})" if log.exists() else reason)
                done.append(SeedRun(seed, "failed", reason, None, {}, None))
                continue
        with suppress(OSError):
            log.unlink()
        saved = load_run(target)
        watcher.finished(seed, saved)
        if saved.best_epoch is not None and saved.best_epoch == plan.config.model.epochs:
            best = f"its best epoch, {saved.best_epoch}, is the last one allowed: more epochs may do better"
            watcher.note(f"{plan.name}, seed {seed}: {best}")
        if generated_in_vain(saved):
            watcher.note(
                f"{plan.name}, seed {seed}: its best epoch, {saved.best_epoch}, had seen human labels only; "
                "no generated one had moved before it"
            )
        done.append(SeedRun(seed, "ok", None, saved.best_epoch, saved.metrics, saved.folder))
        protocol = saved.summary.get("protocol", protocol)
    if len(busy) == len(seeds):
        raise busy[0]
    return Result(plan.name, plan.dataset.name, done, folder, protocol)


def _kept_note(seeds: Sequence[int], folder: Path, sources: Mapping[str, str]) -> str:
    """Return what to say of seeds that are finished already."""
    before = [load_run(folder / str(seed)).environment.get("sources") or {} for seed in seeds]
    stale = ", ".join(part for part, source in sources.items() if any(b.get(part) != source for b in before))
    changed = f"; the source of {stale} has changed since" if stale else ""
    named = f"seeds {', '.join(map(str, seeds))} are" if len(seeds) > 1 else f"seed {seeds[0]} is"
    return f"{named} finished already in {folder}{changed}"


def failure_log(folder: Path, seed: int | None) -> Path:
    """Return where a seed that failed leaves its reason, the first line, its epochs, and where in the code it was."""
    return folder / f"{seed}{FAILED_LOG}"


def reason_of(error: BaseException) -> str:
    """Return why a training failed, as one line."""
    if isinstance(error, SystemExit):
        return f"the model left Python with sys.exit({error.code!r})"
    return str(error) if isinstance(error, BenchmarkError) else one_line(error)


def _write_failure(log: Path, lines: Sequence[str], error: BaseException) -> None:
    said_all = isinstance(error, BenchmarkError) and error.__cause__ is None
    where = "" if said_all else "".join(traceback.format_exception(error))
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(f"{line}\n" for line in lines) + where, "utf-8", errors="replace")


def find_device(name: str) -> torch.device:
    """Return the device of `"cpu"`, `"cuda"` or `"auto"`; raises InputError where it is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or auto, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device that torch can use; pass --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def checked_precision(name: str | None, device: torch.device, *, trains_text: bool = True) -> str:
    """Return the precision by name, or the device's default, also of a model that trains no text encoder in bf16.

    Raises:
        InputError: there is none such.
    """
    if name is not None and name not in PRECISIONS:
        raise InputError(f"--precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name == "tf32" and device.type != "cuda":
        raise InputError("--precision tf32 is a GPU's: pass fp32 or bf16")
    if name is None or (name == "bf16" and not trains_text):
        return "tf32" if device.type == "cuda" else "fp32"
    return name


def _lacks_bf16() -> bool:
    """Whether this processor has to imitate bf16, as far as Linux tells."""
    try:
        return not {"avx512_bf16", "amx_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def checked_seeds(seeds: Sequence[int]) -> list[int]:
    """Return seeds as numbers; raises InputError where they are none, or one stands twice."""
    try:
        checked = [operator.index(seed) for seed in seeds]
    except TypeError:
        checked = []
    if not checked or len(set(checked)) != len(checked) or not all(0 <= seed < 2**32 for seed in checked):
        raise InputError(f"seeds must be whole numbers from 0 to 2³²−1, at least one and each once, got {seeds}")
    return checked


@dataclass(frozen=True)
class _Way:
    """How seeds are trained: with recorded steps or not, and an update's micro-batches at once or one by one."""

    graph: bool
    deterministic: bool
    at_once: bool = True
    name: str = ""


def _ways(wanted: _Way, plan: Plan) -> list[_Way]:
    """Return the way that is wanted, and those that take less of a GPU's memory, and more time."""
    ways, config = [wanted], plan.config.model
    if wanted.graph:
        ways.append(replace(wanted, graph=False, name="without recorded steps"))
    if plan.spec.per_sample and config.update_epochs > 1 and config.clip_value is None:
        name = "without recorded steps, one micro-batch at a time"
        ways.append(replace(wanted, graph=False, at_once=False, name=name))
    return ways


def _train_seed(
    job: Job,
    seed: int,
    device: torch.device,
    folder: Path,
    watcher: Watcher,
    number: str,
    history: list[Epoch],
    ways: Sequence[_Way],
    unfinished: Unfinished,
) -> bool:
    """Train one seed in the first of the ways and write its folder; False where the GPU's memory ran out.

    Raises:
        RunFailed: it ran out, and there is no further way.
    """
    assert job.file is not None
    way = ways[0]
    started, plan = datetime.now(timezone.utc), job.plan
    with isolated(seed, device, job.precision, deterministic=way.deterministic):
        splits = {name: job.split(name, device) for name in job.file.splits}
        model, hooks = build(job, splits["train"], device)
        set_precision(model, job.precision)
        before = text_sums(model)
        watcher.start(seed, number, plan.config.model)
        try:
            outcome = train(
                model,
                hooks,
                plan.config.model,
                splits,
                per_sample=plan.spec.per_sample and way.at_once,
                generator=torch.Generator().manual_seed(seed),
                watcher=watcher,
                history=history,
                graph=way.graph,
                unfinished=unfinished,
            )
        except torch.OutOfMemoryError as error:
            if len(ways) == 1:
                size = f"one micro-batch of batch_size={plan.config.model.batch_size} at a time"
                hint = f"make it smaller, and update_epochs larger, or free the GPU ({one_line(error)})"
                raise RunFailed(f"the GPU's memory is too small for {size}: {hint}") from error
            slower = f"it and the seeds after it are trained {ways[1].name}"
            watcher.note(f"{plan.name}, seed {seed}: the GPU's memory ran out; {slower}")
            return False
        except KeyboardInterrupt:
            kept = f"epochs 1 to {unfinished.epoch} are" if unfinished.epoch else "no epoch is"
            watcher.note(f"seed {seed} was interrupted: {kept} kept")
            raise
        metrics, predictions = evaluate(model, job, splits["test"])
        tables = _artifacts(hooks, job.file.splits["train"].ids)
    said = [outcome.steps] if outcome.steps else []
    if way.name:
        said.append(f"trained {way.name}: the GPU's memory had run out")
    if unfinished.resumed:
        said.append(f"taken up after epoch {unfinished.resumed}, where it had been interrupted")
    summary = {
        "metrics": metrics,
        "best_epoch": outcome.best_epoch,
        "valid_mae": outcome.history[outcome.best_epoch - 1].valid_mae,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "protocol": job.protocol(tuned=not text_sums(model).equal(before)),
        "artifacts": list(tables),
    }
    tables["predictions"] = predictions
    tables["history"] = pd.DataFrame([vars(record) for record in outcome.history])
    write_run(
        folder,
        settings={**job.settings(), "seed": seed, "preset": plan.config.preset},
        summary=summary,
        environment={**environment(device, job, started), "taken_up_after_epoch": unfinished.resumed or None},
        tables=tables,
        modules={
            "model": model,
            **{f"hook.{name}": hook for name, hook in hooks.items()},
            **({"scale": job.scale} if job.scale else {}),
        },
        log=[*job.notes, *map(str, outcome.history), *said],
    )
    return True


def build(job: Job, train_split: Split, device: torch.device) -> tuple[nn.Module, dict[str, TrainingHook]]:
    """Return a job's model and hooks, ready for `train`."""
    plan = job.plan
    # Copies: model and hooks may do with them what they like.
    model = plan.spec.build(plan.config.model, replace(job.info)).to(device)
    copies = {task: values.clone() for task, values in train_split.labels.items()}
    labels = TrainingData(copies, replace(job.info))
    hooks: dict[str, TrainingHook] = {
        hook.name: hook.build(plan.config.hooks[hook.name], labels, model.feature_dims).to(device)
        for hook in plan.hooks
    }
    return model, hooks


def evaluate(model: nn.Module, job: Job, split: Split) -> tuple[dict[str, float], pd.DataFrame]:
    """Return the metrics of a model on the test split, and `id`, `label` and `prediction` of every clip.

    Raises:
        RunFailed: a prediction is not finite.
    """
    assert job.file is not None
    test = job.file.splits["test"]
    predictions = predict(model, split).cpu().numpy()
    if not np.isfinite(predictions).all():
        raise RunFailed("predictions on the test split are not finite")
    table = pd.DataFrame({"id": test.ids, "label": test.labels["M"], "prediction": predictions})
    return regression(predictions, test.labels["M"], job.plan.metrics), table


def _artifacts(hooks: Mapping[str, TrainingHook], train_ids: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Return the hooks' tables, with the clips' ids in place of train rows."""
    tables: dict[str, pd.DataFrame] = {}
    for hook in hooks.values():
        for name, columns in hook.artifacts().items():
            table = pd.DataFrame(columns)
            if table.empty:  # a file without a row could not be read again
                continue
            if "index" in table:
                table["index"] = np.array(train_ids, dtype=object)[table["index"]]
                table = table.rename(columns={"index": "id"})
            if not re.fullmatch(NAME, name) or name in {*tables, "predictions", "history"}:
                raise RunFailed(f"a hook's table cannot be called {name!r}")
            tables[name] = table
    return tables

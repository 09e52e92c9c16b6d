"""Our Self-MM through what its users call: `registry.run` and the command `benchmark`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import registry
from registry import training
from registry.graphs import Recorder
from selfmm_plugin import UnimodalLabelGenerator
from selfmm_plugin.ulgm import LABEL

from .kernels import Profiler
from .machine import synchronise

METRICS = ("MAE", "Corr", "Has0_acc_2", "Non0_acc_2", "Mult_acc_5", "Mult_acc_7")
PARTS = {"fusion": "fusion", "text": "text", "audio": "audio", "vision": "video"}
"""Our names of the tasks, and those in upstream's keys."""
BENCHMARK = [sys.executable, "-c", "from registry.cli import main; main()"]
REPEATS = 50


def preset(dataset: str) -> dict[str, Any]:
    """Return upstream's published hyper-parameters, under its names but for `exclude_zero` and `tail`."""
    return json.loads((files("selfmm_plugin") / "presets/mmsa.json").read_text("utf-8"))[dataset]


def train(
    dataset: str,
    data: Path,
    encoder: str,
    device: str,
    runs: Path,
    *,
    seed: int,
    epochs: int | None,
    profiled: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train ours and return the same figures as of upstream.

    Args:
        dataset, data, encoder, device, runs, seed: as for `registry.run`.
        epochs: most epochs; early stopping alone if None.
        profiled: whether to train all epochs, and one more that is profiled and whose seconds are left out.
        options: more arguments of `registry.run`.
    """
    config: dict[str, Any] = {"epochs": epochs}
    watcher = None
    if profiled:
        assert epochs is not None
        config = {"epochs": epochs + 1, "early_stop": epochs + 1}
        watcher = Profiler(epochs + 1, device)
    named = {"data": data, "text_encoder": encoder, "device": device, "runs": runs, "force": True, **options}
    result = registry.run("self_mm", dataset, seeds=[seed], config=config, watcher=watcher, **named)
    done = result.runs[0]
    if done.folder is None:
        raise SystemExit(f"seed {seed} failed: {done.reason}")
    run = registry.load_run(done.folder)
    history = run.history[: epochs if profiled else None]
    return {
        "seed": seed,
        "valid_mae": run.summary["valid_mae"],
        "best_epoch": run.best_epoch,
        "epochs": len(history),
        "test": {name: run.metrics[name] for name in METRICS},
        "train_seconds": history["train_seconds"].tolist(),
        "valid_seconds": history["valid_seconds"].tolist(),
        "precision": run.settings["precision"],
        "profile": watcher.figures if watcher else None,
    }


def ulgm_milliseconds(settings: Mapping[str, Any], labels: np.ndarray, device: str) -> float:
    """Return how long ULGM's own work in one update takes: loss weights, moved labels, stored features, new centres.

    On a GPU it is recorded as a CUDA graph and replayed, as part of a step is. The heads' forward and backward pass is
    not in it: a multi-task model without generated labels has it too.

    Args:
        settings: a preset of `self_mm`.
        labels: (N) of the train split.
        device: `"cpu"` or `"cuda"`.
    """
    dims = {task: settings[f"post_{part}_dim"] for task, part in PARTS.items()}
    generator = UnimodalLabelGenerator(torch.from_numpy(labels), dims, label_range=3.0).to(device)
    features = {task: torch.randn(len(labels), width, device=device) for task, width in dims.items()}
    generator.update(features, torch.arange(len(labels), device=device), 1)
    drawn = torch.randperm(len(labels), device=device)[: settings["batch_size"] * settings["update_epochs"]]
    micro_batches = [
        (rows, {task: values[rows] for task, values in features.items()})
        for rows in drawn.split(settings["batch_size"])
    ]

    def work() -> None:
        for rows, _ in micro_batches:
            generator.weights(rows)
        for rows, of_rows in micro_batches:
            generator.update(of_rows, rows, 2)

    return _milliseconds(_recorded(work) if device == "cuda" else work, device)


def steps_with_and_without_ulgm(precision: str, *given: Any) -> tuple[float, float]:
    """Return the milliseconds of a recorded step, the mean over shapes, and of one in which no label is generated.

    The difference is what ULGM costs where it runs beside the update of the weights. A GPU's only.

    Args:
        precision: of both.
        given: `dataset` to `runs` of `train`.
    """
    options: dict[str, Any] = {"seed": 1, "epochs": 2, "precision": precision}
    with patch.object(training, "Recorder", _Kept), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of the data means nothing here
        train(*given, **options)
        with (
            patch.object(UnimodalLabelGenerator, "update", lambda *_: None),
            patch.object(UnimodalLabelGenerator, "targets", _fixed),
        ):
            train(*given, **options)
    steps = [recorder._graphs for recorder in _Kept.made]
    found = [{key: _milliseconds(step._graph.replay, "cuda") for key, step in of.items()} for of in steps]
    common = [key for key in found[0].keys() & found[1].keys() if key[0][1]]  # those with an update
    one, other = (mean(of[key] for key in common) for of in found)
    return one, other


class _Kept(Recorder):
    """A recorder that is kept, with the tensors of its steps."""

    made: ClassVar[list[_Kept]] = []

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.made.append(self)


def _fixed(generator: UnimodalLabelGenerator, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels as they stand, each of which counts."""
    labels = generator.clips[index][..., LABEL]
    return labels, torch.ones_like(labels)


def _recorded(work: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of some work."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once must not be made while recording
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _milliseconds(work: Callable[[], None], device: str) -> float:
    for _ in range(3):
        work()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / REPEATS * 1e3


def seeds_to_table(
    dataset: str, data: Path, encoder: str, device: str, runs: Path, *, epochs: int, more: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the seconds from a shell's `benchmark run` of five seeds to the printed table, and the table.

    Every seed trains all epochs: of noise the best epoch is an early one, and stopping would flatter.
    """
    arguments = ["run", "--model", "self_mm", "--dataset", dataset, "--data", str(data), "--text-encoder", encoder]
    arguments += ["--seeds", "1111-1115", "--epochs", str(epochs), "--set", f"early_stop={epochs}"]
    arguments += ["--device", device, "--runs", str(runs), *more]
    start = time.perf_counter()
    done = subprocess.run([*BENCHMARK, *arguments], capture_output=True, text=True, encoding="utf-8")
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"benchmark run failed: {done.stderr.strip()}")
    return {"command": " ".join(["benchmark", *arguments]), "seconds": seconds, "printed": done.stdout}

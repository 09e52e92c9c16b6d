"""The one training loop: every model, with any hooks, is trained by `train`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from .contract import Batch, FusionOutput, Rates, Training, TrainingHook
from .data.batches import Group, Split, forward, groups, output_of, predict
from .data.text_model import TextModel
from .errors import RunFailed
from .graphs import Recorder, changed
from .unfinished import Parts, Unfinished, unkept_state

if TYPE_CHECKING:
    from .runs import Run

BETTER_BY = 1e-6
"""A validation MAE must fall by this much to count as better (upstream's threshold)."""


@dataclass(frozen=True)
class Epoch:
    """One row of a run's history; MAE in label units, time in seconds."""

    epoch: int
    train_loss: float
    valid_mae: float
    best: bool
    train_seconds: float
    valid_seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:3d}  train loss {self.train_loss:.4f}  validation MAE {self.valid_mae:.4f}"
            f"{' (best)' if self.best else ''}  "
            f"training {self.train_seconds:.1f} s, validation {self.valid_seconds:.1f} s"
        )


class Watcher:
    """What a run tells while it goes on; by default it warns of what the user should know, and is silent else."""

    def note(self, text: str) -> None:
        """Something about the data or the settings that the user should know."""
        _warn(text)

    def failed(self, seed: int, reason: str) -> None:
        """A seed has no result."""
        _warn(f"seed {seed} failed: {reason}")

    def start(self, seed: int, number: str, config: Training) -> None:
        """A seed starts training; `number` is as `2 of 5`."""

    def resume(self, history: Sequence[Epoch]) -> None:
        """It goes on after these epochs, of a training that was interrupted."""

    def step(self, epoch: int, step: int, steps: int) -> None:
        """A group of an epoch is done; all count from 1."""

    def epoch(self, record: Epoch) -> None:
        """An epoch is trained and validated."""

    def finished(self, seed: int, run: Run) -> None:
        """A seed has its result, now or from an earlier call."""

    def beside(self, name: str) -> Watcher:
        """Return what is told of one of several models that are trained at once, in another thread."""
        return self

    def end(self) -> None:
        """The last seed of one of several models is done."""


class Relay(Watcher):
    """Passes everything on to another watcher: a base for those that only look on, or change some of it."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def note(self, text: str) -> None:
        self._watcher.note(text)

    def failed(self, seed: int, reason: str) -> None:
        self._watcher.failed(seed, reason)

    def start(self, seed: int, number: str, config: Training) -> None:
        self._watcher.start(seed, number, config)

    def resume(self, history: Sequence[Epoch]) -> None:
        self._watcher.resume(history)

    def step(self, epoch: int, step: int, steps: int) -> None:
        self._watcher.step(epoch, step, steps)

    def epoch(self, record: Epoch) -> None:
        self._watcher.epoch(record)

    def finished(self, seed: int, run: Run) -> None:
        self._watcher.finished(seed, run)

    def beside(self, name: str) -> Watcher:
        return self._watcher.beside(name)

    def end(self) -> None:
        self._watcher.end()


def _warn(text: str) -> None:
    """Warn each time, not once a process, and without a line of this source."""
    warnings.warn_explicit(text, UserWarning, "registry", 0)


@dataclass
class Outcome:
    """A finished training: the model and the hooks hold the best epoch's weights."""

    best_epoch: int
    history: list[Epoch]
    steps: str = ""
    """on a GPU: whether steps were recorded"""


def make_optimizer(model: nn.Module, hooks: Sequence[TrainingHook], config: Any) -> torch.optim.Adam:
    """Adam with coupled L2 over the model's groups; the hooks' parameters join the last group."""
    grouped = getattr(model, "parameter_groups", None)
    if callable(grouped):
        param_groups = [dict(group) for group in grouped(config)]
    else:
        rates = {key: getattr(config, key, field.default) for key, field in Rates.model_fields.items()}
        pretrained = _text_parameters(model)
        others = [parameter for parameter in model.parameters() if parameter not in pretrained]
        param_groups = [
            {"params": list(pretrained), "lr": rates["learning_rate_bert"], "weight_decay": rates["weight_decay"]},
            {"params": others, "lr": rates["learning_rate"], "weight_decay": rates["weight_decay"]},
        ]
    param_groups[-1]["params"] = [*param_groups[-1]["params"], *(p for hook in hooks for p in hook.parameters())]
    for group in param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    on_gpu = any(parameter.is_cuda for group in param_groups for parameter in group["params"])
    return torch.optim.Adam([group for group in param_groups if group["params"]], fused=True, capturable=on_gpu)


def _text_parameters(model: nn.Module) -> dict[nn.Parameter, None]:
    """Return the parameters of a model's text encoders, in their order."""
    encoders = [module for module in model.modules() if isinstance(module, TextModel)]
    return {parameter: None for encoder in encoders for parameter in encoder.parameters()}


def text_sums(model: nn.Module) -> Tensor:
    """Return the sum of each tensor of a model's text encoders: training has moved them where the sums differ."""
    sums = [parameter.detach().double().sum() for parameter in _text_parameters(model)]
    return torch.stack(sums) if sums else torch.empty(0)


def train(
    model: nn.Module,
    hooks: Mapping[str, TrainingHook],
    config: Training,
    splits: Mapping[str, Split],
    *,
    per_sample: bool,
    generator: torch.Generator,
    watcher: Watcher | None = None,
    history: list[Epoch] | None = None,
    graph: bool = True,
    unfinished: Unfinished | None = None,
) -> Outcome:
    """Train until the validation MAE has not improved for `config.early_stop` epochs, and keep the best weights.

    Args:
        model, hooks: on the device of the splits.
        config: the model's config, which has the fields of `Training`.
        splits: "train" and "valid".
        per_sample: whether a group may run as one forward.
        generator: shuffles the train split.
        watcher: is told of steps and epochs.
        history: gets every epoch, for a training that may end by an exception.
        graph: whether steps on a GPU are recorded as CUDA graphs where they can be.
        unfinished: keeps the training at the ends of epochs; one that it has kept is taken up.

    Raises:
        RunFailed: a loss or the validation MAE is not finite.
    """
    watcher = watcher or Watcher()
    optimizer = make_optimizer(model, list(hooks.values()), config)
    scheduler = None
    if config.scheduler == "plateau":
        patience = config.early_stop // 2 if config.scheduler_patience is None else config.scheduler_patience
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.scheduler_factor, patience=patience
        )
    truth = splits["valid"].labels["M"]
    recorder = _make_recorder(model, hooks, optimizer, truth.device) if graph else None
    step_of_group = _Step(model, list(hooks.values()), config, splits["train"], optimizer, per_sample, recorder)
    counted = torch.zeros((), dtype=torch.long, device=truth.device)
    outcome = Outcome(0, [] if history is None else history)
    best_mae, best_weights = math.inf, {}
    modules = {"model": model, **{f"hook.{name}": hook for name, hook in hooks.items()}}
    parts = Parts(modules, optimizer, scheduler, generator, truth.device)
    if unfinished is not None and (kept := unfinished.restore(parts)):
        outcome.history += [Epoch(**row) for row in kept.history]
        outcome.best_epoch, best_weights = kept.best_epoch, kept.best_weights
        best_mae = outcome.history[kept.best_epoch - 1].valid_mae
        watcher.resume(outcome.history)
    elif unfinished is not None and unfinished.refused:
        watcher.note(f"it is trained from the start, not from where it was interrupted: {unfinished.refused}")
    plain_state = unkept_state(modules) if unfinished is not None else {}
    epoch = len(outcome.history)
    while epoch < (config.epochs or math.inf) and epoch - outcome.best_epoch < config.early_stop:
        epoch += 1
        started = time.perf_counter()
        for module in modules.values():
            module.train()
        epoch_groups = list(
            groups(len(splits["train"]), config.batch_size, config.update_epochs, config.tail, generator)
        )
        total = torch.zeros((), device=truth.device)
        counted.fill_(epoch)
        if recorder is not None:
            recorder.begin_epoch()
        for number, group in enumerate(epoch_groups, 1):
            total += step_of_group(group, epoch if recorder is None or recorder.fault else counted)
            watcher.step(epoch, number, len(epoch_groups))
        for hook in hooks.values():
            hook.end_epoch(epoch)
        train_loss = float(total) / sum(len(group.micro_batches) for group in epoch_groups)
        trained = time.perf_counter()
        valid_mae = float((predict(model, splits["valid"]) - truth).abs().double().mean())
        if not (math.isfinite(train_loss) and math.isfinite(valid_mae)):
            if unfinished is not None:
                unfinished.discard()  # it would come to the same
            raise RunFailed(f"epoch {epoch} ended with train loss {train_loss} and validation MAE {valid_mae}")
        if scheduler is not None:
            scheduler.step(valid_mae)
        better = valid_mae <= best_mae - BETTER_BY
        if better:
            best_mae, outcome.best_epoch = valid_mae, epoch
            best_weights = {name: _copy(module.state_dict()) for name, module in modules.items()}
        validated = time.perf_counter()
        record = Epoch(epoch, train_loss, valid_mae, better, trained - started, validated - trained)
        outcome.history.append(record)
        watcher.epoch(record)
        if unfinished is not None and unfinished.due(parts):
            if change := changed(plain_state, unkept_state(modules)):
                unfinished.fault = f"training {change}, which no progress_state tells"
            else:
                unfinished.keep(parts, list(map(vars, outcome.history)), outcome.best_epoch, best_weights)
            if unfinished.fault:
                watcher.note(f"an interruption would lose this seed's epochs: {unfinished.fault}")
    for name, module in modules.items():
        module.load_state_dict(best_weights[name])
    outcome.steps = "" if recorder is None else str(recorder)
    return outcome


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@dataclass
class _Step:
    """One group: forward, loss, backward, hooks, update. Returns the sum of the micro-batches' losses."""

    model: nn.Module
    hooks: list[TrainingHook]
    config: Training
    split: Split
    optimizer: torch.optim.Optimizer
    per_sample: bool
    recorder: Recorder | None = None

    def __call__(self, group: Group, epoch: int | Tensor) -> Tensor:
        rows = torch.cat(list(group.micro_batches))
        if self.recorder is None or self.recorder.fault:
            whole = self.split.batch(rows) if self._at_once and not self._in_chunks() else None
            return self._update(group, whole, epoch)
        whole = self.split.batch(rows, self.split.sizes(rows, rounded=True))
        rates = tuple(of_group["lr"] for of_group in self.optimizer.param_groups)
        key = (tuple(map(len, group.micro_batches)), group.step, rates)
        return self.recorder(lambda batch: self._update(group, batch, epoch), whole, key)

    @property
    def _at_once(self) -> bool:
        """Whether a group is one forward; clipping comes after each micro-batch, as upstream has it."""
        return self.per_sample and self.config.clip_value is None

    def _in_chunks(self) -> bool:
        """Whether a group that is one forward is better computed in chunks of like length.

        A CPU is bound by arithmetic, so what is computed of padding costs; a GPU by launches, so chunks would.
        """
        return self.split.device.type == "cpu" and not any(
            isinstance(module, TextModel) and module.can_pack for module in self.model.modules()
        )

    def _update(self, group: Group, whole: Batch | None, epoch: int | Tensor) -> Tensor:
        """Do one group, given as one batch; read from the split, in the shapes that suit it best, if that is None."""
        self.optimizer.zero_grad()
        parts = [slice(*ends) for ends in pairwise([0, *accumulate(map(len, group.micro_batches))])]
        batches = self._batches(group, whole, parts)
        with torch.set_grad_enabled(group.step):
            if not self._at_once:
                return self._one_by_one(batches, epoch)
            if whole is not None:
                output = output_of(self.model, whole)
            else:
                rows = torch.cat(list(group.micro_batches))
                output = forward(self.model, self.split, rows, self.config.batch_size)
            return self._of_whole(output, parts, batches, epoch)

    def _batches(self, group: Group, whole: Batch | None, parts: list[slice]) -> Iterator[Batch]:
        """Yield the micro-batches, each when it is wanted."""
        for part, rows in zip(parts, group.micro_batches, strict=True):
            yield self.split.batch(rows) if whole is None else whole[part]

    def _of_whole(
        self, output: FusionOutput, parts: Sequence[slice], batches: Iterable[Batch], epoch: int | Tensor
    ) -> Tensor:
        """Parameters do not move inside a group, so one forward gives each micro-batch the gradient it would have."""
        if output.losses:
            raise ValueError("a model with per_sample=True returns batch-level losses, which are of no micro-batch")
        seen = [(output[part], batch) for part, batch in zip(parts, batches, strict=True)]
        total = torch.stack([self._loss(*pair) for pair in seen]).sum()
        if torch.is_grad_enabled():
            total.backward()
        with self._beside_update():
            for part, batch in seen:
                self._observe(part, batch, epoch)
        return total.detach()

    def _one_by_one(self, batches: Iterable[Batch], epoch: int | Tensor) -> Tensor:
        losses = []
        for batch in batches:
            output = output_of(self.model, batch)
            loss = self._loss(output, batch)
            if torch.is_grad_enabled():
                loss.backward()
                self._clip()
            self._observe(output, batch, epoch)
            losses.append(loss.detach())
        with self._beside_update():
            return torch.stack(losses).sum()

    @contextmanager
    def _beside_update(self) -> Iterator[None]:
        """Update the parameters, if a gradient was wanted; in a recorded step on a branch beside what is done here."""
        if not torch.is_grad_enabled():
            yield
        elif self.split.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            here, branch = torch.cuda.current_stream(), _branch(torch.cuda.current_device())
            branch.wait_stream(here)
            with torch.cuda.stream(branch):
                self.optimizer.step()
            yield
            here.wait_stream(branch)
        else:
            yield
            self.optimizer.step()

    def _clip(self) -> None:
        if self.config.clip_value is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_value_(parameters, self.config.clip_value)

    def _loss(self, output: FusionOutput, batch: Batch) -> Tensor:
        criterion = l1_loss if self.config.criterion == "l1" else mse_loss
        losses = [*output.losses.values(), *(hook.loss(output, batch) for hook in self.hooks)]
        if not all(isinstance(loss, Tensor) and loss.dim() == 0 for loss in losses):
            raise RunFailed("a loss of the model or of a hook is not a scalar tensor")
        return criterion(output.prediction, batch.labels["M"]) + sum(losses)

    def _observe(self, output: FusionOutput, batch: Batch, epoch: int | Tensor) -> None:
        for hook in self.hooks:
            hook.observe(output, batch, epoch)


@cache
def _branch(device: int) -> torch.cuda.Stream:
    """Return a GPU's stream, always the same: memory that is freed on a stream is given out again on that one only."""
    return torch.cuda.Stream(device)


def _make_recorder(
    model: nn.Module, hooks: Mapping[str, TrainingHook], optimizer: torch.optim.Optimizer, device: torch.device
) -> Recorder | None:
    """Return what records steps, None where there is no GPU."""
    if device.type != "cuda":
        return None
    recorder = Recorder([model], list(hooks.values()), optimizer.zero_grad)
    if unable := [name for name, hook in hooks.items() if not hook.capturable]:
        recorder.fault = f"the hook {unable[0]} does not promise that it can be"
    return recorder

"""Do both do the same work? The losses of the first updates of upstream's trainer and of ours, side by side.

Both start from the same weights, see the same clips in the same order, without dropout and in float32. The clips are
those of one update, so that an epoch is one update: with the second, generated labels move, and enter the losses.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from MMSA.data_loader import MMDataLoader
from MMSA.models import AMIO
from MMSA.trains.multiTask.SELF_MM import SELF_MM
from torch import nn
from torch.utils.data import DataLoader

from registry import TrainingData
from registry.isolation import isolated
from registry.jobs import make_plan
from registry.training import train
from selfmm_plugin.upstream import translate

from . import upstream
from .kernels import Silent
from .measure import Different
from .ours import preset
from .shapes import Shape, make_features, write_features

UPDATES = 3
TOLERANCE = 1e-3
"""Relative. On a CPU they are up to 1.5e-5 apart, where Adam's first steps and ULGM's quotients amplify rounding."""
SEED = 0


def compare(shape: Shape, encoder: str, device: str, folder: Path) -> list[tuple[float, float]]:
    """Return upstream's and our loss of the first updates.

    Raises:
        Different: they differ by more than `TOLERANCE`.
    """
    settings = preset(shape.dataset)
    one_update = settings["batch_size"] * settings["update_epochs"]
    content = make_features(shape.of_sizes(train=one_update, valid=4, test=4), SEED)
    data = write_features(content, folder / "one_update.pkl")
    with isolated(SEED, torch.device(device)):  # float32 proper, also on a GPU
        theirs, weights = _upstream(shape.dataset, data, encoder, device)
        ours = _ours(shape.dataset, data, encoder, device, weights)
    pairs = list(zip(theirs, ours, strict=True))
    if not all(abs(a - b) <= TOLERANCE * abs(a) for a, b in pairs):  # also where one is not a number
        listed = ", ".join(f"{a:.6f} and {b:.6f}" for a, b in pairs)
        raise Different(
            f"upstream and ours do not do the same work: their losses of the first {UPDATES} updates, from the same "
            f"weights and on the same clips, are {listed}, which is more than {TOLERANCE:g} apart; nothing was timed"
        )
    return pairs


def without_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, attention's too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


class _SameOrder:
    """A sampler that draws as `registry.training` does; the first pass only reads the labels."""

    def __init__(self, clips: int) -> None:
        self.clips, self.passes, self.generator = clips, 0, torch.Generator().manual_seed(SEED)

    def __len__(self) -> int:
        return self.clips

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        drawn = torch.arange(self.clips) if self.passes == 1 else torch.randperm(self.clips, generator=self.generator)
        return iter(drawn.tolist())


class _Losses(SELF_MM):
    """Upstream's trainer, which writes its losses down, and stops as nothing gets better."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.parts: list[list[float]] = [[]]

    def weighted_loss(self, *positional: Any, **named: Any) -> torch.Tensor:
        loss = super().weighted_loss(*positional, **named)
        self.parts[-1].append(float(loss.detach()))
        return loss

    def do_test(self, *_: Any, **__: Any) -> dict[str, float]:
        self.parts.append([])
        return {"Loss": float("inf")}


def _upstream(dataset: str, data: Path, encoder: str, device: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses, means over an update's micro-batches, and the weights before the first update."""
    args = upstream.arguments(dataset, data, encoder, device, early_stop=UPDATES)
    with redirect_stderr(io.StringIO()):
        loaders = MMDataLoader(args, 0)
        clips = loaders["train"].dataset
        args.train_samples = len(clips)
        loaders["train"] = DataLoader(clips, batch_size=args.batch_size, sampler=_SameOrder(len(clips)))
        model = AMIO(args).to(args.device)
        without_dropout(model)
        weights = {name: values.detach().clone() for name, values in model.state_dict().items()}
        trainer = _Losses(args)
        trainer.do_train(model, loaders)
    return [sum(parts) / args.update_epochs for parts in trainer.parts[:UPDATES]], weights


def _ours(dataset: str, data: Path, encoder: str, device: str, weights: dict[str, torch.Tensor]) -> list[float]:
    plan = make_plan("self_mm", dataset, config={"epochs": UPDATES, "early_stop": UPDATES})
    job = plan.read(data, encoder, Silent())
    place = torch.device(device)
    splits = {name: job.split(name, place) for name in ("train", "valid")}
    model = plan.spec.build(plan.config.model, job.info).to(place)
    labels = TrainingData(splits["train"].labels, job.info)
    hooks: dict[str, Any] = {
        hook.name: hook.build(plan.config.hooks[hook.name], labels, model.feature_dims).to(place) for hook in plan.hooks
    }
    start = translate(weights)
    model.load_state_dict(start.network)
    hooks["ulgm"].supervision.heads.load_state_dict(start.heads)
    for module in (model, *hooks.values()):
        without_dropout(module)
    generator = torch.Generator().manual_seed(SEED)
    options: dict[str, Any] = {"per_sample": plan.spec.per_sample, "generator": generator, "watcher": Silent()}
    outcome = train(model, hooks, plan.config.model, splits, **options)
    return [epoch.train_loss for epoch in outcome.history]

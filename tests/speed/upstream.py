"""Upstream's SELF_MM (the package MMSA): its loaders, model, trainer and metrics are its own, and so are its settings.

What is added are marks: when an epoch's training begins, when its validation begins, and when both are done.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from MMSA.data_loader import MMDataLoader
from MMSA.models import AMIO
from MMSA.trains.multiTask.SELF_MM import SELF_MM
from MMSA.utils import setup_seed

from registry.data.text import find_text_encoder

from .machine import synchronise
from .ours import METRICS, preset

_NOT_ITS_KEYS = ("tail", "exclude_zero")


class _Enough(Exception):
    """Raised where upstream's endless loop begins an epoch more than wanted."""


def arguments(dataset: str, data: Path, encoder: str, device: str, **changes: Any) -> EasyDict:
    """Return what upstream's loader, model and trainer ask of their `args`."""
    settings, found = preset(dataset), find_text_encoder(encoder)
    its_own = {key: value for key, value in settings.items() if key not in _NOT_ITS_KEYS}
    fixed = {
        **{"model_name": "self_mm", "dataset_name": dataset, "train_mode": "regression"},
        **{"custom_feature": str(data), "feature_T": "", "feature_A": "", "feature_V": "", "feature_dims": [0, 0, 0]},
        **{"use_bert": True, "use_finetune": True, "transformers": "bert"},
        **{"pretrained": found.source, "text_out": found.width},
        **{"need_data_aligned": False, "need_model_aligned": False, "need_normalized": False},
        **{"H": 3.0, "excludeZero": settings["exclude_zero"], "save_labels": False, "KeyEval": "Loss"},
        "device": torch.device(device),
    }
    return EasyDict({**its_own, **fixed, **changes})


class _Clock:
    """When each pass over the train split and each validation begins; the first pass only reads the labels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.passes: list[float] = []
        self.validations: list[float] = []

    def now(self) -> float:
        synchronise(self.device.type)
        return time.perf_counter()

    def seconds(self) -> tuple[list[float], list[float]]:
        """Return each epoch's seconds of training and, with the saving of the best weights, of validation."""
        starts, ends = self.passes[1:-1], self.passes[2:]
        train = [middle - start for start, middle in zip(starts, self.validations, strict=True)]
        valid = [end - middle for middle, end in zip(self.validations, ends, strict=True)]
        return train, valid


class _Marked:
    """A loader that notes when each pass over it begins, and refuses to begin one too many."""

    def __init__(self, loader: Any, clock: _Clock, epochs: int | None) -> None:
        self.loader, self.clock, self.epochs = loader, clock, epochs

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.clock.passes.append(self.clock.now())
        if self.epochs is not None and len(self.clock.validations) == self.epochs:
            raise _Enough
        return iter(self.loader)


class _Timed(SELF_MM):
    """Upstream's trainer, with marks around its validation and a record of what that found."""

    def __init__(self, args: EasyDict, clock: _Clock) -> None:
        super().__init__(args)
        self.clock = clock
        self.valid: list[tuple[float, float]] = []

    def do_test(self, *positional: Any, **named: Any) -> dict[str, Any]:
        self.clock.validations.append(self.clock.now())
        results = super().do_test(*positional, **named)
        self.valid.append((results["Loss"], results["MAE"]))
        return results


def train(args: EasyDict, seed: int, workers: int, epochs: int | None, save: Path) -> dict[str, Any]:
    """Train upstream's SELF_MM and return its figures.

    Args:
        args: of `arguments`.
        seed: for its `setup_seed`.
        workers: processes of its loaders.
        epochs: most epochs; early stopping alone if None.
        save: the file where it keeps its best weights.
    """
    with redirect_stderr(io.StringIO()):  # its bars would bury the figures
        setup_seed(seed)
        args.model_save_path = str(save)
        loaders = MMDataLoader(args, workers)
        args.train_samples = len(loaders["train"].dataset)
        model = AMIO(args).to(args.device)
        clock = _Clock(args.device)
        trainer = _Timed(args, clock)
        with suppress(_Enough):
            trainer.do_train(model, {**loaders, "train": _Marked(loaders["train"], clock, epochs)})
            clock.passes.append(clock.now())  # it stopped by itself: the last validation ends here
        model.load_state_dict(torch.load(save))
        test = SELF_MM(args).do_test(model, loaders["test"], mode="TEST")
    train_seconds, valid_seconds = clock.seconds()
    # Upstream chooses by its loss, the mean over batches of their means, rounded.
    chosen = min(trainer.valid, key=lambda figures: figures[0])
    return {
        "seed": seed,
        "valid_mae": chosen[1],
        "best_epoch": trainer.valid.index(chosen) + 1,
        "epochs": len(trainer.valid),
        "test": {name: float(test[name]) for name in METRICS},
        "train_seconds": train_seconds,
        "valid_seconds": valid_seconds,
    }

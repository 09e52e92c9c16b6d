"""Checks for plugin authors: `check_model(MY_SPEC)` in a test, or `benchmark check NAME|FILE.py`.

A small random dataset stands in for a feature file, and a tiny random encoder for the pretrained one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from .config import resolve
from .contract import Batch, DataInfo, DatasetSpec, FusionOutput, HookSpec, ModelSpec
from .data.batches import Split
from .data.splits import SplitArrays
from .data.text import TextEncoder
from .errors import BenchmarkError
from .jobs import needs_of
from .plugins import Plugins
from .training import make_optimizer

TOLERANCE = 1e-4
_N, _LENGTHS, _DIMS = 12, {"text": 10, "audio": 14, "vision": 9}, {"text": 16, "audio": 5, "vision": 7}
_VOCABULARY = 60
_BERT = {
    "model_type": "bert",
    "vocab_size": _VOCABULARY,
    "hidden_size": _DIMS["text"],
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Check:
    """One requirement of the contract; `fault` is None where the model meets it."""

    name: str
    fault: str | None


class _Fault(Exception):
    pass


def check_model(spec: ModelSpec, hooks: Sequence[HookSpec] | None = None) -> None:
    """Check a model against the contract.

    Args:
        spec: the model.
        hooks: the specs of the hooks that it names; by default they are looked up by name.

    Raises:
        BenchmarkError: it breaks one; the message lists every fault.
    """
    faults = [f"{check.name}: {check.fault}" for check in inspect_model(spec, hooks) if check.fault]
    if faults:
        raise BenchmarkError(f"{spec.name} breaks the contract: " + "; ".join(faults))


def inspect_model(spec: ModelSpec, hooks: Sequence[HookSpec] | None = None) -> list[Check]:
    """Run every check and return the results; a model that cannot be built has only the first.

    The checks have a seed of their own, and leave torch's global random state as it was.
    """
    if hooks is None:
        hooks = [Plugins().load("hook", name) for name in spec.hooks]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _run_checks(_Case(spec, hooks))


def _run_checks(case: _Case) -> list[Check]:
    checks: list[tuple[str, Callable[[], None]]] = [
        ("builds and runs", case.runs),
        ("shapes", case.shapes),
        ("gradients reach every parameter", case.gradients),
        ("padding and batch company do not change a prediction", case.company),
        ("label blindness", case.label_blindness),
        ("save and load", case.save_and_load),
        ("per_sample", case.per_sample),
    ]
    results = []
    for name, check in checks:
        try:
            check()
            results.append(Check(name, None))
        except _Fault as fault:
            results.append(Check(name, str(fault)))
        except Exception as error:  # a plugin may raise anything
            results.append(Check(name, f"{type(error).__name__}: {error}"))
        if name == checks[0][0] and results[0].fault:
            break
    return results


class _Case:
    """A model on the stand-in data."""

    def __init__(self, spec: ModelSpec, hooks: Sequence[HookSpec]) -> None:
        self.spec = spec
        self.hooks = hooks
        rng = np.random.default_rng(0)
        self.lengths = {name: rng.integers(2, longest + 1, _N) for name, longest in _LENGTHS.items()}
        for values in self.lengths.values():
            values[0], values[1] = values.max(), 1
        self.lengths["text"] = np.maximum(self.lengths["text"], 3)
        mask = np.arange(_LENGTHS["text"]) < self.lengths["text"][:, None]
        ids = np.where(mask, rng.integers(5, _VOCABULARY, mask.shape), 0)
        self.tokens = np.stack([ids, mask, np.zeros_like(ids)], axis=1).astype(np.int64)
        self.rows = torch.arange(_N)

    def arrays(self, aligned: bool) -> SplitArrays:
        rng = np.random.default_rng(1)
        lengths = dict.fromkeys(_LENGTHS, self.lengths["text"]) if aligned else self.lengths

        def sequence(name: str) -> np.ndarray:
            steps = _LENGTHS["text" if aligned else name]
            real = np.arange(steps) < lengths[name][:, None]
            return (rng.normal(size=(*real.shape, _DIMS[name])) * real[:, :, None]).astype(np.float32)

        return SplitArrays(
            ids=[f"clip{i}" for i in range(_N)],
            labels={task: rng.uniform(-3, 3, _N).astype(np.float32) for task in "MTAV"},
            **{name: sequence(name) for name in _LENGTHS},  # type: ignore[arg-type]
            **{f"{name}_lengths": lengths[name] for name in _LENGTHS},  # type: ignore[arg-type]
        )

    def build(self, seed: int = 0) -> nn.Module:
        dataset = DatasetSpec(name="mosi", summary="", label_range=3.0, metrics="mosi")
        self.config = resolve(self.spec, self.hooks, dataset).model
        needs = needs_of(self.spec, self.config)
        reads_text, aligned = "text" in needs, "alignment" in needs
        arrays = self.arrays(aligned)
        self.split = Split(arrays, self.tokens if reads_text else None, torch.device("cpu"), train=True, needs=needs)
        given = {need.removesuffix("_features") for need in needs} & _DIMS.keys()
        info = DataInfo(
            name="check",
            dims={name: _DIMS[name] for name in _DIMS if name in given},
            max_lengths={name: getattr(arrays, name).shape[1] for name in _DIMS if name in given},
            n_train=_N,
            label_range=3.0,
            tasks=tuple("MTAV"),
            aligned=aligned,
            text_encoder=TextEncoder.from_config(_BERT, name="tiny") if reads_text else None,
        )
        torch.manual_seed(seed)
        return self.spec.build(self.config, info)

    def runs(self) -> None:
        self.model = self.build()
        output = self.model(self.split.batch(self.rows))
        if not isinstance(output, FusionOutput):
            raise _Fault(f"forward must return a FusionOutput, got {type(output).__name__}")
        self.output = output

    def shapes(self) -> None:
        if self.output.prediction.shape != (_N,):
            raise _Fault(f"prediction must have shape ({_N},), got {tuple(self.output.prediction.shape)}")
        if not self.output.prediction.isfinite().all():
            raise _Fault("prediction is not finite")
        widths = getattr(self.model, "feature_dims", None)
        if widths is None:
            raise _Fault("the model has no feature_dims (a dict, empty if it returns no features)")
        found = {name: tuple(feature.shape) for name, feature in self.output.features.items()}
        if found != {name: (_N, width) for name, width in widths.items()}:
            raise _Fault(f"feature_dims says {dict(widths)}, forward returns features of shape {found}, B is {_N}")
        for name, prediction in self.output.unimodal.items():
            if prediction.shape != (_N,):
                raise _Fault(f"unimodal[{name!r}] must have shape ({_N},), got {tuple(prediction.shape)}")
        wrong = [name for name, loss in self.output.losses.items() if loss.dim()]
        if wrong:
            raise _Fault(f"losses must be scalars, {', '.join(wrong)} is not")

    def gradients(self) -> None:
        self.model.train()
        self.model.zero_grad()
        output = self.model(self.split.batch(self.rows))
        others = [*output.unimodal.values(), *output.features.values()]  # hooks train through features
        parts = [output.prediction.sum(), *output.losses.values(), *(value.sum() for value in others)]
        torch.stack(parts).sum().backward()
        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        missed = [name for name, parameter in trainable if parameter.grad is None]
        if missed:
            still = " (freeze what is not to be trained with requires_grad_(False))"
            raise _Fault(f"{len(missed)} of {len(trainable)} parameters get none: {', '.join(missed[:3])}{still}")
        groups = make_optimizer(self.model, [], self.config).param_groups
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        if left := [name for name, parameter in trainable if id(parameter) not in trained]:
            raise _Fault(f"parameter_groups leaves out {', '.join(left[:3])}")

    def company(self) -> None:
        together = self._evaluate(self.split.batch(self.rows))
        alone = torch.cat([self._evaluate(self.split.batch(self.rows[i : i + 1])) for i in range(_N)])
        padded = self._evaluate(self._untrimmed()) if self.split.trims else together
        for what, other in (("alone", alone), ("padded to the file's length", padded)):
            gap = float((together - other).abs().max())
            if not gap <= TOLERANCE:  # NaN is a fault too
                raise _Fault(f"a clip {what} is predicted up to {gap:.2g} away from the same clip in a batch")

    def _untrimmed(self) -> Batch:
        batch = self.split.batch(self.rows)

        def pad(tensor: Tensor | None, widths: tuple[int, ...]) -> Tensor | None:
            return None if tensor is None else nn.functional.pad(tensor, widths)

        tokens = {name: pad(getattr(batch, name), (0, 4)) for name in ("text_ids", "text_mask", "text_segments")}
        sequences = {name: pad(getattr(batch, name), (0, 0, 0, 4)) for name in ("text", "audio", "vision")}
        return replace(batch, text_rows=None, **tokens, **sequences)  # type: ignore[arg-type]

    def label_blindness(self) -> None:
        batch = self.split.batch(self.rows)
        blind = replace(batch, labels={}, index=torch.full_like(batch.index, -1))
        if not torch.equal(self._evaluate(batch), self._evaluate(blind)):
            raise _Fault("the prediction changes when labels and row numbers are withheld")

    def save_and_load(self) -> None:
        again = self.build(seed=1)
        again.load_state_dict(self.model.state_dict())
        if not torch.equal(
            self._evaluate(self.split.batch(self.rows), again), self._evaluate(self.split.batch(self.rows))
        ):
            raise _Fault("a model rebuilt from its state_dict predicts otherwise: some state is not in it")

    def per_sample(self) -> None:
        batch_norms = [name for name, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if self.spec.per_sample and (batch_norms or self.output.losses):
            reason = f"BatchNorm ({batch_norms[0]})" if batch_norms else "batch-level losses"
            raise _Fault(f"the spec says per_sample=True, and the model has {reason}")
        others = self.rows.clamp(max=1)  # the first clip is the longest: both batches have one shape
        gap = float((self._first_in_training(self.rows) - self._first_in_training(others)).abs())
        if self.spec.per_sample and not gap <= TOLERANCE:
            raise _Fault("the spec says per_sample=True, and in training a clip's prediction depends on its batch")

    @torch.no_grad()
    def _first_in_training(self, rows: Tensor) -> Tensor:
        """Return the first clip's prediction in training mode, with the same dropout in every call."""
        torch.manual_seed(0)
        batch = replace(self.split.batch(rows), text_rows=None)  # their number would shift what dropout draws
        return self.model.train()(batch).prediction[0]

    @torch.no_grad()
    def _evaluate(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        return (model or self.model).eval()(batch).prediction

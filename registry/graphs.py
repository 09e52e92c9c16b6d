"""Steps as CUDA graphs: a step that comes again in the same shapes is recorded once and replayed from then on.

On a GPU a training step of a small batch is bound by the launching of its thousand kernels; a graph is launched as one.
A step can be recorded if it does the same in every call but for the values in its tensors. Of each step in new shapes
that is seen while it runs as usual: it must not wait for the device, draw random numbers on the host, or leave a Python
attribute of a module changed. Where it does, every step runs as usual, with the same results. The very first step is
not looked at: libraries set themselves up in it.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .contract import Batch

MOST_GRAPHS = 64
"""of one training; the oldest makes room"""

Step = Callable[[Batch], Tensor]


class Recorder:
    """Runs steps, and replays those that it has recorded.

    Args:
        modules: whose attributes must not change in a step.
        release: frees what a recorded step has left, such as gradients, for the next recording.
    """

    def __init__(self, modules: Sequence[nn.Module], release: Callable[[], None]) -> None:
        self.fault: str | None = None
        """why steps are not recorded, as a sentence's end"""
        self.replayed = 0
        self.usual = 0
        self._modules = modules
        self._release = release
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: set[Hashable] = set()
        self._pool: Any = None

    def __call__(self, step: Step, batch: Batch, key: Hashable) -> Tensor:
        """Return what `step(batch)` gives, a tensor that holds until the next call.

        Args:
            step: must do the same for equal keys and equal shapes of the batch.
            batch: on a CUDA device.
            key: everything that the step depends on besides the batch.
        """
        key = (key, *((name, tuple(tensor.shape)) for name, tensor in batch.tensors().items()))
        if key in self._graphs:
            self.replayed += 1
            return self._graphs[key].replay(batch)
        if self.fault is None and key in self._seen and (graph := self._record(step, batch)):
            if len(self._graphs) == MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = graph
            self.replayed += 1
            return graph.replay(batch)
        self.usual += 1
        if self.fault is not None or self.usual == 1:
            return step(batch)
        self._seen.add(key)
        with self._watched():
            return step(batch)

    def __str__(self) -> str:
        if self.fault is not None:
            return f"steps were not recorded as CUDA graphs: {self.fault}"
        shapes = f"recorded in {len(self._graphs)} shapes, as CUDA graphs"
        return f"{self.replayed} of {self.replayed + self.usual} steps were replayed, {shapes}"

    def _record(self, step: Step, batch: Batch) -> _Graph | None:
        """Return the step's graph, which has not run yet; None where it cannot be recorded after all."""
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.graphsafe_get_state().clone_state()
        self._release()
        try:
            graph = _Graph(step, batch, self._pool)
        except RuntimeError as error:
            self.fault = f"recording one failed ({' '.join(str(error).split())[:120]})"
            generator.graphsafe_set_state(state)  # the former one would wait for the recording's end
            self._release()
            return None
        self._release()
        self._pool = graph.pool
        return graph

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """See whether what runs could be recorded."""
        before, mode = host_state(self._modules), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
        for warning in caught:
            if warning not in waits:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        after = host_state(self._modules)
        if waits:
            self.fault = f"a step waits for the device (in {Path(waits[0].filename).name}, line {waits[0].lineno})"
        elif change := next((name for name in before | after if before.get(name) != after.get(name)), None):
            self.fault = f"a step {change}"


def host_state(modules: Sequence[nn.Module]) -> dict[str, Any]:
    """Return what a step must leave as it is: random states and attributes, by what the step did if it did not."""
    # numpy's usual form of its state has an array, which cannot be compared as a whole.
    of_numpy = {key: _plain(value) for key, value in np.random.get_state(legacy=False).items()}
    drawn = (random.getstate(), of_numpy, torch.get_rng_state().tolist())
    state: dict[str, Any] = {"draws random numbers on the host": drawn}
    for root in modules:
        for name, module in root.named_modules():
            for key, value in vars(module).items():
                if not key.startswith(_OF_TORCH):
                    state[f"changes {'.'.join(filter(None, [type(root).__name__, name, key]))}"] = _plain(value)
    return state


_OF_TORCH = ("_parameters", "_buffers", "_modules", "_forward_", "_backward_", "_state_dict_", "_load_state_dict_")
"""attributes of every module; a graph updates the tensors in them in place"""


@dataclass(frozen=True)
class _Itself:
    """An object that is only equal to itself, and lives until it has been compared."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value


def _plain(value: Any, depth: int = 3) -> Any:
    """Return a value in a form that tells whether it has changed; what is inside objects counts, `depth` of them."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if depth and isinstance(value, Mapping):
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, (list, tuple, set, frozenset, deque)):
        return [_plain(item, depth - 1) for item in value]
    if depth and not isinstance(value, (type, nn.Module, Tensor)) and (inside := getattr(value, "__dict__", None)):
        return _Itself(value), _plain(inside, depth - 1)
    return _Itself(value)  # of a tensor the values may change, as they do when a graph is replayed


class _Graph:
    """A recorded step with the tensors that it reads."""

    def __init__(self, step: Step, batch: Batch, pool: Any) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in batch.tensors().items()}
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._result = step(Batch.of(self._inputs))
        self.pool = self._graph.pool()

    def replay(self, batch: Batch) -> Tensor:
        given = batch.tensors()
        torch._foreach_copy_(list(self._inputs.values()), [given[name] for name in self._inputs])
        self._graph.replay()
        return self._result

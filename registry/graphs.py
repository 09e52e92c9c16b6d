"""Steps as CUDA graphs: a step that comes again in the same shapes is recorded once and replayed from then on.

On a GPU a training step of a small batch is bound by the launching of its thousand kernels; a graph is launched as one.
A step can be recorded if it does the same in every call but for the values in its tensors. Of each step in new shapes
that is seen while it runs as usual: it must not wait for the device, draw random numbers on the host, or leave a Python
attribute of a module changed. Where it does, every step runs as usual. Where a model's attributes change between
epochs, steps are recorded anew. The very first step is not looked at: libraries set themselves up in it.

Recorded steps share memory, which others cannot use; where both would not fit, none is recorded.
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
from .errors import RunFailed

MOST_GRAPHS = 64
"""of one training; a further one begins anew. They go together: newer torch frees, with one, memory that cuBLAS
uses in those recorded on the same stream (pytorch#193402)."""

ROOM = 3
"""The free memory that is asked for, in what the largest step takes: once for steps that are not recorded, twice for
those that are, since pieces that one shape has left do not fit the next."""

Step = Callable[[Batch], Tensor]


class Recorder:
    """Runs steps, and replays those that it has recorded. Torch's statistics of the most memory begin anew with it.

    Args:
        models: whose attributes must not change in a step.
        hooks: likewise; they promise that a step is the same whatever happens between steps.
        release: frees what a recorded step has left, such as gradients, for the next recording.
    """

    def __init__(self, models: Sequence[nn.Module], hooks: Sequence[nn.Module], release: Callable[[], None]) -> None:
        self.fault: str | None = None
        """why steps are not recorded, as a sentence's end"""
        self.replayed = 0
        self.usual = 0
        self._models = models
        self._modules = [*models, *hooks]
        self._attributes: dict[str, Any] = {}
        self._release = release
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: set[Hashable] = set()
        self._pool: Any = None
        torch.cuda.reset_peak_memory_stats()

    def __call__(self, step: Step, batch: Batch, key: Hashable) -> Tensor:
        """Return what `step(batch)` gives, a tensor that holds until the next call.

        Args:
            step: must do the same for equal keys and equal shapes of the batch.
            batch: on a CUDA device.
            key: everything that the step depends on besides the batch.
        """
        key = (key, *((name, tuple(tensor.shape)) for name, tensor in batch.tensors().items()))
        if graph := self._graphs.get(key) or self._recorded(step, batch, key):
            self._graphs[key] = graph
            self.replayed += 1
            return graph.replay(batch)
        self.usual += 1
        if self.fault is not None or self.usual == 1:
            return step(batch)
        self._seen.add(key)
        with self._watched():
            return step(batch)

    def begin_epoch(self) -> None:
        """Forget what was recorded if a model is another than it was then, but for its tensors' values."""
        if self._graphs and attributes_of(self._models) != self._attributes:
            self._forget()
            self._seen.clear()

    def __str__(self) -> str:
        done = f"{self.replayed} of {self.replayed + self.usual} steps were replayed as CUDA graphs"
        if self.fault is None:
            return f"{done}, in {len(self._graphs)} shapes"
        return f"{done}, then no more: {self.fault}" if self.replayed else f"steps were not recorded: {self.fault}"

    def _recorded(self, step: Step, batch: Batch, key: Hashable) -> _Graph | None:
        """Return the graph of a step that has been seen before, which has not run yet; None if there is to be none."""
        if self.fault is not None or key not in self._seen:
            return None
        self._release()
        if not _has_room():
            self._give_up("the GPU has too little free memory")
            return None
        if len(self._graphs) == MOST_GRAPHS:
            self._forget()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state, before = generator.graphsafe_get_state().clone_state(), host_state(self._modules)
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):  # a failure leaves another one
                graph = _Graph(step, batch, self._pool)
        except RuntimeError as error:
            self._give_up(fault := f"recording one failed ({' '.join(str(error).split())[:120]})")
            generator.graphsafe_set_state(state)  # the former one would wait for the recording's end
            if any(isinstance(cause, torch.OutOfMemoryError) for cause in (error, error.__context__)):
                raise torch.OutOfMemoryError(fault) from error
            if host_state(self._modules) != before:
                raise RunFailed(f"{fault}, and left a model or a hook half way: pass --no-graph") from error
            return None
        finally:
            self._release()
        self._pool = graph.pool
        if not self._graphs:
            self._attributes = attributes_of(self._models)
        return graph

    def _give_up(self, fault: str) -> None:
        self.fault = fault
        self._forget()

    def _forget(self) -> None:
        self._graphs.clear()
        self._pool = None  # it goes with the last of them

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
            if warning not in waits and "Synchronization debug mode" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        after = host_state(self._modules)
        if waits:
            self._give_up(f"a step waits for the device (in {Path(waits[0].filename).name}, line {waits[0].lineno})")
        elif change := changed(before, after):
            self._give_up(f"a step {change}")


def _has_room() -> bool:
    """Whether the GPU's memory is enough for recorded steps and others, by the most that this training has taken.

    What no tensor holds counts as free.
    """
    free, _ = torch.cuda.mem_get_info()
    held = torch.cuda.memory_allocated()
    of_a_step = torch.cuda.max_memory_allocated() - held
    return free + torch.cuda.memory_reserved() - held >= ROOM * of_a_step


def host_state(modules: Sequence[nn.Module]) -> dict[str, Any]:
    """Return what a step must leave as it is: random states and attributes, by what the step did if it did not."""
    of_numpy = np.random.get_state(legacy=False)  # its usual form has an array, which cannot be compared as a whole
    drawn = _plain([random.getstate(), of_numpy, torch.default_generator])
    return {"draws random numbers on the host": drawn, **attributes_of(modules)}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return the first key whose value is another than before, None where all are the same."""
    return next((name for name in {**before, **after} if before.get(name) != after.get(name)), None)


def attributes_of(modules: Sequence[nn.Module]) -> dict[str, Any]:
    """Return the attributes of modules and of those in them; of tensors on a GPU which they are, not their values."""
    state = {}
    for root in modules:
        for name, module in root.named_modules():
            for key, value in vars(module).items():
                if key not in _OF_TORCH:
                    state[f"changes {'.'.join(filter(None, [type(root).__name__, name, key]))}"] = _plain(value)
    return state


_OF_TORCH = vars(nn.Module()).keys() - {"training", "_buffers", "_parameters"}
"""attributes that every module has"""


@dataclass(frozen=True)
class _Itself:
    """An object that is only equal to itself, and lives until it has been compared."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value


def _plain(value: Any, depth: int = 4) -> Any:
    """Return a value in a form that tells whether it has changed; what is inside objects counts, `depth` of them."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.device, torch.dtype)):
        return value
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, Tensor):  # what is on a GPU may change, as it does when a graph is replayed
        on_host = value.device.type == "cpu" and not value.requires_grad
        return _Itself(value), value.data_ptr(), value.numpy().tobytes() if on_host else None
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return _plain(value.bit_generator.state, depth)
    if isinstance(value, random.Random):
        return value.getstate()
    if depth and isinstance(value, Mapping):
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, (list, tuple, set, frozenset, deque)):
        return [_plain(item, depth - 1) for item in value]
    if depth and not isinstance(value, (type, nn.Module)) and (inside := getattr(value, "__dict__", None)):
        return _Itself(value), _plain(inside, depth - 1)
    return _Itself(value)


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

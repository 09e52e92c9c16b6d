"""What an unfinished training has come to, so that the same command goes on after its last epoch.

It lies beside the run folder, in `.<seed>.unfinished/`:

- `state.safetensors`: weights, optimiser, hooks and random states as tensors, the rest as JSON in the header;
- `best-<epoch>.safetensors`: the weights of the best epoch so far;
- `lock`: held by the process that trains the seed.

    with claim(folder) as unfinished:
        train(…, unfinished=unfinished)
        write_run(folder, …)
        unfinished.discard()

Reading it runs no code of it: it holds tensors and JSON.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .contract import TrainingHook
from .errors import InputError, one_line
from .graphs import attributes_of

FORMAT = 1
"""raised when something else is kept than before"""
SHARE = 0.05
"""of the time that keeping may take; an epoch that is shorter is kept with those after it"""
_BYTES_A_SECOND = 1e9
"""that a disk is taken to write before it has shown how fast it is"""
_STATE, _BEST = "state.safetensors", "best-{}.safetensors"
_ROW = {"epoch", "train_loss", "valid_mae", "best", "train_seconds", "valid_seconds"}
"""of the history"""


class Busy(InputError):
    """Another process trains the same seed of the same configuration."""


@dataclass
class Parts:
    """What a training consists of, in the state it is in."""

    modules: Mapping[str, nn.Module]
    """the model and the hooks"""
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau | None
    generator: torch.Generator
    """shuffles the train split"""
    device: torch.device


@dataclass
class Kept:
    """What was kept of a training, besides its parts."""

    history: list[dict[str, Any]]
    """a row an epoch"""
    best_epoch: int
    best_weights: dict[str, dict[str, Tensor]]
    """of each module, on the CPU"""


@dataclass
class Unfinished:
    """A place that keeps one seed's training; this process holds its lock.

    Args:
        folder: `.<seed>.unfinished`; it exists.
        made_of: what the training depends on and no config hash tells, such as hashes of the source.
        again: whether a finished run is trained once more: what is left of its first training is then not taken up.
    """

    folder: Path
    made_of: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False
    epoch: int = 0
    """the last that is kept"""
    resumed: int = 0
    """the epoch after which the training was taken up; 0 where it began anew"""
    refused: str = ""
    """why what was kept is not taken up"""
    fault: str = ""
    """why nothing more is kept"""
    _cost: float | None = None
    _last: float = field(default_factory=time.monotonic)

    def restore(self, parts: Parts) -> Kept | None:
        """Put the parts in the state that was kept, and return the rest of it; None where nothing is, or it is no use.

        Raises:
            InputError: it does not fit the parts, which are then in no state to be trained.
        """
        self.refused, self.resumed = "", 0
        if not (path := self.folder / _STATE).exists():
            self.discard()
            return None
        try:
            facts, tensors = _read(path)
            if not _are_whole(facts):
                raise ValueError("it lacks facts")
            best_file = self.folder / _BEST.format(facts["best_epoch"])
            _, best = _read(best_file)
            is_of_this = facts["again"] or not self.again
            if is_of_this and facts["made_of"] != json.loads(json.dumps(self.made_of)):
                self.refused = "the source of the model, or this package, is another by now"
        except Exception:  # a damaged file can make any step fail
            self.refused = f"what is kept in {self.folder} is damaged"
        if self.refused or not is_of_this:
            self.discard()
            return None
        try:
            _from_tensors(parts, tensors, facts)
        except Exception as error:
            hint = "remove that folder to train the seed from the start"
            raise InputError(f"what is kept in {self.folder} does not fit: {one_line(error)}; {hint}") from error
        self._remove_but(best_file)  # one of an epoch that came after
        self.epoch = self.resumed = len(facts["history"])
        return Kept(facts["history"], facts["best_epoch"], _by_module(parts.modules, best, "best"))

    def due(self, parts: Parts) -> bool:
        """Whether enough time has passed for keeping to be worth what it takes."""
        if self._cost is None:
            self._cost = sum(tensor.nbytes for tensor in _to_tensors(parts).values()) / _BYTES_A_SECOND
        return not self.fault and time.monotonic() - self._last >= self._cost * (1 - SHARE) / SHARE

    def keep(
        self,
        parts: Parts,
        history: Sequence[Mapping[str, Any]],
        best_epoch: int,
        best: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Keep a training as it is at an epoch's end; where that fails, `fault` says why, and what was kept stays.

        Args:
            parts: the training.
            history: a row an epoch.
            best_epoch: the best so far.
            best: its weights, the state dict of each module.
        """
        started = time.monotonic()
        facts = {
            "made_of": self.made_of,
            "again": self.again,
            "history": list(history),
            "best_epoch": best_epoch,
            **_to_facts(parts),
        }
        best_file = self.folder / _BEST.format(best_epoch)
        try:
            if not best_file.exists():
                _write(
                    best_file, {f"best/{m}/{key}": value for m, state in best.items() for key, value in state.items()}
                )
            _write(self.folder / _STATE, _to_tensors(parts), facts)
            self._remove_but(best_file)
        except OSError as error:
            self.fault = f"{self.folder} cannot be written ({error.strerror or error})"
            if not self.epoch:  # of no use, and in the way of others
                self.discard()
            return
        self.epoch = len(history)
        self._last = time.monotonic()
        self._cost = self._last - started

    def _remove_but(self, best_file: Path) -> None:
        for former in self.folder.glob(_BEST.format("*")):
            if former != best_file:
                _remove(former)

    def discard(self) -> None:
        """Remove what is kept; the lock stays with this process."""
        for path in (*self.folder.glob(_STATE), *self.folder.glob(_BEST.format("*"))):
            _remove(path)
        self.epoch = 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _are_whole(facts: Mapping[str, Any]) -> bool:
    history, best = facts["history"], facts["best_epoch"]
    return type(best) is int and 1 <= best <= len(history) and all(row.keys() == _ROW for row in history)


def place_of(run: Path) -> Path:
    """Return the folder that keeps a run while it is unfinished."""
    return run.with_name(f".{run.name}.unfinished")


@contextmanager
def claim(run: Path, made_of: Mapping[str, Any], *, again: bool = False) -> Iterator[Unfinished]:
    """Give the place that keeps a seed while it is trained, for this process alone; it goes where nothing is in it.

    Args:
        run: the run folder that is to be.
        made_of, again: see `Unfinished`.

    Raises:
        Busy: another process has it.
        InputError: it cannot be written, or is a link.
    """
    folder = place_of(run)
    lock = FileLock(folder / "lock")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.is_symlink() or (folder / "lock").is_symlink():
        raise InputError(f"{folder} or what is in it is a link to somewhere else: remove it")
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            if (folder / "lock").exists():
                break
            lock.release()  # whoever had it has just removed it
    except Timeout:
        raise Busy(f"another process is training {run}: wait for it, then type the command again") from None
    except OSError as error:
        raise InputError(f"{folder}, which keeps a run, cannot be written: {error.strerror or error}") from error
    try:
        _sweep(run)
        yield Unfinished(folder, {"format": FORMAT, **made_of}, again)
    finally:
        if {path.name for path in folder.glob("*")} <= {"lock"}:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # those that this made and nothing has come into
                for path in made[1:]:
                    path.rmdir()
        lock.release()


def _sweep(run: Path) -> None:
    """Remove what a process that was killed had begun to write in the run's name."""
    for path in run.parent.glob(f".{run.name}.*"):
        if re.fullmatch(r"[0-9a-f]{8}(\.old)?", path.name.removeprefix(f".{run.name}.")):
            if path.name.endswith(".old") and not run.exists():  # killed between two renamings
                path.rename(run)
            else:
                shutil.rmtree(path, ignore_errors=True)
    for path in place_of(run).glob("*.part"):
        path.unlink(missing_ok=True)


def unkept_state(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return what nothing keeps of modules that tell no progress: it must not change."""
    silent = [
        module
        for module in modules.values()
        if not isinstance(module, TrainingHook) or type(module).progress_state is TrainingHook.progress_state
    ]
    kept = (".training", "._parameters", "._buffers")
    state = {name: value for name, value in attributes_of(silent).items() if not name.endswith(kept)}
    for module in silent:
        persistent = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name not in persistent:
                state[f"changes {type(module).__name__}.{name}"] = buffer.tolist()
    return state


def _to_tensors(parts: Parts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, module in parts.modules.items():
        tensors |= {f"now/{name}/{key}": value for key, value in module.state_dict().items()}
        if isinstance(module, TrainingHook):
            tensors |= {f"progress/{name}/{key}": value for key, value in module.progress_state().items()}
    for number, state in parts.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{key}": value for key, value in state.items()}
    tensors["random/generator"] = parts.generator.get_state()
    tensors["random/torch"] = torch.default_generator.get_state()
    tensors["random/numpy"] = torch.from_numpy(np.random.get_state(legacy=False)["state"]["key"].astype(np.int64))
    if parts.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(parts.device)
    return tensors


def _to_facts(parts: Parts) -> dict[str, Any]:
    of_numpy = np.random.get_state(legacy=False)
    return {
        "rates": [group["lr"] for group in parts.optimizer.param_groups],
        "scheduler": None if parts.scheduler is None else parts.scheduler.state_dict(),
        "random": random.getstate(),
        "numpy": [of_numpy["state"]["pos"], of_numpy["has_gauss"], of_numpy["gauss"]],
    }


def _from_tensors(parts: Parts, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put the parts in a state that `_to_tensors` and `_to_facts` gave; raises anything where it does not fit."""
    for name, state in _by_module(parts.modules, tensors, "now").items():
        parts.modules[name].load_state_dict(state)
    for name, state in _by_module(parts.modules, tensors, "progress").items():
        if isinstance(module := parts.modules[name], TrainingHook) and state:
            module.load_progress_state(state)
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, number, key = name.split("/")
            states.setdefault(int(number), {})[key] = tensor
    groups = parts.optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, facts["rates"], strict=True):
        group["lr"] = rate
    parts.optimizer.load_state_dict({"state": states, "param_groups": groups})
    if parts.scheduler is not None:
        parts.scheduler.load_state_dict(facts["scheduler"])
    version, words, gauss = facts["random"]
    random.setstate((version, tuple(words), gauss))
    position, has_gauss, of_gauss = facts["numpy"]
    np.random.set_state(("MT19937", tensors["random/numpy"].numpy().astype(np.uint32), position, has_gauss, of_gauss))
    parts.generator.set_state(tensors["random/generator"])
    torch.default_generator.set_state(tensors["random/torch"])
    if parts.device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], parts.device)


def _by_module(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], kind: str
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors `KIND/MODULE/NAME` by module and name."""
    return {
        name: {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        for name in modules
        for start in [f"{kind}/{name}/"]
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a file's facts and tensors, in memory of their own; raises anything where it is damaged."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if facts["crc32"] != _checksum(tensors):
        raise ValueError("another checksum")
    return facts, tensors


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write a file whole or not at all; raises OSError."""
    part = path.with_name(f"{path.name}.part")
    try:
        held = _on_host(tensors)
        save_file(held, part, {"facts": json.dumps({**(facts or {}), "crc32": _checksum(held)})})
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # else a crash of the machine could leave zeros under the final name
        os.replace(part, path)
    except OSError:
        raise
    except Exception as error:  # safetensors' own, of a disk that is full
        raise OSError(str(error).rpartition("I/O error: ")[2]) from error
    finally:
        part.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of tensors in the order of their names: a disk may give back other bits than it was given."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors wants them: on the CPU, contiguous, none in the memory of another."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        if host.untyped_storage().data_ptr() in seen or host.untyped_storage().nbytes() != host.nbytes:
            host = host.clone()
        seen.add(host.untyped_storage().data_ptr())
        found[name] = host
    return found

"""What this machine and this installation have, and what to do about what they lack: `benchmark doctor`.

    for finding in diagnose("runs"):
        finding.section, finding.name, finding.value, finding.advice

Nothing is downloaded, written or changed, and nothing that fails keeps the rest from being told.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import BenchmarkError, one_line

DISTRIBUTION = "selfmm-plugin"
EXTRAS = {
    "demo": "the embedded text encoder minilm",
    "mmsa": "three models of the package MMSA",
    "mmsdk": "comparing with the CMU Multimodal SDK",
    "tensorboard": "--track tensorboard",
    "test": "the tests",
    "tune": "benchmark tune",
}
"""what each extra is for"""
GIB = 2**30
_SIGNS = "±−━│…δ"
"""that tables and bars are made of"""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; `advice` is empty where nothing is to be done."""

    section: str
    name: str
    value: str
    advice: str = ""
    is_broken: bool = False
    """whether nothing works without it"""


def diagnose(runs: str | Path = "runs", sections: Collection[str] | None = None) -> list[Finding]:
    """Return the findings of some sections, by default of all."""
    root = Path(os.path.expanduser(runs))
    known: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "extras": _extras,
        "device": _device,
        "folders": lambda: _folders(root),
        "text encoders": _text_encoders,
        "plugins": _plugins,
        "terminal": _terminal,
    }
    found: list[Finding] = []
    for section, look in known.items():
        if sections is not None and section not in sections:
            continue
        try:
            for finding in look():
                found.append(finding)  # noqa: PERF402 (what was found before an error stays)
        except Exception as error:
            found.append(Finding(section, "not known", one_line(error), "the cause is told above, or is a bug"))
    return found


# --- versions


def _versions() -> Iterator[Finding]:
    section = "versions"
    yield Finding(section, "python", f"{platform.python_version()} ({sys.executable})")
    yield Finding(section, "system", platform.platform())
    try:
        own = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        advice = "install it, with pip install -e . in a clone: plugins are found by what is installed"
        yield Finding(section, DISTRIBUTION, "not installed", advice, is_broken=True)
        return
    yield Finding(section, DISTRIBUTION, own)
    for name, wanted, version in _requirements(""):
        if version is None:
            yield Finding(section, name, "not installed", f'pip install "{name}{wanted}"', is_broken=True)
        elif not _satisfies(version, wanted):
            yield Finding(section, name, f"{version}, needed is {wanted}", f'pip install "{name}{wanted}"', True)
        else:
            yield Finding(section, name, version)
    for name in ("torch", "transformers"):
        try:
            __import__(name)
        except BaseException as error:  # a broken library may leave by any exception
            if isinstance(error, KeyboardInterrupt):
                raise
            advice = f"reinstall it: pip install --force-reinstall {name}"
            yield Finding(section, f"{name} cannot be imported", one_line(error), advice, is_broken=True)


def _requirements(extra: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield name, wanted versions and installed version of what the package, or an extra of it, requires."""
    from packaging.requirements import Requirement

    for text in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        in_base = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        in_extra = requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        if (in_base if not extra else in_extra and not in_base) and requirement.name != DISTRIBUTION:
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = None
            yield requirement.name, str(requirement.specifier), version


def _satisfies(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _extras() -> Iterator[Finding]:
    with suppress(metadata.PackageNotFoundError):
        for extra in metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
            use = EXTRAS.get(extra, "")
            needed = list(_requirements(extra))
            absent = [name for name, wanted, version in needed if version is None or not _satisfies(version, wanted)]
            if absent:
                command = f'pip install "{DISTRIBUTION}[{extra}]"'
                value = f"without {', '.join(absent)}"
                yield Finding("extras", extra, value, f"{command}, for {use}" if use else command)
            else:
                versions = ", ".join(f"{name} {version}" for name, _, version in needed)
                yield Finding("extras", extra, f"{versions}{f' ({use})' if use else ''}")


# --- the machine


def _device() -> Iterator[Finding]:
    section = "device"
    cpu = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(section, "CPU", f"{cpu}, {usable} of {os.cpu_count()} cores")
    memory, limit = _memory()
    if memory:
        within = f", of which a container allows {limit / GIB:.1f}" if limit else ""
        yield Finding(section, "memory", f"{memory / GIB:.1f} GiB{within}")
    import torch

    yield Finding(section, "threads of torch", str(torch.get_num_threads()))
    if not torch.cuda.is_available():
        card = _driver()
        advice = f"torch {torch.__version__} cannot use it: install a build for CUDA (pytorch.org)" if card else ""
        yield Finding(section, "GPU", card or "none: training is on the CPU", advice)
        return
    driver = _driver()
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, whole = torch.cuda.mem_get_info(number)
        bf16 = "bf16" if facts.major >= 8 else "no bf16"
        value = f"{facts.name}, {free / GIB:.1f} of {whole / GIB:.1f} GiB free, {bf16}, CUDA {torch.version.cuda}"
        yield Finding(section, f"GPU {number}", value)
    if driver:
        yield Finding(section, "driver", driver)


def _field(path: str, name: str) -> str:
    """Return a field of a file of Linux's; empty where there is none."""
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _memory() -> tuple[int, int]:
    """Return the bytes of memory, and of those a container allows if that is less; 0 where it cannot be told."""
    kilobytes = _field("/proc/meminfo", "MemTotal").split()
    whole = int(kilobytes[0]) * 1024 if kilobytes else 0
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        limit = 0
    return whole, limit if limit < whole else 0


def _driver() -> str:
    """Return what NVIDIA's own tool says of the first card and the driver; empty without it."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    name, _, version = said.strip().partition("\n")[0].partition(", ")
    return f"{name}, driver {version}"


# --- folders


def _folders(root: Path) -> Iterator[Finding]:
    section = "folders"
    there = next(place for place in (root.absolute(), *root.absolute().parents) if place.exists())
    can_write = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    free = f"{shutil.disk_usage(there).free / GIB:.1f} GiB free"
    if not can_write:
        yield Finding(section, "runs", f"{root}: cannot be written", "name another folder with --runs", is_broken=True)
    elif root.is_dir():
        yield Finding(section, "runs", f"{root}, {_size(root)}, {free}")
        cache = root / ".cache"
        if cache.is_dir():
            yield Finding(section, "cache of feature files", f"{cache}, {_size(cache)}; it may be deleted at any time")
    else:
        yield Finding(section, "runs", f"{root}, which is not there yet, {free}")
    from .data.store import Store

    store = Store()
    files = store.files()
    value = f"{store.root}, {len(files)} files of {', '.join(sorted({file.dataset for file in files}))}"
    advice = "`benchmark data get NAME` says where a dataset's files are, `benchmark data add` registers them"
    broken = [file.fault for file in files if file.fault]
    yield Finding(
        section,
        "registered data",
        value if files else f"{store.root}, nothing",
        "; ".join(broken) if broken else "" if files else advice,
    )


def _size(folder: Path) -> str:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return f"{total / 10**6:,.0f} MB" if total < 10**9 else f"{total / 10**9:,.1f} GB"


# --- text encoders


def _text_encoders() -> Iterator[Finding]:
    section = "text encoders"
    from huggingface_hub import constants

    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    mode = f"offline ({', '.join(offline)} is set)" if offline else "what is not there is fetched"
    yield Finding(section, "cache of the hub", f"{constants.HF_HUB_CACHE}, {mode}")
    from .data.text import MINILM, find_text_encoder

    try:
        encoder = find_text_encoder(MINILM)
        yield Finding(section, MINILM, f"{encoder.width} wide, weights are the published ones")
    except BenchmarkError as error:
        yield Finding(section, MINILM, "not usable", str(error))
    from .plugins import Plugins

    used_by = defaultdict(list)
    for entry, spec in Plugins().check("dataset"):
        if not isinstance(spec, BenchmarkError) and spec.text_encoder not in (None, MINILM):
            used_by[spec.text_encoder].append(entry.name)
    for name, datasets in used_by.items():
        of = f"the default for {', '.join(datasets)}"
        if _is_in_hub_cache(name):
            yield Finding(section, name, f"in the cache; {of}")
        else:
            otherwise = "" if offline else ", or let the first run fetch it"
            advice = f"hf download {name}{otherwise}, or pass --text-encoder FOLDER or minilm"
            yield Finding(section, name, f"not in the cache; {of}", advice)


def _is_in_hub_cache(name: str) -> bool:
    """Whether an encoder's configuration and weights are in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    weights = ("model.safetensors", "pytorch_model.bin")
    cached = {file: isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", *weights)}
    return cached["config.json"] and any(cached[file] for file in weights)


# --- plugins and the terminal


def _plugins() -> Iterator[Finding]:
    from .plugins import GROUPS, Plugins

    for kind in GROUPS:
        checked = Plugins().check(kind)
        failed = [(entry, error) for entry, error in checked if isinstance(error, BenchmarkError)]
        yield Finding(
            "plugins",
            "published results" if kind == "published" else f"{kind}s",
            f"{len(checked) - len(failed)} of {len(checked)} can be used",
        )
        reasons: dict[str, list[Any]] = defaultdict(list)
        for entry, error in failed:
            reasons[str(error).partition("cannot be used: ")[2] or str(error)].append(entry)
        for reason, entries in reasons.items():
            names = ", ".join(entry.name for entry in entries)
            advice = f"mend or remove {', '.join(sorted({e.distribution for e in entries}))}"
            yield Finding("plugins", names, reason, advice if "pip install" not in reason else reason.split(": ")[-1])


def _terminal() -> Iterator[Finding]:
    encoding = getattr(sys.stdout, "encoding", None) or "none"
    width = shutil.get_terminal_size((0, 0)).columns
    try:
        _SIGNS.encode(encoding)
        advice = ""
    except (LookupError, UnicodeEncodeError):
        advice = "some signs are shown as ?: set PYTHONIOENCODING=utf-8, or a UTF-8 locale"
    where = f"a terminal, {width} columns" if sys.stdout.isatty() else "not a terminal"
    yield Finding("terminal", "standard output", f"{where}, encoding {encoding}", advice)

"""Finished runs on the Hugging Face hub: weights, settings and metrics go there and come back; no code does.

url = push(load_run("runs/self_mm/mosi/3f2a…/1111"), "user/self-mm-mosi")
run = pull("user/self-mm-mosi")
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .data.text import code_in
from .errors import InputError, one_line
from .metrics import names_of
from .runs import FINISHED, WEIGHTS, Run, fault_of, finite, load_run, writing

HUB = "hub:"
"""what the name of a repository begins with where a folder is expected"""
TABLES = ("history",)
"""that are always sent; other tables name the clips of a dataset and their labels"""
_SECONDS = 10
_WHERE = "a repository is named USER/NAME"


def push(run: Run, repo: str, *, private: bool = False, with_predictions: bool = False) -> str:
    """Send a finished run to the hub, with a model card, and return its address.

    What it knows of single clips stays here: predictions, tables of hooks, and what hooks remember of the train split
    (their parameters are sent); so does the log. Of paths of this machine only the last part is sent.

    Args:
        run: the run.
        repo: `USER/NAME`; made if it is not there.
        private: whether a repository that is made is seen by its owner only.
        with_predictions: send `predictions.csv` too, which has ids and labels of the test split.

    Raises:
        InputError: the run cannot be made again, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    repo, revision = _parts(repo)
    if revision:
        raise InputError(f"a run is sent to USER/NAME, and not to a revision, got {repo}@{revision}")
    with tempfile.TemporaryDirectory() as temporary:
        _write(run, Path(temporary), repo, [*TABLES, *["predictions"] * with_predictions])
        try:
            api = HfApi()
            made = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id, folder_path=temporary, commit_message=f"Run of {run.settings['model']}"
            )
        except Exception as error:  # the hub's error types change between its versions
            raise InputError(f"{repo} cannot be sent to the hub: {_reason(error)}") from error
    return str(made)


def pull(repo: str, folder: str | Path | None = None, *, plugins: Sequence[str] = ()) -> Run:
    """Fetch a run from the hub; only weights, JSON and tables are, and nothing in them is run.

    Args:
        repo: `USER/NAME`, or `USER/NAME@REVISION`.
        folder: where it shall lie; in the hub's local cache by default, which also serves without a network.
        plugins: files or modules of models that are not packaged.

    Raises:
        InputError: it cannot be fetched, is not a finished run, or the folder is taken.
    """
    repo, revision = _parts(repo)
    place = None if folder is None else Path(os.path.expanduser(folder))
    if place is not None and os.path.lexists(place):
        raise InputError(f"{place} is there already: name a folder that is not")
    found = _fetch(repo, revision)
    if fault := fault_of(found):
        raise InputError(f"{repo} holds no finished run: {fault}")
    encoder = json.loads((found / "config.json").read_text("utf-8"))["text_encoder"]
    if asked := code_in(encoder):
        raise InputError(f"{repo} asks for code: its text encoder has the key {asked!r}, which no run needs")
    if place is None:
        return load_run(found, plugins=plugins)
    with writing(place) as temporary:
        for file in _names():
            if (found / file).is_file():
                shutil.copyfile(found / file, temporary / file)
    return load_run(place, plugins=plugins)


def _parts(repo: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", repo.removeprefix(HUB))
    if match is None:
        raise InputError(f"{_WHERE}, got {repo!r}")
    return match[1], match[2]


def _names() -> list[str]:
    return ["config.json", "environment.json", FINISHED, WEIGHTS, *(f"{name}.csv" for name in (*TABLES, "predictions"))]


def _fetch(repo: str, revision: str | None) -> Path:
    """Return the folder in the hub's cache that has the newest files, or those that are there if it cannot be asked."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # One request that is not retried, before a download that is.
        HfApi().model_info(repo, revision=revision, timeout=_SECONDS)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_names()))
    except Exception as error:  # the hub's error types change between its versions
        if _status(error) is None:
            try:
                return Path(snapshot_download(repo, revision=revision, allow_patterns=_names(), local_files_only=True))
            except Exception:
                pass
        raise InputError(f"{repo} cannot be fetched from the hub: {_reason(error)}") from error


def _status(error: BaseException) -> int | None:
    """Return the status of the answer that an error is about; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    from huggingface_hub import get_token

    status, token = _status(error), get_token()
    log_in = "run `hf auth login`, or set HF_TOKEN"
    if "Token" in type(error).__name__ or (status in (401, 403) and not token):
        return f"it wants to know who you are, or there is no such repository: {log_in}"
    if status in (401, 403):
        return f"your token does not allow it (status {status}): {log_in} with another"
    if status == 404:
        return "there is no such repository, or it is private and your token does not see it"
    if status is not None:
        return f"it answered with status {status} ({one_line(error)})"
    if isinstance(error, OSError) or "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
        return f"there is no network, or no answer ({type(error).__name__})"
    return one_line(error)


# --- what is sent


def _write(run: Run, folder: Path, repo: str, tables: Sequence[str]) -> None:
    """Write the files that are sent."""
    known = run.settings["text_encoder"]
    typed = known["name"] if known else ""
    summary = dict(run.summary)
    lines = summary.get("lines", {})
    sent = [name for name in tables if (run.folder / f"{name}.csv").is_file()]
    summary |= {
        "artifacts": [],
        "lines": {name: count for name, count in lines.items() if name in sent},
        "left_out": sorted({"predictions", "history", *lines, *summary["artifacts"]} - {*sent}),
    }
    parts = {"config.json": run.settings, "environment.json": run.environment, FINISHED: summary}
    parts = {name: _without_paths(value, typed) for name, value in parts.items()}
    for name, value in parts.items():
        (folder / name).write_text(json.dumps(finite(value), indent=2) + "\n", "utf-8")
    for name in sent:
        shutil.copyfile(run.folder / f"{name}.csv", folder / f"{name}.csv")
    _write_weights(run, folder / WEIGHTS)
    (folder / "README.md").write_text(_card(run, repo, parts[FINISHED]), "utf-8")


def _without_paths(value: Any, typed: str) -> Any:
    """Return JSON without folders of this machine: the text encoder's, and whatever else is an absolute path."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item, typed) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, typed) for item in value]
    if not isinstance(value, str):
        return value
    if typed and (os.path.isdir(os.path.expanduser(typed)) or _is_path(typed)):
        value = value.replace(typed, _last_part(typed))
    return _last_part(value) if _is_path(value) else value


def _is_path(text: str) -> bool:
    return bool(re.match(r"~?[/\\]|~\w+[/\\]|[A-Za-z]:[/\\]|\.\.?[/\\]", text))


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _write_weights(run: Run, path: Path) -> None:
    """Write the weights without what hooks have of each train clip: buffers as long as the train split."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    parameters = {f"hook.{n}.{p}" for n, hook in run.hooks.items() for p, _ in hook.named_parameters()}
    clips = run.settings["data"]["n_train"]
    with safe_open(run.folder / WEIGHTS, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    of_clips = {
        name
        for name, tensor in weights.items()
        if name.startswith("hook.") and name not in parameters and tensor.dim() and len(tensor) == clips
    }
    save_file({name: tensor for name, tensor in weights.items() if name not in of_clips}, path)


def _card(run: Run, repo: str, summary: Mapping[str, Any]) -> str:
    """Return the model card: what it is, its metrics and protocol, how to use it, and what to cite."""
    from huggingface_hub import EvalResult, ModelCardData

    spec, settings = run.plan.spec, run.settings
    model, dataset = str(settings["model"]), str(settings["dataset"])
    metrics = {name: run.metrics[name] for name in names_of(settings["data"]["metrics"]) if name in run.metrics}
    data = ModelCardData(
        library_name="selfmm-plugin",
        tags=["multimodal-sentiment-analysis", model.partition("+")[0], dataset],
        model_name=model,
        eval_results=[
            EvalResult("multimodal-sentiment-analysis", dataset, dataset, name, round(value, 4))
            for name, value in metrics.items()
            if value == value
        ]
        or None,
    )
    seed = "an imported checkpoint" if settings["seed"] is None else f"seed {settings['seed']}"
    lines = ["---", data.to_yaml(), "---", f"# {model} on {dataset}", "", f"{spec.summary} ({seed}).", ""]
    if metrics:
        lines += ["| metric | test |", "|---|---:|", *(f"| {n} | {v:.4f} |" for n, v in metrics.items()), ""]
    lines += ["## Protocol", "", *(f"- {name}: {text}" for name, text in summary.get("protocol", {}).items()), ""]
    example = ["import registry  # pip install selfmm-plugin", f'run = registry.load_run("{HUB}{repo}")']
    lines += ["## Use", "", "```python", *example, 'table = registry.predict(run, "clips.pkl")', "```", ""]
    lines += [f"Or `benchmark predict {HUB}{repo} clips.pkl -o predictions.csv`: clips in MMSA's pickle layout, with"]
    widths = ", ".join(f"{name} of width {width}" for name, width in settings["data"]["dims"].items())
    lines += [f"{widths}. No code is fetched with a run; predictions and labels of its dataset are not in it.", ""]
    if spec.citation:
        lines += ["## Cite", "", spec.citation, *([spec.url] if spec.url else []), ""]
    return "\n".join(lines)

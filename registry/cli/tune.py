"""`benchmark tune`."""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from . import screen
from .common import (
    AsJson,
    AudioFeatures,
    Data,
    DataRoot,
    Dataset,
    Debug,
    Device,
    Encoder,
    Epochs,
    Graph,
    Hooks,
    LabelRange,
    Model,
    Plugin,
    Precision,
    RunsFolder,
    Seeds,
    TextFeatures,
    VisionFeatures,
    app,
    features_of,
    overrides_of,
    seeds_of,
)

if TYPE_CHECKING:
    from ..tuning import Trial, Tuning

MOST_ROWS = 10


@app.command()
def tune(
    model: Model,
    dataset: Dataset = "demo",
    data: Data = None,
    data_root: DataRoot = None,
    text_features: TextFeatures = None,
    audio_features: AudioFeatures = None,
    vision_features: VisionFeatures = None,
    text_encoder: Encoder = None,
    trials: Annotated[int, typer.Option("--trials", "-n", help="How many there are to be in the end.")] = 50,
    search: Annotated[
        str | None,
        typer.Option(help="JSON or TOML file of what to search, in place of the model's own; none for nothing else."),
    ] = None,
    search_settings: Annotated[
        list[str],
        typer.Option(
            "--search-set",
            help="A key to search as well: KEY=LOW..HIGH, KEY=LOW..HIGH:log, KEY=A,B,C, or KEY=A,B|C,D; repeatable.",
        ),
    ] = [],
    seeds: Seeds = ["1111"],
    preset: Annotated[str | None, typer.Option(help="Published hyper-parameters to start from.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON or TOML file of config keys to start from.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", help="KEY=VALUE of a key that is not to be searched; repeatable.")
    ] = [],
    hook: Hooks = [],
    epochs: Epochs = None,
    label_range: LabelRange = None,
    device: Device = "auto",
    precision: Precision = None,
    graph: Graph = True,
    runs: RunsFolder = Path("runs"),
    plugin: Plugin = [],
    sampler: Annotated[str, typer.Option(help="tpe, random or grid.")] = "tpe",
    seed: Annotated[int, typer.Option(help="Of the sampler: the same search tries the same.")] = 0,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Give up a trial that is worse than the median at its epoch.")
    ] = True,
    study: Annotated[str | None, typer.Option(help="Name of the study; made of all that it is of by default.")] = None,
    storage: Annotated[str | None, typer.Option(help="URL of Optuna's storage; an SQLite file by default.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help=".png, .pdf or .svg; RUNS/tune/STUDY/study.png by default.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search for hyper-parameters, scored on the validation split; the same command goes on where it was left."""
    overrides = overrides_of(settings, epochs)
    seed_numbers = seeds_of(seeds)
    from ..progress import make_watcher
    from ..search_space import parse_search
    from ..tuning import tune as tune_model

    try:
        with make_watcher(screen.err) as watcher, redirect_stdout(sys.stderr):
            tuning = tune_model(
                model,
                dataset,
                trials=trials,
                search=parse_search(search_settings),
                search_file=search,
                data=data,
                data_root=data_root,
                features=features_of(text_features, audio_features, vision_features),
                text_encoder=text_encoder,
                seeds=seed_numbers,
                preset=preset,
                config=overrides,
                config_file=config,
                hooks=hook,
                label_range=label_range,
                device=device,
                precision=precision,
                graph=graph,
                runs=runs,
                plugins=plugin,
                sampler=sampler,
                sampler_seed=seed,
                prune=prune,
                study=study,
                storage=storage,
                figure=figure,
                watcher=watcher,
                after=lambda trial, so_far: screen.tell(escape(_line(trial, so_far, trials))),
            )
    except KeyboardInterrupt:
        screen.tell("interrupted; the trials that have ended are kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(tuning.to_json() + "\n")
        return
    _show(tuning)
    options = {
        "--dataset": dataset,
        "--data": data,
        "--data-root": data_root,
        "--text-features": text_features,
        "--audio-features": audio_features,
        "--vision-features": vision_features,
        "--text-encoder": text_encoder,
        "--label-range": label_range,
        "--precision": precision,
        "--config": tuning.config_file,
        "--seeds": "1111-1115",
    }
    more: list[tuple[str, object]] = [*(("--hook", name) for name in hook), *(("--plugin", name) for name in plugin)]
    more += [("--runs", runs)] if runs != Path("runs") else []
    more += [("--device", device)] if device != "auto" else []
    words = [word for pair in (*options.items(), *more) if pair[1] is not None for word in map(str, pair)]
    screen.say("next, the best configuration on the test split:")
    screen.say(f"  {escape(shlex.join(['benchmark', 'run', '--model', model, *words]))}")


def _line(trial: Trial, so_far: Tuning, trials: int) -> str:
    """Return what is said of a trial that has ended."""
    if trial.status == "ok":
        epochs = ", ".join(map(str, trial.best_epochs))
        said = f"validation MAE {trial.valid_mae:.4f} in epoch {epochs}" + (f", {trial.reason}" * bool(trial.reason))
    else:
        said = f"{trial.status} {trial.reason}" if trial.status == "pruned" else f"failed: {trial.reason}"
    best = f"; best {so_far.best.valid_mae:.4f}, of trial {so_far.best.number}" if so_far.ranking else ""
    return f"trial {trial.number} ({len(so_far.trials)} of {trials}): {said}{best}"


def _show(tuning: Tuning) -> None:
    from ..config import as_typed

    rows = []
    for trial in tuning.ranking[:MOST_ROWS]:
        settings = {
            key: f"{value:.4g}" if isinstance(value, float) else as_typed(value)
            for key, value in trial.settings.items()
        }
        rows.append(
            {
                "trial": str(trial.number),
                "validation MAE": f"{trial.valid_mae:.4f}",
                "epoch": ", ".join(map(str, trial.best_epochs)),
                "settings": "  ".join(f"{key}={value}" for key, value in settings.items()),
            }
        )
    counts = ", ".join(f"{number} {status}" for status, number in tuning.counts.items())
    screen.print_table(f"{tuning.model} on {tuning.dataset}, best of {len(tuning.trials)} trials ({counts})", rows)
    from ..tuning import SELECTION

    screen.say(f"selection: {SELECTION}")
    if tuning.importance:
        shares = [f"{key} {share:.2f}" for key, share in list(tuning.importance.items())[:5]]
        screen.say(f"what matters most (share of variance): {', '.join(shares)}")
    screen.say(f"changed settings: {', '.join(f'{k}={as_typed(v)}' for k, v in tuning.changed.items()) or 'none'}")
    screen.say(f"best configuration: {escape(str(tuning.config_file))}")
    screen.say(f"figure: {escape(str(tuning.figure))}; every trial: {escape(str(tuning.folder / 'trials.csv'))}")

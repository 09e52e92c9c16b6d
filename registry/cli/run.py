"""`benchmark run`."""

from __future__ import annotations

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
    Deterministic,
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
    Track,
    VisionFeatures,
    app,
    features_of,
    interrupted,
    overrides_of,
    say_where_tracked,
    seeds_of,
)

if TYPE_CHECKING:
    from ..benchmark import Result

SMALL_TABLE = 10
"""A run's tables of at most this many rows are printed."""


@app.command()
def run(
    model: Model,
    dataset: Dataset = "demo",
    data: Data = None,
    data_root: DataRoot = None,
    text_features: TextFeatures = None,
    audio_features: AudioFeatures = None,
    vision_features: VisionFeatures = None,
    text_encoder: Encoder = None,
    seeds: Seeds = ["1111"],
    preset: Annotated[str | None, typer.Option(help="Published hyper-parameters to start from.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON or TOML file of config keys.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", help="KEY=VALUE; see `benchmark describe MODEL`; repeatable.")
    ] = [],
    hook: Hooks = [],
    epochs: Epochs = None,
    label_range: LabelRange = None,
    device: Device = "auto",
    precision: Precision = None,
    graph: Graph = True,
    deterministic: Deterministic = False,
    runs: RunsFolder = Path("runs"),
    plugin: Plugin = [],
    force: Annotated[bool, typer.Option("--force", help="Train again where a finished run exists.")] = False,
    track: Track = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train and test a model, once for each seed, and print its table."""
    overrides = overrides_of(settings, epochs)
    seed_numbers = seeds_of(seeds)
    from ..benchmark import failure_log
    from ..benchmark import run as run_model
    from ..progress import make_watcher

    say_where_tracked(track, runs)
    try:
        # What a plugin prints is not a result.
        with make_watcher(screen.err) as watcher, redirect_stdout(sys.stderr):
            result = run_model(
                model,
                dataset,
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
                deterministic=deterministic,
                runs=runs,
                plugins=plugin,
                force=force,
                track=track,
                watcher=watcher,
            )
    except KeyboardInterrupt:
        raise interrupted() from None
    if as_json:
        sys.stdout.write(result.to_json() + "\n")
    else:
        _show_result(result)
    for failed in (run for run in result.runs if run.status == "failed"):
        if debug and failure_log(result.folder, failed.seed).exists():
            screen.tell(escape(failure_log(result.folder, failed.seed).read_text("utf-8")))
    if len(result.ok) < len(result.runs):
        raise typer.Exit(1)


def _show_result(result: Result) -> None:
    from ..tables import artifact_tables, result_table

    if result.ok:
        rows = result_table(result)
        if result.std is not None and screen.out.is_terminal and screen.table_of(rows, fold=True)[1] > screen.out.width:
            rows = [{key: value for key, value in row.items() if not key.startswith("seed ")} for row in rows]
        screen.print_table(f"{result.model} on {result.dataset}, test split", rows)
        for name, value in result.protocol.items():
            screen.say(f"{name}: {escape(value)}")
        for name, table in artifact_tables(result, SMALL_TABLE).items():
            over = f", mean over {len(result.ok)} seeds" if len(result.ok) > 1 else ""
            # Hooks see the train split, and are left as they were at the best epoch.
            screen.print_table(f"{name.replace('_', ' ')}, train split at the best epoch{over}", table)
    failed = [str(run.seed) for run in result.runs if run.status == "failed"]
    if failed and result.ok:
        screen.out.print(
            f"seeds that failed, and do not count above: {', '.join(failed)}", highlight=False, soft_wrap=True
        )
    for done in result.ok:
        screen.say(f"run folder: {escape(str(done.folder))}")

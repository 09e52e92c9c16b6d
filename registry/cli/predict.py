"""`benchmark predict` and `benchmark missing`: finished runs on other clips."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from . import screen
from .common import Debug, Device, OutFile, Plugin, app

ROWS = 20
"""Predictions that are printed; a file has them all."""

TextEncoder = Annotated[
    str | None, typer.Option("--text-encoder", help="Where the run's text encoder lies now, if its name does not say.")
]


@app.command()
def predict(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of one seed.")],
    features: Annotated[
        Path | None,
        typer.Argument(help="Feature file, with or without labels and splits; a run on demo needs none."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, valid or test; all that are there by default.")] = None,
    target: OutFile = None,
    text_encoder: TextEncoder = None,
    device: Device = "auto",
    plugin: Plugin = [],
    debug: Debug = False,
) -> None:
    """Say the sentiment of clips by a finished run's model: of a feature file, or of a single video's features."""
    from ..prediction import CLIPS, find_run, metrics_of, require_format, write_predictions
    from ..prediction import predict as predict_clips
    from ..progress import make_watcher

    if target is not None:
        require_format(target)
    with make_watcher(screen.err) as watcher, redirect_stdout(sys.stderr):
        run = find_run(folder, plugins=plugin)
        table = predict_clips(run, features, split=split, text_encoder=text_encoder, device=device, watcher=watcher)
    metrics = metrics_of(run, table)
    if target is not None:
        write_predictions(run, table, target)
    else:
        rows = [
            {str(name): value if isinstance(value, str) else f"{value:.4f}" for name, value in row.items()}
            for row in table.head(ROWS).to_dict("records")
        ]
        screen.print_table(f"{run.settings['model']}, seed {run.settings['seed']}", rows)
        more = f"{ROWS} of {len(table)} clips; " if len(table) > ROWS else ""
        screen.say(f"{more}-o FILE.csv or FILE.json writes them to a file")
    if metrics:
        splits = {name: "value" if name == CLIPS else name for name in metrics}
        screen.print_table(
            "metrics",
            [
                {"metric": name, **{splits[of]: f"{metrics[of][name]:.4f}" for of in metrics}}
                for name in next(iter(metrics.values()))
            ],
        )
    if target is not None:
        screen.say(f"{len(table)} predictions written to {escape(str(target))}")
